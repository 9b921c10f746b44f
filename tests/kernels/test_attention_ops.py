"""The operators and backends under attention: traced and compiled whole, little saved, refusals that say what is missing."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from seqengine.kernels.attention import blocked, flash, flex, op, ops, sdpa
from seqengine.kernels.attention.bounds import key_intervals
from seqengine.kernels.attention.op import attention
from seqengine.kernels.attention.reference import visible
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(B=2, T=9, S=None, H=4, G=2, K=4, V=4, dtype=torch.float64):
    S = T if S is None else S
    return [
        randn(B, T, H, K, dtype=dtype),
        randn(B, S, G, K, seed=1, dtype=dtype),
        randn(B, S, G, V, seed=2, dtype=dtype),
    ]


@pytest.mark.parametrize(
    ("shape", "options", "whole"),
    [
        ({}, (None, True, None, 0.5, "sdpa"), True),
        ({"T": 5, "S": 3, "V": 6}, (None, True, 2, 0.5, "torch"), False),
        ({"B": 1}, (torch.tensor([0, 4, 4, 9]), False, 3, 0.5, "torch"), True),
    ],
    ids=["sdpa", "window", "packed"],
)
def test_operators_keep_torchs_contract(shape, options, whole):
    """Tracing with symbolic sizes, the slow part, for the two ways of an optional argument."""
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    q, k, v = (t.requires_grad_() for t in tensors(**shape))
    torch.library.opcheck(ops.attention, (q, k, v, *options), test_utils=checks)
    out, lse = (t.detach().requires_grad_() for t in ops.attention(q, k, v, *options))
    dout, dlse = randn(*out.shape, seed=3).requires_grad_(), randn(*lse.shape, seed=4).requires_grad_()
    given = None if options[-1] == "sdpa" else dlse
    if whole:
        torch.library.opcheck(ops.attention, (q, k, v, *options), test_utils=["test_aot_dispatch_dynamic"])
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.attention_backward, (dout, given, q, k, v, out, lse, *options), test_utils=checks)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does so
@pytest.mark.parametrize("backend", ["auto", "torch", "sdpa", "reference"])
@pytest.mark.parametrize("with_lse", [True, False])
def test_compiles_whole_forward_and_backward(backend, with_lse):
    def function(q, k, v):
        if not with_lse:
            return attention(q, k, v, backend=backend).sin().sum()
        out, lse = attention(q, k, v, return_lse=True, backend=backend)
        return out.sin().sum() + lse.cos().sum()

    eager, compiled = ([t.clone().requires_grad_() for t in tensors(T=50)] for _ in range(2))
    expected = function(*eager)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    assert_close(actual, expected)
    expected.backward()
    actual.backward()
    for a, b in zip(compiled, eager, strict=True):
        assert_close(a.grad, b.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_with_windows_documents_and_any_length():
    def function(q, k, v, bounds):
        return attention(q, k, v, window=5, cu_seqlens=bounds)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (20, 33, 47):
        arguments = (*tensors(B=1, T=T), torch.tensor([0, 7, 7, T]))
        assert_close(compiled(*arguments), function(*arguments))


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        shapes = ((2, 7, 4, 8), (2, 9, 2, 8), (2, 9, 2, 6))
        for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            out, lse = attention(*(torch.empty(s, dtype=dtype) for s in shapes), return_lse=True)
            assert (out.shape, out.dtype) == ((2, 7, 4, 6), dtype)
            assert (lse.shape, lse.dtype) == ((2, 4, 7), wide)


@pytest.mark.parametrize("backend", ["auto", "torch", "sdpa"])
@pytest.mark.parametrize("cotangent", ["out", "both"])
def test_autocast_changes_nothing(backend, cotangent):
    def run():
        leaves = [t.requires_grad_() for t in tensors(T=40, dtype=torch.float32)]
        out, lse = attention(*leaves, return_lse=True, backend=backend)
        total = (out * randn(*out.shape, seed=5).float()).sum() + (lse.square().sum() if cotangent == "both" else 0)
        first = torch.autograd.grad(total, leaves, create_graph=True)  # the backward, too, under autocast
        return (out, lse, *first, *torch.autograd.grad(sum(g.sum() for g in first), leaves))

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run()
        definition = attention(*tensors(T=40, dtype=torch.float32), backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch.equal(definition, attention(*tensors(T=40, dtype=torch.float32), backend="reference"))


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_saves_q_k_v_out_and_lse(backend):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, k, v = (t.requires_grad_() for t in tensors(T=300, dtype=torch.bfloat16))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, lse = attention(q, k, v, return_lse=True, backend=backend)
    assert sum(kept.values()) == sum(t.nbytes for t in (q, k, v, out, lse))


def test_without_a_cotangent_of_lse_the_fused_backward_runs(monkeypatch):
    calls = []
    for module, name in ((sdpa, "cpu_backward"), (blocked, "backward")):
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=inner, _n=name: calls.append(_n) or _f(*a))
    leaves = [t.requires_grad_() for t in tensors()]
    attention(*leaves).sum().backward()
    attention(*leaves, return_lse=True)[0].sum().backward()
    assert calls == ["cpu_backward"] * 2
    attention(*leaves, return_lse=True)[1].sum().backward()
    assert calls[2:] == ["backward"]


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ({}, {}, "sdpa"),
        ({}, {"causal": False}, "sdpa"),
        ({"dtype": torch.float32}, {}, "sdpa"),
        ({"T": 3, "S": 9}, {"causal": False}, "sdpa"),
        ({"T": 1, "S": 9}, {}, "sdpa"),
        ({}, {"window": 9}, "sdpa"),
        ({"T": 3, "S": 9}, {}, "torch"),
        ({"T": 1, "S": 0}, {}, "torch"),
        ({"V": 6}, {}, "torch"),
        ({}, {"window": 8}, "torch"),
        ({"B": 1}, {"cu_seqlens": torch.tensor([0, 9])}, "torch"),
        ({"dtype": torch.bfloat16}, {}, "torch"),
        ({"dtype": torch.float16}, {}, "torch"),
    ],
    ids=str,
)
def test_auto_follows_the_table_on_a_cpu(shape, options, expected, monkeypatch):
    chosen = []
    inner = ops.attention
    monkeypatch.setattr(op, "ops", SimpleNamespace(attention=lambda *a: chosen.append(a[-1]) or inner(*a)))
    attention(*tensors(**shape), **options)
    assert chosen == [expected]


@pytest.mark.parametrize(
    ("dtype", "G", "V", "return_lse", "expected"),
    [
        (torch.bfloat16, 4, 4, False, "sdpa"),
        (torch.float16, 2, 4, False, "sdpa"),
        (torch.float16, 2, 6, False, "torch"),
        (torch.float32, 4, 6, False, "sdpa"),
        (torch.float32, 2, 4, False, "torch"),
        (torch.float32, 4, 300, False, "torch"),
        (torch.float64, 4, 4, False, "torch"),
        (torch.bfloat16, 4, 4, True, "torch"),
    ],
    ids=str,
)
def test_auto_follows_the_table_on_cuda(dtype, G, V, return_lse, expected):
    def on_cuda(*shape):
        return SimpleNamespace(dtype=dtype, shape=shape, device=torch.device("cuda"), numel=lambda: 1)

    q, k, v = on_cuda(1, 9, 4, 4), on_cuda(1, 9, G, 4), on_cuda(1, 9, G, V)
    assert op._choose(q, k, v, True, return_lse) == expected
    assert op._choose(q, k, v, False, return_lse) == "torch"


def test_torchs_attention_with_grouped_heads_is_the_same():
    """What on_device calls, where a CPU can call it: full and causal, repeated heads inside torch."""
    q, k, v = tensors(T=20)
    for causal in (True, False):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, scale=0.3, enable_gqa=True
        )
        assert_close(out.transpose(1, 2), attention(q, k, v, causal=causal, scale=0.3))


@pytest.mark.parametrize(
    ("T", "S", "causal", "window"), [(300, 300, True, None), (300, 300, False, 50), (130, 400, True, 1)]
)
def test_block_masks_of_flex_are_those_of_the_pairs(T, S, causal, window):
    mask = flex.block_mask(*key_intervals(T, S, causal, window, None, torch.device("cpu")), T, S)
    pairs = visible(T, S, causal, window, None, torch.device("cpu"))
    for i in range(-(-T // 128)):
        for j in range(-(-S // 128)):
            block = pairs[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            whole = j in mask.full_kv_indices[0, 0, i, : mask.full_kv_num_blocks[0, 0, i]]
            partial = j in mask.kv_indices[0, 0, i, : mask.kv_num_blocks[0, 0, i]]
            assert whole == bool(block.all())
            assert partial or whole or not block.any()
            assert not (partial and whole)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"T": 150}, {}),
        ({"T": 150, "V": 8}, {"window": 20}),
        ({"T": 150}, {"causal": False, "window": 3}),
        ({"T": 40, "S": 200}, {"window": 60}),
        ({"T": 40, "S": 30}, {}),
        ({"B": 1, "T": 150}, {"cu_seqlens": torch.tensor([0, 0, 7, 140, 150])}),
        ({"B": 1, "T": 150, "G": 4}, {"cu_seqlens": torch.tensor([0, 70, 150]), "causal": False}),
    ],
    ids=str,
)
def test_flex_is_the_reference(shape, options):
    q, k, v = tensors(**shape)
    out, lse = attention(q, k, v, **options, return_lse=True, backend="flex")
    expected, expected_lse = attention(q, k, v, **options, return_lse=True, backend="reference")
    sees = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, sees)
    assert_close(out, expected)
    assert_close(lse[sees], expected_lse[sees])


def stand_in(monkeypatch, version="2.8.3"):
    """A package that notes how it is called and computes by the blocks of `blocked`."""
    calls = []

    def options(how, bounds=None):
        left, right = how.get("window_size", (how.get("window_size_left"), how.get("window_size_right")))
        assert right == (0 if how["causal"] else left)
        return bounds, how["causal"], None if left == -1 else left + 1, how["softmax_scale"]

    def forward(q, k, v, **how):
        calls.append(("forward", how))
        out, lse = blocked.forward(q, k, v, *options(how))
        return out, lse.masked_fill(lse == -torch.inf, torch.inf), None

    def varlen_forward(q, k, v, bounds, bounds_k, longest, longest_k, **how):
        calls.append(("varlen_forward", {**how, "longest": (longest, longest_k), "bounds": bounds}))
        out, lse = blocked.forward(q[None], k[None], v[None], *options(how, bounds_k))
        return out[0], lse[0], None

    def backward(dout, q, k, v, out, lse, dq, dk, dv, **how):
        calls.append(("backward", how))
        assert not bool((lse == -torch.inf).any())
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        for target, found in zip((dq, dk, dv), blocked.backward(dout, None, q, k, v, out, lse, *options(how))):
            target.copy_(found)

    def varlen_backward(dout, q, k, v, out, lse, dq, dk, dv, bounds, bounds_k, longest, longest_k, **how):
        calls.append(("varlen_backward", {**how, "longest": (longest, longest_k), "bounds": bounds}))
        rows = [t[None] for t in (q, k, v, out, lse)]
        found = blocked.backward(dout[None], None, *rows, *options(how, bounds_k))
        for target, gradient in zip((dq, dk, dv), found):
            target.copy_(gradient[0])

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__, package.__path__ = version, []
    package.flash_attn_func, package.flash_attn_varlen_func = forward, varlen_forward
    interface._flash_attn_backward, interface._flash_attn_varlen_backward = backward, varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return calls


@pytest.mark.parametrize(
    ("shape", "options", "window"),
    [
        ({}, (None, True, None, 0.3), (-1, 0)),
        ({}, (None, False, None, 0.3), (-1, -1)),
        ({"T": 4, "S": 20}, (None, True, 5, 0.3), (4, 0)),
        ({"T": 20, "S": 4}, (None, True, None, 0.3), (-1, 0)),
        ({}, (None, False, 5, 0.3), (4, 4)),
        ({"B": 1}, (torch.tensor([0, 2, 2, 9]), True, None, 0.3), (-1, 0)),
    ],
    ids=str,
)
def test_the_flash_package_gets_these_arguments(shape, options, window, monkeypatch):
    """On a CPU through the operator: attention() itself refuses tensors that are not on CUDA."""
    calls = stand_in(monkeypatch)
    leaves, plain = ([t.requires_grad_() for t in tensors(**shape)] for _ in range(2))
    out, lse = ops.attention(*leaves, *options, "flash-attn")
    expected, expected_lse = ops.attention(*plain, *options, "torch")
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    dout = randn(*out.shape, seed=4)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, plain, dout), strict=True):
        assert torch.equal(a, b)
    (name, forward), (_, backward) = calls
    assert forward["window_size"] == (backward["window_size_left"], backward["window_size_right"]) == window
    assert backward["deterministic"]
    assert forward["return_attn_probs"]
    if name == "varlen_forward":
        assert forward["longest"] == backward["longest"] == (7, 7)
        assert forward["bounds"].dtype == torch.int32


@pytest.mark.parametrize("version", ["2.7.4", "3.0.0", "1.0.9", "dev"])
def test_other_versions_of_the_flash_package_are_refused(version, monkeypatch):
    stand_in(monkeypatch, version)
    with pytest.raises(ValueError, match=r"flash_attn >= 2\.8, < 3.*got " + version):
        attention(*tensors(dtype=torch.bfloat16), backend="flash-attn")


def test_refusals_of_the_flash_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=r"pip install seqengine-train\[flash-attn\]"):
        attention(*tensors(dtype=torch.bfloat16), backend="flash-attn")
    stand_in(monkeypatch, "2.8.0.post2")
    with pytest.raises(ValueError, match="needs q, k, v on a CUDA device; got cpu"):
        attention(*tensors(dtype=torch.bfloat16), backend="flash-attn")
    assert flash.takes(torch.empty(1, 1, 1, 64), torch.empty(1, 1, 1, 64))
    for K, V in ((64, 32), (12, 12), (264, 264)):
        assert not flash.takes(torch.empty(1, 1, 1, K), torch.empty(1, 1, 1, V))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 9, 4)}, r"attention: q must be \[B, T, H, K\]; got \(2, 9, 4\)"),
        ({"q": torch.zeros(2, 9, 4, 0)}, "must have H, K >= 1"),
        ({"q": torch.zeros(2, 9, 4, 4).half()}, "k must have q's dtype torch.float16; got torch.float32"),
        ({"q": torch.zeros(2, 9, 4, 4, dtype=torch.int64)}, "q must be float64, float32"),
        ({"k": torch.zeros(2, 9, 4)}, r"k must be \[B, S, G, K\]"),
        ({"k": torch.zeros(2, 9, 2, 5)}, r"k \[B, S, G, K\] must have B=2, K=4; got \(2, 9, 2, 5\)"),
        ({"k": torch.zeros(1, 9, 2, 4)}, "must have B=2, K=4"),
        ({"k": torch.zeros(2, 9, 3, 4)}, r"must have G dividing H=4; got \(2, 9, 3, 4\)"),
        ({"k": torch.zeros(2, 9, 0, 4)}, "must have G dividing H=4"),
        ({"v": torch.zeros(2, 9, 4)}, r"v must be \[B, S, G, V\]"),
        ({"v": torch.zeros(2, 8, 2, 4)}, r"v must be \[B, S, G, V\] = \[2, 9, 2, 4\]; got \(2, 8, 2, 4\)"),
        ({"v": torch.zeros(2, 9, 2, 4).bfloat16()}, "v must have q's dtype"),
        ({"v": torch.zeros(2, 9, 2, 4, device="meta")}, "v must be on cpu"),
        ({"causal": 1}, "causal must be a bool; got 1"),
        ({"window": 0}, "window must be None or an int >= 1; got 0"),
        ({"window": 2.5}, "window must be None or an int >= 1; got 2.5"),
        ({"window": True}, "window must be None or an int"),
        ({"scale": "big"}, "scale must be None or a number; got big"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "q, k, v must be one row, B = 1"),
        (
            {"backend": "cudnn"},
            "backend must be one of 'auto', 'torch', 'sdpa', 'flex', 'flash-attn', 'reference'; got cudnn",
        ),
        ({"backend": "sdpa", "window": 3}, "backend 'sdpa' has no window, no cu_seqlens, and if causal T = S"),
        ({"backend": "sdpa", "q": torch.zeros(2, 5, 4, 4)}, "backend 'sdpa' has no window"),
        ({"backend": "sdpa", "v": torch.zeros(2, 9, 2, 5)}, "backend 'sdpa' on a CPU needs V = K=4"),
        ({"backend": "flex", "q": torch.zeros(2, 0, 4, 4)}, "backend 'flex' needs B, T, S >= 1"),
        ({"backend": "flex", "q": torch.zeros(2, 9, 4, 4).requires_grad_()}, "backend 'flex' has no backward on a CPU"),
    ],
)
def test_rejects(change, message):
    q, k, v = tensors(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        attention(**{"q": q, "k": k, "v": v, **change})


@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "flex"])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([0, 5]), r"cu_seqlens must ascend from 0 to T=9; got \[0, 5\]"),
        (torch.tensor([1, 9]), "must ascend from 0"),
        (torch.tensor([0, 6, 3, 9]), "must ascend from 0"),
        (torch.tensor([9]), r"vector \[N \+ 1\], N >= 1"),
        (torch.tensor([[0, 9]]), r"vector \[N \+ 1\], N >= 1"),
        (torch.tensor([0.0, 9.0]), "cu_seqlens must be an int32 or int64 vector"),
    ],
)
def test_rejects_boundaries(bounds, message, backend):
    with pytest.raises(ValueError, match=message):
        attention(*tensors(B=1), cu_seqlens=bounds, backend=backend)


def test_rejects_documents_with_other_keys_than_queries():
    with pytest.raises(ValueError, match="as many tokens as q, S = T"):
        attention(*tensors(B=1, S=8), cu_seqlens=torch.tensor([0, 9]))
