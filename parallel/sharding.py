"""Parameters sharded over shard x sequence by FSDP2, with whole copies along the replicate axis (HSDP).

Every rank of a mesh holds partial sums of the gradients of all parameters, so the ranks that split a sequence can share its
parameters as those of data parallelism do. The loss of a step is (sum of nats over all ranks) / (tokens over all ranks), the
tokens are counted before the backward, and gradients are summed: the divisor of FSDP2 is one. A mean would weigh tokens by
how few of them their rank has.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from seqengine.parallel import comm
from seqengine.parallel.mesh import Mesh


def fully_shard_model(
    model: nn.Module,
    mesh: Mesh,
    *,
    blocks: Iterable[nn.Module],
    policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    reshard_after_forward: bool = True,
    methods: Iterable[str] = (),
) -> nn.Module:
    """Shard the parameters of a model in place; gradients become sums over all ranks, each rank keeping its part.

    blocks:    modules of the model that are gathered, used and let go one at a time, in the order of their use; what is in none
               of them is gathered with the model itself. A part must be called through the module that holds it.
    policy:    dtypes of gathered parameters and of reduced gradients; None keeps those of the parameters.
    methods:   methods of the model, besides forward, that use parameters: "loss", say.
    Memory:    1 / (shard x sequence) of parameters, gradients and optimiser state, and one whole block.
    Traffic:   per step and copy of P = shard x sequence ranks: two gathers and one reduction of the blocks' parameters, of
               which (P-1)/P is sent each time, and an all-reduce of 1/P over the replicate axis. What is in no block is
               gathered once, as all is with reshard_after_forward=False.
    Gradients: divide the loss by the tokens over all ranks (`Mesh.count_tokens`) and call backward; nothing else is scaled.
               Make the optimiser after this call: parameters are replaced by their shards.
    Order:     every rank must call. In a single process the model stays as it is.
    Raises:    ValueError, before any message, if a block is not part of the model or is given twice.
    References: Zhao et al., PyTorch FSDP (arXiv 2304.11277); Rajbhandari et al., ZeRO (arXiv 1910.02054).
    """
    units = list(blocks)
    parts = {id(module) for module in model.modules()} - {id(model)}
    for unit in units:
        if id(unit) not in parts:
            raise ValueError(
                f"fully_shard_model: blocks must be parts of the model; got {type(unit).__name__}, which is none."
            )
    if len({id(unit) for unit in units}) != len(units):
        raise ValueError(f"fully_shard_model: blocks must be different modules; got one of {len(units)} twice.")
    if mesh.world is None:
        return model
    grid, policy = mesh.parameter_mesh(), policy or MixedPrecisionPolicy()
    for unit in units:
        _shard(unit, grid, policy, offload_policy, reshard_after_forward)
    _shard(
        model, grid, policy, offload_policy, False
    )  # its parameters are used last in the forward, first in the backward
    for method in methods:
        register_fsdp_forward_method(model, method)
    return model


def _shard(
    module: nn.Module,
    grid: DeviceMesh,
    policy: MixedPrecisionPolicy,
    offload_policy: OffloadPolicy | None,
    reshard_after_forward: bool,
) -> None:
    fully_shard(
        module,
        mesh=grid,
        mp_policy=replace(policy, cast_forward_inputs=False),
        offload_policy=offload_policy or OffloadPolicy(),
        reshard_after_forward=reshard_after_forward,
    )
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # else a scaled sum is asked for, which gloo does not have
    if policy.param_dtype is not None and policy.cast_forward_inputs:
        _cast_inputs(module, policy.param_dtype)


def _cast_inputs(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating-point inputs of a unit. FSDP2 would also copy every dataclass among them: a context, and its ledger."""

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    def cast_all(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tree_map_only(Tensor, cast, args), tree_map_only(Tensor, cast, kwargs)

    module.register_forward_pre_hook(cast_all, with_kwargs=True)


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """L2 norm of all gradients, sharded or whole, accumulated in float64; a plain scalar, the same on every rank.

    Traffic: one all-reduce of a number over shard x sequence. Every rank must call.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    whole = _sum_of_squares([g for g in gradients if not isinstance(g, DTensor)])
    if not sharded:
        return whole.sqrt()
    group = sharded[0].device_mesh.get_group("shard_sequence")
    parts = _sum_of_squares([g.to_local() for g in sharded])
    return (comm.all_reduce_sum(parts, group) + whole.to(parts.device)).sqrt()


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    squares = [torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in tensors]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
