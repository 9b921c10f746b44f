"""200 deaths by SIGKILL: each life goes on from a whole checkpoint, and the end is an uninterrupted run's, bit for bit."""

import multiprocessing
import random
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from seqengine.checkpoint.reading import TensorReader
from seqengine.checkpoint.state import Record
from seqengine.checkpoint.store import CheckpointStore
from seqengine.config.load import Loaded
from seqengine.data.source import Source, open_source
from seqengine.metrics import read_metrics
from seqengine.parallel.mesh import Mesh
from tests.ranks import run_ranks_to_their_end
from tests.seqengine.deaths import Death, Life, read_diary
from tests.seqengine.runs import config

CPU = torch.device("cpu")
STEPS, EVERY, KEEP = 8, 2, 2
CONFIG = f"""
[model]
arch = "lm"
d_model = 8
n_layer = 1
pattern = ["attention"]
mlp = "none"
embed_dropout = 0.1
max_len = 32
[data]
source = "synthetic"
seq_len = 32
synthetic = {{ length = 20000, lag = 6 }}
[train]
steps = {STEPS}
batch_tokens = 64
[optim]
lr = 0.01
[eval]
every = 4
windows = 2
[log]
every = 1
samples = true
[ckpt]
every = {EVERY}
keep = {KEEP}
"""
"""Few tensors: torch takes half a millisecond to write one."""
LIMIT_SECONDS = 60
KILLED = -9


