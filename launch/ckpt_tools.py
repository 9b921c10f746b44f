"""`seqengine ckpt ls`, `verify`, `diff` and `consolidate`: what a run's checkpoints are, and their weights in one file."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqengine.checkpoint.manifest import sync
from seqengine.checkpoint.reading import TensorReader
from seqengine.checkpoint.restore import find_checkpoint
from seqengine.checkpoint.state import Record
from seqengine.checkpoint.store import CheckpointStore, Found
from seqengine.config.write import changed
from seqengine.errors import InputError
from seqengine.parallel.mesh import Mesh
from seqengine.rundir import CheckpointTarget

DAMAGED = 1
MODEL, EMA = "model.", "ema."
SUFFIXES = (".safetensors", ".pt")


def list_checkpoints(run: Path, *, verify: bool) -> int:
    """One line a checkpoint, oldest first; returns the exit code. Raises InputError if this is no run's directory."""
    target, store = _open(run)
    if target.checkpoint is not None:
        raise InputError(f"{run}: must be a run's directory; it is a checkpoint. Give {target.run.path}.")
    rows = [("checkpoint", "step", "tokens", "date", "bytes", "mesh", *(["state"] if verify else []))]
    whole = True
    for name in store.names():
        directory = store.directory / name
        row = (name, *_describe(directory))
        if verify:
            damage = store.damage(directory)
            whole &= not damage
            row = (*row, f"damaged: {'; '.join(damage)}" if damage else "whole")
        rows.append(row)
    if len(rows) == 1:
        print(f"{run} has no checkpoints yet")
        return 0
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip())
    return 0 if whole else DAMAGED


