"""Bytes that a rank sends, as integers from the layout alone. Tests hold the ledger to them."""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Link:
    """What a message of n bytes takes: latency_seconds + n / bytes_per_second."""

    latency_seconds: float
    bytes_per_second: float

    def seconds(self, num_bytes: float) -> float:
        return self.latency_seconds + num_bytes / self.bytes_per_second


WITHIN_NODE = Link(8e-6, 300e9)
"""Assumed for NVLink: what a program sees, not the data sheet."""
ACROSS_NODES = Link(20e-6, 45e9)
"""Assumed for one 400 Gbit/s adapter a rank."""


def node_edges(num_ranks: int, node_size: int, reverse: bool = False) -> list[int]:
    """Boundaries of nodes of consecutive ranks, the last one maybe smaller; reverse: counted from the last rank."""
    edges = [*range(0, num_ranks, node_size), num_ranks]
    return [num_ranks - e for e in reversed(edges)] if reverse else edges


def _log_scan_sends(size: int, index: int) -> tuple[int, int]:
    """Messages of element `index` of an exclusive log-depth scan, and how many of them bring a transition.

    The shift by one, then strides of 1, 2, 4, ..; a prefix that begins with the first element is a state and nothing else.
    """
    sends, with_transition = int(index + 1 < size), int(0 < index < size - 1)
    stride = 1
    while stride < size - 1:
        if index >= 1 and index + stride < size:
            sends += 1
            with_transition += index > stride
        stride *= 2
    return sends, with_transition


def _hierarchical_sends(edges: Sequence[int], position: int) -> tuple[int, int]:
    """Messages of a position, and how many bring a transition: to the later ones of its node, across, back down."""
    node = next(j for j in range(len(edges) - 1) if position < edges[j + 1])
    start, stop = edges[node], edges[node + 1]
    sends = stop - 1 - position
    with_transition = sends if position > 0 else 0
    if position == stop - 1:
        across = _log_scan_sends(len(edges) - 1, node)
        sends, with_transition = across[0] + (stop - start - 1 if node > 0 else 0), across[1]
    return sends, with_transition


def scan_bytes(
    num_ranks: int,
    rank: int,
    algorithm: str,
    state_bytes: int,
    transition_bytes: int = 0,
    *,
    reverse: bool = False,
    output_final: bool = False,
    node_size: int | None = None,
) -> int:
    """Forward of `scan`. state_bytes, transition_bytes: of one rank's summary; a FixedDecay sends no transition."""
    if num_ranks == 1:
        return 0
    position = num_ranks - 1 - rank if reverse else rank
    if algorithm == "gather":
        return (num_ranks - 1) * (state_bytes + transition_bytes)
    if algorithm == "serial":
        sends, with_transition = int(position < num_ranks - 1), 0
    elif algorithm == "log":
        sends, with_transition = _log_scan_sends(num_ranks, position)
    elif algorithm == "hierarchical" and node_size is not None:
        sends, with_transition = _hierarchical_sends(node_edges(num_ranks, node_size, reverse), position)
    else:
        raise ValueError(f"scan_bytes: algorithm must be one that runs; got {algorithm!r}, node_size={node_size}.")
    if output_final and position == num_ranks - 1:
        sends += num_ranks - 1
    return sends * state_bytes + with_transition * transition_bytes


def scan_backward_bytes(
    num_ranks: int,
    rank: int,
    algorithm: str,
    state_bytes: int,
    transition_bytes: int = 0,
    *,
    reverse: bool = False,
    initial_gradient: bool = False,
    node_size: int | None = None,
) -> int:
    """Backward of `scan`: a scan the other way. What `gather` brought of transitions is kept; its backward sends states."""
    return scan_bytes(
        num_ranks,
        rank,
        algorithm,
        state_bytes,
        0 if algorithm == "gather" else transition_bytes,
        reverse=not reverse,
        output_final=initial_gradient,
        node_size=node_size,
    )


def scan_seconds(
    num_ranks: int,
    algorithm: str,
    state_bytes: int,
    transition_bytes: int = 0,
    *,
    output_final: bool = False,
    node_size: int | None = None,
    within: Link = WITHIN_NODE,
    across: Link = ACROSS_NODES,
) -> float:
    """Modelled time of one `scan`, by latency and bandwidth: the longest chain of messages."""
    link = within if node_size is not None and node_size >= num_ranks else across
    both, depth = state_bytes + transition_bytes, (num_ranks - 1).bit_length()
    if algorithm == "gather":
        return depth * link.latency_seconds + (num_ranks - 1) * both / link.bytes_per_second
    last = depth * link.latency_seconds + state_bytes / link.bytes_per_second if output_final else 0.0
    if algorithm == "serial":
        return (num_ranks - 1) * link.seconds(state_bytes) + last
    if algorithm == "log":
        return _log_scan_rounds(num_ranks) * link.seconds(both) + last
    if algorithm == "hierarchical" and node_size is not None:
        nodes, peers = -(-num_ranks // node_size), min(node_size, num_ranks) - 1
        local = within.seconds(peers * both) + within.seconds(peers * state_bytes) if peers else 0.0
        return local + _log_scan_rounds(nodes) * across.seconds(both) + last
    raise ValueError(f"scan_seconds: algorithm must be one that runs; got {algorithm!r}, node_size={node_size}.")


def _log_scan_rounds(size: int) -> int:
    """1 + ceil(log2(size - 1)), and none for one element."""
    return 0 if size == 1 else 1 + (size - 2).bit_length()


def scan_algorithm(
    num_ranks: int,
    state_bytes: int,
    transition_bytes: int = 0,
    *,
    output_final: bool = False,
    node_size: int | None = None,
    within: Link = WITHIN_NODE,
    across: Link = ACROSS_NODES,
) -> str:
    """What `scan` does with algorithm="auto": the shortest modelled time; of equal ones the first in this order.

    gather (one collective, all of which other work can hide), log, hierarchical (only with a node_size that cuts the ranks),
    serial. For small summaries or few ranks that is gather, for more log, and hierarchical where nodes are known.
    """
    candidates = ["gather", "log", "serial"]
    if node_size is not None and 1 < node_size < num_ranks:
        candidates.insert(2, "hierarchical")

    def seconds(algorithm: str) -> float:
        return scan_seconds(
            num_ranks,
            algorithm,
            state_bytes,
            transition_bytes,
            output_final=output_final,
            node_size=node_size,
            within=within,
            across=across,
        )

    return min(candidates, key=seconds)


MEMORY_BYTES_PER_SECOND = {"cpu": 1e10, "cuda": 2.5e12}
GROUP_SECONDS = 2e-4
"""Assumed: what the calls of one more run of a kernel take, whatever its size."""


def modal_conv_groups(
    num_ranks: int, state_bytes: int, shard_bytes: int, device: str, node_size: int | None = None
) -> int:
    """Channel groups of `modal_conv`: 2 where the exchange takes longer than what hiding it costs, else 1.

    Two groups cost another run of the kernel and a copy of y: shard_bytes, read and written. From shapes that all ranks share.
    """
    algorithm = scan_algorithm(num_ranks, state_bytes, node_size=node_size)
    exchange = scan_seconds(num_ranks, algorithm, state_bytes, node_size=node_size)
    copies = 2 * shard_bytes / MEMORY_BYTES_PER_SECOND.get(device, 1e10)
    return 2 if exchange > GROUP_SECONDS + copies else 1
