"""The two operators of the frequency-sparse convolution: a circular convolution of n points on some bands of frequencies.

    sparse_conv(x, k)               y = first T of irfft(rfft(x, n) rfft(k, n) mask, n)
    sparse_conv_backward(g, x, k)   (A, W): A = g correlated with k, W = g correlated with x, under the same mask

With n = N1 N2 and time t = n2 N1 + n1, the transform at frequency k1 N2 + k2 is

    X[k1, k2] = sum_n1 w_N1^(n1 k1) w_n^(n1 k2) A[n1, k2]        A[n1] = the N2-point transform of x[n1], x[n1 + N1], ...

x is real, so A is half a spectrum, k2 = 0 .. N2/2. Rows k1 < N1/2 are the even bands, of positive frequencies. The others hold
negative ones, whose conjugates are the odd bands, from the highest down. The sum over n1 is a matrix product with the rows of
the kept bands alone. What a dropped band would cost there, in the products of spectra and in the way back, is not spent;
the N1 transforms of N2 points stay.

The columns k2 = 0 and N2/2 are edges of bands and occur in two rows, so each edge frequency is counted in the row of the band
that owns it. On the way back a row stands for its frequency and the conjugate one: twice its real part, but at 0 and n/2 once.

The operators are closed under differentiation, by the formulas in `ops.py`. They save their inputs only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqengine.kernels.conv.plan import SPARSE_BLOCK_ELEMENTS as BLOCK_ELEMENTS
from seqengine.kernels.conv.transforms import irfft_, rfft_, row_length


@dataclass(frozen=True)
class _Bands:
    """The transform to kept bands and back, with its tables. R rows are kept; K2 = N2/2 + 1.

    twiddle [N1, K2] and its conjugate; outer [R, N1]; inner [N1, R], its adjoint over N1; edges [R, 2], the weights of the
    columns 0 and N2/2. Conjugates are written out: while a graph is traced, torch ignores lazy ones inside an operator.
    """

    size: int
    num_blocks: int
    twiddle: Tensor
    untwiddle: Tensor
    outer: Tensor
    inner: Tensor
    edges: Tensor

    @property
    def points(self) -> int:
        return self.size // self.num_blocks

    def spectrum(self, x: Tensor) -> Tensor:
        """[..., T] of any real dtype -> [..., R, K2]."""
        dtype, (full, rest) = self.edges.dtype, divmod(x.shape[-1], self.num_blocks)
        length = row_length(self.points, x.device.type)
        columns = torch.zeros(*x.shape[:-1], self.num_blocks, length, dtype=dtype, device=x.device)
        columns[..., :full] = x[..., : full * self.num_blocks].unflatten(-1, (full, self.num_blocks)).mT
        if rest:
            columns[..., :rest, full] = x[..., full * self.num_blocks :]
        return torch.matmul(self.outer, rfft_(columns, self.points).mul_(self.twiddle))

    def weigh_(self, spectrum: Tensor) -> Tensor:
        """Each frequency once: the edge columns times their weights, in place."""
        spectrum[..., 0] *= self.edges[:, 0]
        spectrum[..., -1] *= self.edges[:, 1]
        return spectrum

    def write(self, weighed: Tensor, out: Tensor) -> None:
        """The real sequence of a weighed spectrum [..., R, K2]: its first out.shape[-1] values, into out."""
        columns = torch.matmul(self.inner, weighed).mul_(self.untwiddle)
        torch.view_as_real(columns)[..., [0, -1], 1] = 0
        values = irfft_(columns, self.points)
        full, rest = divmod(out.shape[-1], self.num_blocks)
        out[..., : full * self.num_blocks].unflatten(-1, (full, self.num_blocks)).copy_(values[..., :full].mT)
        if rest:
            out[..., full * self.num_blocks :] = values[..., :rest, full]


def _edge_weights(row: int, num_blocks: int) -> tuple[float, float]:
    """Of the columns 0 and N2/2 of a row: 0 where another band owns the frequency, 1 at frequencies 0 and n/2, else 2."""
    if 2 * row < num_blocks:
        return (1.0 if row == 0 else 2.0), (1.0 if 2 * row == num_blocks - 1 else 0.0)
    return (1.0 if 2 * row == num_blocks else 0.0), 2.0


def _row(band: int, num_blocks: int) -> int:
    """Where a band lies among the rows k1."""
    return band // 2 if band % 2 == 0 else num_blocks - 1 - (band - 1) // 2


def _bands(size: int, keep: list[bool], dtype: torch.dtype, device: torch.device) -> _Bands:
    num_blocks = len(keep)
    rows = [_row(band, num_blocks) for band, kept in enumerate(keep) if kept]

    def roots(exponents: Tensor, order: int) -> Tensor:
        angles = exponents.double() * (-2 * math.pi / order)
        return torch.polar(torch.ones_like(angles), angles).to(dtype.to_complex())

    n1 = torch.arange(num_blocks, device=device)
    k2 = torch.arange(size // num_blocks // 2 + 1, device=device)
    outer = roots(torch.tensor(rows, device=device)[:, None] * n1 % num_blocks, num_blocks)
    edges = torch.tensor([_edge_weights(row, num_blocks) for row in rows], dtype=dtype, device=device)
    inner = outer.conj_physical().mT.contiguous().div_(num_blocks)
    twiddle = roots(n1[:, None] * k2, size)
    return _Bands(size, num_blocks, twiddle, twiddle.conj_physical(), outer, inner, edges)


def _arithmetic(x: Tensor, k: Tensor) -> torch.dtype:
    """float64 if either is, else float32."""
    return torch.promote_types(torch.promote_types(x.dtype, k.dtype), torch.float32)


def _blocks(x: Tensor, size: int) -> list[slice]:
    """Of channels: on a CPU the page faults of large temporaries cost more than the arithmetic."""
    width = max(1, BLOCK_ELEMENTS.get(x.device.type, 1 << 24) // max(1, x.shape[0] * size))
    return [slice(start, min(start + width, x.shape[1])) for start in range(0, x.shape[1], width)]


def convolve(x: Tensor, k: Tensor, size: int, keep: list[bool]) -> Tensor:
    """y [B, D, T] in x.dtype, contiguous, for x [B, D, T] and k [D, L] or [B, D, L]."""
    if x.numel() == 0 or not any(keep):
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    bands = _bands(size, keep, _arithmetic(x, k), x.device)
    for block in _blocks(x, size):
        taps = bands.weigh_(bands.spectrum(k[..., block, :]))
        bands.write(bands.spectrum(x[:, block]).mul_(taps), y[:, block])
    return y


def gradients(
    dy: Tensor, x: Tensor, k: Tensor, size: int, keep: list[bool], need_x: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    """dx and dk, of the shapes and dtypes of x and k; what is not needed is an empty tensor.

    dy is transformed once for both. dk is summed over the batch, unless k has one.
    """
    is_zero = x.numel() == 0 or not any(keep)
    new = torch.zeros if is_zero else torch.empty
    dx = new(x.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    dk = new(k.shape if need_k else (0,), dtype=k.dtype, device=k.device)
    if is_zero:
        return dx, dk
    bands = _bands(size, keep, _arithmetic(x, k), x.device)
    for block in _blocks(x, size):
        spectrum = bands.spectrum(dy[:, block])
        if need_k:
            product = bands.spectrum(x[:, block]).conj_physical_().mul_(spectrum)
            product = product.sum(dim=0) if k.ndim == 2 else product
            bands.write(bands.weigh_(product), dk[..., block, :])
        if need_x:
            taps = bands.weigh_(bands.spectrum(k[..., block, :])).conj_physical_()
            bands.write(spectrum.mul_(taps), dx[:, block])
    return dx, dk


@torch.library.custom_op("seqengine::sparse_conv", mutates_args=())
def sparse_conv(x: Tensor, k: Tensor, size: int, keep: list[bool]) -> Tensor:
    """x [B, D, T]; k [D, L] or [B, D, L]; T + L - 1 <= size, a multiple of 2 len(keep). Returns [B, D, T] in x.dtype."""
    return convolve(x, k, size, keep)


@torch.library.custom_op("seqengine::sparse_conv_backward", mutates_args=())
def sparse_conv_backward(
    dy: Tensor, x: Tensor, k: Tensor, size: int, keep: list[bool], need_x: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and k for dy [B, D, T]; what is not needed comes back empty, of shape [0]."""
    return gradients(dy, x, k, size, keep, need_x, need_k)


