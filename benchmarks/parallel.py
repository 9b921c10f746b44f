"""A sequence over P processes: bytes, messages and time of each twin, against one process and the ways of the field.

    python benchmarks/parallel.py --out benchmarks/results/here
    python benchmarks/parallel.py --operators gla attention --ranks 4 --length 2^12

For every operator and P: ours, the ways of `parallel_peers.py`, and the plain kernel on the whole sequence in one process. All
are checked first, on the sizes that are timed: output and every gradient against the plain kernel in float64, once with float64
inputs (to 1e-10), once with those that are timed. What is wrong is not timed.

Bytes, calls and messages are counted at the collective calls, on every rank, forward and backward. Time is of forward and
backward, from the first rank's begin to the last one's end; contenders take turns, and ratios are taken within a turn: the
median, and the first and third quartile. Processes are joined by gloo and have one thread each. Where P exceeds the cores they
share them: bytes, calls and messages hold for any machine, times for this one alone. Writes parallel.json and parallel.png to
--out.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
from conv import parse_length
from measure import FAULTS, TOLERANCE, Inputs
from parallel_peers import CPU, OPERATORS, Case, Operator, Twin
from torch import Tensor

from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext

EXACT = 1e-10
"""Largest error with float64 inputs, relative to the largest value."""
GROUP_SECONDS = 300
"""A rank that waits so long for another raises."""
JOIN_SECONDS = 20
SHORTEST = 4
"""Tokens of a rank: as many as the short convolution has taps."""
COLUMNS = 5
"""Operators beside each other in the picture."""
PLAIN = "plain"


@dataclass(frozen=True)
class Sent:
    """By rank, one forward and backward."""

    forward_bytes: list[int]
    backward_bytes: list[int]
    calls: list[int]
    """Collective calls and batches of messages."""
    messages: list[int]
    """Peers that got something, summed over the calls."""

    @property
    def most_bytes(self) -> int:
        """Of the busiest rank."""
        return busiest(asdict(self))


def busiest(sent: dict[str, list[int]]) -> int:
    """Forward and backward bytes of the rank that sends most."""
    return max(a + b for a, b in zip(sent["forward_bytes"], sent["backward_bytes"], strict=True))


@dataclass(frozen=True)
class Ratio:
    """Median over turns of another's time by this one's: above 1, this one is faster."""

    median: float
    spread: tuple[float, float]
    """First and third quartile."""

    @classmethod
    def of(cls, others: list[float], mine: list[float]) -> "Ratio":
        low, middle, high = measure.quartiles(b / a for a, b in zip(mine, others, strict=True))
        return cls(middle, (low, high))

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.spread[0]:.2f}..{self.spread[1]:.2f})"


@dataclass(frozen=True)
class Found:
    """One contender of a case."""

    contender: str
    is_ours: bool
    sent: Sent
    both_ms: float
    """Forward and backward, median."""
    plain_ms: float
    speed_up: Ratio
    """Over the plain kernel in one process."""
    ours_faster: Ratio | None
    """The first of ours over this one."""
    error: float
    float64_error: float

    def describe(self, ours: "Found | None") -> str:
        """One line for people."""
        text = (
            f"{self.contender:<22} {self.sent.most_bytes:>12,} bytes {max(self.sent.calls):>2} calls "
            f"{max(self.sent.messages):>2} messages {self.both_ms:>8.4g} ms, {self.speed_up} plain"
        )
        if ours is None or ours is self or self.ours_faster is None:
            return text
        of_bytes = f"{self.sent.most_bytes / ours.sent.most_bytes:.3g}" if ours.sent.most_bytes else "-"
        return f"{text}; {of_bytes}x the bytes of {ours.contender}, which is {self.ours_faster} as fast"


@dataclass
class Result:
    """What came out of a case."""

    case: Case
    found: list[Found]
    refused: dict[str, str]
    """Contender -> why."""
    failed: list[str] = field(default_factory=list)
    """Of ours, those at fault."""


def local(operator: Operator, x: Inputs, ctx: SequenceContext) -> Inputs:
    """This rank's parts."""
    return {n: ctx.split(t, operator.sharded[n]) if n in operator.sharded else t for n, t in x.items()}


