"""Activation checkpointing of blocks that exchange: the block runs again in the backward, and sends nothing again."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from seqengine.parallel.context import SequenceContext
from seqengine.parallel.ledger import Ledger, Tape

Result = TypeVar("Result")


def checkpoint(
    function: Callable[..., Result],
    *arguments: object,
    ctx: SequenceContext | Sequence[SequenceContext],
    offload: bool = False,
    preserve_rng_state: bool = True,
    determinism_check: str = "default",
    **keywords: Any,
) -> Result:
    """function(*arguments, **keywords), of which the backward keeps the arguments and what its exchanges received.

    Activations are made again in the backward by a second run, whose exchanges get what the first run received. So the bytes
    sent are those without checkpointing, and so are the gradients, bit for bit.
    function:  must do the same each time it runs (random numbers do: preserve_rng_state). It may checkpoint parts of itself.
    ctx:       the context of its exchanges, or all of them; contexts made from one of them belong to it.
    offload:   arguments and received messages wait on the CPU, in pinned memory if they come from a GPU.
    Memory:    the tensor arguments, and every message of the forward that another rank sent here: with W the bytes of
               the input, about W (P - 1) / P for each transpose, a state for a scan by `log` or `serial` and P - 1 of them by
               `gather`, the halo's positions, the result of an all-reduce. A ring keeps all blocks that came by, up to
               (P - 1) times its shard: leave ring attention outside, or choose ulysses. `ctx.ledger().kept_bytes` says how
               much it is now; it is given back when the backward is done.
    Traffic:   that of the function, once; its backward as ever.
    Order:     as function; every rank checkpoints it or not, as it likes.
    Raises:    RuntimeError in the backward if the second run asks for another exchange than the first, by operation, shapes or
               dtypes. What torch.utils.checkpoint raises, whose preserve_rng_state and determinism_check these are.
    References: Chen et al. 2016, arXiv:1604.06174.
    """
    contexts = (ctx,) if isinstance(ctx, SequenceContext) else tuple(ctx)
    ledgers = list({id(c.ledger()): c.ledger() for c in contexts}.values())

    def sessions() -> tuple[_Session, _Session]:
        tape = Tape(offload=offload)
        for ledger in ledgers:
            ledger.keep(tape)
        return _Session(tape, ledgers, replays=False), _Session(tape, ledgers, replays=True)

    is_on_gpu = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in (*arguments, *keywords.values()))
    with torch.autograd.graph.save_on_cpu(pin_memory=is_on_gpu) if offload else nullcontext():
        result: Result = torch_checkpoint(
            function,
            *arguments,
            use_reentrant=False,
            context_fn=sessions,
            preserve_rng_state=preserve_rng_state,
            determinism_check=determinism_check,
            **keywords,
        )
    return result


class _Session:
    """While it is entered, exchanges of the ledgers write the tape, or read it from its beginning. It may be entered again."""

    def __init__(self, tape: Tape, ledgers: Sequence[Ledger], *, replays: bool):
        self._tape, self._ledgers, self._replays = tape, ledgers, replays

    def __enter__(self) -> None:
        if self._replays:
            self._tape.rewind()
        for ledger in self._ledgers:
            ledger.tapes.append(self._tape)

    def __exit__(self, *_: object) -> None:
        for ledger in self._ledgers:
            ledger.tapes.remove(self._tape)
        self._tape.stop()
