"""Exponential moving average of a model's weights.

    e <- e + (1 - decay) (w - e)        after every step, from e = the initial weights

There is no correction of the start: e is the initial weights' share decay^n, and an average of the n steps since. With
decay = 0.999 the start is gone (below 1%) after 4,600 steps.

Reference: Polyak and Juditsky 1992, SIAM J. Control Optim. 30(4); the exponential form as in Tarvainen and Valpola 2017,
arXiv:1703.01780.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from seqengine.parallel.sharded import local_part

PREFIX = "ema."


class Ema:
    """The averaged weights of a model, whole or sharded by FSDP2 as its parameters are.

    decay:  share of the average that a step keeps, in [0, 1).
    Dtypes: float32, or float64 for float64 weights.
    Memory: one copy of the weights, sharded as they are; buffers are not averaged.
    Raises: ValueError for a decay outside [0, 1), or a model whose parameters are not those of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Ema: decay must lie in [0, 1); got {decay}.")
        self.decay = decay
        self._averages = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in _parameters(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, *, tokens_step: int) -> None:
        """Move the average after a step on `tokens_step` tokens; a step on none changed nothing, and moves nothing."""
        if tokens_step < 0:
            raise ValueError(f"Ema.update: tokens_step must be at least 0; got {tokens_step}.")
        if tokens_step == 0:
            return
        weights = self._matched(model)
        averages = [local_part(average) for average in self._averages.values()]
        wide = [local_part(weight).to(average.dtype) for weight, average in zip(weights, averages, strict=True)]
        torch._foreach_lerp_(averages, wide, 1.0 - self.decay)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Begin anew from the model's present weights."""
        for weight, average in zip(self._matched(model), self._averages.values(), strict=True):
            local_part(average).copy_(local_part(weight))

    def tensors(self) -> dict[str, Tensor]:
        """The averages by "ema." and the name of the parameter: not copies, and DTensors where the parameters are."""
        return {f"{PREFIX}{name}": average for name, average in self._averages.items()}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The averages as the model's weights; afterwards the trained ones, bit for bit, whatever happened in between.

        Memory: another copy of the weights meanwhile. With sharded parameters every rank must enter and leave.
        """
        weights = self._matched(model)
        trained = [local_part(weight).clone() for weight in weights]
        try:
            self._write(model, weights, [local_part(average) for average in self._averages.values()])
            yield
        finally:
            self._write(model, weights, trained)

    @torch.no_grad()
    def _write(self, model: nn.Module, weights: list[Tensor], values: list[Tensor]) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else a unit that is still gathered goes on with its old weights
        for weight, value in zip(weights, values, strict=True):
            local_part(weight).copy_(value)

    def _matched(self, model: nn.Module) -> list[Tensor]:
        """The model's parameters in the order of the averages."""
        found = _parameters(model)
        if found.keys() != self._averages.keys():
            odd = sorted(found.keys() ^ self._averages.keys())
            raise ValueError(
                f"Ema: the model must have the averaged parameters and no others; got a difference in {odd[:4]}."
            )
        for name, average in self._averages.items():
            if found[name].shape != average.shape:
                got = f"{tuple(found[name].shape)} and {tuple(average.shape)}"
                raise ValueError(f"Ema: {name} must have the shape of its average; got {got}.")
        return [found[name] for name in self._averages]


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """By name; of units of FSDP2 that a forward pass left gathered, the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
