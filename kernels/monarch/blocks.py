"""The arithmetic of the learned Monarch convolution and of its gradients, without autograd, block of channels by block.

A row of n = N1 N2 numbers is a table X [N1, N2]; a spectrum is a table too, element (k1, k2) for frequency k1 + N1 k2:

    there    A = O X,    C = (W * A) I'            back    Q = S J',    X = Re(V (U * Q))

for factors (outer, twiddle, inner) = (O, W, I) of the forward and (V, U, J) of the inverse transform. Rows of X that are
padding are left out of both. With dX real, and torch's convention for gradients of complex numbers, the gradients are

    back     dV = dX (U * Q)^H    E = V^H dX        dU = E * conj Q    dQ = conj U * E     dJ = dQ' conj S    dS = dQ conj J
    product  dC_x = dS * conj C_k                   dC_k = dS * conj C_x, summed over the rows that share k
    there    dI = dC' conj(W * A)    E = dC conj I  dW = E * conj A    dA = conj W * E     dO = dA X'         dX = Re(O^H dA)

with sums over rows. Conjugates are written out, for a lazy one is read without its sign when a compiled graph calls an
operator that makes it (torch 2.13).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Complex numbers of one spectrum of a block: 2 MB in complex64 on a CPU; on a GPU only a bound on memory."""


def _convert(x: Tensor, real: torch.dtype) -> Tensor:
    """In the dtype of the arithmetic: this real one, or the complex one of two such."""
    return x.to(real.to_complex() if x.is_complex() else real)


