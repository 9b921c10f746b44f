"""What convolutions send: who needs which positions, which rank relays what, and the bytes, as integers from the layout."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import isqrt
from typing import Literal

from seqengine.parallel.cost import ACROSS_NODES, GROUP_SECONDS, MEMORY_BYTES_PER_SECOND, WITHIN_NODE, Link
from seqengine.parallel.layout import overlap, split_size, split_sizes, split_span

LongConvAlgorithm = Literal["halo", "transpose", "fft"]
MOST_GROUPS = 8
FFT_BYTES = 128
"""Memory traffic of one token of one channel in a padded single-precision convolution: 8 passes over 16 bytes."""
FOUR_STEP_BYTES = 192
"""The same of the four-step transform, which also packs and unpacks four messages."""

Span = tuple[int, int]


def windows(bounds: Sequence[int], left: int, right: int = 0, documents: Sequence[int] | None = None) -> list[Span]:
    """The positions [start, stop) that each rank needs: its part, `left` before it and `right` after it, as far as there are.

    documents: boundaries (cu_seqlens) that `left` does not cross, as in `halo`.
    """
    found = []
    for first, last in pairwise(bounds):
        start, stop = max(0, first - left), min(bounds[-1], last + right)
        if documents is not None:
            start = max(start, documents[bisect_right(documents, first) - 1])
        found.append((start, stop))
    return found


def window_sources(bounds: Sequence[int], needed: Sequence[Span], rank: int) -> list[tuple[int, int, int]]:
    """What `rank` gets: (owner, start, stop) in global positions, ascending."""
    spans = [(owner, *overlap(needed[rank], (bounds[owner], bounds[owner + 1]))) for owner in range(len(needed))]
    return [(owner, start, stop) for owner, start, stop in spans if owner != rank and stop > start]


def window_targets(bounds: Sequence[int], needed: Sequence[Span], rank: int) -> list[tuple[int, int, int]]:
    """What `rank` gives: (receiver, start, stop); the mirror image of `window_sources`."""
    mine = (bounds[rank], bounds[rank + 1])
    spans = [(receiver, *overlap(needed[receiver], mine)) for receiver in range(len(needed))]
    return [(receiver, start, stop) for receiver, start, stop in spans if receiver != rank and stop > start]


def window_bytes(bounds: Sequence[int], needed: Sequence[Span], rank: int, row_bytes: int) -> int:
    """Forward of the exchange of `windows`. row_bytes: all elements of one position."""
    return sum((stop - start) * row_bytes for _, start, stop in window_targets(bounds, needed, rank))


def window_backward_bytes(bounds: Sequence[int], needed: Sequence[Span], rank: int, row_bytes: int) -> int:
    """Its backward: the gradients of what was received."""
    return sum((stop - start) * row_bytes for _, start, stop in window_sources(bounds, needed, rank))


def tails(documents: Sequence[int], keep: int) -> list[Span]:
    """The last `keep` positions of each document, as far as it has them."""
    return [(max(start, stop - keep), stop) for start, stop in pairwise(documents)]


def final_state_bytes(bounds: Sequence[int], rank: int, documents: Sequence[int], keep: int, row_bytes: int) -> int:
    """The last inputs of each document, from where they are to all others; without documents these are (0, total)."""
    mine = (bounds[rank], bounds[rank + 1])
    spans = [overlap(tail, mine) for tail in tails(documents, keep)]
    return (len(bounds) - 2) * sum(stop - start for start, stop in spans) * row_bytes


def to_channels_bytes(bounds: Sequence[int], rank: int, channels: int, element_bytes: int) -> int:
    """`transpose` from this rank's tokens of all channels to all tokens of its channels.

    element_bytes: bytes of one token of one channel, batch included.
    """
    tokens = bounds[rank + 1] - bounds[rank]
    return tokens * (channels - split_size(channels, len(bounds) - 1, rank)) * element_bytes


def to_tokens_bytes(bounds: Sequence[int], rank: int, channels: int, element_bytes: int) -> int:
    """The way back, which is also the backward of `to_channels_bytes`."""
    tokens = bounds[rank + 1] - bounds[rank]
    return (bounds[-1] - tokens) * split_size(channels, len(bounds) - 1, rank) * element_bytes


def relay(num_ranks: int, node_size: int, source: int, target: int) -> int:
    """The rank of the source's node through which a two-level transpose sends: the target's place, in the source's node."""
    start = source // node_size * node_size
    return start + target % node_size % min(node_size, num_ranks - start)


