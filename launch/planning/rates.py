"""What machines can do, as their makers tabulate it; of a CPU, what one was seen to do. Peaks of GPUs: `seqengine.flops`.

A figure of a data sheet is a peak. What a step reaches of it is assumed, in `Machine.achieved`: 1/2 of the arithmetic, as large
language models reach with well-tuned software (Narayanan et al. 2021, arXiv:2104.04473, table 1: 52%), and 4/5 of the memory's
rate. Links are those of `parallel.cost`: what a program sees of a link, not what its data sheet says.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from seqengine.errors import InputError
from seqengine.flops import PEAK_TFLOPS
from seqengine.parallel.cost import ACROSS_NODES, WITHIN_NODE, Link

Params = Literal["fp64", "fp32", "bf16"]
MARK = "tabulated, not measured here"


@dataclass(frozen=True)
class Machine:
    """One GPU, or one CPU process, and its links to others."""

    name: str
    text: str
    memory_bytes: float | None
    """Of one rank; None: not known."""
    bf16: float
    fp32: float
    fp64: float
    """Peak FLOP/s of matrix products."""
    bytes_per_second: float
    """Peak of its memory."""
    within: Link
    across: Link
    source: str
    achieved: float = 0.5
    """Share of the peak FLOP/s that matrix products of a step reach: assumed."""
    memory_achieved: float = 0.8
    """Share of the peak memory rate: assumed."""
    usable: float = 0.94
    """Share of the memory that tensors can have, besides the runtime's own and what is lost between blocks: assumed."""

    @property
    def device(self) -> str:
        """torch's name of its kind."""
        return "cpu" if self.name == "cpu" else "cuda"

    def flops_per_second(self, params: Params) -> float:
        """Peak, for matrix products of the run's arithmetic. TF32 is not used."""
        return {"bf16": self.bf16, "fp32": self.fp32, "fp64": self.fp64}[params]

    @property
    def room(self) -> float | None:
        """Bytes for tensors on one rank."""
        return None if self.memory_bytes is None else self.memory_bytes * self.usable


def _gpu(
    part: str,
    *,
    name: str,
    text: str,
    memory_bytes: float,
    bytes_per_second: float,
    within: Link,
    across: Link,
    source: str,
) -> Machine:
    """part: of the device's name, as `seqengine.flops` has the peaks."""
    bf16, fp32, fp64 = (PEAK_TFLOPS[part][params] * 1e12 for params in ("bf16", "fp32", "fp64"))
    return Machine(name, text, memory_bytes, bf16, fp32, fp64, bytes_per_second, within, across, source)


MACHINES = {
    machine.name: machine
    for machine in (
        _gpu(
            "H200",
            name="h200",
            text="NVIDIA H200 SXM",
            memory_bytes=141e9,
            bytes_per_second=4.8e12,
            within=WITHIN_NODE,
            across=ACROSS_NODES,
            source="NVIDIA H200 Tensor Core GPU data sheet (dense, without sparsity); links: parallel/cost.py, for NVLink of "
            "900 GB/s both ways together and one 400 Gbit/s adapter a GPU (DGX H200 data sheet)",
        ),
        _gpu(
            "H100",
            name="h100",
            text="NVIDIA H100 SXM, 80 GB",
            memory_bytes=80e9,
            bytes_per_second=3.35e12,
            within=WITHIN_NODE,
            across=ACROSS_NODES,
            source="NVIDIA H100 Tensor Core GPU data sheet (dense, without sparsity); links: parallel/cost.py, for NVLink of "
            "900 GB/s both ways together and one 400 Gbit/s adapter a GPU (DGX H100 data sheet)",
        ),
        _gpu(
            "A100",
            name="a100",
            text="NVIDIA A100 SXM, 80 GB",
            memory_bytes=80e9,
            bytes_per_second=2.039e12,
            within=Link(WITHIN_NODE.latency_seconds, 200e9),
            across=Link(ACROSS_NODES.latency_seconds, 22.5e9),
            source="NVIDIA A100 Tensor Core GPU data sheet (dense, without sparsity); links: 2/3 of those of an H100 within "
            "a node, for NVLink of 600 GB/s both ways together, and 1/2 between nodes, for one 200 Gbit/s adapter a GPU (DGX "
            "A100 data sheet)",
        ),
        Machine(
            name="cpu",
            text="one process of a CPU",
            memory_bytes=None,
            bf16=1e11,
            fp32=1e11,
            fp64=0.5e11,
            bytes_per_second=2e10,
            within=Link(50e-6, 2e9),
            across=Link(100e-6, 1e9),
            source="chosen so that a step of hyenadna-tiny-1k on one thread of an AMD EPYC, 0.46 s in float32, is planned at "
            "0.59 s; half the arithmetic for float64; links: assumed for gloo, through memory and through 10 Gbit/s Ethernet",
            achieved=1.0,
            memory_achieved=1.0,
        ),
    )
}
"""By the word that --gpu takes."""


def find_machine(name: str) -> Machine:
    """Raises InputError for a name that is not in the table."""
    if name in MACHINES:
        return MACHINES[name]
    close = get_close_matches(name.lower(), MACHINES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(
        f"--gpu: must be one of {', '.join(MACHINES)}; got {name!r}. {hint}Their figures are in docs/plan.md."
    )