class Run:
    """A run in a folder of its own, and what is true of it between two lives."""

    def __init__(self, folder: Path, *, asynchronous: bool, cache: Path) -> None:
        folder.mkdir()
        self.folder, self.asynchronous = folder, asynchronous
        (folder / "test.toml").write_text(CONFIG)
        self.loaded: Loaded = config(folder, f"ckpt.async={str(asynchronous).lower()}", f"data.cache={cache}")
        self.path = self.loaded.config.run_dir
        self.store = CheckpointStore(self.path / "ckpt", Mesh.single(CPU))
        self.lives = 0
        self.newest = 0

    def next_diary(self) -> Path:
        self.lives += 1
        return self.folder / f"diary-{self.lives}"

    def check(self, diary: Path, what: object) -> None:
        """After a life: it resumed at the newest checkpoint, and no finished save is lost; every checkpoint is whole."""
        names = self.store.names()
        assert {name: found for name in names if (found := self.store.damage(self.store.directory / name))} == {}, what
        resumed, began = read_diary(diary)
        assert resumed in (None, self.newest), what
        finished = began // EVERY * EVERY - (EVERY if self.asynchronous else 0)
        newest = int(names[-1].removeprefix("step-")) if names else 0
        assert newest >= max(self.newest, finished), what
        latest = self.store.directory / "latest"
        assert not latest.exists() or latest.read_text().strip() in names, what
        self.newest = newest

    def result(self) -> dict[str, Any]:
        """All that two equal runs have in common, of the last checkpoint and of the metrics."""
        directory = self.store.directory / f"step-{STEPS:08d}"
        reader = TensorReader(directory)
        tensors = reader.empty(list(reader.shapes))
        reader.fill(tensors)
        record = Record.read(directory)
        lines = read_metrics(self.path)
        keys = ("split", "step", "tokens", "loss", "lr", "grad_norm")
        return {
            "tensors": {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
            "progress": {key: value for key, value in vars(record.progress).items() if key != "seconds"},
            "record": (record.stream, record.mesh, record.data_hash, record.extra),
            "metrics": [{key: line[key] for key in keys if key in line} for line in lines],
            "samples": {p.name: p.read_text() for p in sorted((self.path / "samples").iterdir())},
            "checkpoints": self.store.names()[-KEEP:],  # one that died while it pruned has more
        }


def torture(
    folder: Path,
    num_deaths: int,
    *,
    seed: int,
    live: Callable[[Run, Source, random.Random | None], Any],
    **options: Any,
) -> None:
    """Runs whose lives end by `live`, until there were so many deaths; each run ends as the uninterrupted one does."""
    whole = Run(folder / "whole", cache=folder / "cache", **options)
    source = open_source(whole.loaded.config.data)
    assert live(whole, source, None) is None
    expected = whole.result()
    rng, deaths = random.Random(seed), 0
    for number in count():
        run = Run(folder / f"run-{number}", cache=folder / "cache", **options)
        while (died := live(run, source, rng if deaths < num_deaths else None)) is not None:
            deaths += 1
        result = run.result()
        assert {key for key in expected if result[key] != expected[key]} == set(), (number, died)
        if deaths >= num_deaths:
            break


class SingleLives:
    """Lives of one process."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._context = multiprocessing.get_context("fork")

    def __call__(self, run: Run, source: Source, rng: random.Random | None) -> object:
        """One life; returns how it died, or None if it came to the end of the run."""
        diary = run.next_diary()
        death = None if rng is None else Death.draw(rng, self.calls)
        timer = None if rng is None or rng.random() > 0.1 else rng.uniform(0.0, 0.5)
        receiver, sender = self._context.Pipe(duplex=False)
        life = Life(run.store.directory, diary, None if timer else death)
        process = self._context.Process(target=_single, args=(life, run.loaded, source, sender), daemon=True)
        process.start()
        sender.close()
        process.join(timer or LIMIT_SECONDS)
        process.kill()
        process.join()
        what = (timer or death, run.lives)
        run.check(diary, what)
        if process.exitcode == KILLED:
            return what
        said = receiver.recv()
        assert process.exitcode == 0, (what, said)
        self.calls = self.calls or said
        return None


def _single(life: Life, loaded: Loaded, source: Source, sender: Any) -> None:
    torch.set_num_threads(1)  # a forked process has none of the threads that its parent's OpenMP waits for
    try:
        sender.send(life.train(loaded, source, Mesh.single(CPU)))
    except BaseException:
        sender.send(traceback.format_exc())
        raise


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_80_deaths_of_one_process_change_nothing(tmp_path, asynchronous):
    torture(tmp_path, 80, seed=int(asynchronous), live=SingleLives(), asynchronous=asynchronous)


class Pairs:
    """Lives of two ranks: one dies, or both do. Who is left ends by itself."""

    def __init__(self) -> None:
        self.calls: list[Counter[str]] = []

    def __call__(self, run: Run, source: Source, rng: random.Random | None) -> object:
        diary = run.next_diary()
        deaths: list[Death | None] = [None, None]
        if rng is not None:
            for rank in rng.choice([(0,), (1,), (0, 1)]):
                deaths[rank] = Death.draw(rng, self.calls[rank])
        what = (deaths, run.lives)
        outcomes = run_ranks_to_their_end(
            2, _pair, run.store.directory, diary, deaths, run.loaded, source, timeout_seconds=LIMIT_SECONDS / 2,
            limit_seconds=LIMIT_SECONDS,
        )  # fmt: skip
        run.check(diary, what)
        if all(outcome.has_result for outcome in outcomes):
            self.calls = self.calls or [outcome.result for outcome in outcomes]
            return None
        for outcome, death in zip(outcomes, deaths, strict=True):
            is_killed = outcome.exit_code == KILLED and death is not None
            is_left = outcome.error is not None and (
                "RuntimeError" in outcome.error or "CheckpointError" in outcome.error
            )
            assert is_killed or is_left or outcome.has_result, (what, outcome)
        assert KILLED in [outcome.exit_code for outcome in outcomes], (what, outcomes)
        return what


def _pair(
    group: Any, checkpoints: Path, diary: Path, deaths: list[Death | None], loaded: Loaded, source: Source
) -> Counter[str]:
    rank = group.rank()
    life = Life(checkpoints, diary if rank == 0 else diary.with_suffix(".other"), deaths[rank])
    return life.train(loaded, source, Mesh.create(2, 1, CPU))


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_20_deaths_of_one_or_both_of_two_ranks_change_nothing(tmp_path, asynchronous):
    torture(tmp_path, 20, seed=int(asynchronous), live=Pairs(), asynchronous=asynchronous)
