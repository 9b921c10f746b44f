"""Launches in tests: a working directory with a config and no Slurm, and small scripts that play Slurm's commands."""

import subprocess
from pathlib import Path

import pytest

from seqengine.launch.cli import main
from tests.seqengine.runs import BASE

CPU = ("--gpus-per-node", "0", "--tasks-per-node")
TWO_NODES = ("--scheduler", "slurm", "--nodes", "2", *CPU, "1")
TOOLS = ("bash", "sh", "cat", "cp", "rm", "head", "touch", "sleep", "true", "ls")
"""What the scripts need of a system."""


def make_workplace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test."""
    tools, work = folder / "tools", folder / "work"
    for new in (tools, work):
        new.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(Path("/bin", name))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.chdir(work)
    (work / "small.toml").write_text(BASE)
    return work


def install(folder: Path, commands: dict[str, str]) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\ncd '{folder}'\n{text}\n")
        (folder / "bin" / name).chmod(0o755)


def launch(capsys, *arguments: str, code: int = 0) -> str:
    assert main(["launch", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def refused(capsys, *arguments: str) -> str:
    before = set(Path.cwd().rglob("*"))
    message = launch(capsys, *arguments, code=2)
    assert set(Path.cwd().rglob("*")) - before <= {Path.cwd() / "runs", *Path("runs/cache").absolute().rglob("*")} | {
        Path("runs/cache").absolute()
    }, "something was left behind"
    assert "Traceback" not in message
    return message


def dry(capsys, *arguments: str) -> str:
    before = set(Path.cwd().rglob("*"))
    script = launch(capsys, "small.toml", *arguments, "--dry-run")
    assert set(Path.cwd().rglob("*")) == before, "a dry run wrote something"
    checked = subprocess.run(["/bin/bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    return script
