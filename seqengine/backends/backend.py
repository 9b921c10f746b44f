"""The part of a step that depends on who holds which weights, behind one interface.

The loss of a step is (sum over all labels of all ranks) / (number of those labels), whatever the backend, the mesh and the
number of micro-batches: every backend sums gradients over ranks and divides by nothing else.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from seqengine.checkpoint.state import model_tensors, optimizer_tensors
from seqengine.config.run import RunConfig
from seqengine.model import LanguageModel, Objective
from seqengine.optim import build_optimizer, clip_gradients, set_learning_rate
from seqengine.parallel import sharding
from seqengine.parallel.mesh import Mesh, reduce_gradients


def arithmetic(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where precision.params asks for it; filters, norms and losses stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision.params == "bf16")


class Backend:
    """Every rank holds all weights; gradients are summed over ranks in one message per dtype, after the last backward.

    The base of the others, which override what they do differently. Every rank calls every method, in the same order.
    """

    deals_out = False
    """`tensors` differ from rank to rank: each holds some of all."""

    def __init__(self, model: LanguageModel, config: RunConfig, mesh: Mesh) -> None:
        self.model, self.config, self.mesh = model, config, mesh
        self.start()

    def start(self) -> None:
        """Cut the model's weights, where they are cut, and make the optimiser."""
        self.optimizers = build_optimizer(self.model, self.config.optim)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next update."""
        set_learning_rate(self.optimizers, rate)

    def begin(self) -> None:
        """Before the first micro-batch of a step."""
        self.optimizers.zero_grad()

    def accumulate(self, ids: Tensor, labels: Tensor, num_labels: float, *, last: bool, **options: Any) -> Tensor:
        """Gradients of some windows, each label weighing 1 / num_labels; returns this rank's sum of nats, detached.

        last: of the step's micro-batches. options: those of LanguageModel.objective.
        """
        with arithmetic(self.config, self.mesh.device):
            result = self.model.objective(ids, labels, z_loss=self.config.optim.z_loss, **options)
        (result.loss / num_labels).backward()
        return result.nats

    def finish(self) -> None:
        """After the last backward: gradients become sums over all ranks."""
        reduce_gradients(self.model, self.mesh)

    def update(self) -> float:
        """Clip to train.clip and step, if the gradients are finite; returns their norm before, the same on every rank."""
        norm = float(sharding.gradient_norm(self.model))
        if math.isfinite(norm):
            clip_gradients(self.model, norm, self.config.train.clip)
            self.optimizers.step()
        return norm

    def objective(self, ids: Tensor, labels: Tensor, **options: Any) -> Objective:
        """LanguageModel.objective, for evaluation."""
        return self.model.objective(ids, labels, **options)

    @property
    def rate(self) -> float:
        """The largest learning rate, before each group's share."""
        groups = self.optimizers.param_groups
        return max((group["lr"] / group["lr_scale"] for group in groups if group["lr_scale"] > 0), default=0.0)

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments by name, as a checkpoint holds them. Saving reads them, loading fills them."""
        return model_tensors(self.model) | optimizer_tensors(self.model, self.optimizers)

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """After a checkpoint was read into `tensors`, which came from `tensors()`."""

    def close(self) -> None:
        """Let go of what must not outlive the process group."""
