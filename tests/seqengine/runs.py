"""Small runs for tests: a config on the synthetic genome, and training in this process or on forked ranks."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from seqengine.config.load import Loaded, load
from seqengine.data.source import open_source
from seqengine.launch.environment import Processes
from seqengine.launch.process import mesh_shape
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
    """Train over forked ranks; returns of each rank the loss of the last evaluation, and its weights.

    stop_at: the last rank asks to stop during the step after that many; the loss is then None. Other options: those of train.
    """
    loaded = config(folder, *overrides)
    open_source(loaded.config.data)
    return run_ranks(num_ranks, _train, loaded, options)


def _train(group: Any, loaded: Loaded, options: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    import seqengine.train as module

    weights: dict[str, torch.Tensor] = {}
    trainer_class = module.Trainer

    stop_at = options.pop("stop_at", None)

    class Recording(trainer_class):
        def step(self) -> Any:
            result = super().step()
            if self.progress.step == stop_at and self.mesh.rank == self.mesh.size - 1:
                self.request._reason = "the test"  # one rank is asked, after this step's messages
            return result

        def train(self, metrics: Any) -> Any:
            try:
                return super().train(metrics)
            finally:
                weights.update(whole_weights(self.backend))

    module.Trainer = Recording
    os.environ["LOCAL_RANK"] = str(group.rank())  # DeepSpeed asks for it
    if loaded.config.parallel.backend == "deepspeed" or loaded.config.compile.enable:
        warnings.simplefilter("ignore")  # DeepSpeed's own, about torch's names and schedulers; the compiler's
    size = group.size()
    device = torch.device("cpu")
    groups, shards = mesh_shape(loaded.config, Processes(group.rank(), size, launched=True))
    mesh = (
        Mesh.single(device)
        if size == 1
        else Mesh.create(groups, loaded.config.parallel.sequence, device, num_shards=shards)
    )
    try:
        return train(loaded, open_source(loaded.config.data), mesh, **options).loss, weights
    except module.Preempted:
        return None, weights


def whole_weights(backend: Any) -> dict[str, torch.Tensor]:
    """Plain copies: all of them, or of ZeRO this rank's share."""
    found = {k: v for k, v in backend.tensors().items() if k.startswith("model.")}
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in found.items()}


def losses(folder: Path, key: str = "loss") -> list[float]:
    """Of the training lines, in order."""
    return [line[key] for line in read_metrics(folder / "run") if "split" not in line]


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[k], b[k]) for k in a)
