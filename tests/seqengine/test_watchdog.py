"""Watchdogs: processes that hang in ways of their own, and what they leave behind."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from seqengine import watchdog
from seqengine.errors import InputError
from seqengine.watchdog import Beat, Watchdog, read_beats, stuck_ranks
from tests.ranks import run_ranks_to_their_end

ROOT = Path(__file__).parent.parent.parent


def run(script: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """A process that does not import torch."""
    header = "import ctypes, sys, time\nfrom pathlib import Path\nfrom seqengine import watchdog\n"
    header += f"RUN = Path({str(folder)!r})\nwatchdog.GRACE_SECONDS = 0.4\n"
    return subprocess.run(
        [sys.executable, "-S", "-c", header + script],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def fetch_batch():
    time.sleep(60)


def reduce_gradients(group):
    dist.all_reduce(torch.ones(1), group=group)


def receive_state(group):
    dist.recv(torch.empty(1), src=0, group=group)


def hang(group, run_dir):
    """Rank 1 hangs in Python, rank 0 waits for it in a collective, and rank 2 for rank 0, which gives up first."""
    watchdog.GRACE_SECONDS = 1.5
    rank = dist.get_rank(group)
    dog = Watchdog(run_dir, rank, timeout_seconds=1.0 + rank, num_ranks=3)
    dist.barrier(group)
    dog.start()
    dog.beat(3)
    if rank == 1:
        fetch_batch()
    if rank == 2:
        receive_state(group)
    reduce_gradients(group)


def test_ranks_that_hang_leave_their_stacks_and_end_with_exit_code_1(tmp_path, capfd):
    started = time.monotonic()
    ends = run_ranks_to_their_end(3, hang, tmp_path, timeout_seconds=50, limit_seconds=40)
    assert time.monotonic() - started < 20
    assert [end.exit_code for end in ends] == [1, 1, 1]
    assert ends[0].error is None  # it was ended in the collective
    stacks = [(tmp_path / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(3)]
    for rank, function in enumerate(["reduce_gradients", "fetch_batch", "receive_state"]):
        assert f"in {function}" in stacks[rank]
        assert f"rank {rank}, " in stacks[rank]
    assert "step 3, phase train: no progress for 1." in stacks[0]
    for rank in (1, 2):  # before their own time, while rank 0 was still there
        assert "step 3, phase train: another rank is stuck" in stacks[rank]
    said = capfd.readouterr().err
    assert (
        f"rank 0: no progress for 1 s after step 3 (phase train); the stacks of its threads are in {tmp_path}/stacks"
        in said
    )


def test_a_process_that_holds_the_interpreters_lock_leaves_its_stacks_too(tmp_path):
    done = run(
        """
def compile_kernel():
    ctypes.PyDLL(None).sleep(60)
dog = watchdog.Watchdog(RUN, 0, timeout_seconds=0.4)
dog.start()
dog.beat(1, "compile")
compile_kernel()
""",
        tmp_path,
    )
    assert done.returncode == 1
    assert "in compile_kernel" in (tmp_path / "stacks/rank-0.txt").read_text()


def test_beats_keep_a_process_alive_and_close_ends_the_watch(tmp_path):
    done = run(
        """
dog = watchdog.Watchdog(RUN, 0, timeout_seconds=0.5)
dog.start()
for step in range(15):
    time.sleep(0.1)
    dog.beat(step)
dog.close()
time.sleep(1.5)
dog.close()
print("done")
""",
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert list((tmp_path / "stacks").iterdir()) == []


def test_the_time_until_the_first_beat_counts(tmp_path):
    done = run("watchdog.Watchdog(RUN, 0, timeout_seconds=0.3).start()\ntime.sleep(60)", tmp_path)
    assert done.returncode == 1
    assert "after step 0 (phase start)" in done.stderr


def test_a_full_disk_stops_neither_the_run_nor_the_watch(tmp_path):
    done = run(
        """
