"""Reading a checkpoint's tensors onto any number of ranks. Nothing that a file holds is executed.

torch's `.metadata` is a pickle: it is read by an unpickler that knows the few classes which describe tensors, and no function.
The tensors themselves are read by torch.load(weights_only=True), as torch's own reader does.
"""

import math
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PosixPath
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from seqengine.checkpoint.manifest import read_manifest
from seqengine.checkpoint.writing import quiet

METADATA = ".metadata"
SHOWN = 5
"""Tensors that a message names."""


def _layout(name: str) -> torch.layout:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise pickle.UnpicklingError(f"{name!r} is no layout")
    return found


def _memory_format(owner: object, name: str) -> object:
    """In place of getattr, by which some versions of Python pickle a member of an enumeration."""
    if owner is not described._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("getattr of something else than a memory format")
    return described._MEM_FORMAT_ENCODING[name]


_DESCRIBED = "torch.distributed.checkpoint.metadata"
_ADMITTED: Mapping[tuple[str, str], Callable[..., object]] = {
    **{
        (_DESCRIBED, name): getattr(described, name)
        for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
                     "StorageMeta", "_MEM_FORMAT_ENCODING")
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("builtins", "getattr"): _memory_format,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        admitted = _ADMITTED.get((module, name))
        if admitted is not None:
            return admitted
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


class _Reader(FileSystemReader):
    """torch's reader, with metadata that cannot run code."""

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        with Path(self.path, METADATA).open("rb") as file:
            return cast("Metadata", _Unpickler(file).load())


class TensorReader:
    """The tensors of a verified checkpoint.

    Raises ValueError if `.metadata` is not what a checkpoint of tensors has.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reader = _Reader(directory)
        try:
            self._metadata = self._reader.read_metadata()
            self._tensors = _checked(self._metadata, read_manifest(directory))
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  crafted bytes make an unpickler raise anything
            raise ValueError(f"{METADATA} cannot be read safely: {error}") from None

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of every tensor, whole."""
        return {name: described.size for name, described in self._tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of every tensor."""
        return {name: described.properties.dtype for name, described in self._tensors.items()}

    def empty(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of the right kind to read into."""
        found = {name: self._tensors[name] for name in names}
        return {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in found.items()}

    def mismatches(
        self, tensors: Mapping[str, Tensor], *, prefixes: Sequence[str], rank: int, others: Collection[str] = ()
    ) -> list[str]:
        """Why `tensors` cannot be filled, or would, with what other ranks ask for, leave something out; a phrase each."""
        shapes = self.shapes
        mine = f"rng.rank-{rank}"
        left = [
            name
            for name in shapes
            if name.startswith(tuple(prefixes))
            and name not in tensors
            and name not in others
            and (name == mine or not name.startswith("rng."))
        ]
        other = [
            f"{name} is {list(shapes[name])} there and {list(tensor.shape)} here"
            for name, tensor in tensors.items()
            if name in shapes and shapes[name] != tensor.shape
        ]
        problems = []
        for what, names in (
            ("it lacks", [name for name in tensors if name not in shapes]),
            ("it also holds", left),
            ("of another shape:", other),
        ):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                problems.append(f"{what} {', '.join(sorted(names)[:SHOWN])}{more}")
        return problems

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read in place: plain tensors whole, of a DTensor this rank's shard. Another dtype is converted.

        Raises ValueError if a file holds anything else than tensors.
        """
        with quiet(), torch.no_grad():
            wanted = cast("dict[str, Any]", dict(tensors))
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner(wanted, self._metadata, is_coordinator=False)
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=False)
            try:
                self._reader.read_data(planner.create_local_plan(), planner).wait()
            except pickle.UnpicklingError:  # its message tells how to run the code after all
                raise ValueError("a file of tensors holds something else, which was not executed") from None


def _checked(metadata: Metadata, hashes: Mapping[str, str]) -> dict[str, TensorStorageMetadata]:
    """The description of every tensor. Raises ValueError unless it is whole and points only to files of the manifest."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("it describes no checkpoint")
    for index, place in metadata.storage_data.items():
        if place.relative_path not in hashes or getattr(place, "transform_descriptors", None):
            raise ValueError(
                f"{index.fqn} is said to be in {place.relative_path!r}, which is no file of the checkpoint"
            )
    places = {(index.fqn, index.offset) for index in metadata.storage_data}
    tensors = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise ValueError(f"parts of {name} are not there")
        if any((name, chunk.offsets) not in places for chunk in tensor.chunks):
            raise ValueError(f"parts of {name} are in no file")
        tensors[name] = tensor
    return tensors