def error_of(operator: Operator, run: Twin, exact: Inputs, dtype: torch.dtype, ctx: SequenceContext) -> float:
    """Largest error over ranks, output and gradients, relative to the largest value; infinite if any is not finite."""
    x = local(operator, {n: t.to(dtype) for n, t in operator.inputs.items()}, ctx)
    dim = operator.output_dim
    dy = operator.dy.to(dtype) if dim is None else ctx.split(operator.dy.to(dtype), dim)
    worst = 0.0
    for name, part in measure.outcome(lambda leaves: run(leaves, ctx), x, dy).items():
        found, expected = part.double(), exact[name]
        scale = max(float(expected.abs().max()), 1e-300)
        own_dim = dim if name == "output" else operator.sharded.get(name)
        if own_dim is not None:
            expected = ctx.split(expected, own_dim)
        elif name != "output":  # of parameters, ranks have partial sums
            found = comm.all_reduce_sum(found.clone(), ctx.group)
        good = found.shape == expected.shape and bool(torch.isfinite(found).all())
        worst = max(worst, float((found - expected).abs().max()) / scale if good else float("inf"))
    errors: list[Any] = comm.gather_objects(worst, ctx.group)
    return float(max(errors))


def refusal(
    operator: Operator, run: Twin, exact: Inputs, ctx: SequenceContext
) -> tuple[str | None, tuple[float, float]]:
    """Why a contender is not timed, the same on all ranks, or None; its errors in float32 and in float64."""
    errors = []
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, TOLERANCE[torch.float32])):
        why = None
        try:
            errors.append(error_of(operator, run, exact, dtype, ctx))
        except ValueError as failure:  # checks come before any message: the other ranks have raised too
            why = f"raised {type(failure).__name__}: {str(failure).splitlines()[:1]}"
        raised = [w for w in comm.gather_objects(why, ctx.group) if w is not None]
        if raised:
            return str(raised[0]), (0.0, 0.0)
        if errors[-1] > tolerance:
            name = str(dtype).removeprefix("torch.")
            return f"wrong: error {errors[-1]:.1e} > {tolerance:.0e} in {name}, not timed", (0.0, 0.0)
    return None, (errors[1], errors[0])


def count(operator: Operator, run: Twin, x: Inputs, dy: Tensor, ctx: SequenceContext) -> Sent:
    """What every rank sends."""
    ledger = ctx.ledger()
    ledger.clear()
    y = run(x, ctx)
    forward = ledger.sent_bytes()
    torch.autograd.grad(y, list(x.values()), dy)
    mine = (forward, ledger.sent_bytes() - forward, len(ledger.entries), sum(e.messages for e in ledger.entries))
    ranks: list[Any] = comm.gather_objects(mine, ctx.group)
    return Sent(*(list(column) for column in zip(*ranks, strict=True)))


def in_turns(calls: dict[str, Callable[[], None]], repetitions: int, ctx: SequenceContext) -> dict[str, list[float]]:
    """Seconds of each call, turn by turn: from the first rank's begin to the last one's end. The plain one is rank 0's."""
    marks: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            comm.barrier(ctx.group)
            begin = time.perf_counter()
            if name != PLAIN or ctx.rank == 0:
                call()
                marks[name].append((begin, time.perf_counter()))
    ranks: list[Any] = comm.gather_objects(marks, ctx.group)
    return {
        name: [
            max(end for _, end in turn) - min(begin for begin, _ in turn)
            for turn in zip(*(of[name] for of in ranks if of[name]), strict=True)
        ]
        for name in calls
    }


def reference(operator: Operator, ctx: SequenceContext) -> Inputs:
    """Output and gradients of the plain kernel in float64, from rank 0."""
    x, dy = {n: t.double() for n, t in operator.inputs.items()}, operator.dy.double()
    if ctx.rank == 0:
        exact = measure.outcome(operator.plain, x, dy)
    else:
        shape = operator.dy.shape  # y's
        exact = {"output": torch.empty(shape, dtype=torch.float64), **{n: torch.empty_like(t) for n, t in x.items()}}
    if ctx.group is not None:
        for t in exact.values():
            for work in comm.start_broadcast(t.contiguous(), 0, ctx.group, ctx.ledger(), "reference"):
                work.wait()
    return exact


