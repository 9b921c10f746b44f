"""What a step will need, known before it runs: activations are counted on tensors that hold no data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqengine.config.run import RunConfig
from seqengine.errors import InputError
from seqengine.feed import micro_batch_rows
from seqengine.model import LanguageModel
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.layout import offsets, split_sizes
from seqengine.parallel.mesh import Mesh
from seqengine.stages import Stage, stages_of
from seqengine.unfilled import Unfilling

MOMENTS = {"adamw": 2, "muon": 2}
"""Most numbers that an optimiser keeps for each weight."""
TRACED_RANKS = 4
"""Of more ranks of a window activations are not traced, but taken from those on 2 and on 4."""


class SilentGroup:
    """One rank's view of a group that sends nothing, for traces: what is received stays as it was, the ledger counts it."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def tensor_device(self) -> torch.device:
        return torch.device("cpu")

    def _start(self, *_: object) -> Sequence[Any]:
        return []

    start_messages = start_all_to_all = start_all_gather = start_broadcast = start_all_reduce = _start

    def gather_objects(self, value: object) -> list[object]:
        return [value] * self._size

    def barrier(self) -> None:
        """Nobody to wait for."""


def split_context(tokens: int, ranks: int, rank: int) -> SequenceContext:
    """That rank's, of windows of `tokens` over a silent group."""
    if ranks == 1:
        return SequenceContext.single(tokens)
    return SequenceContext(SilentGroup(rank, ranks), rank, offsets(split_sizes(tokens, ranks)))


def cut_over(half: int, quarter: int, ranks: int) -> int:
    """a + b / ranks, through the values on 2 and on 4 ranks: what every rank holds whole, and what is cut."""
    return max(0, round(2 * quarter - half + 4 * (half - quarter) / ranks))


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    moments: int
    activations: int
    """Kept by the forward pass of one micro-batch for its backward."""
    ema: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations + self.ema


def activation_bytes(config: RunConfig, rows: int, tokens: int, ranks: int = 1) -> int:
    """What the forward pass of `rows` windows of `tokens` keeps for the backward, besides the weights; nothing is computed.

    Storages are counted once, however many views of them are kept. ranks: over which a window is split; then of a rank in the
    middle, what its exchanges keep included, and for more than TRACED_RANKS from traces on fewer.
    """
    if ranks > TRACED_RANKS:
        half, quarter = (activation_bytes(config, rows, tokens, n) for n in (2, 4))
        return cut_over(half, quarter, ranks)
    kept: dict[int, int] = {}
    drops = config.model.embed_dropout > 0.0 or config.model.resid_dropout > 0.0
    undropped = config.model.model_copy(update={"embed_dropout": 0.0, "resid_dropout": 0.0})
    with Unfilling():
        with default_dtype(arithmetic_dtype(config)):
            model = LanguageModel(
                undropped
            )  # masks are hashed block by block, which takes long and keeps positions alone
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

        ctx = split_context(tokens, ranks, ranks // 2)
        ids = torch.zeros(rows, ctx.local_tokens, dtype=torch.int64)
        bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision.params == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), bf16:
            objective = model.objective(ids, ids, ctx=ctx, dropout_keys=ids[:, 0])
        received = ctx.ledger().kept_bytes
        del objective
    return sum(kept.values()) + received + (ids.element_size() * ctx.local_tokens if drops else 0)


def arithmetic_dtype(config: RunConfig) -> torch.dtype:
    """Of the weights, of the residual stream, and of states."""
    return torch.float64 if config.precision.params == "fp64" else torch.float32


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What is made in a `with` block without a dtype of its own has this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Shares(NamedTuple):
    """Into how many parts each kind is cut: a rank holds one of them."""

    weights: int
    gradients: int
    moments: int


def shares(backend: str, zero: int | None, ranks: int, micro_batches: int) -> Shares:
    """Of a backend that cuts over so many ranks. zero: the stage of 'deepspeed'.

    With fsdp2 the gradients of all micro-batches but the last stay whole.
    """
    cut = {"none": 0, "ddp": 0, "fsdp2": 3, "deepspeed": zero or 0}[backend]
    weights, gradients, moments = (ranks if cut >= level else 1 for level in (3, 2, 1))
    return Shares(weights, 1 if backend == "fsdp2" and micro_batches > 1 else gradients, moments)


def step_memory(config: RunConfig, stage: Stage, mesh: Mesh, micro_rows: int) -> StepMemory:
    """Of a stage on a rank of the mesh."""
    with Unfilling():
        numbers = sum(p.numel() for p in LanguageModel(config.model).parameters())
    num_bytes = numbers * arithmetic_dtype(config).itemsize
    micro_batches = -(-(stage.windows_per_step // mesh.num_replicas) // micro_rows)
    parts = shares(config.parallel.backend, config.parallel.zero, mesh.size // mesh.num_copies, micro_batches)
    return StepMemory(
        weights=num_bytes // parts.weights,
        gradients=num_bytes // parts.gradients,
        moments=MOMENTS[config.optim.name] * num_bytes // parts.moments,
        activations=activation_bytes(config, micro_rows, stage.seq_len, mesh.sequence_size),
        ema=num_bytes // parts.weights if config.optim.ema else 0,
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
                f"gradients, moments and averages {(need.total - need.activations) / gib:.1f}) and {ranks_here} ranks share "
                f"{available / gib:.1f} GiB here. Split windows over more ranks (parallel.sequence), lower train.micro_batch, "
                "or set activation.checkpoint = 'block'."
            )


def check_stages(config: RunConfig, meshes: Mapping[int, Mesh], mesh: Mesh) -> None:
    """Before the first step of a run with stages: raises InputError on every rank if one of them cannot fit.

    meshes: by the ranks of a window. Every rank must call.
    """
    stages, available = stages_of(config), available_bytes(mesh.device)
    if len(stages) == 1 or available is None:
        return
    needs = {}
    for stage in stages:
        of_stage = meshes[stage.sequence]
        rows = micro_batch_rows(stage.windows_per_step // of_stage.num_replicas, stage, config, of_stage)
        needs[stage] = step_memory(config, stage, of_stage, rows)
    ranks_here = (mesh.ranks_per_node or mesh.size) if mesh.device.type == "cpu" else 1
    check_memory(needs, int(-mesh.max(-float(available))), ranks_here)
