"""torch's DistributedDataParallel on a mesh: sums of gradients over all ranks, sent while the backward still runs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from seqengine.kernels.checks import check
from seqengine.parallel.mesh import Mesh


def sum_in_buckets(module: nn.Module, mesh: Mesh, *, bucket_mib: int = 25) -> DistributedDataParallel:
    """The module, whose forward's outputs now carry a backward that sums gradients over every rank of the mesh.

    DistributedDataParallel means over ranks; a mean would weigh tokens by how few of them their rank has, so a hook sums.
    bucket_mib: gradients are sent in messages of about so many MiB, the last layers' first.
    Traffic:    an all-reduce of the gradients, in the backward of a forward outside `no_sync()`; weights and buffers of rank 0
                are sent to all once, here.
    Order:      every rank must call, and run the module's forward equally often; every parameter must get a gradient.
    Raises:     ValueError for a mesh of one rank.
    References: Li et al. 2020, PyTorch Distributed, arXiv:2006.15704.
    """
    check("sum_in_buckets", mesh.world is not None, "the mesh must have several ranks", mesh.size)
    wrapped = DistributedDataParallel(
        module, process_group=mesh.world, bucket_cap_mb=bucket_mib, gradient_as_bucket_view=True
    )
    wrapped.require_forward_param_sync = False  # buffers are constants; nothing is sent in the forward
    wrapped.register_comm_hook(mesh.world, _sum)
    return wrapped


def _sum(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[Any] = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])
