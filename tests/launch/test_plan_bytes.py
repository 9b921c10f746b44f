"""The bytes of a plan: those of the ledger, for every mixer, and of a training step over gloo."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqengine.backends.fsdp2 import FullySharded
from seqengine.blocks import Block
from seqengine.config.load import load
from seqengine.config.model import ModelConfig
from seqengine.launch.planning.exchanges import exchanges
from seqengine.launch.planning.memory import count_sizes
from seqengine.launch.planning.rates import MACHINES
from seqengine.launch.planning.step import Planner, split_of
from seqengine.launch.planning.trace import trace_block
from seqengine.launch.planning.traffic import Layout, Weights, data_flows, sequence_flows
from seqengine.memory import split_context
from seqengine.mixers.registry import MIXERS
from seqengine.model import LanguageModel, build_model
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.mesh import Mesh
from tests.ranks import run_ranks

SMALL = {"ssd": {"head_dim": 8}, "gated_delta": {"head_dim": 8}}
CPU = torch.device("cpu")


def run_config(pattern, *, params="fp32", checkpoint="none", **model):
    base = load("hyena-tiny", ["data.source=synthetic"], need_data=False).config
    settings = {"d_model": 48, "max_len": 64, "n_layer": len(pattern), "mixers": SMALL} | model
    return base.model_copy(
        update={
            "model": ModelConfig(arch="lm", pattern=pattern, **settings),
            "precision": base.precision.model_copy(update={"params": params}),
            "activation": base.activation.model_copy(update={"checkpoint": checkpoint}),
        }
    )


KINDS = [(name, True) for name in MIXERS] + [
    (name, False) for name, kind in MIXERS.items() if getattr(kind.make, "is_bidirectional", False)
]


SPLITS = [("bf16", 5, 3, 2), ("fp32", 2, 0, 1)]
"""Arithmetic, ranks, rank, windows: the mixers take turns."""


@pytest.mark.parametrize(("name", "causal", "split"), [(*kind, SPLITS[i % 2]) for i, kind in enumerate(KINDS)])
def test_every_mixer_sends_the_bytes_of_its_formula(name, causal, split):
    params, ranks, rank, rows = split
    config = run_config((name,), params=params, causal=causal)
    found = trace_block(config, 0, rows, split_context(60, ranks, rank))
    sent = exchanges(Block(config.model, 0).mixer, split_of(config, 60, ranks, rank, rows, "cpu"))
    assert sum(found.sent_forward.values()) == sum(s.forward for s in sent) > 0
    assert sum(found.sent_backward.values()) == sum(s.backward for s in sent)


def step_on(group, config, rows, tokens):
    """The ledger of one forward and backward, by exchange; attention by heads is a transpose."""
    model = build_model(config.model, seed=0, params=config.precision.params, device=CPU)
    model.save_memory(config.activation.checkpoint)
    ctx = SequenceContext.even(group, tokens)
    ids = torch.zeros(rows, ctx.local_tokens, dtype=torch.int64)
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision.params == "bf16")
    with bf16:
        result = model.objective(ids, ids.clone(), ctx=ctx, dropout_keys=ids[:, 0].clone())
    result.loss.backward()
    found = Counter()
    for entry in ctx.ledger().entries:
        found["transpose" if entry.operation == "attention" else entry.operation] += entry.sent_bytes
    return dict(found)


@pytest.mark.parametrize(("ranks", "params", "checkpoint"), [(2, "fp32", "block"), (4, "bf16", "none")])
def test_a_step_of_a_hybrid_over_gloo_sends_what_the_plan_says(ranks, params, checkpoint):
    config = run_config(("hyena", "gla", "hyena_li", "attention"), params=params, checkpoint=checkpoint)
    measured = run_ranks(ranks, step_on, config, 2, 60)
    with torch.device("meta"):
        model = LanguageModel(config.model)
    for rank in range(ranks):
        planned = Counter()
        for block in model.each_block():
            for sent in exchanges(block.mixer, split_of(config, 60, ranks, rank, 2, "cpu")):
                planned[sent.exchange] += sent.forward + sent.backward
        assert measured[rank] == planned
    middle = Planner(config, model, MACHINES["cpu"]).sent(60, ranks, 2)
    layout = Layout(1, 1, ranks, "none", None, checkpoint, ranks)
    flows = {flow.exchange: flow.total for flow in sequence_flows(middle, layout, 3, MACHINES["cpu"])}
    assert flows == {name: 3 * sent_bytes for name, sent_bytes in measured[ranks // 2].items()}


def layout(replicate, shard, sequence, backend, zero=None, ranks_per_node=8):
    return Layout(replicate, shard, sequence, backend, zero, "none", ranks_per_node)


def test_weights_and_gradients_send_what_their_collectives_do():
    weights, machine = Weights(blocks=6400, rest=640, largest_block=1600, num_blocks=4), MACHINES["h200"]

    def sent(*mesh, micro_batches=3, **options):
        flows = data_flows(weights, layout(*mesh, **options), micro_batches, machine)
        return {flow.exchange: (flow.within, flow.across) for flow in flows}

    assert sent(1, 1, 1, "none") == {}
    assert sent(4, 1, 2, "ddp") == {"gradient all-reduce": (2 * 7 * 7040 // 8, 0)}
    assert sent(8, 1, 2, "none") == {"gradient all-reduce": (0, 2 * 15 * 7040 // 16)}
    # In each of 3 micro-batches blocks are gathered twice and the rest once; gradients are reduced once.
    gathers, reductions = 3 * (2 * 6400 + 640) * 7 // 8, 7040 * 7 // 8
    assert sent(1, 4, 2, "fsdp2") == {"FSDP gathers": (gathers, 0), "FSDP reductions": (reductions, 0)}
    assert sent(2, 4, 2, "fsdp2") == {
        "FSDP gathers": (gathers, 0),
        "FSDP reductions": (reductions, 0),
        "gradient all-reduce": (0, 7040 // 8),
    }
    assert sent(1, 8, 1, "deepspeed", 1) == {"ZeRO reductions": (reductions, 0), "ZeRO gathers": (reductions, 0)}
    assert sent(1, 8, 1, "deepspeed", 3)["ZeRO reductions"] == (3 * reductions, 0)


class Collectives(TorchDispatchMode):
    """Bytes of the tensors that torch's own collectives are given."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.found[func.__name__] += max(x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def fsdp_step_on(group, config, micro_batches):
    """What FSDP2 gathers and reduces in one step, over 2 copies of 2 shards."""
    mesh = Mesh.create(4, 1, CPU, num_shards=2)
    model = build_model(config.model, seed=0, params="fp32", device=CPU)
    backend, ids = FullySharded(model, config, mesh), torch.zeros(1, 32, dtype=torch.int64)
    backend.begin()
    with Collectives() as collectives:
        for i in range(micro_batches):
            last = i == micro_batches - 1
            backend.accumulate(ids, ids.clone(), 64.0, last=last, dropout_keys=ids[:, 0].clone())
        backend.finish()
    return dict(collectives.found)


