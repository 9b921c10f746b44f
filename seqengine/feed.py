"""The micro-batches of a stage that this rank reads, step by step, read ahead in the background.

Sample i of a step belongs to a replica by arithmetic, and a rank reads its own tokens of it: which samples a step takes does
not depend on the mesh, and a stopped run goes on with the sample after the last.
"""

from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqengine.config.data import GENOMES
from seqengine.config.run import RunConfig
from seqengine.data.contract import Batch
from seqengine.data.masking import IGNORE, mask_tokens
from seqengine.data.prefetch import Reader, Request
from seqengine.data.source import Source, Windows
from seqengine.data.stream import Stream, validation_indices
from seqengine.data.tiles import mix
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import offsets, split_sizes
from seqengine.parallel.mesh import Mesh
from seqengine.runfiles import LineLog, read_lines, write_lines
from seqengine.stages import Stage

MICRO_BATCH_TOKENS = 1 << 16
"""Tokens of a forward pass on one rank when micro_batch is 'auto'."""


class MicroBatch(NamedTuple):
    """This rank's part of some windows, on the mesh's device."""

    ids: Tensor
    """[rows, tokens] int64."""
    labels: Tensor
    """[rows, tokens], or of classes [rows]."""
    options: dict[str, Any]
    """Of LanguageModel.objective: ctx, mask, dropout_keys."""


