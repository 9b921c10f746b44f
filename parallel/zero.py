"""DeepSpeed ZeRO on a mesh: the mesh's groups as the `mpu` object that DeepSpeed asks, and the scale of the loss.

ZeRO cuts optimiser state (stage 1), gradients (2) and parameters (3) over the ranks that hold partial sums of the same
gradients. Where sequences are split too, these are all ranks. DeepSpeed divides the sum of gradients by the number of
ranks; a loss that is (sum of nats) / (tokens over all ranks) is multiplied by it first.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqengine.kernels.checks import check
from seqengine.parallel.mesh import Mesh

REFUSED = ("mics_shard_size", "zero_hpz_partition_size")
"""Options of zero_optimization that cut over fewer ranks than all: their groups know nothing of the mesh."""


class ParallelUnit:
    """What DeepSpeed asks of an `mpu`, answered by a mesh of several ranks. Every rank must make one.

    The "data-parallel group", over which ZeRO cuts and sums, is every rank; the "data-parallel size" is the number of replicas,
    which read different samples: batch sizes and DeepSpeed's samplers count these. There is no get_sequence_parallel_world_size
    because DeepSpeed (0.19) multiplies gradients by it in stages 1 and 2, but in stage 3 only without reduce_scatter.
    """

    def __init__(self, mesh: Mesh) -> None:
        check("ParallelUnit", mesh.world is not None, "the mesh must have several ranks", mesh.size)
        self._mesh = mesh
        self._alone: dist.ProcessGroup = dist.new_group([mesh.rank], use_local_synchronization=True)

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.world

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(range(self._mesh.size))

    def get_data_parallel_rank(self) -> int:
        return self._mesh.replica

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.num_replicas

    def get_sequence_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.sequence or self._alone

    def get_sequence_parallel_rank(self) -> int:
        return self._mesh.sequence_rank

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._mesh.world

    def get_sequence_data_parallel_rank(self) -> int:
        return self._mesh.rank

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._mesh.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """This rank alone: no matrix is cut."""
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def initialize_zero(
    model: nn.Module,
    mesh: Mesh,
    config: Mapping[str, Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Any:
    """DeepSpeed's engine around the model, ZeRO cutting over every rank of the mesh.

    config:    DeepSpeed's own, with zero_optimization.stage 1, 2 or 3. Micro-batches are rows of a replica, whole windows.
    optimizer: the caller's (the config then says "zero_allow_untested_optimizer" for one that DeepSpeed does not know), or None
               for the one that the config names, over `parameters` or all.
    Use:       engine(...) is the forward, `backward(engine, loss, mesh)` the backward, engine.step() the update.
    Dtypes:    float32, bfloat16 or float16 as DeepSpeed has them; float64 parameters are refused. Gradients are summed in
               float32 unless the config has another "communication_data_type".
    Order:     every rank must call, after the processes have joined. DeepSpeed itself reads LOCAL_RANK from the environment,
               and keeps the mpu of the newest engine for the whole process: one mesh a process.
    Raises:    ValueError, before any message, for a mesh of one rank or of several sharded copies, for another stage, and for
               options that cut over other groups; ImportError where DeepSpeed is not installed.
    References: Rajbhandari et al., ZeRO (arXiv 1910.02054).
    """
    name, zero = "initialize_zero", dict(config.get("zero_optimization", {}))
    check(name, mesh.world is not None, "the mesh must have several ranks", mesh.size)
    whole = mesh.num_shards in (1, mesh.num_replicas)
    check(
        name,
        whole,
        "ZeRO cuts over all ranks: the mesh must not have several sharded copies; num_copies",
        mesh.num_copies,
    )
    check(name, zero.get("stage") in (1, 2, 3), "zero_optimization.stage must be 1, 2 or 3", zero.get("stage"))
    used = [key for key in REFUSED if zero.get(key, 1) > 1]
    check(name, not used, "zero_optimization must cut over all ranks, without these options", used)
    doubles = [n for n, p in model.named_parameters() if p.dtype == torch.float64]
    check(name, not doubles, "parameters must not be float64", doubles[:3])
    try:
        import deepspeed  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(f"{name}: DeepSpeed must be installed: pip install 'seqengine-train[deepspeed]'.") from error
    engine, *_ = deepspeed.initialize(
        model=model,
        config={"communication_data_type": "fp32", **config},
        optimizer=optimizer,
        model_parameters=None if parameters is None else list(parameters),
        mpu=ParallelUnit(mesh),
        dist_init_required=False,
    )
    return engine


def backward(engine: Any, loss: Tensor, mesh: Mesh) -> None:
    """Backward of (sum of nats of some windows) / (tokens of the step, over all ranks), so that gradients become those of one
    process.

    Any number of calls before engine.step(), gradient_accumulation_steps in all; nothing is averaged over them.
    """
    engine.backward(loss * mesh.size, scale_wrt_gas=False)
