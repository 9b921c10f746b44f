"""Softmax attention against its opponents: correctness first, then medians of paired ratios.

    python benchmarks/attention.py --lengths 2^10:2^13 --backend auto torch sdpa --out benchmarks/results/here
    python benchmarks/attention.py --device cuda --dtype bfloat16 --variants causal window --window 1024 --lengths 2^14 2^16

Variants: full; causal; window, causal with the --window newest keys; documents, causal in --documents of unequal lengths packed
into one row; grouped, causal with --groups of key and value heads. Opponents: torch-sdpa is torch's function, with a mask of
all pairs where a window or documents need one; scores is the definition with all scores, of up to --scores-most tokens;
flash_attn is the package of Dao 2023, arXiv:2307.08691, on CUDA.

Output and every gradient are held to the definition in float64, on one sample and the heads of two groups. Prints a line a
case, backend and opponent; writes attention.json and attention.png to --out.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
import torch
from conv import parse_length, parse_lengths
from measure import TOLERANCE, Contender, Function, Inputs
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seqengine.kernels.attention import reference
from seqengine.kernels.attention.op import attention

VARIANTS = ("full", "causal", "window", "documents", "grouped")
NAMES = ("torch-sdpa", "scores", "flash_attn")
CHECKED_QUERIES = 512
"""Queries whose scores the check in float64 holds at a time."""


@dataclass(frozen=True)
class Case:
    """Sizes of an attention; K = V and T = S."""

    variant: str
    batch: int
    heads: int
    groups: int
    width: int
    length: int
    dtype: str
    window: int | None = None
    documents: int = 1

    def __str__(self) -> str:
        extra = f" w {self.window}" if self.window else f" N {self.documents}" if self.documents > 1 else ""
        sizes = f"B {self.batch} H {self.heads} G {self.groups} K {self.width} T {self.length:>7}"
        return f"{self.variant} {sizes}{extra} {self.dtype}"

    @property
    def causal(self) -> bool:
        return self.variant != "full"

    @property
    def needs_mask(self) -> bool:
        """torch has no name for it."""
        return self.variant in ("window", "documents")

    @property
    def needed_bytes(self) -> int:
        """About twelve tensors like q in float32, and the check's scores of two groups in float64."""
        checked = 2 * self.heads // self.groups * CHECKED_QUERIES * self.length
        return 48 * self.batch * self.heads * self.width * self.length + 48 * checked

    @property
    def scores_bytes(self) -> int:
        """About five times all scores in float32."""
        return 20 * self.batch * self.heads * self.length**2


def bounds(case: Case) -> list[int]:
    """Where documents start and end; their lengths are in the proportions 1, 2, ..., N."""
    total = case.documents * (case.documents + 1) // 2
    return [case.length * n * (n + 1) // 2 // total for n in range(case.documents + 1)]


@lru_cache(maxsize=4)
def cu_seqlens(case: Case, device: torch.device) -> Tensor | None:
    return torch.tensor(bounds(case), dtype=torch.int32, device=device) if case.variant == "documents" else None


@lru_cache(maxsize=1)
def mask(case: Case, device: torch.device) -> Tensor | None:
    """bool [T, T] where torch needs one."""
    if not case.needs_mask:
        return None
    packed = cu_seqlens(case, device)
    return reference.visible(case.length, case.length, case.causal, case.window, packed, device)


def draw_inputs(case: Case, device: torch.device) -> tuple[Inputs, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)
    heads = {"q": case.heads, "k": case.groups, "v": case.groups, "dy": case.heads}
    shapes = {name: (case.batch, case.length, n, case.width) for name, n in heads.items()}
    drawn = {n: torch.randn(*s, generator=generator, device=device).to(dtype) for n, s in shapes.items()}
    return {n: t for n, t in drawn.items() if n != "dy"}, drawn["dy"]


def few(case: Case) -> Callable[[Tensor], Tensor]:
    """One sample, the heads of two groups."""
    return lambda t: t[:1, :, : t.shape[2] * min(2, case.groups) // case.groups]


def exact(case: Case) -> Function:
    """The definition, some queries at a time: those that end a range of keys stand where a call puts them, at its end."""

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, None, case.causal, case.window, case.width**-0.5)[0]

    def call(x: Inputs) -> Tensor:
        q, k, v, outputs = x["q"], x["k"], x["v"], []
        for first, last in pairwise(bounds(case)):
            for start in range(first, last, CHECKED_QUERIES):
                stop = min(start + CHECKED_QUERIES, last)
                keys = slice(first, stop if case.causal else last)
                run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
                outputs.append(run(q[:, start:stop], k[:, keys], v[:, keys]))
        return torch.cat(outputs, dim=1)

    return call


def ours(case: Case, backend: str) -> Function:
    def call(x: Inputs) -> Tensor:
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens(case, x["q"].device), "backend": backend}
        y: Tensor = attention(x["q"], x["k"], x["v"], causal=case.causal, window=case.window, **options)
        return y

    return call


def torch_sdpa(case: Case) -> Function:
    def call(x: Inputs) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in x.values())
        seen = mask(case, q.device)
        causal, grouped = case.causal and seen is None, case.groups != case.heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, enable_gqa=grouped)
        return y.transpose(1, 2)

    return call


def scores(case: Case) -> Function:
    def call(x: Inputs) -> Tensor:
        packed = cu_seqlens(case, x["q"].device)
        how = (packed, case.causal, case.window, case.width**-0.5)
        return reference.attention(x["q"], x["k"], x["v"], *how)[0]

    return call