def measure_case(case: Case, group: dist.ProcessGroup | None, repetitions: int) -> Result:
    """On every rank alike: checks, counts and times all contenders."""
    operator = OPERATORS[case.operator].make(case)
    ctx = SequenceContext.even(group, case.length)
    first = next(iter(operator.ours))
    contenders = {**operator.ours, **operator.peers} if ctx.size > 1 else {first: operator.ours[first]}
    exact = reference(operator, ctx)
    ready: dict[str, tuple[Twin, tuple[float, float]]] = {}
    refused: dict[str, str] = {}
    for name, run in contenders.items():
        why, errors = refusal(operator, run, exact, ctx)
        if why is None:
            ready[name] = (run, errors)
        else:
            refused[name] = why
    del exact
    x = {n: t.clone().requires_grad_() for n, t in local(operator, operator.inputs, ctx).items()}
    dy = operator.dy if operator.output_dim is None else ctx.split(operator.dy, operator.output_dim).clone()
    whole = {n: t.clone().requires_grad_() for n, t in operator.inputs.items()}

    def both(run: Twin) -> None:
        torch.autograd.grad(run(x, ctx), list(x.values()), dy)

    def plain() -> None:
        torch.autograd.grad(operator.plain(whole), list(whole.values()), operator.dy)

    if ctx.rank == 0:
        plain()  # the others are warm
    sent = {name: count(operator, run, x, dy, ctx) for name, (run, _) in ready.items()}
    seconds = in_turns({PLAIN: plain, **{n: partial(both, run) for n, (run, _) in ready.items()}}, repetitions, ctx)
    found = []
    for name, (_, errors) in ready.items():
        to_ours = Ratio.of(seconds[name], seconds[first]) if first in ready and name != first else None
        both_ms, plain_ms = (measure.quartiles(seconds[n])[1] * 1e3 for n in (name, PLAIN))
        speed_up, is_ours = Ratio.of(seconds[PLAIN], seconds[name]), name in operator.ours
        found.append(Found(name, is_ours, sent[name], both_ms, plain_ms, speed_up, to_ours, *errors))
    failed = [name for name, why in refused.items() if name in operator.ours and why.startswith(FAULTS)]
    return Result(case, found, refused, failed)


def _rank(rank: int, ranks: int, folder: str, cases: list[Case], repetitions: int, results: Connection) -> None:
    """One of the processes; rank 0 sends the results. One that raises prints why, and ends the others by leaving."""
    torch.set_num_threads(1)
    group = None
    if ranks > 1:
        rendezvous, wait = f"file://{folder}/rendezvous", timedelta(seconds=GROUP_SECONDS)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=wait)
        group = dist.group.WORLD
    if rank > 0:
        results.close()
    for case in cases:
        result = measure_case(case, group, repetitions)
        if rank == 0:
            results.send(result)
    comm.barrier(group)


