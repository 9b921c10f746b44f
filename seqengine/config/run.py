"""The whole config of a run: its sections, the combinations that cannot work, and the figures that follow from it.

A check reads only the sections that it names, so a loader can run it as soon as those are valid and report every
problem of a file at once. `RunConfig` runs all of them itself: an impossible config cannot be built by any road.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import model_validator

from seqengine.config.data import DataSection
from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection, ScheduleSection
from seqengine.config.sections import (
    CkptSection,
    EvalSection,
    LogSection,
    ParallelSection,
    PrecisionSection,
    RunSection,
    TrainSection,
)
from seqengine.config.values import Section

DNA_SYMBOLS = 12
"""Token ids of the published HyenaDNA alphabet: 0 to 6 special, 7 to 11 A, C, G, T, N."""


@dataclass(frozen=True)
class Problem:
    """A combination that cannot work: the dotted keys that take part, and what must hold, what was got, what to do."""

    keys: tuple[str, ...]
    text: str


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


def _whole_windows(train: TrainSection, data: DataSection) -> Iterator[Problem]:
    batch, length = train.batch_tokens, data.seq_len
    if batch % length:
        near = max(length, batch // length * length)
        yield Problem(
            ("train.batch_tokens", "data.seq_len"),
            f"train.batch_tokens = {batch} must be a multiple of data.seq_len = {length} (whole windows); "
            f"set train.batch_tokens = {near} or {near + length}",
        )


def _even_split(train: TrainSection, data: DataSection, parallel: ParallelSection) -> Iterator[Problem]:
    windows, remainder = divmod(train.batch_tokens, data.seq_len)
    if remainder:
        return
    keys: tuple[str, ...] = ("train.batch_tokens", "data.seq_len")
    step = f"train.batch_tokens / data.seq_len = {train.batch_tokens} / {data.seq_len} = {windows} windows per step"
    replicas = 1 if parallel.replicate == "auto" else parallel.replicate
    if windows % replicas:
        yield Problem(
            (*keys, "parallel.replicate"),
            f"{step} must be divisible by parallel.replicate = {replicas}; change parallel.replicate to a divisor of "
            f"{windows}, or train.batch_tokens to a multiple of {replicas * data.seq_len}",
        )
    # With replicate = "auto" the share of a replica is not known yet, but the micro-batch must divide the whole anyway.
    elif train.micro_batch != "auto" and (windows // replicas) % train.micro_batch:
        share = f"{step}, {windows // replicas} per replica," if replicas > 1 else step
        yield Problem(
            (*keys, "parallel.replicate", "train.micro_batch"),
            f"{share} must be divisible by train.micro_batch = {train.micro_batch}; set train.micro_batch to a divisor "
            f"of {windows // replicas}, or leave it 'auto'",
        )


def _ranks_have_tokens(data: DataSection, parallel: ParallelSection) -> Iterator[Problem]:
    if parallel.sequence > data.seq_len:
        yield Problem(
            ("parallel.sequence", "data.seq_len"),
            f"parallel.sequence = {parallel.sequence} splits a window over more ranks than tokens: data.seq_len = "
            f"{data.seq_len}; set parallel.sequence to at most {data.seq_len}",
        )


def _window_fits_model(data: DataSection, model: ModelConfig) -> Iterator[Problem]:
    if data.seq_len > model.max_len:
        yield Problem(
            ("data.seq_len", "model.max_len"),
            f"data.seq_len = {data.seq_len} must be at most model.max_len = {model.max_len}; shorten data.seq_len, or "
            f"set model.max_len = {data.seq_len} (a new model: its filters are functions of max_len)",
        )


def _alphabet_fits_model(model: ModelConfig) -> Iterator[Problem]:
    if model.vocab_size < DNA_SYMBOLS:
        yield Problem(
            ("model.vocab_size",),
            f"model.vocab_size = {model.vocab_size} must be at least {DNA_SYMBOLS}, the symbols of the DNA alphabet; "
            f"set model.vocab_size = {DNA_SYMBOLS}",
        )


def _has_tokens_to_tell(model: ModelConfig) -> Iterator[Problem]:
    if model.num_classes:
        yield Problem(
            ("model.num_classes",),
            f"model.num_classes = {model.num_classes}: a run learns from tokens, and has no labelled sequences; set "
            "model.num_classes = 0, or train the model's `loss` in a loop of your own",
        )


def _data_files(data: DataSection) -> Iterator[Problem]:
    if data.source == "fasta" and data.bed is not None and data.fasta is None:
        yield Problem(
            ("data.bed", "data.fasta"),
            f"data.bed = '{data.bed}' needs data.fasta, the genome that its intervals lie in; "
            "add data.fasta=/path/to/genome.fa to the command, or set fasta under [data]",
        )
    given = [name for name in ("fasta", "bed") if getattr(data, name) is not None]
    if data.source != "fasta" and given:
        keys = " and ".join(f"data.{name}" for name in given)
        yield Problem(
            (*(f"data.{name}" for name in given), "data.source"),
            f"{keys} would not be read, because data.source = '{data.source}'; "
            f"delete {keys}, or set data.source = 'fasta'",
        )


def _synthetic_genome(data: DataSection) -> Iterator[Problem]:
    if data.source != "synthetic":
        return
    bases = data.synthetic.length
    valid = int(bases * data.valid_fraction)
    shortest = min(valid, bases - valid)
    if shortest <= data.seq_len:
        enough = math.ceil((data.seq_len + 1) / min(data.valid_fraction, 1 - data.valid_fraction)) + 1
        yield Problem(
            ("data.synthetic.length", "data.valid_fraction", "data.seq_len"),
            f"data.synthetic.length = {bases} with data.valid_fraction = {data.valid_fraction} leaves {shortest} bases "
            f"in the smaller split, which must hold more than one window of data.seq_len = {data.seq_len}; "
            f"set data.synthetic.length to at least {enough}",
        )
    if data.synthetic.lag >= bases:
        yield Problem(
            ("data.synthetic.lag", "data.synthetic.length"),
            f"data.synthetic.lag = {data.synthetic.lag} must be below data.synthetic.length = {bases}; make it smaller",
        )


def _warmup_ends(train: TrainSection, schedule: ScheduleSection) -> Iterator[Problem]:
    total = _total_tokens(train)
    if isinstance(schedule.warmup, int) and total is not None and schedule.warmup > total:
        yield Problem(
            ("schedule.warmup", "train.steps", "train.tokens"),
            f"schedule.warmup = {schedule.warmup} tokens must be at most the {total} tokens of the run; "
            "shorten it, or give a share such as '1%'",
        )


def _total_tokens(train: TrainSection) -> int | None:
    return train.tokens if train.steps is None else train.steps * train.batch_tokens


CHECKS: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Problem]]], ...] = (
    (("run",), _run_dir),
    (("train",), _length_of_run),
    (("train", "data"), _whole_windows),
    (("train", "data", "parallel"), _even_split),
    (("data", "parallel"), _ranks_have_tokens),
    (("data", "model"), _window_fits_model),
    (("model",), _alphabet_fits_model),
    (("model",), _has_tokens_to_tell),
    (("data",), _data_files),
    (("data",), _synthetic_genome),
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
