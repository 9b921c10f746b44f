"""The sLSTM chunk by chunk without autograd; arguments and layouts as in cells.py.

The memories c and n go through the backward like the c of an LSTM, with m held constant. The rest of the cotangent of m needs
little more. (c, n, m) and (c e^d, n e^d, m - d) stand for the same past, so that the cotangent of m' is c' dc' + n' dn' plus a
rest, which comes only from what is asked of the final state, and from the clamp of n. The rest goes one way through the maxima:
while the past wins it follows it, adding itself to every a = log s(f) + m, and it ends in the first i, seen from the end, that
wins. So it is known for a whole chunk in advance. In this module carry[3] is the rest between the last token and the first.

Only the first token of a call can meet n < 1: after it one of i and f is exactly 1, and with it n >= 1 without the clamp.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from seqengine.kernels.rnn.cells import memories, pass_back


def without_past(state: Tensor) -> Tensor:
    """The state [4, ...] with m = -inf where n = 0, after which nothing of c and n is kept."""
    state[3].masked_fill_(state[2] == 0, -math.inf)
    return state


def slstm_forward(gates: Tensor, weight: Tensor, state: Tensor, h: Tensor, first: bool) -> None:
    """first: the chunk holds the first token of the call."""
    past, cn, m = state[0], state[1:3], state[3]
    z_and_one = torch.ones_like(cn)
    only_z, wide_m, c, n = z_and_one[0], m.unsqueeze(2), cn[0], cn[1]
    tokens = (gates.flatten(3), gates[..., :2, :], *gates.unbind(3), h)
    for pre, both, i, f, z, o, out in zip(*(x.unbind(0) for x in tokens), strict=True):
        pre.baddbmm_(past, weight)
        torch.add(F.logsigmoid(f), m, out=f)
        torch.maximum(i, f, out=m)
        both.sub_(wide_m).exp_()
        torch.tanh(z, out=only_z)
        cn.mul_(f).addcmul_(i, z_and_one)
        if first:
            n.clamp_(min=1)
            first = False
        past = torch.div(c, n, out=out).mul_(o.sigmoid_())


class _Tokens:
    """The coefficients of a chunk's backward loop, each [C, H, B, ...]."""

    def __init__(self, pre: Tensor, state: Tensor, first: bool) -> None:
        self.own, f, z, o = pre.unbind(3)
        self.carried = F.logsigmoid(f)
        m = torch.empty_like(self.carried)
        before = state[3]
        for own, a, out in zip(self.own.unbind(0), self.carried.unbind(0), m.unbind(0), strict=True):
            a += before
            before = torch.maximum(own, a, out=out)
        i, self.f = torch.sub(self.own, m).exp_(), torch.sub(self.carried, m).exp_()
        self.slope_f = f.neg_().sigmoid_()
        z.tanh_()
        o.sigmoid_()
        added = torch.stack((i * z, i))
        self.clamped = None
        if first:
            n = torch.addcmul(i[0], self.f[0], state[2])
            self.clamped = n < 1
            added[1, 0] += torch.where(self.clamped, 1 - n, 0)
        self.cn = memories(state[1:3], self.f, added)
        c, n = self.cn[:, 1:]
        ratio = c / n
        self.to_cn = torch.empty_like(added)
        torch.mul(torch.div(o, n, out=self.to_cn[0]), ratio, out=self.to_cn[1]).neg_()
        self.from_x = torch.addcmul(o, o, o, value=-1).mul_(ratio)
        self.from_c = pre.new_empty(*pre.shape[:3], 3, pre.shape[4])
        self.from_n = pre.new_empty(*pre.shape[:3], 2, pre.shape[4])
        past, slope = self.cn[:, :-1], self.f * self.slope_f
        self.from_c[..., 0, :] = added[0]
        torch.mul(past[0], slope, out=self.from_c[..., 1, :])
        torch.addcmul(i, added[0], z, value=-1, out=self.from_c[..., 2, :])
        self.from_n[..., 0, :] = i
        torch.mul(past[1], slope, out=self.from_n[..., 1, :])

    def wins(self, tokens: slice) -> Tensor:
        """The weight of the past in the maximum; one half each at a tie, as torch differentiates it."""
        own, carried = self.own[tokens], self.carried[tokens]
        return (carried > own).to(own.dtype).add_(carried == own, alpha=0.5)

    def route(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """What the rest after the chunk adds to d_pre of i and f [C, H, B, 2, K], and the rest before the chunk."""
        one = torch.ones_like(rest).unsqueeze(0)
        rests = torch.cat((self.wins(slice(None)), one)).flip(0).cumprod(dim=0).flip(0) * rest
        stays = rests[:-1]
        return torch.stack((rests[1:] - stays, stays * self.slope_f), dim=3), rests[0]

    def unclamp(self, d_n: Tensor, d_if: Tensor, rest: Tensor) -> None:
        """The first token: where n was raised to 1, its cotangent d_n is a rest and goes to the maximum instead."""
        if self.clamped is not None:
            moved = torch.where(self.clamped, d_n, 0)
            wins = self.wins(slice(1))[0] * moved
            d_n -= moved
            d_if[:, :, 0] += moved - wins
            d_if[:, :, 1] += wins * self.slope_f[0]
            rest += wins


def slstm_backward(
    pre: Tensor, dh: Tensor, back: Tensor, state: Tensor, carry: Tensor, first: bool, last: bool
) -> Tensor:
    """first, last: the chunk holds the first, the last token of the call."""
    tokens = _Tokens(pre, state, first)
    g, rest = carry[1:3], carry[3]
    if last:  # so far the cotangent of m
        rest -= (g * tokens.cn[:, -1]).sum(dim=0)
    d_pre = torch.empty_like(pre)
    d_pre[..., :3, :] = 0
    if bool(rest.any()):
        d_pre[..., :2, :], before = tokens.route(rest)
        rest.copy_(before)
    x, flat, kept = dh.unbind(0), d_pre.flatten(3).unbind(0), tokens.f.unbind(0)
    d_ifz, d_if, d_o = d_pre[..., :3, :].unbind(0), d_pre[..., :2, :].unbind(0), d_pre[..., 3, :].unbind(0)
    to_cn, from_x = tokens.to_cn.unbind(1), tokens.from_x.unbind(0)
    from_c, from_n = tokens.from_c.unbind(0), tokens.from_n.unbind(0)
    g_c, g_n = g.unsqueeze(3)
    for t in reversed(range(len(x))):
        g.addcmul_(to_cn[t], x[t])
        if first and t == 0:
            tokens.unclamp(g[1], d_if[0], rest)
        d_ifz[t].addcmul_(g_c, from_c[t])
        d_if[t].addcmul_(g_n, from_n[t])
        torch.mul(x[t], from_x[t], out=d_o[t])
        pass_back(t, flat, back, x, carry)
        g.mul_(kept[t])
    if first:
        rest += (g * state[1:3]).sum(dim=0)
    return d_pre
