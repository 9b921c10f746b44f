"""The tables of `seqengine plan` on a terminal."""

from collections.abc import Sequence
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from seqengine.launch.planning.memory import RankMemory
from seqengine.launch.planning.search import GIB, Candidate
from seqengine.launch.planning.step import Planner
from seqengine.stages import Stage

WIDTH = 132
"""Columns where there is no terminal."""


def show(
    head: str,
    planner: Planner,
    stages: Sequence[Stage],
    chosen: Candidate | None,
    ranked: Sequence[Candidate],
    texts: Sequence[str],
) -> None:
    """Print a plan: the model, the ranked meshes if there are any, and the chosen one by kind."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(head, markup=False, highlight=False)
    console.print(_parameters(planner))
    for stage in stages:
        console.print(_flops(planner, stage))
    if ranked:
        console.print(_ranked(ranked))
    for text in texts:
        console.print(text, markup=False, highlight=False)
    if chosen is not None:
        title = f"{chosen}"
        console.print(_memory(title, chosen))
        console.print(_sent(chosen))
        console.print(_time(chosen))


def amount(value: float) -> str:
    """4 figures with k, M, G, T, P."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _parameters(planner: Planner) -> Table:
    kinds = planner.sizes.by_kind
    table = _table("Parameters", *kinds, "total")
    table.columns[0].justify = "right"
    table.add_row(*(amount(n) for n in kinds.values()), amount(planner.sizes.numbers))
    return table


def _flops(planner: Planner, stage: Stage) -> Table:
    found = planner.flops(stage.seq_len)
    table = _table(f"FLOPs per token, windows of {stage.seq_len:,}", "part", "forward", "backward")
    for name, value in (
        *found.mixers.items(),
        ("mlp", found.mlp),
        ("head", found.head),
        ("embedding", found.embedding),
    ):
        table.add_row(name, amount(value), amount(2 * value))
    table.add_row("all", amount(found.forward), amount(found.backward))
    return table


def _ranked(ranked: Sequence[Candidate]) -> Table:
    table = _table(
        "Meshes (replicate x shard x sequence), the fastest first; of equals the plainest",
        "mesh", "backend", "checkpoint", "micro-batch", "GiB/rank", "step s", "tokens/day", "MFU", "most of it",
    )  # fmt: skip
    for c in ranked:
        table.add_row(
            str(c.layout),
            c.layout.name,
            c.layout.checkpoint,
            "/".join(str(s.rows) for s in c.steps),
            f"{c.tightest.memory.total / GIB:.1f}",
            f"{c.longest.seconds:.3g}",
            amount(c.tokens_per_second * 86400),
            f"{c.mfu:.1%}",
            c.longest.bottleneck,
        )
    return table


def _memory(title: str, chosen: Candidate) -> Table:
    kinds = [f.name for f in fields(RankMemory)]
    table = _table(f"GiB on a rank: {title}", "tokens a window", *kinds, "total")
    for step in chosen.steps:
        values = [getattr(step.memory, kind) / GIB for kind in kinds]
        table.add_row(f"{step.stage.seq_len:,}", *(f"{v:.3g}" for v in values), f"{step.memory.total / GIB:.4g}")
    return table


def _sent(chosen: Candidate) -> Table:
    table = _table("Bytes that a rank sends in a step", "exchange", "tokens a window", "within node", "between nodes")
    for step in chosen.steps:
        for flow in step.flows:
            table.add_row(flow.exchange, f"{step.stage.seq_len:,}", amount(flow.within), amount(flow.across))
    if not table.row_count:
        table.add_row("none: one rank", "", "0", "0")
    return table


def _time(chosen: Candidate) -> Table:
    table = _table(
        f"Time: {amount(chosen.tokens_per_second * 86400)} tokens a day, the run takes {duration(chosen.run_seconds)}",
        "part of a step", "tokens a window", "seconds", "share",
    )  # fmt: skip
    for step in chosen.steps:
        for name, seconds in step.parts.items():
            table.add_row(name, f"{step.stage.seq_len:,}", f"{seconds:.3g}", f"{seconds / step.seconds:.0%}")
        table.add_row(f"step, MFU {step.mfu:.1%}", f"{step.stage.seq_len:,}", f"{step.seconds:.4g}", "")
    return table
