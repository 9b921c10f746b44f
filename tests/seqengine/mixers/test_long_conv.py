"""Learned long convolutions: against the definition tap by tap, with every gradient; squashing, dropout, butterflies."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection
from seqengine.mixers.long_conv import LongConv, LongConvConfig
from seqengine.mixers.mixer import START, Place
from seqengine.model import build_model
from seqengine.optim import group_settings
from seqengine.parallel.context import SequenceContext
from tests.ranks import run_ranks
from tests.tolerances import assert_close

D, MAX_LEN = 4, 12


def make(seed=0, **settings):
    torch.manual_seed(seed)
    return LongConv(LongConvConfig(**settings), Place(D, MAX_LEN)).double()


def inputs(T, seed=1):
    return torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(mixer, x, window, threshold):
    """Taps averaged over their neighbours, zeros beyond the ends; shrunk towards zero; then lag by lag, GELU, gated unit."""
    taps, T = mixer.taps, x.shape[1]
    y = mixer.skip * x
    for lag in range(min(T, MAX_LEN)):
        near = [taps[:, s] for s in range(lag - window // 2, lag + window // 2 + 1) if 0 <= s < MAX_LEN]
        k = sum(near) / window
        k = torch.where(k > threshold, k - threshold, torch.where(k < -threshold, k + threshold, 0 * k))
        y = y + F.pad(k * x[:, : T - lag], (0, 0, lag, 0))
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    a, b = (y @ mixer.out_proj.weight.T + mixer.out_proj.bias).chunk(2, dim=-1)
    return a * torch.sigmoid(b)


def assert_same_with_gradients(mixer, x, y, expected):
    assert_close(y, expected)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    names = [name for name, _ in mixer.named_parameters() if not name.startswith("butterfly")]
    wanted = [x, *(mixer.get_parameter(name) for name in names)]
    found = torch.autograd.grad((y * weights).sum(), wanted, retain_graph=True)
    for name, a, b in zip(["x", *names], found, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        assert_close(a, b, name, 1e-10)


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("T", [1, 8, 12, 17])
def test_layer_is_smoothed_and_squashed_taps_gelu_and_gate(window, T):
    mixer, x = make(smooth=window), inputs(T).requires_grad_()
    assert_same_with_gradients(mixer, x, mixer(x)[0], written_out(mixer, x, window, 0.003))


def test_butterfly_begins_as_the_taps_themselves():
    mixer, x = make(smooth=3, parametrisation="butterfly"), inputs(9).requires_grad_()
    with torch.no_grad():
        for name, table in exact_factors(mixer.butterfly):
            mixer.butterfly.factors[name].copy_(table)
    assert_same_with_gradients(mixer, x, mixer(x)[0], written_out(mixer, x, 3, 0.003))


def exact_factors(butterfly):
    """The Fourier matrices in float64, where the module has them rounded to float32."""
    for name, factor in butterfly.factors.items():
        rows, columns = factor.shape[1:3]
        size = butterfly.factors["forward_twiddle"].shape[1] * butterfly.factors["forward_twiddle"].shape[2]
        sign, period = (1 if name.startswith("inverse") else -1), (size if name.endswith("twiddle") else rows)
        angle = torch.arange(rows, dtype=torch.float64)[:, None] * torch.arange(columns) * (2 * math.pi * sign / period)
        scale = 1 / rows if name in ("inverse_outer", "inverse_inner") else 1.0
        yield name, scale * torch.stack([angle.cos(), angle.sin()], dim=-1)[None]


def learned():
    """A butterfly away from the Fourier transform."""
    mixer = make(parametrisation="butterfly", init="random", squash=0.0005)
    with torch.no_grad():
        for factor in mixer.butterfly.factors.values():
            factor.add_(0.1 * torch.randn_like(factor))
    return mixer


def test_learned_butterfly_is_a_filter_like_any_other():
    """Causal, the same in chunks, and with gradients to every factor."""
    mixer, x = learned(), inputs(11)
    whole, _ = mixer(x)
    filter = mixer.filter(MAX_LEN, SequenceContext.single(1))(slice(0, D))
    y = mixer.skip * x
    for lag in range(11):
        y = y + F.pad(filter[:, lag] * x[:, : 11 - lag], (0, 0, lag, 0))
    assert_close(whole, F.glu(mixer.out_proj(F.gelu(y)), dim=-1))
    state, parts = START, []
    for chunk in x.split([4, 1, 6], dim=1):
        part, state = mixer(chunk, state=state)
        parts.append(part)
    assert_close(torch.cat(parts, dim=1), whole)
    gradients = torch.autograd.grad(whole.square().sum(), list(mixer.butterfly.parameters()))
    assert all(float(g.abs().max()) > 0 for g in gradients)
    unlearned = make(parametrisation="butterfly", init="random", squash=0.0005)
    assert float((unlearned(x)[0] - whole).detach().abs().max()) > 1e-6


def _learned_on_rank(group):
    ctx = SequenceContext.even(group, 11)
    mixer = learned()
    y, _ = mixer(ctx.split(inputs(11), 1), ctx=ctx)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in mixer.named_parameters()}


def test_learned_butterfly_over_ranks():
    mixer = learned()
    whole, _ = mixer(inputs(11))
    whole.square().sum().backward()
    results = run_ranks(3, _learned_on_rank)
    assert_close(torch.cat([y for y, _ in results], dim=1), whole)
    for name, parameter in mixer.named_parameters():
        parts = [gradients[name] for _, gradients in results if gradients[name] is not None]
        assert_close(sum(parts), parameter.grad, name, 1e-10)


def test_double_exponential_taps_decay_faster_in_later_channels():
    taps = []
    for init in ("double_exp", "random"):
        torch.manual_seed(7)
        taps.append(LongConv(LongConvConfig(init=init), Place(6, 40)).taps.detach())
    ratio = taps[0] / taps[1]
    for h in range(6):
        for t in range(40):
            assert float(ratio[h, t]) == pytest.approx(10 * math.exp(-(t / 40) * 3 ** (h / 6)), rel=1e-4)


def test_random_taps_are_small():
    torch.manual_seed(0)
    taps = LongConv(LongConvConfig(init="random"), Place(64, 256)).taps
    assert float(taps.detach().std()) == pytest.approx(0.002, rel=0.02)


def test_dropped_taps_are_rescaled_and_only_in_training():
    mixer = make(kernel_dropout=0.5)
    context = SequenceContext.single(MAX_LEN)
    torch.manual_seed(3)
    dropped = mixer.filter(MAX_LEN, context)(slice(0, D))
    plain = mixer.eval().filter(MAX_LEN, context)(slice(0, D))
    kept = dropped != 0
    assert 0 < int(kept.sum()) < int((plain != 0).sum())
    assert_close(dropped[kept], 2 * plain[kept])


def test_one_mask_serves_all_chunks_of_a_sequence():
    mixer, x = make(kernel_dropout=0.5), inputs(10)
    _, state = mixer(x[:, :5], state=START)
    a, _ = mixer(x[:, 5:], state=state)
    b, _ = mixer(x[:, 5:], state=state)
    assert torch.equal(a, b)


def test_taps_are_not_dropped_over_ranks():
    mixer, ctx = make(kernel_dropout=0.5), SequenceContext(None, 0, (0, 4, 8))
    with pytest.raises(ValueError, match=r"kernel_dropout must be 0 .* got 0\.5 on 2 ranks"):
        mixer(inputs(4), ctx=ctx)
    assert mixer.eval().filter(8, ctx)(slice(0, 2)).shape == (2, 8)


def test_taps_have_a_learning_rate_of_their_own():
    settings = {"long_conv": {"filter_lr": 5e-4, "parametrisation": "butterfly"}}
    config = ModelConfig.model_validate(
        {"arch": "lm", "d_model": 8, "n_layer": 1, "max_len": 16, "pattern": ["long_conv"], "mixers": settings}
    )
    model = build_model(config, seed=0, params="fp32", device=torch.device("cpu"))
    names = [name for name, _ in model.named_parameters()]
    found = group_settings(names, OptimSection(lr=1e-2), model.rules)
    slow = {name.removeprefix("blocks.0.mixer.") for name, (decay, scale) in found.items() if scale == 0.05}
    assert slow == {"taps"} | {
        name for name in LongConv(config.mixers.long_conv, Place(8, 16)).state_dict() if "bu" in name
    }
    assert all(found[f"blocks.0.mixer.{name}"][0] == 0.0 for name in slow)
    assert found["blocks.0.mixer.out_proj.weight"][1] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smooth": 4}, "smooth must be odd .* got 4"),
        ({"init": "random", "squash": 0.1}, r"squash must be at most 0\.006 .* got 0\.1"),
        ({"kernel_dropout": 1.0}, "less than 1"),
        ({"parametrisation": "monarch"}, "butterfly"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        LongConvConfig(**settings)
