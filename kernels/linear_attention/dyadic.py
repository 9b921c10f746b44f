"""Tokens of a chunk in halves of halves: every pair j < i meets at exactly one level, where the boundary m lies between.

At level h a chunk of C tokens is cut into blocks of 2h. A pair whose j is in the first half of a block and i in the second
has the decay

    exp(g_{j+1} + .. + g_i) = into_i out_j,    into_i = exp(g_m + .. + g_i),    out_j = exp(g_{j+1} + .. + g_{m-1}),

both at most 1 for g <= 0, and both made of the pair's own gates only: no difference of long sums, so that nothing is lost
after a gate of -1e4 and nothing is undefined after one of -inf. From one level to the next, `into` and `out` grow by one
product each. What is left is one matrix product for each level; half-blocks of 1 or 2 tokens are done elementwise.
"""

from torch import Tensor

ELEMENTWISE = 2
"""Largest half-block whose products are elementwise: a batch of 2 x 2 matrix products takes three times as long."""


def levels(chunk: int) -> list[int]:
    """Sizes of the half-blocks, 1, 2, .., chunk / 2; chunk is a power of two."""
    return [1 << i for i in range(chunk.bit_length() - 1)]


def halves(x: Tensor, h: int) -> Tensor:
    """[..., C, K] -> the view [blocks, 2, h, K]."""
    return x.view(-1, 2, h, x.shape[-1])


def grow(into: Tensor, out: Tensor, h: int) -> None:
    """From level h to level 2h, in place: decay into a token from its block's start, and out of it to its block's end."""
    i, o = halves(into, h), halves(out, h)
    o[:, 0] *= i[:, 1, -1:]
    i[:, 1] *= i[:, 0, -1:]


def scores(x: Tensor, y: Tensor) -> Tensor:
    """x y^T of [n, h, K] and [n, h, K]: [n, h, h]."""
    h = x.shape[1]
    if h > ELEMENTWISE:
        return x.bmm(y.mT)
    a = x.new_empty(x.shape[0], h, h)
    for j in range(h):
        a[:, :, j] = (x * y[:, j : j + 1]).sum(dim=-1)
    return a


def product(a: Tensor, x: Tensor) -> Tensor:
    """a x of [n, h, h] and [n, h, K]: [n, h, K]."""
    h = x.shape[1]
    if h > ELEMENTWISE:
        return a.bmm(x)
    y = a[:, :, :1] * x[:, :1]
    for j in range(1, h):
        y.addcmul_(a[:, :, j : j + 1], x[:, j : j + 1])
    return y


def add_product(y: Tensor, a: Tensor, x: Tensor) -> None:
    """y += a x, in place."""
    h = x.shape[1]
    if h > ELEMENTWISE:
        y += a.bmm(x)  # baddbmm into a strided y would go matrix by matrix
        return
    for j in range(h):
        y.addcmul_(a[:, :, j : j + 1], x[:, j : j + 1])
