"""Attention by blocks of queries and keys in plain torch: the scores of one pair of blocks exist at a time.

Forward: a block of keys gives p = softmax(s) over its own keys and l = max s - log max p; then, with those of the blocks
before, lse' = log(e^lse + e^l) and out' = e^(lse - lse') out + e^(l - lse') p v. Backward: softmax(s) e^(l - lse) is p again,
block by block, with the formulas of reference.py. exp stands on one column only: over all scores the fused softmax of torch
is faster, and on a CPU exp alone takes up to 30 times longer where it underflows. What is hidden is the lowest finite number,
whose weight is exactly 0 beside any score.

Blocks of keys that no query of a block sees are never touched (bounds.py). The heads of a group are rows of one matrix
product with the group's keys; so their parts of dk and dv are summed inside the product, and k and v are not repeated.

References: Dao 2023, arXiv:2307.08691; Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seqengine.kernels.attention.bounds import key_intervals
from seqengine.kernels.attention.reference import arithmetic_dtype

ROWS = {"cpu": 128}
"""Rows of a block of scores: queries times the heads of a group. Other devices: 1024."""
KEYS = {"cpu": 1024}
"""Columns of a block of scores. Other devices: 2048."""
ELEMENTS = 1 << 26
"""Scores held at once on a device other than the CPU; on a CPU one block per thread."""


class Heads(NamedTuple):
    """Batches and groups that are worked on together."""

    b: slice
    g: slice
    per_group: int

    def load(self, x: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """[B, T, heads, K] -> [batches * groups, heads of a group * tokens, K]; x has H heads, or G with per_group = 1."""
        M = self.per_group
        part = x[self.b, start:stop, self.g.start * M : self.g.stop * M].to(dtype)
        nb, n, heads, width = part.shape
        return part.view(nb, n, heads // M, M, width).permute(0, 2, 3, 1, 4).reshape(nb * (heads // M), M * n, width)

    def store(self, out: Tensor, start: int, stop: int, rows: Tensor) -> None:
        """The inverse of load, into out[:, start:stop]."""
        M = self.per_group
        target = out[self.b, start:stop, self.g.start * M : self.g.stop * M]
        nb, n, heads, width = target.shape
        target.view(nb, n, heads // M, M, width).copy_(rows.view(nb, heads // M, M, n, width).permute(0, 3, 1, 2, 4))

    def rows_of(self, x: Tensor, start: int, stop: int) -> Tensor:
        """[B, H, T] -> the column [batches * groups, heads of a group * tokens, 1]."""
        part = x[self.b, self.g.start * self.per_group : self.g.stop * self.per_group, start:stop]
        return part.reshape(-1, self.per_group * (stop - start), 1)


class QueryBlock(NamedTuple):
    """Queries [start, stop) see keys in [first, end), and each of them sees all in [all_from, all_to)."""

    start: int
    stop: int
    first: int
    end: int
    all_from: int
    all_to: int


class Walk(NamedTuple):
    """The blocks of one call."""

    queries: list[QueryBlock]
    keys: int
    heads: list[Heads]
    low: Tensor
    high: Tensor

    def key_blocks(self, q: QueryBlock) -> Iterator[tuple[int, int]]:
        """The blocks of keys that some query of q sees."""
        for start in range(q.first, q.end, self.keys):
            yield start, min(start + self.keys, q.end)

    def hide(self, scores: Tensor, q: QueryBlock, start: int, stop: int) -> None:
        """Write the lowest number where a query does not see a key; only the ends of the interval are looked at."""
        lowest = torch.finfo(scores.dtype).min
        n = q.stop - q.start
        block = scores.view(scores.shape[0], -1, n, stop - start)
        if start < q.all_from:
            end = min(stop, q.all_from)
            columns = torch.arange(start, end, device=scores.device)
            block[..., : end - start].masked_fill_(columns < self.low[q.start : q.stop, None], lowest)
        if stop > q.all_to:
            begin = max(start, q.all_to)
            columns = torch.arange(begin, stop, device=scores.device)
            block[..., begin - start :].masked_fill_(columns >= self.high[q.start : q.stop, None], lowest)


def plan(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int | None) -> Walk:
    """Block sizes by device; each block of queries with the interval of keys that it sees."""
    (B, T, H, _), S, G = q.shape, k.shape[1], k.shape[2]
    where, M = q.device.type, H // max(1, G)
    step = max(1, ROWS.get(where, 1024) // max(1, M))
    keys = KEYS.get(where, 2048)
    at_once = torch.get_num_threads() if where == "cpu" else max(1, ELEMENTS // (step * M * keys))
    low, high = key_intervals(T, S, causal, window, cu_seqlens, torch.device("cpu"))
    starts = torch.arange(0, T, step)
    ends = torch.clamp(starts + step, max=T)
    table = torch.stack([starts, ends, low[starts], high[ends - 1], low[ends - 1], high[starts]], dim=1).tolist()
    g_step, b_step = min(G, at_once), max(1, at_once // max(1, G))
    heads = [
        Heads(slice(b, min(b + b_step, B)), slice(g, min(g + g_step, G)), M)
        for b in range(0, B, b_step)
        for g in range(0, G, max(1, g_step))
    ]
    return Walk([QueryBlock(*row) for row in table], keys, heads, low.to(q.device), high.to(q.device))


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out like q with V columns, lse [B, H, T] in the dtype of the arithmetic)."""
    (B, T, H, _), S, dtype = q.shape, k.shape[1], arithmetic_dtype(q)
    out = torch.empty(B, T, H, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=dtype, device=q.device)
    walk = plan(q, k, cu_seqlens, causal, window)
    for heads in walk.heads:
        one = heads._replace(per_group=1)
        b_k, b_v = one.load(k, 0, S, dtype), one.load(v, 0, S, dtype)
        for block in walk.queries:
            b_q = heads.load(q, block.start, block.stop, dtype) * scale
            b_out, b_lse = _query_block(b_q, b_k, b_v, walk, block)
            heads.store(out, block.start, block.stop, b_out)
            target = lse[heads.b, heads.g.start * heads.per_group : heads.g.stop * heads.per_group]
            target[..., block.start : block.stop].copy_(b_lse.view(target.shape[0], target.shape[1], -1))
    return out, lse


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax over the last dimension, its log-sum-exp as a column). The largest weight is 1 / sum e^(s - max)."""
    p = torch.softmax(scores, dim=-1)
    return p, scores.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log_()


def _query_block(b_q: Tensor, b_k: Tensor, b_v: Tensor, walk: Walk, block: QueryBlock) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one block of queries."""
    lse = b_q.new_full((*b_q.shape[:2], 1), -math.inf)
    out = b_q.new_zeros(*b_q.shape[:2], b_v.shape[-1])
    for start, stop in walk.key_blocks(block):
        scores = torch.bmm(b_q, b_k[:, start:stop].mT)
        walk.hide(scores, block, start, stop)
        p, own = _softmax(scores)
        both = torch.logaddexp(lse, own)
        out.mul_((lse - both).exp_()).addcmul_(torch.bmm(p, b_v[:, start:stop]), (own - both).exp_())
        lse = both
    blind = lse <= torch.finfo(lse.dtype).min / 2
    return out.masked_fill_(blind, 0), lse.masked_fill_(blind, -math.inf)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for cotangents of out and of lse. Sums of dk and dv in the dtype of the arithmetic."""
    S, dtype = k.shape[1], arithmetic_dtype(q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    walk = plan(q, k, cu_seqlens, causal, window)
    for heads in walk.heads:
        one = heads._replace(per_group=1)
        b_k, b_v = one.load(k, 0, S, dtype), one.load(v, 0, S, dtype)
        b_dk, b_dv = torch.zeros_like(b_k), torch.zeros_like(b_v)
        for block in walk.queries:
            t0, t1 = block.start, block.stop
            b_q, b_do = heads.load(q, t0, t1, dtype) * scale, heads.load(dout, t0, t1, dtype)
            b_lse = heads.rows_of(lse, t0, t1)
            blind = b_lse == -math.inf
            delta = (b_do * heads.load(out, t0, t1, dtype)).sum(dim=-1, keepdim=True)
            if dlse is not None:
                delta = delta - heads.rows_of(dlse, t0, t1)
            delta, b_lse = delta.masked_fill(blind, 0), b_lse.masked_fill(blind, math.inf)
            b_dq = torch.zeros_like(b_q)
            for start, stop in walk.key_blocks(block):
                scores = torch.bmm(b_q, b_k[:, start:stop].mT)
                walk.hide(scores, block, start, stop)
                p, own = _softmax(scores)
                p.mul_((own - b_lse).exp_())
                b_dv[:, start:stop].baddbmm_(p.mT, b_do)
                ds = torch.bmm(b_do, b_v[:, start:stop].mT, out=scores).sub_(delta).mul_(p)
                b_dq.baddbmm_(ds, b_k[:, start:stop])
                b_dk[:, start:stop].baddbmm_(ds.mT, b_q)
            heads.store(dq, t0, t1, b_dq.mul_(scale))
        one.store(dk, 0, S, b_dk)
        one.store(dv, 0, S, b_dv)
    return dq, dk, dv
