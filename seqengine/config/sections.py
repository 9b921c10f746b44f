"""Every section of a run's config but the model's, with the meaning, unit and default of each key.

The model's section stands beside the model (`seqengine.model.ModelConfig`); `seqengine.config.run.RunConfig` composes
all of them.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from seqengine.config.values import (
    Count,
    Fraction,
    Section,
    Wording,
    parse_fraction_or_count,
    parse_steps_or_seconds,
)

Positive = Annotated[Count, Field(gt=0)]
Share = Annotated[Fraction, Field(ge=0.0, le=1.0)]


def _path(value: Any) -> Any:
    """A leading ~ is the home directory: a shell does not expand it inside `data.fasta=~/genome.fa`."""
    if not isinstance(value, str):
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"must be a path; its home directory is not known: {error}") from None


FilePath = Annotated[Path, BeforeValidator(_path), Wording("a path in quotes")]


class RunSection(Section):
    """[run]: where a run lives and what makes it repeatable."""

    name: str = "run"
    """Names the directory and the plots."""
    dir: str = "runs/{name}"
    """Directory of the run; `{name}` is filled in."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 2222
    """Seeds the initial weights, the order of windows, their strand, and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = CUDA where there is one."""
    deterministic: bool = True
    """Refuse operations whose result may differ between two runs."""


class SyntheticSection(Section):
    """[data.synthetic]: the genome of the demo (seqengine.data.synthetic)."""

    length: Positive = 2_000_000
    """Bases."""
    lag: Positive = 40
    """Distance in bases at which the genome repeats itself."""
    repeat: Share = 0.7
    """Probability that a base is the one `lag` bases before."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Another seed is another genome."""


class DataSection(Section):
    """[data]: what is read."""

    source: Literal["fasta", "synthetic"] = "fasta"
    """A genome of yours, or the synthetic one."""
    fasta: FilePath | None = None
    """FASTA file, plain or gzip or bgzip."""
    bed: FilePath | None = None
    """Intervals with a split: chromosome, start, end, train|valid|test. Without it see `valid_fraction`."""
    bed_join: bool = False
    """Join neighbouring intervals of one split, gap included, so that windows longer than an interval exist."""
    cache: str = "runs/cache"
    """Directory of packed genomes, shared by runs."""
    seq_len: Positive = 1024
    """Tokens in a window."""
    window: Literal["tile", "jitter"] = "tile"
    """tile: windows end to end. jitter: each is moved by up to half a window, anew in every epoch."""
    rc_prob: Share = 0.5
    """Probability that a training window is read as its reverse complement."""
    soft_mask: Literal["upper", "unk"] = "upper"
    """Lower-case bases: upper = as their capitals; unk = as [UNK] (the published behaviour)."""
    valid_fraction: Annotated[Fraction, Field(gt=0.0, lt=1.0)] = 0.05
    """Without a BED: this share of the bases, at the end of the file, is validation."""
    synthetic: SyntheticSection = SyntheticSection()


class TrainSection(Section):
    """[train]: how long, and in what portions. Give `steps` or `tokens`."""

    steps: Positive | None = None
    """Optimiser steps."""
    tokens: Positive | None = None
    """Tokens over all ranks; the last step is whole."""
    batch_tokens: Positive = 16384
    """Tokens per optimiser step over all ranks; a multiple of data.seq_len."""
    micro_batch: Positive | Literal["auto"] = "auto"
    """Windows per forward pass on one data-parallel rank; auto = as many as keep 64Ki tokens on a rank."""
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest gradient norm over all parameters; 0 = no clipping."""
    mask_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.15
    """With model.causal = false: share of the tokens that are hidden and have to be told."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or the gradient norm is not finite."""


class OptimGroup(Section):
    """[[optim.groups]]: parameters whose name matches get other settings. The first group that matches wins."""

    match: str
    """Shell pattern over parameter names, such as '*.filter.*'; it is an error if nothing matches."""
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    """As it would be without the group, if not given."""
    lr_scale: Annotated[float, Field(ge=0.0)] = 1.0
    """Share of the learning rate."""


class OptimSection(Section):
    """[optim]: AdamW."""

    name: Literal["adamw"] = "adamw"
    """The optimiser."""
    lr: Annotated[float, Field(gt=0.0)] = 6e-4
    """Learning rate after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.95)
    """Memory of the first and second moments."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Of matrices; norms, biases, embeddings and filters are not decayed unless a group says so."""
    groups: tuple[OptimGroup, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, data: Any) -> Any:
        """TOML has arrays where the section has tuples."""
        if not isinstance(data, dict):
            return data
        return {k: tuple(v) if k in ("betas", "groups") and isinstance(v, list) else v for k, v in data.items()}


class ScheduleSection(Section):
    """[schedule]: the learning rate as a pure function of tokens seen."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """The decay after the warm-up."""
    warmup: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, le=1.0)],
        BeforeValidator(parse_fraction_or_count),
        Wording("a share between 0 and 1 or a number of tokens", "0.01, '1%' or '10M'"),
    ] = 0.01
    """A share of all tokens ('1%', 0.01) or tokens ('10M')."""
    min_ratio: Share = 0.1
    """Learning rate at the end, as a share of optim.lr."""


class ParallelSection(Section):
    """[parallel]: the mesh of ranks, replicate x sequence."""

    replicate: Positive | Literal["auto"] = "auto"
    """Copies of the model, each with its own windows; auto = ranks / sequence."""
    sequence: Positive = 1
    """Ranks over which each window is split."""


class PrecisionSection(Section):
    """[precision]."""

    params: Literal["fp64", "fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; weights are kept in float32 for bf16 (autocast), in float64 for fp64."""


class CkptSection(Section):
    """[ckpt]: when to save. A checkpoint is always saved at the end of a run."""

    every: Annotated[
        Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0.0)],
        BeforeValidator(parse_steps_or_seconds),
        Wording("steps or a duration above 0", "500, '1k', '90s' or '30min'"),
    ] = 1800.0
    """Steps (500, '1k') or a duration ('30min', '90s'); a number with a decimal point is seconds."""
    keep: Positive = 3
    """Checkpoints kept; older ones are deleted once a newer one is safe."""


class EvalSection(Section):
    """[eval]: loss on the validation windows. Always done at the end of a run."""

    every: Annotated[Count, Field(ge=0)] = 0
    """Steps between evaluations; 0 = only at the end."""
    windows: Positive | Literal["all"] = 256
    """Validation windows used, evenly spaced over all of them."""


class LogSection(Section):
    """[log]: metrics.jsonl is always written."""

    every: Positive = 10
    """Steps between lines."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra: pip install 'seqengine-train[tensorboard]')."""


__all__ = [
    "CkptSection", "DataSection", "EvalSection", "LogSection", "OptimGroup", "OptimSection", "ParallelSection",
    "PrecisionSection", "RunSection", "ScheduleSection", "SyntheticSection", "TrainSection",
]  # fmt: skip
