"""torch's DistributedDataParallel: weights whole on every rank, gradients summed bucket by bucket during the backward."""

from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from seqengine.backends.backend import Backend, arithmetic
from seqengine.config.run import RunConfig
from seqengine.model import LanguageModel, Objective
from seqengine.parallel.data_parallel import sum_in_buckets
from seqengine.parallel.mesh import Mesh


class ObjectiveModule(nn.Module):
    """LanguageModel.objective as a forward, its arithmetic included, for wrappers that know of nothing else."""

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: Mesh) -> None:
        super().__init__()
        self.model = model
        self._arithmetic = partial(arithmetic, config, mesh.device)

    def forward(self, ids: Tensor, labels: Tensor, **options: Any) -> Objective:
        with self._arithmetic():
            return self.model.objective(ids, labels, **options)


class DataParallel(Backend):
    """The sum of gradients hides behind the backward of a step's last micro-batch."""

    def start(self) -> None:
        super().start()
        self._wrapped = sum_in_buckets(ObjectiveModule(self.model, self.config, self.mesh), self.mesh)

    def accumulate(self, ids: Tensor, labels: Tensor, num_labels: float, *, last: bool, **options: Any) -> Tensor:
        with nullcontext() if last else self._wrapped.no_sync():
            result: Objective = self._wrapped(ids, labels, z_loss=self.config.optim.z_loss, **options)
            (result.loss / num_labels).backward()
        return result.nats

    def begin(self) -> None:
        """In place: gradients are views of the buckets."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def finish(self) -> None:
        """The last backward has summed them."""

    def close(self) -> None:
        del self._wrapped
