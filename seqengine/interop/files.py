"""Weights as files: folders of config.json with safetensors (sharded ones too) or torch files, read and written.

Nothing that a file holds is executed: safetensors is data, and torch files are read with weights_only.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqengine.checkpoint.manifest import sync
from seqengine.errors import InputError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
PREFERRED = (INDEX, WEIGHTS, "pytorch_model.bin.index.json", "pytorch_model.bin")
TORCH_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
WRAPPERS = ("state_dict", "model")
"""Where a training checkpoint keeps its weights."""
WRITTEN = frozenset((CONFIG, WEIGHTS, TOKENIZER, SPECIAL_TOKENS))
"""All that `write_folder` writes: a folder with anything else in it is never replaced."""


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, config) of a folder, or of a file of weights with config.json beside it.

    Weights: model.safetensors, in shards with model.safetensors.index.json, the same as pytorch_model.bin, or else the one
    file of the folder that ends in .safetensors, .bin, .ckpt, .pt or .pth.
    Raises:  InputError naming the file, and the key where it is one.
    """
    weights = find_weights(path)
    config = weights.parent / CONFIG
    if not config.is_file():
        raise InputError(f"{config}: must be the config of the weights in {weights.name}; there is no such file.")
    return read_tensors(weights), read_json(config)


def find_weights(path: Path) -> Path:
    """The file of weights that a path means. Raises InputError if there is none, or more than one."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: must be a folder with {CONFIG} and weights, or a file of weights; there is none.")
    for name in PREFERRED:
        if (path / name).is_file():
            return path / name
    suffixes = (".safetensors", *TORCH_SUFFIXES)
    found = sorted(p for p in path.iterdir() if p.suffix in suffixes and p.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{path}: holds several files of weights: {', '.join(p.name for p in found)}. Name one of them."
        )
    raise InputError(f"{path}: must hold {WEIGHTS}, {INDEX}, or a file *{', *'.join(TORCH_SUFFIXES)}; it has none.")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The state dict of one file, or of the shards that an index names."""
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in TORCH_SUFFIXES:
        return _read_torch(file)
    raise InputError(f"{file}: weights must be a file *.safetensors, *{', *'.join(TORCH_SUFFIXES)}; got {file.name!r}.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError with the line that is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: must be JSON; line {error.lineno}: {error.msg}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: must be a JSON object; got {type(found).__name__}.")
    return found


def _read_shards(index: Path) -> dict[str, Tensor]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise InputError(f"{index}: must have a table 'weight_map' of keys and files.")
    shards: dict[str, list[str]] = {}
    for key, name in where.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: {key}: must be in a file of the same folder; got {name!r}.")
        shards.setdefault(name, []).append(key)
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise InputError(*(f"{index.parent / name}: is missing; {index.name} names it." for name in missing))
    tensors: dict[str, Tensor] = {}
    for name, keys in shards.items():
        found = read_tensors(index.parent / name)
        absent = [key for key in keys if key not in found]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise InputError(f"{index.parent / name}: {absent[0]} is missing{more}; {index.name} says that it is here.")
        tensors |= {key: found[key] for key in keys}
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    """Copies: the file's own pages are not aligned, may change under us, and round a product in another order."""
    library = _library()
    try:
        with library.safe_open(file, framework="pt") as reader:
            return {key: reader.get_tensor(key).clone() for key in reader.keys()}  # noqa: SIM118  it is no mapping
    except (library.SafetensorError, OSError, ValueError, TypeError, RuntimeError, LookupError) as error:
        raise InputError(f"{file}: must be a whole safetensors file: {_first_line(error)}.") from None


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  damaged bytes make it raise anything, assertions included
        raise InputError(
            f"{file}: must be a whole torch file of tensors and plain values, and nothing that runs code: "
            f"{_first_line(error)}."
        ) from None
    for name in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping):
        raise InputError(f"{file}: must hold a state dict; got {type(found).__name__}.")
    kept = {key: value for key, value in found.items() if not str(key).endswith("_extra_state")}
    for key, value in kept.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{file}: {key}: must be a tensor; got {type(value).__name__}. Save the state dict alone.")
    return kept


def check_target(folder: Path, *, replace: bool) -> None:
    """Raises InputError if `write_folder` would refuse."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: must be a folder to be made; it is a file.")
    if not replace:
        raise InputError(f"{folder}: exists; name another folder, or give --force.")
    foreign = sorted({p.name for p in folder.iterdir()} - WRITTEN)
    if foreign:
        raise InputError(
            f"{folder}: --force replaces only what an export wrote; this folder also holds {', '.join(foreign[:3])}."
        )


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], documents: Mapping[str, Mapping[str, Any]], *, replace: bool = False
) -> None:
    """Weights and JSON documents in a new folder, written under another name and renamed when whole.

    replace: put it in the place of a folder that has nothing but such files.
    Raises:  InputError if the folder exists otherwise, or cannot be written.
    """
    folder = folder.absolute()
    check_target(folder, replace=replace)
    library = _library()
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        aside.mkdir(parents=True)
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        library.torch.save_file(contiguous, aside / WEIGHTS, metadata={"format": "pt"})
        for name, document in documents.items():
            (aside / name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for written in aside.iterdir():
            sync(written)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}.") from None
    finally:
        if not folder.exists() and old.exists():
            old.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _library() -> Any:
    """The package safetensors. Raises InputError if it is not installed."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise InputError(
            "safetensors is not installed, and weights need it: pip install 'seqengine-train[hf]'."
        ) from None
    return safetensors


def _first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
