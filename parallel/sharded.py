"""Tensors of which a rank holds a part (FSDP2's DTensors), told from plain ones.

Importing torch.distributed.tensor takes half as long as torch itself. Nothing can be a DTensor before somebody has imported it,
so plans, checks and generation, which never shard, do without.
"""

import sys
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(x: object) -> "TypeIs[DTensor]":
    """Whether x is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local_part(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, x itself otherwise. No traffic."""
    return x.to_local() if is_sharded(x) else x
