"""Everything about a run that can be known before it starts; the first part of `train`, and the whole of `check`."""

from dataclasses import dataclass

import torch

from seqengine.config.run import RunConfig
from seqengine.data.source import Source, check_classes, check_vocabulary, open_source
from seqengine.errors import InputError
from seqengine.meaning import check_beginning
from seqengine.metrics import read_metrics
from seqengine.model import LanguageModel
from seqengine.optim import group_settings
from seqengine.rundir import CheckpointTarget, RunDirectory
from seqengine.sinks import check_sinks
from seqengine.stages import stages_of
from seqengine.unfilled import Unfilling


@dataclass(frozen=True)
class Summary:
    """The figures of a run."""

    config: RunConfig
    num_parameters: int
    num_decayed: int
    num_windows: dict[str, int] | None
    """By split; None if no data are given, or none are read."""
    source: Source | None
    """The data, opened; None if none are given, or none are read."""

    def describe(self) -> str:
        c = self.config
        lines = [
            f"run         {c.run_dir}",
            f"model       {c.model.arch}, {self.num_parameters:,} parameters ({self.num_decayed:,} with weight decay)",
            f"sequence    {c.data.seq_len:,} tokens over {c.parallel.sequence} ranks",
            f"step        {c.windows_per_step} windows, {c.train.batch_tokens:,} tokens",
            f"length      {c.total_steps:,} steps, {c.total_tokens:,} tokens",
        ]
        if self.num_windows is not None:
            lines.append("data        " + ", ".join(f"{n:,} {split} windows" for split, n in self.num_windows.items()))
        elif c.data.is_given:
            lines.append("data        not read")
        else:
            lines.append("data        none given: train needs some, such as data.fasta=GENOME.fa")
        return "\n".join([*lines, "ok"])


def check_source(source: Source, config: RunConfig) -> None:
    """Raises InputError if the model has no row for some id of the data, or no token that hides others where it needs one."""
    check_vocabulary(source, config.model.vocab_size)
    check_classes(source, config.model.num_classes)
    if not config.model.causal and source.mask_id is None:
        raise InputError(
            f"model.causal = false: data.source = {config.data.source!r} must have a token that hides others; it has none. "
            "Set model.causal = true, or a data.tokenizer with a mask."
        )


def _check_compiler(config: RunConfig) -> None:
    """Raises InputError if torch.compile has no such backend."""
    if not config.compile.enable:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if config.compile.backend not in known:
        raise InputError(
            f"compile.backend = {config.compile.backend!r} must be one of {', '.join(known)}; set one of them."
        )


def _shapes_of(config: RunConfig) -> LanguageModel:
    """The model without memory. Raises InputError for sizes that do not go together, or are too large for any machine."""
    try:
        with Unfilling():
            return LanguageModel(config.model)
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:  # of a mixer; of torch, for sizes that overflow
        what = str(error).splitlines()[0]
        raise InputError(
            f"model: must be of sizes that go together; got: {what}. Change them under [model]."
        ) from error


def check_run(config: RunConfig, *, reads_data: bool = True) -> Summary:
    """Build the model without memory, group its parameters, pack the data if there are any, count the windows.

    reads_data: False leaves data unread and data.cache unwritten; a login node may not see the data.
    Raises InputError for all that `train` would refuse. Writes nothing but the packed genome in data.cache.
    """
    _check_compiler(config)
    check_sinks(config.log)
    read_metrics(config.run_dir)
    if config.train.init_from is not None and not RunDirectory(config.run_dir).checkpoints.is_dir():
        check_beginning(CheckpointTarget.find(config.train.init_from), config.model)
    model = _shapes_of(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    settings = group_settings(sizes, config.optim, model.rules)
    decayed = sum(size for name, size in sizes.items() if settings[name][0] > 0)
    source, num_windows = None, None
    if reads_data and config.data.is_given:
        source = open_source(config.data)
        check_source(source, config)
        windows = source.windows(config.data.seq_len)
        for stage in stages_of(config):
            source.windows(stage.seq_len, ("train",))
        num_windows = {split: len(of_split) for split, of_split in windows.items()}
    return Summary(config, sum(sizes.values()), decayed, num_windows, source)
