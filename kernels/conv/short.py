"""Short depthwise convolution as two operators: bias, SiLU, past inputs and document boundaries in one pass.

    short_conv(x, w, bias, past, silu, positions)        y[t] = act(bias + sum_s w[s] x[t - s]), x before 0 being `past`;
                                                         taps with s > positions[t] are left out: another document
    short_conv_backward(dy, x, w, bias, past, ...)       the gradients of x, w, bias and past

Here in plain torch, one multiply-add per tap, blocked over channels; or by the Triton kernels. Both save their inputs only.
Without SiLU they are closed under differentiation: with cotangents (hx, hw, hb, hp) of the four gradients,

    d dy = short_conv(hx, w, hb, hp) + short_conv(x, hw, 0, past)      (dx, dw, dpast) = short_conv_backward(dy, hx, hw, hp)

With it, dz = dy silu'(z) is written out and differentiated by torch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.conv import causal_conv1d
from seqengine.kernels.derivatives import differentiate

BLOCK_ELEMENTS = 1 << 17
"""Elements of x worked on at once: half a megabyte in float32, which stays in the second-level cache of a core."""

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _blocks(x: Tensor) -> list[slice]:
    if x.device.type != "cpu":
        return [slice(0, x.shape[1])]
    width = max(1, BLOCK_ELEMENTS // max(1, x.shape[0] * x.shape[2]))
    return [slice(start, min(start + width, x.shape[1])) for start in range(0, x.shape[1], width)]


def _reach(s: int, past: Tensor, length: int) -> tuple[slice, slice]:
    """Where tap s reads the past: columns of `past`, and the columns of y that they reach."""
    count = min(s, length)
    first = past.shape[-1] - s
    return slice(first, first + count), slice(0, count)


def _inside(x: Tensor, s: int, positions: Tensor | None, first: int = 0) -> Tensor:
    """x, whose last dim starts at token `first`, where a tap at lag s stays inside the document of its output."""
    if positions is None or s == 0:
        return x
    return x * (positions[first : first + x.shape[-1]] >= s)


def _preactivation(
    out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, past: Tensor | None, positions: Tensor | None
) -> None:
    """Fill out [B, d, T] with bias + sum_s w[s] x[t - s]."""
    T = x.shape[-1]
    torch.mul(x, w[:, :1], out=out)
    for s in range(1, w.shape[1]):
        tap = w[:, s, None]
        out[..., s:].addcmul_(_inside(x[..., : max(0, T - s)], s, None if positions is None else positions[s:]), tap)
        if past is not None:
            read, reached = _reach(s, past, T)
            out[..., reached].addcmul_(_inside(past[..., read], s, positions), tap)
    if bias is not None:
        out.add_(bias[:, None])


@torch.library.custom_op("seqengine::short_conv", mutates_args=())
def short_conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    silu: bool = False,
    positions: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """x [B, D, T]; w [D, W], the tap at lag s in column s; bias [D]; past [B, D, W-1]; positions [T] int32, each token's place
    in its document. Returns [B, D, T] in x.dtype."""
    if backend == "triton":
        from seqengine.kernels.conv import triton_short

        return triton_short.short_conv_forward(x, w, bias, past, silu, positions)
    if backend == "causal-conv1d":
        return causal_conv1d.forward(x, w, bias, silu)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    taps, level = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    for block in _blocks(x):
        own = None if level is None else level[block]
        _preactivation(y[:, block], x[:, block], taps[block], own, None if past is None else past[:, block], positions)
        if silu:
            F.silu(y[:, block], inplace=True)
    return y


@torch.library.custom_op("seqengine::short_conv_backward", mutates_args=())
def short_conv_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
    silu: bool = False,
    positions: Tensor | None = None,
    backend: str = "torch",
) -> Four:
    """Gradients of (x, w, bias, past), in the dtypes of x, w, bias (w without one) and past (x without one).

    One that is not needed is empty, of shape [0]. The sums of dw and dbias are in float32, or float64 for float64.
    """
    if backend in ("triton", "causal-conv1d"):
        return _by_triton(dy, x, w, bias, past, needed, silu, positions)
    need_x, need_w, need_bias, need_past = needed
    W, T = w.shape[1], x.shape[-1]
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = _empty(x, w, bias, past, needed)
    dx, dpast = out[0], out[3].zero_()
    dw = torch.zeros(w.shape if need_w else (0,), dtype=sums, device=w.device)
    dbias = torch.empty(w.shape[0] if need_bias else 0, dtype=sums, device=w.device)
    taps, level = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    for block in _blocks(x):
        grad, source, before = dy[:, block], x[:, block], None if past is None else past[:, block]
        if silu:
            z = torch.empty_like(source, memory_format=torch.contiguous_format)
            _preactivation(z, source, taps[block], None if level is None else level[block], before, positions)
            grad = torch.ops.aten.silu_backward(grad, z)
        if need_x:
            own = dx[:, block]
            torch.mul(grad, taps[block, :1], out=own)
            for s in range(1, W):
                own[..., : max(0, T - s)].addcmul_(_inside(grad[..., s:], s, positions, s), taps[block, s, None])
        if need_bias:
            dbias[block] = grad.sum(dim=(0, 2), dtype=sums)
        for s in range(W if need_w else 0):
            dw[block, s] = _dot(_inside(grad[..., s:], s, positions, s), source[..., : max(0, T - s)], sums)
        for s in range(1, W if before is not None else 0):
            assert before is not None
            read, reached = _reach(s, before, T)
            inner = _inside(grad[..., reached], s, positions)
            if need_w:
                dw[block, s] += _dot(inner, before[..., read], sums)
            if need_past:
                dpast[:, block, read].addcmul_(inner, taps[block, s, None])
    return dx, dw.to(out[1].dtype), dbias.to(out[2].dtype), dpast


def _by_triton(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
    silu: bool,
    positions: Tensor | None,
) -> Four:
    from seqengine.kernels.conv import triton_short

    out = list(_empty(x, w, bias, past, needed))
    level = w.new_zeros(w.shape[0]) if bias is None and needed[2] else bias
    found = triton_short.short_conv_backward(dy, x, w, level, past, silu, positions)
    for i, gradient in enumerate(found):
        if needed[i] and gradient is not None:
            out[i] = gradient.to(out[i].dtype)
    return out[0], out[1], out[2], out[3]


def _empty(x: Tensor, w: Tensor, bias: Tensor | None, past: Tensor | None, needed: list[bool]) -> Four:
    """Unwritten gradients, of shape [0] where not needed."""
    shapes = (x.shape, w.shape, w.shape[:1], (0,) if past is None else past.shape)
    dtypes = (x.dtype, w.dtype, w.dtype if bias is None else bias.dtype, x.dtype if past is None else past.dtype)
    return tuple(  # type: ignore[return-value]
        torch.empty(shape if need else (0,), dtype=dtype, device=x.device)
        for shape, dtype, need in zip(shapes, dtypes, needed, strict=True)
    )


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over batch and time of a * b, [D]."""
    products: Tensor = torch.linalg.vecdot(a.to(dtype), b.to(dtype), dim=-1)
    return products.sum(dim=0)


