"""What happens inside the chunks of a tile [n, b, h, C, .]: the triangular system, its adjoint, and the states between chunks.

With the decays `into` (from the chunk's start into a token), `out` (out of a token to the chunk's end), `between` (a lower
triangle, 1 on its diagonal) and S the state before the chunk, what token i writes is beta_i times its prediction error
e_i = v_i - (decayed S_{i-1})^T k_i, and the errors of a chunk solve one unit lower triangular system:

    G = strictly lower part of between * (k k^T)     P = between * (q k^T)
    (I + G diag(beta)) e = v - (into k) S            u = beta e
    o = (into q) S + P u                             S' = decay S + (out k)^T u

The adjoint is another such system, of what flows to u:

    (I + G^T diag(beta)) d = P^T do + (out k) dS'    dv = beta d            d beta = rowwise d . e
    dS = decay dS' + (into q)^T do - (into k)^T dv
    dP = do u^T, dG = - dv u^T (times between: what flows to q k^T and to k k^T)

Both are solved for all chunks at once, with the state as a second right-hand side; only the states go chunk by chunk. The
gradient of a gate sums the products (decayed score times its gradient) of the pairs j < t <= i that it lies between, over
exactly these: nothing is lost after a strong gate, and a gate of -inf gets 0.
"""

import torch
from torch import Tensor

from seqengine.kernels.linear_attention.gates import HeadGates, bmm
from seqengine.kernels.linear_attention.layout import Segment


def solve(a: Tensor, x: Tensor) -> Tensor:
    """(I + strictly lower part of a)^-1 x, contiguous. From the right: a left solve would copy rows into columns."""
    y: Tensor = torch.linalg.solve_triangular(a.mT, x.mT, upper=True, left=False, unitriangular=True)
    return y.mT.contiguous()


def solve_transposed(a: Tensor, x: Tensor) -> Tensor:
    """(I + strictly lower part of a)^-T x, contiguous."""
    y: Tensor = torch.linalg.solve_triangular(a, x.mT, upper=False, left=False, unitriangular=True)
    return y.mT.contiguous()


def scan(
    rows: Tensor,
    through: Tensor,
    writes: Tensor,
    sums: Tensor | None,
    decay: Tensor,
    carry: Tensor,
    segment: Segment,
    source: Tensor,
    target: Tensor,
    reverse: bool = False,
) -> Tensor:
    """The carry before each chunk, [n, b, h, K, V]: rows += through carry, carry <- decay carry + sums + writes^T rows.

    rows [n, b, h, C, V], sums [n, b, h, K, V] and the carry [b, h, K, V] change in place. Where a document starts the carry is
    read from `source`, where it ends it is written to `target` (both [documents, b, h, K, V]); with reverse the other way
    round. The carry is in float64: a rounded decay, applied for millions of tokens, would change how long a gate remembers.
    """
    enter, leave = (segment.last, segment.first) if reverse else (segment.first, segment.last)
    met = torch.empty(segment.chunks, *carry.shape, dtype=rows.dtype, device=rows.device)
    for i in reversed(range(segment.chunks)) if reverse else range(segment.chunks):
        if enter[i] >= 0:
            carry.copy_(source[enter[i]])
        met[i] = carry
        row = rows[i].flatten(0, 1).baddbmm_(through[i].flatten(0, 1), met[i].flatten(0, 1))
        step = torch.bmm(writes[i].flatten(0, 1).mT, row).view_as(carry)
        carry.mul_(decay[i]).add_(step)
        if sums is not None:
            carry.add_(sums[i])
        if leave[i] >= 0:
            target[leave[i]] = carry
    return met


def _accumulate(y: Tensor, x: Tensor, h: Tensor) -> None:
    """y += x h, in place, for contiguous tiles."""
    y.flatten(0, 2).baddbmm_(x.flatten(0, 2), h.flatten(0, 2))


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Of the rows, [.., C]."""
    return (x * y).sum(dim=-1)


def gate_gradients(pairs: Tensor, d_into: Tensor, d_out: Tensor, d_decay: Tensor) -> Tensor:
    """dg [.., C] from what flows to the logs of between [.., C, C], of into and out [.., C] and of the chunk's decay [..]."""
    dg = d_into.flip(-1).cumsum(-1).flip(-1) + d_decay.unsqueeze(-1)
    dg[..., 1:] += d_out.cumsum(-1)[..., :-1]
    # the pairs with j < t, then those of them with i >= t
    dg[..., 1:] += pairs.cumsum(-1).tril_(-1).sum(dim=-2)[..., :-1]
    return dg


