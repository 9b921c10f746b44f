"""Linear recurrences and recurrent cells against their opponents: correctness first, then medians of paired ratios.

    python benchmarks/recurrence.py --out benchmarks/results/here
    python benchmarks/recurrence.py --operators gla simple_gla --lengths 2^10:2^17 --loop-most 2^13
    python benchmarks/recurrence.py --operators lstm gru elman --heads 1 --lengths 2^11

Opponents: `loop` is the definition token by token under autograd, at the same T. Beyond --loop-most it is not measured, and
that length is measured too, so that every ratio is of one T. `torch.nn` is what torch.nn.LSTM, GRU and RNN call; it takes part
with --heads 1, where everyone multiplies the input by a matrix first. `fla` is the package fla-core, on CUDA.

Without --lengths the linear recurrences have T = 2,048 and 8,192, the cells 512 and 2,048. Output and every gradient are held
to the definition in float64 on the first --check-most tokens and, of linear recurrences, on one sample of two heads. Beside the
ratios a line gives the time of a token at each T: where it stays the same, time is linear in T. --out gets recurrence.json and
recurrence.png.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import measure
import torch
from conv import parse_length, parse_lengths
from measure import TOLERANCE, Contender, Function, Inputs
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seqengine.kernels.api import delta_rule, gla, rnn, simple_gla
from seqengine.kernels.delta_rule.op import Backend as DeltaBackend
from seqengine.kernels.linear_attention.op import Backend as LinearBackend
from seqengine.kernels.rnn.op import Backend as CellBackend
from seqengine.kernels.rnn.reference import NUM_GATES

SEGMENT = 64
"""Tokens of one call of the definition in the loop: a slice's gradient is as large as what it is a slice of."""
NAMES = ("loop", "torch.nn", "fla")


@dataclass(frozen=True)
class Linear:
    """A linear recurrence: our function, what it is called in fla, and the backends that it has."""

    function: Callable[..., Any]
    fla_module: str
    fla_name: str
    backends: tuple[str, ...]


