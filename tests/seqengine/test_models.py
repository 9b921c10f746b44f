"""What every language model promises, of one mixer or of all: whole = chunks = token by token = parts over ranks, and more."""

import copy
from functools import cache

import pytest
import torch

from seqengine.config.model import ModelConfig
from seqengine.mixers.mixer import START
from seqengine.mixers.registry import MIXERS
from seqengine.model import build_model
from seqengine.parallel.context import SequenceContext
from tests.ranks import run_ranks
from tests.seqengine.mixers.tiny import MAX_LEN, SETTINGS, D
from tests.tolerances import assert_close

TOLERANCE = 1e-10
T = 20
BIDIRECTIONAL = sorted(name for name, kind in MIXERS.items() if kind.make.is_bidirectional)
CAUSAL = sorted(set(MIXERS) - set(BIDIRECTIONAL))
VARIANTS = {
    "all": {"pattern": tuple(sorted(MIXERS))},
    "post-norm": {"norm_place": "post"},
    "swiglu": {"mlp": "swiglu", "mlp_bias": False, "d_inner": 12},
    "geglu": {"mlp": "geglu"},
    "evo2": {"mlp": "evo2", "norm": "rms_outer"},
    "no-mlp": {"mlp": "none"},
    "rms": {"norm": "rms"},
    "untied": {"tied_head": False},
}
"""Models of another build; of a hybrid of three if nothing else is said."""
CLASSIFIERS = {f"classes-{how}": {"num_classes": 3, "pooling": how} for how in ("mean", "last", "first")}
MASKED = {f"masked-{name}": {"pattern": (name,), "causal": False} for name in BIDIRECTIONAL}
CAUSAL_MODELS = {name: {"pattern": (name,)} for name in MIXERS} | VARIANTS
MODELS = CAUSAL_MODELS | CLASSIFIERS | MASKED
each_causal = pytest.mark.parametrize("name", CAUSAL_MODELS)
each_model = pytest.mark.parametrize("name", MODELS)


def config_of(name):
    keys = {"pattern": ("hyena", "gla", "attention")} | MODELS[name]
    depth = max(2, len(keys["pattern"]))
    return ModelConfig(
        arch="lm", d_model=D, n_layer=depth, max_len=MAX_LEN, mixers=SETTINGS, embed_dropout=0.0, vocab_size=12, **keys
    )


