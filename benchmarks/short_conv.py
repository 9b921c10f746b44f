"""Short depthwise convolution with bias and SiLU against its opponents: correctness first, then medians of paired ratios.

    python benchmarks/short_conv.py --lengths 2^10:2^20 --taps 3 4 7 --batch 1 --out benchmarks/results/here

conv1d is torch's Conv1d and SiLU; causal-conv1d the CUDA kernel of the Mamba models, where it is installed, with 2 to 4 taps.
Options, checks, lines and files (short_conv.json, short_conv.png) are those of conv.py.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from conv import parse_length, parse_lengths
from measure import TOLERANCE, Contender, Function, Inputs
from opponents import few
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.api import short_conv

NAMES = ("conv1d", "causal-conv1d")


@dataclass(frozen=True)
class Case:
    """Sizes of a short convolution."""

    batch: int
    channels: int
    length: int
    taps: int
    dtype: str

    def __str__(self) -> str:
        return f"B {self.batch} D {self.channels} T {self.length:>7} W {self.taps} {self.dtype}"

    @property
    def needed_bytes(self) -> int:
        """About ten tensors like the input in float32."""
        return 40 * self.batch * self.channels * self.length


def draw_inputs(case: Case, device: torch.device) -> tuple[Inputs, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)
    B, D, T, W = case.batch, case.channels, case.length, case.taps
    sizes: dict[str, tuple[int, ...]] = {"u": (B, D, T), "w": (D, W), "bias": (D,), "dy": (B, D, T)}
    drawn = {n: torch.randn(*s, generator=generator, device=device).to(dtype) for n, s in sizes.items()}
    return {n: t for n, t in drawn.items() if n != "dy"}, drawn["dy"]


def conv1d(x: Inputs) -> Tensor:
    u, w = x["u"], x["w"]
    taps = w.flip(-1)[:, None]
    return F.silu(F.conv1d(u, taps, x["bias"], padding=w.shape[1] - 1, groups=w.shape[0])[..., : u.shape[-1]])


def causal_conv1d(x: Inputs) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    y: Tensor = causal_conv1d_fn(x["u"], x["w"].flip(-1).contiguous(), x["bias"], activation="silu")
    return y


def ours(backend: str) -> Function:
    return lambda x: short_conv(x["u"], x["w"], x["bias"], activation="silu", backend=backend)[0]  # type: ignore[arg-type]


def measure_case(
    case: Case, backends: list[str], others: list[str], device: torch.device, repetitions: int, graphs: bool
) -> measure.Race:
    tolerance = TOLERANCE[getattr(torch, case.dtype)]
    refused: dict[str, str] = {}
    theirs = []
    for name in others:
        if name == "conv1d":
            theirs.append(Contender(name, conv1d, tolerance))
        elif device.type != "cuda" or not 2 <= case.taps <= 4:
            refused[name] = "CUDA only, 2 to 4 taps only"
        else:
            theirs.append(Contender(name, causal_conv1d, tolerance))
    mine = [Contender(backend, ours(backend), tolerance) for backend in backends]
    why = measure.lacks_memory(case.needed_bytes, device)
    if why is not None:
        return measure.Race([], {**refused, **{c.name: why for c in (*mine, *theirs)}})
    inputs, dy = draw_inputs(case, device)
    found = measure.race(mine, theirs, conv1d, inputs, dy, few, repetitions, graphs)
    return measure.Race(found.comparisons, refused | found.refused)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=parse_lengths, default=[[2**14], [2**17]])
    parser.add_argument("--taps", nargs="+", type=int, default=[3, 4])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument(
        "--most-elements", type=parse_length, default=1 << 62, help="fewer channels where B D T is more"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--backend", nargs="+", choices=["auto", "torch", "triton"], default=["auto"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graphs", action="store_true", help="replay CUDA graphs: no gaps between launches")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for short_conv.json and short_conv.png")
    parser.add_argument("--no-picture", action="store_true", help="write the record only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    print(measure.headline(device), flush=True)
    others = ["conv1d", "causal-conv1d"]
    skipped: list[dict[str, Any]] = []
    if not measure.is_installed("causal_conv1d"):
        print("causal-conv1d: not installed")
        others.remove("causal-conv1d")
        skipped.append({"contender": "causal-conv1d", "reason": "not installed"})
    results: list[dict[str, Any]] = []
    failed = False
    for length in (length for group in arguments.lengths for length in group):
        for taps in arguments.taps:
            for batch in arguments.batch:
                channels = min(arguments.channels, max(1, arguments.most_elements // (batch * length)))
                case = Case(batch, channels, length, taps, arguments.dtype)
                race = measure_case(case, arguments.backend, others, device, arguments.repetitions, arguments.graphs)
                failed |= measure.report(case, race, NAMES, results, skipped)
    if arguments.out:
        measure.write_json(arguments.out / "short_conv.json", device, results, skipped)
    if arguments.out and not arguments.no_picture:
        measure.draw(
            results, lambda r: f"{r['ours']} / {r['opponent']}, B = {r['batch']}, W = {r['taps']}",
            arguments.out / "short_conv.png", f"short_conv, {measure.headline(device)}",
        )  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