@short_conv.register_fake
def _(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    silu: bool = False,
    positions: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@short_conv_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
    silu: bool = False,
    positions: Tensor | None = None,
    backend: str = "torch",
) -> Four:
    return _empty(x, w, bias, past, needed)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bias, past, ctx.silu, positions, ctx.backend = inputs
    ctx.save_for_backward(x, w, bias, past, positions)


def _differentiate_forward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, bias, past, positions = ctx.saved_tensors
    flags = ctx.needs_input_grad  # without arguments that have their default value
    needed = [*flags[:4], *[False] * (4 - len(flags))]
    found = short_conv_backward(dy, x, w, bias, past, needed, ctx.silu, positions, ctx.backend)
    wanted = (gradient if need else None for gradient, need in zip(found, needed, strict=True))
    return (*wanted, None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    dy, x, w, bias, past, ctx.needed, ctx.silu, positions, ctx.backend = inputs
    ctx.save_for_backward(dy, x, w, bias, past, positions)


def _differentiate_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """The cotangents are shaped like the gradients; those of gradients that were not needed are empty, and count as zero."""
    *saved, positions = ctx.saved_tensors
    asked = ctx.needs_input_grad[:5]
    if not ctx.silu:
        found = _second_plain(saved, asked, ctx.needed, cotangents, positions, ctx.backend)
        return (*found, None, None, None, None)

    def written_out(dy: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, past: Tensor | None) -> Four:
        """Through dz = dy silu'(z) and the operators without activation."""
        z = short_conv(x, w, bias, past, False, positions, ctx.backend)
        sigmoid = torch.sigmoid(z)
        dz = dy * sigmoid * (1 + z * (1 - sigmoid))
        found: Four = short_conv_backward(dz, x, w, bias, past, ctx.needed, False, positions, ctx.backend)
        return found

    asked_for = [h if had else None for h, had in zip(cotangents, ctx.needed, strict=True)]
    return (*differentiate(written_out, saved, asked, asked_for), None, None, None, None)


def _second_plain(
    saved: list[Tensor],
    asked: tuple[bool, ...],
    had: list[bool],
    cotangents: tuple[Tensor, ...],
    positions: Tensor | None,
    backend: str,
) -> list[Tensor | None]:
    dy, x, w, _, past = saved
    hx, hw, hb, hp = (h if had_it else None for h, had_it in zip(cotangents, had, strict=True))
    zeros = torch.zeros_like
    at_x = zeros(x) if hx is None else hx
    at_w = zeros(w) if hw is None else hw
    at_past = None if past is None else zeros(past) if hp is None else hp
    d_dy: Tensor | None = None
    if asked[0]:
        d_dy = short_conv(at_x.to(dy.dtype), w, hb, at_past, False, positions, backend)
        if hw is not None:
            d_dy = d_dy + short_conv(x, hw, None, past, False, positions, backend).to(dy.dtype)
    needed = [asked[1], asked[2], False, asked[4] and past is not None]
    dx, dw, _, dpast = short_conv_backward(dy, at_x, at_w, None, at_past, needed, False, positions, backend)
    return [d_dy, dx if needed[0] else None, dw if needed[1] else None, None, dpast if needed[3] else None]


short_conv.register_autograd(_differentiate_forward, setup_context=_save_forward)
short_conv_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
