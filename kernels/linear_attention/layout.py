"""Which tokens are worked on together: blocks of rows and heads, segments of time, chunks; with or without documents.

A tile is [n, b, h, C, K]: n chunks of C tokens of b rows and h heads, zeros where there is no token. A document starts with
a chunk of its own, so that a chunk has one document and the states know where to start anew.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from seqengine.kernels.checks import check_bounds

LONGEST_CHUNK = 64
SHORTEST_CHUNK_OF_DOCUMENTS = 8
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Numbers of one tile: on a CPU about thirty of them stay in its cache; on a GPU only a bound on memory."""
SEGMENT_CHUNKS = 16
"""A segment has at least so many chunks where there are: one state is saved for each segment."""


class Plan(NamedTuple):
    """Sizes that follow from shapes alone."""

    chunk: int
    span: int  # chunks of a segment
    rows: int  # rows of a block
    heads: int  # heads of a block
    segments: int  # at most; exactly, without documents


class Segment(NamedTuple):
    """Consecutive chunks."""

    start: int  # tokens
    stop: int
    chunk: int
    chunks: int
    slots: Tensor | None  # place of each token among chunks * chunk; None: one after the other
    first: list[int]  # for each chunk, the document that starts with it, or -1
    last: list[int]  # the document that ends with it, or -1


class Block(NamedTuple):
    """Rows and heads."""

    rows: slice
    heads: slice


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    p = 1
    while p < n:
        p *= 2
    return p


def make_plan(B: int, T: int, H: int, K: int, V: int, documents: int | None, device: str) -> Plan:
    """For T >= 1 tokens; documents is their number, None without cu_seqlens."""
    if documents is None:
        chunk = min(LONGEST_CHUNK, power_of_two(T))
        whole, ragged = T // chunk, int(T % chunk > 0)
    else:
        mean = -(-T // documents)
        chunk = min(LONGEST_CHUNK, max(SHORTEST_CHUNK_OF_DOCUMENTS, power_of_two(mean)))
        whole, ragged = T // chunk + documents, 0
    size = max(chunk * K, chunk * V, K * V)
    budget = max(1, TILE_ELEMENTS.get(device, 1 << 20) // size)
    lines = max(1, budget // max(1, min(SEGMENT_CHUNKS, whole)))
    rows, heads = (min(B, lines // H), H) if lines >= H else (1, lines)
    span = max(SEGMENT_CHUNKS, budget // (rows * heads))
    return Plan(chunk, span, rows, heads, -(-whole // span) + ragged)


def blocks(plan: Plan, B: int, H: int) -> list[Block]:
    return [
        Block(slice(b, min(b + plan.rows, B)), slice(h, min(h + plan.heads, H)))
        for b in range(0, B, plan.rows)
        for h in range(0, H, plan.heads)
    ]


def segments(plan: Plan, T: int, bounds: Tensor | None, device: torch.device, name: str) -> list[Segment]:
    """In the order of time. Without documents a ragged end is a segment of one shorter chunk."""
    if bounds is not None:
        return _packed_segments(plan, T, bounds, device, name)
    whole = T - T % plan.chunk
    step = plan.span * plan.chunk
    cuts = [(t, min(t + step, whole), plan.chunk) for t in range(0, whole, step)]
    if whole < T:
        cuts.append((whole, T, power_of_two(T - whole)))
    made = []
    for start, stop, chunk in cuts:
        n = -(-(stop - start) // chunk)
        first, last = [-1] * n, [-1] * n
        if start == 0:
            first[0] = 0
        if stop == T:
            last[-1] = 0
        made.append(Segment(start, stop, chunk, n, None, first, last))
    return made


def _packed_segments(plan: Plan, T: int, bounds: Tensor, device: torch.device, name: str) -> list[Segment]:
    ends = check_bounds(name, bounds, T)
    C = plan.chunk
    first: list[int] = []
    last: list[int] = []
    tokens = [0]  # before each chunk
    origins = []  # slot of each document's first token, less that token
    for document, (start, stop) in enumerate(itertools.pairwise(ends)):
        n = -(-(stop - start) // C)
        origins.append(len(first) * C - start)
        if n > 0:
            tokens.extend(min(start + (i + 1) * C, stop) for i in range(n))
            first.extend([document] + [-1] * (n - 1))
            last.extend([-1] * (n - 1) + [document])
    lengths = torch.tensor(ends).diff()
    slots = torch.arange(T) + torch.repeat_interleave(torch.tensor(origins), lengths, output_size=T)
    slots = slots.to(device)
    made = []
    for c in range(0, len(first), plan.span):
        d = min(c + plan.span, len(first))
        start, stop = tokens[c], tokens[d]
        made.append(Segment(start, stop, C, d - c, slots[start:stop] - c * C, first[c:d], last[c:d]))
    return made


def load(x: Tensor, block: Block, segment: Segment, dtype: torch.dtype) -> Tensor:
    """[B, T, H, K] -> a fresh tile [n, b, h, C, K]."""
    piece = x[block.rows, segment.start : segment.stop, block.heads]
    b, t, h, K = piece.shape
    n, C = segment.chunks, segment.chunk
    if t < n * C:
        padded = piece.new_zeros(b, n * C, h, K)
        if segment.slots is None:
            padded[:, :t] = piece
        else:
            padded[:, segment.slots] = piece
        piece = padded
    tile = torch.empty(n, b, h, C, K, dtype=dtype, device=x.device)
    return tile.copy_(piece.unflatten(1, (n, C)).permute(1, 0, 3, 2, 4))


def store(out: Tensor, block: Block, segment: Segment, tile: Tensor) -> None:
    """The tile's tokens to [B, T, H, K]."""
    n, b, h, C, K = tile.shape
    place = out[block.rows, segment.start : segment.stop, block.heads]
    tokens = tile.permute(1, 0, 3, 2, 4)
    t = place.shape[1]
    if t == n * C:
        place.unflatten(1, (n, C)).copy_(tokens)
    else:
        flat = tokens.reshape(b, n * C, h, K)
        place.copy_(flat[:, :t] if segment.slots is None else flat[:, segment.slots])


def scan(
    sums: Tensor,
    decay: Tensor,
    carry: Tensor,
    segment: Segment,
    source: Tensor,
    target: Tensor,
    reverse: bool = False,
) -> Tensor:
    """The carry before each chunk's sum is added, [n, b, h, K, V]; carry <- decay carry + sum, in place, chunk by chunk.

    Where a document starts the carry is read from `source`, where it ends it is written to `target` (both
    [documents, b, h, K, V]); with reverse the other way round. The carry is in float64: a rounded decay, applied for
    millions of tokens, would change how long a slow gate remembers.
    """
    n, ahead = segment.chunks, 0 if reverse else 1
    enter, leave = (segment.last, segment.first) if reverse else (segment.first, segment.last)
    states = torch.empty(n + 1, *carry.shape, dtype=torch.float64, device=carry.device)
    state, decays, added = states.unbind(0), decay.unbind(0), sums.to(torch.float64).unbind(0)
    state[n if reverse else 0].copy_(carry)
    for i in reversed(range(n)) if reverse else range(n):
        before, after = state[i + 1 - ahead], state[i + ahead]
        if enter[i] >= 0:
            before.copy_(source[enter[i]])
        torch.addcmul(added[i], decays[i], before, out=after)
        if leave[i] >= 0:
            target[leave[i]] = after
    carry.copy_(state[0 if reverse else n])
    return states[1 - ahead : n + 1 - ahead].to(sums.dtype, copy=True)
