"""Transforms in place by kept plans are those of torch.fft, whatever lay behind the values."""

import pytest
import torch

from seqengine.kernels.conv import transforms
from seqengine.kernels.conv.transforms import irfft_, rfft_, row_length
from seqengine.unfilled import Unfilled, Unfilling
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(1,), (3,), (2, 5), (2, 1, 3, 2)]


def assert_same(actual, expected, what=""):
    assert_close(*(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (actual, expected)), what)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def rows_of(x):
    """With room behind each row, where anything may lie."""
    rows = torch.full((*x.shape[:-1], row_length(x.shape[-1], "cpu")), float("nan"), dtype=x.dtype)
    rows[..., : x.shape[-1]] = x
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 30, 64, 1000, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_are_torchs_and_lie_where_the_rows_lay(shape, n, dtype):
    x = randn(*shape, n, dtype=dtype)
    rows = rows_of(x)
    spectrum = rfft_(rows, n)
    assert_same(spectrum, torch.fft.rfft(x))
    again = irfft_(spectrum, n)
    assert_same(again, x)
    if torch.backends.mkl.is_available():
        assert spectrum.is_contiguous()
        assert spectrum.data_ptr() == rows.data_ptr() == again.data_ptr()


@pytest.mark.parametrize("length", [32, 33, 40])
def test_rows_with_less_or_more_behind_them(length):
    x = randn(4, length)
    assert_same(rfft_(x.clone(), 32), torch.fft.rfft(x, n=32))


def test_rows_with_gaps_rows_that_overlap_and_spectra_that_do_not_lie_one_after_another():
    x = randn(6, 104)
    for rows in (x[:, ::2], x[:, 10:62], x[0].unfold(-1, 52, 5), x[:2, :52], x.T[:52].T):
        assert_same(rfft_(rows, 50), torch.fft.rfft(rows[..., :50]))
    assert_same(x, randn(6, 104), "what is not plain rows is left as it was")
    spectra = torch.fft.rfft(x)
    for some in (spectra.conj(), spectra[::2], spectra[:1].clone(), spectra[:, :26]):
        n, expected = 2 * (some.shape[-1] - 1), torch.fft.irfft(some)
        assert_same(irfft_(some, n), expected)


def test_a_spectrum_of_another_length_is_cut_or_filled_up():
    spectrum = torch.fft.rfft(randn(3, 64))
    for n in (32, 64, 100):
        assert_same(irfft_(spectrum.clone(), n), torch.fft.irfft(spectrum, n=n))


def test_more_plans_than_are_kept_and_another_number_of_threads(set_num_threads):
    for threads in (1, 2, 1):
        set_num_threads(threads)
        for n in range(2, 2 * transforms.KEPT_PLANS + 12, 2):
            assert_same(rfft_(rows_of(randn(3, n)), n), torch.fft.rfft(randn(3, n)))


@pytest.mark.parametrize("where", ["no library", "no data", "half"])
def test_torch_does_it_where_plans_cannot(where, monkeypatch):
    if where == "no library":
        monkeypatch.setattr(transforms, "_library", lambda: None)
        x = randn(3, 16)
        rows = rows_of(x)
        spectrum = rfft_(rows, 16)
        assert spectrum.data_ptr() != rows.data_ptr()
        assert_same(spectrum, torch.fft.rfft(x))
        assert_same(irfft_(spectrum, 16), x)
    elif where == "no data":
        with Unfilling():
            rows = torch.ones(3, 18)
            spectrum = rfft_(rows, 16)
            assert isinstance(irfft_(spectrum, 16), Unfilled)
        assert spectrum.shape == (3, 9)
        if torch.backends.mkl.is_available():
            assert spectrum._base is rows, "a plan counts no memory for it"
    else:
        with pytest.raises(RuntimeError, match="Half"):
            rfft_(torch.ones(3, 18, dtype=torch.half), 16)


def test_a_transform_that_failed_is_told():
    with pytest.raises(RuntimeError, match="MKL: a transform must end with status 0; got 3"):
        transforms._check(3)
