"""The layer that S4 puts around a long filter: convolution, skip connection, GELU, gated linear unit.

Gu et al. 2022, arXiv:2111.00396; S4D, long convolutions and SGConv keep it and change the filter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.mixers.mixer import Mixer, Place, Shared, Start, carried, context_of
from seqengine.mixers.two_sided import check_no_state, taps_to_sides, two_sided_conv
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext

Taps = Callable[[slice], Tensor]
"""taps(channels) makes the filters [C, L] of a slice of channels."""


class S4Layer(Mixer):
    """y = GLU(W gelu(k (*) x + skip * x)), for a filter k that the kind of layer has.

    Without causality there is a second filter, for the tokens that follow: see `two_sided`. As published, skip and W are one.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    Raises: ValueError for a state without causality.
    """

    causal = True

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.causal = place.causal
        self.skip = nn.Parameter(torch.randn(place.d_model))
        self.out_proj = nn.Linear(place.d_model, 2 * place.d_model)

    def initialise(self) -> None:
        """As published: the output projection keeps torch's own initial values."""
        self.out_proj.reset_parameters()

    def forward(self, x: Tensor, *, state: Any = None, ctx: SequenceContext | None = None) -> tuple[Tensor, Any]:
        context = context_of(x, ctx)
        after: Any = None
        if self.causal:
            y, after = self.convolve(x.transpose(1, 2), state, context)
        else:
            check_no_state(type(self).__name__, state)
            y = self.convolve_both_ways(x.transpose(1, 2), context)
        return F.glu(self.out_proj(F.gelu(y).transpose(1, 2)), dim=-1), after

    def convolve(self, u: Tensor, state: Any, ctx: SequenceContext) -> tuple[Tensor, Any]:
        """u [B, D, T] -> k (*) u + skip * u, and the state after it."""
        raise NotImplementedError

    def convolve_both_ways(self, u: Tensor, ctx: SequenceContext) -> Tensor:
        """u [B, D, T] -> `two_sided_conv` with both filters and skip."""
        raise NotImplementedError


class FilterState(NamedTuple):
    """What a layer with explicit taps carries from one chunk to the next: exact inputs, so any cut gives the uncut result."""

    inputs: Tensor
    """[B, D, max_len - 1]."""
    taps: Shared
    """One tensor [D, max_len], made once."""


class FilterLayer(S4Layer):
    """An S4 layer whose filter is known tap by tap, and reaches over the last place.max_len tokens (and as many ahead).

    State: FilterState, O(max_len D) numbers a sample; a token then costs O(max_len D).
    """

    is_bounded = True
    is_bidirectional = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.d_model, self.max_len = place.d_model, place.max_len

    def filter(self, length: int, ctx: SequenceContext, *, backward: bool = False) -> Taps:
        """The first `length` <= max_len taps of any channels. Called without autocast, and once per forward and filter.

        backward: of the filter for the tokens that follow, which there is without causality.
        """
        raise NotImplementedError

    def convolve(
        self, u: Tensor, state: FilterState | Start | None, ctx: SequenceContext
    ) -> tuple[Tensor, FilterState | None]:
        before, goes_on = carried(state)
        if before is not None:
            k: Tensor | Taps = before.taps.tensors[0]
        else:
            length = self.max_len if goes_on else max(1, min(ctx.total_tokens, self.max_len))
            k = self._without_autocast(length, u.device.type, ctx)
            k = k(slice(0, self.d_model)) if goes_on else k
        y, inputs = parallel.long_conv(
            u,
            k,
            ctx=ctx,
            skip=self.skip,
            initial_state=None if before is None else before.inputs,
            output_final_state=goes_on,
        )
        if inputs is None or not isinstance(k, Tensor):
            return y, None
        return y, FilterState(inputs, Shared((k,)))

    def convolve_both_ways(self, u: Tensor, ctx: SequenceContext) -> Tensor:
        before, ahead = taps_to_sides(ctx.total_tokens, self.max_len)
        every = slice(0, self.d_model)
        k = self._without_autocast(before, u.device.type, ctx)(every)
        k_backward = self._without_autocast(ahead, u.device.type, ctx, backward=True)(every)
        return two_sided_conv(u, k, k_backward, ctx=ctx, skip=self.skip)

    def _without_autocast(self, length: int, device: str, ctx: SequenceContext, *, backward: bool = False) -> Taps:
        with torch.autocast(device, enabled=False):
            taps = self.filter(length, ctx, backward=backward)

        def exact(channels: slice) -> Tensor:
            with torch.autocast(device, enabled=False):
                return taps(channels)

        return exact
