"""The three operators of StripedHyena 2 against their definition in loops, and their published initialisation."""

import math

import pytest
import torch

from seqengine.errors import InputError
from seqengine.mixers.hyena_li import HyenaLI, HyenaLIConfig
from seqengine.mixers.hyena_mr import HyenaMR, HyenaMRConfig
from seqengine.mixers.hyena_se import HyenaSE, HyenaSEConfig
from seqengine.mixers.mixer import Place
from tests.tolerances import assert_close

D, MAX_LEN, T = 6, 40, 17
OPERATORS = {
    "se": (HyenaSE, HyenaSEConfig(taps=7, num_groups=2)),
    "se with biases": (HyenaSE, HyenaSEConfig(taps=3, short_filter=4, short_bias=True, bias=True, out_bias=False)),
    "se with a skip": (HyenaSE, HyenaSEConfig(taps=1, num_groups=3, skip=True)),
    "mr": (HyenaMR, HyenaMRConfig(taps=9, num_groups=3)),
    "mr longer than the input": (HyenaMR, HyenaMRConfig(taps=128, decay="strong", decay_tokens=50)),
    "mr without decay": (HyenaMR, HyenaMRConfig(taps=9, decay="none", skip=False)),
    "li": (HyenaLI, HyenaLIConfig(state_size=3)),
    "li of poles": (HyenaLI, HyenaLIConfig(state_size=2, poles="log", short_bias=True)),
}


def make(name):
    torch.manual_seed(0)
    kind, config = OPERATORS[name]
    mixer = kind(config, Place(D, MAX_LEN)).double()
    for key, p in mixer.named_parameters():
        if key != "log_poles":
            torch.nn.init.normal_(p, std=0.5)
    return mixer, config


def impulse_response(mixer, config, channel, lag):
    if isinstance(mixer, HyenaLI):
        terms = []
        for n in range(config.state_size):
            pole = mixer.log_poles[channel, n] if config.poles == "log" else None
            rate = -torch.exp(mixer.p[channel, n]) * torch.exp(mixer.gamma[channel, n]) if pole is None else pole
            terms.append(mixer.residues[channel, n] * torch.exp(rate * lag))
        return torch.stack(terms).sum()
    if lag >= config.taps:
        return torch.zeros((), dtype=torch.float64)
    groups = config.num_groups or D
    group = channel // (D // groups)
    k = mixer.filter[group, lag]
    if isinstance(mixer, HyenaMR) and config.decay != "none":
        low = {"weak": -2, "normal": -1, "strong": 0}[config.decay]
        rate = 10 ** (low + (2 - low) * group / (groups - 1))
        k = k * math.exp(-rate * lag / ((config.decay_tokens or MAX_LEN) - 1))
    return k


def definition(mixer, config, x):
    u = x @ mixer.in_proj.weight.T + (mixer.in_proj.bias if config.bias else 0)
    z = torch.zeros_like(u)
    for t in range(x.shape[1]):
        past = [mixer.short_weight[:, s] * u[:, t - s] for s in range(config.short_filter) if s <= t]
        z[:, t] = torch.stack(past).sum(0) + (mixer.short_bias if config.short_bias else 0)
    post, pre, v = z[..., :D], z[..., D : 2 * D], z[..., 2 * D :]
    gated = pre * v
    k = torch.stack([torch.stack([impulse_response(mixer, config, d, s) for s in range(x.shape[1])]) for d in range(D)])
    y = torch.zeros_like(gated)
    for t in range(x.shape[1]):
        y[:, t] = torch.stack([k[:, s] * gated[:, t - s] for s in range(t + 1)]).sum(0)
        if isinstance(mixer, HyenaLI) or config.skip:
            y[:, t] = y[:, t] + mixer.skip * gated[:, t]
    return (post * y) @ mixer.out_proj.weight.T + (mixer.out_proj.bias if config.out_bias else 0)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_their_definition_with_every_gradient(name):
    mixer, config = make(name)
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x)[0], definition(mixer, config, x)
    assert_close(y, expected, tolerance=1e-10)
    weights = torch.randn_like(y)
    wanted = {"x": x, **dict(mixer.named_parameters())}
    found = torch.autograd.grad((y * weights).sum(), list(wanted.values()))
    expected = torch.autograd.grad((expected * weights).sum(), list(wanted.values()))
    for key, a, b in zip(wanted, found, expected, strict=True):
        assert_close(a, b, key, 1e-10)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_parameter_of_a_filter_is_undecayed(name):
    mixer, _ = make(name)
    decayed = {key for key, _ in mixer.named_parameters() if key not in mixer.rules and "bias" not in key}
    assert decayed == {"in_proj.weight", "out_proj.weight"}


@torch.no_grad()
def test_initial_filters_are_the_published_ones():
    torch.manual_seed(0)
    place = Place(256, 1024)
    se = HyenaSE(HyenaSEConfig(), place)
    assert float(se.filter.abs().max()) <= 3**-0.5
    assert float(se.filter.std()) == pytest.approx(1 / 3, rel=0.05)
    mr = HyenaMR(HyenaMRConfig(), place)
    assert float(mr.filter.std()) == pytest.approx(1e-5 / 32, rel=0.05)
    assert mr.window()[0, -1] == pytest.approx(math.exp(-0.01 * 127 / 1023))
    assert mr.window()[-1, -1] == pytest.approx(math.exp(-100 * 127 / 1023))
    li = HyenaLI(HyenaLIConfig(), place)
    rates = -li.log_poles_now()
    assert math.exp(-1) * 0.01 <= float(rates.min()) < float(rates.max()) <= math.exp(-1) * 0.1
    assert float(li.residues.std()) == pytest.approx(0.1 / 4, rel=0.05)


def test_filters_are_made_in_float32_whatever_the_weights_are():
    mixer = HyenaLI(HyenaLIConfig(), Place(D, MAX_LEN)).bfloat16()
    assert mixer.log_poles_now().dtype == torch.float32
    y, _ = mixer(torch.randn(1, 5, D, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    mixer = HyenaMR(HyenaMRConfig(), Place(D, MAX_LEN)).bfloat16()
    assert mixer.taps_now().dtype == torch.float32


def test_rates_that_are_the_wrong_way_round_are_named():
    with pytest.raises(ValueError, match=r"gamma_min = 0\.2 must be at most gamma_max = 0\.1"):
        HyenaLIConfig(gamma_min=0.2)


@pytest.mark.parametrize(("kind", "config"), [(HyenaSE, HyenaSEConfig), (HyenaMR, HyenaMRConfig)])
def test_groups_that_do_not_fit_are_named(kind, config):
    with pytest.raises(InputError, match=r"num_groups = 4 must divide model\.d_model = 6"):
        kind(config(num_groups=4), Place(D, MAX_LEN))