def _describe(directory: Path) -> tuple[str, ...]:
    """Step, tokens, date, bytes and mesh; question marks for what a damaged record does not tell."""
    files = [p.stat() for p in directory.iterdir() if p.is_file()]
    size = f"{sum(f.st_size for f in files):,}"
    date = datetime.fromtimestamp(directory.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    try:
        record = Record.read(directory)
    except InputError:
        return ("?", "?", date, size, "?")
    mesh = " ".join(f"{axis}={value}" for axis, value in record.mesh.items())
    return (str(record.progress.step), f"{record.progress.tokens:,}", date, size, mesh)


def verify_checkpoints(path: Path) -> int:
    """Hash every file of a checkpoint, or of all of a run; returns the exit code. Raises InputError if there is none."""
    target, store = _open(path)
    chosen = (
        [target.checkpoint] if target.checkpoint is not None else [store.directory / name for name in store.names()]
    )
    if not chosen:
        raise InputError(f"{path}: must hold a checkpoint; it has none yet.")
    whole = True
    for directory in chosen:
        damage = store.damage(directory)
        whole &= not damage
        print(f"{directory}: {'damaged: ' + '; '.join(damage) if damage else 'whole'}")
    return 0 if whole else DAMAGED


def compare(first: Path, second: Path, *, as_json: bool) -> int:
    """What differs between two verified checkpoints; returns the exit code. Raises InputError if one is damaged."""
    a, b = (_find(path) for path in (first, second))
    config_a, config_b = (target.run.read_config(need_data=False).config for target, _ in (a, b))
    readers = [TensorReader(found.directory) for _, found in (a, b)]
    found: dict[str, Any] = {
        "checkpoints": [str(a[1].directory), str(b[1].directory)],
        "record": _changed_record(a[1].record, b[1].record),
        "config": {key: list(pair) for key, pair in changed(config_a, config_b).items()},
        **_compare_tensors(*readers),
    }
    print(json.dumps(found, default=str) if as_json else _words(found))
    return 0


def _changed_record(a: Record, b: Record) -> dict[str, list[Any]]:
    one, two = (dict(_flat(asdict(record))) for record in (a, b))
    return {key: [one.get(key), two.get(key)] for key in sorted({*one, *two}) if one.get(key) != two.get(key)}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _compare_tensors(a: TensorReader, b: TensorReader) -> dict[str, Any]:
    """Two at a time in memory."""
    both = sorted(a.shapes.keys() & b.shapes.keys())
    shapes = {name: [list(a.shapes[name]), list(b.shapes[name])] for name in both if a.shapes[name] != b.shapes[name]}
    dtypes = {name: [str(a.dtypes[name]), str(b.dtypes[name])] for name in both if a.dtypes[name] != b.dtypes[name]}
    gaps = {}
    for name in both:
        if name not in shapes:
            gaps[name] = _gap(*(_read(reader, name) for reader in (a, b)))
    ranked = sorted(gaps.items(), key=lambda item: (-item[1], item[0]))
    return {
        "only_in_first": sorted(a.shapes.keys() - b.shapes.keys()),
        "only_in_second": sorted(b.shapes.keys() - a.shapes.keys()),
        "shapes": shapes,
        "dtypes": dtypes,
        "max_abs_difference": {name: gap for name, gap in ranked if gap > 0.0},
        "same": sum(gap == 0.0 for gap in gaps.values()),
    }


def _read(reader: TensorReader, name: str) -> Tensor:
    tensors = reader.empty([name])
    reader.fill(tensors)
    return tensors[name]


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinity where one is not a number and the other is."""
    a, b = a.double(), b.double()
    differs = (a != b) & ~(a.isnan() & b.isnan())
    if not bool(differs.any()):
        return 0.0
    gap = (a - b).abs()[differs]
    return float(gap.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _words(found: Mapping[str, Any]) -> str:
    lines = [f"A  {found['checkpoints'][0]}", f"B  {found['checkpoints'][1]}"]
    for part in ("record", "config", "shapes", "dtypes"):
        lines += [f"{part:8} {key}: {old} -> {new}" for key, (old, new) in found[part].items()]
    lines += [f"only A   {name}" for name in found["only_in_first"]]
    lines += [f"only B   {name}" for name in found["only_in_second"]]
    lines += [f"{gap:8.1e} {name}" for name, gap in found["max_abs_difference"].items()]
    lines.append(f"{found['same']} tensors are the same, {len(found['max_abs_difference'])} differ")
    return "\n".join(lines)


def consolidate(path: Path, file: Path, *, ema: bool, replace: bool) -> int:
    """A checkpoint's weights, by the names of the model's state dict, in one file; returns the exit code. Raises InputError.

    ema: the averaged weights; the model's own buffers go with them.
    """
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file}: must end in {' or '.join(SUFFIXES)}; got {file.suffix!r}.")
    if file.exists() and not replace:
        raise InputError(f"{file}: exists; name another file, or give --force.")
    _, found = _find(path)
    reader = TensorReader(found.directory)
    chosen = {name.removeprefix(MODEL): name for name in reader.shapes if name.startswith(MODEL)}
    averaged = {name.removeprefix(EMA): name for name in reader.shapes if name.startswith(EMA)}
    if ema and not averaged:
        raise InputError(f"{found.directory}: holds no averaged weights; leave --ema out.")
    if ema:
        chosen |= averaged
    tensors = reader.empty(list(chosen.values()))
    reader.fill(tensors)
    _write({key: tensors[name] for key, name in chosen.items()}, file)
    print(
        f"consolidated  {found.directory} (verified), step {found.record.progress.step}: {len(chosen)} tensors to {file}"
    )
    return 0


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    """Under another name, renamed when it is on the disk."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".pt":
            torch.save(tensors, aside)
        else:
            _safetensors().save_file(tensors, aside, metadata={"format": "pt"})
        sync(aside)
        aside.replace(file)
        sync(file.parent)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{file}: cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        with suppress(OSError):  # its folder may be what failed
            aside.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        from safetensors import torch as library
    except ImportError:
        raise InputError(
            "safetensors is not installed: pip install 'seqengine-train[hf]', or consolidate to a .pt file."
        ) from None
    return library


def _open(path: Path) -> tuple[CheckpointTarget, CheckpointStore]:
    target = CheckpointTarget.find(path)
    return target, CheckpointStore(target.run.checkpoints, Mesh.single(torch.device("cpu")))


def _find(path: Path) -> tuple[CheckpointTarget, Found]:
    target, store = _open(path)
    return target, find_checkpoint(store, target)
