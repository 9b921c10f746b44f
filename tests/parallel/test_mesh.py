"""The mesh: axes, neighbours, nodes, token counts, and what it refuses before any message."""

import pytest
import torch
import torch.distributed as dist

from seqengine.parallel.mesh import Mesh
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def mesh_of(rank, num_replicas, sequence_size, **more):
    """As `create` makes it, without processes."""
    return Mesh(rank, num_replicas * sequence_size, rank // sequence_size, num_replicas, None, None, CPU, **more)


def test_a_single_process_has_one_rank_on_every_axis():
    mesh = Mesh.single(CPU)
    assert mesh.axes == {"replicate": 1, "shard": 1, "sequence": 1}
    assert mesh.node_size is None
    assert int(mesh.count_tokens(torch.tensor([3, -100, 4, 1]))) == 3


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 4, 2), (4, 1, 2), (1, 1, 8), (3, 1, 1)])
def test_a_rank_is_a_row_major_index_into_replicate_shard_sequence(shape):
    copies, shards, sequence = shape
    for rank in range(copies * shards * sequence):
        mesh = mesh_of(rank, copies * shards, sequence, num_shards=shards)
        assert mesh.axes == {"replicate": copies, "shard": shards, "sequence": sequence}
        assert (mesh.num_copies, mesh.sequence_size) == (copies, sequence)
        assert rank == mesh.replica * sequence + mesh.sequence_rank


@pytest.mark.parametrize(
    ("sequence", "ranks_per_node", "node_size"),
    [(8, None, None), (8, 4, 4), (8, 8, 8), (4, 8, 4), (2, 8, 2), (1, 4, 1)],
)
def test_node_size_is_how_many_neighbours_of_a_sequence_share_a_node(sequence, ranks_per_node, node_size):
    assert mesh_of(0, 16 // sequence, sequence, ranks_per_node=ranks_per_node).node_size == node_size


def _groups(group):
    """What every rank of 2 x 2 x 2 belongs to, sums over it, and what does not fit."""
    mesh = Mesh.create(4, 2, CPU, num_shards=2, ranks_per_node=4)
    grid = mesh.parameter_mesh()
    labels = torch.full((3,), -100)
    labels[: group.rank() % 3] = 1
    refused = []
    for arguments, more in [
        ((3, 2), {}),
        ((4, 2), {"num_shards": 3}),
        ((4, 2), {"num_shards": 0}),
        ((4, 2), {"ranks_per_node": 3}),
        ((4, 2), {"ranks_per_node": 0}),
    ]:
        with pytest.raises(ValueError) as error:
            Mesh.create(*arguments, CPU, **more)
        refused.append(str(error.value))
    return {
        "sequence": dist.get_process_group_ranks(mesh.sequence),
        "shards": dist.get_process_group_ranks(grid.get_group("shard_sequence")),
        "copies": dist.get_process_group_ranks(grid.get_group("replicate")),
        "one copy": Mesh.create(4, 2, CPU, num_shards=4).parameter_mesh().shape,
        "axes": mesh.axes,
        "node_size": mesh.node_size,
        "tokens": int(mesh.count_tokens(labels)),
        "sum": mesh.sum(1.0, float(group.rank())),
        "refused": refused,
    }


def test_groups_of_eight_ranks_and_what_does_not_fit():
    for rank, found in enumerate(run_ranks(8, _groups)):
        assert found["sequence"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert found["shards"] == list(range(rank // 4 * 4, rank // 4 * 4 + 4))
        assert found["copies"] == [rank % 4, rank % 4 + 4]
        assert found["one copy"] == (8,)
        assert found["axes"] == {"replicate": 2, "shard": 2, "sequence": 2}
        assert found["node_size"] == 2
        assert found["tokens"] == sum(r % 3 for r in range(8))
        assert found["sum"] == [8.0, 28.0]
        for text, names in zip(found["refused"], ("3 x 2 != 8", "got 3", "got 0", "got 3", "got 0"), strict=True):
            assert text.startswith("Mesh: ")
            assert names in text


def test_a_sequence_that_straddles_nodes_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 24)
    with pytest.raises(
        ValueError, match="fill whole nodes or lie within one; got 6 ranks of a sequence and 4 of a node"
    ):
        Mesh.create(4, 6, CPU, ranks_per_node=4)