def flash_attn(case: Case) -> Function:
    """Its window counts the keys on each side of a query's own."""
    import flash_attn as package

    window = (-1, -1) if case.window is None else (case.window - 1, 0)

    def call(x: Inputs) -> Tensor:
        packed = cu_seqlens(case, x["q"].device)
        options: dict[str, Any] = {"causal": case.causal, "window_size": window}
        if packed is None:
            y: Tensor = package.flash_attn_func(*x.values(), **options)
            return y
        longest = max(b - a for a, b in pairwise(bounds(case)))
        row = (t[0] for t in x.values())
        y = package.flash_attn_varlen_func(*row, packed, packed, longest, longest, **options)
        return y[None]

    return call


OPPONENTS: dict[str, Callable[[Case], Function]] = {
    "torch-sdpa": torch_sdpa, "scores": scores, "flash_attn": flash_attn,
}  # fmt: skip


def our_unfit(backend: str, case: Case) -> str | None:
    """Why ours does not take part; None if it does."""
    if case.variant == "documents" and case.batch != 1:
        return "documents are packed into one row: --batch 1"
    return "no window, no documents" if backend == "sdpa" and case.needs_mask else None


def unfit(name: str, case: Case, device: torch.device, scores_most: int) -> str | None:
    """Why an opponent does not take part; None if it does."""
    if name == "flash_attn":
        if device.type != "cuda":
            return "CUDA only"
        return "no float32" if case.dtype == "float32" else None
    if name == "torch-sdpa" and not case.needs_mask:
        return None
    if case.length > scores_most:
        return f"all pairs of more than {scores_most} tokens (--scores-most)"
    return measure.lacks_memory(case.scores_bytes, device)


def measure_case(
    case: Case, backends: list[str], others: list[str], device: torch.device, repetitions: int, scores_most: int
) -> measure.Race:
    """Races all backends and opponents that fit the case."""
    tolerance = TOLERANCE[getattr(torch, case.dtype)]
    refused = {name: why for name in backends if (why := our_unfit(name, case)) is not None}
    refused |= {name: why for name in others if (why := unfit(name, case, device, scores_most)) is not None}
    mine = [Contender(name, ours(case, name), tolerance) for name in backends if name not in refused]
    theirs = [Contender(name, OPPONENTS[name](case), tolerance) for name in others if name not in refused]
    short = measure.lacks_memory(case.needed_bytes, device)
    if short is not None:
        return measure.Race([], {**refused, **{c.name: short for c in (*mine, *theirs)}})
    inputs, dy = draw_inputs(case, device)
    found = measure.race(mine, theirs, exact(case), inputs, dy, few(case), repetitions, alone=bool(mine))
    return measure.Race(found.comparisons, refused | found.refused, found.timings)


def cases(arguments: argparse.Namespace) -> list[Case]:
    found = []
    for variant in arguments.variants:
        for length in (length for group in arguments.lengths for length in group):
            groups = arguments.groups if variant == "grouped" else arguments.heads
            window = min(arguments.window, length) if variant == "window" else None
            documents = min(arguments.documents, length) if variant == "documents" else 1
            sizes = (variant, arguments.batch, arguments.heads, groups, arguments.width, length, arguments.dtype)
            found.append(Case(*sizes, window, documents))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lengths", nargs="+", type=parse_lengths, default=[[2**10, 2**12]])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2, help="of keys and values in the variant grouped")
    parser.add_argument("--width", type=int, default=64, help="K = V")
    parser.add_argument("--window", type=parse_length, default=512)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--scores-most", type=parse_length, default=2**12, help="longest T with all pairs")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--backend", nargs="+", choices=["auto", "torch", "sdpa", "flex"], default=["auto"])
    parser.add_argument("--opponents", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for attention.json and attention.png")
    parser.add_argument("--name", default="attention", help="of the two files")
    parser.add_argument("--no-picture", action="store_true", help="write the record only")
    arguments = parser.parse_args(argv)
    if arguments.heads % arguments.groups:
        parser.error("--groups must divide --heads")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    print(measure.headline(device), flush=True)
    absent = [n for n in arguments.opponents if n == "flash_attn" and not measure.is_installed(n)]
    for name in absent:
        print(f"{name}: not installed")
    others = [name for name in arguments.opponents if name not in absent]
    results: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = [{"contender": name, "reason": "not installed"} for name in absent]
    failed = False
    for case in cases(arguments):
        race = measure_case(case, arguments.backend, others, device, arguments.repetitions, arguments.scores_most)
        failed |= measure.report(case, race, NAMES, results, skipped)
        for timing in race.timings:
            timings.append(measure.row(case, timing))
            if not race.comparisons:
                print(
                    f"{case}: {timing.name}: {timing.forward_ms:.3g} ms, with backward {timing.both_ms:.3g}", flush=True
                )
        if arguments.out:  # after every case: a run that is stopped has its record
            target = arguments.out / f"{arguments.name}.json"
            measure.write_json(target, device, results, skipped, timings=timings)
    if arguments.out and not arguments.no_picture:
        measure.draw(
            results, lambda r: f"{r['variant']}: {r['ours']} / {r['opponent']}",
            arguments.out / f"{arguments.name}.png", f"attention, {measure.headline(device)}",
        )  # fmt: skip
    if failed:
        print("ours is wrong or raised in at least one case", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
