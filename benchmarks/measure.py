"""What every benchmark does alike: check, then time in turns, count what is saved, and write a record.

A contender is timed only if its output and every gradient are right against a reference in float64. Each repetition times
all contenders one after the other, so that a busy machine slows all, and ratios are taken within a repetition.

On a CUDA device the time is the device's own, between two events around enough calls to last TIMED_SECONDS; inputs are rotated
among copies that together exceed the second-level cache several times, as long as at most MOST_COPIES are enough.
"""

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor]
Call = Callable[[int], None]

ROOT = Path(__file__).resolve().parent.parent
TIMED_SECONDS, MOST_CALLS = 5e-3, 50
"""On a CUDA device one timing lasts about so long, with at most so many calls."""
CACHES, MOST_COPIES = 3, 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
PRECISION_TOLERANCE = {"auto": 0.0, "ieee": 0.0, "bf16x3": 5e-5, "tf32": 2e-3, "fp16": 4e-3}
"""Largest error relative to the largest value: of a dtype, and of the operands of matrix products."""
NO_MEMORY = "out of memory"
FAULTS = ("wrong", "raised")
"""How the reasons begin that are a contender's own fault."""


@dataclass(frozen=True)
class Contender:
    """A function under test; it is refused if its error exceeds the tolerance."""

    name: str
    run: Function
    tolerance: float


@dataclass(frozen=True)
class Comparison:
    """Ours against one opponent: medians over repetitions. A ratio above 1 means that ours is faster."""

    ours: str
    opponent: str
    forward_ratio: float
    forward_ratio_spread: tuple[float, float]
    """First and third quartile."""
    both_ratio: float
    both_ratio_spread: tuple[float, float]
    ours_forward_ms: float
    ours_both_ms: float
    opponent_forward_ms: float
    opponent_both_ms: float
    ours_saved_bytes: int
    """Between forward and backward, beside the inputs."""
    opponent_saved_bytes: int
    largest_error: float
    opponent_error: float


