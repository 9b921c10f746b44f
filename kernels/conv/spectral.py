"""Gated long convolution by FFT in plain torch, without autograd: the arithmetic behind the custom operators of `ops.py`.

Three methods, chosen by `plan.py`. Whole: one transform of T + L - 1 points a row. Frames (overlap-save), when the filter is
short: frames of N points that step by N - L + 1. Partitions, when both are long: see `partitioned.py`. The last two keep each
transform in the cache. All work through the channels in blocks, gates and casts included: on a CPU the page faults of large
temporaries cost more than the transforms. Gradients transform dy once for both dx and dk.

Inputs before the first token (a state) go in front of the sequence; what wraps around in a transform of T + L - 1 points then
falls on outputs of those, which nobody wants.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.conv import partitioned
from seqengine.kernels.conv.partitioned import Gradients, Need
from seqengine.kernels.conv.plan import Block, Plan, blocks, plan
from seqengine.kernels.environment import HAS_TRITON

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def convolve(
    u: Tensor, k: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, past: Tensor | None
) -> Tensor:
    """y = post_gate * (k (*) x + skip x), x = pre_gate u after `past`: y [B, D, T] in u.dtype, contiguous.

    u and gates [B, D, T]; k [G, L] with G dividing D, or [B, D, L]; skip [D]; past [B, D, L-1] of gated inputs.
    """
    B, D, T = u.shape
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y
    L, keep = _reach(k, T, past)
    how, filters = plan(T, L, u.device.type, keep), _by_group(k, D)
    dtype = accumulation_dtype(u, k, skip, pre_gate, post_gate, past)
    fused = is_fused(u.device.type)
    for block in blocks(B, D, filters.shape[1], how, u.device.type):
        x = _load(u, pre_gate, past, keep, block, dtype, how.size if fused else 0)
        z = _convolve_block(_grouped(x, block), _taps(filters, skip, block, L, dtype), how).flatten(1, 2)
        _store(z, keep, block, post_gate, y, fused)
    return y


def gradients(
    dy: Tensor,
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
) -> Six:
    """Gradients of `convolve` for dy: (u, k, skip, pre_gate, post_gate, past), in the shapes and dtypes of those.

    What is not needed is an empty tensor. dk is summed over the batch, unless k has one; taps beyond T get zero.
    """
    B, D, T = u.shape
    need_u, need_k, need_skip, need_pre, need_post, need_past = needed
    du, dk, dskip, dpre, dpost, dpast = out = empty_gradients(u, k, skip, pre_gate, post_gate, past, needed)
    if u.numel() == 0:
        return (du, dk.zero_(), dskip.zero_(), dpre, dpost, dpast.zero_())
    L, keep = _reach(k, T, past)
    how, filters = plan(T, L, u.device.type, keep), _by_group(k, D)
    dtype = accumulation_dtype(u, k, skip, pre_gate, post_gate, past)
    need = Need(need_u or need_pre or need_past, need_k, need_post)
    sums = torch.zeros(filters.shape if need_k else (0,), dtype=dtype, device=k.device)
    fused = is_fused(u.device.type)
    for block in blocks(B, D, filters.shape[1], how, u.device.type):
        some, size = block.channels, how.size if fused else 0
        x = _load(u, pre_gate, past, keep, block, dtype, size)
        grad = _load(dy, post_gate, None, keep, block, dtype, size)
        if need_skip:
            dskip[some] = torch.linalg.vecdot(grad[..., keep:], x[..., keep:], dim=-1).sum(dim=0)
        taps = _taps(filters, skip, block, L, dtype)
        found = _gradients_block(_grouped(grad, block), _grouped(x, block), taps, how, need)
        if found.x is not None:
            dstream = found.x.flatten(1, 2)
            if need_past:
                dpast[:, some] = dstream[..., :keep]
            if need_u:
                also = (u, dpre) if need_pre else (None, None)
                _store(dstream, keep, block, pre_gate, du, fused, *also)
            elif need_pre:
                _store(dstream, keep, block, u, dpre, fused)
        if found.k is not None:
            total = sums[:, block.filters, :, :L]
            own = found.k.sum_to_size(total.shape)
            total.copy_(own) if block.starts_filter else total.add_(own)
        if found.y is not None:
            _store(found.y.flatten(1, 2), keep, block, dy, dpost, fused)
    if need_k:
        dk = sums.view(k.shape).to(k.dtype)
    return (out[0], dk, *out[2:])


def empty_gradients(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    past: Tensor | None,
    needed: list[bool],
) -> Six:
    """Unwritten tensors like the arguments that need a gradient, of shape [0] for the others."""
    given = (u, k, skip, pre_gate, post_gate, past)
    return tuple(  # type: ignore[return-value]
        torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device)
        if t is not None
        else torch.empty(0, dtype=u.dtype, device=u.device)
        for t, need in zip(given, needed, strict=True)
    )


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _reach(k: Tensor, T: int, past: Tensor | None) -> tuple[int, int]:
    """Taps that reach an input, and inputs before the first token."""
    L = k.shape[-1]
    return (min(L, T), 0) if past is None else (L, L - 1)


def _by_group(k: Tensor, channels: int) -> Tensor:
    """[G, L] -> [1, G, 1, L]; [B, D, L] -> [B, D, 1, L]: a filter for each group of channels."""
    return k[:, :, None] if k.ndim == 3 else k[None, :, None]


def _grouped(x: Tensor, block: Block) -> Tensor:
    """[B, d, n] -> [B, filters, channels of each, n]."""
    count = block.filters.stop - block.filters.start
    grouped: Tensor = x.unflatten(1, (count, x.shape[1] // count))
    return grouped


def is_fused(device_type: str) -> bool:
    """Gates, casts and padding around the transforms are one Triton kernel each; on a CPU blocks do without."""
    return device_type == "cuda" and HAS_TRITON


def _load(
    x: Tensor, gate: Tensor | None, past: Tensor | None, keep: int, block: Block, dtype: torch.dtype, size: int
) -> Tensor:
    """Some channels of gate * x after the past, or after `keep` zeros, in `dtype`; padded to `size` if that is not 0."""
    own = x[:, block.channels]
    gate, past = (None if t is None else t[:, block.channels] for t in (gate, past))
    if size:
        from seqengine.kernels.conv.triton_gates import pad_gated

        return pad_gated(own, gate, past, keep, size, dtype)
    own = own.to(dtype)
    if gate is not None:
        own = own * gate
    if past is not None:
        return torch.cat([past.to(dtype), own], dim=-1)
    return F.pad(own, (keep, 0)) if keep else own


def _store(
    z: Tensor,
    keep: int,
    block: Block,
    gate: Tensor | None,
    out: Tensor,
    fused: bool,
    second_gate: Tensor | None = None,
    second: Tensor | None = None,
) -> None:
    """Some channels of out = gate * z, and of second = second_gate * z, without the first `keep` positions."""
    some = block.channels
    gate, second_gate, second = (None if t is None else t[:, some] for t in (gate, second_gate, second))
    if fused:
        from seqengine.kernels.conv.triton_gates import cut_gated

        cut_gated(z, keep, gate, out[:, some], second_gate, second)
        return
    inner = z[..., keep : keep + out.shape[-1]]
    if gate is None:
        out[:, some] = inner
    else:
        torch.mul(inner, gate, out=out[:, some])
    if second_gate is not None:
        torch.mul(inner, second_gate, out=second)


def _taps(filters: Tensor, skip: Tensor | None, block: Block, L: int, dtype: torch.dtype) -> Tensor:
    """[b, g, q, L]: the first L taps of some filters, skip added to lag 0, for which a group's channels part (q > 1)."""
    taps = filters[:, block.filters, :, :L].to(dtype)
    if skip is None:
        return taps
    own = _grouped(skip[None, block.channels, None].to(dtype), block)
    if own.shape[2] == 1:
        taps = taps.clone() if filters.dtype == dtype else taps
    else:
        taps = taps.repeat(1, 1, own.shape[2], 1)
    taps[..., :1] += own
    return taps


