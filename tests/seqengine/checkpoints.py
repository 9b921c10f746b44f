"""Small checkpoints for tests: of plain tensors and shards, on any number of ranks, and ways to damage them."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from seqengine.checkpoint.manifest import MANIFEST, manifest_text, read_manifest
from seqengine.checkpoint.state import Progress, Record, rng_tensors
from seqengine.checkpoint.store import CheckpointStore
from seqengine.parallel.mesh import Mesh

CPU = torch.device("cpu")
EVERYTHING = ("model.", "optim.", "rng.")


def mesh_of(group: Any) -> Mesh:
    return Mesh.single(CPU) if group is None or group.size() == 1 else Mesh.create(group.size(), 1, CPU)


def single() -> Mesh:
    return Mesh.single(CPU)


def values(seed: int = 1) -> dict[str, torch.Tensor]:
    """Whole tensors: odd shapes, scalars, empty ones, several dtypes."""
    noise = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(7, 5, generator=noise),
        "model.half": torch.randn(33, generator=noise).bfloat16(),
        "model.empty": torch.zeros(0, 3),
        "optim.weight.step": torch.tensor(float(seed)),
        "optim.weight.exp_avg": torch.randn(7, 5, generator=noise, dtype=torch.float64),
        "optim.sharded.exp_avg": torch.randn(5, 4, generator=noise),
    }


def blank() -> dict[str, torch.Tensor]:
    """Of the same shapes, to read into."""
    return {name: torch.full_like(tensor, -1) for name, tensor in values().items()}


def sharded(tensors: dict[str, torch.Tensor], mesh: Mesh, dim: int = 0) -> dict[str, torch.Tensor]:
    """Those with "sharded" in their name as DTensors over all ranks."""
    if mesh.size == 1:
        return tensors
    ranks = DeviceMesh("cpu", list(range(mesh.size)))
    return {
        name: distribute_tensor(tensor, ranks, [Shard(dim)]) if "sharded" in name else tensor
        for name, tensor in tensors.items()
    }


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DTensors gathered."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def record(mesh: Mesh, step: int, tokens: int | None = None) -> Record:
    return Record(
        progress=Progress(step, step * 100 if tokens is None else tokens, step * 2, 1.5, stage=1),
        stream={"seed": 1, "epoch": 0, "samples": 2 * step},
        mesh=mesh.axes,
        data_hash="d" * 64,
        extra={"spikes": [1, 2]},
    )


def save(
    folder: Path, step: int = 5, *, mesh: Mesh | None = None, seed: int = 1, tokens: int | None = None, **options: Any
):
    """A checkpoint of `values(seed)` and this rank's random state; returns its directory."""
    mesh = mesh or single()
    store = CheckpointStore(folder, mesh, **options)
    store.save(sharded(values(seed), mesh) | rng_tensors(mesh.rank, CPU), record(mesh, step, tokens))
    directory = store.wait()
    store.close()
    return directory


def save_on(group: Any, folder: Path, step: int = 5) -> str:
    """For run_ranks."""
    torch.manual_seed(100 + group.rank())
    return save(folder, step, mesh=mesh_of(group)).name


def read(directory: Path, mesh: Mesh | None = None) -> dict[str, torch.Tensor]:
    """All but the random states, whole, on one rank."""
    tensors = blank()
    CheckpointStore(directory.parent, mesh or single()).load(directory, tensors, prefixes=("model.", "optim."))
    return tensors


def is_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def sign_again(directory: Path) -> None:
    """A manifest that agrees with the files as they are now: what someone with bad intent would write."""
    names = read_manifest(directory)
    hashes = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}
    (directory / MANIFEST).write_text(manifest_text(hashes))
