"""Small runs for tests: a config on the synthetic genome, and training in this process or on forked ranks."""

from pathlib import Path
from typing import Any

import torch

from seqengine.config.load import Loaded, load
from seqengine.data.packed import pack
from seqengine.metrics import read_metrics
from seqengine.parallel.mesh import Mesh
from seqengine.train import train
from tests.ranks import run_ranks

BASE = """
[model]
d_model = 8
n_layer = 2
max_len = 64
filter = { order = 8 }
[data]
source = "synthetic"
seq_len = 32
synthetic = { length = 20000, lag = 6 }
[train]
steps = 6
batch_tokens = 256
[optim]
lr = 0.01
[eval]
windows = 6
[log]
every = 1
[ckpt]
every = 1000
"""


def config(folder: Path, *overrides: str) -> Loaded:
    """A config whose run and cache lie in `folder`."""
    file = folder / "test.toml"
    if not file.exists():
        file.write_text(BASE)
    return load(file, [f"run.dir={folder}/run", f"data.cache={folder}/cache", *overrides])


def train_on(num_ranks: int, folder: Path, *overrides: str, **options: Any) -> list[Any]:
    """Train over forked ranks; returns each rank's weights and the loss of the last evaluation."""
    loaded = config(folder, *overrides)
    pack(loaded.config.data)
    return run_ranks(num_ranks, _train, loaded, options)


def _train(group: Any, loaded: Loaded, options: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    import seqengine.train as module

    weights: dict[str, torch.Tensor] = {}
    trainer_class = module.Trainer

    class Recording(trainer_class):
        def train(self, metrics: Any) -> Any:
            result = super().train(metrics)
            weights.update({k: v.clone() for k, v in self.model.state_dict().items()})
            return result

    module.Trainer = Recording
    size = group.size()
    device = torch.device("cpu")
    sequence = loaded.config.parallel.sequence
    mesh = Mesh.single(device) if size == 1 else Mesh.create(size // sequence, sequence, device)
    evaluation = train(loaded, pack(loaded.config.data), mesh, **options)
    return evaluation.loss, weights


def losses(folder: Path, key: str = "loss") -> list[float]:
    """Of the training lines, in order."""
    return [line[key] for line in read_metrics(folder / "run") if "split" not in line]


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[k], b[k]) for k in a)