def two_level_bytes(
    held: Sequence[int], cut: Sequence[int], rank: int, element_bytes: int, node_size: int
) -> tuple[int, int]:
    """Of a two-level `transpose`: (within the node, across nodes), what it relays for others included.

    held: sizes of the dim that is joined, which every rank holds its part of; cut: those of the dim that is cut. Backward:
    the two exchanged.
    """
    P, start = len(held), rank // node_size * node_size
    node = range(start, min(start + node_size, P))
    through = [relay(P, node_size, rank, target) for target in range(P)]
    within = sum(held[rank] * cut[target] for target in range(P) if through[target] != rank)
    relayed = sum(cut[target] for target in range(P) if through[target] == rank and target not in node)
    return within * element_bytes, sum(held[i] for i in node) * relayed * element_bytes


def long_conv_bytes(bounds: Sequence[int], rank: int, channels: int, element_bytes: int) -> int:
    """The two tensors of `long_conv` by transpose, its gated input and its output. The backward sends the same number."""
    there = to_channels_bytes(bounds, rank, channels, element_bytes)
    back = to_tokens_bytes(bounds, rank, channels, element_bytes)
    return there + back


@lru_cache(maxsize=64)
def _smooth(limit: int) -> tuple[int, ...]:
    """2^a 3^b 5^c below twice the limit, ascending."""
    found = [1]
    for factor in (2, 3, 5):
        for n in found:  # grows while it is read
            if n * factor < 2 * limit:
                found.append(n * factor)
    return tuple(sorted(found))


