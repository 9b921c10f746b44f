"""The exact merge of attention over two disjoint sets of keys, by their log-sum-exps.

    lse = log(e^a + e^b)      out = e^(a - lse) out_a + e^(b - lse) out_b

Weights are made from exp(a - max(a, b)) and exp(b - max(a, b)), neither above 1; the maximum drops out of the derivative.
So nothing overflows, and -inf (a set without keys) has the weight 0 and finite gradients, on both sides too.
"""

import math

import torch
from torch import Tensor

from seqengine.kernels.checks import check, check_floats, check_shape


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from the attention over each.

    Shapes:   out_a, out_b [B, T, H, V]; lse_a, lse_b [B, H, T]. Returns (out [B, T, H, V], lse [B, H, T]).
    Dtypes:   float64, float32, bfloat16 or float16; float32 arithmetic below float64. out and lse each have the wider dtype
              of their two parts, so that a float32 sum of many bfloat16 parts stays float32.
    Memory:   elementwise; saves the two outputs and the weights [B, T, H].
    Exact to: attention over the joined keys within 1e-12 relative in float64; associative and commutative to rounding.
    Empty:    lse = -inf says that a set has no key: the other part comes back. Both: out = 0, lse = -inf. Gradients are finite.
    Raises:   ValueError if shapes, dtypes or devices do not fit.
    References: Milakov and Gimelshein 2018, arXiv:1805.02867; Liu et al. 2023, arXiv:2310.01889.
    """
    name = "merge_attention"
    check(name, out_a.ndim == 4, "out_a must be [B, T, H, V]", out_a.shape)
    B, T, H, _ = out_a.shape
    check_shape(name, "out_b", out_b, "[B, T, H, V]", *out_a.shape)
    check_shape(name, "lse_a", lse_a, "[B, H, T]", B, H, T)
    check_shape(name, "lse_b", lse_b, "[B, H, T]", B, H, T)
    check_floats(name, out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    double = torch.float64 in (out_a.dtype, out_b.dtype, lse_a.dtype, lse_b.dtype)
    dtype = torch.float64 if double else torch.float32
    a, b = lse_a.to(dtype), lse_b.to(dtype)
    top = torch.maximum(a, b).detach()
    empty = top == -math.inf
    top = top.masked_fill(empty, 0)
    w_a, w_b = torch.exp(a - top), torch.exp(b - top)
    total = (w_a + w_b).masked_fill(empty, 1)
    lse = (top + torch.log(total)).masked_fill(empty, -math.inf)
    w_a, w_b = ((w / total).transpose(1, 2)[..., None] for w in (w_a, w_b))
    out = w_a * out_a + w_b * out_b
    out_dtype = torch.promote_types(out_a.dtype, out_b.dtype)
    return out.to(out_dtype), lse.to(torch.promote_types(lse_a.dtype, lse_b.dtype))
