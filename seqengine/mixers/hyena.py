"""The Hyena operator with its implicit filter, as in HyenaDNA.

Poli et al. 2023, arXiv:2302.10866 (operator, filter); Nguyen et al. 2023, arXiv:2306.15794 (the DNA model's sizes).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from seqengine.config.values import Section
from seqengine.mixers.mixer import Mixer, Place, Shared, Start, carried, context_of
from seqengine.mixers.projection import channels_first
from seqengine.mixers.two_sided import check_no_state, taps_to_sides, two_sided_conv
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError("must be odd (time, and pairs of cosine and sine)")
    return number


class FilterConfig(Section):
    """[model.filter]: the implicit long filter."""

    FORGOTTEN = frozenset({"sine_w"})

    order: Annotated[int, Field(gt=0)] = 64
    """Width of the filter's network."""
    emb_dim: Annotated[int, Field(ge=3), AfterValidator(_odd)] = 5
    """Positional features: time, and (emb_dim - 1) / 2 cosines and sines; odd."""
    sine_w: float = 10.0
    """Initial frequency of the sine activations."""
    inner_layers: Annotated[int, Field(ge=0)] = 2
    """Hidden layers after the first."""
    modulate: bool = True
    """Multiply the filters by the exponential window."""
    shift: float = 0.05
    """Floor of the exponential window."""


class HyenaConfig(Section):
    """[model.mixers.hyena]: gates and implicit long filters."""

    order: Annotated[int, Field(ge=2)] = 2
    """Order N of the operator: N gates, N - 1 long convolutions."""
    short_filter: Annotated[int, Field(gt=0)] = 3
    """Taps of the short convolution."""
    filter: FilterConfig = FilterConfig()
    """The implicit long filter."""

    @property
    def is_told_by_max_len(self) -> bool:
        return True


FAST_DECAY, SLOW_DECAY, DECAY_TARGET = 0.3, 1.5, 1e-2
"""The window of the fastest channel falls to DECAY_TARGET after 0.3 of l_max, that of the slowest would after 1.5."""


def positional_features(l_max: int, emb_dim: int) -> Tensor:
    """z [l_max, emb_dim] float64: time in [0, 1], then cos and -sin of (emb_dim - 1) / 2 frequencies."""
    bands = (emb_dim - 1) // 2
    time = torch.linspace(0, 1, l_max, dtype=torch.float64)[:, None]
    angle = 2 * math.pi * torch.arange(l_max, dtype=torch.float64)[:, None] / l_max
    frequency = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)[None]
    return torch.cat([time, torch.cos(frequency * angle), -torch.sin(frequency * angle)], dim=1)


