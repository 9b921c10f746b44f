"""The H3 layer: against the two recurrences written out, in outputs and every gradient; its rules, state and precision."""

import pytest
import torch
from pydantic import ValidationError

from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection
from seqengine.kernels.api import modal_filter
from seqengine.mixers.diagonal import DiagonalSSM, initial_poles
from seqengine.mixers.h3 import H3, H3Config, ShiftSSM
from seqengine.mixers.mixer import START, Place
from seqengine.model import build_model
from seqengine.optim import group_settings
from tests.tolerances import assert_close

D, N = 4, 6


def layer(head_dim=1, discretisation="bilinear", seed=0):
    """Far from the initial weights, so that B of the shift filter is no unit vector."""
    torch.manual_seed(seed)
    config = H3Config(d_state=N, head_dim=head_dim, discretisation=discretisation, step_min=0.05, step_max=0.5)
    mixer = H3(config, Place(D, 32)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def discrete(ssm, h, n, discretisation):
    """(A, B, C) of one mode of one head, as in the definition."""
    dt = ssm.log_step[h].exp()
    A = torch.complex(-ssm.log_decay[h, n].exp(), ssm.frequency[h, n])
    B, C = torch.complex(*ssm.B[h, n]), torch.complex(*ssm.C[h, n])
    if discretisation == "zoh":
        return torch.exp(dt * A), B * (torch.exp(dt * A) - 1) / A, C
    return (1 + dt * A / 2) / (1 - dt * A / 2), B * dt / (1 - dt * A / 2), C


def one_by_one(mixer, x, discretisation):
    """Token by token: a shift register for keys, one complex number for each mode of each product of key and value."""
    d, H = mixer.head_dim, mixer.heads
    rows = []
    for sample in x:
        register = [[x.new_zeros(()) for _ in range(N)] for _ in range(D)]
        states = {}
        outputs = []
        for token in sample:
            q, k, v = (mixer.in_proj.weight @ token + mixer.in_proj.bias).chunk(3)
            shifted = []
            for c in range(D):
                moved = [x.new_zeros(()), *register[c][:-1]]
                register[c] = [s + b * k[c] for s, b in zip(moved, mixer.shift.B[c], strict=True)]
                read = sum(a * s for a, s in zip(mixer.shift.C[c], register[c], strict=True))
                shifted.append(read + mixer.shift_skip[c] * k[c])
            y = [x.new_zeros(()) for _ in range(D)]
            for h in range(H):
                for i in range(d):
                    for j in range(d):
                        product = shifted[h * d + i] * v[h * d + j]
                        total = mixer.skip[h] * product
                        for n in range(N // 2):
                            A, B, C = discrete(mixer.ssm, h, n, discretisation)
                            states[h, i, j, n] = A * states.get((h, i, j, n), 0) + B * product
                            total = total + 2 * (C * states[h, i, j, n]).real
                        y[j * H + h] = y[j * H + h] + q[h * d + i] * total
            outputs.append(mixer.out_proj.weight @ torch.stack(y) + mixer.out_proj.bias)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("head_dim", [1, 2, 4])
@pytest.mark.parametrize("discretisation", ["bilinear", "zoh"])
def test_layer_is_two_recurrences_between_projections(head_dim, discretisation):
    mixer = layer(head_dim, discretisation)
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    y, state = mixer(x)
    expected = one_by_one(mixer, x, discretisation)
    assert state is None
    assert_close(y, expected)
    weights = torch.randn_like(y)
    wanted = [x, *mixer.parameters()]
    found = torch.autograd.grad((y * weights).sum(), wanted)
    names = ["x", *dict(mixer.named_parameters())]
    for name, a, b in zip(names, found, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        assert_close(a, b, name, 1e-10)


def test_shift_filter_is_the_correlation_of_b_and_c():
    torch.manual_seed(0)
    shift = ShiftSSM(3, 5).double()
    with torch.no_grad():
        shift.B.normal_()
    k = shift.filter()
    for t in range(5):
        expected = sum(shift.B[:, j] * shift.C[:, j + t] for j in range(5 - t))
        assert_close(k[:, t], expected)


def test_shift_filter_begins_with_the_taps_of_c():
    shift = ShiftSSM(3, 5)
    assert torch.allclose(shift.filter(), shift.C, atol=1e-7)


def test_state_is_as_large_after_one_token_as_after_many():
    mixer = layer(2)
    shapes = []
    for tokens in (1, 20):
        _, state = mixer(torch.randn(3, tokens, D, dtype=torch.float64), state=START)
        shapes.append((state.shift.shape, state.modes.shape))
    assert shapes[0] == shapes[1] == ((3, D, N - 1), (3, 4, D // 2, N // 2))


@pytest.mark.parametrize("head_dim", [1, 4])
def test_chunks_with_states_are_the_whole(head_dim):
    mixer = layer(head_dim)
    x = torch.randn(2, 19, D, dtype=torch.float64)
    state, parts = START, []
    for chunk in x.split([1, 1, 10, 7], dim=1):
        part, state = mixer(chunk, state=state)
        parts.append(part)
    assert_close(torch.cat(parts, dim=1), mixer(x)[0])


def test_float32_weights_forget_as_slowly_as_float64_ones():
    """The logarithm of a bilinear pole near 1, taken in float32, would be wrong by 1e-4 of itself or more."""
    torch.manual_seed(0)
    ssm = DiagonalSSM(2, initial_poles("lin", 4), discretisation="bilinear", step_min=1e-4, step_max=1e-3)
    single = modal_filter(*ssm.modes(), 50_000)
    double = modal_filter(*ssm.double().modes(), 50_000)
    assert_close(single.double()[:, 40_000:], double[:, 40_000:], tolerance=1e-3)


def test_slow_parameters_are_the_published_ones():
    model = build_model(
        ModelConfig(arch="lm", d_model=8, n_layer=1, pattern=("h3",)), seed=0, params="fp32", device=torch.device("cpu")
    )
    names = [name for name, _ in model.named_parameters()]
    found = group_settings(names, OptimSection(lr=4e-3, weight_decay=0.1), model.rules)
    slow = {name.removeprefix("blocks.0.mixer.") for name, setting in found.items() if setting == (0.0, 0.25)}
    assert slow == {"shift.B", "ssm.log_step", "ssm.log_decay", "ssm.frequency", "ssm.B"}
    assert found["blocks.0.mixer.ssm.C"] == found["blocks.0.mixer.shift.C"] == (0.1, 1.0)
    assert group_settings(names, OptimSection(lr=6e-4), model.rules)["blocks.0.mixer.ssm.B"] == (0.0, 1.0)


def test_projections_begin_as_published():
    config = ModelConfig(arch="lm", d_model=64, n_layer=8, pattern=("h3",))
    model = build_model(config, seed=0, params="fp32", device=torch.device("cpu"))
    for layer in (model.blocks[0].mixer.out_proj, model.blocks[0].mixer.in_proj):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_state": 5}, "d_state must be even .* got 5"),
        ({"step_min": 0.2}, r"step_min must not be above step_max; got 0\.2 > 0\.1"),
        ({"init": "hippo"}, "lin"),
        ({"head_dims": 2}, "head_dims"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        H3Config(**settings)


def test_heads_must_fit_the_width():
    with pytest.raises(ValueError, match="head_dim must divide d_model = 4; got 3"):
        H3(H3Config(head_dim=3), Place(4, 8))