@lru_cache(maxsize=256)
def four_step_sizes(length: int, num_ranks: int) -> tuple[int, int]:
    """(N1, N2) of the matrix n = n1 N2 + n2 that holds `length` values: 5-smooth, N1 even, least work at the busiest rank.

    That rank transforms ceil(N2 / P) columns of N1 values, and ceil((N1 / 2 + 1) / P) rows of N2.
    """
    numbers = _smooth(max(2, 4 * (isqrt(max(1, length)) + num_ranks)))

    def work(sizes: tuple[int, int]) -> tuple[int, int]:
        n1, n2 = sizes
        return -(-n2 // num_ranks) * n1 + 2 * -(-(n1 // 2 + 1) // num_ranks) * n2, n1 * n2

    pairs = []
    for n1 in numbers:
        n2 = next((n for n in numbers if n * n1 >= length), None)
        if n1 % 2 == 0 and n2 is not None:
            pairs.append((n1, n2))
    return min(pairs, key=work)


@dataclass(frozen=True)
class FourStep:
    """The layout of one long convolution by the four-step transform over ranks."""

    bounds: tuple[int, ...]
    taps: int
    """As many as reach an output."""
    shift: int
    """Inputs before the first token, which every rank has."""

    @classmethod
    def of(cls, bounds: Sequence[int], taps: int, has_state: bool) -> "FourStep":
        """With a state all taps reach an output, and stand before the first token; the first L - 1 outputs may wrap."""
        return cls(tuple(bounds), taps, taps - 1) if has_state else cls(tuple(bounds), min(taps, bounds[-1]), 0)

    @property
    def ranks(self) -> int:
        return len(self.bounds) - 1

    @property
    def sizes(self) -> tuple[int, int]:
        """(N1, N2)."""
        return four_step_sizes(self.bounds[-1] + self.taps - 1, self.ranks)

    @property
    def columns(self) -> list[int]:
        """Columns n2 of each rank."""
        return split_sizes(self.sizes[1], self.ranks)

    @property
    def rows(self) -> list[int]:
        """Rows k1 = 0 .. N1/2 of each rank: the others are their conjugates."""
        return split_sizes(self.sizes[0] // 2 + 1, self.ranks)

    def before(self, position: int, rank: int) -> int:
        """Positions below this one that lie in the rank's columns."""
        width = self.sizes[1]
        whole, rest = divmod(position, width)
        start, stop = split_span(width, self.ranks, rank)
        return whole * (stop - start) + min(max(rest - start, 0), stop - start)

    def tokens(self, holder: int, rank: int) -> int:
        """Tokens of the holder's part that lie in the rank's columns."""
        first, last = (self.bounds[i] + self.shift for i in (holder, holder + 1))
        return self.before(last, rank) - self.before(first, rank)

    def _sends(self, rank: int, back: bool) -> tuple[int, int]:
        """Real numbers of tokens and complex ones of the spectrum that leave a rank: to columns and rows, or back."""
        (n1, n2), own = self.sizes, self.tokens(rank, rank)
        columns, rows = (split_size(n, self.ranks, rank) for n in (n2, n1 // 2 + 1))
        if back:
            first, last = (position + self.shift for position in (self.bounds[0], self.bounds[-1]))
            return self.before(last, rank) - self.before(first, rank) - own, rows * (n2 - columns)
        return self.bounds[rank + 1] - self.bounds[rank] - own, columns * (n1 // 2 + 1 - rows)

    def sent_bytes(
        self, rank: int, channels: int, filters: int, element_bytes: int, real_bytes: int, *, backward: bool = False
    ) -> int:
        """Forward, or backward with the gradient of the filter. real_bytes: of one number of the arithmetic, 4 or 8.

        channels: B * D; filters: D, G or B * D of them (0 for a backward without their gradient); element_bytes: of one input.
        """
        if channels * self.bounds[-1] == 0:
            return 0
        (tokens, spectrum), (tokens_back, spectrum_back) = self._sends(rank, False), self._sends(rank, True)
        total = channels * (spectrum + spectrum_back) * 2 * real_bytes
        if backward:
            total += filters * spectrum_back * 2 * real_bytes
            return total + channels * (tokens * real_bytes + tokens_back * element_bytes)
        total += filters * spectrum * 2 * real_bytes
        return total + channels * (tokens * element_bytes + tokens_back * real_bytes)


def long_conv_seconds(
    algorithm: Literal["transpose", "fft"],
    bounds: Sequence[int],
    taps: int,
    channels: int,
    batch: int = 1,
    element_bytes: int = 4,
    device: str = "cuda",
    link: Link = ACROSS_NODES,
) -> float:
    """Modelled time of the forward at the busiest rank: two exchanges and its channels, or five and its share of them all."""
    P, total = len(bounds) - 1, bounds[-1]
    memory = MEMORY_BYTES_PER_SECOND.get(device, 1e10)
    if algorithm == "transpose":
        most = max(long_conv_bytes(bounds, r, channels, batch * element_bytes) for r in range(P))
        passes = FFT_BYTES * total * batch * -(-channels // P)
        return 2 * link.latency_seconds + most / link.bytes_per_second + passes / memory
    layout, real = FourStep.of(bounds, taps, False), max(4, element_bytes)
    most = max(layout.sent_bytes(r, batch * channels, channels, element_bytes, real) for r in range(P))
    return (
        5 * link.latency_seconds
        + most / link.bytes_per_second
        + FOUR_STEP_BYTES * total * batch * channels / P / memory
    )


def long_conv_algorithm(
    bounds: Sequence[int],
    taps: int,
    channels: int | None = None,
    batch: int = 1,
    element_bytes: int = 4,
    device: str = "cuda",
    link: Link = ACROSS_NODES,
) -> LongConvAlgorithm:
    """halo if taps - 1 positions are fewer bytes than the two tensors of which (P - 1) / P leave each rank; else transpose.

    But with fewer channels than ranks, transpose leaves P - channels ranks idle: then the shorter modelled time of transpose
    and fft. From shapes that all ranks share. channels None: as many as ranks, or more.
    """
    P, total = len(bounds) - 1, bounds[-1]
    if (taps - 1) * P * P < 2 * (P - 1) * total:
        return "halo"
    if channels is None or channels >= P or channels == 0 or total == 0:
        return "transpose"
    shape = (bounds, taps, channels, batch, element_bytes, device, link)
    return "fft" if long_conv_seconds("fft", *shape) < long_conv_seconds("transpose", *shape) else "transpose"


def long_conv_groups(
    bounds: Sequence[int], channels: int, batch: int, element_bytes: int, node_size: int | None = None
) -> int:
    """Channel groups of `long_conv` by transpose. With n of them all but the n-th part of the exchange can be hidden.

    Each group costs the calls of one more convolution: n minimises 2 exchange / n + n GROUP_SECONDS. From the mean rank, for
    all must agree; no more than a rank has channels.
    """
    P = len(bounds) - 1
    link = WITHIN_NODE if node_size is not None and node_size >= P else ACROSS_NODES
    exchange = link.seconds(batch * channels * element_bytes * (bounds[-1] // P) * (P - 1) / P)
    return max(1, min(channels // P, MOST_GROUPS, int((2 * exchange / GROUP_SECONDS) ** 0.5)))
