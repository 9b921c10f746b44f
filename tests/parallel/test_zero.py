"""DeepSpeed ZeRO 1, 2 and 3 over split sequences: the same training as one process, in float32."""

import importlib.util
import logging
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from seqengine.parallel.mesh import Mesh
from seqengine.parallel.zero import ParallelUnit, backward, initialize_zero
from tests.parallel.hybrid import WINDOWS, hybrid, part_of, train, windows
from tests.ranks import run_ranks
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("deepspeed_imported")
CPU, STEPS = torch.device("cpu"), 4
has_deepspeed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="DeepSpeed is not installed: pip install deepspeed")


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def norm_of(model):
    return torch.stack([p.grad.norm() for p in model.parameters()]).norm()


def config(stage, mesh, accumulation=1, **more):
    rows = WINDOWS // mesh.num_replicas // accumulation
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **more},
    }


def trained_by_zero(mesh, stage, accumulation, more):
    import deepspeed

    model = hybrid(torch.float32)
    engine = initialize_zero(
        model, mesh, config(stage, mesh, accumulation, **more), optimizer=momentum(model.parameters())
    )
    losses, norms = [], []
    for step in range(STEPS):
        ids, labels, ctx = part_of(mesh, *windows(step))
        total, nats = mesh.count_tokens(labels), 0.0
        for some_ids, some_labels in zip(ids.chunk(accumulation), labels.chunk(accumulation), strict=True):
            some, _ = engine(some_ids, some_labels, ctx)
            backward(engine, some / total, mesh)
            nats += float(some.detach())
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        losses.append(mesh.sum(nats / mesh.sequence_size)[0] / int(total))
    found = {}
    for name, parameter in model.named_parameters():
        if stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            found[name] = parameter.detach().clone()
    return losses, norms, found


def _train(group, shape, cases):
    os.environ["LOCAL_RANK"] = str(group.rank())
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")  # DeepSpeed's own, about torch's names and schedulers
    import deepspeed

    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles one, and a killed run leaves a lock
    mesh = Mesh.create(*shape, CPU)
    return [trained_by_zero(mesh, *case) for case in cases]


CASES = [(1, 1, {}), (2, 2, {}), (3, 1, {}), (3, 2, {"reduce_scatter": False})]
"""(stage, micro-batches a step, other options of zero_optimization)."""


@needs_deepspeed
@pytest.mark.parametrize("shape", [(1, 2), (2, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_stage_trains_like_one_process(shape):
    expected = train(
        hybrid(torch.float32), Mesh.single(CPU), STEPS, reduce=lambda m: None, norm_of=norm_of, optimizer=momentum
    )
    for rank, runs in enumerate(run_ranks(shape[0] * shape[1], _train, shape, CASES)):
        for case, (losses, norms, parameters) in zip(CASES, runs, strict=True):
            what = f"rank {rank} of {shape}, stage and micro-batches {case}"
            assert_close(torch.tensor(losses), torch.tensor(expected.losses), f"{what}: losses", 1e-5)
            assert_close(torch.tensor(norms), torch.tensor(expected.norms), f"{what}: gradient norms", 1e-5)
            for name, parameter in expected.parameters.items():
                assert_close(parameters[name], parameter, f"{what}: {name}")


def _unit(group):
    mesh = Mesh.create(2, 2, CPU)
    unit = ParallelUnit(mesh)
    names = [n.removeprefix("get_") for n in dir(unit) if n.startswith("get_") and not n.endswith("_ranks")]
    found = {name: getattr(unit, f"get_{name}")() for name in names}
    return {n: dist.get_process_group_ranks(g) if n.endswith("group") else g for n, g in found.items()}


def test_the_unit_gives_all_ranks_for_gradients_and_replicas_for_samples():
    for rank, found in enumerate(run_ranks(4, _unit)):
        assert found == {
            "data_parallel_group": [0, 1, 2, 3],
            "data_parallel_rank": rank // 2,
            "data_parallel_world_size": 2,
            "sequence_parallel_group": [rank // 2 * 2, rank // 2 * 2 + 1],
            "sequence_parallel_rank": rank % 2,
            "sequence_data_parallel_group": [0, 1, 2, 3],
            "sequence_data_parallel_rank": rank,
            "sequence_data_parallel_world_size": 4,
            "model_parallel_group": [rank],
            "model_parallel_rank": 0,
            "model_parallel_world_size": 1,
            "tensor_model_parallel_group": [rank],
            "tensor_model_parallel_rank": 0,
            "tensor_model_parallel_world_size": 1,
        }


def some_mesh(**more):
    """A mesh of four ranks without processes: what is refused is refused before any message."""
    return Mesh(0, 4, 0, 4, SimpleNamespace(), None, CPU, **more)


@pytest.mark.parametrize(
    ("mesh", "zero", "dtype", "match"),
    [
        (Mesh.single(CPU), {"stage": 1}, torch.float32, "must have several ranks; got 1"),
        (some_mesh(num_shards=2), {"stage": 1}, torch.float32, "several sharded copies; num_copies; got 2"),
        (some_mesh(), {"stage": 0}, torch.float32, "stage must be 1, 2 or 3; got 0"),
        (some_mesh(), {}, torch.float32, "stage must be 1, 2 or 3; got None"),
        (some_mesh(), {"stage": 3, "zero_hpz_partition_size": 2}, torch.float32, "zero_hpz_partition_size"),
        (some_mesh(), {"stage": 3, "mics_shard_size": 2}, torch.float32, "mics_shard_size"),
        (some_mesh(), {"stage": 3}, torch.float64, "must not be float64"),
    ],
)
def test_what_zero_on_a_mesh_cannot_do_is_refused(mesh, zero, dtype, match):
    with pytest.raises(ValueError, match=match):
        initialize_zero(hybrid(dtype), mesh, {"zero_optimization": zero})


@pytest.mark.skipif(has_deepspeed, reason="DeepSpeed is installed")
def test_without_deepspeed_the_error_says_what_to_install():
    with pytest.raises(ImportError, match=r"seqengine-train\[deepspeed\]"):
        initialize_zero(hybrid(torch.float32), some_mesh(), {"zero_optimization": {"stage": 1}})
