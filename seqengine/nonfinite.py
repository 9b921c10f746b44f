"""What a step that is not finite leaves behind: RUN/nonfinite/step-N-rank-R.json, with its samples and norms by parameter."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seqengine.parallel.sharded import local_part
from seqengine.runfiles import write_whole

NONFINITE = "nonfinite"


def write_report(
    run_dir: Path,
    *,
    rank: int,
    step: int,
    samples: Sequence[int],
    loss: float,
    norms: Mapping[str, float],
    weights: Mapping[str, float] | None = None,
) -> Path:
    """Write the report of one rank, aside and renamed; returns its path.

    samples: numbers of the samples that this rank read.
    norms:   of gradients by parameter, `layer_norms(model)`; of this rank's part of them if they are sharded.
    weights: of the parameters themselves, `layer_norms(model, of="weights")`, before the step.
    JSON has no numbers for what is not finite: it is written as "nan", "inf" or "-inf".
    """
    parts = {"gradients": norms, **({} if weights is None else {"weights": weights})}
    report = {
        "step": step,
        "rank": rank,
        "samples": list(samples),
        "loss": _number(loss),
        "not_finite": {
            what: [name for name, x in part.items() if not math.isfinite(x)] for what, part in parts.items()
        },
        "norms": {what: {name: _number(x) for name, x in part.items()} for what, part in parts.items()},
    }
    path = run_dir / NONFINITE / f"step-{step}-rank-{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(report, indent=1) + "\n")
    return path


@torch.no_grad()
def layer_norms(model: nn.Module, *, of: Literal["gradients", "weights"] = "gradients") -> dict[str, float]:
    """Euclidean norms by parameter name, of what this rank holds; a parameter without a gradient is left out.

    In float64, so that large but finite values stay finite. One transfer for each device, and no message between ranks.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if of == "gradients" else parameter
        if tensor is not None:
            tensors[name] = _local(tensor)
    found: dict[str, float] = {}
    for device in {tensor.device for tensor in tensors.values()}:
        here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        values: list[Any] = torch.stack([_norm(tensor) for tensor in here.values()]).tolist()
        found.update(zip(here, values))
    return {name: found[name] for name in tensors}


def _local(tensor: Tensor) -> Tensor:
    local = local_part(tensor)
    return torch.view_as_real(local) if local.is_complex() else local


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(float(value))
