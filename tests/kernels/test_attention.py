"""attention against its definition: values, log-sum-exp, every gradient; windows, documents, groups, extremes, bad input."""

import math
from itertools import pairwise

import pytest
import torch

from seqengine.kernels.attention import blocked, reference
from seqengine.kernels.attention.op import attention
from tests.kernels.largest_tensor import LargestTensor
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAMES = ("q", "k", "v")


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of queries and of keys at small sizes."""
    monkeypatch.setitem(blocked.ROWS, "cpu", 24)
    monkeypatch.setitem(blocked.KEYS, "cpu", 40)


def tensors(B=2, T=65, S=None, H=6, G=2, K=5, V=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    S = T if S is None else S
    shapes = {"q": (B, T, H, K), "k": (B, S, G, K), "v": (B, S, G, V)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def cotangents(out, lse):
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, lse)]


def run(arguments, cotangent="both", **options):
    """Output, log-sum-exp with 0 for -inf, and the gradients for random cotangents of out, lse or both."""
    leaves = {n: t.clone(memory_format=torch.preserve_format).requires_grad_() for n, t in arguments.items()}
    out, lse = attention(**leaves, return_lse=True, **options)
    dout, dlse = cotangents(out, lse)
    sees = lse.detach() > -math.inf
    outputs = {"both": [out, lse], "out": [out], "lse": [lse]}[cotangent]
    given = {"both": [dout, dlse], "out": [dout], "lse": [dlse]}[cotangent]
    found = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)
    gradients = {f"d{n}": torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found)}
    return {"out": out, "lse": lse.masked_fill(~sees, 0), "sees": sees, **gradients}


def assert_matches(actual, expected, tolerance=None):
    assert torch.equal(actual["sees"], expected["sees"])
    for name in ("out", "lse", "dv"):
        assert_close(actual[name], expected[name], name, tolerance)
    for name in ("dq", "dk"):
        if expected[name].numel() == 0 or float(expected[name].abs().max()) > 1e-9:
            assert_close(actual[name], expected[name], name, tolerance)
        else:  # one key has all the weight: the scores have no gradient, and there is nothing to be relative to
            scale = float(expected["dv"].abs().max()) if expected["dv"].numel() else 0.0
            assert float(actual[name].abs().max()) <= 1e-12 * scale


def assert_matches_reference(arguments, backend="torch", **options):
    for cotangent in ("both", "out", "lse"):
        expected = run(arguments, cotangent, backend="reference", **options)
        assert_matches(run(arguments, cotangent, backend=backend, **options), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 2, 3, 63, 64, 65, 257])
def test_matches_reference_with_gradients(T, causal):
    assert_matches_reference(tensors(T=T), causal=causal)
    assert_matches_reference(tensors(T=T, V=5), "auto", causal=causal)


@pytest.mark.parametrize("T", [1000, 1300])
def test_matches_reference_over_several_default_blocks(T):
    arguments = tensors(B=1, T=T, H=2, G=1)
    assert 2 * blocked.ROWS["cpu"] < T
    assert_matches(run(arguments, backend="torch"), run(arguments, backend="reference"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("G", [1, 2, 3, 6])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_use_their_group(G, causal):
    assert_matches_reference(tensors(T=90, G=G), causal=causal)
    assert_matches_reference(tensors(T=90, G=G, V=5), "sdpa", causal=causal)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("T", "S"), [(1, 100), (7, 100), (100, 7), (100, 1), (99, 100), (100, 99), (3, 0), (0, 3)])
@pytest.mark.parametrize("window", [None, 1, 5, 60])
@pytest.mark.parametrize("causal", [True, False])
def test_other_numbers_of_keys_than_queries(T, S, window, causal):
    assert_matches_reference(tensors(T=T, S=S), causal=causal, window=window)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [1, 2, 63, 130, 500])
@pytest.mark.parametrize("causal", [True, False])
def test_windows(window, causal):
    assert_matches_reference(tensors(T=130), causal=causal, window=window)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [2, 4, 64])
def test_several_heads_and_batches_at_once(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    arguments = tensors(B=3, T=90, H=6, G=3)
    assert max(h.g.stop - h.g.start for h in blocked.plan(arguments["q"], arguments["k"], None, True, None).heads) > 1
    assert_matches_reference(arguments, window=50)


def test_window_of_one_sees_its_own_key_only():
    a = tensors(G=6, V=5)
    for causal in (True, False):
        assert_close(attention(**a, window=1, causal=causal), a["v"])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bounds", [[0, 130], [0, 0, 70, 70, 71, 130], [0, 1, 2, 130, 130], [*range(0, 130, 3), 130]])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 20), (False, 1)])
def test_documents_do_not_see_each_other(bounds, causal, window):
    arguments = tensors(B=1, T=130)
    packed = torch.tensor(bounds, dtype=torch.int32)
    assert_matches_reference(arguments, causal=causal, window=window, cu_seqlens=packed)
    whole = run(arguments, backend="torch", causal=causal, window=window, cu_seqlens=packed)
    for start, stop in pairwise(bounds):
        if start < stop:
            part = {n: t[:, start:stop] for n, t in arguments.items()}
            out, lse = attention(**part, causal=causal, window=window, return_lse=True)
            assert_close(whole["out"][:, start:stop], out)
            assert_close(whole["lse"][..., start:stop], lse)


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
def test_decoding_a_token_is_the_last_row(backend):
    a = tensors(T=300, V=5)
    out, lse = attention(**a, return_lse=True, backend=backend)
    for t in (1, 2, 129, 300):
        one, one_lse = attention(a["q"][:, t - 1 : t], a["k"][:, :t], a["v"][:, :t], return_lse=True, backend=backend)
        assert_close(one, out[:, t - 1 : t])
        assert_close(one_lse, lse[..., t - 1 : t])


@pytest.mark.parametrize("window", [None, 17])
def test_prefill_by_chunks_over_the_keys_so_far_is_one_call(window):
    a, parts = tensors(T=100), []
    for start, stop in pairwise([0, 1, 40, 41, 100]):
        parts.append(attention(a["q"][:, start:stop], a["k"][:, :stop], a["v"][:, :stop], window=window))
    assert_close(torch.cat(parts, 1), attention(**a, window=window))


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_future_does_not_reach_the_past(backend, dtype):
    a = tensors(T=200, V=5, dtype=dtype)
    before = attention(**a, backend=backend)
    a["k"][:, 150] += 1e6
    a["v"][:, 150] += 1e6
    after = attention(**a, backend=backend)
    assert torch.equal(after[:, :150], before[:, :150])
    assert float((after - before)[:, 150:].abs().max()) > 1


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck_of_both_outputs(causal):
    for backend in ("torch", "sdpa"):
        a = tensors(B=1, T=3, H=2, G=1, K=2, V=2)

        def function(q, k, v, backend=backend):
            return attention(q, k, v, causal=causal, return_lse=True, backend=backend)

        leaves = [t.requires_grad_() for t in a.values()]
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(lambda *x: function(*x)[0], leaves)


def test_gradgradcheck_with_window_documents_and_queries_without_keys():
    packed = [t.requires_grad_() for t in tensors(B=1, T=6, H=2, G=1, K=2, V=3).values()]
    bounds = torch.tensor([0, 2, 2, 6])
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, window=2, cu_seqlens=bounds, return_lse=True), packed)
    short = [t.requires_grad_() for t in tensors(B=1, T=4, S=2, H=2, G=1, K=2, V=3).values()]

    def function(*x):
        out, lse = attention(*x, return_lse=True)
        return out, lse[..., 2:]

    assert torch.autograd.gradcheck(function, short)
    assert torch.autograd.gradgradcheck(function, short)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_queries_without_keys_give_zero_and_finite_gradients(backend):
    actual = run(tensors(T=50, S=20), backend=backend)
    assert not actual["sees"][..., :30].any()
    assert actual["sees"][..., 30:].all()
    assert actual["out"][:, :30].abs().max() == 0
    assert actual["dq"][:, :30].abs().max() == 0
    assert all(bool(torch.isfinite(t).all()) for t in actual.values())


@pytest.mark.parametrize("backend", ["torch", "sdpa"])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand(sign, backend):
    a = tensors(T=80, K=4, V=4)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1)).double() + 1
    a["q"] = a["q"].sign()
    a["k"] = (sign * 32 * order[:, None, None]).expand_as(a["k"]).clone()  # whole numbers: the scores are exact
    scores = torch.einsum("bthk,bshk->bhts", a["q"], a["k"].repeat_interleave(3, 2))
    assert float(scores.abs().max()) >= 1e4
    assert_matches(run(a, backend=backend, scale=1.0), run(a, backend="reference", scale=1.0))
    low = run({n: t.float() for n, t in a.items()}, backend=backend, scale=1.0)
    assert all(bool(torch.isfinite(t).all()) for t in low.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "sdpa", "auto"])
def test_lower_precision_is_near_float64(dtype, backend):
    a = tensors(T=300, K=16, V=16, dtype=dtype)
    exact = run({n: t.double() for n, t in a.items()}, backend="reference")
    actual = run(a, backend=backend)
    assert actual["out"].dtype == actual["dq"].dtype == dtype
    assert actual["lse"].dtype == torch.float32
    assert_matches(actual, exact, RELATIVE[dtype])
    assert_close(actual["lse"], exact["lse"])


def test_backend_torch_rounds_halves_once():
    a = tensors(T=200, K=16, dtype=torch.bfloat16)
    out, lse = attention(**a, return_lse=True, backend="torch")
    wide, wide_lse = attention(**{n: t.float() for n, t in a.items()}, return_lse=True, backend="torch")
    assert torch.equal(out, wide.to(torch.bfloat16))
    assert torch.equal(lse, wide_lse)


@pytest.mark.parametrize("backend", ["torch", "sdpa", "reference"])
def test_non_contiguous_inputs(backend):
    a = tensors(T=70, V=5)
    expected = run(a, backend=backend)
    strided = {n: t.transpose(1, -1).contiguous().transpose(1, -1) for n, t in a.items()}
    assert strided["q"].stride(-1) != 1
    assert_matches(run(strided, backend=backend), expected)
    heads_first = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in a.items()}
    assert_matches(run(heads_first, backend=backend), expected)


@pytest.mark.parametrize("backend", ["torch", "sdpa", "reference"])
@pytest.mark.parametrize("shape", [{"B": 0}, {"T": 0}, {"B": 0, "T": 0}, {"T": 3, "S": 0}, {"T": 0, "S": 3}], ids=str)
def test_empty_tensors_give_empty_results_and_gradients(shape, backend):
    a = tensors(**{"T": 5, "V": 5, **shape})
    actual = run(a, backend=backend, causal=False)
    assert actual["out"].shape == (*a["q"].shape[:3], 5)
    assert all(float(actual[f"d{n}"].abs().sum()) == 0 for n in NAMES)
    assert not actual["sees"].any() or a["k"].shape[1] > 0


def test_scale_defaults_to_the_root_of_the_key_width():
    a = tensors(K=16)
    assert_close(attention(**a), attention(**a, scale=0.25))
    assert_close(attention(**a, scale=0), attention(a["q"] * 0, a["k"], a["v"]))


def test_never_holds_the_scores():
    a = {n: t.requires_grad_() for n, t in tensors(B=1, T=4096, H=2, G=1, K=8, V=8, dtype=torch.float32).items()}
    for backend in ("torch", "sdpa"):
        with LargestTensor() as largest:
            attention(**a, backend=backend).sum().backward()
        assert largest.elements <= max(blocked.ROWS["cpu"] * blocked.KEYS["cpu"], 2 * 4096 * 8)


class CountScores(torch.utils._python_dispatch.TorchDispatchMode):
    """The scores that matrix products make."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default:
            self.count += result.numel()
        return result


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 0.55),
        ({"causal": False}, 1.0),
        ({"window": 64}, (64 + 128) / 2048),
        ({"causal": False, "window": 64}, (2 * 64 + 128) / 2048),
        ({"cu_seqlens": torch.arange(0, 2049, 256)}, (128 + 64) / 2048),
        ({"cu_seqlens": torch.arange(0, 2049, 2)}, 128 / 2048),
    ],
    ids=str,
)
def test_blocks_that_nothing_sees_cost_nothing(options, most):
    a = tensors(B=1, T=2048, H=1, G=1, K=4, V=4)
    with CountScores() as scores:
        attention(**a, **options, backend="torch")
    assert scores.count <= most * 2048**2


