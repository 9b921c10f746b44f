"""Distillation: modal filters are found again, errors are what is stated, and decoding no longer depends on max_len."""

import pytest
import torch

from seqengine.config.model import ModelConfig
from seqengine.distill import ModalHyena, ModalLayer, distill
from seqengine.generate import generate, prefill
from seqengine.kernels.api import long_conv, modal_conv
from seqengine.mixers.hyena import FilterConfig
from seqengine.mixers.mixer import START
from seqengine.modal_fit import Modes, fit
from seqengine.model import build_model
from seqengine.parallel.context import SequenceContext
from seqengine.states import size_of
from tests.ranks import run_ranks
from tests.tolerances import assert_close

D = 8
LONG = ("hyena", "long_conv", "sgconv")
SETTINGS = {"hyena": {"order": 3, "filter": {"order": 16}}, "sgconv": {"kernel_dim": 8}, "gla": {"num_heads": 2}}


def lm(*pattern, max_len=96, seed=0, params="fp64", causal=True):
    """With filters that have moved away from their initial ones, as training moves them."""
    config = ModelConfig(
        arch="lm",
        d_model=D,
        n_layer=len(pattern),
        pattern=pattern,
        max_len=max_len,
        mixers=SETTINGS,
        embed_dropout=0.0,
        causal=causal,
    )
    model = build_model(config, seed=seed, params=params, device=torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.0 if name.endswith("frequency") else 1.5)
    return model


def tokens(B, T, seed=0):
    return torch.randint(7, 11, (B, T), generator=torch.Generator().manual_seed(seed))


