"""A new mixer is one file and one line: in a copy of the program, a toy is added so, and trained, split and generated with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TOY = '''
"""y_t = x_t + decay * y_{t-1}."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqengine.config.values import Section
from seqengine.mixers.mixer import Mixer, Place, carried, context_of
from seqengine.parallel import api as parallel


class ToyConfig(Section):
    """[model.mixers.toy]: a moving average."""

    log_decay: float = -0.5
    """Of one token."""


class ToyState(NamedTuple):
    modal: Tensor


class Toy(Mixer):
    def __init__(self, config: ToyConfig, place: Place) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.full((place.d_model, 1), config.log_decay))
        self.residues = nn.Parameter(torch.ones(place.d_model, 1))

    def forward(self, x, *, state=None, ctx=None):
        before, goes_on = carried(state)
        y, after = parallel.modal_conv(
            x.transpose(1, 2), self.log_decay, self.residues, ctx=context_of(x, ctx),
            initial_state=None if before is None else before.modal, output_final_state=goes_on,
        )
        return y.transpose(1, 2), None if after is None else ToyState(after)
'''
CONFIG = """
[model]
arch = "lm"
pattern = ["toy", "hyena"]
d_model = 8
max_len = 64
mixers = { toy = { log_decay = -0.25 }, hyena = { filter = { order = 8 } } }
[data]
source = "synthetic"
seq_len = 32
synthetic = { length = 20000, lag = 6 }
[train]
steps = 2
batch_tokens = 256
[parallel]
sequence = 2
"""


def seqengine(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "seqengine", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_mixer_is_one_file_and_one_line(tmp_path):
    for name in ("kernels", "parallel", "launch", "seqengine", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "seqengine/mixers/toy.py").write_text(TOY)
    registry = tmp_path / "seqengine/mixers/registry.py"
    lines = registry.read_text().splitlines()
    lines.insert(lines.index('    "ssd": "ssd.Ssd",') + 1, '    "toy": "toy.Toy",')
    registry.write_text("\n".join(lines) + "\n")
    (tmp_path / "toy.toml").write_text(CONFIG)
    assert "step 2/2" in seqengine(tmp_path, "train", "toy.toml", "run.dir=run")
    line = seqengine(tmp_path, "generate", "run", "--prompt", "ACGT", "-n", "6").strip()
    assert len(line) == 10
