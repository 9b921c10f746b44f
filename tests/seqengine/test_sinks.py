"""Where metrics go: the file always, TensorBoard and W&B where asked for, a terminal or plain lines; and events."""

import importlib.util
import io
import json
import math
import sys
import types

import pytest
from rich.console import Console

from seqengine.config.load import load
from seqengine.config.sections import LogSection
from seqengine.errors import InputError
from seqengine.metrics import Metrics, describe, read_events, read_metrics
from seqengine.sinks import Events, ProgressBar, TensorBoard, Wandb, WandbRun, check_sinks, duration, short_number
from tests.seqengine.lines import training, valid

VALID = valid(2)


class StubRun:
    """What wandb.init returns."""

    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.metrics: list[tuple] = []
        self.finished = False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        assert not self.finished
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stub in place of the package; `runs` are those that were begun, with their arguments."""
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**arguments):
        run = StubRun()
        module.runs.append((run, arguments))
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def wandb_config(tmp_path, *overrides: str):
    return load("demo", [f"run.dir={tmp_path}", "run.name=mine", *overrides]).config


def test_what_is_written_is_read_back_and_starts_are_events(tmp_path, capsys):
    metrics = Metrics.open(tmp_path, total_steps=4, step=0)
    lines = [training(1), training(2), VALID]
    for line in lines:
        metrics.write(line)
    metrics.close()
    again = Metrics.open(tmp_path, total_steps=4, step=1, tensorboard=False)
    again.event("spike", 2, loss=9.0)
    again.rewind(0)
    again.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == []
    events = [{k: v for k, v in event.items() if k != "time"} for event in read_events(tmp_path)]
    assert events == [
        {"event": "start", "step": 0, "total_steps": 4},
        {"event": "start", "step": 1, "total_steps": 4},
        {"event": "spike", "step": 2, "loss": 9.0},
        {"event": "rewind", "step": 0},
    ]
    told = capsys.readouterr().out
    assert "step 1/4  loss 1.50000 nats" in told
    assert "valid loss 1.25000 nats  1.80337 bits/token  (6 windows)" in told


def test_a_resumed_run_keeps_the_lines_up_to_its_step(tmp_path):
    metrics = Metrics.open(tmp_path, total_steps=9, step=0)
    for step in range(1, 6):
        metrics.write(training(step))
    metrics.close()
    Metrics.open(tmp_path, total_steps=9, step=3).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_the_bar_tells_tokens_loss_bits_speed_mfu_memory_and_the_time_left():
    out = io.StringIO()
    bar = ProgressBar(10, 0, console=Console(file=out, force_terminal=True, width=160))
    bar.write(training(4, mfu=0.4123))
    bar.write(VALID)
    bar.rewind(2)
    bar.close()
    text = out.getvalue()
    for part in ("2/10", "tokens 4k", "loss 1.50000 nats", "bits/token 2.16404", "speed 1,234 tok/s", "MFU 41.2%",
                 "memory 3.00 GiB", "ETA", "valid loss"):  # fmt: skip
        assert part in text, part


def test_a_plain_line_tells_mfu_only_where_it_is_known():
    assert "MFU" not in describe(training(3), 10)
    assert "  MFU 41.2%  " in describe(training(3, mfu=0.4123), 10)


def test_wandb_gets_every_number_under_its_split(tmp_path, wandb):
    config = wandb_config(tmp_path, "log.wandb=true", "log.wandb_project=genomes")
    metrics = Metrics.open(tmp_path, total_steps=4, step=0, wandb=WandbRun.of(config))
    metrics.write(training(1))
    metrics.write(VALID)
    metrics.close()
    (run, arguments) = wandb.runs[0]
    assert (arguments["project"], arguments["name"], arguments["dir"]) == ("genomes", "mine", str(tmp_path))
    assert arguments["config"]["optim"]["lr"] == config.optim.lr
    assert "mode" not in arguments, "WANDB_MODE decides"
    assert run.metrics == [("step", None), ("*", "step")]
    assert run.logged[0] == {f"train/{k}": v for k, v in training(1).items() if k != "step"} | {"step": 1}
    assert run.logged[1]["valid/loss"] == 1.25
    assert run.finished


def test_wandb_goes_on_in_the_same_run_and_needs_no_network_if_told(tmp_path, wandb):
    settings = WandbRun.of(wandb_config(tmp_path, "log.wandb=true", "log.wandb_offline=true"))
    for step in (0, 5, 0):
        Wandb(tmp_path, settings, step=step).close()
    first, resumed, anew = (arguments for _, arguments in wandb.runs)
    assert first["mode"] == "offline"
    assert first["id"] == resumed["id"] != anew["id"]
    assert resumed["resume"] == "allow"


def test_wandb_is_off_by_default(tmp_path):
    assert WandbRun.of(wandb_config(tmp_path)) is None


def test_what_is_not_installed_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        check_sinks(LogSection(wandb=True, tensorboard=True))
    assert len(caught.value.problems) == 2
    assert "log.wandb: Weights & Biases is not installed; pip install 'seqengine-train[wandb]'" in str(caught.value)
    with pytest.raises(InputError, match=r"log\.wandb"):
        Metrics.open(tmp_path, total_steps=1, step=0, wandb=WandbRun("p", "n", False, {}))
    assert list(tmp_path.iterdir()) == []
    check_sinks(LogSection())


def test_tensorboard_shows_a_run_that_went_back_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path)
    for step in (1, 2, 3):
        sink.write(training(step, loss=float(step)))
    sink.write(VALID)
    sink.rewind(1)
    sink.write(training(2, loss=20.0))
    sink.close()
    TensorBoard(tmp_path, step=2).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]


def test_numbers_and_times_for_people():
    assert [short_number(x) for x in (0, 950, 999.7, 12345, 1.05e6, 13.1e9, 2e12)] == [
        "0", "950", "1k", "12.3k", "1.05M", "13.1B", "2T",
    ]  # fmt: skip
    assert [duration(x) for x in (0, 61, 86399, 90061)] == ["00:00:00", "00:01:01", "23:59:59", "1 d 01:01:01"]


def test_lines_are_json_even_where_a_loss_is_no_number(tmp_path):
    metrics = Metrics.open(tmp_path, total_steps=1, step=0)
    metrics.write(training(1, loss=math.nan))
    metrics.close()
    assert math.isnan(json.loads((tmp_path / "metrics.jsonl").read_text())["loss"])


def test_an_event_that_a_death_cut_short_costs_no_other(tmp_path):
    for number in range(3):
        events = Events(tmp_path)
        events.write({"event": "start", "step": number})
        events.close()
        with (tmp_path / Events.FILE).open("a") as file:
            file.write('{"event": "spi')
    assert [event["step"] for event in read_events(tmp_path)] == [0, 1, 2]
