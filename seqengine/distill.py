"""Distillation: long filters that are known tap by tap become modal filters, and a token costs O(modes), not O(max_len).

Massaroli et al. 2023, arXiv:2310.18780. For a filter k a distilled mixer has k^[s] = Re sum_n r_n lambda_n^s at lags s >= 1,
and the exact tap at lag 0 in its skip connection. Its state has N complex numbers a channel in place of max_len - 1 inputs.
The error is measured over the whole length, with the modes as they are stored: see `FilterErrors`.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqengine.kernels.api import modal_filter
from seqengine.mixers.diagonal import COMPLEX
from seqengine.mixers.hyena import Hyena, HyenaOperator
from seqengine.mixers.mixer import Mixer, Start, carried, context_of
from seqengine.mixers.s4_layer import FilterLayer, S4Layer
from seqengine.mixers.striped import undecayed
from seqengine.modal_fit import Modes, fit
from seqengine.model import LanguageModel
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext

MAX_ORDER = 64
"""Modes of a filter that `distill` tries at most, unless told otherwise."""
CUTOFF = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Of the fit, by the dtype of what is stored: larger residues would cancel to less than their rounding."""


class FilterErrors(NamedTuple):
    """How far the modal filters of one convolution are from the filters k they stand for: [D] each, float64."""

    layer: int
    mixer: str
    convolution: int
    """Which of the layer's."""
    order: int
    """Modes N."""
    length: int
    """Taps of k."""
    relative_l2: Tensor
    """||k - k^|| / ||k|| over lags >= 1."""
    largest_tap: Tensor
    """max |k - k^|."""
    sum_abs: Tensor
    """sum |k - k^|: times the largest input of the convolution it bounds the error of any of its outputs, beyond rounding."""

    def describe(self) -> str:
        l2, tap, total = (float(x.max()) for x in (self.relative_l2, self.largest_tap, self.sum_abs))
        return (
            f"layer {self.layer} ({self.mixer}), convolution {self.convolution}: {self.order} modes for {self.length} taps; "
            f"errors at most: {l2:.2e} relative l2, {tap:.2e} of a tap, {total:.2e} of an output for inputs up to 1"
        )


class DistillReport(NamedTuple):
    """The errors of every convolution that was replaced, from the first layer to the last."""

    filters: tuple[FilterErrors, ...]

    @property
    def relative_l2(self) -> float:
        """Of the worst filter."""
        return max(float(f.relative_l2.max()) for f in self.filters)

    def describe(self) -> str:
        return "\n".join(f.describe() for f in self.filters)


class ModalFilters(nn.Module):
    """Modes of C filters, stored as `Modes` rounded to dtype; decays as logarithms, so that training cannot make them grow."""

    def __init__(self, modes: Modes, dtype: torch.dtype) -> None:
        super().__init__()
        self.log_decay = nn.Parameter((-modes.log_poles.real).log().to(dtype))
        self.frequency = nn.Parameter(modes.log_poles.imag.to(dtype))
        self.residues = nn.Parameter(torch.view_as_real(modes.residues).to(dtype))

    def modes(self, channels: slice) -> tuple[Tensor, Tensor]:
        """(log_poles, residues) [C, N] of some filters for `modal_conv`; complex64, or complex128 if stored as float64."""
        log_poles = torch.complex(-self.log_decay[channels].double().exp(), self.frequency[channels].double())
        residues = torch.view_as_complex(self.residues[channels].double())
        dtype = COMPLEX[self.log_decay.dtype]
        return log_poles.to(dtype), residues.to(dtype)

    def taps(self, length: int) -> Tensor:
        """[C, length] float64: the filters as they are convolved with."""
        log_poles, residues = self.modes(slice(None))
        return modal_filter(log_poles.to(torch.complex128), residues.to(torch.complex128), length)


class ModalHyenaState(NamedTuple):
    """What a distilled Hyena operator carries; its size does not depend on max_len."""

    short: Tensor
    """[B, (order + 1) D, short_filter - 1]."""
    modes: tuple[Tensor, ...]
    """order - 1 tensors [B, D, N], complex."""


