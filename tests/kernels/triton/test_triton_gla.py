"""The Triton kernels of gated linear attention against their definition, in Triton's interpreter."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from seqengine.kernels.linear_attention import reference, triton_states
from seqengine.kernels.linear_attention.triton_gla import gla_forward
from seqengine.kernels.linear_attention.triton_gla_backward import gla_backward
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("q", "k", "v", "g", "initial_state")
GATES = torch.tensor([0.0, -1e-3, -80.0, -1e4, -torch.inf, -0.05, -0.1, -0.01], dtype=torch.float64)


def tensors(B, T, H, K, V, dtype=torch.float64, documents=None, extreme=False):
    """The arguments by name, and the gradients of o and of the final state."""
    generator = torch.Generator().manual_seed(0)
    N = B if documents is None else documents
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = {
        "q": draw(B, T, H, K),
        "k": draw(B, T, H, K),
        "v": draw(B, T, H, V),
        "g": -F.softplus(draw(B, T, H, K) - 2),
    }
    if extreme:
        given["g"] = GATES[torch.randint(0, len(GATES), given["g"].shape, generator=generator)]
    given = {name: x.to(dtype) for name, x in given.items()}
    given["initial_state"] = draw(N, H, K, V).to(sums)
    return given, draw(B, T, H, V).to(dtype), draw(N, H, K, V).to(sums)


def definition(q, k, v, g, initial_state, scale, ends):
    """By the reference, document by document."""
    if ends is None:
        return reference.gla(q, k, v, g, scale, initial_state)
    pieces = []
    for i, (a, b) in enumerate(pairwise(ends)):
        start = None if initial_state is None else initial_state[i : i + 1]
        pieces.append(reference.gla(q[:, a:b], k[:, a:b], v[:, a:b], g[:, a:b], scale, start))
    return torch.cat([o for o, _ in pieces], dim=1), torch.cat([state for _, state in pieces])


def check(given, do, d_final, ends=None, precision="ieee", tolerance=None):
    """Forward and every gradient, from float64; returns dg."""
    given = {name: given.get(name) for name in NAMES}
    leaves = {n: None if x is None else x.detach().double().requires_grad_() for n, x in given.items()}
    scale = 0.3
    expected = definition(**leaves, scale=scale, ends=ends)
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    *inputs, start = given.values()
    o, final = gla_forward(*inputs, scale, start, cu_seqlens, precision)
    assert o.dtype == given["v"].dtype
    assert_close(o, expected[0], "o", tolerance)
    assert_close(final, expected[1], "final state", tolerance)
    named = {n: x for n, x in leaves.items() if x is not None}
    gradients = [do.double(), torch.zeros_like(expected[1]) if d_final is None else d_final.double()]
    wanted = dict(zip(named, torch.autograd.grad(expected, list(named.values()), gradients)))
    found = dict(zip(NAMES, gla_backward(do, d_final, *inputs, scale, start, cu_seqlens, precision)))
    for name, gradient in wanted.items():
        assert found[name].dtype == given[name].dtype
        assert_close(found[name], gradient, f"d{name}", tolerance)
    return found["g"]


SIZES = [(1, 1, 3), (2, 3, 1), (5, 64, 60), (63, 16, 16), (64, 3, 100), (65, 100, 16), (130, 3, 64)]


@pytest.mark.parametrize(("T", "K", "V"), SIZES, ids=str)
def test_matches_reference_with_every_gradient(T, K, V):
    check(*tensors(1, T, 1, K, V))


def test_many_tiles(monkeypatch):
    monkeypatch.setattr(triton_states, "STATE_BLOCKS", {"float64": triton_states.Blocks(16, 16, 4)})
    check(*tensors(1, 18, 1, 33, 33))


@pytest.mark.parametrize("ends", [None, [0, 0, 200, 584, 584]], ids=str)
def test_long_documents_in_segments_are_the_same(monkeypatch, ends):
    monkeypatch.setattr(triton_states, "SHORTEST_SEGMENT", 2)
    monkeypatch.setattr(triton_states, "STATE_BLOCKS", {"float64": triton_states.Blocks(16, 16, 4)})
    launched = []
    monkeypatch.setattr(
        triton_states, "_segments", lambda *a, real=triton_states._segments: launched.append(1) or real(*a)
    )
    for K in (1, 17):
        given, do, d_final = tensors(1, 584, 1, K, 2, documents=None if ends is None else 4)
        chunks = triton_states.make_chunks(given["q"], None if ends is None else torch.tensor(ends))
        for reverse in (False, True):
            x, y, start = (given["q"], do, d_final) if reverse else (given["k"], given["v"], given["initial_state"])
            arguments = (x, given["g"], y, start, chunks, 0.3, "ieee", reverse)
            segmented = triton_states.scan_states(*arguments)
            with monkeypatch.context() as whole:
                whole.setattr(triton_states, "FEW_PROGRAMS", 0)
                expected = triton_states.scan_states(*arguments)
            for actual, wanted in zip(segmented, expected):
                assert_close(actual.nan_to_num(), wanted.nan_to_num())
    assert len(launched) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_gates_in_any_order(dtype):
    given, do, d_final = tensors(1, 80, 1, 16, 5, dtype, extreme=True)
    dg = check(given, do, d_final)
    assert bool((dg[given["g"] == -torch.inf] == 0).all())


@pytest.mark.parametrize("value", [0.0, -80.0, -torch.inf], ids=str)
def test_the_same_extreme_gate_everywhere(value):
    given, do, d_final = tensors(1, 20, 1, 3, 3, torch.float32)
    check({**given, "g": torch.full_like(given["g"], value)}, do, d_final)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tf32_loses_nothing_that_16_bits_have(dtype):
    given, do, d_final = tensors(1, 70, 1, 16, 16, dtype)
    tolerance = 1e-3 if dtype == torch.float32 else RELATIVE[dtype]
    check({**given, "g": given["g"].float()}, do, d_final, precision="tf32", tolerance=tolerance)


@pytest.mark.parametrize("ends", [[0, 0, 3, 3, 70, 71, 71], [0, 15], [0, 64, 80]], ids=str)
def test_documents_do_not_see_each_other(ends):
    check(*tensors(1, ends[-1], 1, 3, 4, documents=len(ends) - 1), ends)


def test_without_states():
    given, do, _ = tensors(1, 20, 1, 4, 4)
    del given["initial_state"]
    check(given, do, None)
    check(given, do, None, [0, 7, 7, 20])


@pytest.mark.parametrize("kind", ["heads first", "slice", "expanded"])
def test_any_strides(kind):
    given, do, d_final = tensors(*{"heads first": (2, 9, 2), "slice": (1, 19, 1), "expanded": (1, 9, 2)}[kind], 5, 6)
    for name in ("q", "k", "v", "g"):
        x = given[name]
        if kind == "heads first":
            given[name] = x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
        elif kind == "slice":
            given[name] = torch.cat([x, x, x], dim=3)[..., 1 : 2 * x.shape[3] : 2]
        else:
            given[name] = x[:, :, :1].expand(x.shape)
        assert not given[name].is_contiguous()
    do = do.transpose(1, 3).contiguous().transpose(1, 3)
    given["initial_state"] = given["initial_state"].transpose(2, 3).contiguous().transpose(2, 3)
    check(given, do, d_final.transpose(0, 1).contiguous().transpose(0, 1))


def test_offsets_of_more_than_32_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False  # the pages between the rows stay untouched
    apart = 2**30 + 16
    given, do, d_final = tensors(3, 2, 1, 2, 2, torch.float16)
    storage = torch.empty(2 * apart + 8, dtype=torch.float16)
    given["q"] = torch.as_strided(storage, (3, 2, 1, 2), (apart, 2, 2, 1)).copy_(given["q"])
    given["v"] = torch.as_strided(storage, (3, 2, 1, 2), (apart, 2, 2, 1), 4).copy_(given["v"])
    check(given, do, d_final, precision="tf32", tolerance=RELATIVE[torch.float16])


@pytest.mark.parametrize("cut", [1, 64, 69])
def test_a_cut_with_states_is_the_uncut_result(cut):
    given, _, _ = tensors(1, 70, 1, 4, 5)
    *inputs, start = given.values()
    whole = gla_forward(*inputs, 0.3, start, None, "ieee")
    o, state = gla_forward(*(x[:, :cut] for x in inputs), 0.3, start, None, "ieee")
    rest, state = gla_forward(*(x[:, cut:] for x in inputs), 0.3, state, None, "ieee")
    assert_close(torch.cat([o, rest], dim=1), whole[0], "o")
    assert_close(state, whole[1], "final state")


def test_the_future_is_not_seen():
    given, _, _ = tensors(1, 40, 1, 4, 4)
    *inputs, start = given.values()
    before, _ = gla_forward(*inputs, 0.3, start, None, "ieee")
    for x in inputs[:3]:
        x[:, 20:] += 1e6
    after, _ = gla_forward(*inputs, 0.3, start, None, "ieee")
    assert torch.equal(before[:, :20], after[:, :20])


def test_bitwise_the_same_twice():
    given, do, d_final = tensors(1, 66, 1, 16, 16, torch.float32)
    *inputs, start = given.values()
    runs = [
        (*gla_forward(*inputs, 0.3, start, None, "ieee"), *gla_backward(do, d_final, *inputs, 0.3, start, None, "ieee"))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 0, 2, 4, 4), (1, 3, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_empty(shape, with_state):
    given, do, d_final = tensors(*shape)
    *inputs, start = given.values()
    start, d_final = (start, d_final) if with_state else (None, None)
    o, final = gla_forward(*inputs, 0.3, start, None, "ieee")
    assert o.shape == inputs[2].shape
    *gradients, d_start = gla_backward(do, d_final, *inputs, 0.3, start, None, "ieee")
    assert all(a.shape == x.shape for a, x in zip(gradients, inputs))
    for state, source in ((final, start), (d_start, d_final)):
        B, _, H, K, V = shape
        assert_close(state, torch.zeros(B, H, K, V, dtype=torch.float64) if source is None else source)


def test_documents_of_no_tokens_keep_their_states():
    given, do, d_final = tensors(1, 0, 2, 4, 4, documents=2)
    *inputs, start = given.values()
    ends = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(gla_forward(*inputs, 0.3, start, ends, "ieee")[1], start)
    assert torch.equal(gla_backward(do, d_final, *inputs, 0.3, start, ends, "ieee")[4], d_final)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("k", (1, 3, 2, 5)), ("g", (1, 3, 2)), ("v", (1, 4, 2, 4)), ("initial_state", (2, 2, 4, 4))],
    ids=str,
)
def test_wrong_shapes_raise(name, shape):
    given, _, _ = tensors(1, 3, 2, 4, 4)
    *inputs, start = {**given, name: torch.zeros(shape, dtype=torch.float64)}.values()
    with pytest.raises(ValueError, match=rf"{name} must be \["):
        gla_forward(*inputs, 0.3, start, None, "ieee")


def test_wrong_dtypes_batches_and_precisions_raise():
    given, do, d_final = tensors(2, 3, 2, 4, 4)
    *inputs, start = given.values()
    with pytest.raises(ValueError, match="float64 needs"):
        gla_forward(*inputs, 0.3, start, None, "tf32")
    with pytest.raises(ValueError, match="float64 needs"):
        gla_forward(inputs[0].float(), *inputs[1:], 0.3, start, None, "ieee")
    with pytest.raises(ValueError, match="precision must be"):
        gla_forward(*inputs, 0.3, start, None, "fp16")
    with pytest.raises(ValueError, match="the batch must be 1"):
        gla_forward(*inputs, 0.3, start, torch.tensor([0, 1, 3]), "ieee")
    with pytest.raises(ValueError, match="do must be"):
        gla_backward(do[:, 1:], d_final, *inputs, 0.3, start, None, "ieee")