class ImplicitFilter(nn.Module):
    """k[c, t] = MLP(z_t)[c] * (exp(-decay_c t / (l_max - 1)) + shift): filters as a function of time.

    The filters depend on l_max: a model asked for fewer taps cuts them, it does not squeeze them. All sine activations
    share one trained frequency per hidden unit. Computed in float32 at least, whatever autocast says.
    two_sided: also filters for what follows, of a network of their own with the same features, frequencies and window, as in
    Monarch Mixer.
    """

    z: Tensor
    decay: Tensor

    def __init__(self, channels: int, l_max: int, config: FilterConfig, *, two_sided: bool = False) -> None:
        super().__init__()
        self.channels, self.l_max = channels, l_max
        self.modulate, self.shift = config.modulate, config.shift
        widths = [config.emb_dim] + [config.order] * (config.inner_layers + 1)
        self.hidden_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.output = nn.Linear(config.order, channels, bias=False)
        self.frequency = nn.Parameter(torch.full((config.order,), config.sine_w))
        self.backward_layers: nn.ModuleList | None = None
        self.backward_output: nn.Linear | None = None
        if two_sided:
            self.backward_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
            self.backward_output = nn.Linear(config.order, channels, bias=False)
        self.register_buffer("z", torch.empty(l_max, config.emb_dim), persistent=False)
        self.register_buffer("decay", torch.empty(channels), persistent=False)
        self.compute_features()

    def compute_features(self) -> None:
        """Fill z and decay, computed in float64 and rounded once to the weights' dtype."""
        dtype = self.output.weight.dtype
        self.z = positional_features(*self.z.shape).to(dtype)
        fast, slow = math.log(DECAY_TARGET) / FAST_DECAY, math.log(DECAY_TARGET) / SLOW_DECAY
        self.decay = torch.linspace(slow, fast, self.channels, dtype=torch.float64).abs().to(dtype)

    def set_buffer(self, name: str, value: Tensor, *, trained: bool) -> None:
        """Replace z [l_max, emb_dim] or decay [channels]; what was trained is saved with the weights from now on."""
        self.register_buffer(name, value.to(getattr(self, name)), persistent=trained)

    def hidden(self, length: int, *, backward: bool = False) -> Tensor:
        """[length, order]: the last hidden layer, shared by all channels; backward: of the network for what follows."""
        if length > self.l_max:
            raise ValueError(f"ImplicitFilter: at most l_max={self.l_max} taps; got {length}. Raise model.max_len.")
        h = self.z[:length].to(self.output.weight.dtype)
        layers = self.backward_layers if backward else self.hidden_layers
        assert layers is not None
        for layer in layers:
            h = torch.sin(self.frequency * layer(h))
        return h

    def taps(self, hidden: Tensor, channels: slice, *, backward: bool = False) -> Tensor:
        """[C, length]: the filters of some channels, for `hidden` of the same network."""
        output = self.backward_output if backward else self.output
        assert output is not None
        k = output.weight[channels] @ hidden.T
        if not self.modulate:
            return k
        time = self.z[: hidden.shape[0], 0]
        return k * (torch.exp(-self.decay[channels, None] * time) + self.shift).to(k.dtype)


class HyenaState(NamedTuple):
    """What a Hyena operator carries from one chunk to the next: exact inputs, so any cut gives the uncut result."""

    short: Tensor
    """[B, (order + 1) D, short_filter - 1]."""
    long: tuple[Tensor, ...]
    """order - 1 tensors [B, D, l_max - 1]: the gated inputs of each long convolution."""
    filters: Shared
    """order - 1 tensors [D, l_max], made once."""


class Convolution(Protocol):
    """A long convolution of an operator, by its number: with gates and skip, from its state to the next."""

    def __call__(self, i: int, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]: ...


