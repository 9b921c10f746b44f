"""The fused FFT convolution in the interpreter, against the definition and against torch.fft in float64."""

import pytest
import torch

from seqengine.kernels.conv import reference
from seqengine.kernels.conv import triton_monarch as monarch
from tests.kernels.triton import fft_cases
from tests.kernels.triton.fft_cases import LIMIT, convolve, relative, single

PRECISIONS = sorted(LIMIT)


def inputs(B, D, T, L, skip=True, pre=True, post=True, seed=0):
    """u, k, skip, pre, post as float64 tensors of float32 values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).double()

    u, k = normal(B, D, T), normal(D, L)
    return (
        u,
        k,
        normal(D) if skip else None,
        normal(B, D, T) if pre else None,
        normal(B, D, T) if post else None,
    )


def check_everything(u, k, skip, pre, post, precision):
    launchers = monarch.monarch_forward, monarch.monarch_input_gradient, monarch.monarch_filter_gradient
    fft_cases.check_everything(launchers, u, k, skip, pre, post, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("T", "L"), [(1, 1), (1, 7), (2, 2), (3, 1), (63, 64), (257, 256), (500, 500), (511, 3), (1000, 25)]
)
def test_1024_points(T, L, precision):
    assert monarch.padded_size(T, L, precision) == 1024
    check_everything(*inputs(3, 2, T, L), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("T", "L"), [(1000, 3000), (2000, 2000), (2048, 2049), (3000, 1097)])
def test_4096_points(T, L, precision):
    assert monarch.padded_size(T, L, precision) == 4096
    check_everything(*inputs(3, 1, T, L), precision)


@pytest.mark.parametrize("T", [4096, 5000])
def test_8192_points_in_float16(T):
    assert monarch.padded_size(T, 3001, "fp16") == 8192
    check_everything(*inputs(2, 1, T, 3001), "fp16")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("post", [False, True])
def test_gates_and_skip_against_the_definition(skip, pre, post):
    values = inputs(3, 2, 63, 40, skip, pre, post)
    expected, _ = reference.long_conv(*values, None)
    assert relative(monarch.monarch_forward(*single(*values), "ieee"), expected) <= 1e-5
    check_everything(*values, "fp16")


@pytest.mark.parametrize("B", [1, 2, 5])
def test_batches_of_any_size(B):
    check_everything(*inputs(B, 3, 100, 100), "ieee")


def test_sums_over_more_pairs_than_programs(monkeypatch):
    monkeypatch.setattr(monarch, "FILTER_PROGRAMS", 4)  # five pairs, two programs a channel
    check_everything(*inputs(9, 2, 65, 64), "ieee")


@pytest.mark.parametrize("precision", ["fp16", "ieee"])
def test_rows_of_any_size_share_a_pair(precision):
    """Each row keeps its own relative accuracy, and the filter gradient that of the sum."""
    u, k, skip, _, _ = inputs(6, 1, 400, 300)
    u = u * torch.tensor([1e-30, 1e4, 1e8, 1e-3, 0.0, 1e-12]).double()[:, None, None]
    k = k * 1e-6
    y = monarch.monarch_forward(*single(u, k, skip, None, None), precision)
    expected = convolve(u, k, skip, None, None)
    for b in (0, 1, 2, 3, 5):
        assert relative(y[b], expected[b]) <= LIMIT[precision]
    assert int(y[4].count_nonzero()) == 0
    dy = torch.randn(u.shape, generator=torch.Generator().manual_seed(2)).double()
    dy = dy * torch.tensor([1e8, 1e-4, 0.0, 1e-30, 1e9, 1.0]).double()[:, None, None]
    k = k.requires_grad_()
    (dk,) = torch.autograd.grad(convolve(u, k, None, None, None), k, dy)
    assert relative(monarch.monarch_filter_gradient(*single(dy, u), 300, None, None, precision), dk) <= LIMIT[precision]


@pytest.mark.parametrize("precision", ["fp16", "bf16x3"])
def test_constant_rows_do_not_overflow(precision):
    """All energy in one frequency: the largest intermediate there is."""
    u = torch.full((2, 1, 2048), 60000.0).double()
    k = torch.full((1, 2048), 3.0).double()
    check_everything(u, k, None, None, None, precision)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    """The result is that of the rounded inputs, rounded once (the interpreter cuts bfloat16 instead)."""
    values = [None if x is None else x.to(dtype) for x in inputs(3, 2, 257, 200)]
    y = monarch.monarch_forward(*values, "ieee")
    assert y.dtype == dtype
    expected = convolve(*[x.double() for x in values])
    assert relative(y, expected) <= (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_strided_inputs():
    u, k, skip, pre, post = single(*inputs(3, 2, 130, 130))
    expected = monarch.monarch_forward(u, k, skip, pre, post, "ieee")
    packed = torch.cat([u, pre, post], dim=1)
    u2, pre2, post2 = packed.split(2, dim=1)
    assert torch.equal(monarch.monarch_forward(u2, k, skip, pre2, post2, "ieee"), expected)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (u, pre, post)]
    assert torch.equal(monarch.monarch_forward(turned[0], k.T.contiguous().T, skip, *turned[1:], "ieee"), expected)
    dk = monarch.monarch_filter_gradient(post, u, 130, pre, None, "ieee")
    assert torch.equal(monarch.monarch_filter_gradient(post2, u2, 130, pre2, None, "ieee"), dk)


@pytest.mark.parametrize("precision", ["fp16", "bf16x3"])
def test_the_same_bits_and_every_element_written(precision, poisoned_memory):
    u, k, skip, pre, post = single(*inputs(3, 1, 511, 500))
    first = monarch.monarch_forward(u, k, skip, pre, post, precision)
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, monarch.monarch_forward(u, k, skip, pre, post, precision))
    dk = monarch.monarch_filter_gradient(post, u, 700, pre, None, precision)
    assert bool(torch.isfinite(dk).all())
    assert int(dk[:, 511:].count_nonzero()) == 0
    assert torch.equal(dk, monarch.monarch_filter_gradient(post, u, 700, pre, None, precision))


def test_writes_nothing_outside_the_output():
    """Rows whose neighbours in memory belong to somebody else."""
    u, k, skip, pre, post = single(*inputs(3, 2, 77, 77))
    before = [x.clone() for x in (u, k, skip, pre, post)]
    monarch.monarch_forward(u, k, skip, pre, post, "ieee")
    monarch.monarch_filter_gradient(post, u, 77, pre, None, "ieee")
    assert all(torch.equal(x, y) for x, y in zip((u, k, skip, pre, post), before))


def test_impulse_returns_the_filter():
    u, k, *_ = single(*inputs(2, 2, 300, 300, False, False, False))
    u = torch.zeros_like(u)
    u[0, :, 0] = 1
    y = monarch.monarch_forward(u, k, None, None, None, "ieee")
    assert relative(y[0], k.double()) <= 1e-6
    assert float(y[1].abs().max()) <= 1e-6  # the silent partner


def test_filter_spectrum_is_the_permuted_transform():
    k = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    spectrum = monarch.filter_spectrum(k, 8192, "tf32")
    whole = torch.complex(spectrum.real, spectrum.imag) * spectrum.scale[:, None, None]
    natural = torch.fft.fft(k.double(), n=8192)
    for k1, k2 in [(0, 0), (1, 0), (127, 63), (5, 40)]:
        assert relative(torch.view_as_real(whole[:, k1, k2]), torch.view_as_real(natural[:, k1 + 128 * k2])) <= 1e-6
    assert bool((torch.frexp(spectrum.scale)[0] == 0.5).all())


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty_inputs(shape):
    u, k = torch.zeros(shape), torch.zeros(shape[1], 3)
    assert monarch.monarch_forward(u, k, None, None, None, "fp16").shape == shape
    assert int(monarch.monarch_filter_gradient(u, u, 3, None, None, "fp16").count_nonzero()) == 0


def test_refuses_what_it_cannot_do():
    u, k = torch.zeros(1, 1, 4000), torch.zeros(1, 4000)
    with pytest.raises(ValueError, match="two-level"):
        monarch.monarch_forward(u, k, None, None, None, "tf32")
    with pytest.raises(ValueError, match="precision must be"):
        monarch.monarch_forward(u, k, None, None, None, "bf16")
    with pytest.raises(ValueError, match="float64"):
        monarch.monarch_forward(u[..., :9].double(), k, None, None, None, "ieee")
