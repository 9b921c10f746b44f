"""Mamba-2, the state space dual: Dao and Gu 2024, arXiv:2405.21060."""

from collections.abc import Mapping
from typing import Annotated, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.config.values import Section
from seqengine.errors import InputError
from seqengine.mixers.heads import DECAY_RULES, HeadInputs, HeadNorm, InputDecay, exact, repeat_heads, split_heads
from seqengine.mixers.mixer import Mixer, ParameterRule, Place, Start, carried, context_of
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext


class SsdConfig(Section):
    """[model.mixers.ssd]: Mamba-2."""

    FORGOTTEN = frozenset({"decay_range"})

    expand: Annotated[int, Field(gt=0)] = 2
    """Inner channels, as a multiple of d_model."""
    head_dim: Annotated[int, Field(gt=0)] = 64
    """Channels of a head; expand * d_model is a multiple of it."""
    state_size: Annotated[int, Field(gt=0)] = 128
    """Numbers of the state of every inner channel."""
    num_groups: Annotated[int, Field(gt=0)] = 1
    """Heads of a group share B and C; the norm is over each group."""
    short_filter: Annotated[int, Field(gt=0)] = 4
    """Taps of the short convolution on x, B and C."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the mean square in the norm of the outputs."""
    decay_range: tuple[float, float] = (1.0, 16.0)
    """Initial A is uniform between these two."""

    @model_validator(mode="before")
    @classmethod
    def _tuple(cls, data: object) -> object:
        """TOML has arrays where the section has a tuple."""
        if isinstance(data, dict) and isinstance(data.get("decay_range"), list):
            return {**data, "decay_range": tuple(data["decay_range"])}
        return data

    @model_validator(mode="after")
    def _range(self) -> Self:
        low, high = self.decay_range
        if not 0.0 < low <= high:
            raise ValueError(
                f"decay_range must be two numbers above 0, the smaller first; got {list(self.decay_range)}"
            )
        return self


class SsdState(NamedTuple):
    """What Mamba-2 carries; its size does not depend on how many tokens there were."""

    short: Tensor
    """[B, channels of x, B and C, short_filter - 1]."""
    recurrent: Tensor
    """[B, H, state_size, head_dim], float32 at least."""


class Ssd(Mixer):
    """S_t = exp(-A dt_t) S_{t-1} + dt_t B_t x_t^T, o_t = C_t S_t + D x_t; y = W_out norm(o * silu(z)).

    x, B, C pass a short convolution with SiLU; dt = softplus(W_dt u + bias), in float32 at least, as the decays are.
    Shapes: u [B, T, D] -> y [B, T, D]; with ctx, T is this rank's part and the result is this rank's part.
    State:  SsdState, about expand * d_model * state_size numbers a sample, which is also what a token then costs.
    """

    rules: Mapping[str, ParameterRule] = {**DECAY_RULES, "D": ParameterRule(weight_decay=0.0)}

    def __init__(self, config: SsdConfig, place: Place) -> None:
        super().__init__()
        inner = config.expand * place.d_model
        if inner % (config.head_dim * config.num_groups):
            raise InputError(
                f"model.mixers.ssd: expand * model.d_model = {inner} must be a multiple of head_dim * num_groups = "
                f"{config.head_dim} * {config.num_groups}; change head_dim, num_groups or model.d_model."
            )
        self.heads, self.groups, BC = inner // config.head_dim, config.num_groups, config.num_groups * config.state_size
        self.inputs = HeadInputs(place.d_model, (inner, BC, BC), config.short_filter, conv_bias=True)
        self.gate = nn.Linear(place.d_model, inner, bias=False)
        self.dt_proj = nn.Linear(place.d_model, self.heads, bias=False)
        self.decay = InputDecay(self.heads, *config.decay_range)
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = HeadNorm(self.groups, inner // self.groups, eps=config.norm_eps)
        self.out_proj = nn.Linear(inner, place.d_model, bias=False)

    def initialise(self) -> None:
        """Projections in keep torch's rule for linear layers, uniform within d_model ** -0.5."""
        for layer in (self.inputs.proj, self.gate, self.dt_proj):
            layer.reset_parameters()

    def forward(
        self, x: Tensor, *, state: SsdState | Start | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, SsdState | None]:
        context = context_of(x, ctx)
        before, goes_on = carried(state)
        (u, B, C), short = self.inputs(x, context, None if before is None else before.short, goes_on)
        u = split_heads(u, self.heads)
        B, C = (repeat_heads(split_heads(t, self.groups), self.heads // self.groups) for t in (B, C))
        dt, g = self.decay(self.dt_proj(x))
        o, recurrent = parallel.simple_gla(
            C,
            B,
            (u * dt[..., None]).to(u.dtype),
            g,
            ctx=context,
            scale=1.0,
            initial_state=None if before is None else before.recurrent,
            output_final_state=goes_on,
        )
        o = (exact(o) + self.D[:, None] * u).flatten(2) * F.silu(exact(self.gate(x)))
        y = self.out_proj(self.norm(split_heads(o, self.groups)).flatten(2).to(u.dtype))
        assert not isinstance(recurrent, tuple)
        return y, None if short is None or recurrent is None else SsdState(short, recurrent)