dog = watchdog.Watchdog(RUN, 0, timeout_seconds=1.0)
dog.start()
(RUN / "heartbeat/rank-0.json").unlink()
(RUN / "heartbeat").rmdir()
dog.beat(1)
time.sleep(60)
""",
        tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.count("no heartbeat: ") == 1
    assert "no progress for 1 s" in done.stderr


def test_a_heartbeat_tells_the_last_beat_and_is_written_seldom(tmp_path, monkeypatch):
    replaced, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: (replaced.append(target), replace(path, target))[1])
    threads = threading.active_count()
    dog = Watchdog(tmp_path, 2, timeout_seconds=None)
    dog.start()
    end = time.monotonic() + 1.2
    step = 0
    while time.monotonic() < end:
        step += 1
        dog.beat(step, "train")
        time.sleep(0.001)
    dog.beat(step, "evaluation")
    end = time.monotonic() + 10
    while read_beats(tmp_path)[0].phase != "evaluation" and time.monotonic() < end:
        time.sleep(0.05)
    content = json.loads(dog.heartbeat_file.read_text())
    assert (content["rank"], content["step"], content["phase"]) == (2, step, "evaluation")
    assert abs(content["time"] - time.time()) < 30
    assert stuck_ranks(tmp_path, 60) == []
    dog.close()
    assert step > 20
    assert len(replaced) <= 6
    assert read_beats(tmp_path)[0].phase == "ended"
    assert threading.active_count() == threads
    assert [p.name for p in (tmp_path / "heartbeat").iterdir()] == ["rank-2.json"]


def test_stuck_ranks_are_listed_oldest_first_without_those_that_ended(tmp_path):
    now = time.time()
    beats = [
        Beat(0, 7, "train", now - 50.0),
        Beat(1, 7, "data", now - 90.0),
        Beat(2, 8, "train", now),
        Beat(3, 9, "ended", now - 500.0),
    ]
    (tmp_path / "heartbeat").mkdir()
    for beat in beats:
        (tmp_path / f"heartbeat/rank-{beat.rank}.json").write_text(json.dumps(vars(beat)))
    assert read_beats(tmp_path) == beats
    assert stuck_ranks(tmp_path, 30.0) == [beats[1], beats[0]]
    assert stuck_ranks(tmp_path, 60.0) == [beats[1]]
    assert stuck_ranks(tmp_path / "none", 0.0) == []


def test_rank_0_removes_heartbeats_of_ranks_that_are_no_more(tmp_path):
    (tmp_path / "heartbeat").mkdir()
    for rank in range(4):
        (tmp_path / f"heartbeat/rank-{rank}.json").write_text(json.dumps(vars(Beat(rank, 7, "train", 0.0))))
    for rank in (1, 0):
        dog = Watchdog(tmp_path, rank, timeout_seconds=None, num_ranks=2)
        dog.start()
        dog.close()
        assert len(read_beats(tmp_path)) == (4 if rank else 2)
    assert [beat.phase for beat in read_beats(tmp_path)] == ["ended", "ended"]


def test_a_heartbeat_that_vanishes_while_it_is_read_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "heartbeat").mkdir()
    for rank in range(3):
        (tmp_path / f"heartbeat/rank-{rank}.json").write_text(json.dumps(vars(Beat(rank, 7, "train", 0.0))))
    read = Path.read_text

    def read_late(path):
        if path.name == "rank-1.json":
            path.unlink()
        return read(path)

    monkeypatch.setattr(Path, "read_text", read_late)
    assert [beat.rank for beat in read_beats(tmp_path)] == [0, 2]
    assert [beat.rank for beat in stuck_ranks(tmp_path, 1.0)] == [0, 2]


@pytest.mark.parametrize("text", ["{", "[]", '{"rank": 0}', '{"rank": 0, "step": 1, "phase": "", "time": 0, "x": 1}'])
def test_a_damaged_heartbeat_is_bad_input(tmp_path, text):
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat/rank-0.json").write_text(text)
    with pytest.raises(
        InputError, match=r"/heartbeat: a heartbeat cannot be read: rank-0\.json: .*\. Delete the folder\."
    ):
        read_beats(tmp_path)


def test_a_call_of_an_earlier_life_is_not_answered(tmp_path):
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks/call.json").write_text("{}")
    dog = Watchdog(tmp_path, 1, timeout_seconds=30.0)
    dog.start()
    time.sleep(0.8)
    dog.close()
    assert [p.name for p in (tmp_path / "stacks").iterdir()] == ["call.json"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_timeout_must_be_positive(tmp_path, seconds):
    with pytest.raises(ValueError, match=r"comm\.step_timeout: must be above 0"):
        Watchdog(tmp_path, 0, timeout_seconds=seconds)
