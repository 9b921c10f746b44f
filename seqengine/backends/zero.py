"""DeepSpeed ZeRO 1, 2 and 3, with checkpoints that any other backend and any number of ranks can read.

DeepSpeed's own checkpoints hold one slice a rank and load on as many ranks only. Here every weight and moment is made whole,
one rank of P keeps it for the checkpoint, and loading cuts it again.
"""

import math
from typing import Any

import torch
from torch import Tensor

from seqengine.backends.backend import Backend
from seqengine.backends.ddp import ObjectiveModule
from seqengine.model import Objective
from seqengine.optim import build_optimizer
from seqengine.parallel import zero


class Zero(Backend):
    """DeepSpeed clips and steps; a step whose gradients are not finite it leaves out itself."""

    deals_out = True

    def start(self) -> None:
        config, section = self.config, self.config.parallel
        self.optimizers = build_optimizer(self.model, config.optim)
        (adamw,) = self.optimizers.each
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # counts samples for DeepSpeed's own prints; micro-batches are ours
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.train.clip,
            "zero_optimization": {"stage": section.zero},
            "zero_allow_untested_optimizer": True,
        }
        self._engine = zero.initialize_zero(
            ObjectiveModule(self.model, config, self.mesh), self.mesh, settings, optimizer=adamw
        )
        zero.prepare_moments(self._engine)

    def begin(self) -> None:
        """A step of DeepSpeed clears the gradients."""

    def accumulate(self, ids: Tensor, labels: Tensor, num_labels: float, *, last: bool, **options: Any) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        result: Objective = self._engine(ids, labels, z_loss=self.config.optim.z_loss, **options)
        zero.backward(self._engine, result.loss / num_labels, self.mesh)
        return result.nats

    def finish(self) -> None:
        """The last backward has summed them."""

    def update(self) -> float:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return math.inf if norm is None else float(norm)

    def objective(self, ids: Tensor, labels: Tensor, **options: Any) -> Objective:
        result: Objective = self._engine(ids, labels, **options)
        return result

    def tensors(self) -> dict[str, Tensor]:
        """Whole weights and moments on the CPU, each on one rank of P."""
        found: dict[str, Tensor] = {}
        if self.mesh.rank == 0:
            found |= {f"model.{name}": buffer for name, buffer in self._buffers().items()}
        steps = torch.tensor(zero.steps_taken(self._engine), dtype=torch.float32)
        for i, (name, parameter) in enumerate(self.model.named_parameters()):
            whole = zero.whole_parameter(parameter)
            if i % self.mesh.size == self.mesh.rank:
                found[f"model.{name}"] = whole[""].cpu()
                found |= {f"optim.{name}.{key}": whole[key].cpu() for key in zero.STATES}
                found[f"optim.{name}.step"] = steps.clone()
        return found

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """From the rank that read a weight to all, which cut it again."""
        names = [name for name, _ in self.model.named_parameters()]
        for i, (name, parameter) in enumerate(self.model.named_parameters()):
            source = i % self.mesh.size
            keys = {"": f"model.{name}"} | {key: f"optim.{name}.{key}" for key in zero.STATES}
            zero.set_whole_parameter(parameter, {k: tensors.get(key) for k, key in keys.items()}, self.mesh, source)
        first = tensors.get(f"optim.{names[0]}.step", torch.zeros(()))
        zero.set_steps_taken(self._engine, float(self.mesh.broadcast(first, 0)))
        for name, buffer in self._buffers().items():
            buffer.copy_(self.mesh.broadcast(tensors.get(f"model.{name}", buffer), 0))

    def _buffers(self) -> dict[str, Tensor]:
        """What a model saves besides its parameters."""
        saved = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in saved}

    def close(self) -> None:
        self._engine.destroy()
        del self._engine
