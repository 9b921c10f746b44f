"""`seqengine demo`: the main job from end to end, with the commands that a user would type.

Train with the sequence split over two processes, evaluate the checkpoint on one, compare the two losses, and set the result
beside what simpler means reach on the same bases.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from seqengine.config.load import load
from seqengine.config.run import RunConfig
from seqengine.data.markov import markov_bits
from seqengine.data.packed import PackedGenome, pack
from seqengine.data.stream import validation_indices
from seqengine.data.synthetic import entropy_floor
from seqengine.data.windows import Windows, split_windows
from seqengine.errors import FAILED
from seqengine.launch.curve import draw_curve
from seqengine.metrics import bits, read_metrics

CONFIG = "demo"
TOLERANCE_NATS = 1e-5
"""Largest difference between the loss of two processes and of one."""


def run_demo(fasta: Path | None, overrides: Sequence[str]) -> int:
    """Run the commands, print the table, draw the curve; 0 if every step worked and the two losses agree."""
    run_dir = _next_directory(Path("runs"))
    settings = [f"run.dir={run_dir}", *overrides]
    if fasta is not None:
        settings += ["data.source=fasta", f"data.fasta={fasta}", "data.rc_prob=0.5"]
    config = load(CONFIG, settings).config  # bad input is told before anything starts
    code = _seqengine("train", CONFIG, *settings)
    if code != 0:
        return code
    trained = [line for line in read_metrics(run_dir) if line.get("split") == "valid"][-1]["loss"]
    print("\nThe same checkpoint on one process:")
    command = [sys.executable, "-m", "seqengine", "eval", str(run_dir), "parallel.sequence=1", "--json"]
    print(f"$ seqengine {' '.join(command[3:])}", flush=True)
    evaluation = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if evaluation.returncode != 0:
        return evaluation.returncode
    alone = float(json.loads(evaluation.stdout)["loss"])
    difference = abs(alone - trained)
    print(
        f"loss on {config.parallel.sequence} processes {trained:.7f}, on one {alone:.7f}: they differ by {difference:.1e} nats"
    )
    if difference > TOLERANCE_NATS:
        print(f"seqengine: the two losses must agree to {TOLERANCE_NATS:g} nats", file=sys.stderr)
        return FAILED
    levels = _levels(config)
    _print_table(levels, bits(alone))
    curve = draw_curve(run_dir, run_dir / "curve.png", levels)
    print(f"curve       {curve}\nmetrics     {run_dir / 'metrics.jsonl'}\ncheckpoint  {run_dir / 'ckpt'}")
    return 0


def _next_directory(parent: Path) -> Path:
    """runs/demo-1, or the next number that is free: an earlier demo is never overwritten."""
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"


def _seqengine(*arguments: str) -> int:
    print(f"$ seqengine {' '.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "seqengine", *arguments], check=False).returncode


def _levels(config: RunConfig) -> dict[str, float]:
    """Bits per base of simpler means, on the validation windows that the model is evaluated on."""
    genome = pack(config.data)
    windows = split_windows(genome, config.data)
    valid = windows["valid"]
    chosen = validation_indices(len(valid), config.eval.windows)
    levels = {"order-5 Markov": markov_bits(windows["train"].regions, valid, chosen, order=5)}
    if config.data.source == "synthetic":
        levels = {"entropy floor": _floor(config, genome, valid, chosen), **levels}
    return levels


def _floor(config: RunConfig, genome: PackedGenome, valid: Windows, chosen: Sequence[int]) -> float:
    starts = np.array([valid.start(i) for i in chosen])
    targets = (starts[:, None] + np.arange(1, config.data.seq_len + 1)).ravel()
    return entropy_floor(genome.tokens(), config.data.synthetic, targets)


def _print_table(levels: dict[str, float], reached: float) -> None:
    table = Table(title="validation windows", show_header=True, header_style="bold")
    table.add_column("predictor")
    table.add_column("bits per base", justify="right")
    for name, level in {"uniform guess": 2.0, **levels, "HyenaDNA, this run": reached}.items():
        table.add_row(name, f"{level:.4f}")
    Console().print(table)
