"""modal_filter against its definition, against the state-space models that it expresses, and its memory."""

import math

import pytest
import torch

from seqengine.kernels.modal import filter as modal_filter_module
from seqengine.kernels.modal import reference
from seqengine.kernels.modal.op import modal_filter
from tests.kernels.largest_tensor import LargestTensor
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LENGTHS = [1, 2, 3, 63, 64, 65, 257, 1000, 4097]


def parameters(D, N, kind, seed=0):
    """Poles between slow and fast decay; complex ones turn at every speed."""
    generator = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(D, N, generator=generator, dtype=torch.float64)

    log_poles = -torch.rand(D, N, generator=generator, dtype=torch.float64) * 0.5 - 1e-3
    residues = randn() / N**0.5
    if kind == "complex":
        return torch.complex(log_poles, 3 * randn()), torch.complex(residues, randn())
    return log_poles, residues


def run(function, log_poles, residues, length):
    """The filter, and the gradients of a fixed random projection of it."""
    leaves = [t.detach().clone().requires_grad_() for t in (log_poles, residues)]
    k = function(*leaves, length)
    weights = torch.randn(k.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (k.double() * weights).sum().backward()
    return {"k": k, "d_log_poles": leaves[0].grad, "d_residues": leaves[1].grad}


def assert_matches(actual, expected, tolerance=None):
    for name, value in actual.items():
        parts = [torch.view_as_real(t) if t.is_complex() else t for t in (value, expected[name])]
        assert_close(*parts, name, tolerance)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("N", [1, 3, 16])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_reference_with_every_gradient(length, N, kind):
    arguments = (*parameters(3, N, kind), length)
    assert_matches(run(modal_filter, *arguments), run(reference.modal_filter, *arguments))


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_matches_reference_over_many_blocks_of_channels(kind, monkeypatch):
    monkeypatch.setattr(modal_filter_module, "BLOCK_ELEMENTS", {"cpu": 3000})
    arguments = (*parameters(7, 4, kind), 500)
    assert_matches(run(modal_filter, *arguments), run(reference.modal_filter, *arguments))


@pytest.mark.parametrize("kinds", [("real", "complex"), ("complex", "real")], ids=str)
def test_real_and_complex_parameters_may_be_mixed(kinds):
    arguments = parameters(2, 3, kinds[0])[0], parameters(2, 3, kinds[1])[1], 70
    assert_matches(run(modal_filter, *arguments), run(reference.modal_filter, *arguments))


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_gradcheck(kind):
    leaves = [t.requires_grad_() for t in parameters(2, 3, kind)]
    assert torch.autograd.gradcheck(lambda a, r: modal_filter(a, r, 9), leaves)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_single_precision_holds_near_the_unit_circle_after_a_million_taps(kind):
    length = 1 << 20
    log_poles, residues = parameters(1, 4, kind)
    slow = torch.full((1, 4), math.log1p(-1e-6), dtype=torch.float64)
    log_poles = torch.complex(slow, log_poles.imag) if kind == "complex" else slow
    single = torch.complex64 if kind == "complex" else torch.float32
    rounded = [t.to(single) for t in (log_poles, residues)]
    actual = run(modal_filter, *rounded, length)
    assert actual["k"].dtype == torch.float32
    expected = run(modal_filter, *(t.to(d.dtype) for t, d in zip(rounded, (log_poles, residues))), length)
    assert_matches(actual, expected, RELATIVE[torch.float32])
    error = (actual["k"].double() - expected["k"]).pow(2).mean() / expected["k"].pow(2).mean()
    assert float(error.detach()) ** 0.5 < 3e-7


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_never_holds_all_powers(kind):
    D, N, length = 4, 16, 4096
    arguments = (*parameters(D, N, kind), length)
    with LargestTensor() as largest:  # it does not see inside an operator, so it watches what the operators call
        run(modal_filter, *arguments)
        k = modal_filter_module.taps(*arguments)
        modal_filter_module.gradients(k, *arguments[:2])
    assert largest.elements < D * N * length / 4
    with LargestTensor() as largest:
        reference.modal_filter(*arguments)
    assert largest.elements >= D * N * length


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_pole_at_zero_counts_at_lag_zero_only(kind):
    log_poles, residues = parameters(2, 3, kind)
    log_poles[0, 1] = -math.inf if kind == "real" else complex(-math.inf, 0.3)
    actual = run(modal_filter, log_poles, residues, 100)
    assert_matches(actual, run(reference.modal_filter, log_poles, residues, 100))
    residues[0, 1] = 0
    without = modal_filter(log_poles, residues, 100)
    assert torch.equal(without[:, 1:], actual["k"][:, 1:])
    assert actual["d_log_poles"][0, 1] == 0


def test_s4d_filter():
    """S4D: 2 Re C (e^{dt A} - 1) / A B e^{dt A t} is the impulse response of its zero-order-hold recurrence."""
    generator = torch.Generator().manual_seed(2)
    D, N, length = 3, 8, 200
    A = torch.complex(torch.full((D, N), -0.5), math.pi * torch.arange(N).expand(D, N)).to(torch.complex128)
    dt = torch.rand(D, 1, generator=generator, dtype=torch.float64) * 0.1
    B, C = (torch.randn(D, N, generator=generator, dtype=torch.complex128) for _ in range(2))
    dA, state, expected = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A * B, []
    for _ in range(length):
        expected.append(2 * (C * state).sum(dim=1).real)
        state = dA * state
    assert_close(modal_filter(dt * A, 2 * C * B * (torch.exp(dt * A) - 1) / A, length), torch.stack(expected, dim=1))


def test_h3_diagonal_filter():
    """H3's second filter is S4D with A = -exp(inv_A_real) + i A_imag and a step exp(log_dt) for each channel."""
    generator = torch.Generator().manual_seed(3)
    D, N, length = 2, 32, 150
    inv_A_real = torch.full((D, N), math.log(0.5), dtype=torch.float64)
    A = torch.complex(-inv_A_real.exp(), math.pi * torch.arange(N, dtype=torch.float64).expand(D, N))
    step = torch.exp(torch.tensor([[-4.0], [-3.0]], dtype=torch.float64))
    C = torch.randn(D, N, generator=generator, dtype=torch.complex128) * (torch.exp(step * A) - 1) / A
    t = torch.arange(length, dtype=torch.float64)
    vandermonde = torch.exp((step * A)[..., None] * t)
    assert_close(modal_filter(step * A, 2 * C, length), 2 * torch.einsum("dn,dnt->dt", C, vandermonde).real)


def test_h3_shift_filter():
    """H3's shift filter of N taps: poles at the N-th roots of unity, residues its DFT, on sequences of at most N tokens."""
    D, N = 3, 12
    taps = torch.randn(D, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    angle = 2j * math.pi * torch.arange(N, dtype=torch.float64) / N
    assert_close(modal_filter(angle.expand(D, N), torch.fft.fft(taps) / N, N), taps)


def test_hyena_li_filter():
    """Hyena-LI: real poles exp(-exp(p) exp(gamma)), h[t] = sum_n R_n pole_n^t."""
    generator = torch.Generator().manual_seed(5)
    p, gamma, R = (torch.randn(4, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    log_poles = -torch.exp(p) * torch.exp(gamma - 4)
    expected = torch.stack([(R * log_poles.exp() ** t).sum(dim=1) for t in range(300)], dim=1)
    assert_close(modal_filter(log_poles, R, 300), expected)


def test_no_taps_and_no_channels():
    log_poles, residues = parameters(2, 3, "complex")
    assert modal_filter(log_poles, residues, 0).shape == (2, 0)
    assert modal_filter(log_poles[:0], residues[:0], 5).shape == (0, 5)


def test_two_runs_agree_bit_for_bit():
    arguments = (*parameters(5, 8, "complex"), 3000)
    first, second = run(modal_filter, *arguments), run(modal_filter, *arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_changes_nothing():
    log_poles, residues = (t.float() for t in parameters(3, 8, "real"))
    expected = run(modal_filter, log_poles, residues, 500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(modal_filter, log_poles, residues, 500)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3), 4), r"modal_filter: log_poles must be \[D, N\], N >= 1; got \(3,\)"),
        ((torch.zeros(3, 0), torch.zeros(3, 0), 4), "N >= 1"),
        ((torch.zeros(3, 2), torch.zeros(2, 2), 4), r"residues must have log_poles' shape \(3, 2\); got \(2, 2\)"),
        ((torch.zeros(3, 2).half(), torch.zeros(3, 2), 4), "log_poles must be float32"),
        ((torch.zeros(3, 2), torch.zeros(3, 2).bfloat16(), 4), "residues must be float32"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), -1), "length must be an int >= 0; got -1"),
        ((torch.zeros(3, 2), torch.zeros(3, 2), 2.5), "length must be an int >= 0; got 2.5"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        modal_filter(*arguments)
