"""Asynchronous saves: training goes on while they write, what is saved is what was there, and failures are told."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import seqengine.checkpoint.writing as writing
from seqengine.checkpoint.state import optimizer_tensors
from seqengine.checkpoint.store import CheckpointError, CheckpointStore
from tests.ranks import run_ranks
from tests.seqengine.checkpoints import is_equal, mesh_of, read, record, sharded, single, values, whole

WAIT = 20


def hold_writes(patch, until: threading.Event) -> None:
    """Every file waits for the event before its first byte."""
    start = writing.HashingStream.__init__

    def held(stream, path):
        assert until.wait(WAIT), "nobody let the writer go on"
        start(stream, path)

    patch.setattr(writing.HashingStream, "__init__", held)


def test_save_returns_before_anything_is_written_and_later_changes_are_not_saved(tmp_path, monkeypatch):
    go = threading.Event()
    hold_writes(monkeypatch, go)
    store, tensors = CheckpointStore(tmp_path, single(), asynchronous=True), values()
    store.save(tensors, record(single(), 5))
    assert store.names() == []
    for tensor in tensors.values():
        tensor.mul_(3).add_(1)  # what training does
    go.set()
    directory = store.wait()
    assert directory == tmp_path / "step-00000005"
    assert store.wait() is None
    assert is_equal(read(directory), values())
    store.save(tensors, record(single(), 6))
    assert is_equal(read(store.wait()), tensors), "the memory of the copies is used again, with new contents"
    store.close()
    assert not [t for t in threading.enumerate() if t.name == "checkpoint"]


def test_one_save_is_under_way_at_a_time(tmp_path, monkeypatch):
    go = threading.Event()
    hold_writes(monkeypatch, go)
    store = CheckpointStore(tmp_path, single(), asynchronous=True)
    store.save(values(1), record(single(), 5))
    threading.Timer(0.2, go.set).start()
    before = time.monotonic()
    store.save(values(2), record(single(), 6))
    assert time.monotonic() - before > 0.15
    assert store.names() == ["step-00000005"] or store.names() == ["step-00000005", "step-00000006"]
    store.close()
    assert is_equal(read(tmp_path / "step-00000005"), values(1))
    assert is_equal(read(tmp_path / "step-00000006"), values(2))


@pytest.mark.parametrize("tell", ["wait", "close", "save"])
def test_a_failure_is_told_by_the_next_call_once(tmp_path, monkeypatch, tell):
    store = CheckpointStore(tmp_path, single(), asynchronous=True)
    store.save(values(), record(single(), 5))
    store.wait()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.HashingStream, "write", fail)
        store.save(values(), record(single(), 6))
        calls = {"wait": store.wait, "close": store.close, "save": lambda: store.save(values(), record(single(), 7))}
        with pytest.raises(CheckpointError, match=r"rank 0: OSError: .*No space left"):
            calls[tell]()
    assert store.wait() is None
    assert store.names() == ["step-00000005"]
    assert not list(tmp_path.glob("*.tmp"))
    if tell != "close":
        store.save(values(), record(single(), 8))
        assert store.wait().name == "step-00000008"
    store.close()


def _train_while_writing(group, folder):
    """Messages of training and of a save under way, in another order on each rank: each kind meets its own."""
    mesh = mesh_of(group)
    store = CheckpointStore(folder, mesh, asynchronous=True)
    tensors, go, sums = sharded(values(), mesh), threading.Event(), []
    begun, write = threading.Event(), store._write

    def late_on_rank_1(*arguments):
        assert mesh.rank == 0 or begun.wait(WAIT)
        return write(*arguments)

    store._write = late_on_rank_1
    with pytest.MonkeyPatch.context() as patch:
        hold_writes(patch, go)
        store.save(tensors, record(mesh, 5))
        if mesh.rank == 0:
            time.sleep(0.2)  # here the save sends first, there the training
        for step in range(20):
            if step == 5:
                begun.set()
            x = torch.full((3,), float(step + mesh.rank))
            dist.all_reduce(x)
            sums.append(x[0].item())
            for tensor in tensors.values():
                tensor.add_(1)
        unfinished = store.names() == []
        go.set()
        directory = store.wait()
    found = store.newest()
    again = sharded({name: t - 7 for name, t in values().items()}, mesh)
    store.load(directory, again, prefixes=("model.", "optim."))
    threads = [t.name for t in threading.enumerate() if t.name == "checkpoint"]
    store.close()
    return sums, unfinished, found.directory == directory, is_equal(whole(again), values()), threads


def test_training_on_two_ranks_goes_on_while_a_save_is_written(tmp_path):
    for sums, *facts in run_ranks(2, _train_while_writing, tmp_path):
        assert sums == [2.0 * step + 1 for step in range(20)]
        assert facts == [True, True, True, []]


def _moments_on(group):
    mesh = mesh_of(group)
    weight = torch.nn.Parameter(sharded(values(), mesh)["optim.sharded.exp_avg"])
    model = torch.nn.Module()
    model.register_parameter("weight", weight)
    tensors = optimizer_tensors(model, torch.optim.AdamW(model.parameters(), foreach=False))
    first = {name: (type(t), tuple(t.shape)) for name, t in tensors.items()}
    return first, tensors["optim.weight.exp_avg"].placements == weight.placements


def test_moments_of_shards_are_shards():
    for kinds, same_placements in run_ranks(2, _moments_on):
        assert kinds["optim.weight.exp_avg"] == kinds["optim.weight.exp_avg_sq"] == (DTensor, (5, 4))
        assert kinds["optim.weight.step"] == (torch.Tensor, ())
        assert same_placements
