"""S4D: one diagonal state-space model per channel. Gu et al. 2022, arXiv:2206.11893."""

from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from seqengine.config.values import Section
from seqengine.mixers.diagonal import DiagonalSSM, Discretisation, Initialisation, diagonal_rules, initial_poles
from seqengine.mixers.mixer import Place, Start, carried
from seqengine.mixers.s4_layer import S4Layer
from seqengine.mixers.two_sided import taps_to_sides, two_sided_conv
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext


class DiagonalConfig(Section):
    """What every layer of diagonal state-space models has."""

    FORGOTTEN = frozenset({"init", "step_min", "step_max"})

    d_state: Annotated[int, Field(ge=1)] = 64
    """States of each channel's system."""
    discretisation: Discretisation = "zoh"
    """How the system is sampled: zoh (inputs held between samples) or bilinear."""
    step_min: Annotated[float, Field(gt=0.0)] = 0.001
    """Smallest initial time step: its inverse is the longest initial memory, in tokens."""
    step_max: Annotated[float, Field(gt=0.0)] = 0.1
    """Largest initial time step."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.step_min > self.step_max:
            raise ValueError(f"step_min must not be above step_max; got {self.step_min} > {self.step_max}")
        return self


class S4DConfig(DiagonalConfig):
    """[model.mixers.s4d]: diagonal state-space models, conjugate pairs of modes."""

    init: Initialisation = "lin"
    """Initial poles: S4D-Lin, S4D-Inv or S4D-LegS."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.d_state % 2:
            raise ValueError(f"d_state must be even (conjugate pairs of modes); got {self.d_state}")
        return self


class ModalState(NamedTuple):
    """What a layer of diagonal systems carries from one chunk to the next."""

    modes: Tensor
    """[B, D, modes], complex."""


class DiagonalLayer(S4Layer):
    """An S4 layer whose filters are diagonal state-space models. State: ModalState, O(modes D) numbers a sample.

    Without causality the same systems also run from the last token to the first, read by a C of their own, and the filters are
    made tap by tap, 2 T D numbers: T taps for what came before and T - 1 for what follows.
    """

    keeps_documents_apart = False

    is_bidirectional = True
    rules = diagonal_rules("ssm")

    def __init__(self, ssm: DiagonalSSM, place: Place) -> None:
        super().__init__(place)
        self.ssm = ssm

    def convolve(
        self, u: Tensor, state: ModalState | Start | None, ctx: SequenceContext
    ) -> tuple[Tensor, ModalState | None]:
        before, goes_on = carried(state)
        log_poles, residues = self.ssm.modes()
        y, modes = parallel.modal_conv(
            u,
            log_poles,
            residues,
            ctx=ctx,
            skip=self.skip,
            initial_state=None if before is None else before.modes,
            output_final_state=goes_on,
        )
        return y, (None if modes is None else ModalState(modes))

    def convolve_both_ways(self, u: Tensor, ctx: SequenceContext) -> Tensor:
        before, ahead = taps_to_sides(ctx.total_tokens, ctx.total_tokens)
        with torch.autocast(u.device.type, enabled=False):
            k, k_backward = self.ssm.filters(before, ahead)
        return two_sided_conv(u, k, k_backward, ctx=ctx, skip=self.skip)


class S4D(DiagonalLayer):
    """y = GLU(W gelu(k (*) x + skip * x)), k[t] = 2 Re sum_n C_n B_n g_n exp(p_n t) with d_state / 2 modes a channel.

    Without causality, as in the code of S4: a second C, begun as the first, makes the filter for the tokens that follow, from
    the same steps, poles and B.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  ModalState, O(d_state D) numbers a sample, whatever came before.
    Raises: ValueError for a state without causality.
    """

    def __init__(self, config: S4DConfig, place: Place) -> None:
        ssm = DiagonalSSM(
            place.d_model,
            initial_poles(config.init, config.d_state),
            discretisation=config.discretisation,
            step_min=config.step_min,
            step_max=config.step_max,
            two_sided=not place.causal,
        )
        super().__init__(ssm, place)
