"""What a transform reads: taps of some filters, or some channels of gate * x behind the inputs that came before, in rows.

Rows are written once: the cast, the gate and the padding are one pass over the block, in memory that serves all blocks. On a
GPU a Triton kernel does the same for all channels at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from seqengine.kernels.conv.plan import Block
from seqengine.kernels.conv.transforms import rfft_, row_length
from seqengine.kernels.environment import HAS_TRITON


def is_fused(device_type: str) -> bool:
    """Gates, casts and padding around the transforms are one Triton kernel each; on a CPU blocks do without."""
    return device_type == "cuda" and HAS_TRITON


def grouped(x: Tensor, block: Block) -> Tensor:
    """Some channels of x [B, D, n] by the filter that they share: a view [B, g, p, n]."""
    view: Tensor = x[:, block.channels].unflatten(1, (block.groups, block.group_size))
    return view


@dataclass(frozen=True)
class Stream:
    """Positions 0 .. keep - 1 are `past`, or zeros; then gate * x. All [B, D, n]; `dtype` is that of the arithmetic."""

    x: Tensor
    gate: Tensor | None
    past: Tensor | None
    keep: int
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.keep + self.x.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.x.device

    def rows(self, block: Block) -> tuple[int, int, int]:
        """B, g, p."""
        return self.x.shape[0], block.groups, block.group_size

    def write(self, out: Tensor, block: Block, first: int, last: int) -> None:
        """Positions first .. last - 1 of some channels into out [B, g, p, last - first]."""
        middle = min(max(self.keep, first), last)
        if first < middle:
            before = out[..., : middle - first]
            before.zero_() if self.past is None else before.copy_(grouped(self.past, block)[..., first:middle])
        if middle < last:
            inputs = slice(middle - self.keep, last - self.keep)
            own, target = grouped(self.x, block)[..., inputs], out[..., middle - first :]
            if self.gate is None:
                target.copy_(own)
            elif own.dtype == self.gate.dtype == target.dtype:
                torch.mul(own, grouped(self.gate, block)[..., inputs], out=target)
            else:  # multiplied in the dtype of the arithmetic
                target.copy_(own).mul_(grouped(self.gate, block)[..., inputs])


@dataclass(frozen=True)
class Taps:
    """The first L taps of filters [b, G, 1, >= L], skip [D] added to lag 0, for which a group's channels part (q > 1)."""

    filters: Tensor
    skip: Tensor | None
    length: int
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.length

    @property
    def device(self) -> torch.device:
        return self.filters.device

    def rows(self, block: Block) -> tuple[int, int, int]:
        """b, g, q."""
        return self.filters.shape[0], block.groups, 1 if self.skip is None else block.group_size

    def write(self, out: Tensor, block: Block, first: int, last: int) -> None:
        """Lags first .. last - 1 of some filters into out [b, g, q, last - first]."""
        out.copy_(self.filters[:, block.filters, :, first:last])
        if self.skip is not None and first == 0 < last:
            out[..., :1] += grouped(self.skip[None, :, None], block)


class Rows:
    """Memory for rows [B, g, p, ...] that serves every block, and begins with what the last one left.

    On a CPU: memory that went back to the system is paid for page by page when it comes again. A GPU's allocator keeps its own.
    """

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def empty(self, source: Stream | Taps, block: Block, *sizes: int) -> Tensor:
        """[B, g, p, *sizes], contiguous, of the source's dtype: unwritten."""
        shape = (*source.rows(block), *sizes)
        if source.device.type != "cpu":
            return torch.empty(shape, dtype=source.dtype, device=source.device)
        count = prod(shape)
        if self.kept is None or self.kept.numel() < count:
            self.kept = torch.empty(count, dtype=source.dtype, device=source.device)
        return self.kept[:count].view(shape)

    def padded(self, source: Stream | Taps, block: Block, first: int, last: int, size: int, before: int = 0) -> Tensor:
        """For `size` points: `before` zeros, positions first .. last - 1, zeros. [B, g, p, row_length(size)]"""
        device_type = source.device.type
        if isinstance(source, Stream) and is_fused(device_type) and last - first == len(source):
            return self._fused(source, block, size)
        rows = self.empty(source, block, row_length(size, device_type))
        end = before + last - first
        rows[..., :before].zero_()
        source.write(rows[..., before:end], block, first, last)
        rows[..., end:].zero_()
        return rows

    def spectrum(self, source: Stream | Taps, block: Block, first: int, last: int, size: int) -> Tensor:
        """[B, g, p, size / 2 + 1]: of positions first .. last - 1 and zeros."""
        return rfft_(self.padded(source, block, first, last, size), size)

    def _fused(self, stream: Stream, block: Block, size: int) -> Tensor:
        from seqengine.kernels.conv.triton_gates import pad_gated

        some = block.channels
        x, gate, past = (None if t is None else t[:, some] for t in (stream.x, stream.gate, stream.past))
        assert x is not None
        rows = pad_gated(x, gate, past, stream.keep, size, stream.dtype)
        view: Tensor = rows.unflatten(1, (block.groups, block.group_size))
        return view


@dataclass(frozen=True)
class Sink:
    """Where z goes: gate * z into each (out [B, D, T], gate), positions before `keep` into `past` [B, D, keep], if any."""

    keep: int
    outputs: Sequence[tuple[Tensor, Tensor | None]]
    past: Tensor | None = None

    def write(self, block: Block, start: int, z: Tensor) -> None:
        """z [B, g, p, n] holds positions start .. of some channels."""
        skipped = max(0, self.keep - start)
        if self.past is not None and skipped:
            before = grouped(self.past, block)[..., start : start + z.shape[-1]]
            before.copy_(z[..., : before.shape[-1]])
        first, last = start + skipped - self.keep, start + z.shape[-1] - self.keep
        if last <= first:
            return
        if is_fused(z.device.type):
            self._write_fused(block, z, skipped)
            return
        for out, gate in self.outputs:
            target = grouped(out, block)[..., first:last]
            inner = z[..., skipped : skipped + target.shape[-1]]
            if gate is None:
                target.copy_(inner)
            else:
                torch.mul(inner, grouped(gate, block)[..., first : first + target.shape[-1]], out=target)

    def _write_fused(self, block: Block, z: Tensor, skipped: int) -> None:
        """All of z at once, and at most two outputs."""
        from seqengine.kernels.conv.triton_gates import cut_gated

        if not self.outputs:
            return
        own = [
            (out[:, block.channels], None if gate is None else gate[:, block.channels]) for out, gate in self.outputs
        ]
        (out, gate), (second, other) = own[0], own[1] if len(own) > 1 else (None, None)
        cut_gated(z.flatten(1, 2), skipped, gate, out, other, second)
