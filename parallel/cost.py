"""Bytes that a rank sends, as integers from the layout alone. Tests hold the ledger to them."""

from collections.abc import Sequence

from seqengine.parallel.layout import halo_sources, halo_targets, split_sizes


def halo_bytes(bounds: Sequence[int], rank: int, left: int, row_bytes: int) -> int:
    """Forward of `halo`: the positions that later ranks need of this one. row_bytes: all elements of one position."""
    return sum((stop - start) * row_bytes for _, start, stop in halo_targets(bounds, rank, left))


def halo_backward_bytes(bounds: Sequence[int], rank: int, left: int, row_bytes: int) -> int:
    """Backward of `halo`: the gradients of what was received."""
    return sum((stop - start) * row_bytes for _, start, stop in halo_sources(bounds, rank, left))


def to_channels_bytes(bounds: Sequence[int], rank: int, channels: int, element_bytes: int) -> int:
    """`transpose` from this rank's tokens of all channels to all tokens of its channels.

    element_bytes: bytes of one token of one channel, batch included.
    """
    tokens = bounds[rank + 1] - bounds[rank]
    mine = split_sizes(channels, len(bounds) - 1)[rank]
    return tokens * (channels - mine) * element_bytes


def to_tokens_bytes(bounds: Sequence[int], rank: int, channels: int, element_bytes: int) -> int:
    """The way back, which is also the backward of `to_channels_bytes`."""
    tokens = bounds[rank + 1] - bounds[rank]
    mine = split_sizes(channels, len(bounds) - 1)[rank]
    return (bounds[-1] - tokens) * mine * element_bytes


def long_conv_bytes(bounds: Sequence[int], rank: int, channels: int, element_bytes: int) -> int:
    """The two tensors of `long_conv`, its gated input and its output. The backward sends the same number."""
    there = to_channels_bytes(bounds, rank, channels, element_bytes)
    back = to_tokens_bytes(bounds, rank, channels, element_bytes)
    return there + back
