"""The learning rate of a step as a pure function of the tokens before it.

    warm-up     rate = base (tokens + 1/2) / (warmup + 1/2)     for tokens < warmup
    then        rate = base (r + (1 - r) f(x))                  r = min_ratio, x the share of the decay that is over
    f(x)        cosine (1 + cos(pi x)) / 2      linear 1 - x      sqrt 1 - sqrt(x)      constant 1, without r

cosine and linear decay from the end of the warm-up to the end of the run; wsd (warm-up, stable, decay) only over its last
part, so that a run may be made longer from any checkpoint of its stable part. Nothing is remembered between steps: a resumed
run, on any number of ranks, goes on exactly where it was.

References: cosine, Loshchilov and Hutter 2017, arXiv:1608.03983. wsd, Hu et al. 2024, arXiv:2404.06395; its length and the
shape 1 - sqrt(x), Haegele et al. 2024, arXiv:2405.18392.
"""

import math
from collections.abc import Callable

from seqengine.config.optim import ScheduleSection

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}
"""What is left of the learning rate's way down after the share x of the decay; 1 at 0, and 0 at 1."""


def learning_rate(tokens: int, total_tokens: int, base: float, section: ScheduleSection) -> float:
    """The rate for the step that begins after `tokens` tokens: warm-up, then the decay of `section.kind`.

    base: the rate after the warm-up. Beyond total_tokens the rate stays base * section.min_ratio.
    """
    warmup = section.warmup_tokens(total_tokens)
    if tokens < warmup:
        # Half a token in, so that the first step moves.
        return base * (tokens + 0.5) / (warmup + 0.5)
    if section.kind == "constant":
        return base
    begin = warmup
    if section.kind == "wsd":
        begin = max(warmup, total_tokens - section.decay_tokens(total_tokens))
    shape = section.decay_shape if section.kind == "wsd" else section.kind
    if tokens < begin:
        return base
    progress = min(1.0, (tokens - begin) / max(1.0, total_tokens - begin))
    return base * (section.min_ratio + (1.0 - section.min_ratio) * SHAPES[shape](progress))
