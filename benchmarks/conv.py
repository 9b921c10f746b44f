"""Long convolution against the field's reference, in one run: correctness first, then medians of paired ratios.

    python benchmarks/conv.py --lengths 2^14 2^17 100003 --taps T T/8 128 --batch 1 4 --out benchmarks/results/here

The reference is what the field's models call: rfft of size 2T of input and filter, product, irfft, skip added,
differentiated by torch. A case is timed only if our output and gradients are right against float64; each repetition times
both, one after the other, so that a busy machine slows both. Prints a line a case; writes conv.json and conv.png.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from seqengine.kernels.api import long_conv

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Result:
    """One case: medians over repetitions; a ratio above 1 means that ours is faster, or keeps less."""

    batch: int
    channels: int
    length: int
    taps: int
    dtype: str
    forward_ratio: float
    both_ratio: float
    both_ratio_spread: tuple[float, float]
    """First and third quartile."""
    ours_both_ms: float
    reference_saved_bytes: int
    ours_saved_bytes: int
    largest_error: float


def reference(u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
    """The convolution of the field's models, in the filter's precision."""
    n = 2 * u.shape[-1]
    spectrum = torch.fft.rfft(u.to(k.dtype), n=n) * torch.fft.rfft(k, n=n)
    y = torch.fft.irfft(spectrum, n=n)[..., : u.shape[-1]]
    return (y + u * skip[:, None]).to(u.dtype)


def ours(u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
    return long_conv(u, k, skip=skip)[0]


def outcome(function: Function, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and the three gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


def largest_error(function: Function, tensors: list[Tensor], dy: Tensor) -> float:
    """Largest error relative to the largest value, over output and gradients, against float64."""
    exact = outcome(reference, [t.double() for t in tensors], dy.double())
    found = outcome(function, tensors, dy)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))


def saved_bytes(function: Function, tensors: list[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, the inputs themselves left out."""
    inputs = {t.untyped_storage().data_ptr() for t in tensors}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = function(*tensors)
    del y
    return sum(kept.values())


def seconds(function: Function, tensors: list[Tensor], dy: Tensor | None) -> float:
    """One forward, or one forward and backward."""
    for t in tensors:
        t.grad = None
    synchronize(tensors[0])
    start = time.perf_counter()
    if dy is None:
        with torch.no_grad():
            function(*tensors)
    else:
        function(*tensors).backward(dy)
    synchronize(tensors[0])
    return time.perf_counter() - start


def synchronize(t: Tensor) -> None:
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)


def measure(
    batch: int, channels: int, length: int, taps: int, dtype: torch.dtype, device: str, repetitions: int
) -> Result:
    """Raises RuntimeError, instead of timing, if ours is wrong."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, channels, length, generator=generator)
    k = torch.randn(channels, taps, generator=generator) / taps**0.5
    skip, dy = torch.randn(channels, generator=generator), torch.randn(batch, channels, length, generator=generator)
    few = [u[:1, :4].to(device, dtype), k[:4].to(device), skip[:4].to(device)]
    error = largest_error(ours, few, dy[:1, :4].to(device))
    if error > TOLERANCE[dtype]:
        raise RuntimeError(f"B={batch} D={channels} T={length} L={taps}: error {error:.1e}, not timed")
    tensors = [t.requires_grad_() for t in (u.to(device, dtype), k.to(device), skip.to(device))]
    dy = dy.to(device, dtype)
    forward, both, ours_both = [], [], []
    for repetition in range(repetitions + 1):
        pair = [seconds(f, tensors, None) for f in (reference, ours)]
        pair_both = [seconds(f, tensors, dy) for f in (reference, ours)]
        if repetition > 0:  # the first warms up
            forward.append(pair[0] / pair[1])
            both.append(pair_both[0] / pair_both[1])
            ours_both.append(pair_both[1] * 1e3)
    low, middle, high = statistics.quantiles(both, n=4, method="inclusive")
    return Result(
        batch, channels, length, taps, str(dtype).removeprefix("torch."),
        statistics.median(forward), middle, (low, high), statistics.median(ours_both),
        saved_bytes(reference, tensors), saved_bytes(ours, tensors), error,
    )  # fmt: skip


def draw(results: list[Result], target: Path) -> None:
    """Speed-up of forward and backward over length, a line for each share of taps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Result]] = {}
    for r in results:
        share = (
            f"L = T/{r.length // r.taps}"
            if r.length % r.taps == 0 and r.length // r.taps in (1, 2, 4, 8)
            else f"L = {r.taps}"
        )
        lines.setdefault(f"B = {r.batch}, {share.replace('T/1', 'T')}", []).append(r)
    for name, found in sorted(lines.items()):
        found.sort(key=lambda r: r.length)
        axes.plot([r.length for r in found], [r.both_ratio for r in found], "o-", label=name, markersize=4)
    axes.axhline(1.0, color="gray", linewidth=1)
    axes.set(xscale="log", xlabel="T", ylabel="times the reference's speed, forward + backward", title="long_conv")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=120)


def parse_length(text: str) -> int:
    base, power, exponent = text.partition("^")
    return int(base) ** int(exponent) if power else int(text)


def parse_taps(text: str, length: int) -> int:
    """'T', 'T/8' or a number."""
    if text.startswith("T"):
        return max(1, length // int(text.partition("/")[2] or 1))
    return int(text)


def describe(r: Result) -> str:
    """One line for people."""
    low, high = r.both_ratio_spread
    return (
        f"B {r.batch} D {r.channels} T {r.length:>7} L {r.taps:>7}: forward {r.forward_ratio:5.2f}x, "
        f"forward + backward {r.both_ratio:5.2f}x ({low:.2f}..{high:.2f}), {r.ours_both_ms:8.1f} ms, "
        f"saves {r.ours_saved_bytes / 2**20:.0f} of {r.reference_saved_bytes / 2**20:.0f} MiB, error {r.largest_error:.0e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=parse_length, default=[2**14, 2**15, 2**16, 100_003, 2**17])
    parser.add_argument("--taps", nargs="+", default=["T", "T/8", "128"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for conv.json and conv.png")
    arguments = parser.parse_args()
    print(
        f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads; baseline: rfft of 2T, autograd"
    )
    results = []
    for length in arguments.lengths:
        for taps in arguments.taps:
            for batch in arguments.batch:
                r = measure(
                    batch, arguments.channels, length, parse_taps(taps, length), getattr(torch, arguments.dtype),
                    arguments.device, arguments.repetitions,
                )  # fmt: skip
                results.append(r)
                print(describe(r), flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {
            "torch": torch.__version__, "device": arguments.device, "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(), "results": [asdict(r) for r in results],
        }  # fmt: skip
        (arguments.out / "conv.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(results, arguments.out / "conv.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
