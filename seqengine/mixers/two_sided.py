"""Filters to both sides, for mixers of models that see the whole sequence.

y[t] = sum_s k[s] x[t - s] + sum_s k_backward[s] x[t + 1 + s]: tap s of the second filter stands at the token s + 1 ahead, so
that lag 0 is in the first alone. That is what the code of S4 (Gu et al. 2022, arXiv:2111.00396), SGConv (Li et al. 2022,
arXiv:2210.09298), long convolutions (Fu et al. 2023, arXiv:2302.06646) and Monarch Mixer (Fu et al. 2023, arXiv:2310.12109)
does: L taps to each side, the second of them reversed, in a window of 2 L positions.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext


def two_sided_conv(
    u: Tensor,
    k: Tensor,
    k_backward: Tensor,
    *,
    ctx: SequenceContext,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
) -> Tensor:
    """u [B, D, T], k [D, L], k_backward [D, M], M >= 0 -> y [B, D, T]; gates and skip as in `long_conv_bidirectional`.

    With ctx, T is this rank's part; each rank makes the filters of all channels.
    """
    ahead = F.pad(k_backward, (1, 0))
    return parallel.long_conv_bidirectional(u, k, ahead, ctx=ctx, skip=skip, pre_gate=pre_gate, post_gate=post_gate)


def taps_to_sides(tokens: int, most: int) -> tuple[int, int]:
    """(taps of the filter on what came before, of that on what follows) that `tokens` tokens need, each at most `most`."""
    return max(1, min(tokens, most)), max(0, min(tokens - 1, most))


def check_no_state(name: str, state: Any) -> None:
    """Raises ValueError for a state: what follows is not known yet."""
    if state is not None:
        raise ValueError(f"{name}: a state can be carried only with causal filters.")
