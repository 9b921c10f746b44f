"""What happens inside the chunks of a tile, for gates of each channel, of each head, or fixed.

Tiles are [n, b, h, C, K]. Each kind of gates gives `outputs` (the part of o that comes from the own chunk), `gradients`
(of that part), and then, for the part that goes through the states,

    into [.., C, K or 1]   decay from the chunk's start into each token,
    out  [.., C, K or 1]   decay out of each token to the chunk's end,
    decay [.., K or 1, 1]  decay of the whole chunk, in float64.

The gradient of a gate sums the products (decayed score times its gradient) of the pairs j < t <= i that it lies between.
It is summed over exactly these, never as a difference of larger sums: strong gates get their small gradients to full
relative accuracy, and a gate of -inf gets 0.
"""

import torch
from torch import Tensor

from seqengine.kernels.linear_attention.dyadic import add_product, grow, halves, levels, product, scores


def _row_dots(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=-1, keepdim=True)


def bmm(x: Tensor, y: Tensor) -> Tensor:
    """Matrix products of the last two dimensions, over contiguous tiles or their transposes."""
    result: Tensor = torch.bmm(x.flatten(0, 2), y.flatten(0, 2)).unflatten(0, x.shape[:3])
    return result


class ChannelGates:
    """One gate for each key channel: log gates g [n, b, h, C, K]. Scores by the levels of `dyadic`."""

    def __init__(self, g: Tensor):
        self.chunk = g.shape[-2]
        self.into = torch.exp(g)
        self.out = torch.ones_like(g)
        self.decay = torch.exp(g.sum(dim=-2).to(torch.float64)).unsqueeze(-1)
        self._crossing: list[tuple[Tensor, Tensor]] = []

    def _factors(self, q: Tensor, k: Tensor, h: int) -> tuple[Tensor, Tensor]:
        return halves(q, h)[:, 1] * halves(self.into, h)[:, 1], halves(k, h)[:, 0] * halves(self.out, h)[:, 0]

    def outputs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = _row_dots(q, k) * v
        for h in levels(self.chunk):
            x, y = self._factors(q, k, h)
            add_product(halves(o, h)[:, 1], scores(x, y), halves(v, h)[:, 0])
            grow(self.into, self.out, h)
        return o

    def gradients(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, of_gates: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of q, k and v. of_gates: keep what `gate_gradients` needs."""
        own = _row_dots(do, v)
        dq, dk, dv = own * k, own * q, _row_dots(q, k) * do
        for h in levels(self.chunk):
            x, y = self._factors(q, k, h)
            do_second = halves(do, h)[:, 1]
            d_scores = scores(do_second, halves(v, h)[:, 0])
            add_product(halves(dv, h)[:, 0], scores(x, y).mT, do_second)
            dx, dy = product(d_scores, y), product(d_scores.mT, x)
            halves(dq, h)[:, 1].addcmul_(dx, halves(self.into, h)[:, 1])
            halves(dk, h)[:, 0].addcmul_(dy, halves(self.out, h)[:, 0])
            if of_gates:
                self._crossing.append((dx.mul_(x), dy.mul_(y)))
            grow(self.into, self.out, h)
        return dq, dk, dv

    def gate_gradients(self, d_into: Tensor, d_out: Tensor, d_decay: Tensor) -> Tensor:
        """dg [n, b, h, C, K] from the gradients of log into, log out [n, b, h, C, K] and log decay [n, b, h, K].

        From the highest level down: the adjoint of the sums that `grow` makes, and each level's own pairs.
        """
        d_into[..., -1, :] += d_decay
        for h in reversed(levels(self.chunk)):
            i, o = halves(d_into, h), halves(d_out, h)
            from_i, from_o = self._crossing.pop()
            i[:, 0, -1] += i[:, 1].sum(dim=1)
            i[:, 1, -1] += o[:, 0].sum(dim=1)
            i[:, 1] += from_i
            o[:, 0] += from_o
        return d_into


class HeadGates:
    """One gate for each head: g [n, b, h, C, 1]. Scores are q k^T times a [C, C] matrix of decays."""

    def __init__(self, g: Tensor):
        C = g.shape[-2]
        self.into = torch.exp(g)
        self.out = torch.ones_like(g)
        self.decay = torch.exp(g.sum(dim=-2).to(torch.float64)).unsqueeze(-1)
        self.between = g.new_zeros(*g.shape[:-1], C)
        self.between.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        for h in levels(C):
            count = C // (2 * h)
            squares = self.between.view(-1, count, 2 * h, count, 2 * h).diagonal(dim1=1, dim2=3)
            second = halves(self.into, h)[:, 1].reshape(-1, count, h, 1)
            first = halves(self.out, h)[:, 0].reshape(-1, count, 1, h)
            squares[:, h:, :h] = (second * first).permute(0, 2, 3, 1)
            grow(self.into, self.out, h)

    def outputs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bmm(bmm(q, k.mT).mul_(self.between), v)

    def gradients(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, of_gates: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of q, k and v. of_gates: keep what `gate_gradients` needs."""
        a, da = bmm(q, k.mT).mul_(self.between), bmm(do, v.mT)
        dv = bmm(a.mT, do)
        if of_gates:
            self._pairs = a.mul_(da)
        del a
        da.mul_(self.between)
        return bmm(da, k), bmm(da.mT, q), dv

    def gate_gradients(self, d_into: Tensor, d_out: Tensor, d_decay: Tensor) -> Tensor:
        """dg [n, b, h, C, 1] from the gradients of log into, log out [n, b, h, C, K] and log decay [n, b, h, K]."""
        dg = d_into.sum(dim=-1).flip(-1).cumsum(-1).flip(-1) + d_decay.sum(dim=-1, keepdim=True)
        dg[..., 1:] += d_out.sum(dim=-1).cumsum(-1)[..., :-1]
        # the pairs with j < t, then those of them with i >= t
        dg[..., 1:] += self._pairs.cumsum(-1).tril_(-1).sum(dim=-2)[..., :-1]
        return dg.unsqueeze(-1)


class FixedGates(HeadGates):
    """One log decay for each head, the same for every token: decays [h]; `tokens` of the chunk are there."""

    def __init__(self, decays: Tensor, chunk: int, tokens: int, dtype: torch.dtype):
        self._times = torch.arange(chunk, device=decays.device)
        self._left = (tokens - 1 - self._times).clamp(min=0)
        self._lag = (self._times[:, None] - self._times).clamp(min=0)
        self._tokens = tokens
        log = decays.to(torch.float64)[:, None, None]
        between = torch.exp((log * self._lag).masked_fill(self._lag == 0, 0.0))
        self.between = between.tril().to(dtype)
        self.into = torch.exp(log * (self._times + 1)[:, None]).to(dtype)
        self.out = torch.exp((log * self._left[:, None]).masked_fill((self._left == 0)[:, None], 0.0)).to(dtype)
        self.decay = torch.exp(log * tokens)

    def gate_gradients(self, d_into: Tensor, d_out: Tensor, d_decay: Tensor) -> Tensor:
        """The gradient [h] of the decays: of every exponent, times its number of tokens."""
        of_lag = self._pairs.sum(dim=(0, 1), dtype=torch.float64) * self._lag
        of_into = d_into.sum(dim=(0, 1, 4), dtype=torch.float64) * (self._times + 1)
        of_out = d_out.sum(dim=(0, 1, 4), dtype=torch.float64) * self._left
        of_decay = d_decay.sum(dim=(0, 1, 3), dtype=torch.float64) * self._tokens
        return of_lag.sum(dim=(1, 2)) + of_into.sum(dim=1) + of_out.sum(dim=1) + of_decay


Gates = ChannelGates | HeadGates
