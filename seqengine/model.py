"""The language model: embedding, blocks of (norm, mixer, norm, MLP), norm, head.

HyenaDNA (Nguyen et al. 2023, arXiv:2306.15794): pre-norm GPT-2 blocks, residual stream in float32, GELU (tanh form).
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqengine.blocks import Block, Drop, make_norm
from seqengine.config.model import ModelConfig
from seqengine.dropout import token_dropout
from seqengine.kernels import api as kernels
from seqengine.mixers.hyena import ImplicitFilter
from seqengine.mixers.mixer import START, ParameterRule, Start
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.recompute import checkpoint
from seqengine.pooling import pool, rows_context, rows_of

ModelState = tuple[Any, ...]
"""The state of every block's mixer."""
RESIDUAL_WEIGHTS = ("out_proj.weight", "fc2.weight", "down.weight")
"""Ends of names of what is added to the residual stream: smaller at first, the deeper the model (GPT-2)."""


class Objective(NamedTuple):
    """What a step minimises, this rank's part; all add up over ranks."""

    loss: Tensor
    """nats, and the z-loss; differentiable."""
    nats: Tensor
    """The sum of nats alone, without a gradient: for the log."""
    tokens: Tensor
    """What it is summed over, int64."""
    correct: Tensor | None = None
    """How many are told, int64: of classes, and of tokens where asked for."""


