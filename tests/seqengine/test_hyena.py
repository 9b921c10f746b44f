"""The Hyena mixer and the language model: against the published formulas written out, over ranks, and chunk by chunk."""

import math

import pytest
import torch

from seqengine.config.model import ModelConfig
from seqengine.mixers.hyena import FilterConfig, Hyena, HyenaConfig, ImplicitFilter, positional_features
from seqengine.mixers.mixer import START, Place
from seqengine.model import LanguageModel, build_model
from seqengine.parallel.api import SequenceContext
from tests.ranks import run_ranks
from tests.tolerances import assert_close

SMALL = ModelConfig(d_model=6, n_layer=2, max_len=20, order=3, filter=FilterConfig(order=8), embed_dropout=0.0)


def model(config=SMALL, seed=0):
    """Weights larger than at initialisation, so that every path of the gradient matters."""
    built = build_model(config, seed=seed, params="fp64", device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return built


def tokens(B, T, seed=0):
    return torch.randint(7, 11, (B, T), generator=torch.Generator().manual_seed(seed))


def test_positional_features_are_time_and_a_fourier_basis():
    z = positional_features(10, 5)
    for i in range(10):
        angle = 2 * math.pi * i / 10
        expected = [i / 9, math.cos(1e-4 * angle), math.cos(angle), -math.sin(1e-4 * angle), -math.sin(angle)]
        assert z[i].tolist() == pytest.approx(expected, abs=1e-12)


def test_filter_is_a_sine_network_times_an_exponential_window():
    config = FilterConfig(order=8)
    filter = ImplicitFilter(3, 12, config).double()
    filter.compute_features()
    h = filter.z
    for layer in filter.hidden_layers:
        h = torch.sin(filter.frequency * (h @ layer.weight.T + layer.bias))
    k = (h @ filter.output.weight.T).T
    slowest, fastest = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
    for c, delta in enumerate(torch.linspace(slowest, fastest, 3, dtype=torch.float64).tolist()):
        window = torch.exp(-torch.linspace(0, 1, 12, dtype=torch.float64) * abs(delta)) + 0.05
        assert_close(filter.taps(filter.hidden(12), slice(c, c + 1))[0], k[c] * window)
    assert_close(filter.taps(filter.hidden(5), slice(0, 3)), filter.taps(filter.hidden(12), slice(0, 3))[:, :5])


def test_filter_refuses_more_taps_than_it_was_made_for():
    with pytest.raises(ValueError, match=r"at most l_max=12 taps; got 13"):
        ImplicitFilter(3, 12, FilterConfig()).hidden(13)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_operator_is_gates_and_long_convolutions(order):
    torch.manual_seed(0)
    mixer = Hyena(HyenaConfig(order=order, filter=FilterConfig(order=8)), Place(4, 16)).double()
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    y, state = mixer(x)
    u = (x @ mixer.in_proj.weight.T + mixer.in_proj.bias).transpose(1, 2)
    conv1d = torch.nn.functional.conv1d(
        u, mixer.short_filter_weight.flip(1)[:, None], mixer.short_filter_bias, padding=2, groups=u.shape[1]
    )[..., :11]
    *gates, v = conv1d.split(4, dim=1)
    k = mixer.filter.taps(mixer.filter.hidden(11), slice(0, 4 * (order - 1)))
    for o, gate in enumerate(reversed(gates[1:])):
        v = v * gate
        mixed = torch.zeros_like(v)
        for t in range(11):
            for s in range(t + 1):
                mixed[:, :, t] += k[4 * o : 4 * o + 4, s] * v[:, :, t - s]
        v = mixed + mixer.filter_skip[4 * o : 4 * o + 4, None] * v
    expected = (v * gates[0]).transpose(1, 2) @ mixer.out_proj.weight.T + mixer.out_proj.bias
    assert_close(y, expected)
    assert state is None


@pytest.mark.parametrize("cuts", [[1] * 20, [7, 13], [19, 1], [5, 5, 10]], ids=str)
def test_chunks_with_states_give_the_logits_of_the_whole(cuts):
    m, ids = model(), tokens(2, 20)
    whole = m(ids)
    state, logits = START, []
    for chunk in ids.split(cuts, dim=1):
        out, state = m.step(chunk, state)
        logits.append(out)
    assert_close(torch.cat(logits, 1), whole)


def loss_and_gradients(m, ids, labels, ctx=None):
    nats, _ = m.loss(ids, labels, ctx=ctx)
    (nats / labels.numel() if ctx is None else nats / (labels.shape[0] * ctx.total_tokens)).backward()
    return float(nats.detach()), {name: p.grad for name, p in m.named_parameters()}


def _on_rank(group, config, T):
    ctx = SequenceContext.even(group, T)
    ids, labels = tokens(3, T), tokens(3, T, seed=1)
    return loss_and_gradients(model(config), ctx.split(ids, 1), ctx.split(labels, 1), ctx)


@pytest.mark.parametrize("P", [1, 2, 3, 4])
@pytest.mark.parametrize("T", [20, 17])
def test_loss_and_every_parameter_gradient_over_ranks_are_those_of_one_process(P, T):
    nats, gradients = loss_and_gradients(model(), tokens(3, T), tokens(3, T, seed=1))
    results = run_ranks(P, _on_rank, SMALL, T)
    assert_close(torch.tensor(sum(r[0] for r in results)).double(), torch.tensor(nats).double(), "nats")
    for name, expected in gradients.items():
        parts = [r[1][name] for r in results if r[1][name] is not None]
        assert_close(sum(parts), expected, name)


def _dropout_on_rank(group):
    config = SMALL.model_copy(update={"embed_dropout": 0.5, "resid_dropout": 0.3})
    ctx = SequenceContext.even(group, 18)
    m = model(config).train()
    keys = torch.tensor([11, -5, 7])
    nats, _ = m.loss(ctx.split(tokens(3, 18), 1), ctx.split(tokens(3, 18, seed=1), 1), ctx=ctx, dropout_keys=keys)
    return float(nats.detach())


def test_dropout_draws_the_same_masks_for_any_number_of_ranks():
    alone = run_ranks(1, _dropout_on_rank)[0]
    assert sum(run_ranks(3, _dropout_on_rank)) == pytest.approx(alone, rel=1e-12)
    assert model().loss(tokens(3, 18), tokens(3, 18, seed=1))[0].detach().item() != pytest.approx(alone, rel=1e-3)


def test_parameter_counts_are_the_published_ones():
    published = {
        (128, 2, 1024): 436_096,
        (256, 2, 1024): 1_641_088,
        (256, 4, 32768): 3_277_568,
        (256, 8, 160_000): 6_550_528,
    }
    for (d_model, n_layer, max_len), count in published.items():
        with torch.device("meta"):
            m = LanguageModel(ModelConfig(d_model=d_model, n_layer=n_layer, max_len=max_len))
        assert sum(p.numel() for p in m.parameters()) == count


def test_initial_weights_are_a_function_of_the_seed():
    a, b, c = (build_model(SMALL, seed=s, params="fp32", device=torch.device("cpu")).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embedding.weight"], c["embedding.weight"])
    deep = build_model(ModelConfig(d_model=256, n_layer=8), seed=0, params="fp32", device=torch.device("cpu"))
    assert float(deep.blocks[0].mlp.fc2.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.02)
    assert float(deep.blocks[0].mlp.fc1.weight.detach().std()) == pytest.approx(0.02, rel=0.02)


def test_bf16_autocast_is_near_float32():
    m = build_model(
        ModelConfig(d_model=32, max_len=128, embed_dropout=0.0), seed=0, params="fp32", device=torch.device("cpu")
    )
    ids = tokens(2, 128)
    exact, _ = m.loss(ids, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = m.loss(ids, ids)
    rounded.backward()
    assert float(rounded.detach()) == pytest.approx(float(exact.detach()), rel=5e-3)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in m.parameters())


def test_rejects_sequences_longer_than_the_model():
    m = model()
    with pytest.raises(ValueError, match=r"at most l_max = max_len \+ 2 = 22 tokens; got 23"):
        m(tokens(1, 23))
