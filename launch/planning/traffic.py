"""What data parallelism sends, by formula, and over which links: gradients and weights, from sizes alone.

All-reduce: 2 (W - 1) / W of its bytes leave a rank, as in a ring; gather and reduce-scatter: (W - 1) / W (Patarasuk and Yuan
2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"). FSDP2 (Zhao et al. 2023, arXiv:2304.11277): a
block is gathered for its forward and for its backward, in every micro-batch; what is in no block once. Gradients are reduced
once a step, with the last micro-batch. ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): stages 1 and 2 reduce gradients to
their owners and gather the new weights; stage 3 is as FSDP2, but reduces in every micro-batch.
"""

from dataclasses import dataclass, replace
from typing import Literal

from seqengine.launch.planning.exchanges import Sent
from seqengine.launch.planning.rates import Machine

Backend = Literal["none", "ddp", "fsdp2", "deepspeed"]


@dataclass(frozen=True)
class Layout:
    """A mesh and what of a run depends on how it is spread."""

    replicate: int
    shard: int
    sequence: int
    backend: Backend
    zero: int | None
    checkpoint: Literal["none", "selective", "block"]
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.sequence

    @property
    def groups(self) -> int:
        """Groups of ranks that read different windows."""
        return self.replicate * self.shard

    @property
    def part(self) -> int:
        """Ranks over which one copy of the weights is cut, where it is."""
        return self.shard * self.sequence

    @property
    def name(self) -> str:
        return f"deepspeed {self.zero}" if self.backend == "deepspeed" else self.backend

    def __str__(self) -> str:
        return f"{self.replicate} x {self.shard} x {self.sequence}"


@dataclass(frozen=True)
class Flow:
    """Bytes that a rank sends in one step by one exchange, and what they take."""

    exchange: str
    within: int
    """Bytes within a node."""
    across: int
    """Bytes between nodes."""
    seconds: float
    hides: bool
    """Whether it goes on while the backward (or the forward) computes."""

    @property
    def total(self) -> int:
        return self.within + self.across


@dataclass(frozen=True)
class Weights:
    """Bytes of the parameters."""

    blocks: int
    rest: int
    """In no block: embedding, last norm, head."""
    largest_block: int
    num_blocks: int

    @property
    def total(self) -> int:
        return self.blocks + self.rest


def all_reduce(num_bytes: int, ranks: int) -> int:
    return 2 * (ranks - 1) * num_bytes // ranks


def gather(num_bytes: int, ranks: int) -> int:
    """Also a reduce-scatter."""
    return (ranks - 1) * num_bytes // ranks


def _flow(exchange: str, sent: int, ranks: int, stride: int, calls: int, layout: Layout, machine: Machine) -> Flow:
    """Of a ring of ranks `stride` apart: within a node if all of it is there; else its slowest link is between nodes."""
    is_within = ranks * stride <= layout.ranks_per_node
    link = machine.within if is_within else machine.across
    rounds = max(1, (ranks - 1).bit_length())
    seconds = calls * rounds * link.latency_seconds + sent / link.bytes_per_second
    return Flow(exchange, sent if is_within else 0, 0 if is_within else sent, seconds, hides=True)


def data_flows(weights: Weights, layout: Layout, micro_batches: int, machine: Machine) -> list[Flow]:
    """Gradients and weights, of one step."""
    if layout.ranks == 1:
        return []
    part, calls = layout.part, weights.num_blocks + 1
    if layout.backend in ("none", "ddp"):
        sent = all_reduce(weights.total, layout.ranks)
        flow = _flow("gradient all-reduce", sent, layout.ranks, 1, 1, layout, machine)
        return [replace(flow, hides=layout.backend == "ddp")]
    if layout.backend == "deepspeed" and layout.zero != 3:
        sent = gather(weights.total, part)
        reduced = _flow("ZeRO reductions", sent, part, 1, 1, layout, machine)
        gathered = _flow("ZeRO gathers", sent, part, 1, 1, layout, machine)
        return [reduced, replace(gathered, hides=False)]
    found = []
    name = "FSDP" if layout.backend == "fsdp2" else "ZeRO"
    if part > 1:
        gathered_bytes = micro_batches * (2 * gather(weights.blocks, part) + gather(weights.rest, part))
        turns = 1 if layout.backend == "fsdp2" else micro_batches
        reduced_bytes = turns * (gather(weights.blocks, part) + gather(weights.rest, part))
        found.append(_flow(f"{name} gathers", gathered_bytes, part, 1, 2 * micro_batches * calls, layout, machine))
        found.append(_flow(f"{name} reductions", reduced_bytes, part, 1, turns * calls, layout, machine))
    if layout.replicate > 1:
        sent = all_reduce(weights.total // part, layout.replicate)
        found.append(_flow("gradient all-reduce", sent, layout.replicate, part, calls, layout, machine))
    return found


def sequence_flows(sent: list[Sent], layout: Layout, micro_batches: int, machine: Machine) -> list[Flow]:
    """The exchanges of mixers, of one step; what goes to all goes in equal parts to ranks of this node and of others."""
    ranks, here = layout.sequence, min(layout.sequence, layout.ranks_per_node)
    found: dict[str, Flow] = {}
    for each in sent:
        total, rounds = micro_batches * (each.forward + each.backward), 2 * micro_batches * each.rounds
        inside = total if here == ranks else 0
        if each.to_all and 1 < here < ranks:
            inside = total * (here - 1) // (ranks - 1)
        slow = machine.within if here == ranks else machine.across
        seconds = rounds * slow.latency_seconds
        seconds += inside / machine.within.bytes_per_second + (total - inside) / machine.across.bytes_per_second
        old = found.get(each.exchange, Flow(each.exchange, 0, 0, 0.0, hides=False))
        found[each.exchange] = replace(
            old, within=old.within + inside, across=old.across + total - inside, seconds=old.seconds + seconds
        )
    return list(found.values())
