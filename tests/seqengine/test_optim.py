"""Parameter groups by name, one or two optimisers as one, clipping, the z-loss; sharded training as that of one process."""

import pytest
import torch
from pydantic import ValidationError

from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimGroup, OptimSection
from seqengine.ema import Ema
from seqengine.errors import InputError
from seqengine.model import LanguageModel, build_model
from seqengine.muon import Muon
from seqengine.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    group_settings,
    muon_names,
    set_learning_rate,
)
from seqengine.parallel.mesh import Mesh
from seqengine.parallel.sharding import fully_shard_model
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CPU = torch.device("cpu")
MODEL = LanguageModel(ModelConfig(d_model=8, n_layer=1, max_len=16))
NAMES = [name for name, _ in MODEL.named_parameters()]


def test_only_matrices_that_mix_channels_are_decayed_by_default():
    settings = group_settings(NAMES, OptimSection(weight_decay=0.1))
    decayed = {name.split(".", 2)[-1] for name, (decay, _) in settings.items() if decay > 0}
    assert decayed == {"mixer.in_proj.weight", "mixer.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def test_first_group_that_matches_wins():
    groups = (
        OptimGroup(match="*.filter.*", weight_decay=0.3, lr_scale=0.5),
        OptimGroup(match="*frequency", lr_scale=9.0),
    )
    with pytest.raises(InputError, match=r"match = '\*frequency' must match a parameter that no earlier group has"):
        group_settings(NAMES, OptimSection(groups=groups))
    settings = group_settings(NAMES, OptimSection(groups=groups[::-1]))
    assert settings["blocks.0.mixer.filter.frequency"] == (0.0, 9.0)
    assert settings["blocks.0.mixer.filter.output.weight"] == (0.3, 0.5)
    assert settings["norm.weight"] == (0.0, 1.0)


def test_every_pattern_that_matches_nothing_is_named():
    section = OptimSection(groups=(OptimGroup(match="*.fliter.*"), OptimGroup(match="*.attention.*")))
    with pytest.raises(InputError) as raised:
        build_optimizer(MODEL, section)
    assert ["fliter" in p or "attention" in p for p in raised.value.problems] == [True, True]


def test_groups_get_their_share_of_the_rate_and_every_parameter_is_in_one():
    section = OptimSection(lr=1.0, groups=(OptimGroup(match="*.filter.*", lr_scale=0.25),))
    optimizer = build_optimizer(MODEL, section)
    set_learning_rate(optimizer, 0.8)
    assert {g["lr"] for g in optimizer.param_groups} == {0.8, 0.2}
    grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in MODEL.parameters())
    assert [type(one) for one in optimizer.each] == [torch.optim.AdamW]
    assert all(g["fused"] for g in optimizer.param_groups)


def test_clipping_scales_to_the_limit_only_when_above_it():
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert float(gradient_norm(model)) == 5.0
    clip_gradients(model, 5.0, 10.0)
    clip_gradients(model, 5.0, 0.0)
    assert float(gradient_norm(model)) == 5.0
    clip_gradients(model, 5.0, 1.0)
    assert float(gradient_norm(model)) == pytest.approx(1.0)
    assert torch.allclose(model.bias.grad, torch.tensor([0.8]))


def test_muon_takes_its_matrices_and_adamw_the_rest_at_their_own_rates():
    groups = (
        OptimGroup(match="*.fc1.weight", lr_scale=0.5, weight_decay=0.2),
        OptimGroup(match="*norm*", lr_scale=2.0),
    )
    section = OptimSection(name="muon", lr=0.01, muon_lr=0.02, muon_momentum=0.9, muon_ns_steps=3, groups=groups)
    optimizer = build_optimizer(MODEL, section)
    muon, adamw = optimizer.each
    assert (type(muon), type(adamw)) == (Muon, torch.optim.AdamW)
    by_id = {id(p): name for name, p in MODEL.named_parameters()}
    found = {by_id[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == set(NAMES)
    assert {by_id[id(p)] for g in muon.param_groups for p in g["params"]} == set(muon_names(MODEL))
    set_learning_rate(optimizer, 0.005)
    prefix = "blocks.0"
    assert {(g["momentum"], g["num_steps"]) for g in muon.param_groups} == {(0.9, 3)}
    rates = {
        f"{prefix}.mlp.fc2.weight": (0.01, 0.1),
        f"{prefix}.mlp.fc1.weight": (0.005, 0.2),
        f"{prefix}.norm1.weight": (0.01, 0.0),
        "embedding.weight": (0.005, 0.0),
    }
    for name, rate in rates.items():
        assert (found[name]["lr"], found[name]["weight_decay"]) == pytest.approx(rate), name


def test_two_optimisers_step_together_and_know_whose_state_is_whose():
    model = LanguageModel(ModelConfig(d_model=8, n_layer=1, max_len=16, embed_dropout=0.0))
    optimizer = build_optimizer(model, OptimSection(name="muon", lr=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(16)[None] % 12
    model.objective(ids, ids).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name, p in model.named_parameters():
        owner, state = optimizer.state_of(p)
        wanted = {"momentum_buffer"} if name in muon_names(model) else {"step", "exp_avg", "exp_avg_sq"}
        assert state.keys() == wanted
        assert owner.state[p] is state
    with pytest.raises(KeyError):
        optimizer.state_of(torch.zeros(1))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_parameters_can_be_given_by_name_and_frozen_ones_are_left_out():
    model = LanguageModel(ModelConfig(d_model=8, n_layer=1, max_len=16))
    model.embedding.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimSection(name="muon"), names=dict(model.named_parameters()))
    grouped = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert grouped == {id(p) for p in model.parameters()} - {id(model.embedding.weight)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"muon_lr": 0.1}, r"optim\.muon_lr would do nothing: it needs optim\.name = 'muon'; got 'adamw'"),
        ({"muon_ns_steps": 6}, r"optim\.muon_ns_steps would do nothing"),
        ({"name": "muon", "muon_momentum": 1.0}, "muon_momentum"),
        ({"name": "muon", "muon_ns_steps": 0}, "muon_ns_steps"),
        ({"name": "sgd"}, "name"),
        ({"ema": 1.0}, "ema"),
        ({"z_loss": -0.1}, "z_loss"),
    ],
)
def test_a_key_that_does_nothing_or_lies_outside_its_range_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        OptimSection(**settings)


