"""The Triton blocked Toeplitz product against the definition of long_conv, in Triton's interpreter."""

import pytest
import torch

from seqengine.kernels.conv import reference, triton_toeplitz
from seqengine.kernels.conv.triton_toeplitz import (
    toeplitz_filter_gradient,
    toeplitz_forward,
    toeplitz_input_gradient,
)
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("x", "k", "past", "skip", "pre_gate", "post_gate")
TOLERANCE = {"ieee": 1e-5, "tf32": 1e-5, "bf16x3": 1e-4, "fp16": 2e-3}
"""Of float32 inputs. The interpreter multiplies tf32 operands in float32, and truncates to bfloat16."""


def tensors(B, D, G, T, L, dtype=torch.float64, without=()):
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, D, T), (G, L), (B, D, L - 1), (D,), (B, D, T), (B, D, T))
    drawn = {n: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for n, s in zip(NAMES, sizes)}
    dy = torch.randn(B, D, T, generator=generator, dtype=torch.float64).to(dtype)
    return {n: None if n in without else t for n, t in drawn.items()}, dy


def gradients(dy, x, k, past, skip, pre_gate, post_gate, precision):
    """Every gradient, put together from the launchers as their docstrings say."""
    dx, dpre, dpast = toeplitz_input_gradient(dy, k, skip, pre_gate, post_gate, x, precision, past is not None)
    G, L = k.shape
    found = {"x": dx, "pre_gate": dpre, "past": dpast}
    found["k"] = toeplitz_filter_gradient(dy, x, L, G, past, pre_gate, post_gate, precision)
    if skip is not None:
        found["skip"] = toeplitz_filter_gradient(dy, x, 1, x.shape[1], None, pre_gate, post_gate, precision)[:, 0]
    if post_gate is not None:
        found["post_gate"] = toeplitz_forward(x, k, past, skip, pre_gate, dy, precision)
    return found


