"""Tests for a CUDA device, skipped where there is none. With OUT set, errors go to OUT/errors.jsonl; their table is printed."""

import json
import os
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once: cuBLAS is deterministic only with it

import pytest
import torch


def errors_file() -> Path | None:
    return Path(os.environ["OUT"]) / "errors.jsonl" if os.environ.get("OUT") else None


def pytest_sessionstart(session):
    """One process empties the file; the workers of a parallel run append to it."""
    target = errors_file()
    if target is not None and "PYTEST_XDIST_WORKER" not in os.environ and torch.cuda.is_available():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("")


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def record_error(request):
    """record_error(how, dtype, what, error, limit): one line of the table."""

    def record(how: str, dtype: torch.dtype, what: str, error: float, limit: float) -> None:
        target = errors_file()
        if target is not None:
            line = {"test": request.node.name, "how": how, "dtype": str(dtype).removeprefix("torch.")}
            with target.open("a") as file:
                file.write(json.dumps({**line, "what": what, "error": error, "limit": limit}) + "\n")

    return record


def pytest_terminal_summary(terminalreporter):
    """The largest error of each way, dtype and tensor."""
    target = errors_file()
    if target is None or not target.exists() or not torch.cuda.is_available():
        return
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for line in target.read_text().splitlines():
        r = json.loads(line)
        row = worst.setdefault((r["how"], r["dtype"]), {})
        row[r["what"]] = max(row.get(r["what"], 0.0), r["error"])
    terminalreporter.section("largest relative L2 errors against float64")
    for (how, dtype), row in sorted(worst.items()):
        found = ", ".join(f"{what} {error:.0e}" for what, error in row.items())
        terminalreporter.write_line(f"{how} {dtype}: {found}")
