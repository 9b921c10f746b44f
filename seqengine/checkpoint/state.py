"""What a checkpoint holds: tensors by name, and a small record of where the run stands.

Tensors: `model.<name>`, `optim.<name>.<key>`, `rng.rank-<N>`, and what else a run gives. The learning rate, the decay and the
schedule are not saved: they follow from the config and the tokens seen.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqengine.errors import InputError
from seqengine.muon import Muon
from seqengine.optim import Optimizers

RECORD = "engine.json"
FORMAT = 2
READABLE = (1, 2)
"""Format 1 has no stage and no extra."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    """Windows consumed in this stage over all ranks: with the seed, the whole state of the data stream."""
    seconds: float = 0.0
    """Time spent training, over all lives of the run."""
    stage: int = 0
    """Index of the length stage."""


@dataclass(frozen=True)
class Record:
    """engine.json: everything of a checkpoint that is not a tensor."""

    progress: Progress
    stream: dict[str, int]
    mesh: Mapping[str, int | str]
    data_hash: str
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else a run wants back, as JSON."""
    format: int = FORMAT

    def text(self) -> str:
        """The file's contents, which no longer follow changes of `progress`."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def was_on(self, mesh: Mapping[str, int | str]) -> bool:
        """By ranks in the same places, so that their random states fit. An axis that an old record lacks had one rank."""
        return all(self.mesh.get(name, 1 if isinstance(of, int) else of) == of for name, of in mesh.items())

    @classmethod
    def read(cls, directory: Path) -> "Record":
        """Raises InputError if there is none, or it is of another format."""
        file = directory / RECORD
        try:
            raw = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: must be the record of a checkpoint: {error}.") from None
        if not isinstance(raw, dict) or raw.get("format") not in READABLE:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise InputError(
                f"{directory}: checkpoint format must be {' or '.join(map(str, READABLE))}; got {found}. "
                "Use the version of seqengine that wrote it."
            )
        try:
            record = cls(**{**raw, "progress": Progress(**raw["progress"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{file}: must be the record of a checkpoint: {error}.") from None
        wrong = record._wrong_values()
        if wrong:
            raise InputError(f"{file}: must be the record of a checkpoint: {', '.join(wrong)} of another type.")
        return record

    def _wrong_values(self) -> list[str]:
        """Names of what has a type that was never saved."""
        numbers = vars(self.progress)
        wrong = [k for k, v in numbers.items() if type(v) not in ((int, float) if k == "seconds" else (int,)) or v < 0]
        kinds = {"stream": dict, "mesh": dict, "data_hash": str, "versions": dict, "extra": dict}
        return wrong + [name for name, kind in kinds.items() if not isinstance(getattr(self, name), kind)]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights themselves, not copies: loading fills them in place."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: Optimizers | torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything the optimiser keeps of its parameters, by their names: `optim.<parameter>.<key>`. Not copies.

    What it has not made yet, as it has not stepped, is made first, as zeros. Plain numbers become tensors in its state.
    Raises TypeError for an optimiser whose first state is not known.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {}
    for one in optimizer.each if isinstance(optimizer, Optimizers) else (optimizer,):
        first = _first_state(one)
        for group in one.param_groups:
            for parameter in (p for p in group["params"] if p in names):
                state = one.state[parameter]
                if not state:
                    state.update(first(parameter, group))
                for key, value in state.items():
                    if not isinstance(value, Tensor):
                        state[key] = torch.as_tensor(value)
                    tensors[f"optim.{names[parameter]}.{key}"] = state[key]
    return tensors


def _first_state(optimizer: torch.optim.Optimizer) -> Callable[[nn.Parameter, dict[str, Any]], dict[str, Tensor]]:
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return _first_adam
    if isinstance(optimizer, Muon | torch.optim.Muon):
        return _first_muon
    raise TypeError(f"optimizer: must be Adam, AdamW or Muon; got {type(optimizer).__name__}")


def _first_adam(parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
    on_device = group.get("fused") or group.get("capturable")
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else None)
    moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])]
    return {"step": step, **{key: _zeros(parameter) for key in moments}}


def _first_muon(parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
    return {"momentum_buffer": _zeros(parameter)}


def _zeros(parameter: nn.Parameter) -> Tensor:
    """A DTensor for a DTensor."""
    return torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()


def rng_tensors(rank: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's random state."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return {f"rng.rank-{rank}": torch.cat(states)}


def restore_rng(tensors: Mapping[str, Tensor], rank: int, device: torch.device) -> None:
    """The inverse of `rng_tensors`."""
    saved = tensors[f"rng.rank-{rank}"]
    size = torch.get_rng_state().numel()
    torch.set_rng_state(saved[:size])
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved[size:], device)
