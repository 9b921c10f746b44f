"""The sections of a run's config that are not about the model, the data or the optimiser.

Those stand in `model`, `data` and `optim`; `seqengine.config.run.RunConfig` composes all of them.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from seqengine.config.values import Count, Positive, Section, Wording, parse_steps_or_seconds


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