def outcome(function: Function, inputs: Inputs, dy: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every input."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y = function(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def largest_error(function: Function, exact: dict[str, Tensor], inputs: Inputs, dy: Tensor) -> float:
    """Largest error relative to the largest value, over output and gradients; infinite if any is not finite."""
    worst = 0.0
    for name, found in outcome(function, inputs, dy).items():
        expected = exact[name]
        if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
            return float("inf")
        scale = float(expected.abs().max())
        worst = max(worst, float((found.double() - expected).abs().max()) / max(scale, 1e-300))
    return worst


def saved_bytes(function: Function, inputs: Inputs) -> int:
    """Bytes that autograd keeps between forward and backward, the inputs themselves left out."""
    given = {t.untyped_storage().data_ptr() for t in inputs.values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = function(inputs)
    del y
    return sum(kept.values())


def copies(inputs: Inputs, dy: Tensor) -> list[tuple[Inputs, Tensor]]:
    """The inputs, as leaves that want gradients, and dy; on a CUDA device several times."""
    count = 1
    if dy.device.type == "cuda":
        size = sum(t.nbytes for t in inputs.values()) + dy.nbytes
        cache = int(torch.cuda.get_device_properties(dy.device).L2_cache_size)
        count = max(1, min(MOST_COPIES, -(-CACHES * cache // max(1, size))))
    return [
        ({name: t.detach().clone().requires_grad_() for name, t in inputs.items()}, dy.clone() if i else dy)
        for i in range(count)
    ]


def forward_call(function: Function, sets: list[tuple[Inputs, Tensor]]) -> Call:
    def call(i: int) -> None:
        with torch.no_grad():
            function(sets[i % len(sets)][0])

    return call


def both_call(function: Function, sets: list[tuple[Inputs, Tensor]]) -> Call:
    def call(i: int) -> None:
        inputs, dy = sets[i % len(sets)]
        torch.autograd.grad(function(inputs), list(inputs.values()), dy)

    return call


def captured(call: Call, count: int) -> Call:
    """The same calls as CUDA graphs, one for each copy of the inputs: device time without the gaps between launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graphs: list[torch.cuda.CUDAGraph] = []
    for i in range(count):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            call(i)
        graphs.append(graph)
    return lambda i: graphs[i % count].replay()


def seconds(call: Call, calls: int, device: torch.device) -> float:
    """Seconds of one of so many calls in a row."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(calls):
            call(i)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    begin = time.perf_counter()
    for i in range(calls):
        call(i)
    return (time.perf_counter() - begin) / calls


def calls_needed(call: Call, device: torch.device) -> int:
    """Warms up. One on a CPU."""
    call(0)
    if device.type != "cuda":
        return 1
    seconds(call, 2, device)
    return max(1, min(MOST_CALLS, round(TIMED_SECONDS / max(1e-7, seconds(call, 2, device)))))


def in_turns(calls: dict[str, Call], device: torch.device, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call, repetition by repetition, after a warm-up."""
    counts = {name: calls_needed(call, device) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            found[name].append(seconds(call, counts[name], device))
    return found


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    given = list(values)
    if len(given) == 1:
        return given[0], given[0], given[0]
    low, middle, high = statistics.quantiles(given, n=4, method="inclusive")
    return low, middle, high


@dataclass(frozen=True)
class Timing:
    """One contender by itself: medians over repetitions."""

    name: str
    forward_ms: float
    both_ms: float
    saved_bytes: int
    largest_error: float


@dataclass
class Race:
    """What came out: every pair of ours and opponent, why contenders are missing, and all that were timed."""

    comparisons: list[Comparison]
    refused: dict[str, str]
    timings: list[Timing] = field(default_factory=list)


def race(
    ours: list[Contender],
    opponents: list[Contender],
    reference: Function,
    inputs: Inputs,
    dy: Tensor,
    few: Callable[[Tensor], Tensor],
    repetitions: int,
    graphs: bool = False,
    alone: bool = False,
) -> Race:
    """Checks all contenders on `few` of the inputs, then times those that are right on all of them.

    Without a pair of ours and opponent nothing is timed, unless `alone`.
    """
    sample, sample_dy = {name: few(t) for name, t in inputs.items()}, few(dy)
    exact = outcome(reference, {name: t.double() for name, t in sample.items()}, sample_dy.double())
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    sets = copies(inputs, dy)
    ready: list[Contender] = []
    for contender in (*ours, *opponents):
        try:
            error = largest_error(contender.run, exact, sample, sample_dy)
            if error <= contender.tolerance:
                both_call(contender.run, sets)(0)
                errors[contender.name] = error
                ready.append(contender)
            else:
                refused[contender.name] = f"wrong: error {error:.1e} > {contender.tolerance:.0e}, not timed"
        except torch.OutOfMemoryError:
            refused[contender.name] = NO_MEMORY
            torch.cuda.empty_cache()
        except Exception as failure:  # noqa: BLE001 - whatever a contender raises is reported; the others go on
            refused[contender.name] = f"raised {type(failure).__name__}: {str(failure).splitlines()[:1]}"
    names = {c.name for c in ready}
    pairs = [(a.name, b.name) for a in ours for b in opponents if a.name in names and b.name in names]
    if not pairs and not (alone and ready):
        return Race([], refused)
    device = dy.device
    times: list[dict[str, list[float]]] = []
    for make in (forward_call, both_call):
        calls = {c.name: make(c.run, sets) for c in ready}
        if graphs:
            calls = {name: captured(call, len(sets)) for name, call in calls.items()}
        times.append(in_turns(calls, device, repetitions))
    saved = {c.name: saved_bytes(c.run, sets[0][0]) for c in ready}
    medians = [{name: statistics.median(t) * 1e3 for name, t in found.items()} for found in times]
    timings = [Timing(n, medians[0][n], medians[1][n], saved[n], errors[n]) for n in errors]
    return Race([_compared(a, b, times[0], times[1], saved, errors) for a, b in pairs], refused, timings)


def _compared(
    ours: str,
    opponent: str,
    forward: dict[str, list[float]],
    both: dict[str, list[float]],
    saved: dict[str, int],
    errors: dict[str, float],
) -> Comparison:
    ratios = [quartiles(b / a for a, b in zip(t[ours], t[opponent], strict=True)) for t in (forward, both)]
    (f_low, f_middle, f_high), (b_low, b_middle, b_high) = ratios
    medians = [statistics.median(t[name]) * 1e3 for name in (ours, opponent) for t in (forward, both)]
    return Comparison(
        ours, opponent, f_middle, (f_low, f_high), b_middle, (b_low, b_high), *medians,
        saved[ours], saved[opponent], errors[ours], errors[opponent],
    )  # fmt: skip


def describe(c: Comparison) -> str:
    """One line for people."""
    low, high = c.both_ratio_spread
    return (
        f"{c.ours} vs {c.opponent}: forward {c.forward_ratio:.2f}x, "
        f"forward + backward {c.both_ratio:.2f}x ({low:.2f}..{high:.2f}), "
        f"{c.ours_both_ms:.3g} against {c.opponent_both_ms:.3g} ms, "
        f"saves {c.ours_saved_bytes / 2**20:.3g} of {c.opponent_saved_bytes / 2**20:.3g} MiB, error {c.largest_error:.0e}"
    )


def available_bytes(device: torch.device) -> int:
    """Memory that a benchmark may take now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def lacks_memory(needed: int, device: torch.device) -> str | None:
    """Why so many bytes do not fit; None if they do."""
    available = available_bytes(device)
    if needed <= available:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} are free"


def is_installed(module: str) -> bool:
    return util.find_spec(module) is not None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads, commit and date."""
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    return {
        "torch": torch.__version__,
        "triton": metadata.version("triton") if is_installed("triton") else None,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def headline(device: torch.device) -> str:
    e = environment(device)
    name = f"{e['device']} ({e['device_name']})" if e["device_name"] else e["device"]
    return f"torch {e['torch']}, triton {e['triton']}, {name}, {e['threads']} threads, commit {e['commit']}"


def report(case: Any, race: Race, theirs: Iterable[str], results: list[Any], skipped: list[Any]) -> bool:
    """Prints a case's comparisons and refusals and adds them to the lists; whether one of ours is at fault."""
    for comparison in race.comparisons:
        results.append(row(case, comparison))
        print(f"{case}: {describe(comparison)}", flush=True)
    for name, why in race.refused.items():
        skipped.append({"case": str(case), "contender": name, "reason": why})
        print(f"{case}: {name} skipped: {why}", flush=True)
    return any(why.startswith(FAULTS) for name, why in race.refused.items() if name not in theirs)


def write_json(
    target: Path, device: torch.device, results: list[dict[str, Any]], skipped: list[dict[str, Any]], **more: Any
) -> None:
    """The record of a run."""
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {**environment(device), "results": results, "skipped": skipped, **more}
    target.write_text(json.dumps(record, indent=1) + "\n")


def row(case: Any, found: Any) -> dict[str, Any]:
    """A line of a record: the fields of the case and of what was found."""
    return {**asdict(case), **asdict(found)}


def draw(rows: list[dict[str, Any]], label: Callable[[dict[str, Any]], str], target: Path, title: str) -> None:
    """Speed-up of forward and backward over length, a line for each label; without matplotlib or rows a printed line."""
    if not is_installed("matplotlib"):
        print(f"{target.name}: not drawn, matplotlib is not installed")
        return
    if not rows:
        print(f"{target.name}: not drawn, nothing was compared")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        lines.setdefault(label(r), []).append(r)
    for name, found in sorted(lines.items()):
        found.sort(key=lambda r: int(r["length"]))
        axes.plot([r["length"] for r in found], [r["both_ratio"] for r in found], "o-", label=name, markersize=4)
    axes.axhline(1.0, color="gray", linewidth=1)
    axes.set(xlabel="T", ylabel="times the opponent's speed, forward + backward", title=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(target, dpi=120)
