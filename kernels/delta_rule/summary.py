"""What a stretch of tokens does to the state, whatever the state is: the map that sequence parallelism composes.

Every step of the delta rule is affine in the state, so a whole stretch is S_out = A S_in + b, and (A1, b1) then (A2, b2) is
(A2 A1, A2 b1 + b2). Column by column of the state the rule is the same, so one run without queries gives both: it starts from
[0 | I] with the values [v | 0], and ends in [b | A].
"""

import torch
from torch import Tensor

from seqengine.kernels.delta_rule import ops
from seqengine.kernels.delta_rule.op import check_tokens
from seqengine.kernels.linear_attention.chunked import compute_dtype


def delta_summary(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(A, b) such that delta_rule takes every initial state S to the final state A S + b.

    Shapes:   k [B, T, H, K]; v [B, T, H, V]; beta, g [B, T, H]; A [B, H, K, K], b [B, H, K, V]. Without a token A is the
              identity and b is 0.
    Dtypes:   as in delta_rule; A and b in the dtype of its state.
    Memory:   saves the arguments, [v | 0], and [b | A] before each segment of at least 16 chunks.
    Exact to: A S + b is delta_rule's final state within 1e-12 relative in float64, every gradient included. A is, chunk by
              chunk, the decay times what is left of the identity: where keys and strengths leave 1e-5, five digits are lost.
    Raises:   ValueError if shapes, dtypes or devices do not fit.
    References: Yang et al. 2024, arXiv:2406.06484.
    """
    name = "delta_summary"
    check_tokens(name, k, v, beta, g)
    dtype = compute_dtype(k, v, beta, g)
    B, _, H, K = k.shape
    V = v.shape[3]
    one = torch.eye(K, dtype=dtype, device=k.device).expand(B, H, K, K)
    if k.numel() == 0:
        nothing = sum((x.sum() * 0).to(dtype) for x in (k, v, beta, g) if x is not None)
        return one + nothing, one.new_zeros(B, H, K, V) + nothing
    values = torch.cat([v.to(dtype), v.new_zeros(*v.shape[:3], K, dtype=dtype)], dim=-1)
    before = torch.cat([one.new_zeros(B, H, K, V), one], dim=-1)
    _, after, _ = ops.delta_rule(None, k, values, beta, g, 1.0, before, None)
    return after[..., V:], after[..., :V]