class Tile:
    """Keys [n, b, h, C, K], values [n, b, h, C, V], write strengths [n, b, h, C, 1] and the gates between them."""

    def __init__(self, k: Tensor, v: Tensor, beta: Tensor, gates: HeadGates):
        self.k, self.beta, self.between = k, beta, gates.between
        self.into, self.out = gates.into, gates.out
        self.decay = gates.decay.expand(*k.shape[:3], 1, 1)
        self.gram = bmm(k, k.mT).mul_(gates.between)
        system = self.gram * beta.mT
        self.errors = solve(system, v)  # less what the states predict, once `states` has run
        self._reads = solve(system, k * gates.into).neg_()

    def states(self, carry: Tensor, segment: Segment, source: Tensor, target: Tensor) -> Tensor:
        """The states before each chunk; moves the carry to the segment's end."""
        writes = self.k * (self.beta * self.out)
        return scan(self.errors, self._reads, writes, None, self.decay, carry, segment, source, target)

    def outputs(self, q: Tensor, before: Tensor) -> Tensor:
        """o [n, b, h, C, V] of scaled queries."""
        o = bmm(bmm(q, self.k.mT).mul_(self.between), self.beta * self.errors)
        _accumulate(o, q * self.into, before)
        return o

    def gradients(
        self,
        upstream: tuple[Tensor, Tensor] | None,
        before: Tensor,
        carry: Tensor,
        segment: Segment,
        d_final: Tensor,
        d_initial: Tensor,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
        """Of q, k, v, beta and g, the last two [n, b, h, C, 1]; moves the carry, the states' gradient, to the start.

        upstream: the scaled queries and the gradient of o; None where no output counts, and then there is none of q.
        """
        system = self.gram * self.beta
        written = self.beta * self.errors
        scores = sums = None
        if upstream is None:
            d_errors = torch.zeros_like(self.errors)
        else:
            q, do = upstream
            scores = bmm(q, self.k.mT).mul_(self.between)
            d_errors = solve_transposed(system, bmm(scores.mT, do))
            sums = bmm((q * self.into).mT, do)
        through, reads = solve_transposed(system, self.k * self.out), self.k * (self.beta * self.into).neg_()
        after = scan(d_errors, through, reads, sums, self.decay, carry, segment, d_final, d_initial, reverse=True)
        d_beta = _dots(d_errors, self.errors)
        dv = d_errors.mul_(self.beta)

        d_gram = bmm(dv, written.mT).neg_()
        pairs = self.gram * d_gram
        d_gram.mul_(self.between).tril_(-1)
        dk = bmm(d_gram, self.k)
        _accumulate(dk, d_gram.mT, self.k)
        from_read = bmm(dv, before.mT).mul_(self.into).neg_()
        from_write = bmm(written, after.mT).mul_(self.out)
        d_into, d_out = _dots(self.k, from_read), _dots(self.k, from_write)
        dk += from_read
        dk += from_write
        dq = None
        if upstream is not None and scores is not None:
            d_scores = bmm(do, written.mT)
            pairs.addcmul_(scores, d_scores)
            d_scores.mul_(self.between)
            _accumulate(dk, d_scores.mT, q)
            dq = bmm(do, before.mT).mul_(self.into)
            d_into += _dots(q, dq)
            _accumulate(dq, d_scores, self.k)
        d_decay = before.mul_(after).sum(dim=(-2, -1)) * self.decay[..., 0, 0].to(dv.dtype)
        dg = gate_gradients(pairs, d_into, d_out, d_decay)
        return dq, dk, dv, d_beta.unsqueeze(-1), dg.unsqueeze(-1)