def _convolve_block(x: Tensor, k: Tensor, how: Plan) -> Tensor:
    """[B, g, p, n] and [b, g, q, L] -> [B, g, p, n]."""
    n, L = x.shape[-1], k.shape[-1]
    if how.method == "partitions":
        return partitioned.convolve_block(x, k, how.hop)
    taps = torch.fft.rfft(k, n=how.size)
    if how.method == "whole":
        y: Tensor = torch.fft.irfft(torch.fft.rfft(x, n=how.size).mul_(taps), n=how.size)
        return y[..., :n]
    spectrum = torch.fft.rfft(_frames(x, how, before=L - 1)).mul_(taps[..., None, :])
    frames: Tensor = torch.fft.irfft(spectrum, n=how.size)
    return frames[..., L - 1 :].flatten(-2)[..., :n]


def _gradients_block(dy: Tensor, x: Tensor, k: Tensor, how: Plan, need: Need) -> Gradients:
    if how.method == "partitions":
        return partitioned.gradients_block(dy, x, k, how.hop, need)
    return (_whole_gradients if how.method == "whole" else _frame_gradients)(dy, x, k, how, need)


def _whole_gradients(dy: Tensor, x: Tensor, k: Tensor, how: Plan, need: Need) -> Gradients:
    n, L = x.shape[-1], k.shape[-1]
    found = Gradients()
    if need.y or need.x:
        taps = torch.fft.rfft(k, n=how.size)
    if need.y or need.k:
        inputs = torch.fft.rfft(x, n=how.size)
    if need.y:
        found.y = torch.fft.irfft(inputs * taps, n=how.size)[..., :n]
    if need.x or need.k:
        spectrum = torch.fft.rfft(dy, n=how.size)
    if need.k:
        product = inputs.conj_physical_().mul_(spectrum)
        found.k = torch.fft.irfft(product if k.shape[0] > 1 else product.sum(dim=0, keepdim=True), n=how.size)[..., :L]
    if need.x:
        found.x = torch.fft.irfft(spectrum.mul_(taps.conj_physical_()), n=how.size)[..., :n]
    return found


