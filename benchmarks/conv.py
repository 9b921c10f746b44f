"""Long convolution against its opponents, in one run: correctness first, then medians of paired ratios.

    python benchmarks/conv.py --lengths 2^14 2^17 100003 --taps T T/8 128 --batch 1 4 --out benchmarks/results/here
    python benchmarks/conv.py --device cuda --dtype bfloat16 --gated --lengths 2^8:2^22 --backend torch triton

`--lengths a:b` doubles from a to b. Each of `--backend` x `--precision` is a row against each of `--opponents`; see
opponents.py for what those are. Output and every gradient are checked against float64 first: what is wrong is not timed, and if
that is ours the exit code is 1. Prints a line a case, row and opponent; writes conv.json and conv.png to --out.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import measure
import opponents
import torch
from opponents import Case


def parse_length(text: str) -> int:
    """'2^14' or a number."""
    base, power, exponent = text.partition("^")
    return int(base) ** int(exponent) if power else int(text)


def parse_lengths(text: str) -> list[int]:
    """A length, or 'first:last', which doubles."""
    first, colon, last = text.partition(":")
    if not colon:
        return [parse_length(text)]
    lengths = [parse_length(first)]
    while lengths[-1] * 2 <= parse_length(last):
        lengths.append(lengths[-1] * 2)
    return lengths


def parse_taps(text: str, length: int) -> int:
    """'T', 'T/8' or a number; at most T."""
    if text.startswith("T"):
        return max(1, length // int(text.partition("/")[2] or 1))
    return min(length, int(text))


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Each once, in the order of lengths, taps, batches."""
    lengths = [length for group in arguments.lengths for length in group]
    found = (
        Case(
            batch, min(arguments.channels, max(1, arguments.most_elements // (batch * length))), length,
            parse_taps(taps, length), arguments.dtype, arguments.gated, arguments.bidirectional,
        )
        for length in lengths
        for taps in arguments.taps
        for batch in arguments.batch
    )  # fmt: skip
    return list(dict.fromkeys(found))


def measure_case(
    case: Case, rows: list[tuple[str, str]], others: list[str], device: torch.device, repetitions: int, graphs: bool
) -> measure.Race:
    """Races all rows and opponents that fit the case."""
    refused: dict[str, str] = {}
    mine, theirs = [], []
    for backend, precision in rows:
        contender = opponents.our_contender(backend, precision, case)
        why = opponents.our_unfit(backend, precision, case)
        if why is None:
            mine.append(contender)
        else:
            refused[contender.name] = why
    for name in others:
        why = opponents.unfit(name, case, device)
        if why is None:
            theirs.append(opponents.opponent(name, case))
        else:
            refused[name] = why
    short = measure.lacks_memory(case.needed_bytes, device)
    if short is not None:
        return measure.Race([], {**refused, **{c.name: short for c in (*mine, *theirs)}})
    inputs, dy = opponents.draw_inputs(case, device)
    found = measure.race(mine, theirs, opponents.fft, inputs, dy, opponents.few, repetitions, graphs)
    return measure.Race(found.comparisons, refused | found.refused)


def label(r: dict[str, Any]) -> str:
    """The line of a picture that a result is on."""
    share = r["length"] // r["taps"]
    is_share = r["length"] % r["taps"] == 0 and share in (1, 2, 4, 8)
    taps = ("L = T" if share == 1 else f"L = T/{share}") if is_share else f"L = {r['taps']}"
    return f"{r['ours']} / {r['opponent']}, B = {r['batch']}, {taps}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", nargs="+", type=parse_lengths, default=[[2**14], [2**15], [2**16], [100_003], [2**17]]
    )
    parser.add_argument("--taps", nargs="+", default=["T", "T/8", "128"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument(
        "--most-elements", type=parse_length, default=1 << 62, help="fewer channels where B D T is more"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--gated", action="store_true", help="a gate before and one after")
    parser.add_argument("--bidirectional", action="store_true", help="a second filter, over what comes after")
    parser.add_argument("--backend", nargs="+", choices=["auto", "torch", "triton"], default=["auto"])
    parser.add_argument("--precision", nargs="+", choices=["auto", "fp16", "tf32", "bf16x3", "ieee"], default=["auto"])
    parser.add_argument("--opponents", nargs="+", choices=opponents.NAMES, default=list(opponents.NAMES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs: no gaps between launches")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for conv.json and conv.png")
    parser.add_argument("--name", default="conv", help="of the two files")
    parser.add_argument("--no-picture", action="store_true", help="write the record only")
    arguments = parser.parse_args(argv)
    if arguments.graphs and not arguments.device.startswith("cuda"):
        parser.error("--graphs needs --device cuda")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # conv1d is held to the same error
    print(measure.headline(device), flush=True)
    absent = opponents.missing(arguments.opponents)
    for name in absent:
        print(f"{name}: not installed")
    others = [name for name in arguments.opponents if name not in absent]
    rows = [(backend, precision) for backend in arguments.backend for precision in arguments.precision]
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = [{"contender": name, "reason": "not installed"} for name in absent]
    failed = False
    for case in cases(arguments):
        race = measure_case(case, rows, others, device, arguments.repetitions, arguments.graphs)
        failed |= measure.report(case, race, opponents.NAMES, results, skipped)
        if arguments.out:  # after every case: a run that is stopped has its record
            measure.write_json(arguments.out / f"{arguments.name}.json", device, results, skipped)
    if arguments.out and not arguments.no_picture:
        measure.draw(results, label, arguments.out / f"{arguments.name}.png", f"long_conv, {measure.headline(device)}")
    if failed:
        print("ours is wrong or raised in at least one case", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
