"""Gated long convolution by FFT in plain torch, without autograd: the arithmetic behind the custom operators of `ops.py`.

Three methods, chosen by `plan.py`: few frames (one of them is the whole sequence) or many, see `frames.py`; partitions of
sequence and filter, when both are long, see `partitioned.py`. All work through the channels in blocks, gates and casts
included: on a CPU the page faults of large temporaries cost more than the transforms. Gradients transform dy once for both
dx and dk.

Inputs before the first token (a state) go in front of the sequence; their outputs are dropped.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from seqengine.kernels.conv.frames import Frames, ManyFrames
from seqengine.kernels.conv.partitioned import Partitions
from seqengine.kernels.conv.plan import Block, Plan, blocks, num_workers, plan
from seqengine.kernels.conv.stream import Sink, Stream, Taps
from seqengine.kernels.conv.workers import Work, can_share, share

Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _method(how: Plan) -> Frames | ManyFrames | Partitions:
    if how.method == "partitions":
        return Partitions(how)
    return ManyFrames(how) if how.method == "many frames" else Frames(how)


def _share(u: Tensor, filters: Tensor, how: Plan, start: Callable[[], Work]) -> None:
    """Work on all blocks; what has no data has no time to gain."""
    of = (u.shape[0], u.shape[1], filters.shape[1], how, u.device.type)
    count = num_workers(*of, torch.get_num_threads()) if type(u) is Tensor else 1
    if count > 1 and not can_share():
        count = 1
    share(blocks(*of, count), count, start)


def convolve(
    u: Tensor, k: Tensor, skip: Tensor | None, pre_gate: Tensor | None, post_gate: Tensor | None, past: Tensor | None
) -> Tensor:
    """y = post_gate * (k (*) x + skip x), x = pre_gate u after `past`: y [B, D, T] in u.dtype, contiguous.

    u and gates [B, D, T]; k [G, L] with G dividing D, or [B, D, L]; skip [D]; past [B, D, L-1] of gated inputs.
    """
    D, T = u.shape[1:]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y
    L, keep = _reach(k, T, past)
    how, filters = plan(T, L, u.device.type, keep), _by_group(k, D)
    dtype = accumulation_dtype(u, k, skip, pre_gate, post_gate, past)
    x, out = Stream(u, pre_gate, past, keep, dtype), Sink(keep, [(y, post_gate)])
    taps = Taps(filters, skip, L, dtype)

    def start() -> Work:
        method = _method(how)
        return lambda block: method.convolve(x, taps, block, out)

    _share(u, filters, how, start)
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
    D, T = u.shape[1:]
    need_u, need_k, need_skip, need_pre, need_post, need_past = needed
    given = (u, k, skip, pre_gate, post_gate, past)
    if u.numel() == 0:
        return tuple(gradient.zero_() for gradient in empty_gradients(*given, needed))  # type: ignore[return-value]
    du, no_dk, dskip, dpre, dpost, dpast = empty_gradients(*given, [need_u, False, *needed[2:]])
    L, keep = _reach(k, T, past)
    how, filters = plan(T, L, u.device.type, keep), _by_group(k, D)
    dtype = accumulation_dtype(u, k, skip, pre_gate, post_gate, past)
    x, ahead = Stream(u, pre_gate, past, keep, dtype), Stream(dy, post_gate, None, keep, dtype)
    gated = [(du, pre_gate)] * need_u + [(dpre, u)] * need_pre
    to_x = Sink(keep, gated, dpast if need_past else None) if gated or need_past else None
    to_y = Sink(keep, [(dpost, dy)]) if need_post else None
    sums = torch.empty(filters.shape if need_k else (0,), dtype=dtype, device=k.device)
    if need_k:
        sums[..., L:].zero_()
    taps = Taps(filters, skip, L, dtype)

    def start() -> Work:
        method = _method(how)

        def work(block: Block) -> None:
            found = method.gradients(ahead, x, taps, block, to_x, to_y, need_k or need_skip)
            if found is not None and need_skip:
                dskip[block.channels] = found[..., 0].sum(dim=0).flatten()
            if found is not None and need_k:
                total = sums[:, block.filters, :, :L]
                own = found.sum_to_size(total.shape)
                total.copy_(own) if block.starts_filter else total.add_(own)

        return work

    _share(u, filters, how, start)
    return (du, sums.view(k.shape).to(k.dtype) if need_k else no_dk, dskip, dpre, dpost, dpast)


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
