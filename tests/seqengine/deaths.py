"""Death by SIGKILL in the middle of training: at a call of a place in the code, chosen by a seed, on one rank or more.

A torn death also loses what a machine that loses its power may lose: of every file of a checkpoint, the bytes that were written
after its last fsync, from a random one on.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seqengine.checkpoint.store as store_module
from seqengine.backends.backend import Backend
from seqengine.checkpoint.reading import TensorReader
from seqengine.checkpoint.store import CheckpointStore
from seqengine.checkpoint.writing import HashingStream, ShardWriter
from seqengine.data.source import Source
from seqengine.feed import SampleLog
from seqengine.metrics import JsonLines
from seqengine.parallel.mesh import Mesh
from seqengine.train import Trainer, train

WRITER = {
    "HashingStream.write": (HashingStream, "write"),
    "os.fsync": (os, "fsync"),
    "Path.mkdir": (Path, "mkdir"),
    "Path.rename": (Path, "rename"),
    "Path.replace": (Path, "replace"),
    "shutil.rmtree": (shutil, "rmtree"),
    "ShardWriter.stage": (ShardWriter, "stage"),
    "ShardWriter.finish": (ShardWriter, "finish"),
    "_read_back": (store_module, "_read_back"),
    "CheckpointStore._publish": (CheckpointStore, "_publish"),
    "CheckpointStore._prune": (CheckpointStore, "_prune"),
}
"""On the way of a save."""
ELSEWHERE = {
    "Path.write_text": (Path, "write_text"),
    "JsonLines.write": (JsonLines, "write"),
    "SampleLog.write": (SampleLog, "write"),
    "Trainer.step": (Trainer, "step"),
    "Trainer.save": (Trainer, "save"),
    "Trainer.resume": (Trainer, "resume"),
    "Trainer.evaluate": (Trainer, "evaluate"),
    "Backend.accumulate": (Backend, "accumulate"),
    "Backend.update": (Backend, "update"),
    "TensorReader.fill": (TensorReader, "fill"),
}


def _write_part(original: Callable[..., Any], stream: HashingStream, data: Any) -> None:
    """Of the bytes; with those before it, it reaches the file."""
    original(stream, bytes(memoryview(data).cast("B"))[: memoryview(data).nbytes // 2])
    stream.flush()


def _write_part_of_text(original: Callable[..., Any], path: Path, text: str, **options: Any) -> None:
    original(path, text[: len(text) // 2], **options)


def _write_part_of_line(original: Callable[..., Any], lines: Any, *arguments: Any) -> None:
    file = lines._file
    lines._file = _Half(file)
    original(lines, *arguments)


class _Half:
    """A file that takes half of a line."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text[: len(text) // 2])
        self._file.flush()


def _remove_part(original: Callable[..., Any], directory: Path, **options: Any) -> None:
    for path in sorted(Path(directory).glob("*"))[::2]:
        path.unlink()


HALVES: dict[str, Callable[..., None]] = {
    "HashingStream.write": _write_part,
    "Path.write_text": _write_part_of_text,
    "JsonLines.write": _write_part_of_line,
    "SampleLog.write": _write_part_of_line,
    "shutil.rmtree": _remove_part,
}
"""How the first half of a call is done."""


@dataclass(frozen=True)
class Death:
    """At call number `call` (from 1) of a place: before it, in its middle where HALVES can, or after it."""

    place: str
    call: int
    when: str
    torn: bool
    seed: int

    @classmethod
    def draw(cls, rng: random.Random, calls: Counter[str]) -> "Death":
        """Three of four in the writer. calls: of an uninterrupted run, by place."""
        places = [place for place in (WRITER if rng.random() < 0.75 else ELSEWHERE) if calls[place]]
        place = rng.choice(places)
        whens = ["before", "after", *(["during"] * 2 if place in HALVES else [])]
        return cls(place, rng.randint(1, calls[place]), rng.choice(whens), rng.random() < 0.5, rng.getrandbits(32))


class Life:
    """One life of a training process, forked: what it does is written down, and a death may wait for it."""

    def __init__(self, checkpoints: Path, diary: Path, death: Death | None) -> None:
        self.checkpoints, self.death = checkpoints, death
        self.calls: Counter[str] = Counter()
        self._durable: dict[tuple[int, str], int] = {}
        self._diary = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def train(self, loaded: Any, source: Source, mesh: Mesh) -> Counter[str]:
        """To the end or to the death; returns the calls of each place."""
        self._keep_diary()
        for place, (owner, name) in (WRITER | ELSEWHERE).items():
            setattr(owner, name, self._wrapped(place, getattr(owner, name)))
        self._know_what_is_durable()
        train(loaded, source, mesh)
        return self.calls | Counter({"TensorReader.fill": 1})  # of a life that resumes

    def _note(self, word: str, step: int) -> None:
        os.write(self._diary, (json.dumps([word, step]) + "\n").encode())

    def _keep_diary(self) -> None:
        resume, step, note = Trainer.resume, Trainer.step, self._note

        def noted_resume(trainer: Trainer) -> bool:
            found = resume(trainer)
            note("resumed", trainer.progress.step)
            return found

        def noted_step(trainer: Trainer) -> Any:
            note("began", trainer.progress.step)
            return step(trainer)

        Trainer.resume, Trainer.step = noted_resume, noted_step  # type: ignore[method-assign]

    def _wrapped(self, place: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if place == "shutil.rmtree" and not Path(arguments[0]).exists():
                return original(*arguments, **options)  # nothing to remove, as mostly
            self.calls[place] += 1
            death = self.death
            if death is None or death.place != place or death.call != self.calls[place]:
                return original(*arguments, **options)
            if death.when == "after":
                original(*arguments, **options)
            elif death.when == "during":
                HALVES[place](original, *arguments, **options)
            self._die(death)
            return None

        return call

    def _know_what_is_durable(self) -> None:
        """Of the files that this process writes: at first nothing, after a fsync all that was written so far."""
        fsync, start = os.fsync, HashingStream.__init__

        def noted_fsync(descriptor: int) -> None:
            fsync(descriptor)
            found, name = os.fstat(descriptor), Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
            self._durable[found.st_ino, name] = found.st_size

        def noted_start(stream: HashingStream, path: Path) -> None:
            start(stream, path)
            self._durable[os.fstat(stream.fileno()).st_ino, path.name] = 0

        os.fsync, HashingStream.__init__ = noted_fsync, noted_start  # type: ignore[method-assign]

    def _die(self, death: Death) -> None:
        if death.torn:
            rng = random.Random(death.seed)
            # Not rglob, which raises for a folder that goes while it walks: another rank or thread prunes.
            for path in sorted(Path(folder, name) for folder, _, names in os.walk(self.checkpoints) for name in names):
                with suppress(FileNotFoundError):
                    found = path.stat()
                    durable = self._durable.get((found.st_ino, path.name), found.st_size)
                    if durable < found.st_size:
                        os.truncate(path, rng.randint(durable, found.st_size - 1))
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # never the rest


def read_diary(diary: Path) -> tuple[int | None, int]:
    """The step at which a life resumed (None: it did not get so far), and the last step that it had done when it began one."""
    lines = [json.loads(line) for line in diary.read_text().splitlines()] if diary.exists() else []
    resumed = next((step for word, step in lines if word == "resumed"), None)
    return resumed, max((step for word, step in lines if word == "began"), default=0)
