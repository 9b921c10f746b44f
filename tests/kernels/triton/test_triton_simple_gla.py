"""The Triton kernels for one gate a head against their definition, in Triton's interpreter."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from seqengine.kernels.linear_attention import reference, triton_states
from seqengine.kernels.linear_attention.triton_simple_gla import simple_gla_backward, simple_gla_forward
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("q", "k", "v", "g", "initial_state")
KINDS = ("head", "fixed", "none")
GATES = torch.tensor([0.0, -1e-3, -80.0, -1e4, -torch.inf, -0.05, -0.1, -0.01], dtype=torch.float64)


def tensors(kind, B, T, H, K, V, dtype=torch.float64, documents=None, extreme=False):
    """The arguments by name, and the gradients of o and of the final state."""
    generator = torch.Generator().manual_seed(0)
    N = B if documents is None else documents
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = {"q": draw(B, T, H, K), "k": draw(B, T, H, K), "v": draw(B, T, H, V)}
    g = -F.softplus(draw(*((B, T, H) if kind == "head" else (H,))) - 2)
    if extreme:
        g = GATES[torch.randint(0, len(GATES), g.shape, generator=generator)]
    given = {name: x.to(dtype) for name, x in given.items()}
    given["g"] = None if kind == "none" else g.to(sums)
    given["initial_state"] = draw(N, H, K, V).to(sums)
    return given, draw(B, T, H, V).to(dtype), draw(N, H, K, V).to(sums)


def definition(q, k, v, g, initial_state, scale, ends):
    """By the reference, document by document."""
    if ends is None:
        return reference.simple_gla(q, k, v, g, scale, initial_state)
    pieces = []
    for i, (a, b) in enumerate(pairwise(ends)):
        start = None if initial_state is None else initial_state[i : i + 1]
        gates = g[:, a:b] if g is not None and g.ndim == 3 else g
        pieces.append(reference.simple_gla(q[:, a:b], k[:, a:b], v[:, a:b], gates, scale, start))
    return torch.cat([o for o, _ in pieces], dim=1), torch.cat([state for _, state in pieces])


def check(given, do, d_final, ends=None, precision="ieee", tolerance=None):
    """Forward and every gradient, from float64; returns dg."""
    given = {name: given.get(name) for name in NAMES}
    leaves = {n: None if x is None else x.detach().double().requires_grad_() for n, x in given.items()}
    scale = 0.3
    expected = definition(**leaves, scale=scale, ends=ends)
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    *inputs, start = given.values()
    o, final = simple_gla_forward(*inputs, scale, start, cu_seqlens, precision)
    assert o.dtype == given["v"].dtype
    assert_close(o, expected[0], "o", tolerance)
    assert_close(final, expected[1], "final state", tolerance)
    named = {n: x for n, x in leaves.items() if x is not None}
    gradients = [do.double(), torch.zeros_like(expected[1]) if d_final is None else d_final.double()]
    wanted = dict(zip(named, torch.autograd.grad(expected, list(named.values()), gradients)))
    found = dict(zip(NAMES, simple_gla_backward(do, d_final, *inputs, scale, start, cu_seqlens, precision)))
    for name, gradient in wanted.items():
        assert found[name].dtype == given[name].dtype
        assert_close(found[name], gradient, f"d{name}", tolerance)
    if given["g"] is None:
        assert found["g"] is None
    return found["g"]


SIZES = [(1, 1, 3), (2, 3, 1), (63, 64, 60), (64, 3, 100), (65, 100, 16), (130, 3, 64)]


@pytest.mark.parametrize(("T", "K", "V"), SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference_with_every_gradient(kind, T, K, V):
    check(*tensors(kind, 1, T, 1, K, V))


@pytest.mark.parametrize("kind", KINDS)
def test_many_tiles_samples_and_heads(monkeypatch, kind):
    monkeypatch.setattr(triton_states, "STATE_BLOCKS", {"float64": triton_states.Blocks(16, 16, 4)})
    check(*tensors(kind, 2, 3, 2, 17, 18))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["head", "fixed"])
def test_extreme_gates_in_any_order(kind, dtype):
    given, do, d_final = tensors(kind, 1, 80, 3, 4, 5, dtype, extreme=True)
    if kind == "fixed":
        given["g"] = GATES[2:5].to(given["g"].dtype)
    dg = check(given, do, d_final)
    assert bool((dg[given["g"] == -torch.inf] == 0).all())


@pytest.mark.parametrize("value", [0.0, -1e4, -torch.inf], ids=str)
def test_the_same_extreme_gate_everywhere(value):
    given, do, d_final = tensors("head", 1, 66, 1, 3, 3, torch.float32)
    check({**given, "g": torch.full_like(given["g"], value)}, do, d_final)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tf32_loses_nothing_that_16_bits_have(kind, dtype):
    tolerance = 1e-3 if dtype == torch.float32 else RELATIVE[dtype]
    check(*tensors(kind, 1, 70, 2, 16, 16, dtype), precision="tf32", tolerance=tolerance)


@pytest.mark.parametrize("ends", [[0, 0, 3, 3, 70, 71, 71], [0, 64, 80]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind, ends):
    check(*tensors(kind, 1, ends[-1], 1, 3, 4, documents=len(ends) - 1), ends)


@pytest.mark.parametrize("kind", KINDS)
def test_without_states(kind):
    given, do, _ = tensors(kind, 1, 20, 1, 4, 4)
    del given["initial_state"]
    check(given, do, None)
    check(given, do, None, [0, 7, 7, 20])


@pytest.mark.parametrize("kind", ["heads first", "slice", "expanded"])
def test_any_strides(kind):
    given, do, d_final = tensors("head", 2, 9, 2, 5, 6)
    for name in ("q", "k", "v", "g"):
        x = given[name]
        if kind == "heads first":
            given[name] = x.movedim(2, 0).contiguous().movedim(0, 2)
        elif kind == "slice":
            given[name] = torch.cat([x, x, x], dim=-1)[..., 1 : 2 * x.shape[-1] : 2]
        else:
            given[name] = x[:, :, :1].expand(x.shape)
        assert not given[name].is_contiguous()
    do = do.transpose(1, 3).contiguous().transpose(1, 3)
    check(given, do, d_final.transpose(0, 1).contiguous().transpose(0, 1))
    fixed = torch.linspace(-1, 0, 4, dtype=torch.float64)[::2]
    check({**given, "g": fixed}, do, d_final)


def test_offsets_of_more_than_32_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False  # the pages between the rows stay untouched
    apart = 2**30 + 16
    given, do, d_final = tensors("head", 3, 2, 1, 2, 2, torch.float16)
    storage = torch.empty(2 * apart + 8, dtype=torch.float16)
    given["q"] = torch.as_strided(storage, (3, 2, 1, 2), (apart, 2, 2, 1)).copy_(given["q"])
    given["v"] = torch.as_strided(storage, (3, 2, 1, 2), (apart, 2, 2, 1), 4).copy_(given["v"])
    check(given, do, d_final, precision="tf32", tolerance=RELATIVE[torch.float16])


@pytest.mark.parametrize(("kind", "cut"), [("head", 1), ("head", 64), ("fixed", 69), ("none", 1)], ids=str)
def test_a_cut_with_states_is_the_uncut_result(kind, cut):
    given, _, _ = tensors(kind, 1, 70, 1, 4, 5)
    q, k, v, g, start = given.values()
    whole = simple_gla_forward(q, k, v, g, 0.3, start, None, "ieee")
    outputs, state = [], start
    for piece in (slice(0, cut), slice(cut, 70)):
        gates = g[:, piece] if kind == "head" else g
        o, state = simple_gla_forward(q[:, piece], k[:, piece], v[:, piece], gates, 0.3, state, None, "ieee")
        outputs.append(o)
    assert_close(torch.cat(outputs, dim=1), whole[0], "o")
    assert_close(state, whole[1], "final state")


@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_the_same_twice(kind):
    given, do, d_final = tensors(kind, 1, 66, 2, 16, 16, torch.float32)
    *inputs, start = given.values()
    runs = []
    for _ in range(2):
        results = simple_gla_forward(*inputs, 0.3, start, None, "ieee")
        runs.append((*results, *simple_gla_backward(do, d_final, *inputs, 0.3, start, None, "ieee")))
    assert all(torch.equal(a, b) for a, b in zip(*runs) if a is not None)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 0, 2, 4, 4), (1, 3, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty(shape, kind):
    given, do, d_final = tensors(kind, *shape)
    *inputs, start = given.values()
    o, final = simple_gla_forward(*inputs, 0.3, start, None, "ieee")
    assert o.shape == inputs[2].shape
    assert torch.equal(final, start)
    *gradients, d_start = simple_gla_backward(do, d_final, *inputs, 0.3, start, None, "ieee")
    assert torch.equal(d_start, d_final)
    for gradient, x in zip(gradients, inputs):
        if x is not None:
            assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("k", (1, 3, 2, 5)), ("g", (1, 3, 1)), ("g", (3,)), ("v", (1, 4, 2, 4)), ("initial_state", (1, 2, 4))],
    ids=str,
)
def test_wrong_shapes_raise(name, shape):
    given, _, _ = tensors("head", 1, 3, 2, 4, 4)
    *inputs, start = {**given, name: torch.zeros(shape, dtype=torch.float64)}.values()
    with pytest.raises(ValueError, match=rf"{name} must be \["):
        simple_gla_forward(*inputs, 0.3, start, None, "ieee")