def test_a_default_value_that_does_nothing_is_no_error():
    assert OptimSection(muon_momentum=0.95, ema=0.0) == OptimSection()


@pytest.mark.parametrize(("device", "how"), [("cpu", "fused"), ("meta", "foreach")])
def test_adamw_is_fused_where_that_exists(device, how):
    with torch.device(device):
        model = LanguageModel(ModelConfig(d_model=8, n_layer=1, max_len=16))
    (adamw,) = build_optimizer(model, OptimSection()).each
    assert {how} == {name for name in ("fused", "foreach") if adamw.defaults[name]}


@pytest.mark.parametrize("settings", [{}, {"name": "muon"}, {"name": "muon", "muon_precision": "bf16"}], ids=str)
def test_one_learning_rate_serves_both_optimisers(settings):
    model = build_model(
        ModelConfig(d_model=16, n_layer=1, max_len=32, embed_dropout=0.0), seed=0, params="fp32", device=CPU
    )
    optimizer = build_optimizer(model, OptimSection(lr=0.02, **settings))
    ids = torch.randint(7, 12, (8, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        found = model.objective(ids, ids.roll(-1, 1), z_loss=1e-4)
        (found.loss / found.tokens).backward()
        optimizer.step()
        losses.append(float(found.nats / found.tokens))
    assert losses[0] > 2.5
    assert losses[-1] < 1.7


@pytest.mark.parametrize("num_classes", [0, 3])
def test_objective_adds_the_z_loss_and_reports_the_nats_alone(num_classes):
    config = ModelConfig(
        arch="lm", pattern=("attention",), d_model=8, n_layer=1, num_classes=num_classes, embed_dropout=0.0
    )
    model = build_model(config, seed=0, params="fp64", device=CPU)
    ids = torch.randint(0, 12, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, -100, 1]) if num_classes else ids.where(ids % 3 > 0, torch.tensor(-100))
    found = model.objective(ids, labels, z_loss=0.01)
    nats, tokens = model.loss(ids, labels)
    z = torch.logsumexp(model(ids), dim=-1)[labels != -100]
    assert_close(found.loss, nats + 0.01 * z.square().sum())
    assert not found.nats.requires_grad
    assert torch.equal(found.nats, nats)
    assert int(found.tokens) == int(tokens) == int((labels != -100).sum())
    plain = model.objective(ids, labels)
    assert torch.equal(plain.loss, nats)
    expected = torch.autograd.grad(nats + 0.01 * z.square().sum(), list(model.parameters()))
    for a, b in zip(torch.autograd.grad(found.loss, list(model.parameters())), expected, strict=True):
        assert_close(a, b)


def train(mesh):
    """Three steps of everything on a model whose matrices do not divide evenly; some ranks have no rows of some."""
    config = ModelConfig(arch="lm", pattern=("gla",), d_model=8, d_inner=4, n_layer=1, max_len=16, embed_dropout=0.0)
    model = build_model(config, seed=3, params="fp64", device=CPU)
    fully_shard_model(model, mesh, blocks=model.blocks, methods=("objective",))
    optimizer = build_optimizer(model, OptimSection(name="muon", lr=0.02))
    ema = Ema(model, 0.9)
    norms = []
    for step in range(3):
        ids = torch.randint(0, 12, (12, 6), generator=torch.Generator().manual_seed(step))
        mine = ids.tensor_split(mesh.size)[mesh.rank]
        set_learning_rate(optimizer, 0.02 / (step + 1))
        optimizer.zero_grad()
        (model.objective(mine, mine, z_loss=0.01).loss / ids.numel()).backward()
        norms.append(float(gradient_norm(model)))
        clip_gradients(model, norms[-1], 0.5)
        assert float(gradient_norm(model)) == pytest.approx(min(norms[-1], 0.5))
        optimizer.step()
        ema.update(model, tokens_step=ids.numel())
    weights = {name: whole(p) for name, p in model.named_parameters()}
    momenta = {name: whole(optimizer.state_of(p)[1].get("momentum_buffer")) for name, p in model.named_parameters()}
    averages = {name: whole(t) for name, t in ema.tensors().items()}
    return weights | averages | {f"momentum of {k}": v for k, v in momenta.items() if v is not None}, norms


def whole(x):
    return x.full_tensor().detach() if hasattr(x, "full_tensor") else x if x is None else x.detach().clone()


def _ranks(group, num_shards):
    return train(Mesh.create(group.size(), 1, CPU, num_shards=num_shards))


@pytest.mark.parametrize(("num_ranks", "num_shards"), [(2, 2), (3, 3), (4, 2)])
def test_sharded_training_with_muon_clipping_and_averages_is_that_of_one_process(num_ranks, num_shards):
    expected, norms = train(Mesh.single(CPU))
    assert max(norms) > 0.5
    assert sum(name.startswith("momentum") for name in expected) == 5
    for found, norms_of_rank in run_ranks(num_ranks, _ranks, num_shards):
        assert found.keys() == expected.keys()
        assert norms_of_rank == pytest.approx(norms, rel=1e-10)
        for name, value in expected.items():
            assert_close(found[name], value, name, 1e-10)