def check(given, dy, precision="ieee", tolerance=None):
    """Forward and every gradient, from float64."""
    leaves = {n: None if t is None else t.detach().double().requires_grad_() for n, t in given.items()}
    u, k, past, skip, pre, post = (leaves[n] for n in NAMES)
    expected = reference.long_conv(u, k.repeat_interleave(u.shape[1] // k.shape[0], 0), skip, pre, post, past)[0]
    y = toeplitz_forward(**given, precision=precision)
    assert y.dtype == given["x"].dtype
    assert_close(y, expected, "y", tolerance)
    named = {n: t for n, t in leaves.items() if t is not None}
    wanted = dict(zip(named, torch.autograd.grad(expected, list(named.values()), dy.double(), materialize_grads=True)))
    found = gradients(dy, **given, precision=precision)
    for name, gradient in wanted.items():
        assert_close(found.pop(name), gradient, f"d{name}", tolerance)
    assert all(t is None for t in found.values())


SIZES = [(1, 1), (1, 3), (2, 2), (3, 4), (63, 62), (64, 64), (64, 65), (65, 66), (65, 195), (257, 129), (257, 1)]


@pytest.mark.parametrize(("T", "L"), SIZES, ids=str)
@pytest.mark.parametrize(("D", "G"), [(3, 3), (4, 2)], ids=["depthwise", "grouped"])
def test_matches_reference_with_every_gradient(D, G, T, L):
    check(*tensors(2, D, G, T, L))


def test_filter_longer_than_three_chunks_and_the_sequence():
    check(*tensors(1, 2, 1, 100, 300))


@pytest.mark.parametrize(
    "without", [("past",), ("skip",), ("pre_gate",), ("post_gate",), ("past", "skip", "pre_gate", "post_gate")], ids=str
)
def test_matches_reference_without(without):
    check(*tensors(2, 2, 1, 70, 67, without=without))


@pytest.mark.parametrize("most_programs", [1, 4, 10**6])
def test_columns_in_splits_and_many_tiles(monkeypatch, most_programs):
    monkeypatch.setattr(triton_toeplitz, "MOST_PROGRAMS", most_programs)
    check(*tensors(3, 15, 1, 257, 3))


@pytest.mark.parametrize("precision", TOLERANCE)
def test_precisions(precision):
    check(*tensors(2, 4, 2, 130, 80, torch.float32), precision, TOLERANCE[precision])


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(precision, dtype):
    given, dy = tensors(2, 2, 2, 70, 67, dtype)
    check({**given, "k": given["k"].float()}, dy, precision, max(RELATIVE[dtype], TOLERANCE[precision]))


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_fp16_has_the_range_of_float32(scale):
    given, dy = tensors(2, 2, 2, 70, 67, torch.float32, without=("past", "skip"))
    given["x"][0] *= scale
    dy[1] *= scale
    y = toeplitz_forward(**given, precision="fp16")
    expected = toeplitz_forward(**given, precision="ieee")
    for sample in range(2):  # each with its own scale
        assert_close(y[sample], expected[sample], "y", 2e-3)
    check({**given, "k": given["k"] * 1e-7}, dy, "fp16", 2e-3)


@pytest.mark.parametrize("kind", ["channels last", "slice", "expanded"])
def test_any_strides(kind):
    given, dy = tensors(2, 4, 2, 67, 66)
    for name in ("x", "pre_gate", "post_gate", "k", "past"):
        if kind == "slice":
            given[name] = torch.cat([given[name]] * 2, dim=-1)[..., 1::2]
        else:
            given[name] = given[name].mT.contiguous().mT
    dy = dy.mT.contiguous().mT if kind != "expanded" else dy[:1, :1, :1].expand(2, 4, 67)
    assert not given["x"].is_contiguous()
    check(given, dy)


def test_offsets_of_more_than_32_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False  # the pages between the rows stay untouched
    apart = 2**30 + 16
    storage = torch.empty(2 * apart + 8, dtype=torch.float16)
    given, dy = tensors(3, 1, 1, 8, 3, torch.float16)
    given["x"] = torch.as_strided(storage, (3, 1, 8), (apart, 8, 1)).copy_(given["x"])
    check(given, dy)


def test_impulse_gives_the_filter_back():
    x, k = torch.zeros(1, 2, 150, dtype=torch.float64), torch.randn(2, 140, dtype=torch.float64)
    x[..., 3] = 1
    y = toeplitz_forward(x, k, None, None, None, None, "ieee")
    assert torch.equal(y[0, :, 3:143], k)
    assert not y[..., :3].any()
    assert not y[..., 143:].any()


def test_later_inputs_change_nothing_before_them():
    given, _ = tensors(1, 2, 2, 140, 100, torch.float32)
    before = toeplitz_forward(**given, precision="ieee")
    given["x"][..., 70:] += 1e3
    after = toeplitz_forward(**given, precision="ieee")
    assert torch.equal(before[..., :70], after[..., :70])
    assert not torch.equal(before[..., 70], after[..., 70])


@pytest.mark.parametrize("shape", [(0, 2, 9), (2, 2, 0)], ids=str)
def test_empty(shape):
    given, dy = tensors(shape[0], 2, 2, shape[2], 4)
    assert toeplitz_forward(**given, precision="ieee").shape == shape
    for name, gradient in gradients(dy, **given, precision="ieee").items():
        assert_close(gradient, torch.zeros_like(given[name]), name)


@pytest.mark.parametrize("precision", ["ieee", "fp16"])
def test_bitwise_the_same_twice(precision):
    given, dy = tensors(2, 4, 2, 130, 80, torch.float32)
    assert torch.equal(*(toeplitz_forward(**given, precision=precision) for _ in range(2)))
    first, second = (gradients(dy, **given, precision=precision) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_bad_arguments_raise():
    given, dy = tensors(2, 4, 2, 9, 3)
    with pytest.raises(ValueError, match="must be one of fp16, tf32, bf16x3, ieee; got 'bf16'"):
        toeplitz_forward(**given, precision="bf16")
    with pytest.raises(ValueError, match="'ieee' only; got 'tf32'"):
        toeplitz_forward(**given, precision="tf32")
    with pytest.raises(ValueError, match="must divide D=4; got 3"):
        toeplitz_forward(**{**given, "k": torch.zeros(3, 3)}, precision="ieee")
    with pytest.raises(ValueError, match=r"past must be \[2, 4, 2\]"):
        toeplitz_forward(**{**given, "past": torch.zeros(2, 4, 3)}, precision="ieee")
    with pytest.raises(ValueError, match="needs x"):
        toeplitz_input_gradient(dy, given["k"], None, given["pre_gate"], None, None, "ieee")
