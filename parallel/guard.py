"""Guards: what would silently give another result, or hang, raises instead.

A mixer that runs on its shard without a context mixes within the shard alone: no error, another model. Ranks that run different
configurations enter different collectives: no error, until a timeout. Both are cheap to find before the first step.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from seqengine.parallel import comm
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.ledger import Ledger
from seqengine.parallel.mesh import Mesh

MARK = "mixes_sequence"
"""A module whose class says `mixes_sequence = True` lets tokens of a sequence see each other, and takes a SequenceContext."""


class Guard:
    """The hooks on a model's mixers, until `remove`."""

    def __init__(self, names: Iterable[str], handles: Iterable[RemovableHandle]) -> None:
        self.names = tuple(names)
        """The guarded modules."""
        self._handles = list(handles)

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def guard_sequence_mixers(model: nn.Module, mesh: Mesh, *, mixers: Iterable[nn.Module] = ()) -> Guard:
    """Make every sequence mixer of the model raise if it is run on a shard without the context of the mesh's sequence axis.

    mixers: modules to guard besides those whose class says `mixes_sequence = True`.
    Checks: each call, before the mixer runs: it has an argument, by position or by name, that is a SequenceContext of
            mesh.sequence. On an axis of one rank it may have none, and none of several ranks.
    Raises: ValueError if there is nothing to guard; in a call, ValueError that names the module. Every rank that makes the same
            call raises, before any message of the mixer.
    """
    wanted = {id(m) for m in mixers}
    found = {name: m for name, m in model.named_modules() if id(m) in wanted or getattr(type(m), MARK, False)}
    missing = len(wanted - {id(m) for m in found.values()})
    if missing:
        raise ValueError(f"guard_sequence_mixers: mixers must be parts of the model; got {missing} that are not.")
    if not found:
        raise ValueError(
            f"guard_sequence_mixers: {type(model).__name__} must have a sequence mixer; got none. Say {MARK} = True in the "
            "classes of its mixers, or name them in `mixers`."
        )
    return Guard(found, [_guard(name, module, mesh) for name, module in found.items()])


def _guard(name: str, module: nn.Module, mesh: Mesh) -> RemovableHandle:
    what = f"{name or 'the model'} ({type(module).__name__})"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def check_context(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        contexts = [a for a in (*args, *kwargs.values()) if isinstance(a, SequenceContext)]
        _check_contexts(what, contexts, mesh)

    return module.register_forward_pre_hook(check_context, with_kwargs=True, prepend=True)


def _check_contexts(what: str, contexts: list[SequenceContext], mesh: Mesh) -> None:
    size = mesh.sequence_size
    if not contexts and size > 1:
        raise ValueError(
            f"{what}: a sequence mixer must get the SequenceContext of its {size} ranks; got none. Alone it would mix the "
            "tokens of this shard only. Pass ctx=..."
        )
    for ctx in contexts:
        if ctx.size != size:
            raise ValueError(
                f"{what}: the context must be one of the mesh's {size} sequence ranks; got one of {ctx.size}."
            )
        if size > 1 and not _is_same_group(ctx.group, mesh.sequence):
            raise ValueError(
                f"{what}: the context must be one of the mesh's sequence group, ranks {_ranks(mesh.sequence)}; got one of "
                f"ranks {_ranks(ctx.group)}."
            )


def _is_same_group(a: object, b: object) -> bool:
    return a is b or _ranks(a) == _ranks(b) != []


def _ranks(group: object) -> list[int]:
    """Of a group of processes."""
    return dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else []


def agree(value: Mapping[str, object], mesh: Mesh, what: str) -> None:
    """Raise on every rank, before any other message, unless all ranks of the mesh hold the same `value`: a configuration, say.

    value:   names to what JSON can say; dtypes, devices and paths count as their text.
    Traffic: one all-gather of 8 bytes; the values themselves only if they differ. Every rank must call.
    Raises:  ValueError that names the ranks that differ from most, and what each of them has; TypeError for other values.
    """
    texts = {key: json.dumps(entry, sort_keys=True, default=_text) for key, entry in value.items()}
    if mesh.world is None:
        return
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).digest()
    digests = comm.gather_integers(int.from_bytes(digest[:8], "big", signed=True), mesh.world, Ledger())
    usual, count = Counter(digests).most_common(1)[0]
    if count == mesh.size:
        return
    everyone: list[Any] = comm.gather_objects(texts, mesh.world)
    most = everyone[digests.index(usual)]
    lines = [_difference(rank, other, most) for rank, other in enumerate(everyone) if other != most]
    raise ValueError(f"{what} must be the same on every rank; got {'; '.join(lines)}.")


def _text(value: object) -> str:
    if isinstance(value, torch.dtype | torch.device | os.PathLike):
        return str(value)
    raise TypeError(
        f"agree: values must be what JSON can say, a dtype, a device or a path; got {type(value).__name__}."
    )


def _difference(rank: int, mine: dict[str, str], most: dict[str, str]) -> str:
    keys = sorted(key for key in {*mine, *most} if mine.get(key) != most.get(key))
    return f"rank {rank}: " + ", ".join(
        f"{key} = {mine.get(key, 'nothing')}, not {most.get(key, 'nothing')}" for key in keys
    )


def check_together(check: Callable[[], None], mesh: Mesh) -> None:
    """Run a rank's own checks; if they raise on one rank, raise on every rank, so that none goes on alone into a collective.

    Traffic: one all-gather of 8 bytes; the messages only if there are any. Every rank must call.
    Raises:  ValueError that names the ranks and says what each one said. In a single process, whatever `check` raises.
    """
    try:
        check()
    except Exception as error:
        _raise_together(f"{type(error).__name__}: {error}", mesh)
        raise
    _raise_together(None, mesh)


def _raise_together(problem: str | None, mesh: Mesh) -> None:
    if mesh.world is None or not any(comm.gather_integers(int(problem is not None), mesh.world, Ledger())):
        return
    problems = enumerate(comm.gather_objects(problem, mesh.world))
    raise ValueError("; ".join(f"rank {rank}: {text}" for rank, text in problems if text is not None))
