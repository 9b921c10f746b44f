"""Bytes that a rank sends, as integers from the layout alone. Tests hold the ledger to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from seqengine.parallel.layout import Intervals, common_rows, halo_sources, halo_targets


def halo_bytes(
    bounds: Sequence[int], rank: int, left: int, row_bytes: int, documents: Sequence[int] | None = None
) -> int:
    """Forward of `halo`: the positions that later ranks need of this one. row_bytes: all elements of one position."""
    return sum((stop - start) * row_bytes for _, start, stop in halo_targets(bounds, rank, left, documents))


def halo_backward_bytes(
    bounds: Sequence[int], rank: int, left: int, row_bytes: int, documents: Sequence[int] | None = None
) -> int:
    """Backward of `halo`: the gradients of what was received."""
    return sum((stop - start) * row_bytes for _, start, stop in halo_sources(bounds, rank, left, documents))


def relayout_bytes(source: Sequence[Intervals], target: Sequence[Intervals], rank: int, row_bytes: int) -> int:
    """`relayout` from one context's `parts` to another's; its backward is the way back. row_bytes: all elements of a token."""
    tokens = sum(
        rows[1] - rows[0]
        for other, held in enumerate(target)
        if other != rank
        for rows, _ in common_rows(source[rank], held)
    )
    return tokens * row_bytes


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


def holders(bounds: Sequence[int]) -> list[int]:
    """Ranks that hold tokens, ascending."""
    return [rank for rank in range(len(bounds) - 1) if bounds[rank + 1] > bounds[rank]]


def _pipeline_sends(order: Sequence[int], num_ranks: int, rank: int, spreads: bool) -> int:
    """States that a rank sends along a line of ranks, the last of which may send to all others."""
    if num_ranks == 1 or rank not in order:
        return 0
    if rank != order[-1]:
        return 1
    return num_ranks - 1 if spreads else 0


def pipeline_bytes(bounds: Sequence[int], rank: int, state_bytes: int, *, output_final: bool = False) -> int:
    """Forward of `pipeline`. state_bytes: the state of the whole batch; in how many micro-batches it goes does not matter."""
    return _pipeline_sends(holders(bounds), len(bounds) - 1, rank, output_final) * state_bytes


def pipeline_backward_bytes(
    bounds: Sequence[int], rank: int, state_bytes: int, *, initial_gradient: bool = False
) -> int:
    """Backward of `pipeline`: the way back, and the gradient of the initial state to all if it requires one."""
    return _pipeline_sends(holders(bounds)[::-1], len(bounds) - 1, rank, initial_gradient) * state_bytes


def pipeline_seconds(num_ranks: int, micro_batches: int, step_seconds: float, message_seconds: float = 0.0) -> float:
    """Modelled time of one `pipeline` of equal shards; step_seconds: one micro-batch on one rank."""
    return (num_ranks - 1 + micro_batches) * (step_seconds + message_seconds)


RNN_TOKEN_SECONDS = 6e-5
"""Measured on a CPU, assumed for a GPU: the calls of one token of a recurrent cell, whatever its size."""
RNN_FLOPS_PER_SECOND = {"cpu": 1.5e10, "cuda": 2e13}
"""Measured on one CPU thread, assumed for a GPU: products of a few rows with the recurrent weights."""


def rnn_micro_batches(
    num_ranks: int, batch: int, tokens: int, weights: int, state_bytes: int, device: str, link: Link = ACROSS_NODES
) -> int:
    """Micro-batches of `rnn`: the shortest modelled time, and of equal ones the fewest.

    num_ranks: those with tokens; tokens: of one of them; weights: numbers of the recurrent weights, read once a token whatever
    the number of samples. A small batch is not worth cutting: one token of two samples takes hardly longer than of one.
    """

    def seconds(micro_batches: int) -> float:
        samples = -(-batch // micro_batches)
        read = 4 * weights / MEMORY_BYTES_PER_SECOND.get(device, 1e10)
        products = 2 * weights * samples / RNN_FLOPS_PER_SECOND.get(device, 1.5e10)
        message = link.seconds(state_bytes / micro_batches)
        return pipeline_seconds(num_ranks, micro_batches, tokens * (RNN_TOKEN_SECONDS + max(read, products)), message)

    return min(range(1, max(1, batch) + 1), key=seconds)


def ring_bytes(sizes: Sequence[int], spans: Sequence[tuple[int, int]], index: int, row_bytes: int) -> int:
    """Forward of `ring` at one member of a `Route` with these sizes and spans. row_bytes: one token of all blocks."""
    held = ((index - step) % len(sizes) for step in range(len(sizes)))
    return sum(sizes[source] * row_bytes for step, source in enumerate(held) if step < spans[source][1])


def ring_backward_bytes(
    sizes: Sequence[int],
    spans: Sequence[tuple[int, int]],
    index: int,
    row_bytes: int,
    gradient_row_bytes: int,
    travels: bool = True,
) -> int:
    """Its backward: the blocks once more, if the operator needs them there, and their gradients, on or home."""
    held = list(enumerate((index - step) % len(sizes) for step in range(len(sizes))))
    gradients = sum(sizes[j] * gradient_row_bytes for s, j in held if s > 0 and spans[j][0] <= s <= spans[j][1])
    return gradients + (ring_bytes(sizes, spans, index, row_bytes) if travels else 0)


def gla_bytes(
    bounds: Sequence[int],
    rank: int,
    algorithm: str,
    state_bytes: int,
    transition_bytes: int = 0,
    *,
    output_final: bool = False,
    node_size: int | None = None,
    documents: Sequence[int] | None = None,
) -> int:
    """Forward of `gla` and `simple_gla`: a scan; with documents (cu_seqlens) also the final states of those that end here.

    state_bytes: of one sequence, or B of them without documents. transition_bytes: of its log decays; without documents
    g [H] and None have none to send.
    """
    num_ranks, is_packed = len(bounds) - 1, documents is not None
    sent = scan_bytes(
        num_ranks,
        rank,
        algorithm,
        state_bytes,
        transition_bytes,
        output_final=output_final and not is_packed,
        node_size=node_size,
    )
    ends = sum(bounds[rank] < b <= bounds[rank + 1] for a, b in pairwise(documents or []) if a < b)
    return sent + (ends * (num_ranks - 1) * state_bytes if output_final else 0)


def gla_backward_bytes(
    bounds: Sequence[int],
    rank: int,
    algorithm: str,
    state_bytes: int,
    transition_bytes: int = 0,
    *,
    initial_gradient: bool = False,
    node_size: int | None = None,
    documents: Sequence[int] | None = None,
) -> int:
    """Their backward: a scan the other way; with documents also the initial states' gradients of those that begin here."""
    num_ranks, is_packed = len(bounds) - 1, documents is not None
    sent = scan_backward_bytes(
        num_ranks,
        rank,
        algorithm,
        state_bytes,
        transition_bytes,
        initial_gradient=initial_gradient and not is_packed,
        node_size=node_size,
    )
    starts = sum(bounds[rank] <= a < bounds[rank + 1] for a, b in pairwise(documents or []) if a < b)
    return sent + (starts * (num_ranks - 1) * state_bytes if initial_gradient else 0)
