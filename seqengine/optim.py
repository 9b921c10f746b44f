"""The optimisers of a model, with parameter groups chosen by name, and clipping.

Groups go by name, not by attributes of parameters: sharded training replaces the parameter objects, names survive. Parameters
may be whole or sharded by FSDP2 (DTensors); an optimiser is made after the sharding.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from seqengine.config.optim import OptimSection
from seqengine.errors import InputError
from seqengine.mixers.mixer import ParameterRule
from seqengine.model import LanguageModel
from seqengine.muon import Muon
from seqengine.parallel.sharded import is_sharded, local_part
from seqengine.schedule import learning_rate

__all__ = [
    "Optimizers",
    "build_optimizer",
    "clip_gradients",
    "gradient_norm",
    "group_settings",
    "learning_rate",
    "muon_names",
    "set_learning_rate",
]

UNDECAYED = ("*norm*", "*bias*", "*embedding*", "*filter*")
"""Names without weight decay unless a group says otherwise: only matrices that mix channels are decayed."""
NOT_FOR_MUON = (*UNDECAYED, "*decay*", "*beta_proj*", "*dt_proj*")
"""Linear layers inside blocks that stay with AdamW: networks that make filters, and the small ones that make gates."""
FUSED_DEVICES = ("cpu", "cuda")
"""Where AdamW is one kernel over all parameters; elsewhere it is a loop of vectorised ones (foreach)."""


class Optimizers:
    """One or two torch optimisers over different parameters, which step together."""

    def __init__(self, each: Iterable[torch.optim.Optimizer]) -> None:
        self.each = tuple(each)
        self._owner = {id(p): one for one in self.each for group in one.param_groups for p in group["params"]}

    def step(self) -> None:
        """Update all parameters that have a gradient."""
        for optimizer in self.each:
            optimizer.step()

    def zero_grad(self) -> None:
        """Let all gradients go."""
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all optimisers; changes to one are changes to its optimiser."""
        return [group for optimizer in self.each for group in optimizer.param_groups]

    def state_of(self, parameter: Tensor) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        """The optimiser that has a parameter, and its state of it: empty before the first step. Raises KeyError."""
        optimizer = self._owner[id(parameter)]
        return optimizer, optimizer.state[parameter]


def build_optimizer(
    model: LanguageModel, section: OptimSection, *, names: Mapping[str, nn.Parameter] | None = None
) -> Optimizers:
    """AdamW over `model`, or Muon for its matrices (`muon_names`) and AdamW for the rest.

    Parameters are grouped by (weight decay, lr scale): the config's groups, then the mixers' rules.
    names: the parameters to train, by the names of the bare model; the model's own if not given.
    Raises InputError if a group's pattern matches no parameter, or only parameters that an earlier group has taken.
    """
    given = dict(model.named_parameters()) if names is None else names
    parameters = {name: parameter for name, parameter in given.items() if parameter.requires_grad}
    settings = group_settings(parameters, section, model.rules)
    for_muon = set(muon_names(model, parameters)) if section.name == "muon" else set()
    muon_share = 1.0 if section.muon_lr is None else section.muon_lr / section.lr
    matrices: dict[tuple[float, float], list[nn.Parameter]] = {}
    others: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, (decay, scale) in settings.items():
        if name in for_muon:
            matrices.setdefault((decay, scale * muon_share), []).append(parameters[name])
        else:
            others.setdefault((decay, scale), []).append(parameters[name])
    each: list[torch.optim.Optimizer] = []
    if matrices:
        each.append(
            Muon(
                _param_groups(matrices),
                lr=section.lr,
                momentum=section.muon_momentum,
                num_steps=section.muon_ns_steps,
                dtype=torch.bfloat16 if section.muon_precision == "bf16" else None,
            )
        )
    is_fused = all(p.device.type in FUSED_DEVICES for ps in others.values() for p in ps)
    how = {"fused": True} if is_fused else {"foreach": True}
    if others:
        each.append(
            torch.optim.AdamW(_param_groups(others), lr=section.lr, betas=section.betas, eps=section.eps, **how)
        )
    return Optimizers(each)


def _param_groups(groups: Mapping[tuple[float, float], list[nn.Parameter]]) -> list[dict[str, Any]]:
    return [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()]


def muon_names(model: LanguageModel, names: Mapping[str, nn.Parameter] | None = None) -> list[str]:
    """Names of the parameters that Muon takes: weights of linear layers inside blocks that mix channels.

    Not taken are the embedding, the head, whatever is no weight of an nn.Linear (norms, biases, convolutions, taps, poles),
    what a mixer gives a learning rate of its own, and linear layers that make filters or gates (NOT_FOR_MUON).
    """
    linear = {id(m.weight) for block in model.each_block() for m in block.modules() if isinstance(m, nn.Linear)}
    own_rate = [pattern for pattern, rule in model.rules.items() if rule.lr_scale != 1.0 or rule.lr_most is not None]
    excluded = (*NOT_FOR_MUON, *own_rate)
    given = dict(model.named_parameters()) if names is None else names
    return [
        name
        for name, parameter in given.items()
        if id(parameter) in linear and not any(fnmatchcase(name, pattern) for pattern in excluded)
    ]


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


def set_learning_rate(optimizer: Optimizers | torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """L2 norm over all gradients, after they were summed over the mesh; a scalar, accumulated in float64.

    With sharded parameters every rank must call: the ranks add up their parts.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if any(is_sharded(gradient) for gradient in gradients):
        from seqengine.parallel import sharding

        return sharding.gradient_norm(model)
    norms = [gradient.norm(dtype=torch.float64) for gradient in gradients]
    return torch.stack(norms).norm() if norms else torch.zeros((), dtype=torch.float64)


@torch.no_grad()
def clip_gradients(model: nn.Module, norm: float, limit: float) -> None:
    """Scale all gradients so that their norm is at most `limit`; 0 means no limit."""
    if limit > 0.0 and norm > limit:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_([local_part(g) for g in gradients], limit / norm)