def make(name, seed=0):
    """With weights larger than initial ones, so that every path counts."""
    model = build_model(config_of(name), seed=seed, params="fp64", device=torch.device("cpu"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def tokens(B=3, length=T, seed=0):
    return torch.randint(7, 12, (B, length), generator=torch.Generator().manual_seed(seed))


def pooling_mask():
    """Padding on the right, on the left, and in between."""
    mask = torch.ones(3, T, dtype=torch.bool)
    mask[0, 14:], mask[1, :9], mask[2, 5:12] = False, False, False
    return mask


def batch(name):
    """(ids, labels, mask) for the objective of the model: next token, masked tokens, or classes."""
    ids = tokens()
    if name in CLASSIFIERS:
        return ids, torch.tensor([2, 0, 1]), pooling_mask()
    if name in MASKED:
        hidden = torch.rand(3, T, generator=torch.Generator().manual_seed(4)) < 0.3
        return torch.where(hidden, 3, ids), torch.where(hidden, ids, -100), None
    return ids, torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1), None


def loss_and_gradients(model, name, ctx=None):
    ids, labels, mask = batch(name)
    if ctx is not None:
        ids, mask = ctx.split(ids, 1), None if mask is None else ctx.split(mask, 1)
        labels = labels if name in CLASSIFIERS else ctx.split(labels, 1)
    nats, count = model.loss(ids, labels, ctx=ctx, mask=mask)
    nats.backward()
    return float(nats.detach()), int(count), {key: p.grad for key, p in model.named_parameters()}


@cache
def whole(name):
    return loss_and_gradients(make(name), name)


@each_model
def test_every_parameter_takes_part_in_the_loss(name):
    nats, count, gradients = whole(name)
    assert nats > 0
    assert count == {True: 3}.get(name in CLASSIFIERS, int((batch(name)[1] != -100).sum()))
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert bool(torch.isfinite(gradient).all()), key


@each_causal
@pytest.mark.parametrize("cuts", [[1] * T, [7, 1, 12]], ids=str)
def test_chunks_with_states_are_the_whole(name, cuts):
    model, ids = make(name).eval(), tokens(2)
    with torch.no_grad():
        expected, state, logits = model(ids), START, []
        for chunk in ids.split(cuts, dim=1):
            out, state = model.step(chunk, state)
            logits.append(out)
    assert_close(torch.cat(logits, dim=1), expected, tolerance=TOLERANCE)


def _on_rank(group, bounds):
    ctx = SequenceContext(group, group.rank(), bounds)
    return {name: loss_and_gradients(make(name), name, ctx) for name in MODELS}


@pytest.mark.parametrize("bounds", [(0, 9, T), (0, 1, 12, T)], ids=str)
def test_loss_and_every_gradient_over_ranks_are_those_of_one_process(bounds):
    results = run_ranks(len(bounds) - 1, _on_rank, bounds)
    for name in MODELS:
        nats, count, gradients = whole(name)
        parts = [r[name] for r in results]
        assert sum(part[0] for part in parts) == pytest.approx(nats, rel=TOLERANCE), name
        assert sum(part[1] for part in parts) == count, name
        for key, expected in gradients.items():
            found = [part[2][key] for part in parts if part[2][key] is not None]
            assert_close(sum(found), expected, f"{name}: {key}", TOLERANCE)


def _class_logits(group):
    ctx = SequenceContext.even(group, T)
    ids, mask = ctx.split(tokens(), 1), ctx.split(pooling_mask(), 1)
    return {name: make(name)(ids, ctx=ctx, mask=mask).detach() for name in CLASSIFIERS}


def test_every_rank_has_the_logits_of_all_sequences():
    for found in run_ranks(2, _class_logits):
        for name in CLASSIFIERS:
            assert_close(found[name], make(name)(tokens(), mask=pooling_mask()), name, TOLERANCE)


def test_pooling_takes_the_tokens_that_the_mask_keeps():
    mask = pooling_mask()
    for name in CLASSIFIERS:
        model, ids = make(name), tokens()
        hidden, rows = model.hidden(ids), []
        for b in range(3):
            kept = hidden[b][mask[b]]
            rows.append({"mean": kept.mean(dim=0), "last": kept[-1], "first": kept[0]}[name.removeprefix("classes-")])
        assert_close(model(ids, mask=mask), model.head(torch.stack(rows)), name)
        assert_close(model(ids), model(ids, mask=torch.ones_like(mask)), name)


@pytest.mark.parametrize("name", MASKED)
def test_without_causality_every_token_counts_for_every_other(name):
    model, ids = make(name).eval(), tokens(1)
    other = ids.clone()
    other[0, -1] = 7 + (other[0, -1] - 6) % 5
    with torch.no_grad():
        difference = (model(ids) - model(other)).abs().amax(dim=2)[0]
    assert float(difference.min()) > 1e-9


@each_model
def test_saved_weights_are_the_model(name, tmp_path):
    model, other, ids = make(name).eval(), make(name, seed=5).eval(), tokens(2)
    torch.save(model.state_dict(), tmp_path / "weights")
    with torch.no_grad():
        assert not torch.equal(model(ids), other(ids))
        other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
        assert torch.equal(model(ids), other(ids))
        assert torch.equal(copy.deepcopy(model)(ids), model(ids))


@pytest.mark.parametrize("name", ["all", "post-norm", "swiglu", "untied", "classes-last", *MASKED])
def test_compiled_is_eager(name):
    model, (ids, labels, mask) = make(name), batch(name)
    loss = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    nats, _ = loss(ids, labels, mask=mask)
    nats.backward()
    expected, _, gradients = whole(name)
    assert float(nats.detach()) == pytest.approx(expected, rel=TOLERANCE)
    for key, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[key], key, TOLERANCE)
    torch._dynamo.reset()


