"""The language model: embedding, blocks of (norm, mixer, norm, MLP), norm, head.

HyenaDNA (Nguyen et al. 2023, arXiv:2306.15794): pre-norm GPT-2 blocks, residual stream in float32, GELU (tanh form).
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.config.values import Count, Section
from seqengine.dropout import token_dropout
from seqengine.kernels import api as kernels
from seqengine.mixers.hyena import FilterConfig, Hyena, HyenaState, ImplicitFilter
from seqengine.parallel.context import SequenceContext

Positive = Annotated[Count, Field(gt=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class ModelConfig(Section):
    """[model]: sizes. The filters are functions of t / l_max, so max_len is part of the model, not only a limit."""

    arch: Literal["hyenadna"] = "hyenadna"
    """The kind of model."""
    d_model: Positive = 128
    """Width of the residual stream."""
    n_layer: Positive = 2
    """Blocks."""
    d_inner: Positive | None = None
    """Width of the MLP; 4 * d_model if not given."""
    max_len: Positive = 1024
    """Longest sequence in tokens; the published l_max is max_len + 2."""
    order: Annotated[int, Field(ge=2)] = 2
    """Order N of the Hyena operator: N gates, N - 1 long convolutions."""
    short_filter: Positive = 3
    """Taps of the short convolution."""
    filter: FilterConfig = FilterConfig()
    """The implicit long filter."""
    embed_dropout: Probability = 0.1
    """Of the embedding; the masks do not depend on the mesh."""
    resid_dropout: Probability = 0.0
    """Of what each mixer and MLP adds to the residual stream."""
    vocab_size: Positive = 12
    """Token ids in use."""
    pad_vocab_multiple: Positive = 8
    """The vocabulary is padded to a multiple of this."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the variance in each norm."""
    tied_head: bool = True
    """The head is the embedding."""

    @model_validator(mode="after")
    def _odd_features(self) -> Self:
        if self.filter.emb_dim % 2 == 0:
            raise ValueError(
                f"model.filter.emb_dim must be odd (time and pairs of cosine and sine); got {self.filter.emb_dim}"
            )
        return self

    @property
    def l_max(self) -> int:
        return self.max_len + 2

    @property
    def inner(self) -> int:
        return self.d_inner or 4 * self.d_model

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple


Drop = Callable[[Tensor, int], Tensor]


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, d_model: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, inner)
        self.fc2 = nn.Linear(inner, d_model)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mixer = Hyena(
            config.d_model, config.l_max, order=config.order, short_filter=config.short_filter, filter=config.filter
        )
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mlp = Mlp(config.d_model, config.inner)

    def forward(
        self, x: Tensor, drop: Drop, *, state: HyenaState | None = None, ctx: SequenceContext | None = None
    ) -> tuple[Tensor, HyenaState | None]:
        """x [B, T, D] -> the same, and the mixer's new state; drop(y, n) is applied to the n-th branch."""
        y, state = self.mixer(self.norm1(x), state=state, ctx=ctx)
        x = x + drop(y, 0)
        return x + drop(self.mlp(self.norm2(x)), 1), state


ModelState = tuple[HyenaState, ...]


class LanguageModel(nn.Module):
    """Causal language model over tokens.

    Shapes: input_ids [B, T] int64 -> logits [B, T, V], V the padded vocabulary. With ctx, T is this rank's part.
    State:  `initial_state(B)` and `step(ids, state)` run it chunk by chunk, or token by token, with the same result.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.published_layout: object = None  # set by seqengine.interop: how the weights were spelt
        self.head = None if config.tied_head else nn.Linear(config.d_model, config.padded_vocab, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Matrices and embedding N(0, 0.02), filters' networks included; projections into the residual stream smaller."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.n_layer) ** 0.5)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden(
        self, input_ids: Tensor, *, ctx: SequenceContext | None = None, dropout_keys: Tensor | None = None
    ) -> Tensor:
        """[B, T] -> the normed residual stream [B, T, D] before the head.

        dropout_keys [B] int64: one key per window; the masks then do not depend on how the batch is split over ranks.
        """
        self._check_length(ctx.total_tokens if ctx else input_ids.shape[1])
        positions = (
            ctx.positions(input_ids.device) if ctx else torch.arange(input_ids.shape[1], device=input_ids.device)
        )

        def drop(x: Tensor, p: float, site: int) -> Tensor:
            return token_dropout(x, p, dropout_keys, positions, site, training=self.training)

        x = drop(self.embedding(input_ids), self.config.embed_dropout, 0)
        for i, block in enumerate(self._each_block()):
            first_site = 2 * i + 1
            x, _ = block(x, lambda y, n, s=first_site: drop(y, self.config.resid_dropout, s + n), ctx=ctx)
        normed: Tensor = self.norm(x)
        return normed

    def forward(
        self, input_ids: Tensor, *, ctx: SequenceContext | None = None, dropout_keys: Tensor | None = None
    ) -> Tensor:
        return F.linear(self.hidden(input_ids, ctx=ctx, dropout_keys=dropout_keys), self.head_weight)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        ctx: SequenceContext | None = None,
        dropout_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sum of nats over this rank's tokens, and their number. Labels are input_ids shifted before any split."""
        hidden = self.hidden(input_ids, ctx=ctx, dropout_keys=dropout_keys)
        return kernels.linear_cross_entropy(hidden, self.head_weight, labels)

    def initial_state(self, batch: int) -> ModelState:
        return tuple(block.mixer.initial_state(batch) for block in self._each_block())

    def step(self, input_ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Logits of a chunk [B, T] (T = 1 is decoding) that continues `state`, and the new state. No dropout."""
        x = self.embedding(input_ids)
        states: list[HyenaState] = []
        for block, before in zip(self._each_block(), state, strict=True):
            x, after = block(x, lambda y, n: y, state=before)
            states.append(after)
        return F.linear(self.norm(x), self.head_weight), tuple(states)

    def _each_block(self) -> Iterator[Block]:
        return (cast(Block, block) for block in self.blocks)

    def _check_length(self, tokens: int) -> None:
        if tokens > self.config.l_max:
            raise ValueError(
                f"LanguageModel: at most l_max = max_len + 2 = {self.config.l_max} tokens; got {tokens}. "
                "The filters depend on max_len: build the model with a larger one."
            )


def build_model(config: ModelConfig, *, seed: int, params: str, device: torch.device) -> LanguageModel:
    """A model with its initial weights, a function of the seed alone: float64 for params = 'fp64', else float32."""
    torch.manual_seed(seed)
    model = LanguageModel(config)
    return (to_float64(model) if params == "fp64" else model).to(device)


def to_float64(model: LanguageModel) -> LanguageModel:
    """In place: weights widened, and the filters' features computed again rather than widened."""
    model.double()
    for module in model.modules():
        if isinstance(module, ImplicitFilter):
            module.compute_features()
    return model
