"""The whole config of a run: its sections, the combinations that cannot work, and the figures that follow from it.

A check reads only the sections that it names, so a loader can run it as soon as those are valid and report every
problem of a file at once. `RunConfig` runs all of them itself: an impossible config cannot be built by any road.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

from pydantic import model_validator

from seqengine.config import mesh_checks
from seqengine.config.data import DataSection
from seqengine.config.data_checks import DATA_CHECKS
from seqengine.config.engine import (
    ActivationSection,
    CkptSection,
    CommSection,
    CompileSection,
    ParallelSection,
    PrecisionSection,
)
from seqengine.config.mesh_checks import Problem
from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection, ScheduleSection
from seqengine.config.sections import EvalSection, LogSection, RunSection, TrainSection
from seqengine.config.values import Section


def _run_dir(run: RunSection) -> Iterator[Problem]:
    if not run.name.strip():
        yield Problem(("run.name",), f"run.name must not be empty, got {run.name!r}; give the run a name")
    rest = run.dir.replace("{name}", "")
    if "{" in rest or "}" in rest:
        yield Problem(
            ("run.dir",), f"run.dir: only {{name}} is filled in, got {run.dir!r}; remove the other braces from the path"
        )
    if not run.dir.strip():
        yield Problem(("run.dir",), "run.dir must not be empty; the default is 'runs/{name}'")


def _length_of_run(train: TrainSection) -> Iterator[Problem]:
    keys = ("train.steps", "train.tokens")
    if train.steps is None and train.tokens is None:
        text = "train.steps or train.tokens must be given: how long to train; add one, such as train.tokens = '10B'"
        yield Problem(keys, text)
    elif train.steps is not None and train.tokens is not None:
        got = f"got train.steps = {train.steps} and train.tokens = {train.tokens}"
        yield Problem(keys, f"train.steps and train.tokens exclude each other, {got}; delete one of them")


def _warmup_ends(train: TrainSection, schedule: ScheduleSection) -> Iterator[Problem]:
    total = _total_tokens(train)
    if isinstance(schedule.warmup, int) and total is not None and schedule.warmup > total:
        yield Problem(
            ("schedule.warmup", "train.steps", "train.tokens"),
            f"schedule.warmup = {schedule.warmup} tokens must be at most the {total} tokens of the run; "
            "shorten it, or give a share such as '1%'",
        )
    elif total is not None and schedule.kind == "wsd":
        warmup, decay = schedule.warmup_tokens(total), schedule.decay_tokens(total)
        if warmup + decay > total:
            yield Problem(
                ("schedule.warmup", "schedule.decay", "train.steps", "train.tokens"),
                f"schedule.warmup and schedule.decay take {warmup:g} + {decay:g} tokens, which must be at most "
                f"the {total} of the run; shorten one of them",
            )


def _total_tokens(train: TrainSection) -> int | None:
    return train.tokens if train.steps is None else train.steps * train.batch_tokens


CHECKS: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Problem]]], ...] = (
    (("run",), _run_dir),
    (("train",), _length_of_run),
    (("train", "data", "parallel"), mesh_checks.whole_windows),
    (("train", "data", "parallel"), mesh_checks.even_split),
    (("train", "data", "parallel"), mesh_checks.ranks_have_tokens),
    (("train", "data", "parallel", "model"), mesh_checks.window_fits_model),
    (("train", "data"), mesh_checks.stages_reach_the_end),
    (("parallel", "precision", "optim", "activation"), mesh_checks.backend_fits),
    *DATA_CHECKS,
    (("train", "schedule"), _warmup_ends),
)
"""The sections that a check needs, in the order of its arguments, and the check."""


def check_sections(sections: Mapping[str, Section]) -> list[Problem]:
    """Every problem that the given sections show; a check whose sections are not all there is left out."""
    found: list[Problem] = []
    for needs, check in CHECKS:
        if all(name in sections for name in needs):
            found.extend(check(*(sections[name] for name in needs)))
    return found


class RunConfig(Section):
    """One run: every section, valid by itself and together with the others."""

    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    parallel: ParallelSection = ParallelSection()
    precision: PrecisionSection = PrecisionSection()
    activation: ActivationSection = ActivationSection()
    compile: CompileSection = CompileSection()
    comm: CommSection = CommSection()
    ckpt: CkptSection = CkptSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        problems = check_sections({name: getattr(self, name) for name in type(self).model_fields})
        if problems:
            raise ValueError("\n".join(problem.text for problem in problems))
        return self

    @property
    def windows_per_step(self) -> int:
        """Windows of one optimiser step, over all ranks."""
        return self.train.batch_tokens // self.data.seq_len

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run; a last step is whole even where train.tokens ends inside it."""
        if self.train.steps is not None:
            return self.train.steps
        return -(-self.total_tokens // self.train.batch_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens of the run: train.tokens, or train.steps * train.batch_tokens."""
        total = _total_tokens(self.train)
        assert total is not None, "a valid config has train.steps or train.tokens"
        return total

    @property
    def run_dir(self) -> Path:
        """Directory of the run, `{name}` filled in."""
        return Path(self.run.dir.replace("{name}", self.run.name))
