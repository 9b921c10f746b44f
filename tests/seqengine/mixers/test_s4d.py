"""S4D and S4-PTD: against the published formulas written out, in outputs and every gradient; initial poles; HiPPO."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from seqengine.kernels.api import modal_filter
from seqengine.mixers.diagonal import hippo_legs, initial_poles
from seqengine.mixers.mixer import Place
from seqengine.mixers.s4_ptd import S4PTD, S4PTDConfig, perturb_then_diagonalise
from seqengine.mixers.s4d import S4D, S4DConfig
from tests.tolerances import assert_close

D = 3


def written_out(mixer, x, discretisation, factor):
    """The filters mode by mode, the convolution lag by lag, then GELU and the gated linear unit."""
    ssm, T = mixer.ssm, x.shape[1]
    dt = ssm.log_step.exp()[:, None]
    A = torch.complex(-ssm.log_decay.exp(), ssm.frequency)
    if discretisation == "zoh":
        decay, gain = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        decay, gain = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    weight = torch.view_as_complex(ssm.B) * torch.view_as_complex(ssm.C) * gain
    y = mixer.skip * x
    for lag in range(T):
        tap = factor * (weight * decay**lag).sum(dim=1).real
        y = y + F.pad(tap * x[:, : T - lag], (0, 0, lag, 0))
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    a, b = (y @ mixer.out_proj.weight.T + mixer.out_proj.bias).chunk(2, dim=-1)
    return a * torch.sigmoid(b)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("kind", ["lin", "inv", "legs", "ptd"])
def test_layer_is_a_sum_of_exponentials_gelu_and_gate(kind, discretisation):
    torch.manual_seed(0)
    settings = {"d_state": 6, "discretisation": discretisation, "step_min": 0.05, "step_max": 0.5}
    mixer = S4PTD(S4PTDConfig(**settings), Place(D, 20)) if kind == "ptd" else S4D(
        S4DConfig(init=kind, **settings), Place(D, 20)
    )  # fmt: skip
    mixer = mixer.double()
    x = torch.randn(2, 13, D, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x)[0], written_out(mixer, x, discretisation, 1 if kind == "ptd" else 2)
    assert_close(y, expected)
    weights = torch.randn_like(y)
    wanted = [x, *mixer.parameters()]
    found = torch.autograd.grad((y * weights).sum(), wanted)
    names = ["x", *dict(mixer.named_parameters())]
    for name, a, b in zip(names, found, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        assert_close(a, b, name, 1e-10)


def test_initial_poles_are_the_published_ones():
    for n in range(4):
        assert complex(initial_poles("lin", 8)[n]) == pytest.approx(complex(-0.5, math.pi * n))
        assert complex(initial_poles("inv", 8)[n]) == pytest.approx(complex(-0.5, 8 / math.pi * (8 / (2 * n + 1) - 1)))
    A, B = hippo_legs(8)
    normal = torch.linalg.eigvals(A + 0.5 * B[:, None] * B)
    expected = normal[normal.imag > 0]
    expected = expected[expected.imag.argsort(descending=True)]
    assert_close(torch.view_as_real(initial_poles("legs", 8)), torch.view_as_real(expected))


def test_hippo_matrix_entry_by_entry():
    A, B = hippo_legs(5)
    for n in range(5):
        assert float(B[n]) == pytest.approx(math.sqrt(2 * n + 1))
        for k in range(5):
            expected = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1.0) if n == k else 0.0
            assert float(A[n, k]) == pytest.approx(expected)


def test_time_steps_are_spread_between_their_bounds():
    torch.manual_seed(0)
    steps = S4D(S4DConfig(step_min=0.01, step_max=0.1), Place(400, 8)).ssm.log_step.detach().exp()
    assert 0.01 <= float(steps.min()) < 0.011
    assert 0.09 < float(steps.max()) <= 0.1
    assert float(steps.log().mean()) == pytest.approx(math.log(0.01 * 0.1) / 2, abs=0.1)


def test_output_projection_begins_as_a_convolution_of_one_tap():
    mixer = S4D(S4DConfig(), Place(64, 8))
    with torch.no_grad():
        mixer.out_proj.weight.zero_()
    mixer.initialise()
    assert float(mixer.out_proj.weight.detach().abs().max()) == pytest.approx(64**-0.5, rel=0.01)


def transfer(poles, V, B, C, omega):
    """C (i omega - A)^-1 B for A = V diag(poles) V^-1: [omega, C]."""
    inverse = 1 / (1j * omega[:, None] - poles)
    return (inverse * torch.linalg.solve(V, B.to(V.dtype))) @ (C.to(V.dtype) @ V).T


def hippo_transfer(A, B, C, omega):
    eye = torch.eye(len(B), dtype=torch.complex128)
    return torch.stack([C.to(eye.dtype) @ torch.linalg.solve(1j * w * eye - A, B.to(eye.dtype)) for w in omega])


OMEGA = torch.logspace(-2, 4, 60, dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("perturbation", [0.4, 0.1, 0.01])
def test_perturbed_eigenvectors_are_well_conditioned_and_the_transfer_function_is_that_of_hippo(
    size, seed, perturbation
):
    torch.manual_seed(seed)
    A, B = hippo_legs(size)
    C = torch.randn(8, size, dtype=torch.float64)
    exact = hippo_transfer(A, B, C, OMEGA)
    found = perturb_then_diagonalise(size, perturbation)
    assert float(torch.linalg.cond(found.V)) < 2.1 / perturbation
    assert float(found.poles.real.max()) < -0.5 + perturbation
    assert_close(torch.view_as_real(found.V @ found.B[:, None])[:, 0, 0], B, tolerance=1e-10)
    error = transfer(found.poles, found.V, B, C, OMEGA) - exact
    assert float(error.abs().max() / exact.abs().max()) < 2 * perturbation


def test_neither_hippo_nor_its_normal_part_would_do():
    """HiPPO has no usable eigenvectors; the normal matrix of S4D-LegS is another system."""
    torch.manual_seed(0)
    A, B = hippo_legs(64)
    C = torch.randn(8, 64, dtype=torch.float64)
    exact = hippo_transfer(A, B, C, OMEGA)
    assert float(torch.linalg.cond(torch.linalg.eig(A)[1])) > 1e15
    error = hippo_transfer(A + 0.5 * B[:, None] * B, B, C, OMEGA) - exact
    assert float(error.abs().max() / exact.abs().max()) > 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_filters_are_those_of_the_sampled_hippo_system(dtype):
    """k[t] = C exp(A dt t) A^-1 (exp(A dt) - 1) B, from matrix exponentials of HiPPO itself."""
    torch.manual_seed(0)
    size, length = 32, 200
    mixer = S4PTD(S4PTDConfig(d_state=size, perturbation=0.02, step_min=0.01, step_max=0.02), Place(4, length)).to(
        dtype
    )
    torch.manual_seed(0)
    start = perturb_then_diagonalise(size, 0.02)
    C = torch.randn(4, size, dtype=torch.float64)
    A, B = hippo_legs(size)
    k = modal_filter(*mixer.ssm.modes(), length).double()
    for channel in range(4):
        dt = float(mixer.ssm.log_step[channel].detach().exp())
        step = torch.matrix_exp(A * dt)
        state = torch.linalg.solve(A, (step - torch.eye(size, dtype=torch.float64)) @ B)
        expected = []
        for _ in range(length):
            expected.append(C[channel] @ state)
            state = step @ state
        assert_close(k[channel], torch.stack(expected), f"channel {channel}", 0.03)
    assert start.V.shape == (size, size)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (S4DConfig, {"d_state": 7}, "d_state must be even .* got 7"),
        (S4DConfig, {"step_max": 1e-4}, r"step_min must not be above step_max; got 0\.001 > 0\.0001"),
        (S4PTDConfig, {"perturbation": 0.5}, r"less than 0\.5"),
        (S4PTDConfig, {"d_state": 1}, "greater than or equal to 2"),
    ],
)
def test_impossible_settings_are_refused(kind, settings, message):
    with pytest.raises(ValidationError, match=message):
        kind(**settings)