class Arguments(NamedTuple):
    """What the operators take, and what they have gradients of."""

    u: Tensor  # [B, D, T]
    k: Tensor  # [D, L] or [B, D, L]
    outer: Tensor  # [G, N1, N1], and so on: each factor has its own G, which is 1 or the number of groups
    twiddle: Tensor
    inner: Tensor
    inverse_outer: Tensor
    inverse_twiddle: Tensor
    inverse_inner: Tensor
    skip: Tensor | None  # [D]
    pre_gate: Tensor | None  # [B, D, T]
    post_gate: Tensor | None  # [B, D, T]

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return (self.outer, self.twiddle, self.inner, self.inverse_outer, self.inverse_twiddle, self.inverse_inner)

    @property
    def groups(self) -> int:
        return max(factor.shape[0] for factor in self.factors)

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: float64 if anything is double, else float32. Complex numbers are of two such."""
        dtypes = {x.dtype for x in self if x is not None}
        return torch.float64 if dtypes & {torch.float64, torch.complex128} else torch.float32

    def to(self, real: torch.dtype) -> "Arguments":
        """In the dtype of the arithmetic, all of it."""
        return Arguments._make(None if x is None else _convert(x, real) for x in self)

    def block(self, channels: slice, groups: slice) -> "Arguments":
        """Views of what belongs to some channels."""
        factors = [f if f.shape[0] == 1 else f[groups] for f in self.factors]
        skip = None if self.skip is None else self.skip[channels]
        gates = [None if gate is None else gate[:, channels] for gate in (self.pre_gate, self.post_gate)]
        return Arguments._make((self.u[:, channels], self.k[..., channels, :], *factors, skip, *gates))


FORWARD, INVERSE = Arguments._fields[2:5], Arguments._fields[5:8]


def _blocks(a: Arguments) -> Iterator[tuple[slice, slice]]:
    """(channels, groups) of each block: several whole groups, or a part of one."""
    B, D, _ = a.u.shape
    unit, n = D // a.groups, a.twiddle.shape[1] * a.twiddle.shape[2]
    width = max(1, BLOCK_ELEMENTS.get(a.u.device.type, 1 << 22) // (B * n))
    if width >= unit:
        step = width // unit
        for group in range(0, a.groups, step):
            yield slice(group * unit, min((group + step) * unit, D)), slice(group, group + step)
        return
    for group in range(a.groups):
        end = (group + 1) * unit
        for start in range(group * unit, end, width):
            yield slice(start, min(start + width, end)), slice(group, group + 1)


def _table(x: Tensor, groups: int, N2: int) -> Tensor:
    """[B, D, T] -> [G, rows, B, D / G, N2]: as many rows n1 as T needs, zeros after T."""
    B, D, T = x.shape
    rows = -(-T // N2)
    return F.pad(x, (0, rows * N2 - T)).view(B, groups, D // groups, rows, N2).permute(1, 3, 0, 2, 4).contiguous()


def _untable(z: Tensor, T: int) -> Tensor:
    """The inverse of `_table`."""
    G, rows, B, c, N2 = z.shape
    return z.permute(2, 0, 3, 1, 4).reshape(B, G * c, rows * N2)[..., :T]


def _left(m: Tensor, z: Tensor) -> Tensor:
    """m z over the first index of the tables: m [G or 1, I, J], z [G, J, B, c, N2] -> [G, I, B, c, N2]."""
    G, I = z.shape[0], m.shape[1]  # noqa: E741
    return torch.bmm(m.expand(G, -1, -1), z.flatten(2)).view(G, I, *z.shape[2:])


def _left_of_real(m: Tensor, x: Tensor) -> Tensor:
    """m x for complex m and real x: half the multiply-adds."""
    return torch.complex(_left(m.real, x), _left(m.imag, x))


def _real_of_left(m: Tensor, z: Tensor) -> Tensor:
    """Re(m z) for complex m and z: half the multiply-adds."""
    return _left(m.real, z.real) - _left(m.imag, z.imag)


def _right(z: Tensor, m: Tensor) -> Tensor:
    """z m over the second index of the tables: z [G, I, B, c, N2], m [G or 1, N2, N2]."""
    return torch.bmm(z.flatten(1, 3), m.expand(z.shape[0], -1, -1)).view(z.shape)


def _over_rows(twiddle: Tensor) -> Tensor:
    return twiddle[:, :, None, None, :]


class Spectrum(NamedTuple):
    """A real table, what becomes of it before the twiddle factors, and its spectrum."""

    X: Tensor
    A: Tensor
    C: Tensor


def _spectrum(a: Arguments, x: Tensor) -> Spectrum:
    X = _table(x, a.groups, a.twiddle.shape[2])
    A = _left_of_real(a.outer[:, :, : X.shape[1]], X)
    return Spectrum(X, A, _right(_over_rows(a.twiddle) * A, a.inner.mT))


def _product(a: Arguments, x: Tensor) -> tuple[Spectrum, Spectrum, Tensor]:
    """Of x, of k, and the product of both spectra."""
    of_x, of_k = _spectrum(a, x), _spectrum(a, a.k if a.k.ndim == 3 else a.k[None])
    return of_x, of_k, of_x.C * of_k.C


def _before_gate(a: Arguments, x: Tensor, S: Tensor) -> Tensor:
    """The convolution from the product of the spectra, and skip * x."""
    twisted = _over_rows(a.inverse_twiddle) * _right(S, a.inverse_inner.mT)
    rows = -(-x.shape[-1] // a.twiddle.shape[2])
    y = _untable(_real_of_left(a.inverse_outer[:, :rows], twisted), x.shape[-1])
    return y if a.skip is None else y + a.skip[:, None] * x


def compose(a: Arguments) -> Tensor:
    """y [B, D, T] of all channels at once, in the dtype of the arithmetic; torch can differentiate it any number of times."""
    x = a.u if a.pre_gate is None else a.pre_gate * a.u
    *_, S = _product(a, x)
    y = _before_gate(a, x, S)
    return y if a.post_gate is None else a.post_gate * y


def _like(factor: Tensor, gradient: Tensor) -> Tensor:
    """[G, N, N'] -> the G of the factor; rows or columns that met only padding get zero."""
    if factor.shape[0] < gradient.shape[0]:
        gradient = gradient.sum(dim=0, keepdim=True)
    return F.pad(gradient, (0, factor.shape[2] - gradient.shape[2], 0, factor.shape[1] - gradient.shape[1]))


def _twiddle_gradient(factor: Tensor, E: Tensor, A: Tensor) -> Tensor:
    return _like(factor, (E * A.conj_physical()).sum(dim=(2, 3)))


def _inner_gradient(factor: Tensor, dz: Tensor, z: Tensor) -> Tensor:
    """dz' conj z, summed over everything but the group."""
    return _like(factor, torch.bmm(dz.flatten(1, 3).mT, z.conj_physical().flatten(1, 3)))


def _back_adjoint(a: Arguments, dx: Tensor, S: Tensor, need: bool) -> tuple[Tensor, list[Tensor]]:
    """dS, and the gradients of the factors of the inverse transform if needed."""
    outer, twiddle, inner = a.inverse_outer, _over_rows(a.inverse_twiddle), a.inverse_inner
    E = _left_of_real(outer[:, : dx.shape[1]].conj_physical().mT, dx)
    dQ = twiddle.conj_physical() * E
    dS = _right(dQ, inner.conj_physical())
    if not need:
        return dS, []
    Q = _right(S, inner.mT)
    twisted, rows = (twiddle * Q).flatten(2), dx.flatten(2)
    d_outer = torch.complex(torch.bmm(rows, twisted.real.mT), -torch.bmm(rows, twisted.imag.mT))
    d_twiddle = _twiddle_gradient(a.inverse_twiddle, E, Q)
    return dS, [_like(outer, d_outer), d_twiddle, _inner_gradient(inner, dQ, S)]


def _there_adjoint(a: Arguments, dC: Tensor, of: Spectrum, need: bool) -> tuple[Tensor, list[Tensor]]:
    """dX, and the gradients of the factors of the forward transform if needed."""
    twiddle = _over_rows(a.twiddle)
    E = _right(dC, a.inner.conj_physical())
    dA = twiddle.conj_physical() * E
    # Re(O^H dA) = Re(O' conj dA)
    dX = _real_of_left(a.outer[:, :, : of.X.shape[1]].mT, dA.conj_physical())
    if not need:
        return dX, []
    by_row, columns = dA.flatten(2), of.X.flatten(2).mT
    d_outer = torch.complex(torch.bmm(by_row.real, columns), torch.bmm(by_row.imag, columns))
    d_inner = _inner_gradient(a.inner, dC, twiddle * of.A)
    return dX, [_like(a.outer, d_outer), _twiddle_gradient(a.twiddle, E, of.A), d_inner]


def _gradients_block(dy: Tensor, a: Arguments, needs: dict[str, bool]) -> dict[str, Tensor]:
    """At least the gradients that are needed of one block, in the dtype of the arithmetic."""
    need_x, need_k = needs["u"] or needs["pre_gate"], needs["k"]
    need_forward, need_inverse = (any(needs[name] for name in names) for names in (FORWARD, INVERSE))
    x = a.u if a.pre_gate is None else a.pre_gate * a.u
    g = dy if a.post_gate is None else a.post_gate * dy
    of_x, of_k, S = _product(a, x)
    found: dict[str, Tensor] = {}
    if needs["post_gate"]:
        found["post_gate"] = dy * _before_gate(a, x, S)
    if needs["skip"]:
        found["skip"] = (g * x).sum(dim=(0, 2))
    dS, inverse = _back_adjoint(a, _table(g, a.groups, a.twiddle.shape[2]), S, need_inverse)
    forward: list[Tensor] = []
    if need_x or need_forward:
        table, forward = _there_adjoint(a, dS * of_k.C.conj_physical(), of_x, need_forward)
        dx = _untable(table, dy.shape[-1])
        dx = dx if a.skip is None else dx + a.skip[:, None] * g
        found["u"] = dx if a.pre_gate is None else a.pre_gate * dx
        found["pre_gate"] = a.u * dx
    if need_k or need_forward:
        dC = dS * of_x.C.conj_physical()
        dC = dC.sum(dim=2, keepdim=True) if a.k.ndim == 2 else dC
        table, more = _there_adjoint(a, dC, of_k, need_forward)
        forward = [p + q for p, q in zip(forward, more, strict=True)]
        found["k"] = _untable(table, a.k.shape[-1]).reshape(a.k.shape)
    return found | dict(zip(FORWARD, forward)) | dict(zip(INVERSE, inverse))


def convolve(a: Arguments) -> Tensor:
    y = torch.empty(a.u.shape, dtype=a.u.dtype, device=a.u.device)
    if y.numel():
        with torch.autocast(y.device.type, enabled=False):
            for channels, groups in _blocks(a):
                y[:, channels] = compose(a.block(channels, groups).to(a.dtype))
    return y


def gradients(dy: Tensor, a: Arguments, needs: dict[str, bool]) -> list[Tensor]:
    """One for each argument, in its shape and dtype; what is not needed is empty, of shape [0]."""
    real = a.dtype
    wanted = {name: x for name, x in a._asdict().items() if x is not None and needs[name]}
    # those of factors are sums over blocks, in the dtype of the arithmetic; the others are written once
    totals = {
        name: torch.zeros(x.shape, dtype=real.to_complex() if x.is_complex() else x.dtype, device=x.device)
        for name, x in wanted.items()
    }
    if dy.numel():
        with torch.autocast(dy.device.type, enabled=False):
            for channels, groups in _blocks(a):
                found = _gradients_block(_convert(dy[:, channels], real), a.block(channels, groups).to(real), needs)
                parts = a._replace(**totals).block(channels, groups)._asdict()
                for name in wanted:
                    parts[name] += found[name]
    return [totals[f].to(wanted[f].dtype) if f in wanted else dy.new_empty(0) for f in a._fields]