def over_ranks(ranks: int, cases: list[Case], repetitions: int) -> Iterator[Result]:
    """Results of the cases on so many processes, as they come. Raises RuntimeError if a process fails."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, cases, repetitions, writer)
        processes = [context.Process(target=_rank, args=(r, *arguments), daemon=True) for r in range(ranks)]
        for process in processes:
            process.start()
        writer.close()
        try:
            for _ in cases:
                yield reader.recv()
            for process in processes:
                process.join(JOIN_SECONDS)
        except EOFError as error:
            raise RuntimeError(f"P {ranks}: a process failed, its error is above") from error
        finally:
            for process in processes:
                process.kill()
                process.join()
            reader.close()


def report(result: Result) -> None:
    alone = f"; one process {result.found[0].plain_ms:.4g} ms" if result.found else ""
    print(f"{result.case}: {result.case.sizes()}{alone}")
    first = next((found for found in result.found if found.is_ours), None)
    for found in result.found:
        print(f"  {found.describe(first)}", flush=True)
    for name, why in result.refused.items():
        print(f"  {name} skipped: {why}", flush=True)


def draw(found: list[dict[str, Any]], target: Path, title: str) -> None:
    """Bytes of the busiest rank and, below, time over P: a panel for each operator, a line for each contender."""
    if not measure.is_installed("matplotlib"):
        print(f"{target.name}: not drawn, matplotlib is not installed")
        return
    if not found:
        print(f"{target.name}: not drawn, nothing was measured")
        return
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    operators = list(dict.fromkeys(r["operator"] for r in found))
    contenders = dict.fromkeys(r["contender"] for r in found)
    colors = {name: colormaps["tab20"](i % 20) for i, name in enumerate(contenders)}
    columns = min(COLUMNS, len(operators))
    height = -(-len(operators) // columns)
    figure = Figure(figsize=(2.8 * columns + 2.2, 4.8 * height), layout="constrained")
    panels = figure.subplots(2 * height, columns, squeeze=False, sharex=True)
    for i, operator in enumerate(operators):
        upper, lower = (panels[2 * (i // columns) + below][i % columns] for below in (0, 1))
        lines = [r for r in found if r["operator"] == operator]
        alone = {r["ranks"]: r["plain_ms"] for r in lines}
        lower.plot(list(alone), list(alone.values()), "k:", label="one process")
        for name in dict.fromkeys(r["contender"] for r in lines):
            line = [r for r in lines if r["contender"] == name]
            style = {"color": colors[name], "linestyle": "-" if line[0]["is_ours"] else "--", "label": name}
            sent = {r["ranks"]: busiest(r["sent"]) for r in line if r["ranks"] > 1}
            upper.plot(list(sent), list(sent.values()), marker="o", markersize=4, **style)
            lower.plot([r["ranks"] for r in line], [r["both_ms"] for r in line], marker="o", markersize=4, **style)
        upper.set(title=operator, yscale="log", xticks=sorted(alone))
        lower.set(yscale="log", xlabel="P")
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
        if i % columns == 0:
            upper.set(ylabel="bytes of the busiest rank")
            lower.set(ylabel="ms, forward + backward")
    for panel in panels.flat:
        panel.set_visible(panel.has_data())
    entries = {label: h for p in panels.flat for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(target, dpi=100)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="P, by rising number")
    parser.add_argument("--length", type=parse_length, help="tokens of the whole, of every operator; each has its own")
    parser.add_argument("--batch", type=int, help="of every operator; 1, and 4 of rnn")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="K = V; convolutions have heads * width channels")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for parallel.json and parallel.png")
    parser.add_argument("--name", default="parallel", help="of the two files")
    parser.add_argument("--no-picture", action="store_true", help="write the record only")
    arguments = parser.parse_args(argv)
    for ranks in arguments.ranks:
        if ranks < 1:
            parser.error(f"--ranks must be at least 1; got {ranks}")
        for case in cases(arguments, ranks):
            if case.length % ranks or case.length < SHORTEST * ranks:
                parser.error(f"T must be a multiple of P, and {SHORTEST} P or more; got {case.length} for P = {ranks}")
    return arguments


def cases(arguments: argparse.Namespace, ranks: int) -> list[Case]:
    found = []
    for name in arguments.operators:
        defaults = OPERATORS[name]
        length = arguments.length or defaults.length
        sizes = (arguments.batch or defaults.batch, arguments.heads, arguments.width, length)
        found.append(Case(name, ranks, *sizes, defaults.taps(length), defaults.vocabulary))
    return found


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(1)  # as every rank has
    cores = len(os.sched_getaffinity(0))
    print(measure.headline(CPU))
    print(
        f"P processes of one thread share {cores} cores: bytes, calls and messages are exact, times are of this machine"
    )
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    failed = []
    for ranks in sorted(set(arguments.ranks)):
        try:
            for result in over_ranks(ranks, cases(arguments, ranks), arguments.repetitions):
                report(result)
                found += [measure.row(result.case, line) for line in result.found]
                skipped += [{"case": str(result.case), "contender": n, "reason": w} for n, w in result.refused.items()]
                failed += [f"{result.case}: {name} is wrong or raised" for name in result.failed]
                if arguments.out:  # after every case: a run that is stopped has its record
                    measure.write_json(arguments.out / f"{arguments.name}.json", CPU, found, skipped, cores=cores)
        except RuntimeError as error:
            failed.append(str(error))
    if arguments.out and not arguments.no_picture:
        title = f"forward + backward over P processes of one thread on {cores} cores, {measure.headline(CPU)}"
        draw(found, arguments.out / f"{arguments.name}.png", title)
    if failed:
        print("\n".join(failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