class ModalHyena(HyenaOperator):
    """The Hyena operator with modal long filters. Takes over the weights of `hyena`.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  ModalHyenaState, O(N D) numbers a sample; a token then costs O(N D).
    """

    is_bounded = True  # beyond, the errors are not known
    rules = undecayed("filter.*")

    def __init__(self, hyena: Hyena, filter: ModalFilters, skip: Tensor) -> None:
        super().__init__()
        self.d_model, self.order = hyena.d_model, hyena.order
        self.in_proj, self.out_proj = hyena.in_proj, hyena.out_proj
        self.short_filter_weight, self.short_filter_bias = hyena.short_filter_weight, hyena.short_filter_bias
        self.filter, self.filter_skip = filter, nn.Parameter(skip)

    def forward(
        self, x: Tensor, *, state: ModalHyenaState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, ModalHyenaState | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)

        def convolve(i: int, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
            modes = self.filter.modes(slice(i * self.d_model, (i + 1) * self.d_model))
            return parallel.modal_conv(v, *modes, initial_state=None if before is None else before.modes[i], **settings)

        y, short, states = self.mix(x, convolve, None if before is None else before.short, goes_on, context)
        return y, None if short is None else ModalHyenaState(short, states)


class ModalLayerState(NamedTuple):
    """What a distilled S4 layer carries."""

    modes: Tensor
    """[B, D, N], complex."""


class ModalLayer(S4Layer):
    """The layer of `long_conv` and `sgconv` with a modal filter. Takes over the weights of `layer`.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  ModalLayerState, O(N D) numbers a sample; a token then costs O(N D).
    """

    is_bounded = True
    rules = undecayed("filter.*")

    def __init__(self, layer: FilterLayer, filter: ModalFilters, skip: Tensor) -> None:
        Mixer.__init__(self)
        self.skip, self.out_proj, self.filter = nn.Parameter(skip), layer.out_proj, filter

    def convolve(self, u: Tensor, state: Any, ctx: SequenceContext) -> tuple[Tensor, ModalLayerState | None]:
        before, goes_on = carried(state)
        y, after = parallel.modal_conv(
            u,
            *self.filter.modes(slice(None)),
            ctx=ctx,
            skip=self.skip,
            initial_state=None if before is None else before.modes,
            output_final_state=goes_on,
        )
        return y, None if after is None else ModalLayerState(after)


def distill(
    model: LanguageModel, *, order: int | None = None, tolerance: float | None = None, max_order: int = MAX_ORDER
) -> tuple[LanguageModel, DistillReport]:
    """A copy of the model in which all filters of max_len taps (hyena, long_conv, sgconv) are modal, and their errors.

    order:     modes of every filter. Or else
    tolerance: for each layer, a number of modes with which each of its filters has a relative l2 error of at most this, and
               one mode less has not; at most max_order.
    Dtypes:    modes are stored as the weights are; the fit is in float64, on the model's device.
    Memory:    besides the copy, the filters of one layer and tables of some times 2^22 numbers, or of one filter.
    Raises:    ValueError if the model is not causal, max_order does not reach the tolerance, no filter is that long, or not
               exactly one of order and tolerance is given.
    """
    if (order is None) == (tolerance is None):
        raise ValueError(f"distill: give either order or tolerance; got {order} and {tolerance}.")
    if not model.config.causal:
        raise ValueError("distill: the model must be causal (model.causal = true); modal filters see the past alone.")
    if (order is not None and order < 1) or (tolerance is not None and not tolerance > 0.0) or max_order < 1:
        raise ValueError(
            f"distill: order and max_order must be at least 1, tolerance above 0; got {order}, {max_order}, {tolerance}."
        )
    distilled = copy.deepcopy(model).eval()
    found: list[FilterErrors] = []
    with torch.no_grad():
        for layer, block in enumerate(distilled.each_block()):
            if isinstance(block.mixer, Hyena | FilterLayer):
                name = model.config.mixer_names[layer]
                block.mixer, errors = _distilled(block.mixer, order, tolerance, max_order, f"layer {layer} ({name})")
                found += [FilterErrors(layer, name, i, *of_filters) for i, of_filters in enumerate(errors)]
    if not found:
        names = ", ".join(dict.fromkeys(model.config.mixer_names))
        raise ValueError(f"distill: the model must have filters of max_len taps; its mixers have none: {names}.")
    return distilled.train(model.training), DistillReport(tuple(found))


def _distilled(
    mixer: Hyena | FilterLayer, order: int | None, tolerance: float | None, max_order: int, what: str
) -> tuple[Mixer, list[tuple[int, int, Tensor, Tensor, Tensor]]]:
    """The mixer with modal filters, and the fields of `FilterErrors` from `order` on, of each convolution."""
    dtype = torch.promote_types(mixer.out_proj.weight.dtype, torch.float32)
    if isinstance(mixer, Hyena):
        old_skip = mixer.filter_skip
        k = mixer.filter.taps(mixer.filter.hidden(mixer.l_max), slice(0, mixer.filter.channels)).double()
    else:
        old_skip = mixer.skip
        k = mixer.filter(mixer.max_len, SequenceContext.single(mixer.max_len))(slice(0, mixer.d_model)).double()
    if order is not None:
        filters = _fitted(k, order, 0.0, dtype)
    else:
        assert tolerance is not None
        filters = _smallest(k, tolerance, max_order, dtype, what)
    found = filters.taps(k.shape[1])
    skip = (old_skip.double() + k[:, 0] - found[:, 0]).to(old_skip.dtype)
    difference = found - k
    difference[:, 0] += skip.double() - old_skip.double()  # nothing but rounding
    of_filter = (_relative(found, k), difference.abs().amax(dim=1), difference.abs().sum(dim=1))
    size = (filters.log_decay.shape[1], k.shape[1])
    errors = [(*size, *columns) for columns in zip(*(x.split(mixer.d_model) for x in of_filter), strict=True)]
    new = ModalHyena(mixer, filters, skip) if isinstance(mixer, Hyena) else ModalLayer(mixer, filters, skip)
    return new.eval(), errors


def _fitted(k: Tensor, order: int, goal: float, dtype: torch.dtype) -> ModalFilters:
    """k [C, L] float64, lag 0 first and not looked at."""
    if k.shape[1] == 1:
        one = torch.ones(k.shape[0], order, dtype=torch.complex128, device=k.device)
        return ModalFilters(Modes(-one, 0 * one), dtype)
    return ModalFilters(fit(k[:, 1:], order, cutoff=CUTOFF[dtype], goal=goal), dtype)


def _relative(found: Tensor, k: Tensor) -> Tensor:
    """[C]: l2 errors over lags >= 1, of a filter that is zero there 0 or infinite."""
    error, size = (found - k)[:, 1:].norm(dim=1), k[:, 1:].norm(dim=1)
    return torch.where(error == 0, 0.0, error / size)


def _smallest(k: Tensor, tolerance: float, max_order: int, dtype: torch.dtype, what: str) -> ModalFilters:
    """By doubling and halving. The filter that was worst before is asked first, and the others only if it is content."""
    hardest = 0

    def attempt(order: int) -> tuple[ModalFilters | None, float]:
        nonlocal hardest
        errors = k.new_zeros(0)
        for rows in (slice(hardest, hardest + 1), slice(None)):
            filters = _fitted(k[rows], order, tolerance / 2, dtype)
            errors = _relative(filters.taps(k.shape[1]), k[rows])
            if not float(errors.max()) <= tolerance:
                hardest = hardest if rows.start is not None else int(errors.argmax())
                return None, float(errors.max())
        return filters, float(errors.max())

    low, high = 0, 1
    best, error = attempt(high)
    while best is None:
        if high == max_order:
            raise ValueError(
                f"distill: {what} must reach tolerance {tolerance:g} with at most max_order = {max_order} modes; a filter has "
                f"a relative error of {error:.2e} then. Allow a larger error, or more modes."
            )
        low, high = high, min(2 * high, max_order)
        best, error = attempt(high)
    while high - low > 1:
        middle = (low + high) // 2
        filters, _ = attempt(middle)
        if filters is None:
            low = middle
        else:
            high, best = middle, filters
    return best
