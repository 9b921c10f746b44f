"""Lines of metrics, made up."""

import math
from typing import Any


def training(step: int, loss: float = 1.5, **more: float) -> dict[str, Any]:
    """As the trainer writes it, after 1000 tokens a step."""
    return {
        "step": step,
        "tokens": 1000 * step,
        "loss": loss,
        "bits_per_token": loss / math.log(2),
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 1234.5,
        "peak_memory_bytes": 3 * 2**30,
        "seconds": 2.0 * step,
        **more,
    }


def valid(step: int, loss: float = 1.25, split: str = "valid") -> dict[str, Any]:
    """An evaluation."""
    figures = {"loss": loss, "bits_per_token": loss / math.log(2), "windows": 6, "evaluated_tokens": 192}
    return {"split": split, "step": step, "tokens": 1000 * step, **figures}