class HyenaOperator(Mixer):
    """Projections, short convolution and gates of a Hyena operator; what its long convolutions are is said to `mix`."""

    d_model: int
    order: int
    in_proj: nn.Linear
    out_proj: nn.Linear
    short_filter_weight: nn.Parameter
    short_filter_bias: nn.Parameter
    filter_skip: nn.Parameter

    def mix(
        self, x: Tensor, convolve: Convolution, short_state: Tensor | None, goes_on: bool, ctx: SequenceContext
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """y, and if it goes on the states of the short and of the long convolutions."""
        u, short = parallel.short_conv(
            channels_first(x, self.in_proj),
            self.short_filter_weight,
            self.short_filter_bias,
            ctx=ctx,
            initial_state=short_state,
            output_final_state=goes_on,
        )
        *gates, v = u.split(self.d_model, dim=1)
        states: list[Tensor] = []
        for i, gate in enumerate(reversed(gates[1:])):
            v, after = convolve(
                i,
                v,
                ctx=ctx,
                skip=self.filter_skip[i * self.d_model : (i + 1) * self.d_model],
                pre_gate=gate,
                post_gate=gates[0] if i == self.order - 2 else None,
                output_final_state=goes_on,
            )
            states += [] if after is None else [after]
        return self.out_proj(v.transpose(1, 2)), short, tuple(states)


class Hyena(HyenaOperator):
    """y = W_out (x_0 * (h_{N-1} (*) x_{N-1} ( ... h_1 (*) (x_1 v)))): order N gates and N - 1 long convolutions.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  HyenaState, O(l_max D) numbers a sample; a token then costs O(l_max D).
    The filters' bias enters as a skip connection of each convolution.

    Without causality each long convolution has a second filter, for the tokens that follow: see `two_sided`. As in the Hyena of
    Monarch Mixer (Fu et al. 2023, arXiv:2310.12109) it is made by a second network, and the short convolution stays causal.
    Two sides at an order N > 2 are ours. The option of HyenaDNA's code, one causal filter and inputs moved by half of their
    length, is not this.
    Raises: ValueError for a state without causality.
    """

    is_bounded = True
    is_bidirectional = True

    def __init__(self, config: HyenaConfig, place: Place) -> None:
        super().__init__()
        d_model, order, taps = place.d_model, config.order, config.short_filter
        self.d_model, self.l_max, self.order = d_model, place.max_len, order
        self.causal = place.causal
        width, bound = (order + 1) * d_model, taps**-0.5
        self.in_proj = nn.Linear(d_model, width)
        self.short_filter_weight = nn.Parameter(torch.empty(width, taps).uniform_(-bound, bound))
        self.short_filter_bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound))
        channels = (order - 1) * d_model
        self.filter = ImplicitFilter(channels, place.max_len, config.filter, two_sided=not place.causal)
        self.filter_skip = nn.Parameter(torch.randn((order - 1) * d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self, x: Tensor, *, state: HyenaState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, HyenaState | None]:
        context = context_of(x, ctx)
        if not self.causal:
            check_no_state("Hyena", state)
            return self._both_ways(x, context), None
        before, goes_on = carried(state)
        filters = self._filters(context, before, goes_on)

        def convolve(i: int, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
            return parallel.long_conv(
                v, filters[i], initial_state=None if before is None else before.long[i], **settings
            )

        y, short, long = self.mix(x, convolve, None if before is None else before.short, goes_on, context)
        if short is None:
            return y, None
        return y, HyenaState(short, long, Shared(tuple(k for k in filters if isinstance(k, Tensor))))

    def _both_ways(self, x: Tensor, ctx: SequenceContext) -> Tensor:
        before, ahead = taps_to_sides(ctx.total_tokens, ctx.total_tokens)
        taps, taps_backward = self._taps(before), self._taps(ahead, backward=True)
        every = slice(0, self.d_model)

        def convolve(i: int, v: Tensor, **settings: Any) -> tuple[Tensor, None]:
            del settings["output_final_state"]
            return two_sided_conv(v, taps(i)(every), taps_backward(i)(every), **settings), None

        return self.mix(x, convolve, None, False, ctx)[0]

    def _filters(
        self, ctx: SequenceContext, before: HyenaState | None, goes_on: bool
    ) -> list[Tensor] | list[Callable[[slice], Tensor]]:
        """Of each convolution: as tensors when there is a state to keep them in, else as functions of channels."""
        if before is not None:
            return list(before.filters.tensors)
        taps = self._taps(self.l_max if goes_on else ctx.total_tokens)
        if goes_on:
            return [taps(i)(slice(0, self.d_model)) for i in range(self.order - 1)]
        return [taps(i) for i in range(self.order - 1)]

    def _taps(self, length: int, *, backward: bool = False) -> Callable[[int], Callable[[slice], Tensor]]:
        """taps(i)(channels) makes the filters of some channels of convolution i; the shared network runs once.

        A rank that holds a few channels makes only their filters.
        """
        with torch.autocast(self.filter.z.device.type, enabled=False):
            hidden = self.filter.hidden(length, backward=backward)

        def of_convolution(i: int) -> Callable[[slice], Tensor]:
            def of_channels(channels: slice) -> Tensor:
                with torch.autocast(hidden.device.type, enabled=False):
                    start = i * self.d_model
                    rows = slice(start + channels.start, start + channels.stop)
                    return self.filter.taps(hidden, rows, backward=backward)

            return of_channels

        return of_convolution
