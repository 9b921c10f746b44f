"""FSDP2 and HSDP over shard x sequence: the same training as one process, each rank keeping its part of the parameters."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from seqengine.parallel.guard import guard_sequence_mixers
from seqengine.parallel.mesh import Mesh
from seqengine.parallel.recompute import checkpoint
from seqengine.parallel.sharding import fully_shard_model, gradient_norm
from tests.parallel.hybrid import MIXERS, Attention, Gla, LongConv, ShortConv, Slstm, hybrid, train
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CPU = torch.device("cpu")
PLAIN = (ShortConv, LongConv, Gla, Attention)
SHAPES = [(1, 2, 2), (2, 1, 2), (1, 1, 4), (4, 1, 1)]
"""(replicate, shard, sequence) of four ranks."""


def mesh_of(shape):
    copies, shards, sequence = shape
    return Mesh.create(copies * shards, sequence, CPU, num_shards=shards)


def reference(steps, **options):
    mesh = Mesh.single(CPU)
    return run(mesh, steps, **options)[1]


def run(mesh, steps, *, optimizer=None, policy=None, **options):
    model = hybrid(**options)
    assert fully_shard_model(model, mesh, blocks=model.blocks, policy=policy) is model
    return model, train(model, mesh, steps, reduce=lambda m: None, norm_of=gradient_norm, optimizer=optimizer)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def assert_same(actual, expected, tolerance, what):
    for name in ("losses", "norms"):
        assert_close(
            torch.tensor(getattr(actual, name)), torch.tensor(getattr(expected, name)), f"{what}: {name}", tolerance
        )
    for name, parameter in expected.parameters.items():
        assert_close(actual.parameters[name], parameter, f"{what}: {name}", tolerance)


def _four_ranks(group):
    found = {}
    for shape in SHAPES:
        model, history = run(mesh_of(shape), 20 if shape == (1, 2, 2) else 2)
        found[shape] = history, sum(p.to_local().numel() for p in model.parameters())
    single = {"dtype": torch.float32, "optimizer": momentum}
    found["float32"] = run(mesh_of((1, 2, 2)), 4, **single)[1]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found["bfloat16"] = run(mesh_of((1, 2, 2)), 4, policy=policy, mixers=PLAIN, **single)[1]
    return found


def test_sharded_and_replicated_parameters_train_like_one_process():
    whole = sum(p.numel() for p in hybrid().parameters())
    expected = {steps: reference(steps) for steps in (2, 20)}
    single = {"dtype": torch.float32, "optimizer": momentum}
    expected_single, expected_plain = reference(4, **single), reference(4, mixers=PLAIN, **single)
    for rank, found in enumerate(run_ranks(4, _four_ranks)):
        for shape in SHAPES:
            history, kept = found[shape]
            steps = len(history.losses)
            assert_same(history, expected[steps], 1e-10 if steps == 20 else 1e-12, f"rank {rank} of {shape}")
            assert kept < 1.5 * whole / (shape[1] * shape[2]) + 8 * 20  # a few rows that do not divide
        assert_same(found["float32"], expected_single, 1e-5, f"rank {rank} in float32")
        assert_close(torch.tensor(found["bfloat16"].losses), torch.tensor(expected_plain.losses), "bfloat16", 2e-2)


def _two_ranks(group):
    mesh, found = Mesh.create(1, 2, CPU), {}
    for name, (around, mixers) in AROUND.items():
        model = around(hybrid(mixers=mixers))
        guard_sequence_mixers(model, mesh)
        fully_shard_model(model, mesh, blocks=model.blocks)
        found[name] = train(model, mesh, 2, reduce=lambda m: None, norm_of=gradient_norm)
    return found


def _checkpointed(model):
    model.run = lambda block, x, ctx: torch_checkpoint(block, x, ctx, use_reentrant=False)
    return model


def _kept(model):
    model.run = lambda block, x, ctx: checkpoint(block, x, ctx, ctx=ctx)
    return model


def _compiled(model):
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # of dynamo itself
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


AROUND = {
    "nothing": (lambda model: model, MIXERS),
    "torch's checkpoint": (_checkpointed, MIXERS),
    "checkpoint": (_kept, MIXERS),
    "compile": (_compiled, (ShortConv, Gla, Slstm)),
}


def test_checkpointed_or_compiled_blocks_sharded_over_a_split_sequence_train_the_same():
    expected = {mixers: reference(2, mixers=mixers) for _, mixers in AROUND.values()}
    for rank, found in enumerate(run_ranks(2, _two_ranks)):
        for name, (_, mixers) in AROUND.items():
            assert_same(found[name], expected[mixers], 1e-12, f"rank {rank} with {name}")
        assert found["checkpoint"].sent_bytes == found["nothing"].sent_bytes > 0
        assert found["torch's checkpoint"].sent_bytes > found["nothing"].sent_bytes


def test_one_process_has_nothing_to_shard():
    model = hybrid()
    before = list(model.parameters())
    assert fully_shard_model(model, Mesh.single(CPU), blocks=model.blocks) is model
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert float(gradient_norm(model)) == 0.0


def test_blocks_that_do_not_fit_are_refused():
    model = hybrid()
    with pytest.raises(ValueError, match="blocks must be parts of the model; got Linear"):
        fully_shard_model(model, Mesh.single(CPU), blocks=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="blocks must be different modules"):
        fully_shard_model(model, Mesh.single(CPU), blocks=[model.blocks[0], model.blocks[0]])
