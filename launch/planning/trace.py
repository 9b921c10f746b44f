"""A block of a model, run forward and backward on tensors without data: what it keeps, needs for a while, and sends.

The block is one rank's: exchanges go to a group that sends nothing, and the ledger counts them as ever.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves

from seqengine.blocks import Block
from seqengine.config.run import RunConfig
from seqengine.memory import arithmetic_dtype, default_dtype
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.ledger import Tape
from seqengine.unfilled import NeedsDataError, Unfilling

_prim = torch.ops.prim


class AliveBytes(Unfilling):
    """Tensors without data; while it is `counting`, bytes of storages made and still alive, and the most of them at once.

    What our operators make for a while counts too: where it `looks_inside`, their code is run, which takes long, and fills
    `workspace`, by the operator's name; elsewhere it is read from there.
    """

    def __init__(self, workspace: dict[str, int], *, looks_inside: bool) -> None:
        super().__init__()
        self.now = self.most = 0
        self.workspace, self._looks_inside = workspace, looks_inside
        self._known: set[int] = set()
        self._counts = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What is made in a `with` block counts."""
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._counts or func is _prim.device.default:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        if self._looks_inside and func.namespace == "seqengine":
            with suppress(NeedsDataError):  # attention, cells and the loss look at values: taken whole
                return self._look_inside(func.name(), args, kwargs or {})
        self._counts = False  # not what an operation makes for itself
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self._counts = True
        made = [out] if isinstance(out, Tensor) else [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        new = [storage for x in made if (storage := x.untyped_storage())._cdata not in self._known]
        if new:
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for storage in new:
                if storage._cdata not in given:
                    self._add(storage)
        self.most = max(self.most, self.now + self.workspace.get(func.name(), 0))
        return out

    def _look_inside(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        before, self.most = self.most, self.now
        try:
            with self:
                out = OPDEFS[name]._init_fn(*args, **kwargs)
            self.workspace[name] = max(self.workspace.get(name, 0), self.most - self.now)
        finally:
            self.most = max(self.most, before)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Trace:
    """Bytes of one block, or of the head, on one rank."""

    kept: int
    """For the backward, besides weights."""
    kept_selective: int
    """The same with the MLP's insides made again."""
    received: int
    """Messages of the forward, which a block that is run again keeps."""
    forward_peak: int
    """Most alive at once in the forward, what it keeps included."""
    backward_peak: int
    """The same of the backward."""
    sent_forward: dict[str, int]
    """By the ledger's name of the operation."""
    sent_backward: dict[str, int]
    workspace: dict[str, int]
    """Most that an operator needed besides its results."""


def trace(
    config: RunConfig,
    make: Callable[[], nn.Module],
    run: Callable[[nn.Module, Tensor, SequenceContext], Tensor],
    rows: int,
    ctx: SequenceContext,
    workspace: dict[str, int] | None = None,
) -> Trace:
    """make: the module, in the run's dtype; run: from the residual stream [rows, T, D] to what its backward begins with.

    workspace: what operators need for a while, from the trace that found it; without it the operators' code is run.
    """
    alive = AliveBytes(workspace or {}, looks_inside=workspace is None)
    dtype = arithmetic_dtype(config)
    with alive:
        with default_dtype(dtype):
            module = make()
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        x = torch.zeros(rows, ctx.local_tokens, config.model.d_model, dtype=dtype, requires_grad=True)
        return _traced(config, module, lambda: run(module, x, ctx), ctx, alive)


def _traced(
    config: RunConfig, module: nn.Module, run: Callable[[], Tensor], ctx: SequenceContext, alive: AliveBytes
) -> Trace:
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    saved = _Inside(module)
    kept: dict[int, int] = {}
    tensors: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            saved.note(storage._cdata)
            tensors.append(x)
        return x

    tape, ledger = Tape(), ctx.ledger()
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision.params == "bf16")
    with alive.counting():
        ledger.tapes.append(tape)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), bf16:
            y = run()
        ledger.tapes.remove(tape)
        received = tape.kept_bytes
        del tape
        forward_peak, sent = alive.most - received, _by_operation(ctx)
        total, selective = sum(kept.values()), saved.selective(kept)
        tensors.clear()
        alive.most = alive.now
        y.backward(torch.zeros_like(y))
        both = _by_operation(ctx)
    return Trace(
        kept=total,
        kept_selective=selective,
        received=received,
        forward_peak=forward_peak,
        backward_peak=alive.most,
        sent_forward=sent,
        sent_backward={k: n - sent.get(k, 0) for k, n in both.items()},
        workspace=alive.workspace,
    )


def _by_operation(ctx: SequenceContext) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in ctx.ledger().entries:
        found[entry.operation] = found.get(entry.operation, 0) + entry.sent_bytes
    return found


class _Inside:
    """Which storages are saved by a block's MLP alone."""

    def __init__(self, module: nn.Module) -> None:
        self._is_inside = False
        self._outside: set[int] = set()
        self._input = 0
        if isinstance(module, Block) and module.mlp is not None:
            module.mlp.register_forward_pre_hook(self._enter)
            module.mlp.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._is_inside, self._input = True, inputs[0].untyped_storage()._cdata
        self._input_bytes = inputs[0].untyped_storage().nbytes()

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._is_inside = False

    def note(self, key: int) -> None:
        if not self._is_inside:
            self._outside.add(key)

    def selective(self, kept: dict[int, int]) -> int:
        """Bytes that stay where the MLP keeps its input alone."""
        found = sum(size for key, size in kept.items() if key in self._outside)
        return found + (self._input_bytes if self._input and self._input not in self._outside else 0)


def trace_block(
    config: RunConfig, layer: int, rows: int, ctx: SequenceContext, workspace: dict[str, int] | None = None
) -> Trace:
    """Of a layer."""

    def run(block: nn.Module, x: Tensor, ctx: SequenceContext) -> Tensor:
        y: Tensor = block(x, lambda y, n: y, ctx=ctx)[0]
        return y

    return trace(config, lambda: Block(config.model, layer), run, rows, ctx, workspace)
