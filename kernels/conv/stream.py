"""What a transform reads: some channels of gate * x behind the inputs that came before, written into zeroed rows.

Rows are written once: the cast, the gate and the padding are one pass over the block, and the zeros behind stay from block to
block. On a GPU a Triton kernel does the same for all channels at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqengine.kernels.conv.plan import Block
from seqengine.kernels.environment import HAS_TRITON


def is_fused(device_type: str) -> bool:
    """Gates, casts and padding around the transforms are one Triton kernel each; on a CPU blocks do without."""
    return device_type == "cuda" and HAS_TRITON


def grouped(x: Tensor, block: Block) -> Tensor:
    """Some channels of x [B, D, n] by the filter that they share: a view [B, g, p, n]."""
    count = block.filters.stop - block.filters.start
    own = x[:, block.channels]
    view: Tensor = own.unflatten(1, (count, own.shape[1] // count))
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


class Rows:
    """A buffer [B, g, p, ...] that is used again for every block of one shape, with zeros where nobody writes."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.filled = 0

    def zeros(self, stream: Stream, block: Block, *sizes: int) -> Tensor:
        """[B, g, p, *sizes]: zeros at first, afterwards what the last block left."""
        count = block.filters.stop - block.filters.start
        channels = block.channels.stop - block.channels.start
        shape = (stream.x.shape[0], count, channels // count, *sizes)
        if self.buffer is None or self.buffer.shape != shape:
            self.buffer = torch.zeros(shape, dtype=stream.dtype, device=stream.x.device)
            self.filled = 0
        return self.buffer

    def padded(self, stream: Stream, block: Block, first: int, last: int, size: int, before: int = 0) -> Tensor:
        """[B, g, p, size]: `before` zeros, positions first .. last - 1, zeros."""
        if is_fused(stream.x.device.type) and last - first == len(stream):
            return self._fused(stream, block, size)
        rows = self.zeros(stream, block, size)
        end = before + last - first
        if self.filled > end:
            rows[..., end : self.filled].zero_()
        self.filled = end
        stream.write(rows[..., before:end], block, first, last)
        return rows

    def _fused(self, stream: Stream, block: Block, size: int) -> Tensor:
        from seqengine.kernels.conv.triton_gates import pad_gated

        some = block.channels
        x, gate, past = (None if t is None else t[:, some] for t in (stream.x, stream.gate, stream.past))
        assert x is not None
        rows = pad_gated(x, gate, past, stream.keep, size, stream.dtype)
        count = block.filters.stop - block.filters.start
        view: Tensor = rows.unflatten(1, (count, rows.shape[1] // count))
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
