"""What mixers of the linear attention family share: inputs of heads, the norm of their outputs, decays made from the input."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.errors import InputError
from seqengine.mixers.mixer import ParameterRule
from seqengine.mixers.projection import channels_first
from seqengine.parallel import api as parallel
from seqengine.parallel.context import SequenceContext


def head_width(mixer: str, key: str, expand: float, d_model: int, heads: int) -> int:
    """Width of each of `heads` heads that share expand * d_model channels. Raises InputError if they cannot."""
    channels = int(d_model * expand)
    if channels < heads or channels % heads:
        raise InputError(
            f"model.mixers.{mixer}: {key} * model.d_model = {channels} channels must be a multiple of num_heads = {heads}; "
            f"change num_heads, {key} or model.d_model."
        )
    return channels // heads


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * K] -> [B, T, H, K]."""
    y: Tensor = x.unflatten(-1, (heads, x.shape[-1] // heads))
    return y


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """[B, T, H, K] -> [B, T, H * times, K], each head `times` times in a row; one head is not copied."""
    if times == 1:
        return x
    return x.unsqueeze(3).expand(-1, -1, -1, times, -1).flatten(2, 3)


def exact(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is: for what must not be rounded to half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HeadInputs(nn.Module):
    """One projection into several tensors; with taps > 0, each channel then goes through a short convolution and SiLU.

    Shapes: x [B, T, D] -> [B, T, W] for each W of widths, and a state [B, sum(widths), max(taps - 1, 0)].
    """

    def __init__(
        self, d_model: int, widths: Sequence[int], taps: int = 0, *, bias: bool = False, conv_bias: bool = False
    ) -> None:
        super().__init__()
        self.widths, self.taps, channels = list(widths), taps, sum(widths)
        self.proj = nn.Linear(d_model, channels, bias=bias)
        bound = max(taps, 1) ** -0.5  # torch's rule for convolutions

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

        self.conv_weight = uniform(channels, taps) if taps else None
        self.conv_bias = uniform(channels) if taps and conv_bias else None

    def forward(
        self, x: Tensor, ctx: SequenceContext, before: Tensor | None, goes_on: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """The tensors and, if it goes on, the state after them; before: the state to begin with."""
        if self.conv_weight is None:
            state = x.new_empty(x.shape[0], sum(self.widths), 0) if goes_on else None
            return list(self.proj(x).split(self.widths, dim=-1)), state
        y, after = parallel.short_conv(
            channels_first(x, self.proj),
            self.conv_weight,
            self.conv_bias,
            ctx=ctx,
            activation="silu",
            initial_state=before,
            output_final_state=goes_on,
        )
        return list(y.transpose(1, 2).split(self.widths, dim=-1)), after


class HeadNorm(nn.Module):
    """RMSNorm over the last of some dims, then times silu(gate); in float32 at least. weight has all the dims, or is not."""

    weight: nn.Parameter | None

    def __init__(self, *dims: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(dims)) if affine else None)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x, gate [..., *dims] -> the same, in the dtype of x."""
        weight = None if self.weight is None else exact(self.weight)
        is_vector = weight is not None and weight.ndim == 1
        y = F.rms_norm(exact(x), x.shape[-1:], weight if is_vector else None, self.eps)
        if weight is not None and not is_vector:
            y = y * weight
        if gate is not None:
            y = y * F.silu(exact(gate))
        return y.to(x.dtype)


DT_MIN, DT_MAX = 1e-3, 0.1
"""Initial step sizes are log-uniform between these."""
DECAY_RULES = {"decay.A_log": ParameterRule(weight_decay=0.0), "decay.dt_bias": ParameterRule(weight_decay=0.0)}
"""As published for Mamba-2; of a mixer whose `InputDecay` is called decay."""


class InputDecay(nn.Module):
    """dt = softplus(logits + dt_bias) and the log decay -exp(A_log) dt of every token and head, in float32 at least.

    Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): A = exp(A_log) uniform in (low, high] at first.
    """

    def __init__(self, heads: int, low: float, high: float) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.log(high - (high - low) * torch.rand(heads)))
        dt = torch.exp(torch.empty(heads).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [B, T, H] -> (dt, log decay) [B, T, H]."""
        dt = F.softplus(exact(logits) + self.dt_bias)
        return dt, -torch.exp(exact(self.A_log)) * dt
