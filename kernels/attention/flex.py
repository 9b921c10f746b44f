"""FlexAttention for windows and documents: torch generates a kernel that visits only the blocks that the intervals touch.

The block mask is made from the ends of the intervals (bounds.py), a number per pair of blocks, not per pair of tokens. On a
CPU torch runs the definition with all scores, and has no backward.

References: Dong et al. 2024, arXiv:2412.05496.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from seqengine.kernels.attention.bounds import key_intervals

BLOCK = 128


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _first(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks of queries, blocks of keys] -> how many are chosen, and their indices first; both with batch and head 1."""
    order = torch.argsort(chosen.to(torch.int32), dim=1, descending=True, stable=True)
    return chosen.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]


def block_mask(low: Tensor, high: Tensor, T: int, S: int) -> BlockMask:
    """The mask of queries that each see the keys [low, high), where neither end falls as t grows."""
    rows, columns = -(-T // BLOCK), -(-S // BLOCK)
    extra = rows * BLOCK - T  # the last block of queries is filled with its last query
    first, stop = (F.pad(x[None].double(), (0, extra), mode="replicate")[0].long() for x in (low, high))
    first, stop = first.view(rows, BLOCK), stop.view(rows, BLOCK)
    begin = torch.arange(columns, device=low.device) * BLOCK
    end = torch.clamp(begin + BLOCK, max=S)
    touched = (begin < stop[:, -1:]) & (end > first[:, :1])
    whole = (begin >= first[:, -1:]) & (end <= stop[:, :1])

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s >= low[t]) & (s < high[t])

    partial, full = _first(touched & ~whole), _first(whole)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, S))


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, V], lse [B, H, T]); T, S >= 1."""
    T, S = q.shape[1], k.shape[1]
    mask = block_mask(*key_intervals(T, S, causal, window, cu_seqlens, q.device), T, S)
    run: Callable[..., Any] = flex_attention
    if q.device.type != "cpu" and not torch.compiler.is_compiling():
        run = _compiled()
    out, more = run(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=mask,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    return out.transpose(1, 2), more.lse
