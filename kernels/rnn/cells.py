"""Elman, GRU and LSTM chunk by chunk without autograd: few operations a token, the rest for all tokens of a chunk at once.

Layouts: pre-activations [C, H, B, G, K], states [S, H, B, K], weights [H, K, G * K]. A token is then one small matrix product
for each head and a few elementwise operations. A forward takes the gates, which it overwrites, the weight, the state before
the chunk, whose memories it moves on in place, and h [C, H, B, K], which it fills.

The backward knows every h, so that all pre-activations of a chunk are one product. Its loop over tokens, from the last to the
first, is linear in the cotangents, with coefficients found for the whole chunk before:

    x = dh + (d_pre of the next token) R,    g = carry + to_memory x,    d_pre = from_memory g + from_x x,    carry = f g

A backward takes dh [C, H, B, K], to which the carried cotangent of h has been added and which it turns into x, R, and the
carry [S, H, B, K], the cotangent of the state after the chunk, which leaves as that of the state before it.
"""

import torch
from torch import Tensor


def pass_back(t: int, d_pre: tuple[Tensor, ...], back: Tensor, x: tuple[Tensor, ...], carry: Tensor) -> None:
    """Adds d_pre[t] R to the cotangent of the h before token t; before the first token of the chunk that is carry[0]."""
    if t > 0:
        x[t - 1].baddbmm_(d_pre[t], back)
    else:
        torch.bmm(d_pre[0], back, out=carry[0])


def elman_forward(gates: Tensor, weight: Tensor, state: Tensor, h: Tensor) -> None:
    past = state[0]
    for pre, out in zip(gates.flatten(3).unbind(0), h.unbind(0), strict=True):
        past = torch.tanh(pre.baddbmm_(past, weight), out=out)


def elman_backward(pre: Tensor, dh: Tensor, back: Tensor, carry: Tensor) -> Tensor:
    pre.tanh_()
    slope = (1 - pre * pre).flatten(3).unbind(0)
    d_pre = torch.empty_like(pre)
    x, flat = dh.unbind(0), d_pre.flatten(3).unbind(0)
    for t in reversed(range(len(x))):
        torch.mul(x[t], slope[t], out=flat[t])
        pass_back(t, flat, back, x, carry)
    return d_pre


def gru_forward(gates: Tensor, weight: Tensor, state: Tensor, h: Tensor) -> None:
    past, K = state[0], h.shape[-1]
    recurrent = past.new_empty(*past.shape[:2], 3 * K)
    of_rz, of_n = recurrent[..., : 2 * K], recurrent[..., 2 * K :]
    both = gates[..., :2, :].flatten(3)
    tokens = (both, *gates.unbind(3), h)
    for rz, r, z, n, out in zip(*(x.unbind(0) for x in tokens), strict=True):
        torch.bmm(past, weight, out=recurrent)
        rz.add_(of_rz).sigmoid_()
        n.addcmul_(r, of_n).tanh_()
        past = torch.lerp(n, past, z, out=out)


def gru_backward(
    gates: Tensor, recurrent: Tensor, past: Tensor, dh: Tensor, back: Tensor, carry: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates and of the recurrent part [C, H, B, 3, K]; past [C, H, B, K] is the h before each token.

    No memory but h: everything is x times a coefficient, and x reaches the h before through z as well.
    """
    r, z, n = gates.unbind(3)
    gates[..., :2, :].add_(recurrent[..., :2, :]).sigmoid_()
    of_n = recurrent[..., 2, :]
    n.addcmul_(r, of_n).tanh_()
    slope_n = (1 - z) * (1 - n * n)
    slopes = torch.stack((slope_n * of_n * r * (1 - r), (past - n) * z * (1 - z), slope_n * r), dim=3).unbind(0)
    d_pre = torch.empty_like(gates)
    x, each, flat, kept = dh.unbind(0), d_pre.unbind(0), d_pre.flatten(3).unbind(0), z.unbind(0)
    for t in reversed(range(len(x))):
        torch.mul(x[t].unsqueeze(2), slopes[t], out=each[t])
        pass_back(t, flat, back, x, carry)
        (x[t - 1] if t > 0 else carry[0]).addcmul_(x[t], kept[t])
    d_gates = d_pre.clone()
    torch.mul(dh, slope_n, out=d_gates[..., 2, :])
    return d_gates, d_pre


def lstm_forward(gates: Tensor, weight: Tensor, state: Tensor, h: Tensor) -> None:
    past, c = state[0], state[1]
    tokens = (gates.flatten(3), gates[..., :2, :], *gates.unbind(3), h)
    for pre, both, i, f, z, o, out in zip(*(x.unbind(0) for x in tokens), strict=True):
        pre.baddbmm_(past, weight)
        both.sigmoid_()
        c.mul_(f).addcmul_(i, z.tanh_())
        past = torch.tanh(c, out=out).mul_(o.sigmoid_())


def memories(start: Tensor, f: Tensor, added: Tensor) -> Tensor:
    """The memories [S, C + 1, H, B, K] before and after each token: f [C, H, B, K] times the one before, plus what is added."""
    cells = added.new_empty(added.shape[0], added.shape[1] + 1, *added.shape[2:])
    cells[:, 0] = start
    after = cells.unbind(1)
    for t, (kept, new) in enumerate(zip(f.unbind(0), added.unbind(1), strict=True)):
        torch.addcmul(new, kept, after[t], out=after[t + 1])
    return cells


def lstm_backward(pre: Tensor, dh: Tensor, back: Tensor, state: Tensor, carry: Tensor) -> Tensor:
    i, f, z, o = pre.unbind(3)
    pre[..., :2, :].sigmoid_()
    z.tanh_()
    o.sigmoid_()
    c = memories(state[1:], f, (i * z).unsqueeze(0))[0]
    squashed = torch.tanh(c[1:])
    to_c = (o * (1 - squashed * squashed)).unbind(0)
    from_x = (squashed * o * (1 - o)).unbind(0)
    from_c = torch.stack((z * i * (1 - i), c[:-1] * f * (1 - f), i * (1 - z * z)), dim=3).unbind(0)
    d_pre = torch.empty_like(pre)
    x, flat, kept = dh.unbind(0), d_pre.flatten(3).unbind(0), f.unbind(0)
    d_ifz, d_o = d_pre[..., :3, :].unbind(0), d_pre[..., 3, :].unbind(0)
    g = carry[1]
    g_to_gates = g.unsqueeze(2)
    for t in reversed(range(len(x))):
        g.addcmul_(to_c[t], x[t])
        torch.mul(g_to_gates, from_c[t], out=d_ifz[t])
        torch.mul(x[t], from_x[t], out=d_o[t])
        pass_back(t, flat, back, x, carry)
        g.mul_(kept[t])
    return d_pre
