"""Length stages: short windows first, long ones later, at the same number of tokens per step.

A stage begins with the first step whose first token is at or after the sum of the stages before it. So which stage a step
belongs to follows from the tokens seen, and a run resumed in the middle of a stage goes on there. Filters are functions of
model.max_len, which no stage changes.

References: Nguyen et al. 2023, HyenaDNA, arXiv:2306.15794, section 3.2 (sequence length warm-up).
"""

from dataclasses import dataclass
from typing import Literal

from seqengine.config.run import RunConfig
from seqengine.data.tiles import mix

_ORDER = 3  # what a word is drawn for, apart from the draws of one window


@dataclass(frozen=True)
class Stage:
    """Steps [first_step, end_step) of a run, all with windows of seq_len tokens."""

    index: int
    seq_len: int
    sequence: int
    """Ranks over which each window is split."""
    micro_batch: int | Literal["auto"]
    windows_per_step: int
    first_step: int
    end_step: int
    seed: int
    """Of the order of its windows, and of what is random in them."""

    @property
    def num_steps(self) -> int:
        return self.end_step - self.first_step

    def __str__(self) -> str:
        steps = f"steps {self.first_step} to {self.end_step}"
        return f"stage {self.index + 1}: {self.seq_len:,} tokens over {self.sequence} ranks, {steps}"


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run in their order; one if the config names none."""
    batch, total = config.train.batch_tokens, config.total_steps
    named = config.data.stages
    if not named:
        section = config.data.seq_len, config.parallel.sequence, config.train.micro_batch
        return (_stage(config, 0, section, 0, total),)
    found: list[Stage] = []
    first_step, tokens = 0, 0
    for index, stage in enumerate(named):
        tokens += stage.tokens or 0
        end_step = total if index == len(named) - 1 else min(total, -(-tokens // batch))
        layout = (
            stage.seq_len,
            stage.sequence or config.parallel.sequence,
            stage.micro_batch or config.train.micro_batch,
        )
        found.append(_stage(config, index, layout, first_step, end_step))
        first_step = end_step
    return tuple(found)


def _stage(
    config: RunConfig, index: int, layout: tuple[int, int, int | Literal["auto"]], first_step: int, end_step: int
) -> Stage:
    seq_len, sequence, micro_batch = layout
    seed = config.run.seed
    return Stage(
        index=index,
        seq_len=seq_len,
        sequence=sequence,
        micro_batch=micro_batch,
        windows_per_step=config.train.batch_tokens // seq_len,
        first_step=first_step,
        end_step=end_step,
        seed=seed if index == 0 else mix(_ORDER, seed, index) >> 1,
    )


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage of the step that follows `step` steps; the last one when the run is complete."""
    return next((stage for stage in stages if step < stage.end_step), stages[-1])
