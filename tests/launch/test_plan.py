"""`seqengine plan`: what is printed, the ranking and its reason, bad input, and how quickly it comes."""

import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from seqengine.config.load import load
from seqengine.flops import _mixing, _short, flops_per_token
from seqengine.launch.cli import main
from seqengine.launch.plan import describe, make_plan
from seqengine.launch.planning.flops import count_flops
from seqengine.launch.planning.rates import MACHINES, MARK
from seqengine.launch.planning.search import layouts, stage_layout
from seqengine.model import LanguageModel
from seqengine.stages import stages_of
from tests.launch.test_plan_bytes import run_config

LARGE = "configs/hyenadna-large-1m.toml"
TINY = ["hyena-tiny", "data.source=synthetic"]


def test_a_search_for_64_gpus_ranks_meshes_and_says_why(capsys):
    assert main(["plan", LARGE, "--nodes", "8", "--gpus-per-node", "8", "--gpu", "h200", "--search"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "Meshes (replicate x shard x sequence)",
        "First is 8 x 1 x 8 ddp",
        "of its step is",
        MARK,
        "tokens a day",
    ):
        assert words in out
    assert "The next that is slower" in out
    assert "transpose" in out
    assert "gradient all-reduce" in out


@pytest.mark.parametrize(
    ("config", "settings"),
    [(LARGE, ["train.batch_tokens=4096M"]), ("configs/h3-125m.toml", []), ("configs/gla-1.3b.toml", [])],
)
def test_4096_ranks_are_planned_in_five_seconds(config, settings):
    begin = time.process_time()
    plan = make_plan(config, settings, nodes=512, gpus_per_node=8, searches=True)
    assert time.process_time() - begin < 5
    assert len(plan.found.fitting) > 100
    assert all(c.layout.ranks == 4096 for c in plan.found.fitting)
    assert plan.found.fitting[0].run_seconds <= 1.01 * min(c.run_seconds for c in plan.found.fitting)


def test_a_plan_as_json_has_every_part(capsys):
    assert main(["plan", *TINY, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["machine"]["rates"] == MARK
    model = LanguageModel(make_plan(TINY[0], TINY[1:]).config.model)
    assert plan["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert sum(n for kind, n in plan["parameters"].items() if kind != "total") == plan["parameters"]["total"]
    (stage,) = plan["plan"]["stages"]
    assert stage["memory"]["total"] == sum(n for kind, n in stage["memory"].items() if kind != "total")
    parts = sum(seconds for part, seconds in stage["seconds"].items() if part != "step")
    assert stage["seconds"]["step"] == pytest.approx(parts)


def test_stages_are_planned_one_by_one():
    stages = "data.stages=[{ tokens = 100000, seq_len = 64, sequence = 1 }, { seq_len = 128 }]"
    settings = ["data.source=synthetic", "model.max_len=128", "data.seq_len=128", "train.batch_tokens=2048", stages]
    plan = make_plan("hyena-tiny", [*settings, "train.tokens=1M"], gpus_per_node=2, gpu="cpu")
    first, last = plan.chosen.steps
    assert (first.stage.seq_len, last.stage.seq_len) == (64, 128)
    assert describe(plan)["stages"][1]["seq_len"] == 128


def test_what_does_not_fit_is_told_with_what_to_change():
    settings = ["data.source=synthetic", "train.micro_batch=1", "activation.checkpoint=block"]
    plan = make_plan("striped-hyena2-7b", settings, gpus_per_node=1, gpu="a100")
    told = describe(plan)["does_not_fit"]
    assert "GiB a rank of" in told
    assert "To change: cut the moments: parallel.backend = 'fsdp2'" in told


def test_a_backend_that_the_run_cannot_have_is_not_searched():
    settings = ["data.source=synthetic", "optim.name=muon"]
    config = load("hyena-tiny", settings, need_data=False).config
    found = list(layouts(config, stages_of(config), 2, 2))
    assert {layout.backend for layout in found} == {"none", "ddp", "fsdp2"}
    assert {(layout.replicate, layout.shard, layout.sequence) for layout in found} == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


def test_stages_with_a_layout_of_their_own_keep_it_in_a_search():
    stages = "data.stages=[{ tokens = 100000, seq_len = 64, sequence = 2 }, { seq_len = 128 }]"
    settings = ["data.source=synthetic", "model.max_len=128", "data.seq_len=128", "train.batch_tokens=1024", stages]
    config = load("hyena-tiny", [*settings, "train.tokens=1M"], need_data=False).config
    found = {layout.sequence: layout for layout in layouts(config, stages_of(config), 16, 8)}
    # 8 windows of 128 tokens for 16 ranks: at least 2 ranks each; 16 of 64 tokens are over 2 ranks, 8 groups.
    assert set(found) == {2, 4, 8, 16}
    short, long = (stage_layout(found[4], stage, config) for stage in stages_of(config))
    assert (short.groups, short.sequence, long.groups, long.sequence) == (8, 2, 4, 4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((*TINY, "--gpu", "h20"), "--gpu: must be one of h200, h100, a100, cpu; got 'h20'. did you mean 'h200'?"),
        ((*TINY, "--nodes", "0"), "--nodes: must be at least 1; got 0."),
        ((*TINY, "--gpus-per-node", "0"), "--gpus-per-node: must be at least 1; got 0."),
        ((*TINY, "--nodes", "100000", "--gpus-per-node", "8"), "ranks can be planned; got 800,000"),
        ((*TINY, "parallel.sequence=3", "--gpus-per-node", "4"), "must be the number of processes; got 4"),
        ((*TINY, "model.d_model=0"), "model.d_model"),
        ((*TINY, "model.width=8"), "model.width: unknown key"),
        ((*TINY, "--gpus-per-node", "65521", "--search"), "no mesh of 65521 ranks fits"),
        (("no-such-preset",), "no-such-preset"),
    ],
)
def test_bad_input_is_told_in_words(words, told, capsys):
    assert main(["plan", *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_flops_of_linear_layers_are_those_that_torch_counts():
    config = run_config(("hyena_se", "gated_delta"), d_model=32)
    with torch.device("meta"):
        model = LanguageModel(config.model)
        ids = torch.zeros(2, 24, dtype=torch.int64)
        x = torch.zeros(48, 32)
        linear = [m for block in model.each_block() for m in block.modules() if isinstance(m, torch.nn.Linear)]
        with FlopCounterMode(display=False) as counter:
            for layer in linear:
                layer(torch.zeros(48, layer.in_features))
            x @ model.head_weight.T
    found = count_flops(model, 24)
    mixing = sum((_mixing(b.mixer, 24) + _short(b.mixer)).forward for b in model.each_block())
    assert counter.get_total_flops() == pytest.approx((found.forward - mixing) * ids.numel(), rel=1e-12)
    assert found.total == pytest.approx(flops_per_token(config.model, 24), rel=1e-12), (
        "the log's MFU is of the same count"
    )


def test_every_rate_has_a_source():
    assert all(machine.source and machine.flops_per_second("bf16") > 0 for machine in MACHINES.values())
