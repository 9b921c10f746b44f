"""FSDP2 and HSDP: weights, gradients and moments cut over shard x sequence; a block is gathered while it is used."""

from typing import Any, cast

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from seqengine.backends.backend import Backend
from seqengine.parallel.sharding import fully_shard_model

METHODS = ("objective", "loss")
"""Of LanguageModel, besides forward, that use weights."""


class FullySharded(Backend):
    """Gradients of all but a step's last micro-batch stay whole and unsummed on each rank, and are sent with the last."""

    def start(self) -> None:
        fully_shard_model(self.model, self.mesh, blocks=self.model.each_block(), methods=METHODS)
        super().start()

    def accumulate(self, ids: Tensor, labels: Tensor, num_labels: float, *, last: bool, **options: Any) -> Tensor:
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        return super().accumulate(ids, labels, num_labels, last=last, **options)

    def finish(self) -> None:
        """The last backward has summed them."""

    def tensors(self) -> dict[str, Tensor]:
        cast(FSDPModule, self.model).reshard()  # after an evaluation what is in no block is still whole
        return super().tensors()
