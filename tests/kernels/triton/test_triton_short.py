"""The Triton short convolution against its definition, in Triton's interpreter."""

import pytest
import torch
from torch import nn

from seqengine.kernels.conv import reference, triton_short
from seqengine.kernels.conv.triton_short import short_conv_backward, short_conv_forward
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def tensors(B, D, T, W, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (B, D, T), "w": (D, W), "bias": (D,), "past": (B, D, W - 1)}
    drawn = {n: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    return drawn, torch.randn(B, D, T, generator=generator, dtype=torch.float64).to(dtype)


def definition(x, w, bias, past, silu, positions):
    """By the reference; documents cut apart where the position falls to 0."""
    if positions is None:
        y = reference.short_conv(x, w, bias, past)[0]
    else:
        starts = [t for t, p in enumerate(positions.tolist()) if p == 0 or t == 0]
        pieces = [x[..., a:b] for a, b in zip(starts, [*starts[1:], x.shape[-1]])]
        heads = [past] + [None] * (len(pieces) - 1) if positions[0] > 0 else [None] * len(pieces)
        y = torch.cat([reference.short_conv(p, w, bias, head)[0] for p, head in zip(pieces, heads)], dim=-1)
    return nn.functional.silu(y) if silu else y


def check(arguments, dy, silu=False, positions=None, tolerance=None):
    """Forward and every gradient, from float64."""
    given = {name: arguments.get(name) for name in ("x", "w", "bias", "past")}
    leaves = {n: None if t is None else t.detach().double().requires_grad_() for n, t in given.items()}
    expected = definition(**leaves, silu=silu, positions=positions)
    y = short_conv_forward(**given, silu=silu, positions=positions)
    assert y.dtype == given["x"].dtype
    assert_close(y, expected, "y", tolerance)
    named = {n: t for n, t in leaves.items() if t is not None}
    wanted = dict(zip(named, torch.autograd.grad(expected, list(named.values()), dy.double(), materialize_grads=True)))
    for name, actual in zip(given, short_conv_backward(dy, **given, silu=silu, positions=positions)):
        if name in wanted:
            assert actual.dtype == given[name].dtype
            assert_close(actual, wanted[name], f"d{name}", tolerance)
        else:
            assert actual is None


SIZES = [(1, 1), (1, 3), (2, 4), (3, 3), (3, 9), (63, 3), (64, 64), (65, 4), (257, 7)]


@pytest.mark.parametrize(("T", "W"), SIZES, ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
def test_matches_reference_with_every_gradient(T, W, silu):
    check(*tensors(2, 3, T, W), silu=silu)


@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
def test_many_tiles(monkeypatch, silu):
    monkeypatch.setattr(triton_short, "TILE_ELEMENTS", 64)
    check(*tensors(2, 5, 65, 5), silu=silu)
    check(*tensors(1, 5, 5, 5), silu=silu)


@pytest.mark.parametrize("left_out", [("bias",), ("past",), ("bias", "past")], ids=str)
def test_matches_reference_without(left_out):
    arguments, dy = tensors(2, 3, 33, 4)
    check({n: t for n, t in arguments.items() if n not in left_out}, dy, silu=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    arguments, dy = tensors(2, 3, 65, 4, dtype)
    check(arguments, dy, silu=True, tolerance=RELATIVE[dtype])
    check({**arguments, "w": arguments["w"].float()}, dy, tolerance=RELATIVE[dtype])


@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("lengths", [[1, 1, 2, 1], [5, 17, 3, 40], [64, 1, 64]], ids=str)
def test_documents_do_not_see_each_other(lengths, silu):
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    arguments, dy = tensors(1, 3, sum(lengths), 6)
    del arguments["past"]
    check(arguments, dy, silu, positions)


def test_a_document_that_began_earlier_reads_the_past():
    positions = torch.cat([torch.arange(7, 12, dtype=torch.int32), torch.arange(9, dtype=torch.int32)])
    check(*tensors(1, 3, 14, 6), True, positions)


@pytest.mark.parametrize("kind", ["channels last", "slice", "expanded"])
def test_any_strides(kind):
    arguments, dy = tensors(2, 5, 33, 4)
    if kind == "channels last":
        arguments["x"], dy = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (arguments["x"], dy))
    elif kind == "slice":
        arguments["x"], dy = (torch.cat([t, t, t], dim=2)[:, :, 1 : 33 * 2 : 2] for t in (arguments["x"], dy))
    else:
        dy = dy[:1, :1, :1].expand(2, 5, 33)
    assert not dy.is_contiguous()
    arguments["w"] = arguments["w"].t().contiguous().t()
    check(arguments, dy, silu=True)


def test_offsets_of_more_than_32_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False  # the pages between the rows stay untouched
    apart = 2**30 + 16
    storage = torch.empty(2 * apart + 8, dtype=torch.float16)
    arguments, dy = tensors(3, 1, 8, 3, torch.float16)
    arguments["x"] = torch.as_strided(storage, (3, 1, 8), (apart, 8, 1)).copy_(arguments["x"])
    check(arguments, dy)


@pytest.mark.parametrize("shape", [(0, 3, 9), (2, 0, 9), (2, 3, 0)], ids=str)
def test_empty(shape):
    arguments, dy = tensors(*shape, 4)
    given = {**arguments, "silu": True, "positions": None}
    assert short_conv_forward(**given).shape == shape
    for name, gradient in zip(arguments, short_conv_backward(dy, **given)):
        assert_close(gradient, torch.zeros_like(arguments[name]), name)


def test_bitwise_the_same_twice():
    arguments, dy = tensors(2, 5, 129, 4, torch.float32)
    given = {**arguments, "silu": True, "positions": None}
    first, second = ((short_conv_forward(**given), *short_conv_backward(dy, **given)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_saturated_activation_is_finite():
    arguments, dy = tensors(1, 2, 9, 3)
    check({**arguments, "bias": torch.tensor([-1e4, 1e4], dtype=torch.float64)}, dy, silu=True)


@pytest.mark.parametrize(
    ("name", "shape"), [("w", (4, 3)), ("bias", (2,)), ("past", (2, 3, 3)), ("positions", (8,))], ids=str
)
def test_wrong_shapes_raise(name, shape):
    arguments, _ = tensors(2, 3, 9, 3)
    given = {**arguments, "silu": False, "positions": None, name: torch.zeros(shape, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"must be \["):
        short_conv_forward(**given)
