"""`seqengine plan`: what a run needs on a machine, before it is paid for. Nothing is computed but sizes; no GPU is needed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from seqengine.config.load import load
from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.feed import micro_batch_rows
from seqengine.launch.cli_processes import num_processes
from seqengine.launch.environment import Processes
from seqengine.launch.plan_tables import show
from seqengine.launch.planning.rates import MARK, Machine, find_machine
from seqengine.launch.planning.search import Candidate, Found, candidate, misfit, reason, search, stage_layout
from seqengine.launch.planning.step import Planner, StageStep
from seqengine.launch.planning.traffic import Layout
from seqengine.launch.process import mesh_shape
from seqengine.model import LanguageModel
from seqengine.parallel.mesh import Mesh
from seqengine.stages import Stage, stages_of
from seqengine.unfilled import Unfilling

SHOWN = 10
"""Rows of a ranked table."""
GPUS_PER_NODE = 8
MOST_RANKS = 1 << 16


@dataclass(frozen=True)
class RunPlan:
    """A planned run: `chosen` on the config's mesh, or the best one found; `found` with a search."""

    config: RunConfig
    machine: Machine
    nodes: int
    gpus_per_node: int
    planner: Planner
    stages: tuple[Stage, ...]
    chosen: Candidate | None
    found: Found | None


def make_plan(
    source: str,
    overrides: Sequence[str] = (),
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    gpu: str = "h200",
    searches: bool = False,
) -> RunPlan:
    """Data files need not exist. Raises InputError for a config or a mesh that cannot work, or an unknown GPU."""
    machine = find_machine(gpu)
    config = load(source, overrides, need_data=False).config
    nodes, gpus_per_node = _machines(config, nodes, gpus_per_node)
    with Unfilling():
        model = LanguageModel(config.model)
    planner, stages = Planner(config, model, machine, exact=not searches), stages_of(config)
    if searches:
        found = search(planner, stages, nodes * gpus_per_node, gpus_per_node)
        best = found.fitting[0] if found.fitting else None
        return RunPlan(config, machine, nodes, gpus_per_node, planner, stages, best, found)
    layout = layout_of(config, nodes * gpus_per_node, gpus_per_node)
    rows = {stage.index: _micro_rows(config, stage, stage_layout(layout, stage, config)) for stage in stages}
    chosen = candidate(planner, stages, layout, rows)
    return RunPlan(config, machine, nodes, gpus_per_node, planner, stages, chosen, None)


def _machines(config: RunConfig, nodes: int | None, gpus_per_node: int | None) -> tuple[int, int]:
    for option, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if value is not None and value < 1:
            raise InputError(f"{option}: must be at least 1; got {value}.")
    if gpus_per_node is None:
        gpus_per_node = num_processes(config) if nodes is None else GPUS_PER_NODE
    ranks = (nodes or 1) * gpus_per_node
    if ranks > MOST_RANKS:
        raise InputError(f"--nodes x --gpus-per-node: at most {MOST_RANKS:,} ranks can be planned; got {ranks:,}.")
    return nodes or 1, gpus_per_node


def layout_of(config: RunConfig, ranks: int, ranks_per_node: int) -> Layout:
    """The config's mesh for so many ranks. Raises InputError if it does not fit them."""
    processes = Processes(world_size=ranks, local_world_size=min(ranks, ranks_per_node), launched=True)
    groups, shards = mesh_shape(config, processes)
    parallel = config.parallel
    return Layout(
        replicate=groups // shards,
        shard=shards,
        sequence=parallel.sequence,
        backend=parallel.backend,
        zero=parallel.zero,
        checkpoint=config.activation.checkpoint,
        ranks_per_node=ranks_per_node,
    )