class Feed:
    """What a rank reads in a stage."""

    def __init__(self, windows: Windows, stage: Stage, config: RunConfig, mesh: Mesh, source: Source) -> None:
        self.stage, self.config, self.mesh, self.source = stage, config, mesh, source
        self.stream = Stream(windows, seed=stage.seed)
        self.ctx = SequenceContext.even(mesh.sequence, stage.seq_len)
        self.rows = stage.windows_per_step // mesh.num_replicas
        self.micro_rows = micro_batch_rows(self.rows, stage, config, mesh)
        self._reader = Reader(self.stream, workers=config.data.workers)
        self._next = -1  # the first sample of the step that the iterator is at
        self._batches: Iterator[MicroBatch] = iter(())

    def step(self, samples: int) -> list[MicroBatch]:
        """The micro-batches of the step that follows `samples` samples of the stage."""
        if samples != self._next:
            self._batches = self._read_from(samples)
        self._next = samples + self.stage.windows_per_step
        return list(islice(self._batches, self.rows // self.micro_rows))

    def sample_numbers(self, samples: int) -> list[int]:
        """This replica's samples of the step that follows `samples` samples."""
        first = samples + self.mesh.replica * self.rows
        return list(range(first, first + self.rows))

    def _read_from(self, samples: int) -> Iterator[MicroBatch]:
        begin, end = self.ctx.bounds[self.ctx.rank], self.ctx.bounds[self.ctx.rank + 1]

        def requests() -> Iterator[Request]:
            for step_begin in count(samples, self.stage.windows_per_step):
                numbers = self.sample_numbers(step_begin)
                for at in range(0, self.rows, self.micro_rows):
                    yield Request(numbers[at], self.micro_rows, begin, end)

        asked = requests()
        for batch, request in zip(self._reader.batches(requests()), asked, strict=False):
            keys = sample_keys(self.stage.seed, range(request.first, request.first + request.rows))
            ids, labels, options = examples(batch, keys, self.ctx, self.config, self.source, self.mesh.device)
            yield MicroBatch(ids, labels, {**options, "dropout_keys": keys.to(self.mesh.device)})

    def num_labels(self, batches: list[MicroBatch]) -> float:
        """Labels of a step over all ranks. Every rank must call."""
        if self.config.model.num_classes:
            return float(self.stage.windows_per_step)
        if every_token_counts(self.config):
            return float(self.stage.windows_per_step * self.stage.seq_len)
        return max(1.0, self.mesh.sum(float(sum(int((b.labels != -100).sum()) for b in batches)))[0])

    def close(self) -> None:
        self._reader.close()


def micro_batch_rows(rows: int, stage: Stage, config: RunConfig, mesh: Mesh) -> int:
    """Windows per forward pass: a divisor of `rows`, as large as MICRO_BATCH_TOKENS a rank allow; one of packed documents."""
    if config.data.has_documents:
        return 1
    if stage.micro_batch != "auto":
        return min(stage.micro_batch, rows)
    most = most_windows(stage.seq_len, mesh)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)


class Share(NamedTuple):
    """Of the validation windows that are evaluated."""

    all: list[int]
    mine: list[int]
    """This replica's."""
    most: int
    """As many as a replica has."""


def validation_share(windows: Windows, config: RunConfig, mesh: Mesh) -> Share:
    """`eval.windows` validation windows, shared out over replicas."""
    chosen = validation_indices(len(windows), config.eval.windows)
    sizes = split_sizes(len(chosen), mesh.num_replicas)
    bounds = offsets(sizes)
    return Share(chosen, chosen[bounds[mesh.replica] : bounds[mesh.replica + 1]], max(sizes))


def most_windows(seq_len: int, mesh: Mesh) -> int:
    """Windows of which a rank's parts hold MICRO_BATCH_TOKENS, at least one."""
    return max(1, MICRO_BATCH_TOKENS * mesh.sequence_size // seq_len)


def every_token_counts(config: RunConfig) -> bool:
    """Every token has a label, so that nobody need count them."""
    return config.model.causal and config.data.source in GENOMES


def sample_keys(seed: int, samples: Iterable[int]) -> Tensor:
    """[samples] int64, a number for each."""
    return torch.tensor([signed(mix(seed, sample)) for sample in samples])


def examples(
    batch: Batch, keys: Tensor, ctx: SequenceContext, config: RunConfig, source: Source, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What the model reads and is to tell of a batch: ids, labels, and ctx and mask for LanguageModel.objective.

    The next token, or tokens that are hidden (model.causal = false), or the class of each sequence (model.num_classes).
    """
    part = ctx if batch.documents is None else ctx.with_documents(batch.documents)
    ids, labels = batch.ids, batch.labels
    options: dict[str, Any] = {"ctx": part}
    if config.model.num_classes:
        assert batch.classes is not None, "the config's checks refuse data without classes"
        labels = batch.classes
        if batch.lengths is not None:
            options["mask"] = (part.positions()[None] < batch.lengths[:, None]).to(device)
    elif not config.model.causal:
        ids, labels = _hide_tokens(batch, keys, part, config, source)
    return ids.to(device), labels.to(device), options


def _hide_tokens(
    batch: Batch, keys: Tensor, ctx: SequenceContext, config: RunConfig, source: Source
) -> tuple[Tensor, Tensor]:
    """Inputs with some tokens masked, and their labels; padding stays, and is not to be told."""
    assert source.mask_id is not None, "check_source refuses sources without a mask"
    assert source.replacements is not None
    positions = ctx.positions()
    ids, labels = mask_tokens(
        batch.ids, keys, positions, config.train.mask_rate, mask_id=source.mask_id, replacements=source.replacements
    )
    if batch.lengths is None:
        return ids, labels
    is_text = positions[None] < batch.lengths[:, None]
    return torch.where(is_text, ids, batch.ids), torch.where(is_text, labels, IGNORE)


def signed(word: int) -> int:
    """A 64-bit word as torch's int64 holds it."""
    return word - (1 << 64) if word >= 1 << 63 else word


class SampleLog(LineLog):
    """RUN/samples/rank-R.jsonl: which samples this rank read, a line a step. Opened at a step, it drops the lines after it.

    num_ranks: rank 0 drops them also from the files of ranks that an earlier life had and this one has not.
    """

    def __init__(self, run_dir: Path, rank: int, *, step: int, num_ranks: int = 1) -> None:
        super().__init__(run_dir / "samples" / f"rank-{rank}.jsonl")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for path in self._path.parent.glob("rank-*.jsonl"):
                if int(path.stem.removeprefix("rank-")) >= num_ranks:
                    write_lines(path, _lines_until(path, step))
        self.go_on_from(_lines_until(self._path, step))

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`: the run went back to it."""
        self.close()
        self.go_on_from(_lines_until(self._path, step))

    def add(self, step: int, stage: int, samples: list[int], windows: list[tuple[int, int]]) -> None:
        """windows: (epoch, index) of each sample."""
        self.write({"step": step, "stage": stage, "samples": samples, "windows": windows})


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Those of a log up to a step."""
    return [line for line in read_lines(path) if line["step"] <= step]
