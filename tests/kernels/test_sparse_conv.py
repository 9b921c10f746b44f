"""The frequency-sparse convolution against its definition: values, gradients of any order, bands, errors, work done."""

import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from seqengine.kernels.api import long_conv
from seqengine.kernels.conv import sparse_ops
from seqengine.kernels.conv.sparse import SparseSpectrum, sparse_conv, sparse_conv_reference
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bands_of(size, num_blocks):
    """For each positive frequency the number of its band, from the words of the definition."""
    width = size // num_blocks // 2
    return [min(f // width, num_blocks - 1) for f in range(size // 2 + 1)]


def definition(x, k, size, keep):
    mask = torch.tensor([keep[band] for band in bands_of(size, len(keep))])
    return torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(k, n=size) * mask, n=size)[..., : x.shape[-1]]


def some_bands(num_blocks, which):
    """Every band, the lowest, the highest, both, all but those, or about half, at random."""
    first, last = 0, num_blocks - 1
    coins = (torch.rand(num_blocks, generator=torch.Generator().manual_seed(num_blocks)) < 0.5).tolist()
    kept = {
        "all": range(num_blocks),
        "first": [first],
        "last": [last],
        "ends": [first, last],
        "inside": range(1, last),
        "random": [band for band in range(num_blocks) if coins[band] or band == num_blocks // 2],
    }[which]
    return tuple(band in kept for band in range(num_blocks))


def with_gradients(function, dy, *arguments):
    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    y = function(*leaves)
    return {"y": y, **dict(zip(("dx", "dk", "dskip"), torch.autograd.grad(y, leaves, dy), strict=False))}


def assert_same(actual, expected, tolerance=None):
    for name, value in actual.items():
        assert_close(value, expected[name], name, tolerance)


def assert_is_the_definition(x, k, spectrum):
    dy = randn(*x.shape, seed=9)
    actual = with_gradients(lambda x, k: sparse_conv(x, k, None, spectrum), dy, x, k)
    assert_same(actual, with_gradients(lambda x, k: definition(x, k, spectrum.size, spectrum.keep), dy, x, k))


@pytest.mark.parametrize("filters", ["shared", "batch"])
@pytest.mark.parametrize("which", ["all", "first", "last", "ends", "inside", "random"])
@pytest.mark.parametrize("num_blocks", [2, 3, 4, 7, 32])
def test_is_the_definition_with_both_gradients(num_blocks, which, filters):
    if which == "inside" and num_blocks == 2:
        pytest.skip("two bands have no inside")
    spectrum = SparseSpectrum(num_blocks * 24, some_bands(num_blocks, which))
    for T, L in [(spectrum.size // 2 + 1, spectrum.size // 2), (13, 21), (spectrum.size // 3, 5)]:
        k = randn(*((2,) if filters == "batch" else ()), 3, L, seed=1)
        assert_is_the_definition(randn(2, 3, T), k, spectrum)


@pytest.mark.parametrize("points", [2, 4, 6, 18])
@pytest.mark.parametrize("num_blocks", [2, 3, 4, 5, 8])
def test_every_single_band_owns_exactly_its_frequencies(num_blocks, points):
    size = num_blocks * points
    x, k = randn(1, 2, size - 2), randn(2, 3, seed=1)
    total = torch.zeros_like(x)
    for band in range(num_blocks):
        spectrum = SparseSpectrum(size, tuple(band == j for j in range(num_blocks)))
        assert spectrum.mask().tolist() == [j == band for j in bands_of(size, num_blocks)]
        assert_is_the_definition(x, k, spectrum)
        total += sparse_conv(x, k, None, spectrum)
    assert_close(total, long_conv(x, k)[0], "sum of the bands")


@pytest.mark.parametrize(("T", "L"), [(1, 1), (1, 40), (2, 1), (63, 65), (257, 1000), (1000, 257), (4097, 3)], ids=str)
@pytest.mark.parametrize("num_blocks", [2, 7, 32])
def test_all_bands_are_the_causal_convolution(T, L, num_blocks):
    spectrum = SparseSpectrum.low_pass(T, L, kept=num_blocks, num_blocks=num_blocks)
    x, k, skip, dy = randn(2, 3, T), randn(3, L, seed=1), randn(3, seed=2), randn(2, 3, T, seed=3)
    actual = with_gradients(lambda *a: sparse_conv(*a, spectrum), dy, x, k, skip)
    assert_same(actual, with_gradients(lambda x, k, skip: long_conv(x, k, skip=skip)[0], dy, x, k, skip))


def test_without_a_band_only_the_skip_is_left():
    spectrum = SparseSpectrum.low_pass(20, 9, kept=0, num_blocks=4)
    x, k, skip, dy = randn(2, 3, 20), randn(3, 9, seed=1), randn(3, seed=2), randn(2, 3, 20, seed=3)
    found = with_gradients(lambda *a: sparse_conv(*a, spectrum), dy, x, k, skip)
    assert torch.equal(found["y"], skip[:, None] * x)
    assert torch.equal(found["dx"], skip[:, None] * dy)
    assert not found["dk"].any()


def test_the_skip_keeps_its_full_spectrum():
    spectrum = SparseSpectrum.low_pass(50, 9, kept=1, num_blocks=4)
    x, k, skip = randn(2, 3, 50), randn(3, 9, seed=1), randn(3, seed=2)
    assert_close(sparse_conv(x, k, skip, spectrum), definition(x, k, spectrum.size, spectrum.keep) + skip[:, None] * x)


def test_the_reference_is_the_definition():
    spectrum = SparseSpectrum(7 * 10, some_bands(7, "random"))
    x, k, skip = randn(2, 3, 30), randn(3, 41, seed=1), randn(3, seed=2)
    assert_close(sparse_conv_reference(x, k, None, spectrum), definition(x, k, spectrum.size, spectrum.keep))
    assert_close(sparse_conv(x, k, skip, spectrum), sparse_conv_reference(x, k, skip, spectrum))


@pytest.mark.parametrize("shape", [(0, 3, 9), (2, 3, 0), (2, 0, 9)], ids=str)
@pytest.mark.parametrize("kept", [0, 2])
def test_empty_inputs(shape, kept):
    spectrum = SparseSpectrum.low_pass(9, 4, kept=kept, num_blocks=4)
    x, k = randn(*shape).requires_grad_(), randn(shape[1], 4).requires_grad_()
    y = sparse_conv(x, k, randn(shape[1]), spectrum)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert not k.grad.any()


def test_many_blocks_of_channels_and_strided_inputs(monkeypatch):
    monkeypatch.setattr(sparse_ops, "BLOCK_ELEMENTS", {"cpu": 2 * 2 * 140})
    spectrum = SparseSpectrum(140, some_bands(7, "random"))
    x, k, dy = randn(60, 5, 2).permute(2, 1, 0), randn(39, 5, seed=1).t(), randn(5, 2, 60, seed=2).transpose(0, 1)
    actual = with_gradients(lambda x, k: sparse_conv(x, k, None, spectrum), dy, x, k)
    assert_same(actual, with_gradients(lambda x, k: definition(x, k, 140, spectrum.keep), dy, x, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_near_float64(dtype):
    spectrum = SparseSpectrum.low_pass(500, 300, kept=5, num_blocks=8)
    x, k, dy = (randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(2, 3, 500), (3, 300), (2, 3, 500)]))

    def function(x, k):
        return sparse_conv(x, k, None, spectrum)

    actual = with_gradients(function, dy, x, k)
    assert all(value.dtype == dtype for value in actual.values())
    assert_same(actual, with_gradients(function, dy.double(), x.double(), k.double()), RELATIVE[dtype])


def test_a_float32_filter_of_a_bfloat16_input_keeps_its_precision():
    spectrum = SparseSpectrum.low_pass(64, 64, kept=3, num_blocks=4)
    x, k = randn(1, 2, 64, dtype=torch.bfloat16), randn(2, 64, seed=1, dtype=torch.float32).requires_grad_()
    expected = torch.autograd.grad(sparse_conv(x.double(), k.double(), None, spectrum).sum(), k)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_conv(x, k, randn(2, dtype=torch.float32) * 0, spectrum)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert_close(k.grad, expected)


def test_two_runs_are_bitwise_the_same():
    spectrum = SparseSpectrum(32 * 64, some_bands(32, "random"))
    runs = [
        with_gradients(lambda x, k: sparse_conv(x, k, None, spectrum), randn(2, 5, 999), x, k)
        for x, k in [(randn(2, 5, 999), randn(5, 999, seed=1))] * 2
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("which", ["all", "last", "inside"])
@pytest.mark.parametrize("filters", ["shared", "batch"])
def test_gradcheck_and_gradgradcheck(which, filters):
    spectrum = SparseSpectrum(12, some_bands(3, which))
    x, skip = randn(2, 2, 5).requires_grad_(), randn(2, seed=2).requires_grad_()
    k = randn(*((2,) if filters == "batch" else ()), 2, 4, seed=1).requires_grad_()

    def function(x, k, skip):
        return sparse_conv(x, k, skip, spectrum)

    assert torch.autograd.gradcheck(function, (x, k, skip))
    assert torch.autograd.gradgradcheck(function, (x, k, skip))


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("k_shape", [(3, 5), (2, 3, 5)])
def test_operators_keep_torchs_contract(needed, k_shape):
    x, k, dy = randn(2, 3, 9), randn(*k_shape, seed=1), randn(2, 3, 9, seed=2)
    for t in (x, k, dy):
        t.requires_grad_()
    keep = [True, False, True]
    torch.library.opcheck(sparse_ops.sparse_conv, (x, k, 18, keep))
    torch.library.opcheck(sparse_ops.sparse_conv_backward, (dy, x, k, 18, keep, *needed))


def test_compiles_whole_forward_and_backward():
    spectrum = SparseSpectrum.low_pass(50, 20, kept=3, num_blocks=4)
    values = [randn(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(2, 3, 50), (3, 20), (3,)])]

    def function(x, k, skip):
        return sparse_conv(x, k, skip, spectrum).sin().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = ([t.clone().requires_grad_() for t in values] for _ in range(2))
    function(*eager).backward()
    compiled(*traced).backward()
    for a, b in zip(traced, eager, strict=True):
        assert_close(a.grad, b.grad)


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    spectrum = SparseSpectrum.low_pass(7, 5, kept=3, num_blocks=4)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        y = sparse_conv(torch.empty(2, 3, 7, dtype=torch.bfloat16), torch.empty(3, 5), None, spectrum)
        assert (y.shape, y.dtype) == ((2, 3, 7), torch.bfloat16)


def test_saves_its_inputs_and_no_spectrum():
    spectrum = SparseSpectrum.low_pass(1000, 1000, kept=8)
    x, k = randn(2, 4, 1000).requires_grad_(), randn(4, 1000, seed=1).requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        sparse_conv(x, k, None, spectrum)
    assert sum(kept.values()) == x.nbytes + k.nbytes


class Multiplied(TorchDispatchMode):
    """Elements of the results of complex products."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "mul_" and result.is_complex() and args[1].is_complex():
            self.elements += result.numel()
        return result


def work(kept, backward, monkeypatch):
    """(flops of matrix products, elements of products of spectra and twiddles, transforms)"""
    transforms = []
    for name in ("rfft_", "irfft_"):
        own = getattr(sparse_ops, name)
        monkeypatch.setattr(sparse_ops, name, lambda rows, n, own=own: transforms.append(n) or own(rows, n))
    x, k, keep = (
        randn(2, 3, 500),
        randn(3, 500, seed=1),
        [band % (32 // kept) == 0 for band in range(32)] if kept else [False] * 32,
    )
    flops, products = FlopCounterMode(display=False), Multiplied()
    with flops, products:
        if backward:
            sparse_ops.gradients(x, x, k, 1024, keep, True, True)
        else:
            sparse_ops.convolve(x, k, 1024, keep)
    monkeypatch.undo()
    return flops.get_total_flops(), products.elements, len(transforms)


@pytest.mark.parametrize("backward", [False, True])
def test_dropped_bands_cost_no_matrix_product_and_no_product_of_spectra(backward, monkeypatch):
    B, D, columns = 2, 3, 1024 // 32 // 2 + 1
    row = 2 * 32 * columns * D  # of one product with a matrix: a kept band of the filter
    rows_in_and_out = (B + B + 1) + (B + 1) if backward else (B + 1) + B
    spectra = (2 * B if backward else B) * D * columns
    fixed = work(1, backward, monkeypatch)[1] - spectra
    for kept in (1, 4, 8, 16, 32):
        flops, elements, transforms = work(kept, backward, monkeypatch)
        assert flops == kept * rows_in_and_out * row
        assert elements == kept * spectra + fixed
        assert transforms == (5 if backward else 3)
    assert work(0, backward, monkeypatch) == (0, 0, 0)


def decaying(D=4, L=200, seed=0):
    """Smooth filters with some noise: energy that falls with frequency."""
    t = torch.arange(L, dtype=torch.float64)
    rates = torch.linspace(0.02, 0.3, D, dtype=torch.float64)[:, None]
    return torch.exp(-rates * t) + 1e-2 * randn(D, L, seed=seed)


def measured_error(k, spectrum):
    """From the projected filter itself, in time."""
    whole = torch.fft.rfft(k.double(), n=spectrum.size)
    dropped = torch.fft.irfft(whole * ~spectrum.mask(), n=spectrum.size)
    return dropped.norm(dim=-1) / k.double().norm(dim=-1)


@pytest.mark.parametrize("num_blocks", [2, 7, 32])
@pytest.mark.parametrize("error", [1e-3, 0.05, 0.1, 0.3, 0.9])
def test_fit_meets_its_error_and_the_next_band_would_not(num_blocks, error):
    k = decaying()
    spectrum = SparseSpectrum.fit(k, 300, error=error, num_blocks=num_blocks)
    assert spectrum.size >= 300 + 200 - 1
    assert_close(spectrum.error(k), measured_error(k, spectrum))
    assert float(spectrum.error(k).max()) <= error
    power = torch.fft.rfft(k, n=spectrum.size).abs().square()
    power[:, 1:-1] *= 2
    shares = torch.zeros(len(k), num_blocks, dtype=torch.float64)
    shares.index_add_(1, torch.tensor(bands_of(spectrum.size, num_blocks)), power / power.sum(dim=-1, keepdim=True))
    order = shares.amax(dim=0).argsort().tolist()
    dropped = spectrum.keep.count(False)
    assert {band for band, kept in enumerate(spectrum.keep) if not kept} == set(order[:dropped])
    if dropped < num_blocks:
        one_fewer = tuple(kept and band != order[dropped] for band, kept in enumerate(spectrum.keep))
        assert float(SparseSpectrum(spectrum.size, one_fewer).error(k).max()) > error


def test_fit_keeps_less_for_a_larger_error():
    fractions = [SparseSpectrum.fit(decaying(), 300, error=e).kept_fraction for e in (0.0, 0.02, 0.1, 0.5, 1.0)]
    assert fractions == sorted(fractions, reverse=True)
    assert (fractions[0], fractions[-1]) == (1.0, 0.0)
    assert 0 < fractions[2] < 1


def test_fit_holds_for_every_filter_of_every_shape_and_dtype(monkeypatch):
    k = torch.stack([decaying(3, 60), decaying(3, 60, seed=1)])
    k[0, 1] = 0
    whole = SparseSpectrum.fit(k, 100, error=0.1, num_blocks=8)
    assert whole.error(k).shape == (2, 3)
    assert float(whole.error(k).max()) <= 0.1
    assert float(whole.error(k)[0, 1]) == 0
    monkeypatch.setattr("seqengine.kernels.conv.sparse.BLOCK_ELEMENTS", {"cpu": 1})
    assert SparseSpectrum.fit(k, 100, error=0.1, num_blocks=8) == whole
    low = k.bfloat16().requires_grad_()
    assert float(SparseSpectrum.fit(low, 100, error=0.1, num_blocks=8).error(low).max()) <= 0.1


def test_of_equal_bands_the_highest_goes_first():
    silent = SparseSpectrum.fit(torch.zeros(2, 5), 20, error=0.0, num_blocks=4)
    assert silent.keep == (False,) * 4
    # an impulse is flat, and frequency 0 counts once: the first band is smaller, the middle ones are equal
    flat = SparseSpectrum.fit(torch.eye(1, 8), 25, error=0.75, num_blocks=4)
    assert (flat.size, flat.keep) == (32, (False, True, False, True))


def test_the_output_and_the_leak_are_within_the_bounds_of_the_error():
    k, x = decaying(4, 200), randn(2, 4, 300)
    spectrum = SparseSpectrum.fit(k, 300, error=0.3)
    assert 0 < spectrum.kept_fraction < 0.75
    allowed = spectrum.error(k) * k.norm(dim=-1)
    off = (sparse_conv(x, k, None, spectrum) - long_conv(x, k)[0]).abs().amax(dim=-1)
    assert bool((off <= allowed * x.norm(dim=-1)).all())
    impulse = torch.zeros(1, 4, 300, dtype=torch.float64)
    impulse[..., -1] = 1
    before = sparse_conv(impulse, k, None, spectrum)[0, :, :-1].norm(dim=-1)
    assert bool((before > 0).all())
    assert bool((before <= allowed).all())


def test_low_pass_keeps_the_lowest_bands():
    spectrum = SparseSpectrum.low_pass(16384, 16384, kept=4)
    assert (spectrum.size, spectrum.num_blocks, spectrum.kept_fraction) == (32768, 32, 0.125)
    assert spectrum.mask().tolist() == [f < 2048 for f in range(16385)]


def test_a_spectrum_is_a_plain_value():
    spectrum = SparseSpectrum.low_pass(100, 30, kept=2, num_blocks=4)
    assert pickle.loads(pickle.dumps(spectrum)) == spectrum
    assert len({spectrum, SparseSpectrum(spectrum.size, spectrum.keep)}) == 1


@pytest.mark.parametrize(
    ("size", "keep", "message"),
    [
        (16, [True, False], "keep must be a tuple of bools"),
        (16, (1, 0), "keep must be a tuple of bools"),
        (16, (True,), "two bands or more"),
        (18, (True, False), "size must be a positive multiple of twice the 2 bands"),
        (0, (True, False), "size must be a positive multiple"),
    ],
)
def test_rejects_a_spectrum(size, keep, message):
    with pytest.raises(ValueError, match=message):
        SparseSpectrum(size, keep)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(5)}, "k must be"),
        ({"k": torch.zeros(0, 5)}, "k must be"),
        ({"k": torch.full((2, 5), float("nan"))}, "k must be finite"),
        ({"k": torch.zeros(2, 5, dtype=torch.int64)}, "k must be float64"),
        ({"length": 0}, "length must be"),
        ({"error": -0.1}, "error must be"),
        ({"error": float("nan")}, "error must be"),
        ({"num_blocks": 1}, "num_blocks must be"),
    ],
)
def test_fit_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        SparseSpectrum.fit(**{"k": torch.ones(2, 5), "length": 9, "error": 0.1, **change})


def test_low_pass_and_error_reject_what_does_not_fit():
    with pytest.raises(ValueError, match="kept must be"):
        SparseSpectrum.low_pass(9, 5, kept=33)
    with pytest.raises(ValueError, match="taps must be"):
        SparseSpectrum.low_pass(9, 0, kept=3)
    with pytest.raises(ValueError, match="size must be at least L=9"):
        SparseSpectrum(8, (True, False)).error(torch.zeros(2, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6)}, r"x must be \[B, D, T\]"),
        ({"x": torch.zeros(2, 4, 13)}, "size of spectrum must be at least T"),
        ({"k": torch.zeros(3, 4)}, "k must have"),
        ({"k": torch.zeros(3, 4, 4)}, "k must have"),
        ({"k": torch.zeros(4, 0)}, "k must be"),
        ({"skip": torch.zeros(3)}, "skip must be"),
        ({"x": torch.zeros(2, 4, 6, dtype=torch.complex64)}, "x must be float64"),
    ],
)
@pytest.mark.parametrize("function", [sparse_conv, sparse_conv_reference])
def test_rejects(change, message, function):
    arguments = {"x": torch.zeros(2, 4, 6), "k": torch.zeros(4, 4), "skip": None, **change}
    with pytest.raises(ValueError, match=message):
        function(**arguments, spectrum=SparseSpectrum(12, (True, False)))