LINEAR: dict[str, Linear] = {
    "gla": Linear(gla, "fla.ops.gla", "chunk_gla", get_args(LinearBackend)),
    "simple_gla": Linear(simple_gla, "fla.ops.simple_gla", "chunk_simple_gla", get_args(LinearBackend)),
    "delta_rule": Linear(delta_rule, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", get_args(DeltaBackend)),
}
CELLS = ("slstm", "lstm", "gru", "elman")
TORCH_CELLS: dict[str, Callable[..., Any]] = {"lstm": torch.lstm, "gru": torch.gru, "elman": torch.rnn_tanh}
DEFAULT_LENGTHS = {**dict.fromkeys(LINEAR, (2**11, 2**13)), **dict.fromkeys(CELLS, (2**9, 2**11))}


@dataclass(frozen=True)
class Case:
    """Sizes of a recurrence; K = V."""

    operator: str
    batch: int
    heads: int
    width: int
    length: int
    dtype: str
    checked: int
    """Tokens, from the first, on which the outcome is held to the definition."""

    def __str__(self) -> str:
        sizes = f"B {self.batch} H {self.heads} K {self.width} T {self.length:>7} {self.dtype}"
        short = f" (checked on {self.checked} tokens)" if self.checked < self.length else ""
        return f"{self.operator} {sizes}{short}"

    @property
    def loop_bytes(self) -> int:
        """About what autograd keeps of the loop: states of K V numbers or, in a cell, some forty vectors a token."""
        numbers = 3 * self.width if self.operator in LINEAR else 40
        return 4 * numbers * self.batch * self.heads * self.width * self.length

    @property
    def needed_bytes(self) -> int:
        """About what ours and the check take."""
        return 200 * self.batch * self.heads * self.width * self.length

    @property
    def projects(self) -> bool:
        """The cell multiplies its input by a matrix first, as torch.nn does."""
        return self.operator in TORCH_CELLS and self.heads == 1


def draw_inputs(case: Case, device: torch.device) -> tuple[Inputs, Tensor]:
    """Noise; gates of linear recurrences in float32, near 1 as models have them; keys of the delta rule of length 1."""
    generator = torch.Generator(device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)
    B, T, H, K = case.batch, case.length, case.heads, case.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    dy = normal(B, T, H, K).to(dtype)
    if case.operator in CELLS:
        G = NUM_GATES[case.operator]
        recurrent = (0.5 * K**-0.5 * normal(G, H, K, K)).to(dtype)
        if case.projects:
            x, weight = normal(B, T, K).to(dtype), (K**-0.5 * normal(G * K, K)).to(dtype)
            return {"x": x, "weight": weight, "recurrent": recurrent}, dy
        return {"gates": normal(B, T, G, H, K).to(dtype), "recurrent": recurrent}, dy
    q, k, v = (normal(B, T, H, K).to(dtype) for _ in range(3))
    if case.operator == "gla":
        return {"q": q, "k": k, "v": v, "g": F.logsigmoid(normal(B, T, H, K)) / 16}, dy
    g = F.logsigmoid(normal(B, T, H)) / 16
    if case.operator == "simple_gla":
        return {"q": q, "k": k, "v": v, "g": g}, dy
    beta = torch.sigmoid(normal(B, T, H)).to(dtype)
    return {"q": q, "k": F.normalize(k.float(), dim=-1).to(dtype), "v": v, "beta": beta, "g": g}, dy


def few(case: Case) -> Callable[[Tensor], Tensor]:
    """The first tokens and, of a linear recurrence, one sample of two heads. Matrices of cells have no such dimension 1."""
    if case.operator in LINEAR:
        return lambda t: t[:1, : case.checked, :2]
    return lambda t: t[:, : case.checked]


def _apply(case: Case, x: Inputs, **options: Any) -> Any:
    """Our function -> (y, state)."""
    if case.operator in LINEAR:
        return LINEAR[case.operator].function(**x, **options)
    return rnn(x["gates"], x["recurrent"], cell=case.operator, **options)  # type: ignore[arg-type]


def _projected(case: Case, x: Inputs) -> Inputs:
    if not case.projects:
        return x
    G, H, K, _ = x["recurrent"].shape
    return {"gates": F.linear(x["x"], x["weight"]).unflatten(-1, (G, H, K)), "recurrent": x["recurrent"]}


def ours(case: Case, backend: str) -> Function:
    return lambda x: _apply(case, _projected(case, x), backend=backend)[0]


def loop(case: Case, saves_all: bool = True) -> Function:
    """The definition token by token; or saving only the states between segments, for the check of any T."""

    def segment(x: Inputs, state: Any) -> Any:
        return _apply(case, x, backend="reference", initial_state=state, output_final_state=True)

    def call(x: Inputs) -> Tensor:
        x = _projected(case, x)
        whole = {name: t for name, t in x.items() if name == "recurrent"}
        cut = {name: t.split(SEGMENT, dim=1) for name, t in x.items() if name not in whole}
        outputs, state = [], None
        for parts in zip(*cut.values(), strict=True):
            own = {**dict(zip(cut, parts, strict=True)), **whole}
            run = segment if saves_all else partial(checkpoint, segment, use_reentrant=False, preserve_rng_state=False)
            y, state = run(own, state)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    return call


def torch_nn(case: Case) -> Function:
    """What the modules of torch.nn call, without biases."""

    def call(x: Inputs) -> Tensor:
        G, _, K, _ = x["recurrent"].shape
        start = x["x"].new_zeros(1, x["x"].shape[0], K)
        state = (start, start) if case.operator == "lstm" else start
        weights = [x["weight"], x["recurrent"].reshape(G * K, K)]
        y: Tensor = TORCH_CELLS[case.operator](x["x"], state, weights, False, 1, 0.0, True, False, True)[0]
        return y.unsqueeze(2)

    return call


def by_fla(case: Case) -> Function:
    """Its arguments have our names; its default scale is ours."""
    its = LINEAR[case.operator]
    function = getattr(importlib.import_module(its.fla_module), its.fla_name)
    return lambda x: function(**x)[0]


OPPONENTS: dict[str, Callable[[Case], Function]] = {"loop": loop, "torch.nn": torch_nn, "fla": by_fla}


def our_unfit(backend: str, case: Case, device: torch.device) -> str | None:
    """Why ours does not take part; None if it does."""
    its = LINEAR[case.operator].backends if case.operator in LINEAR else get_args(CellBackend)
    if backend not in its:
        return f"{case.operator} has no backend {backend}"
    return "CUDA only" if backend in ("triton", "fla") and device.type != "cuda" else None


def unfit(name: str, case: Case, device: torch.device, loop_most: int) -> str | None:
    """Why an opponent does not take part; None if it does."""
    if name == "loop":
        if case.length > loop_most:
            return f"measured up to T = {loop_most} (--loop-most)"
        return measure.lacks_memory(case.loop_bytes, device)
    if name == "torch.nn":
        return None if case.projects else "lstm, gru and elman of one head only"
    if case.operator not in LINEAR:
        return "linear recurrences only"
    return None if device.type == "cuda" else "CUDA only"


def measure_case(
    case: Case, backends: list[str], others: list[str], device: torch.device, repetitions: int, loop_most: int
) -> measure.Race:
    """Races all backends and opponents that fit the case."""
    tolerance = TOLERANCE[getattr(torch, case.dtype)]
    refused = {name: why for name in backends if (why := our_unfit(name, case, device)) is not None}
    refused |= {name: why for name in others if (why := unfit(name, case, device, loop_most)) is not None}
    mine = [Contender(name, ours(case, name), tolerance) for name in backends if name not in refused]
    theirs = [Contender(name, OPPONENTS[name](case), tolerance) for name in others if name not in refused]
    short = measure.lacks_memory(case.needed_bytes, device)
    if short is not None:
        return measure.Race([], {**refused, **{c.name: short for c in (*mine, *theirs)}})
    inputs, dy = draw_inputs(case, device)
    exact = loop(case, saves_all=False)
    found = measure.race(mine, theirs, exact, inputs, dy, few(case), repetitions, alone=bool(mine))
    return measure.Race(found.comparisons, refused | found.refused, found.timings)


def cases(arguments: argparse.Namespace) -> list[Case]:
    """By operator and heads, T rising. Where T is longer than the loop's longest, that one is a case too."""
    found = []
    for operator in arguments.operators:
        lengths = sorted({t for group in arguments.lengths or [DEFAULT_LENGTHS[operator]] for t in group})
        if "loop" in arguments.opponents and lengths[-1] > arguments.loop_most:
            lengths = sorted({*lengths, arguments.loop_most})
        for heads in arguments.heads:
            sizes = (operator, arguments.batch, heads, arguments.width)
            found += [Case(*sizes, t, arguments.dtype, min(t, arguments.check_most)) for t in lengths]
    return found


def describe_token(case: Case, timing: measure.Timing) -> str:
    forward, both = (ms * 1e3 / case.length for ms in (timing.forward_ms, timing.both_ms))
    return f"{case}: {timing.name}: {forward:.3g} us a token forward, {both:.3g} us forward + backward"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*LINEAR, *CELLS]
    parser.add_argument("--operators", nargs="+", choices=every, default=every)
    parser.add_argument("--lengths", nargs="+", type=parse_lengths, help="2048, 2^11 or 2^11:2^15, which doubles")
    parser.add_argument("--loop-most", type=parse_length, default=2**13, help="longest T of the token loop")
    parser.add_argument("--check-most", type=parse_length, default=2**14, help="most tokens that are checked")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", nargs="+", type=int, default=[4])
    parser.add_argument("--width", type=int, default=64, help="K = V")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--backend", nargs="+", choices=["auto", "torch", "triton", "fla"], default=["auto"])
    parser.add_argument("--opponents", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for recurrence.json and recurrence.png")
    parser.add_argument("--name", default="recurrence", help="of the two files")
    parser.add_argument("--no-picture", action="store_true", help="write the record only")
    arguments = parser.parse_args(argv)
    if arguments.check_most < max(*arguments.heads, arguments.width):
        parser.error("--check-most must be at least --heads and --width")
    if "fla" in arguments.backend and "fla" in arguments.opponents:
        parser.error("fla is a backend or an opponent, not both: name the --opponents")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    print(measure.headline(device), flush=True)
    absent = [name for name in arguments.opponents if name == "fla" and not measure.is_installed("fla")]
    for name in absent:
        print(f"{name}: not installed")
    others = [name for name in arguments.opponents if name not in absent]
    results: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = [{"contender": name, "reason": "not installed"} for name in absent]
    failed = False
    for case in cases(arguments):
        race = measure_case(case, arguments.backend, others, device, arguments.repetitions, arguments.loop_most)
        failed |= measure.report(case, race, NAMES, results, skipped)
        for timing in race.timings:
            timings.append(measure.row(case, timing))
            print(describe_token(case, timing), flush=True)
        if arguments.out:  # after every case: a run that is stopped has its record
            target = arguments.out / f"{arguments.name}.json"
            measure.write_json(target, device, results, skipped, timings=timings)
    if arguments.out and not arguments.no_picture:
        measure.draw(
            results, lambda r: f"{r['operator']}: {r['ours']} / {r['opponent']}, H = {r['heads']}",
            arguments.out / f"{arguments.name}.png", f"recurrences, {measure.headline(device)}",
        )  # fmt: skip
    if failed:
        print("ours is wrong or raised in at least one case", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
