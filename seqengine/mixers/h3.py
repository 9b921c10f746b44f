"""H3: a shift state-space model and a diagonal one between three projections. Fu et al. 2022, arXiv:2212.14052."""

from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from seqengine.config.values import Section
from seqengine.mixers.diagonal import (
    LR_MOST,
    DiagonalSSM,
    Discretisation,
    Initialisation,
    diagonal_rules,
    initial_poles,
)
from seqengine.mixers.mixer import Mixer, ParameterRule, Place, Start, carried, context_of
from seqengine.mixers.projection import channels_first
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext


class H3Config(Section):
    """[model.mixers.h3]: shift and diagonal state-space models between gates."""

    FORGOTTEN = frozenset({"init", "step_min", "step_max"})

    d_state: Annotated[int, Field(ge=2)] = 64
    """States of each system: taps of the shift filter, and twice the complex modes of the diagonal one; even."""
    head_dim: Annotated[int, Field(ge=1)] = 1
    """Channels of a head: with d, a head carries the d * d products of its keys and values."""
    init: Initialisation = "lin"
    """Initial poles of the diagonal system: S4D-Lin, S4D-Inv or S4D-LegS."""
    discretisation: Discretisation = "bilinear"
    """How the diagonal system is sampled: bilinear (as published) or zoh."""
    step_min: Annotated[float, Field(gt=0.0)] = 0.001
    """Smallest initial time step."""
    step_max: Annotated[float, Field(gt=0.0)] = 0.1
    """Largest initial time step."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.d_state % 2:
            raise ValueError(f"d_state must be even (conjugate pairs of modes); got {self.d_state}")
        if self.step_min > self.step_max:
            raise ValueError(f"step_min must not be above step_max; got {self.step_min} > {self.step_max}")
        return self


class ShiftSSM(nn.Module):
    """A state that holds the last N inputs, as a filter of N taps: k[t] = sum_j B[j] C[j + t].

    B begins as the first unit vector, which makes C the taps; C as the weights of a Conv1d of N taps.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        B = torch.zeros(channels, taps)
        B[:, 0] = 1.0
        self.B = nn.Parameter(B)
        self.C = nn.Parameter(torch.empty(channels, taps).uniform_(-(taps**-0.5), taps**-0.5))

    def filter(self) -> Tensor:
        """[D, N]: the correlation of C with B, by FFT of 2 N points, so that nothing wraps around."""
        taps = self.B.shape[1]
        spectrum = torch.fft.rfft(self.B, n=2 * taps).conj() * torch.fft.rfft(self.C, n=2 * taps)
        k: Tensor = torch.fft.irfft(spectrum, n=2 * taps)
        return k[:, :taps]


class H3State(NamedTuple):
    """What an H3 layer carries from one chunk to the next."""

    shift: Tensor
    """[B, D, d_state - 1]: the last keys."""
    modes: Tensor
    """[B, head_dim ** 2, D / head_dim, d_state / 2], complex: the diagonal system."""


class H3(Mixer):
    """y = W_out (q * SSM_diagonal(SSM_shift(k) * v)), with skip connections around both systems.

    With head_dim d the products of keys and values are outer products of d channels each, which H = D / d systems
    carry, and q reads out: y_j = sum_i q_i SSM(k_i v_j). Channel h d + i of q, k and v is channel i of head h; channel
    j H + h of what is put out is channel j of head h. The published layer does it this way.

    Shapes: x [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  H3State, O(d_state d D) numbers a sample, whatever came before.
    Raises: ValueError if head_dim does not divide d_model.
    """

    keeps_documents_apart = False

    rules = {"shift.B": ParameterRule(weight_decay=0.0, lr_most=LR_MOST)} | diagonal_rules("ssm")

    def __init__(self, config: H3Config, place: Place) -> None:
        super().__init__()
        d_model, d = place.d_model, config.head_dim
        if d_model % d:
            raise ValueError(f"h3: head_dim must divide d_model = {d_model}; got {d}")
        self.head_dim, self.heads = d, d_model // d
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.shift = ShiftSSM(d_model, config.d_state)
        self.shift_skip = nn.Parameter(torch.randn(d_model))
        self.ssm = DiagonalSSM(
            self.heads,
            initial_poles(config.init, config.d_state),
            discretisation=config.discretisation,
            step_min=config.step_min,
            step_max=config.step_max,
        )
        self.skip = nn.Parameter(torch.randn(self.heads))
        self.out_proj = nn.Linear(d_model, d_model)

    def initialise(self) -> None:
        """The published models do not scale the output projection down with the depth."""
        nn.init.normal_(self.out_proj.weight, std=0.02)

    def forward(
        self, x: Tensor, *, state: H3State | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, H3State | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)
        q, k, v = channels_first(x, self.in_proj).chunk(3, dim=1)
        with torch.autocast(x.device.type, enabled=False):
            taps = self.shift.filter()
        k, shift = parallel.long_conv(
            k,
            taps,
            ctx=context,
            skip=self.shift_skip,
            initial_state=None if before is None else before.shift,
            output_final_state=goes_on,
        )
        y, modes = self._memory(q, k, v, None if before is None else before.modes, goes_on, context)
        y = self.out_proj(y.transpose(1, 2))
        return y, (None if shift is None or modes is None else H3State(shift, modes))

    def _memory(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, goes_on: bool, ctx: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """q, k, v [B, D, T] -> what q reads of the products of k and v [B, D, T], and the state of the modes."""
        log_poles, residues = self.ssm.modes()
        B, D, T = v.shape
        d, H = self.head_dim, self.heads
        u = v
        if d > 1:
            q, k, v = (z.reshape(B, H, d, T).transpose(1, 2) for z in (q, k, v))
            u = (k[:, :, None] * v[:, None]).reshape(B * d * d, H, T)
        y, after = parallel.modal_conv(
            u,
            log_poles,
            residues,
            ctx=ctx,
            skip=self.skip,
            pre_gate=k if d == 1 else None,
            post_gate=q if d == 1 else None,
            initial_state=None if state is None else state.flatten(0, 1),
            output_final_state=goes_on,
        )
        if d > 1:
            y = (y.reshape(B, d, d, H, T) * q[:, :, None]).sum(dim=1).reshape(B, D, T)
        return y, (None if after is None else after.reshape(B, d * d, H, -1))