def random_modes(C, N, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    decay, frequency, a, b = torch.rand(4, C, N, dtype=torch.float64, generator=generator)
    frequency = torch.zeros_like(frequency) if kind == "real" else 3 * frequency
    slow = 1e-4 if kind == "slow" else 1e-2
    return Modes(torch.complex(-slow - 0.2 * decay, frequency), torch.complex(a + 0.1, b))


@pytest.mark.parametrize("kind", ["complex", "real", "slow"])
@pytest.mark.parametrize(("N", "length"), [(1, 40), (2, 150), (4, 150), (4, 1001)])
def test_modal_filters_are_found_again(kind, N, length):
    true = random_modes(5, N, kind)
    k = true.filter(length + 1)[:, 1:]
    found = fit(k, N)
    assert_close(found.filter(length + 1)[:, 1:], k, tolerance=1e-8)
    for c in range(5):
        distance = (true.log_poles[c, :, None] - found.log_poles[c]).abs().amin(dim=1)
        weight = true.residues[c].abs()
        if kind != "real":  # several real poles may be told apart only by more digits than there are
            assert float((distance * weight).max()) < 1e-5


def test_spare_modes_do_no_harm():
    k = random_modes(3, 2, "complex").filter(121)[:, 1:]
    assert_close(fit(k, 7).filter(121)[:, 1:], k, tolerance=1e-8)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
def test_short_filters_are_fitted_and_enough_modes_are_exact(length):
    k = torch.randn(4, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    assert_close(fit(k, length + 1).filter(length + 1)[:, 1:], k, tolerance=1e-8)


def test_poles_lie_inside_of_the_unit_circle_whatever_the_filter():
    t = torch.arange(1, 201, dtype=torch.float64) / 200
    growing, line, constant = torch.exp(2 * t), t, torch.ones_like(t)
    noise = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = torch.stack([growing, line, constant, noise, torch.zeros_like(t)])
    found = fit(k, 8)
    assert float(found.log_poles.real.max()) < 0
    error = (found.filter(201)[:, 1:] - k).norm(dim=1) / k.norm(dim=1).clamp(min=1.0)
    assert (error[[0, 1, 2, 4]] < 1e-6).all()
    assert 0.1 < float(error[3]) < 1.0


def test_blocks_of_channels_change_nothing(monkeypatch):
    k = torch.stack([lm("hyena", seed=s).blocks[0].mixer.filter_skip for s in range(40)]).detach()[:, :12]
    whole = fit(k, 3).filter(13)
    monkeypatch.setattr("seqengine.modal_fit.BLOCK_NUMBERS", 300)
    assert_close(fit(k, 3).filter(13), whole, tolerance=1e-8)


def tap_by_tap(filters, length):
    """The definition, lag by lag."""
    log_poles, residues = (x.detach().to(torch.complex128) for x in filters.modes(slice(None)))
    return torch.stack([(residues * torch.exp(log_poles * s)).sum(dim=1).real for s in range(length)], dim=1)


def filters_of(mixer, max_len):
    """(taps [C, max_len], skips [C]) of a mixer, and of what it became."""
    if hasattr(mixer, "filter_skip"):
        return mixer.filter.taps(mixer.filter.hidden(max_len), slice(0, 2 * D)).detach(), mixer.filter_skip.detach()
    return mixer.filter(max_len, SequenceContext.single(max_len))(slice(0, D)).detach(), mixer.skip.detach()


@pytest.mark.parametrize("params", ["fp64", "fp32"])
def test_stated_errors_are_those_of_the_filters_and_bound_the_outputs(params):
    model = lm(*LONG, "gla", params=params)
    distilled, report = distill(model, order=5)
    assert [(f.layer, f.mixer, f.convolution) for f in report.filters] == [
        (0, "hyena", 0), (0, "hyena", 1), (1, "long_conv", 0), (2, "sgconv", 0),
    ]  # fmt: skip
    generator, row = torch.Generator().manual_seed(3), 0
    for layer in range(3):
        old, new = model.blocks[layer].mixer, distilled.blocks[layer].mixer
        k, skip = (x.double() for x in filters_of(old, 96))
        found = tap_by_tap(new.filter, 96)
        new_skip = (new.filter_skip if layer == 0 else new.skip).detach().double()
        impulse = torch.zeros(96, dtype=torch.float64)
        impulse[0] = 1.0
        difference = (found + new_skip[:, None] * impulse) - (k + skip[:, None] * impulse)
        rounding = 1e-15 if params == "fp64" else 1e-7
        summands = 1 + new_skip.abs() + new.filter.modes(slice(None))[1].detach().abs().sum(dim=1)
        assert bool((difference[:, 0].abs() <= rounding * summands).all())
        u = torch.rand(2, k.shape[0], 96, dtype=torch.float64, generator=generator) * 2 - 1
        u[0] = difference.flip(1).sign()  # the worst there is: attains the bound
        exact = long_conv(u, k, skip=skip)[0]
        got = modal_conv(u, *(x.to(torch.complex128) for x in new.filter.modes(slice(None))), skip=new_skip)[0]
        error = (got - exact).abs().amax(dim=2)
        for convolution in range(2 if layer == 0 else 1):
            stated, mine = report.filters[row], slice(convolution * D, (convolution + 1) * D)
            row += 1
            assert (stated.order, stated.length) == (5, 96)
            relative = difference[mine, 1:].norm(dim=1) / k[mine, 1:].norm(dim=1)
            assert_close(stated.relative_l2, relative, tolerance=1e-6)
            assert_close(stated.largest_tap, difference[mine].abs().amax(dim=1), tolerance=1e-6)
            assert_close(stated.sum_abs, difference[mine].abs().sum(dim=1), tolerance=1e-6)
            assert bool((error[:, mine] <= stated.sum_abs + 1e-13 * summands[mine]).all())
            assert_close(error[0, mine], stated.sum_abs, tolerance=1e-6)
    assert report.relative_l2 == max(float(f.relative_l2.max()) for f in report.filters)
    assert "layer 2 (sgconv), convolution 0: 5 modes for 96 taps; errors at most: " in report.describe()


@pytest.mark.parametrize(("params", "tolerance"), [("fp64", 1e-3), ("fp64", 1e-6), ("fp32", 1e-3)])
def test_tolerance_takes_the_smallest_order_that_reaches_it(params, tolerance):
    model = lm("hyena", max_len=200, params=params)
    distilled, report = distill(model, tolerance=tolerance)
    order = report.filters[0].order
    assert report.relative_l2 <= tolerance
    assert 1 < order < 40
    assert distilled.blocks[0].mixer.filter.frequency.shape == (2 * D, order)
    assert distill(model, order=order - 1)[1].relative_l2 > tolerance / 2
    with pytest.raises(ValueError, match=rf"layer 0 \(hyena\) must reach tolerance.* max_order = {order - 1} modes"):
        distill(model, tolerance=tolerance, max_order=order - 1)


def test_a_well_distilled_model_tells_the_logits_of_the_model():
    model, ids = lm("hyena", "gla", "hyena", max_len=200).eval(), tokens(2, 200)
    distilled, report = distill(model, tolerance=1e-7)
    assert report.relative_l2 <= 1e-7
    with torch.no_grad():
        assert_close(distilled(ids), model(ids), tolerance=1e-6)


def _on_rank(group):
    ctx = SequenceContext(group, group.rank(), (0, 9, 40)[: group.size() + 1])
    distilled, _ = distill(lm(*LONG), order=3)
    ids = ctx.split(tokens(2, 40), 1)
    nats, _ = distilled.loss(ids, ids, ctx=ctx)
    nats.backward()
    return float(nats.detach()), {name: p.grad for name, p in distilled.named_parameters()}


def test_distilled_mixers_keep_the_contract():
    distilled, _ = distill(lm(*LONG), order=3)
    kinds = [type(block.mixer) for block in distilled.blocks]
    assert kinds == [ModalHyena, ModalLayer, ModalLayer]
    ids = tokens(2, 40)
    nats, _ = distilled.loss(ids, ids)
    nats.backward()
    for cuts in ([1] * 40, [7, 33], [39, 1]):
        state, logits = START, []
        with torch.no_grad():
            for chunk in ids.split(cuts, dim=1):
                out, state = distilled.step(chunk, state)
                logits.append(out)
            assert_close(torch.cat(logits, dim=1), distilled(ids), tolerance=1e-10)
    results = run_ranks(2, _on_rank)
    assert sum(r[0] for r in results) == pytest.approx(float(nats.detach()), rel=1e-10)
    for name, p in distilled.named_parameters():
        assert p.grad is not None, name
        assert_close(sum(r[1][name] for r in results), p.grad, name, 1e-10)


def test_the_model_itself_and_its_mode_stay():
    model = lm("hyena").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    distilled, _ = distill(model, order=2)
    assert distilled.training
    assert not distill(model.eval(), order=2)[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(model.state_dict()) == set(before)
    other, _ = distill(lm("hyena", seed=4), order=2)
    other.load_state_dict(distilled.state_dict())
    assert torch.equal(other.eval()(tokens(1, 20)), distilled.eval()(tokens(1, 20)))


def test_generation_goes_on_and_a_token_costs_the_same_whatever_max_len():
    bytes_of, prompts = {}, list(tokens(2, 11))
    for max_len in (64, 512):
        model = lm(*LONG, max_len=max_len)
        distilled, _ = distill(model, order=4)
        for m in (model, distilled):
            written = generate(m, prompts, max_new_tokens=8, chunk_tokens=4)
            assert [len(w) for w in written] == [8, 8]
            with torch.no_grad():
                bytes_of[m is distilled, max_len] = sum(size_of(prefill(m, prompts, 4)[1]))
    assert bytes_of[True, 64] == bytes_of[True, 512]
    assert bytes_of[True, 512] < bytes_of[False, 512] / 20
    short = 2 * 4 * D * 2 * 8
    assert bytes_of[True, 64] == short + 2 * 4 * D * 4 * 16  # two samples, four convolutions, four complex modes


def test_distilled_models_stop_where_the_errors_stop_being_known():
    distilled, _ = distill(lm("hyena", max_len=32), order=4)
    with pytest.raises(ValueError, match="filters reach over 32"):
        generate(distilled, list(tokens(1, 30)), max_new_tokens=3)


def test_filters_of_one_tap_and_filters_of_zeros():
    single, report = distill(lm("hyena", max_len=1), order=2)
    assert report.relative_l2 == 0.0
    model = lm("hyena", max_len=1).eval()
    assert_close(single.eval()(tokens(2, 1)), model(tokens(2, 1)), tolerance=1e-12)
    silent = lm("hyena", max_len=30)
    torch.nn.init.zeros_(silent.blocks[0].mixer.filter.output.weight)
    assert distill(silent, tolerance=1e-3)[1].relative_l2 == 0.0


def test_bf16_autocast_is_near_float32():
    distilled, _ = distill(lm(*LONG, params="fp32").eval(), order=4)
    with torch.no_grad():
        exact = distilled(tokens(2, 64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = distilled(tokens(2, 64))
    assert float((rounded - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(
    ("pattern", "arguments", "message"),
    [
        (("gla",), {"order": 4}, "must have filters of max_len taps; its mixers have none: gla"),
        (LONG, {}, "give either order or tolerance"),
        (LONG, {"order": 4, "tolerance": 1e-3}, "give either order or tolerance"),
        (LONG, {"order": 0}, "order and max_order must be at least 1"),
        (LONG, {"tolerance": 0.0}, "tolerance above 0"),
        (LONG, {"tolerance": float("nan")}, "tolerance above 0"),
        (("sgconv",), {"tolerance": 1e-9, "max_order": 2}, r"layer 0 \(sgconv\) must reach tolerance 1e-09"),
    ],
    ids=str,
)
def test_says_what_is_wrong(pattern, arguments, message):
    with pytest.raises(ValueError, match=message):
        distill(lm(*pattern), **arguments)


def test_hyenadna_is_distilled_too():
    config = ModelConfig(d_model=8, n_layer=2, max_len=126, filter=FilterConfig(order=16), embed_dropout=0.0)
    model = build_model(config, seed=0, params="fp32", device=torch.device("cpu")).eval()
    distilled, report = distill(model, tolerance=1e-4)
    assert [f.length for f in report.filters] == [128, 128]
    with torch.no_grad():
        assert_close(distilled(tokens(2, 100)), model(tokens(2, 100)), tolerance=1e-4)


def test_a_model_that_sees_what_follows_is_refused():
    with pytest.raises(ValueError, match="the model must be causal"):
        distill(lm("hyena", causal=False), order=2)
