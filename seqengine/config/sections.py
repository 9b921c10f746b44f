"""[run], [train], [eval] and [log]: what a run is, how long it trains, what it tells.

The other sections stand in `model`, `data`, `optim` and `engine`; `seqengine.config.run.RunConfig` composes all of them.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from seqengine.config.values import Count, FilePath, Positive, Section


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
    init_from: FilePath | None = None
    """A run, or a checkpoint of one, whose weights this run begins with; a head of another shape is left out."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or the gradient norm is not finite; which samples and layers it was is written down."""
    spike: Literal["off", "log", "rewind"] = "off"
    """Of a loss far above the last ones: say so, or go back to the newest checkpoint and leave out the samples since."""
    spike_window: Annotated[int, Field(ge=50)] = 200
    """Losses that a new one is compared with; the first 50 are compared with nothing."""
    spike_factor: Annotated[float, Field(gt=0.0)] = 6.0
    """A spike is above median + factor * (median absolute deviation)."""


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
    samples: bool = False
    """Also write which samples each rank read: RUN/samples/rank-R.jsonl, a line a step."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra: pip install 'seqengine-train[tensorboard]')."""
    wandb: bool = False
    """Also tell Weights & Biases (needs the extra: pip install 'seqengine-train[wandb]', and `wandb login`)."""
    wandb_project: str = "seqengine"
    """Project there; the run has the name run.name."""
    wandb_offline: bool = False
    """Write RUN/wandb and send nothing, for machines without a network; `wandb sync` sends it later."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = None
    """10^12 operations a second of one device at precision.params, for MFU; known for H100, H200 and A100 if not given."""
    profile_step: Annotated[Count, Field(ge=0)] = 0
    """First step that torch's profiler traces, on every rank: RUN/profile/rank-R-step-N.json.gz; 0 = none."""
    profile_steps: Positive = 3
    """Steps traced from there on."""
    memory_snapshot: bool = False
    """On CUDA: also what the allocator did in these steps, RUN/profile/rank-R-step-N.pickle (docs.pytorch.org/memory_viz)."""

    @model_validator(mode="after")
    def _snapshot_has_steps(self) -> Self:
        if self.memory_snapshot and not self.profile_step:
            raise ValueError(
                "log.memory_snapshot needs the steps of log.profile_step; got 0: set it to the first of them"
            )
        return self
