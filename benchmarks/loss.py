"""The language-model loss against whole logits: correctness, time, and the most memory that it takes.

    python benchmarks/loss.py --out benchmarks/results/here
    python benchmarks/loss.py --device cuda --dtype bfloat16 --lengths 2^13 2^15 --width 2048

Opponents: `plain` makes all logits, then torch's cross_entropy; at most --plain-most tokens, and that length is measured too
where another is longer. `liger` is the fused loss of the package liger-kernel, on CUDA. The sum of nats and both gradients are
held to the definition in float64 on the first tokens.

Memory is the peak of a forward and backward above what the inputs take, gradients included, and is given as a share of the
bytes of all logits in the case's dtype. On CUDA it is what torch allocated. On a CPU each contender runs alone in a new
process, once, and the system tells its peak of resident memory: what happens inside operators counts too (Linux only). Where no
opponent can be timed, ours has the time of that one run. Writes loss.json and loss.png to --out.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measure
import torch
from conv import parse_length, parse_lengths
from measure import TOLERANCE, Contender, Function, Inputs
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.api import linear_cross_entropy
from seqengine.kernels.loss import reference

NAMES = ("plain", "liger")
OURS = "ours"
CHECKED = {"cpu": 600, "cuda": 6000}
"""Tokens held to the definition: more than one tile of ours, and no multiple of one."""
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Case:
    """Sizes of a loss."""

    length: int
    width: int
    vocabulary: int
    dtype: str

    def __str__(self) -> str:
        return f"T {self.length:>7} D {self.width} V {self.vocabulary} {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def logits_bytes(self) -> int:
        """Of all logits."""
        return self.length * self.vocabulary * self.torch_dtype.itemsize

    @property
    def plain_bytes(self) -> int:
        """Logits, their log-softmax and its gradient, in float32."""
        return 14 * self.length * self.vocabulary

    def needed_bytes(self, device_type: str) -> int:
        """Inputs and gradients; the check's logits in float64; a tile."""
        checked = 40 * min(self.length, CHECKED[device_type]) * self.vocabulary
        return 16 * (self.length + self.vocabulary) * self.width + checked + (1 << 26)


@dataclass(frozen=True)
class Memory:
    """What one forward and backward took."""

    name: str
    extra_bytes: int
    """Peak above the inputs."""
    share: float
    """Of the bytes of all logits."""
    seconds: float
    """Of that run; the first in its process on a CPU."""


