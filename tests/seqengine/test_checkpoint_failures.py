"""A save that fails, or is killed, is one clear error on every rank and leaves the older checkpoints; and what is kept."""

import os
import resource
import signal
import subprocess

import pytest
import torch

from seqengine.checkpoint import store as store_module
from seqengine.checkpoint.store import CheckpointError, CheckpointStore
from tests.ranks import run_ranks, run_ranks_to_their_end
from tests.seqengine.checkpoints import is_equal, mesh_of, read, record, save, save_on, single, values


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB. Needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("may not mount file systems here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_a_clear_error_and_the_next_save_goes_on(small_disk):
    save(small_disk, 5)
    store = CheckpointStore(small_disk, single())
    with pytest.raises(CheckpointError) as raised:
        store.save(values() | {"model.big": torch.zeros(100_000)}, record(single(), 6))
    message = str(raised.value)
    assert message.startswith(f"{small_disk}: could not write the checkpoint's tensors: rank 0: OSError: [Errno 28]")
    assert "Free space there, or keep fewer checkpoints (ckpt.keep); whole checkpoints are as they were." in message
    assert listing(small_disk) == ["latest", "step-00000005"]
    assert is_equal(read(small_disk / "step-00000005"), values())
    save(small_disk, 7, seed=7)
    assert store.newest().record.progress.step == 7


def test_a_disk_that_fills_up_at_any_byte_leaves_the_old_checkpoint(small_disk):
    """From no free byte on, page by page, until a save succeeds: mkdir, tensors, metadata, manifest and pointer all fail."""
    save(small_disk, 5)
    store, reached = CheckpointStore(small_disk, single()), set()
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize))
    for _ in range(60):
        try:
            store.save(values(), record(single(), 6))
        except CheckpointError as error:
            assert listing(small_disk) == ["filler", "latest", "step-00000005"]
            assert store.damage(small_disk / "step-00000005") == []
            reached.add(str(error).split(": ")[1])
            os.truncate(filler, filler.stat().st_size - 4096)
        else:
            break
    assert {"could not write the checkpoint's tensors", "could not finish the checkpoint"} <= reached
    assert store.newest().record.progress.step == 6


def test_a_read_only_directory_is_a_clear_error(small_disk):
    save(small_disk, 5)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(
        CheckpointError, match=r"could not make a directory .* Make the directory writable, or use another"
    ):
        save(small_disk, 6)
    assert is_equal(read(small_disk / "step-00000005"), values())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_someone_else_is_a_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(
        CheckpointError, match=r"could not make a directory .* Make the directory writable, or use another"
    ):
        save(tmp_path / "ckpt")


def test_a_path_that_cannot_be_a_directory_is_a_clear_error(tmp_path):
    (tmp_path / "ckpt").write_text("a file")
    with pytest.raises(
        CheckpointError, match="ckpt: could not make a directory for the checkpoint: rank 0: NotADirectory"
    ):
        save(tmp_path / "ckpt")


def _one_may_not_write(group, folder, asynchronous):
    """Rank 1's files may not be longer than 4 KiB; then they may, and training goes on."""
    mesh = mesh_of(group)
    store = CheckpointStore(folder, mesh, asynchronous=asynchronous)
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    tensors = values() | {f"model.{i}": torch.zeros(5000) for i in range(4)}
    try:
        store.save(tensors, record(mesh, 6))
        store.wait()
        message = "no error"
    except CheckpointError as error:
        message = str(error)
    found = store.newest()
    left = listing(folder)
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.save(tensors, record(mesh, 7))
    last = store.wait().name
    store.close()
    return message, found.directory.name, left, last


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_old_checkpoint(tmp_path, asynchronous):
    save(tmp_path, 5)
    for message, found, left, last in run_ranks(2, _one_may_not_write, tmp_path, asynchronous):
        assert "could not write the checkpoint's tensors: rank 1: OSError: [Errno 27] File too large" in message
        assert (found, left, last) == ("step-00000005", ["latest", "step-00000005"], "step-00000007")


class Stopped(BaseException):
    """Like torch's CheckpointException: no Exception."""