def _frame_gradients(dy: Tensor, x: Tensor, k: Tensor, how: Plan, need: Need) -> Gradients:
    """Frames of dy reach L - 1 positions ahead, those of x are its hops alone: no product wraps around."""
    n, L = x.shape[-1], k.shape[-1]
    found = Gradients()
    if need.y:
        found.y = _convolve_block(x, k, how)
    if not (need.x or need.k):
        return found
    spectrum = torch.fft.rfft(_frames(dy, how, before=0))
    if need.k:
        alone = F.pad(x, (0, how.count * how.hop - n)).unflatten(-1, (how.count, how.hop))
        product = torch.fft.rfft(alone, n=how.size).conj_physical_().mul_(spectrum).sum(dim=-2)
        found.k = torch.fft.irfft(product if k.shape[0] > 1 else product.sum(dim=0, keepdim=True), n=how.size)[..., :L]
    if need.x:
        taps = torch.fft.rfft(k, n=how.size).conj_physical_()
        rows = torch.fft.irfft(spectrum.mul_(taps[..., None, :]), n=how.size)[..., : how.hop]
        found.x = rows.flatten(-2)[..., :n]
    return found


def _frames(x: Tensor, how: Plan, before: int) -> Tensor:
    """[..., n] -> [..., count, size]: frame i begins `before` positions before output i * hop; zeros outside x."""
    needed = (how.count - 1) * how.hop + how.size
    padded = F.pad(x, (before, needed - before - x.shape[-1]))
    return padded.unfold(-1, how.size, how.hop)
