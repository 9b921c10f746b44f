"""A run's directory: config.toml (resolved, with the origin of every value), environment.json, metrics.jsonl, ckpt/."""

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import pydantic
import torch

import seqengine
from seqengine.config.load import Loaded, load
from seqengine.config.run import RunConfig
from seqengine.config.values import Section
from seqengine.config.write import changed, dump
from seqengine.errors import InputError
from seqengine.parallel.mesh import Mesh
from seqengine.runfiles import check_place, write_whole

CONFIG, ENVIRONMENT, CHECKPOINTS = "config.toml", "environment.json", "ckpt"
MAY_CHANGE = ("run.dir", "run.name", "run.device", "train.steps", "train.tokens", "train.micro_batch", "train.nonfinite",
              "train.spike", "train.spike_window", "train.spike_factor", "data.fasta", "data.bed", "data.files",
              "data.valid_files", "data.cache", "data.workers", "parallel", "activation", "compile", "comm", "ckpt", "eval",
              "log")  # fmt: skip
"""Keys and sections that may differ when a run resumes: none of them changes what a step computes. The data are compared
by content, not by path; a longer run changes the decay of the learning rate from here on, as its user asks."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def read_config(self, overrides: tuple[str, ...] = (), *, need_data: bool = True) -> Loaded:
        """The config that the run was started with. Raises InputError if this is no run's directory.

        need_data: the data files must exist.
        """
        file = self.path / CONFIG
        if not file.is_file():
            raise InputError(f"{self.path}: must be a run's directory with a {CONFIG}; there is none.")
        return load(file, overrides, need_data=need_data)

    def check_resumable(self, loaded: Loaded, allow: tuple[str, ...] = ()) -> None:
        """Raises InputError naming every key that must not change between two lives of a run, and what else is in its way.

        allow: keys and sections that may change all the same.
        """
        check_place(self.path)
        unknown = [key for key in allow if not _is_key(loaded.config, key)]
        if unknown:
            raise InputError(
                *(f"--allow-change {key}: must be a key or a section of the config; it is none." for key in unknown)
            )
        if not self.checkpoints.is_dir():
            return
        if not (self.path / CONFIG).is_file():
            if any(self.checkpoints.glob("step-*")):
                raise InputError(
                    f"{self.path}: has checkpoints, and must have the {CONFIG} that says of what; there is none. Restore it, "
                    "or start another run (run.dir=...)."
                )
            return
        before = load(self.path / CONFIG, need_data=False).config
        permitted = (*MAY_CHANGE, *allow)
        problems = [
            f"{key}: {self.path} was started with {old!r}, got {new!r} ({loaded.provenance.get(key, 'default')}). "
            f"Keep it, start another run (run.dir=...), or allow the change (--allow-change {key})."
            for key, (old, new) in changed(before, loaded.config).items()
            if not any(key == p or key.startswith(p + ".") for p in permitted)
        ]
        if problems:
            raise InputError(*problems)

    def write(self, loaded: Loaded, data_hash: str, mesh: dict[str, int | str]) -> None:
        """Make the directory; write the config and what it runs with. Raises InputError if the disk does not let it."""
        record = {"versions": versions(), "platform": platform.platform(), "mesh": mesh, "data_hash": data_hash}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / CONFIG, dump(loaded), durable=True)
            text = json.dumps({**record, "command": sys.argv}, indent=2) + "\n"
            write_whole(self.path / ENVIRONMENT, text, durable=True)
        except OSError as error:
            raise InputError(
                f"run.dir: {self.path} cannot be written: {error.strerror or error}. Make room, or set run.dir to another one."
            ) from error


@dataclass(frozen=True)
class CheckpointTarget:
    """A run, and one checkpoint of it or (None) its newest whole one."""

    run: RunDirectory
    checkpoint: Path | None

    @classmethod
    def find(cls, path: Path) -> "CheckpointTarget":
        """From the path of a run's directory or of a checkpoint in it. Raises InputError if it is neither."""
        if (path / CONFIG).is_file():
            return cls(RunDirectory(path), None)
        if path.parent.name == CHECKPOINTS and path.is_dir():
            return cls(RunDirectory(path.parent.parent), path)
        raise InputError(
            f"{path}: must be a run's directory (with a {CONFIG}) or a checkpoint (RUN/{CHECKPOINTS}/step-N)."
        )


def _is_key(config: RunConfig, name: str) -> bool:
    """Whether a dotted name is a key or a section."""
    here: object = config
    for part in name.split("."):
        if not isinstance(here, Section) or part not in type(here).model_fields:
            return False
        here = getattr(here, part)
    return True


def mesh_record(mesh: Mesh, backend: str) -> dict[str, int | str]:
    """The mesh as saved: ranks by axis, and who holds which weights. On an equal one a run goes on bit for bit."""
    return {**mesh.axes, "backend": backend if mesh.size > 1 else "none"}


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    return {
        "seqengine": seqengine.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pydantic": pydantic.VERSION,
    }