def test_fsdp_gathers_and_reduces_the_bytes_of_the_formula():
    config = run_config(("hyena_se", "hyena_se"), d_model=16)
    with torch.device("meta"):
        weights = count_sizes(config, LanguageModel(config.model)).weights
    flows = data_flows(weights, layout(2, 2, 1, "fsdp2"), 3, MACHINES["cpu"])
    planned = {flow.exchange: flow.total for flow in flows}
    for found in run_ranks(4, fsdp_step_on, config, 3):
        assert planned == {
            "FSDP gathers": found["_allgather_base_.default"] // 2,  # of 2 ranks, each sends the half that it holds
            "FSDP reductions": found["_reduce_scatter_base_.default"] // 2,
            "gradient all-reduce": found["allreduce_.default"],
        }


def test_what_goes_to_all_is_divided_between_the_links():
    config = run_config(("hyena",))
    with torch.device("meta"):
        planner = Planner(config, LanguageModel(config.model), MACHINES["h200"])
    sent = planner.sent(60, 6, 1)
    flows = {
        f.exchange: f for f in sequence_flows(sent, layout(1, 1, 6, "none", ranks_per_node=2), 1, MACHINES["h200"])
    }
    assert flows["transpose"].within == flows["transpose"].total // 5
    assert flows["halo"].within == 0
    inside = {f.exchange: f for f in sequence_flows(sent, layout(1, 1, 6, "none"), 1, MACHINES["h200"])}
    assert inside["transpose"].across == inside["halo"].across == 0
    assert {n: f.total for n, f in inside.items()} == {n: f.total for n, f in flows.items()}
