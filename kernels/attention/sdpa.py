"""torch's fused attention: all keys, or causal with as many keys as queries.

On a CPU its flash kernel, which also returns the log-sum-exp and takes grouped heads as they are, inside the operator
`seqengine::attention`. On other devices `scaled_dot_product_attention` without its unfused form, which would hold all scores:
it raises RuntimeError where no fused kernel takes the tensors. It has no log-sum-exp and no second derivative there.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FUSED_HEAD = 256
"""Widest head of the fused CUDA kernels."""


def heads_first(x: Tensor) -> Tensor:
    """[B, T, H, K] -> [B, H, T, K]. The kernel on a CPU takes the last stride for 1 without looking."""
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, K], lse [B, H, T])."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    is_causal = causal and q.shape[1] > 1
    out, lse = kernel(heads_first(q), heads_first(k), heads_first(v), 0.0, is_causal, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for a cotangent of out alone: the kernel has no cotangent of lse."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    tensors = [heads_first(x) for x in (dout, q, k, v, out)]
    found = kernel(*tensors, lse, 0.0, causal and q.shape[1] > 1, scale=scale)
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in found)
    return dq, dk, dv


def fits_device(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """A fused kernel of a device other than the CPU is expected to take these tensors."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    grouped = k.shape[2] != q.shape[2]
    if q.dtype == torch.float64 or max(q.shape[-1], v.shape[-1]) > FUSED_HEAD:
        return False
    return (half and q.shape[-1] == v.shape[-1]) or not grouped


def on_device(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """out [B, T, H, V] on a device other than the CPU, differentiated by torch."""
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    is_causal, grouped = causal and q.shape[1] > 1, k.shape[2] != q.shape[2]
    with sdpa_kernel(fused):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=grouped,
        )
    return out.transpose(1, 2)
