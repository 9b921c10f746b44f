"""All meshes, backends and ways to keep activations for a number of GPUs; the best first, and why."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from seqengine.config import mesh_checks
from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.launch.planning.step import Planner, StageStep
from seqengine.launch.planning.traffic import Backend, Layout
from seqengine.stages import Stage

GIB = 2.0**30
BACKENDS: tuple[tuple[Backend, int | None], ...] = (
    ("ddp", None),
    ("none", None),
    ("fsdp2", None),
    ("deepspeed", 1),
    ("deepspeed", 2),
    ("deepspeed", 3),
)
"""Of equally fast ones the first."""
CHECKPOINTS: tuple[Literal["none", "selective", "block"], ...] = ("none", "selective", "block")
CLOSE = 0.01
"""Runs whose times differ by less are called equally fast."""


@dataclass(frozen=True)
class Candidate:
    """A run on one mesh: a step of each stage, the tokens of each stage, and whether it fits."""

    layout: Layout
    steps: tuple[StageStep, ...]
    batch_tokens: int

    @property
    def run_seconds(self) -> float:
        """All steps."""
        return sum(s.seconds * s.stage.num_steps for s in self.steps)

    @property
    def tokens_per_second(self) -> float:
        steps = sum(s.stage.num_steps for s in self.steps)
        return steps * self.batch_tokens / self.run_seconds

    @property
    def mfu(self) -> float:
        """By time."""
        weights = [s.seconds * s.stage.num_steps for s in self.steps]
        return sum(w * s.mfu for w, s in zip(weights, self.steps, strict=True)) / sum(weights)

    @property
    def tightest(self) -> StageStep:
        """The stage that needs the most memory."""
        return max(self.steps, key=lambda s: s.memory.total)

    @property
    def longest(self) -> StageStep:
        """The stage that takes the most time."""
        return max(self.steps, key=lambda s: s.seconds * s.stage.num_steps)

    def fits(self, room: float | None) -> bool:
        return room is None or self.tightest.memory.total <= room

    def __str__(self) -> str:
        rows = "/".join(str(s.rows) for s in self.steps)
        return f"{self.layout} {self.layout.name}, checkpoint {self.layout.checkpoint}, micro-batch {rows}"


@dataclass(frozen=True)
class Found:
    """What a search found: `fitting` by time, and `others`, which need more memory than there is."""

    fitting: list[Candidate]
    others: list[Candidate]


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def layouts(config: RunConfig, stages: tuple[Stage, ...], ranks: int, ranks_per_node: int) -> Iterator[Layout]:
    """Every mesh that the windows of all stages fit, with every backend that the run can have. A stage's own sequence stays."""
    shortest = min(stage.seq_len for stage in stages)
    allowed = (
        [(name, zero) for name, zero in BACKENDS if _is_possible(config, name, zero)] if ranks > 1 else [BACKENDS[1]]
    )
    for sequence in divisors(ranks):
        groups = ranks // sequence
        if sequence > shortest or any(_is_uneven(stage, config, ranks, sequence) for stage in stages):
            continue
        for shard in divisors(groups):
            for name, zero in allowed:
                is_cut = name in ("fsdp2", "deepspeed")
                if (shard > 1 and not is_cut) or (name == "deepspeed" and shard != groups):
                    continue
                if name == "fsdp2" and shard * sequence == 1:
                    continue  # nothing is cut
                for checkpoint in CHECKPOINTS:
                    if checkpoint == "selective" and config.model.mlp == "none" and config.model.arch == "lm":
                        continue
                    yield Layout(groups // shard, shard, sequence, name, zero, checkpoint, ranks_per_node)


def _is_uneven(stage: Stage, config: RunConfig, ranks: int, sequence: int) -> bool:
    """Some group of ranks would get more windows of a step than another."""
    own = sequence if stage.sequence == config.parallel.sequence else stage.sequence
    return bool(ranks % own or stage.windows_per_step % (ranks // own))


def _is_possible(config: RunConfig, backend: Backend, zero: int | None) -> bool:
    changed = {"backend": backend, "zero": zero, "replicate": "auto", "shard": "auto"}
    parallel = config.parallel.model_copy(update=changed)
    activation = config.activation.model_copy(update={"offload": False})
    return not list(mesh_checks.backend_fits(parallel, config.precision, config.optim, activation))


def stage_layout(layout: Layout, stage: Stage, config: RunConfig) -> Layout:
    """The layout of a stage that splits its windows over another number of ranks than the run: the copies stay."""
    if stage.sequence == config.parallel.sequence:
        return layout
    return replace(layout, shard=layout.part // stage.sequence, sequence=stage.sequence)


def candidate(planner: Planner, stages: tuple[Stage, ...], layout: Layout, rows: dict[int, int] | None) -> Candidate:
    """rows: of each stage's micro-batch; None: the largest that fits, or one window."""
    steps = []
    for stage in stages:
        own = stage_layout(layout, stage, planner.config)
        if rows is not None:
            steps.append(planner.step(stage, own, rows[stage.index]))
            continue
        room, most = planner.machine.room, stage.windows_per_step // own.groups
        if planner.config.data.has_documents:
            most = 1
        tried = (planner.step(stage, own, n) for n in reversed(divisors(most)))
        chosen = None
        for step in tried:
            if chosen is None or step.memory.total <= chosen.memory.total:
                chosen = step
            if room is None or step.memory.total <= room:
                break
        assert chosen is not None
        steps.append(chosen)
    return Candidate(layout, tuple(steps), planner.config.train.batch_tokens)


def search(planner: Planner, stages: tuple[Stage, ...], ranks: int, ranks_per_node: int) -> Found:
    """Raises InputError if no mesh of so many ranks has whole windows on every rank."""
    fitting: list[Candidate] = []
    others: list[Candidate] = []
    for layout in layouts(planner.config, stages, ranks, ranks_per_node):
        if any(layout.part % s.sequence for s in stages if s.sequence != planner.config.parallel.sequence):
            continue
        found = candidate(planner, stages, layout, None)
        (fitting if found.fits(planner.machine.room) else others).append(found)
    if not fitting and not others:
        windows = ", ".join(f"{s.windows_per_step} windows of {s.seq_len:,} tokens" for s in stages)
        raise InputError(
            f"--nodes, --gpus-per-node: no mesh of {ranks} ranks fits the {windows} of a step; replicate x shard must divide "
            f"the windows, and sequence the ranks. Change train.batch_tokens (now {planner.config.train.batch_tokens:,}), or "
            "the number of GPUs."
        )
    fitting.sort(key=lambda c: c.run_seconds)
    if fitting:
        least = fitting[0].run_seconds
        fitting.sort(key=lambda c: (0.0, *_plainness(c)) if _is_close(c, least) else (c.run_seconds, 0, 0, 0))
    others.sort(key=lambda c: c.run_seconds)
    return Found(fitting, others)


def _is_close(c: Candidate, seconds: float) -> bool:
    return c.run_seconds <= seconds * (1 + CLOSE)


def _plainness(c: Candidate) -> tuple[int, int, int]:
    """Of equally fast ones the plainest backend, then the one with the smallest copies."""
    return BACKENDS.index((c.layout.backend, c.layout.zero)), c.layout.part, c.tightest.memory.total


def reason(found: Found, room: float | None) -> str:
    """Why the first row is first, in words."""
    best, step = found.fitting[0], found.fitting[0].longest
    share = step.parts[step.bottleneck] / step.seconds
    lines = [f"First is {best}. {share:.0%} of its step is {step.bottleneck}{_about(step.bottleneck)}."]
    fewest = min(c.layout.sequence for c in (*found.fitting, *found.others))
    if fewest > 1:
        lines.append(
            f"Every mesh splits windows over at least {fewest} ranks, for a step has {step.stage.windows_per_step} windows for "
            f"{best.layout.ranks} ranks; more train.batch_tokens would allow fewer."
        )
    equal = [c for c in found.fitting if _is_close(c, best.run_seconds)]
    if len(equal) > 1:
        lines.append(
            f"{len(equal) - 1} more are within {CLOSE:.0%} of it, the second among them; it is the plainest of them."
        )
    slower = found.fitting[len(equal) :]
    if slower:
        lines.append(_comparison(best, slower[0]))
    faster = [c for c in found.others if c.run_seconds < best.run_seconds]
    if faster and room is not None:
        lines.append(f"{len(faster)} would be faster, and do not fit: {_too_large(faster[0], room)}")
    return " ".join(lines)


def _about(part: str) -> str:
    more = {
        "memory traffic": " (activations and transforms going through the GPU's memory)",
        "arithmetic": " (matrix products)",
        "filters": " (the networks that make filters, on every rank)",
        "recurrence": " (one token after another)",
    }
    return more.get(part, " (an exchange)")


def _comparison(best: Candidate, other: Candidate) -> str:
    a, b = best.longest.parts, other.longest.parts
    gains = {name: b.get(name, 0.0) - a.get(name, 0.0) for name in {*a, *b}}
    name = max(gains, key=lambda n: gains[n])
    slower = other.run_seconds / best.run_seconds - 1
    return (
        f"The next that is slower, {other}, is {slower:.0%} slower: {name} takes {b.get(name, 0.0):.3g} s of a step, in "
        f"place of {a.get(name, 0.0):.3g} s."
    )


def _too_large(c: Candidate, room: float) -> str:
    memory = c.tightest.memory
    kind = memory.largest()
    return (
        f"{c} needs {memory.total / GIB:.1f} GiB a rank of {room / GIB:.1f}, most of it {kind} "
        f"({getattr(memory, kind) / GIB:.1f} GiB)."
    )


def misfit(c: Candidate, room: float) -> str:
    """What does not fit, and what to change."""
    memory, step = c.tightest.memory, c.tightest
    changes = {
        "weights": "cut the weights: parallel.backend = 'fsdp2' over more ranks",
        "gradients": "cut the gradients: parallel.backend = 'fsdp2', with one micro-batch a step",
        "moments": "cut the moments: parallel.backend = 'fsdp2', or 'deepspeed' with parallel.zero = 1",
        "ema": "cut the averages: parallel.backend = 'fsdp2', or set optim.ema = 0",
        "exchange": "set parallel.backend = 'ddp', which sums gradients in place, or cut over more ranks",
        "states": "split windows over fewer ranks, or set activation.checkpoint = 'selective'",
    }
    for_activations = [
        *(["lower train.micro_batch"] if step.rows > 1 else []),
        *(["set activation.checkpoint = 'block'"] if c.layout.checkpoint != "block" else []),
        "split windows over more ranks (parallel.sequence)",
    ]
    advice = changes.get(memory.largest(), ", ".join(for_activations))
    return f"{step.stage}: {_too_large(c, room)} To change: {advice}."
