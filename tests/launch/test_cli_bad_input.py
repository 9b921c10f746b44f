"""Bad input to the command: exit code 2, messages that name the key, file or line, and nothing written."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from seqengine.launch import process
from seqengine.launch.cli import main
from tests.launch.bad_configs import CONFIGS
from tests.launch.bad_data import DATA
from tests.launch.bad_input import CONFIG, fasta
from tests.launch.bad_runs import FLAGS, RUNS

CASES = [*CONFIGS, *DATA, *RUNS]


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch):
    """A command sets what holds for its process, which tests share with it."""
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


def write_inputs(folder: Path) -> None:
    (folder / "genome.fa").write_text(fasta())
    (folder / "tiny.toml").write_text(CONFIG)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the run of tiny.toml, in runs/run."""
    folder = tmp_path_factory.mktemp("trained")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(process, "keep_freed_memory", lambda: None)
        assert main(["train", "tiny.toml"]) == 0
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Good inputs, which a test spoils."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(*, without: Path | None = None) -> dict[str, str]:
    """Everything below the working directory: contents of files, marks of directories."""
    found = {}
    for path in sorted(Path().rglob("*")):
        if without is None or (path != without and without not in path.parents):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
    return found


def packs(cache: Path) -> set[str]:
    """Names of what lies in the cache, none of it half-written."""
    names = {path.name for path in cache.iterdir()} if cache.exists() else set()
    assert all((cache / name / "index.json").is_file() for name in names), names
    return names


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.arguments)[:40] + "|" + case.words[-1][:30])
def test_bad_input_is_told_and_leaves_nothing(case, folder, capsys, request):
    if case.has_run:
        shutil.copytree(request.getfixturevalue("trained") / "runs", "runs")
    if case.prepare is not None:
        case.prepare()
    capsys.readouterr()
    cache = Path("runs/cache")
    left_out = cache if case.packs or case.has_run else None
    before, packed = snapshot(without=left_out), packs(cache)
    code = main(case.arguments)
    told = capsys.readouterr()
    assert code == 2, told
    assert told.out == ""
    lines = told.err.splitlines()
    assert len(lines) == case.problems
    assert all(line.startswith("seqengine: ") for line in lines), told.err
    assert all(word in told.err for word in case.words), told.err
    after = snapshot(without=left_out)
    if left_out is not None:
        assert packs(cache) >= packed
        after = {path: mark for path, mark in after.items() if path != "runs" or path in before}
    assert after == before


@pytest.mark.parametrize("case", FLAGS, ids=lambda case: " ".join(case.arguments)[:40])
def test_words_that_no_command_takes_are_told_with_its_usage(case, folder, capsys):
    before = snapshot()
    with pytest.raises(SystemExit) as raised:
        main(case.arguments)
    assert raised.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("usage: seqengine")
    assert told.err.splitlines()[-1].startswith("seqengine")
    assert all(word in told.err for word in case.words), told.err
    assert snapshot() == before


def refused(capsys, *arguments: str) -> str:
    before = snapshot()
    code = main(arguments)
    told = capsys.readouterr().err
    assert code == 2, told
    assert snapshot() == before
    return told


def test_cuda_where_there_is_none(folder, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "run.device: CUDA is not available here" in refused(capsys, "train", "tiny.toml", "run.device=cuda")


def test_half_an_environment_of_a_launcher(folder, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE='two'" in refused(capsys, "train", "tiny.toml")


@pytest.mark.parametrize("line", ["3", "{}", '{"step": "two"}'])
def test_a_line_that_is_no_metric_is_told_and_kept(trained, folder, capsys, line):
    shutil.copytree(trained / "runs", "runs")
    file = Path("runs/run/metrics.jsonl")
    file.write_text(f"{line}\n" + file.read_text())
    before = file.read_text()
    assert main(["train", "tiny.toml", "train.steps=4"]) == 2
    assert "runs/run/metrics.jsonl:1: " in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.sequence=2"], "must be the number of processes; got 3"),
        (["parallel.backend=fsdp2"], "3 must divide the 8 windows of a step"),
        (["parallel.backend=deepspeed", "parallel.zero=1"], "3 must divide the 8 windows of a step"),
    ],
)
def test_mesh_that_does_not_cover_the_processes(folder, capsys, monkeypatch, overrides, words):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert words in refused(capsys, "train", "tiny.toml", *overrides)


def test_there_are_at_least_a_hundred_cases():
    assert len(CASES) >= 100