def test_keys_and_values_are_not_repeated_for_the_heads_of_a_group():
    a = {n: t.requires_grad_() for n, t in tensors(B=1, T=1, S=5000, H=8, G=1, K=16, V=16).items()}
    with LargestTensor() as largest:
        attention(**a, backend="torch").sum().backward()
    assert largest.elements <= a["k"].numel()


def test_two_runs_agree_bit_for_bit():
    a = tensors(T=333, V=5, dtype=torch.float32)
    for backend in ("torch", "sdpa"):
        first, second = (run(a, "out", backend=backend) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_with_the_log_sum_exp_of_all_keys_add_up_over_parts():
    """What a ring of key blocks does: each part's gradients from the whole's out and lse."""
    from seqengine.kernels.attention import ops

    a = tensors(T=64)
    whole = run(a, causal=False, backend="torch")
    dout, dlse = cotangents(whole["out"], whole["lse"])
    dq, dk, dv = torch.zeros_like(a["q"]), [], []
    for part in (slice(0, 20), slice(20, 64)):
        tensors_of_part = (a["q"], a["k"][:, part], a["v"][:, part], whole["out"].detach(), whole["lse"].detach())
        options = (None, False, None, 5**-0.5, "torch")
        found = ops.attention_backward(dout, dlse, *tensors_of_part, *options)
        for actual, expected in zip(found, reference.attention_gradients(dout, dlse, *tensors_of_part, *options[:4])):
            assert_close(actual, expected)
        dq += found[0]
        dk.append(found[1])
        dv.append(found[2])
    assert_close(dq, whole["dq"])
    assert_close(torch.cat(dk, 1), whole["dk"])
    assert_close(torch.cat(dv, 1), whole["dv"])
