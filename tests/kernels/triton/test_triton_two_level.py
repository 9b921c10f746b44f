"""The two-level FFT convolution in the interpreter, against torch.fft in float64."""

import pytest
import torch

from seqengine.kernels.conv import reference
from seqengine.kernels.conv import triton_two_level as two_level
from tests.kernels.triton import fft_cases
from tests.kernels.triton.fft_cases import LIMIT, convolve, relative, single


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter pays per program, whatever its size."""
    monkeypatch.setattr(two_level, "COLUMNS", 2048)


def inputs(B, D, T, L, skip=True, pre=True, post=True):
    """u, k, skip, pre, post as float64 tensors of float32 values."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    values = normal(B, D, T), normal(D, L), normal(D), normal(B, D, T), normal(B, D, T)
    return [x if wanted else None for x, wanted in zip(values, (True, True, skip, pre, post))]


def check_everything(u, k, skip, pre, post, precision):
    launchers = two_level.two_level_forward, two_level.two_level_input_gradient, two_level.two_level_filter_gradient
    fft_cases.check_everything(launchers, u, k, skip, pre, post, precision)


@pytest.mark.parametrize("precision", ["fp16", "ieee"])
@pytest.mark.parametrize(("T", "L"), [(1, 1), (63, 100), (2000, 1999), (4097, 4096), (8193, 3)])
def test_lengths(T, L, precision):
    check_everything(*inputs(1, 1, T, L), precision)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32"])
@pytest.mark.parametrize(("T", "L"), [(500, 600), (4097, 3)])
def test_lengths_in_the_other_precisions(T, L, precision):
    check_everything(*inputs(1, 1, T, L), precision)


@pytest.mark.parametrize("precision", ["fp16", "ieee"])
def test_many_outer_rows(precision):
    """N = 64 * 4096: 33 rows k1, padded to a block of 64, and 33 input rows."""
    assert two_level.outer_size(131_073, 131_071) == 64
    u, k, *_ = inputs(1, 1, 131_073, 131_071, False, False, False)
    expected = convolve(u, k, None, None, None)
    y = two_level.two_level_forward(*single(u, k), None, None, None, precision)
    assert relative(y, expected) <= LIMIT[precision]


def test_many_outer_blocks(monkeypatch):
    """More rows than a block holds, both ways."""
    monkeypatch.setattr(two_level, "_block", lambda size: 16)
    u, k, skip, pre, post = inputs(1, 1, 70_001, 60_000)
    y = two_level.two_level_forward(*single(u, k, skip, pre, post), "fp16")
    assert relative(y, convolve(u, k, skip, pre, post)) <= LIMIT["fp16"]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("post", [False, True])
def test_gates_and_skip(skip, pre, post):
    values = inputs(1, 1, 257, 130, skip, pre, post)
    expected, _ = reference.long_conv(*values, None)
    assert relative(two_level.two_level_forward(*single(*values), "ieee"), expected) <= 1e-5
    check_everything(*values, "fp16")


def test_columns_of_the_gpu(monkeypatch):
    monkeypatch.setattr(two_level, "COLUMNS", 64)
    check_everything(*inputs(1, 1, 300, 300), "fp16")


def test_rows_of_any_size():
    u, k, *_ = inputs(4, 1, 5000, 5000)
    u = u * torch.tensor([1e-30, 1e4, 0.0, 1e8]).double()[:, None, None]
    y = two_level.two_level_forward(*single(u, k), None, None, None, "fp16")
    expected = convolve(u, k, None, None, None)
    for b in (0, 1, 3):
        assert relative(y[b], expected[b]) <= LIMIT["fp16"]
    assert int(y[2].count_nonzero()) == 0


def test_constant_rows_do_not_overflow():
    u = torch.full((1, 1, 65_536), 60000.0).double()
    k = torch.full((1, 65_536), 3.0).double()
    check_everything(u, k, None, None, None, "fp16")


def test_strided_inputs():
    u, k, skip, pre, post = single(*inputs(2, 1, 4200, 500))
    expected = two_level.two_level_forward(u, k, skip, pre, post, "fp16")
    u2, pre2, post2 = torch.cat([u, pre, post], dim=1).split(1, dim=1)
    assert torch.equal(two_level.two_level_forward(u2, k, skip, pre2, post2, "fp16"), expected)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (u, pre, post)]
    assert torch.equal(two_level.two_level_forward(turned[0], k, skip, *turned[1:], "fp16"), expected)


@pytest.mark.parametrize("precision", ["fp16", "ieee"])
def test_the_same_bits_and_every_element_written(precision, poisoned_memory):
    u, k, skip, pre, post = single(*inputs(2, 1, 4099, 50))
    first = two_level.two_level_forward(u, k, skip, pre, post, precision)
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, two_level.two_level_forward(u, k, skip, pre, post, precision))
    dk = two_level.two_level_filter_gradient(post, u, 5000, pre, None, precision)
    assert bool(torch.isfinite(dk).all())
    assert int(dk[:, 4099:].count_nonzero()) == 0
    assert torch.equal(dk, two_level.two_level_filter_gradient(post, u, 5000, pre, None, precision))


def test_channel_blocks_of_the_filter_transforms(monkeypatch):
    monkeypatch.setattr(two_level, "SPECTRUM_ELEMENTS", 1)
    check_everything(*inputs(1, 3, 100, 100), "ieee")


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty_inputs(shape):
    u, k = torch.zeros(shape), torch.zeros(shape[1], 3)
    assert two_level.two_level_forward(u, k, None, None, None, "fp16").shape == shape
    assert int(two_level.two_level_filter_gradient(u, u, 3, None, None, "fp16").count_nonzero()) == 0


def test_refuses_what_it_cannot_do():
    u, k = torch.zeros(1, 1, 9), torch.zeros(1, 9)
    with pytest.raises(ValueError, match="precision must be"):
        two_level.two_level_forward(u, k, None, None, None, "bf16")
    with pytest.raises(ValueError, match="float64"):
        two_level.two_level_forward(u.double(), k, None, None, None, "ieee")
