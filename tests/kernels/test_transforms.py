"""Transforms by kept plans are those of torch.fft, whatever lay in their memory before."""

import pytest
import torch

from seqengine.kernels.conv import transforms
from seqengine.kernels.conv.transforms import Transforms
from seqengine.unfilled import Unfilled, Unfilling
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(1,), (3,), (2, 5), (2, 1, 3, 2)]


def assert_same(actual, expected, what=""):
    assert_close(*(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (actual, expected)), what)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 30, 64, 1000, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_are_torchs(shape, n, dtype):
    x, fft = randn(*shape, n, dtype=dtype), Transforms()
    spectrum = fft.rfft("a", x, n)
    assert spectrum.is_contiguous()
    assert_same(spectrum, torch.fft.rfft(x))
    assert_same(fft.irfft("b", spectrum, n), x)
    assert_same(spectrum, torch.fft.rfft(x), "the inverse leaves its input as it was")


@pytest.mark.parametrize("length", [0, 1, 17, 32, 40])
def test_rows_are_filled_up_with_zeros_each_time_or_cut(length):
    fft = Transforms()
    for seed in range(3):
        fft.rfft("a", randn(4, 32) + seed, 32)
        fft.rfft("b", randn(4, 32 - seed) + seed, 32)
        assert_same(fft.rfft("b", randn(4, length), 32), torch.fft.rfft(randn(4, length), n=32))


def test_rows_with_gaps_rows_that_overlap_and_smaller_blocks():
    fft, x = Transforms(), randn(6, 100)
    for rows in (x[:, ::2], x[:, 10:60], x[0].unfold(-1, 50, 5), x[:2, :50], x.T[:50].T):
        assert_same(fft.rfft("a", rows, 50), torch.fft.rfft(rows, n=50))
    spectra = torch.fft.rfft(x)
    for some in (spectra.conj(), spectra[::2], spectra[:1], spectra[:, :26]):
        n = 2 * (some.shape[-1] - 1)
        assert_same(fft.irfft("b", some, n), torch.fft.irfft(some, n=n))


def test_names_have_memory_of_their_own():
    fft = Transforms()
    a = fft.rfft("a", randn(3, 64), 64)
    expected = a.clone()
    b = fft.rfft("b", randn(3, 64) + 1, 64)
    assert torch.equal(a, expected)
    assert a.data_ptr() != b.data_ptr()
    assert fft.rfft("a", randn(2, 64), 64).data_ptr() == a.data_ptr()


def test_more_plans_than_are_kept_and_another_number_of_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            for n in range(2, 2 * transforms.KEPT_PLANS + 12, 2):
                assert_same(Transforms().rfft("a", randn(3, n), n), torch.fft.rfft(randn(3, n)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("where", ["no library", "no data", "half"])
def test_torch_does_it_where_plans_cannot(where, monkeypatch):
    if where == "no library":
        monkeypatch.setattr(transforms, "_library", lambda: None)
        assert_same(Transforms().rfft("a", randn(3, 10), 16), torch.fft.rfft(randn(3, 10), n=16))
        assert_same(Transforms().irfft("a", torch.fft.rfft(randn(3, 16)), 16), randn(3, 16))
    elif where == "no data":
        with Unfilling():
            spectrum = Transforms().rfft("a", torch.ones(3, 10), 16)
            assert isinstance(Transforms().irfft("b", spectrum, 16), Unfilled)
        assert spectrum.shape == (3, 9)
    else:
        with pytest.raises(RuntimeError, match="Half"):
            Transforms().rfft("a", torch.ones(3, 10, dtype=torch.half), 16)


def test_a_transform_that_failed_is_told():
    with pytest.raises(RuntimeError, match="MKL: a transform must end with status 0; got 3"):
        transforms._check(3)