@pytest.mark.parametrize("part", ["_finish", "_read_back", "find_damage", "sync"])
def test_whatever_is_raised_becomes_a_checkpoint_error(tmp_path, monkeypatch, part):
    save(tmp_path, 5)

    def fail(*_):
        raise Stopped("no more")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, part, fail)
        with pytest.raises(CheckpointError, match=r"rank 0: Stopped: no more\. Whole checkpoints are as they were"):
            save(tmp_path, 6)
    assert not list(tmp_path.glob("*.tmp"))
    save(tmp_path, 7)
    assert CheckpointStore(tmp_path, single()).newest().record.progress.step == 7


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(tmp_path, monkeypatch, stop):
    def interrupt(*_):
        raise stop

    monkeypatch.setattr(store_module, "_finish", interrupt)
    with pytest.raises(stop):
        save(tmp_path, 6)
    assert CheckpointStore(tmp_path, single()).newest() is None


def _killed(group, folder, when):
    """Killed at the n-th call of something that a save does on a disk."""
    calls = [0]

    def counted(function):
        def call(*arguments, **options):
            calls[0] += 1
            if calls[0] == when:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("mkdir", "rename", "replace", "fsync", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    store = CheckpointStore(folder, mesh_of(group), keep=1)
    store.save(values(2), record(store.mesh, 6))
    return "saved"


def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint_and_no_other_in_its_place(tmp_path):
    """Killed before each change of the disk in turn; after the last one the save succeeds."""
    steps, when = [], 0
    while not steps or steps[-1] != "saved":
        when += 1
        folder = tmp_path / str(when)
        save(folder, 5)
        (outcome,) = run_ranks_to_their_end(1, _killed, folder, when, timeout_seconds=10, limit_seconds=20)
        store = CheckpointStore(folder, single())
        assert all(store.damage(folder / name) == [] for name in store.names()), "not even a half one that was to go"
        found = store.newest()
        step = found.record.progress.step
        assert is_equal(read(found.directory), values(1 if step == 5 else 2))
        steps.append(outcome.result or step)
        assert outcome.result == "saved" or outcome.exit_code == -signal.SIGKILL
        save(folder, 8, keep=1)
        assert listing(folder) == ["latest", "step-00000008"], "what the killed save left is cleared by the next"
    assert steps.count(5) > 6
    assert 6 in steps, "killed after the rename: the new one counts"
    assert steps == sorted(steps, key=lambda s: (s == "saved", s)), "never back to the older one"


def test_only_the_newest_and_the_milestones_are_kept(tmp_path):
    for step in range(1, 13):
        save(tmp_path, step, tokens=step * 40, keep=2, keep_every=100)
    # Tokens 100, 200, 300, 400 are reached at steps 3, 5, 8, 10.
    assert [int(name[-2:]) for name in CheckpointStore(tmp_path, single()).names()] == [3, 5, 8, 10, 11, 12]


def test_names_are_in_the_order_of_steps_however_long(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    (tmp_path / "step-00000001.tmp").mkdir()
    (tmp_path / "step-best").mkdir()
    assert CheckpointStore(tmp_path, single()).names() == ["step-99999999", "step-100000000"]


def test_later_checkpoints_of_a_history_that_was_left_do_not_outlive_a_save(tmp_path):
    for step in (5, 6, 9):
        save(tmp_path, step, keep=2)
    (tmp_path / "step-00000009" / "engine.json").write_text("damaged")
    save(tmp_path, 6, seed=3, keep=2)  # it resumed from 6, and saves it again
    assert CheckpointStore(tmp_path, single()).names() == ["step-00000006"]
    assert is_equal(read(tmp_path / "step-00000006"), values(3))


def test_bad_settings_are_refused(tmp_path):
    for options in ({"keep": 0}, {"keep_every": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            CheckpointStore(tmp_path, single(), **options)


def _at_different_steps(group, folder):
    try:
        save_on(group, folder, step=5 + group.rank())
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_ranks_that_save_different_steps_are_told_and_write_nothing(tmp_path):
    for message in run_ranks(2, _at_different_steps, tmp_path):
        assert message == f"{tmp_path}: all ranks must save the same step; got step-00000005, step-00000006."
    assert listing(tmp_path) == []


def _a_rank_is_gone(group, folder):
    if group.rank() == 1:
        os._exit(3)
    try:
        save_on(group, folder)
    except (CheckpointError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_rank_that_is_gone_is_an_error_not_a_hang(tmp_path):
    outcome = run_ranks_to_their_end(2, _a_rank_is_gone, tmp_path, timeout_seconds=3, limit_seconds=20)[0]
    assert outcome.has_result, outcome
    assert "Error" in str(outcome.result)
