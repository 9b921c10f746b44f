"""The curve of a run as a PNG: bits per token over tokens, training and validation."""

from collections.abc import Mapping
from pathlib import Path

from seqengine.errors import InputError
from seqengine.metrics import read_metrics


def draw_curve(run_dir: Path, target: Path, levels: Mapping[str, float]) -> Path:
    """Draw RUN/metrics.jsonl, with horizontal lines for `levels` (name -> bits per token).

    Raises InputError if the run has no metrics or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("curve: matplotlib is not installed; pip install 'seqengine-train[plot]'.") from error
    lines = read_metrics(run_dir)
    training = [line for line in lines if "split" not in line]
    valid = [line for line in lines if line.get("split") == "valid"]
    if not training:
        raise InputError(f"{run_dir}: must have training lines in metrics.jsonl to draw; there are none.")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([x["tokens"] for x in training], [x["bits_per_token"] for x in training], label="training", linewidth=1)
    axes.plot(
        [x["tokens"] for x in valid], [x["bits_per_token"] for x in valid], "o-", label="validation", markersize=4
    )
    for (name, level), color in zip(levels.items(), ("tab:green", "tab:gray", "tab:purple"), strict=False):
        axes.axhline(level, linestyle="--", linewidth=1, color=color, label=f"{name}: {level:.3f}")
    axes.set(xlabel="tokens", ylabel="bits per token", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)
    return target
