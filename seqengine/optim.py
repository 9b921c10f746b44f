"""AdamW with parameter groups chosen by name, the learning rate as a function of tokens, and clipping.

Groups go by name, not by attributes of parameters: sharded training replaces the parameter objects, names survive.
"""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from seqengine.config.optim import OptimSection, ScheduleSection
from seqengine.errors import InputError
from seqengine.mixers.mixer import ParameterRule
from seqengine.model import LanguageModel

UNDECAYED = ("*norm*", "*bias*", "*embedding*", "*filter*")
"""Names without weight decay unless a group says otherwise: only matrices that mix channels are decayed."""


def build_optimizer(model: LanguageModel, section: OptimSection) -> torch.optim.AdamW:
    """AdamW over `model`, its parameters grouped by (weight decay, lr scale): the config's groups, then the mixers' rules.

    Raises InputError if a group's pattern matches no parameter, or only parameters that an earlier group has taken.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    settings = group_settings(names, section, model.rules)
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, key in settings.items():
        groups.setdefault(key, []).append(parameters[name])
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=True,
    )


def group_settings(
    names: Iterable[str], section: OptimSection, rules: Mapping[str, ParameterRule] | None = None
) -> dict[str, tuple[float, float]]:
    """(weight decay, lr scale) of every parameter name. rules: those of the model's mixers, by pattern over names."""
    taken = dict.fromkeys(section.groups, 0)
    settings = {}
    for name in names:
        decay = 0.0 if any(fnmatchcase(name, pattern) for pattern in UNDECAYED) else section.weight_decay
        rule = next((r for pattern, r in (rules or {}).items() if fnmatchcase(name, pattern)), ParameterRule())
        decay = decay if rule.weight_decay is None else rule.weight_decay
        scale = rule.lr_scale if rule.lr_most is None else min(rule.lr_scale, rule.lr_most / section.lr)
        group = next((g for g in section.groups if fnmatchcase(name, g.match)), None)
        if group is not None:
            taken[group] += 1
            decay = decay if group.weight_decay is None else group.weight_decay
            scale = group.lr_scale
        settings[name] = (decay, scale)
    unused = [g.match for g, count in taken.items() if count == 0]
    if unused:
        raise InputError(*(_unused(pattern, settings) for pattern in unused))
    return settings


def _unused(pattern: str, settings: Mapping[str, tuple[float, float]]) -> str:
    return (
        f"optim.groups: match = {pattern!r} must match a parameter that no earlier group has; it matches none of "
        f"{len(settings)}, such as {', '.join(list(settings)[:4])}."
    )


def learning_rate(tokens: int, total_tokens: int, base: float, section: ScheduleSection) -> float:
    """The rate for the step that begins after `tokens` tokens: linear warm-up, then the decay of `section.kind`.

    A pure function, so a resumed run, on any number of ranks, goes on exactly where it was.
    """
    warmup = section.warmup if isinstance(section.warmup, int) else section.warmup * total_tokens
    if tokens < warmup:
        # Half a token in, so that the first step moves.
        return base * (tokens + 0.5) / (warmup + 0.5)
    if section.kind == "constant":
        return base
    progress = min(1.0, (tokens - warmup) / max(1.0, total_tokens - warmup))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if section.kind == "cosine" else 1.0 - progress
    return base * (section.min_ratio + (1.0 - section.min_ratio) * shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """L2 norm over all gradients, after they were summed over the mesh; a scalar, accumulated in float64."""
    norms = [p.grad.norm(dtype=torch.float64) for p in model.parameters() if p.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64)


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: float, limit: float) -> None:
    """Scale all gradients so that their norm is at most `limit`; 0 means no limit."""
    if limit > 0.0 and norm > limit:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, limit / norm)
