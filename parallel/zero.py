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
    if mesh.device.type == "cpu":
        # It would compile an exchange of its own at first use, and wait for ever for a compilation that was killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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


STATES = ("exp_avg", "exp_avg_sq")
"""AdamW's moments."""


def prepare_moments(engine: Any) -> None:
    """Make AdamW's moments, zeros, before the first step, so that a checkpoint can fill them."""
    zero, adam = engine.optimizer, engine.optimizer.optimizer
    for flat in _flat_parts(engine):
        if not adam.state[flat]:
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in STATES}
            adam.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **zeros}
    if engine.zero_optimization_stage() < 3:
        zero._lazy_init_hp_params_optimizer_state()


def _flat_parts(engine: Any) -> list[Tensor]:
    """This rank's parts of the float32 weights, as the optimiser knows them."""
    zero = engine.optimizer
    is_cut = engine.zero_optimization_stage() == 3
    return list(zero.fp32_partitioned_groups_flat if is_cut else zero.single_partition_of_fp32_groups)


def whole_parameter(parameter: nn.Parameter) -> dict[str, Tensor]:
    """{"": the float32 weights, "exp_avg": .., "exp_avg_sq": ..} of one parameter, whole, from every rank's part.

    Traffic: an all-reduce or all-gather of the parameter for each. Every rank must call, in the same order.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # type: ignore[import-not-found, import-untyped, unused-ignore]

    shape = getattr(parameter, "ds_shape", parameter.shape)
    found = {"": safe_get_full_fp32_param(parameter)}
    found |= {key: safe_get_full_optimizer_state(parameter, key) for key in STATES}
    return {key: tensor.detach().view(shape) for key, tensor in found.items()}


@torch.no_grad()
def set_whole_parameter(parameter: nn.Parameter, tensors: Mapping[str, Tensor | None], mesh: Mesh, source: int) -> None:
    """The inverse of `whole_parameter`: rank `source` has the tensors, the others need not. Every rank must call."""
    from deepspeed import zero
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    shape = getattr(parameter, "ds_shape", parameter.shape)
    empty = torch.empty(shape, dtype=torch.float32, device=parameter.device)
    given = {key: mesh.broadcast(empty if x is None else x, source) for key, x in tensors.items()}
    safe_set_full_fp32_param(parameter, given[""])
    for key in STATES:
        safe_set_full_optimizer_state(parameter, given[key], key)
    if hasattr(parameter, "ds_id"):
        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(given[""])
    else:
        parameter.copy_(given[""])


def steps_taken(engine: Any) -> float:
    """Updates that AdamW has made: its own count, for the correction of its moments."""
    return float(engine.optimizer.optimizer.state[_flat_parts(engine)[0]]["step"])


@torch.no_grad()
def set_steps_taken(engine: Any, steps: float) -> None:
    """The inverse of `steps_taken`."""
    for flat in _flat_parts(engine):
        engine.optimizer.optimizer.state[flat]["step"].fill_(steps)
