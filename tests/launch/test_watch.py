"""`seqengine watch`: a run that runs, is complete, stuck, absent, stopped and started again."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from seqengine.errors import InputError
from seqengine.launch.cli import main
from seqengine.launch.run_status import MetricsTail, read_status
from seqengine.launch.watch import Watch, follow, panel
from tests.seqengine.lines import training, valid

CONFIG = 'extends = "demo"\n[run]\nname = "mine"\n[train]\nsteps = 4\nbatch_tokens = 8192\n'
VALID = valid(4)


def begin(run: Path, *lines: dict) -> Path:
    run.mkdir(exist_ok=True)
    (run / "config.toml").write_text(CONFIG)
    write(run, *lines)
    return run


def write(run: Path, *lines: dict) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def beat(run: Path, rank: int, *, ago: float = 0.0, step: int = 1, phase: str = "train") -> None:
    (run / "heartbeat").mkdir(exist_ok=True)
    facts = {
        "rank": rank,
        "step": step,
        "phase": phase,
        "time": time.time() - ago,
        "host": f"node{rank}",
        "pid": 100 + rank,
    }
    (run / "heartbeat" / f"rank-{rank}.json").write_text(json.dumps(facts))


def once(run: Path, capsys, code: int = 0) -> dict[str, str]:
    assert main(["watch", str(run), "--once"]) == code
    return {line[:11].strip(): line[11:] for line in capsys.readouterr().out.splitlines()}


def test_a_running_run_tells_its_figures_and_the_time_left(tmp_path, capsys):
    run = begin(tmp_path / "r", training(1), training(2, mfu=0.25))
    beat(run, 0, step=3)
    beat(run, 1, step=2, ago=5)
    told = once(run, capsys)
    assert told["state"] == "running"
    assert told["step"] == "3/4 (75%)"
    assert told["MFU"] == "25.0%"
    assert told["ETA"] == "00:00:07", "8192 tokens at 1234.5 a second"
    assert told["ranks"].startswith("2, 2 alive; the quietest: rank 1 on node1, step 2, train, 5 s ago")


def test_a_complete_run(tmp_path, capsys):
    run = begin(tmp_path / "r", training(4), VALID)
    beat(run, 0, phase="ended", ago=9999)
    told = once(run, capsys)
    assert told["state"] == "complete"
    assert "loss 1.25000 nats" in told["valid"]
    assert "ETA" not in told


def test_a_run_that_was_stopped_is_not_complete(tmp_path, capsys):
    run = begin(tmp_path / "r", training(2))
    beat(run, 0, phase="ended")
    assert once(run, capsys)["state"] == "stopped"


def test_the_stuck_rank_is_named_with_its_stacks(tmp_path, capsys):
    run = begin(tmp_path / "r", training(2))
    beat(run, 0, ago=400, step=2)
    beat(run, 1, ago=500, step=2, phase="save")
    beat(run, 2, ago=1, step=2)
    (run / "stacks").mkdir()
    (run / "stacks" / "rank-1.txt").write_text("Thread ...\n")
    told = once(run, capsys, code=1)
    assert told["state"] == "stuck"
    assert told["stuck"].startswith(
        "rank 1 (host node1, pid 101) has not moved for 500 s: step 2, phase save; 1 more ranks"
    )
    assert told["stuck"].endswith("rank-1.txt")
    assert main(["watch", str(run), "--once", "--stuck-after", "1000"]) == 0


def test_no_run_and_a_damaged_one_are_told(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "nothing"), "--once"]) == 2
    assert "must be a run's directory" in capsys.readouterr().err
    run = begin(tmp_path / "r")
    (run / "metrics.jsonl").write_text('{"step": 1\n{}\n')
    assert main(["watch", str(run), "--once"]) == 2
    assert f"{run / 'metrics.jsonl'}:1: must be a JSON object" in capsys.readouterr().err
    (run / "metrics.jsonl").unlink()
    beat(run, 0)
    (run / "heartbeat" / "rank-0.json").write_text("{")
    assert main(["watch", str(run), "--once"]) == 2
    assert "a heartbeat cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--stuck-after", "0"], ["--interval", "x"]])
def test_bad_numbers_are_refused(tmp_path, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        main(["watch", str(tmp_path), *words])
    assert "must be seconds above 0" in capsys.readouterr().err


def test_a_run_is_followed_from_before_its_beginning_over_a_restart_to_its_end(tmp_path):
    run, said = tmp_path / "r", []
    moments = [
        lambda: begin(run),
        lambda: (beat(run, 0), write(run, training(1), training(2))),
        lambda: write(run, training(3)),
        lambda: beat(run, 0, step=3, phase="ended"),
        lambda: resume(run, 2),
        lambda: write(run, training(3, loss=1.4), training(4), VALID),
        lambda: beat(run, 0, step=4, phase="ended"),
    ]

    def next_moment(_: float) -> None:
        moments.pop(0)()

    follow(Watch(run, 60.0), 1.0, said.append, next_moment)
    assert not moments
    shown = [line.split("  lr")[0] for line in said]
    assert shown == [
        f"waiting for {run} to begin",
        f"{run} is starting",
        f"{run} is running",
        "step 1/4  loss 1.50000 nats  2.16404 bits/token",
        "step 2/4  loss 1.50000 nats  2.16404 bits/token",
        "step 3/4  loss 1.50000 nats  2.16404 bits/token",
        f"{run} is stopped",
        "the run went back to step 2",
        f"{run} is running",
        "step 3/4  loss 1.40000 nats  2.01977 bits/token",
        "step 4/4  loss 1.50000 nats  2.16404 bits/token",
        "step 4/4  valid loss 1.25000 nats  1.80337 bits/token  (6 windows)",
        f"{run} is complete",
    ]


def resume(run: Path, step: int) -> None:
    """As JsonLines does: the lines that are kept are written aside and renamed."""
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines(True) if json.loads(line)["step"] <= step]
    (run / "aside").write_text("".join(kept))
    (run / "aside").replace(run / "metrics.jsonl")
    beat(run, 0, step=step)


def test_a_line_that_is_half_written_is_read_when_it_is_whole(tmp_path):
    run = begin(tmp_path / "r", training(1))
    tail = MetricsTail(run)
    assert [line["step"] for line in tail.read()[0]] == [1]
    text = json.dumps(training(2)) + "\n"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text[:20])
        file.flush()
        assert tail.read() == ([], False)
        file.write(text[20:])
    assert [line["step"] for line in tail.read()[0]] == [2]
    assert tail.read() == ([], False)
    assert [line["step"] for line in tail.lines] == [1, 2]


def test_the_panel_shows_ranks_the_stuck_one_first(tmp_path):
    run = begin(tmp_path / "r", training(2))
    for rank in range(20):
        beat(run, rank, ago=300.0 if rank == 7 else 0.0)
    out = io.StringIO()
    Console(file=out, width=140).print(panel(read_status(run, [training(2)], 60.0)))
    text = out.getvalue()
    assert "stuck" in text
    assert "and 4 more" in text
    rows = [line for line in text.splitlines() if "node" in line and "│ train" in line]
    assert "node7 " in rows[0]
    assert len(rows) == 16


def test_a_broken_config_is_told(tmp_path):
    run = begin(tmp_path / "r")
    (run / "config.toml").write_text("[train\n")
    with pytest.raises(InputError, match="not valid TOML"):
        read_status(run, [], 60.0)
