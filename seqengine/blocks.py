"""A block of the residual stream: norm, mixer, norm, MLP."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seqengine.config.model import ModelConfig
from seqengine.parallel.context import SequenceContext

Drop = Callable[[Tensor, int], Tensor]


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), GPT-2's, with the tanh form of GELU."""

    def __init__(self, d_model: int, inner: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, inner, bias=bias)
        self.fc2 = nn.Linear(inner, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU, GEGLU, or bilinear (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(
        self, d_model: int, inner: int, activation: Callable[[Tensor], Tensor] | None, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(d_model, inner, bias=bias)
        self.up = nn.Linear(d_model, inner, bias=bias)
        self.down = nn.Linear(inner, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        y: Tensor = self.down((gate if self.activation is None else self.activation(gate)) * self.up(x))
        return y


class OuterRMSNorm(nn.RMSNorm):
    """x / (rms(x) + eps) * weight: nn.RMSNorm has eps under the root."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        y: Tensor = x / (rms + self.eps) * self.weight
        return y


NORMS: dict[str, Callable[..., nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "rms_outer": OuterRMSNorm}


def make_norm(config: ModelConfig) -> nn.Module:
    """The kind of norm that config.norm names, over d_model."""
    kind = NORMS[config.norm]
    return kind(config.d_model, eps=config.norm_eps)


def make_mlp(config: ModelConfig, layer: int) -> nn.Module | None:
    """The MLP of a layer, if the model has one."""
    if config.mlp == "none":
        return None
    if config.mlp == "gelu":
        return Mlp(config.d_model, config.inner, bias=config.mlp_bias)
    activation = {"swiglu": F.silu, "geglu": F.gelu, "evo2": F.gelu if layer == 0 else None}[config.mlp]
    return GatedMlp(config.d_model, config.inner, activation, bias=config.mlp_bias)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); with norms after: norm(x + mixer(x)), norm(x + mlp(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.is_pre_norm = config.norm_place == "pre"
        self.norm1 = make_norm(config)
        kind, settings, place = config.mixer(layer)
        self.mixer = kind.make(settings, place)
        mlp = make_mlp(config, layer)
        self.norm2 = None if mlp is None else make_norm(config)
        self.mlp = mlp
        self.recomputes_mlp = False
        """The insides of the MLP are made again in the backward, instead of kept."""

    def forward(
        self, x: Tensor, drop: Drop, *, state: Any = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, Any]:
        """x [B, T, D] -> the same, and the mixer's new state; drop(y, n) is applied to the n-th branch."""
        if self.is_pre_norm:
            y, state = self.mixer(self.norm1(x), state=state, ctx=ctx)
            x = x + drop(y, 0)
            if self.mlp is not None and self.norm2 is not None:
                x = x + drop(self._mlp(self.norm2(x)), 1)
            return x, state
        y, state = self.mixer(x, state=state, ctx=ctx)
        x = self.norm1(x + drop(y, 0))
        if self.mlp is not None and self.norm2 is not None:
            x = self.norm2(x + drop(self._mlp(x), 1))
        return x, state

    def _mlp(self, x: Tensor) -> Tensor:
        assert self.mlp is not None
        if self.recomputes_mlp and torch.is_grad_enabled():
            kept: Tensor = checkpoint(self.mlp, x, use_reentrant=False, preserve_rng_state=False)
            return kept
        y: Tensor = self.mlp(x)
        return y
