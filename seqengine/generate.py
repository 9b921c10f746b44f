"""Generation: prompts go in by chunks, then token by token, with the state of every mixer; nothing is computed twice.

The memory of a prompt is the state and one chunk of activations. A token costs what the mixers' states cost: for gated linear
attention and modal filters the same at any position, for explicit long filters O(max_len), for attention O(tokens so far).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqengine.data.tiles import mix
from seqengine.mixers.mixer import START
from seqengine.model import LanguageModel, ModelState
from seqengine.states import select_rows, stack_states

CHUNK_TOKENS = 1 << 13
"""Tokens of a prompt that go in at once."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: 0 takes the most likely token. top_k: of so many most likely ones. top_p: of the fewest that together have
    at least this probability. seed: with the number of the prompt and of the token it decides the draw, so that a prompt gets
    the same continuation whatever stands beside it in the batch.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"generate: temperature must be >= 0; got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k must be >= 1; got {self.top_k}.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"generate: top_p must be above 0 and at most 1; got {self.top_p}.")


def generate(
    model: LanguageModel,
    ids: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    allowed: Tensor | None = None,
    stop: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[Tensor]:
    """What the model writes after each prompt: a list of int64 tensors [at most max_new_tokens].

    Shapes: ids [B, T], or a list of prompts [T_b] of different lengths, each with at least one token.
    allowed: ids that may be drawn, int64 [n]; by default the model's vocabulary without its padding.
    stop:    a continuation ends before this token.
    Memory:  states and a chunk of activations; independent of the prompt's length unless a mixer's state grows (attention).
    Exact to: `model` on the whole sequence, to rounding.
    Raises:  ValueError for an empty prompt, ids outside the vocabulary, or more tokens than the model's filters reach.
    """
    written: list[list[int]] = [[] for _ in ids]
    done = [False] * len(written)
    for tokens in stream(
        model, ids, max_new_tokens=max_new_tokens, sampling=sampling, allowed=allowed, chunk_tokens=chunk_tokens
    ):
        for row, token in enumerate(tokens.tolist()):
            done[row] = done[row] or token == stop
            if not done[row]:
                written[row].append(token)
        if all(done):
            break
    return [torch.tensor(row, dtype=torch.int64) for row in written]


@torch.no_grad()
def stream(
    model: LanguageModel,
    ids: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    allowed: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Iterator[Tensor]:
    """`generate` as it goes: the next token of every prompt, int64 [B] on the CPU, max_new_tokens times."""
    how = sampling or Sampling()
    prompts = [prompt.reshape(-1) for prompt in ids]
    _check(model, prompts, max_new_tokens, chunk_tokens)
    device = model.head_weight.device
    choices = torch.arange(model.config.vocab_size) if allowed is None else allowed.cpu()
    was_training = model.training
    model.eval()
    try:
        logits, state = prefill(model, prompts, chunk_tokens)
        for number in range(max_new_tokens):
            tokens = draw(logits.cpu(), choices, how, number)
            yield tokens
            if number + 1 < max_new_tokens:
                out, state = model.step(tokens[:, None].to(device), state)
                logits = out[:, -1]
    finally:
        model.train(was_training)


def prefill(model: LanguageModel, prompts: Sequence[Tensor], chunk_tokens: int) -> tuple[Tensor, ModelState]:
    """The logits after each prompt [B, V], and the state of all. Prompts of one length go in together."""
    device = model.head_weight.device
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(prompt.shape[0], []).append(row)
    order = [row for rows in by_length.values() for row in rows]
    found: list[Tensor] = []
    states: list[ModelState] = []
    for rows in by_length.values():
        state: ModelState | None = None
        # Each prompt is cut before they are put together: nothing is as long as a prompt but the prompt itself.
        for chunk in zip(*(prompts[row].split(chunk_tokens) for row in rows), strict=True):
            hidden, state = model.advance(torch.stack(chunk).to(device), START if state is None else state)
            last = hidden[:, -1].clone()
            del hidden
        assert state is not None
        found.append(model.logits(last))
        states.append(state)
    if len(states) == 1:
        return found[0], states[0]
    back = torch.tensor(order).argsort().to(device)
    return torch.cat(found)[back], select_rows(stack_states(states), back)


def draw(logits: Tensor, choices: Tensor, how: Sampling, number: int) -> Tensor:
    """One token for each row of logits [B, V], of the ids `choices` [n]: int64 [B]. number: of the token, for the seed."""
    scores = logits[:, choices].double()
    if how.temperature == 0.0:
        return choices[scores.argmax(dim=1)]
    scores = scores / how.temperature
    if how.top_k is not None and how.top_k < scores.shape[1]:
        least = scores.topk(how.top_k, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if how.top_p is not None:
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        before = ordered.softmax(dim=1).cumsum(dim=1) - ordered.softmax(dim=1)
        scores = scores.masked_fill((before >= how.top_p).gather(1, order.argsort(dim=1)), float("-inf"))
    noise = torch.stack([_gumbel(scores.shape[1], how.seed, row, number) for row in range(scores.shape[0])])
    return choices[(scores + noise).argmax(dim=1)]


def _gumbel(size: int, seed: int, row: int, number: int) -> Tensor:
    """The largest of log probabilities plus this is a draw from them."""
    key = mix(seed, row, number) >> 1
    uniform = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(key))
    return -(-uniform.clamp(min=1e-300).log()).log()


def _check(model: LanguageModel, prompts: Sequence[Tensor], max_new_tokens: int, chunk_tokens: int) -> None:
    if model.config.num_classes or not model.config.causal:
        raise ValueError("generate: the model must tell the next token; this one tells classes, or sees what follows.")
    if not prompts or max_new_tokens < 0 or chunk_tokens < 1:
        raise ValueError(
            "generate: needs at least one prompt, max_new_tokens >= 0 and chunk_tokens >= 1; "
            f"got {len(prompts)} prompts, {max_new_tokens}, {chunk_tokens}."
        )
    for row, prompt in enumerate(prompts):
        if prompt.shape[0] == 0:
            raise ValueError(f"generate: prompt {row} must have at least one token; it is empty.")
        if int(prompt.min()) < 0 or int(prompt.max()) >= model.config.padded_vocab:
            raise ValueError(
                f"generate: ids must be in 0..{model.config.padded_vocab - 1}; prompt {row} has "
                f"{int(prompt.min())}..{int(prompt.max())}."
            )
        tokens = prompt.shape[0] + max_new_tokens
        if tokens > model.config.l_max and model.is_bounded:
            raise ValueError(
                f"generate: prompt {row} and what follows have {tokens} tokens; the model's filters reach over "
                f"{model.config.l_max}. Ask for fewer, or build the model with a larger max_len."
            )