@sparse_conv.register_fake
def _(x: Tensor, k: Tensor, size: int, keep: list[bool]) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@sparse_conv_backward.register_fake
def _(
    dy: Tensor, x: Tensor, k: Tensor, size: int, keep: list[bool], need_x: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape if need_x else (0,), dtype=x.dtype, device=x.device),
        torch.empty(k.shape if need_k else (0,), dtype=k.dtype, device=k.device),
    )


def _save_for_conv(ctx: Any, inputs: tuple[Tensor, Tensor, int, list[bool]], output: Tensor) -> None:
    x, k, ctx.size, ctx.keep = inputs
    ctx.save_for_backward(x, k)


def _differentiate_conv(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, k = ctx.saved_tensors
    need_x, need_k = ctx.needs_input_grad[:2]
    dx, dk = sparse_conv_backward(dy, x, k, ctx.size, ctx.keep, need_x, need_k)
    return dx if need_x else None, dk if need_k else None, None, None


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, list[bool], bool, bool], output: tuple[Tensor, Tensor]
) -> None:
    dy, x, k, ctx.size, ctx.keep, *had = inputs
    ctx.save_for_backward(dy, x, k)
    ctx.had = had


def _differentiate_backward(ctx: Any, h: Tensor, m: Tensor) -> tuple[Tensor | None, ...]:
    """h is the cotangent of dx, shaped like x; m that of dk, shaped like k. One that was not needed counts as zero."""
    dy, x, k = ctx.saved_tensors
    had_x, had_k = ctx.had
    need_dy, need_x, need_k = ctx.needs_input_grad[:3]
    d_dy: Tensor | None = None
    if need_dy and had_x:
        d_dy = sparse_conv(h.to(dy.dtype), k, ctx.size, ctx.keep)
    if need_dy and had_k:
        through_filter = sparse_conv(x, m, ctx.size, ctx.keep).to(dy.dtype)
        d_dy = through_filter if d_dy is None else d_dy + through_filter
    ask_x, ask_k = need_x and had_k, need_k and had_x
    dx: Tensor | None = None
    dk: Tensor | None = None
    if ask_x or ask_k:
        inputs = (dy, h if had_x else x, m if had_k else k)
        found = sparse_conv_backward(*inputs, ctx.size, ctx.keep, ask_x, ask_k)
        dx = found[0].to(x.dtype) if ask_x else None
        dk = found[1].to(k.dtype) if ask_k else None
    return d_dy, dx, dk, None, None, None, None


sparse_conv.register_autograd(_differentiate_conv, setup_context=_save_for_conv)
sparse_conv_backward.register_autograd(_differentiate_backward, setup_context=_save_for_backward)
