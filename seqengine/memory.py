"""What a step will need, known before it runs: activations are counted on tensors that hold no data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.model import LanguageModel
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.mesh import Mesh
from seqengine.stages import Stage

MOMENTS = {"adamw": 2, "muon": 2}
"""Most numbers that an optimiser keeps for each weight."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    moments: int
    activations: int
    """Kept by the forward pass of one micro-batch for its backward."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations


def activation_bytes(config: RunConfig, rows: int, tokens: int) -> int:
    """What the forward pass of [rows, tokens] keeps for the backward, besides the weights; nothing is computed.

    Storages are counted once, however many views of them are kept. With a window over P ranks, give a rank's share of it:
    what exchanges keep besides is not counted.
    """
    kept: dict[int, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        with _default_dtype(torch.float64 if config.precision.params == "fp64" else torch.float32):
            model = LanguageModel(config.model)
        model.save_memory(config.activation.checkpoint, offload=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()} | {
            b.untyped_storage()._cdata for b in model.buffers()
        }
        alive: list[Tensor] = []

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
                alive.append(x)
            return x

        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        ctx = SequenceContext.single(tokens)
        bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision.params == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), bf16:
            model.objective(ids, ids, ctx=ctx, dropout_keys=ids[:, 0])
    return sum(kept.values())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def step_memory(config: RunConfig, stage: Stage, mesh: Mesh, micro_rows: int) -> StepMemory:
    """Of a stage on a rank of the mesh."""
    with torch.device("meta"):
        numbers = sum(p.numel() for p in LanguageModel(config.model).parameters())
    width = 8 if config.precision.params == "fp64" else 4
    ranks = mesh.size // mesh.num_copies
    parallel = config.parallel
    cut = {"none": 0, "ddp": 0, "fsdp2": 3, "deepspeed": parallel.zero or 0}[parallel.backend]
    share = [ranks if cut >= level else 1 for level in (3, 2, 1)]
    tokens = -(-stage.seq_len // mesh.sequence_size)
    return StepMemory(
        weights=numbers * width // share[0],
        gradients=numbers * width // share[1],
        moments=MOMENTS[config.optim.name] * numbers * width // share[2],
        activations=activation_bytes(config, micro_rows, tokens),
    )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def check_memory(needs: dict[Stage, StepMemory], available: int, ranks_here: int) -> None:
    """Raises InputError that names the first stage that cannot fit, what it needs and what to change."""
    for stage, need in needs.items():
        if need.total * ranks_here > available:
            gib = 2.0**30
            raise InputError(
                f"{stage} needs at least {need.total / gib:.1f} GiB a rank (activations {need.activations / gib:.1f}, weights, "
                f"gradients and moments {(need.total - need.activations) / gib:.1f}) and {ranks_here} ranks share "
                f"{available / gib:.1f} GiB here. Split windows over more ranks (parallel.sequence), lower train.micro_batch, "
                "or set activation.checkpoint = 'block'."
            )
