"""What a checkpoint holds: tensors by name, and a small record of where the run stands.

Tensors: `model.<name>`, `optim.<name>.<moment>`, `rng.rank-<N>`. The learning rate, the decay and the schedule are not
saved: they follow from the config and the tokens seen.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqengine.errors import InputError

RECORD = "engine.json"
FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    """Windows consumed over all ranks: with the seed, the whole state of the data stream."""
    seconds: float = 0.0
    """Time spent training, over all lives of the run."""


@dataclass(frozen=True)
class Record:
    """engine.json: everything of a checkpoint that is not a tensor."""

    progress: Progress
    stream: dict[str, int]
    mesh: dict[str, int]
    data_hash: str
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        (directory / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> "Record":
        """Raises InputError if the file is of another format."""
        raw: dict[str, Any] = json.loads((directory / RECORD).read_text())
        if raw.get("format") != FORMAT:
            raise InputError(f"{directory}: checkpoint format must be {FORMAT}; got {raw.get('format')}.")
        return cls(**{**raw, "progress": Progress(**raw["progress"])})


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights themselves, not copies: loading fills them in place."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments by parameter name, made first where the optimiser has not stepped yet."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors.update({f"optim.{name}.{moment}": state[moment] for moment in MOMENTS})
    return tensors


def rng_tensors(rank: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's random state."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return {f"rng.rank-{rank}": torch.cat(states)}


def restore_rng(tensors: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """The inverse of `rng_tensors`."""
    saved = tensors[f"rng.rank-{rank}"]
    size = torch.get_rng_state().numel()
    torch.set_rng_state(saved[:size])
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved[size:], device)