def test_the_head_is_the_embedding_unless_it_has_its_own():
    tied, untied = make("post-norm"), make("untied")
    assert tied.head_weight is tied.embedding.weight
    assert untied.head_weight is untied.head.weight
    assert untied.head_weight.shape == untied.embedding.weight.shape == (16, D)
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"head.weight"}


def test_layers_are_the_pattern_written_out():
    keys = {"arch": "lm", "d_model": D, "max_len": MAX_LEN, "mixers": SETTINGS}
    groups = [{"mixer": "gla", "repeat": 2}, {"mixer": "attention"}]
    by_layers = ModelConfig(layers=groups, **keys)
    by_pattern = ModelConfig(pattern=("gla", "gla", "attention"), n_layer=3, **keys)
    assert by_layers.mixer_names == by_pattern.mixer_names == ("gla", "gla", "attention")
    assert by_layers.n_layer == 3
    a, b = (build_model(c, seed=0, params="fp64", device=torch.device("cpu")).eval() for c in (by_layers, by_pattern))
    assert torch.equal(a(tokens(1)), b(tokens(1)))


BOUNDED = {"hyena", "long_conv", "sgconv"}


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_only_filters_that_end_at_max_len_bound_a_model(name):
    model, ids = make(name).eval(), tokens(1, MAX_LEN + 9)
    assert model.is_bounded == (name in BOUNDED)
    with torch.no_grad():
        if name in BOUNDED:
            with pytest.raises(ValueError, match=rf"at most max_len = {MAX_LEN} tokens; got {MAX_LEN + 9}"):
                model(ids)
            return
        expected, state, logits = model(ids), START, []
        for chunk in ids.split(MAX_LEN - 5, dim=1):
            out, state = model.step(chunk, state)
            logits.append(out)
    assert_close(torch.cat(logits, dim=1), expected, tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pattern": ("hyna",)}, "model.pattern: unknown mixer 'hyna'; did you mean 'hyena'"),
        ({"pattern": ("zzz",)}, "unknown mixer 'zzz'; there are: .*attention.*gla.*hyena"),
        ({"layers": [{"mixer": "glaa"}]}, "model.layers: unknown mixer 'glaa'; did you mean 'gla'"),
        (
            {"pattern": ("gla", "hyena"), "n_layer": 3},
            "n_layer = 3 must be a multiple of the 2 mixers of model.pattern",
        ),
        ({"pattern": ()}, "must be a multiple of the 0 mixers"),
        ({"pattern": ("gla",), "layers": [{"mixer": "gla"}]}, "model.layers and model.pattern exclude each other"),
        ({"layers": [{"mixer": "gla", "repeat": 3}], "n_layer": 2}, "model.layers has 3 layers, model.n_layer = 2"),
        ({"pattern": ("gla",), "order": 3}, "model.order belongs to model.arch = 'hyenadna'"),
        ({"arch": "hyenadna", "tied_head": True, "pattern": ("gla",)}, "model.pattern belongs to model.arch = 'lm'"),
        *(({"pattern": (n,), "causal": False}, f"model.causal = false: '{n}' is causal by nature") for n in CAUSAL),
    ],
    ids=str,
)
def test_a_config_says_what_is_wrong(keys, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**({"arch": "lm", "d_model": D} | keys))


@pytest.mark.parametrize("name", ["attention", "gla", "linear_attention", "retention", "slstm"])
def test_heads_that_do_not_divide_the_width_are_named(name):
    keys = {"pattern": (name,), "mixers": {name: {"num_heads": 3}}}
    config = ModelConfig(arch="lm", d_model=D, n_layer=1, **keys)
    with pytest.raises(ValueError, match=rf"model.mixers.{name}.*num_heads = 3"):
        build_model(config, seed=0, params="fp32", device=torch.device("cpu"))