def _micro_rows(config: RunConfig, stage: Stage, layout: Layout) -> int:
    """As the run would choose."""
    mesh = Mesh(0, layout.ranks, 0, layout.groups, None, None, torch.device("cpu"), num_shards=layout.shard)
    return micro_batch_rows(stage.windows_per_step // layout.groups, stage, config, mesh)


def describe(plan: RunPlan) -> dict[str, Any]:
    """Everything that a plan says, as JSON has it."""
    room, weights = plan.machine.room, plan.planner.sizes
    result: dict[str, Any] = {
        "run": plan.config.run.name,
        "machine": {**asdict(plan.machine), "rates": MARK},
        "nodes": plan.nodes,
        "gpus_per_node": plan.gpus_per_node,
        "tokens": plan.config.total_steps * plan.config.train.batch_tokens,
        "parameters": {**weights.by_kind, "total": weights.numbers},
        "stages": [
            {
                "seq_len": s.seq_len,
                "first_step": s.first_step,
                "end_step": s.end_step,
                "flops_per_token": _flops(plan, s),
            }
            for s in plan.stages
        ],
        "plan": None if plan.chosen is None else _candidate(plan.chosen, room),
    }
    if plan.chosen is not None and not plan.chosen.fits(room) and room is not None:
        result["does_not_fit"] = misfit(plan.chosen, room)
    if plan.found is not None:
        result["ranked"] = [_candidate(c, room) for c in plan.found.fitting]
        result["others"] = [_candidate(c, room) for c in plan.found.others]
        result["reason"] = reason_of(plan)
    return result


def reason_of(plan: RunPlan) -> str:
    """Why the first row is first, or what to change where nothing fits."""
    assert plan.found is not None
    room = plan.machine.room
    if plan.found.fitting:
        return reason(plan.found, room)
    assert room is not None, "without a limit everything fits"
    least = min(plan.found.others, key=lambda c: c.tightest.memory.total)
    return f"Nothing fits. The nearest is {misfit(least, room)}"


def _flops(plan: RunPlan, stage: Stage) -> dict[str, Any]:
    flops = plan.planner.flops(stage.seq_len)
    return {**asdict(flops), "forward": flops.forward}


def _candidate(found: Candidate, room: float | None) -> dict[str, Any]:
    return {
        "mesh": {"replicate": found.layout.replicate, "shard": found.layout.shard, "sequence": found.layout.sequence},
        "backend": found.layout.backend,
        "zero": found.layout.zero,
        "checkpoint": found.layout.checkpoint,
        "fits": found.fits(room),
        "mfu": found.mfu,
        "tokens_per_day": found.tokens_per_second * 86400,
        "run_seconds": found.run_seconds,
        "stages": [_step(step) for step in found.steps],
    }


def _step(step: StageStep) -> dict[str, Any]:
    return {
        "micro_batch": step.rows,
        "micro_batches": step.micro_batches,
        "memory": {**asdict(step.memory), "total": step.memory.total},
        "sent": {f.exchange: {"within_node": f.within, "between_nodes": f.across} for f in step.flows},
        "seconds": {**step.parts, "step": step.seconds},
        "bottleneck": step.bottleneck,
        "mfu": step.mfu,
    }


def print_plan(
    source: str,
    overrides: Sequence[str],
    *,
    nodes: int | None,
    gpus_per_node: int | None,
    gpu: str,
    searches: bool,
    as_json: bool,
) -> None:
    """The command."""
    plan = make_plan(source, overrides, nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu, searches=searches)
    if as_json:
        print(json.dumps(describe(plan)))
        return
    texts = [] if plan.found is None else [reason_of(plan)]
    room = plan.machine.room
    if plan.chosen is not None and room is not None and not plan.chosen.fits(room):
        texts.append(misfit(plan.chosen, room))
    head = (
        f"{plan.config.run.name} on {plan.nodes} x {plan.gpus_per_node} {plan.machine.text}, "
        f"{plan.config.total_steps:,} steps of {plan.config.train.batch_tokens:,} tokens. Rates: {MARK} ({plan.machine.name})."
    )
    show(head, plan.planner, plan.stages, plan.chosen, [] if plan.found is None else plan.found.fitting[:SHOWN], texts)