def draw_inputs(case: Case, device: torch.device) -> tuple[Inputs, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(1, case.length, case.width, generator=generator, device=device)
    weight = torch.randn(case.vocabulary, case.width, generator=generator, device=device).mul_(case.width**-0.5)
    inputs = {"hidden": hidden.to(case.torch_dtype), "weight": weight.to(case.torch_dtype)}
    return inputs, torch.tensor(0.5, device=device)


def draw_labels(case: Case, device: torch.device) -> Tensor:
    """One in eight is to be ignored."""
    generator = torch.Generator(device).manual_seed(1)
    labels = torch.randint(case.vocabulary, (1, case.length), generator=generator, device=device)
    return labels.masked_fill_(torch.rand(1, case.length, generator=generator, device=device) < 1 / 8, -100)


def few(case: Case, device_type: str) -> Callable[[Tensor], Tensor]:
    """The first tokens; hidden [1, T, D] alone has any."""
    return lambda t: t[:, : CHECKED[device_type]] if t.ndim == 3 else t


def exact(labels: Tensor) -> Function:
    return lambda x: reference.linear_cross_entropy(x["hidden"], x["weight"], labels[:, : x["hidden"].shape[1]], -100)[
        0
    ]


def ours(labels: Tensor) -> Function:
    return lambda x: linear_cross_entropy(x["hidden"], x["weight"], labels[:, : x["hidden"].shape[1]])[0]


def plain(labels: Tensor) -> Function:
    def call(x: Inputs) -> Tensor:
        logits = F.linear(x["hidden"], x["weight"]).flatten(0, 1)
        return F.cross_entropy(logits.float(), labels[0, : x["hidden"].shape[1]], reduction="sum")

    return call


def liger(labels: Tensor) -> Function:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def call(x: Inputs) -> Tensor:
        y: Tensor = loss(x["weight"], x["hidden"].flatten(0, 1), labels[0, : x["hidden"].shape[1]])
        return y

    return call


CONTENDERS: dict[str, Callable[[Tensor], Function]] = {OURS: ours, "plain": plain, "liger": liger}


def unfit(name: str, case: Case, device: torch.device, plain_most: int) -> str | None:
    """Why an opponent does not take part; None if it does."""
    if name == "liger":
        return None if device.type == "cuda" else "CUDA only"
    if case.length > plain_most:
        return f"measured up to T = {plain_most} (--plain-most)"
    return measure.lacks_memory(case.plain_bytes, device)


def _status_bytes(field: str) -> int:
    """VmRSS is the resident memory now, VmHWM its peak since the process began: of this process, not of its parent too."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _run_once(name: str, case: Case, device: torch.device, before: Callable[[], None]) -> float:
    """Seconds of a forward and backward; `before` is called between the inputs and that."""
    inputs, dy = draw_inputs(case, device)
    function = CONTENDERS[name](draw_labels(case, device))
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    before()
    begin = time.perf_counter()
    gradients = torch.autograd.grad(function(leaves), list(leaves.values()), dy)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del gradients
    return time.perf_counter() - begin


def probe(name: str, case: Case, threads: int) -> tuple[int, float]:
    """Peak extra bytes and seconds, to be called in a process of its own. Import and threads come first, with a tiny case."""
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    _run_once(name, replace(case, length=2, vocabulary=2), cpu, lambda: None)
    held: list[int] = []
    seconds = _run_once(name, case, cpu, lambda: held.append(_status_bytes("VmRSS")))
    return _status_bytes("VmHWM") - held[0], seconds


def _probe_cuda(name: str, case: Case, device: torch.device) -> tuple[int, float]:
    held: list[int] = []

    def before() -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held.append(torch.cuda.memory_allocated(device))

    seconds = _run_once(name, case, device, before)
    return torch.cuda.max_memory_allocated(device) - held[0], seconds


def measure_memory(name: str, case: Case, device: torch.device) -> Memory:
    if device.type == "cuda":
        extra, seconds = _probe_cuda(name, case, device)
    else:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            extra, seconds = alone.submit(probe, name, case, torch.get_num_threads()).result()
    return Memory(name, extra, extra / case.logits_bytes, seconds)


def measure_case(
    case: Case, others: list[str], device: torch.device, repetitions: int, plain_most: int, with_memory: bool
) -> tuple[measure.Race, list[Memory]]:
    """Times those that fit in turns, then the memory of all that are right."""
    short = measure.lacks_memory(case.needed_bytes(device.type), device)
    if short is not None:
        return measure.Race([], dict.fromkeys([OURS, *others], short)), []
    tolerance = TOLERANCE[case.torch_dtype]
    refused = {name: why for name in others if (why := unfit(name, case, device, plain_most)) is not None}
    labels = draw_labels(case, device)
    found = [Contender(n, CONTENDERS[n](labels), tolerance) for n in (OURS, *others) if n not in refused]
    timed = case if found[1:] else replace(case, length=min(case.length, CHECKED[device.type]))  # only checked then
    inputs, dy = draw_inputs(timed, device)
    race = measure.race(found[:1], found[1:], exact(labels), inputs, dy, few(case, device.type), repetitions)
    race.refused.update(refused)
    del inputs, found, labels
    memories = []
    for name in [n for n in (OURS, *others) if n not in race.refused] if with_memory else []:
        if device.type == "cpu" and not STATUS.exists():
            race.refused[name] = f"memory not measured: no {STATUS}"
            continue
        try:
            memories.append(measure_memory(name, case, device))
        except (BrokenExecutor, torch.OutOfMemoryError) as failure:
            race.refused[name] = f"memory not measured: {type(failure).__name__}"
    return race, memories


def cases(arguments: argparse.Namespace, plain_most: int) -> list[Case]:
    """T rising. Where T is longer than the plain loss's longest, that one is a case too."""
    lengths = sorted({t for group in arguments.lengths for t in group})
    if "plain" in arguments.opponents and lengths[-1] > plain_most:
        lengths = sorted({*lengths, plain_most})
    return [Case(t, arguments.width, arguments.vocabulary, arguments.dtype) for t in lengths]


def describe_memory(case: Case, found: Memory) -> str:
    return (
        f"{case}: {found.name}: peak memory {found.extra_bytes / 2**20:.4g} MiB, "
        f"{found.share:.1%} of the {case.logits_bytes / 2**20:.4g} MiB of all logits; one run {found.seconds:.3g} s"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=parse_lengths, default=[[2**15]])
    parser.add_argument("--plain-most", type=parse_length, help="longest T of the plain loss; 2048 on a CPU")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--opponents", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for loss.json and loss.png")
    parser.add_argument("--name", default="loss", help="of the two files")
    parser.add_argument("--no-picture", action="store_true", help="write the record only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    print(measure.headline(device), flush=True)
    absent = [n for n in arguments.opponents if n == "liger" and not measure.is_installed("liger_kernel")]
    for name in absent:
        print(f"{name}: not installed")
    others = [name for name in arguments.opponents if name not in absent]
    plain_most = arguments.plain_most or (2**11 if device.type == "cpu" else 1 << 62)
    results: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = [{"contender": name, "reason": "not installed"} for name in absent]
    failed = False
    for case in cases(arguments, plain_most):
        race, memories = measure_case(case, others, device, arguments.repetitions, plain_most, not arguments.no_memory)
        failed |= measure.report(case, race, NAMES, results, skipped)
        for found in memories:
            memory.append({**asdict(case), "logits_bytes": case.logits_bytes, **asdict(found)})
            print(describe_memory(case, found), flush=True)
        if arguments.out:  # after every case: a run that is stopped has its record
            measure.write_json(arguments.out / f"{arguments.name}.json", device, results, skipped, memory=memory)
    if arguments.out and not arguments.no_picture:
        measure.draw(
            results, lambda r: f"{r['ours']} / {r['opponent']}, D = {r['width']}, V = {r['vocabulary']}",
            arguments.out / f"{arguments.name}.png", f"loss, {measure.headline(device)}",
        )  # fmt: skip
    if failed:
        print("ours is wrong or raised in at least one case", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