class LanguageModel(nn.Module):
    """Language model over tokens, of any mixture of mixers; or, with config.num_classes, a classifier of sequences.

    Shapes: input_ids [B, T] int64 -> logits [B, T, V], V the padded vocabulary; [B, num_classes]. With ctx, T is this
            rank's part.
    State:  `step(ids, START)`, then `step(ids, state)`: chunk by chunk or token by token, with the result of the whole.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.padded_vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self._recompute: Literal["none", "selective", "block"] = "none"
        self._offload = False
        self.published_layout: object = None  # set by seqengine.interop: how the weights were spelt
        self.head: nn.Linear | None = None
        if config.num_classes:
            self.head = nn.Linear(config.d_model, config.num_classes)
        elif not config.tied_head:
            self.head = nn.Linear(config.d_model, config.padded_vocab, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Matrices and embedding N(0, 0.02), filters' networks included; projections into the residual stream smaller."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=0.02)
        branches = 1 if self.config.mlp == "none" else 2
        for name, parameter in self.named_parameters():
            if name.endswith(RESIDUAL_WEIGHTS):
                nn.init.normal_(parameter, std=0.02 / (branches * self.config.n_layer) ** 0.5)
        for block in self.each_block():
            block.mixer.initialise()

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def rules(self) -> dict[str, ParameterRule]:
        """How the mixers want some of their parameters optimised, by pattern over names."""
        found: dict[str, ParameterRule] = {}
        for i, block in enumerate(self.each_block()):
            found |= {f"blocks.{i}.mixer.{pattern}": rule for pattern, rule in block.mixer.rules.items()}
        return found

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
        for i, block in enumerate(self.each_block()):

            def drop_branch(y: Tensor, n: int, first_site: int = 2 * i + 1) -> Tensor:
                return drop(y, self.config.resid_dropout, first_site + n)

            x = self._run(block, x, drop_branch, ctx)
        normed: Tensor = self.norm(x)
        return normed

    def _run(self, block: Block, x: Tensor, drop: Drop, ctx: SequenceContext | None) -> Tensor:
        if self._recompute != "block" or not torch.is_grad_enabled():
            y: Tensor = block(x, drop, ctx=ctx)[0]
            return y
        context = ctx or SequenceContext.single(x.shape[1])

        def run(x: Tensor) -> Tensor:
            y: Tensor = block(x, drop, ctx=ctx)[0]
            return y

        return checkpoint(run, x, ctx=context, offload=self._offload, preserve_rng_state=False)

    def save_memory(self, what: Literal["none", "selective", "block"], *, offload: bool = False) -> None:
        """Of what the forward pass would keep for the backward, make again there: nothing; the insides of MLPs; of blocks.

        offload: what blocks keep waits in the CPU's memory.
        """
        self._recompute, self._offload = what, offload
        for block in self.each_block():
            block.recomputes_mlp = what == "selective"

    def forward(
        self,
        input_ids: Tensor,
        *,
        ctx: SequenceContext | None = None,
        dropout_keys: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits; of classes, on every rank, if the model has classes. mask [B, T] bool: False for what is not pooled."""
        hidden = self.hidden(input_ids, ctx=ctx, dropout_keys=dropout_keys)
        if not self.config.num_classes:
            return F.linear(hidden, self.head_weight)
        context = ctx or SequenceContext.single(input_ids.shape[1])
        logits = self._class_logits(hidden, mask, context)
        if context.size == 1:
            return logits
        return rows_context(input_ids.shape[0], context).join(logits, 0)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        ctx: SequenceContext | None = None,
        dropout_keys: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of the sum of nats, and of what it is summed over; both add up over ranks.

        labels: [B, T] with -100 for tokens that do not count: input_ids shifted before any split, or what was masked; with
                classes [B], the class of every sequence.
        """
        hidden = self.hidden(input_ids, ctx=ctx, dropout_keys=dropout_keys)
        found = self._objective(hidden, labels, ctx or SequenceContext.single(input_ids.shape[1]), mask, 0.0)
        return found.loss, found.tokens

    def objective(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        ctx: SequenceContext | None = None,
        dropout_keys: Tensor | None = None,
        mask: Tensor | None = None,
        z_loss: float = 0.0,
        count_correct: bool = False,
    ) -> Objective:
        """`loss` with the z-loss added: z_loss times the sum over labelled tokens (or sequences) of logsumexp(logits)^2.

        It keeps the logarithm of the softmax's sum near zero (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
        count_correct: also how many labelled tokens are told; the logits of those tokens are then whole.
        """
        hidden = self.hidden(input_ids, ctx=ctx, dropout_keys=dropout_keys)
        found = self._objective(hidden, labels, ctx or SequenceContext.single(input_ids.shape[1]), mask, z_loss)
        if not count_correct or self.config.num_classes:
            return found
        asked = labels != -100
        told = self.logits(hidden.detach()[asked]).argmax(dim=-1)
        return found._replace(correct=(told == labels[asked]).sum())

    def _objective(
        self, hidden: Tensor, labels: Tensor, ctx: SequenceContext, mask: Tensor | None, z_loss: float
    ) -> Objective:
        correct = None
        if self.config.num_classes:
            logits = self._class_logits(hidden, mask, ctx)
            mine = labels[rows_of(labels.shape[0], ctx)]
            counted = mine != -100
            nats, tokens = F.cross_entropy(logits, mine, reduction="sum"), counted.sum()
            squares = torch.where(counted, torch.logsumexp(logits, dim=-1), 0).square().sum() if z_loss else None
            correct = (logits.argmax(dim=-1) == mine).sum()
        elif z_loss:
            nats, tokens, squares = kernels.linear_cross_entropy(hidden, self.head_weight, labels, output_squares=True)
        else:
            nats, tokens = kernels.linear_cross_entropy(hidden, self.head_weight, labels)
            squares = None
        return Objective(nats if squares is None else nats + z_loss * squares, nats.detach(), tokens, correct)

    def _class_logits(self, hidden: Tensor, mask: Tensor | None, ctx: SequenceContext) -> Tensor:
        """[b, num_classes] of the sequences `rows_of(B, ctx)`."""
        assert self.head is not None
        logits: Tensor = self.head(pool(hidden, mask, self.config.pooling, ctx))
        return logits

    def step(self, input_ids: Tensor, state: ModelState | Start) -> tuple[Tensor, ModelState]:
        """Logits of a chunk [B, T] (T = 1 is decoding) that continues `state`, and the new state. No dropout."""
        hidden, after = self.advance(input_ids, state)
        return self.logits(hidden), after

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] of `hidden` or `advance` -> [..., V]."""
        return F.linear(hidden, self.head_weight)

    def advance(self, input_ids: Tensor, state: ModelState | Start) -> tuple[Tensor, ModelState]:
        """`step` without the head, whose logits of a long prompt nobody needs: the normed residual stream [B, T, D]."""
        x = self.embedding(input_ids)
        before = (START,) * len(self.blocks) if isinstance(state, Start) else state
        states: list[Any] = []
        for block, carried in zip(self.each_block(), before, strict=True):
            x, after = block(x, lambda y, n: y, state=carried)
            states.append(after)
        return self.norm(x), tuple(states)

    def each_block(self) -> Iterator[Block]:
        return (cast(Block, block) for block in self.blocks)

    @property
    def is_bounded(self) -> bool:
        """Whether some mixer's filters end at config.l_max tokens."""
        return any(block.mixer.is_bounded for block in self.each_block())

    def _check_length(self, tokens: int) -> None:
        if tokens > self.config.l_max and self.is_bounded:
            what = "l_max = max_len + 2" if self.config.arch == "hyenadna" else "max_len"
            raise ValueError(
                f"LanguageModel: at most {what} = {self.config.l_max} tokens; got {tokens}. "
                "Filters may depend on max_len: build the model with a larger one."
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
