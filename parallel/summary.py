"""Summaries of a stretch of tokens: the affine maps S -> A S + b that a state goes through, and their monoid.

    (A1, b1) then (A2, b2) = (A2 A1, A2 b1 + b2)

The rule is associative, for it is the composition of maps: ((1 then 2) then 3) and (1 then (2 then 3)) both are
(A3 A2 A1, A3 A2 b1 + A3 b2 + b3). Its identity is (1, 0), the summary of no token. One definition serves both directions:
the gradient of a state goes through the adjoint maps (A^H, g) from the last token to the first.

Decays are kept as logarithms, which add up and are never subtracted: a decay of zero (-inf) costs no accuracy.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from seqengine.kernels.checks import check

STATE_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def _exp(log: Tensor) -> Tensor:
    """exp, and exactly 0 where the real part is -inf."""
    if not log.is_complex():
        return torch.exp(log)
    magnitude = torch.exp(log.real)
    return torch.complex(magnitude * torch.cos(log.imag), magnitude * torch.sin(log.imag))


def _add(a: Tensor, b: Tensor) -> Tensor:
    """a + b; part by part, as torch multiplies a complex b by 1 + 0i, and an infinite real part by that 0."""
    return torch.complex(a.real + b.real, a.imag + b.imag) if a.is_complex() else a + b


def _trailing(x: Tensor, dims: int) -> Tensor:
    """x with so many dims of size 1 at its end."""
    return x[(..., *(None,) * dims)]


def _sum(x: Tensor, dims: list[int]) -> Tensor:
    """Sum in double precision; the whole tensor if there are no dims to sum over."""
    return x.sum(dim=dims, dtype=torch.complex128 if x.is_complex() else torch.float64) if dims else x


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in the precision of states, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


@dataclass(frozen=True, eq=False)
class Transition(ABC):
    """The linear part A of a map. `value` is the one tensor that it depends on, and that gets a gradient."""

    value: Tensor
    is_sent: ClassVar[bool] = True
    """Whether another rank has to be told the value, or knows it."""

    @abstractmethod
    def apply(self, state: Tensor) -> Tensor:
        """A S."""

    @abstractmethod
    def then(self, later: Self) -> Self:
        """A_later A."""

    @abstractmethod
    def gradient(self, before: Tensor, d_after: Tensor) -> Tensor:
        """Of the value, from the state before and the gradient of the state after; in any precision."""

    @abstractmethod
    def fits(self, state: Tensor) -> bool:
        """Whether the value's shape goes with this state."""

    def adjoint(self) -> Self:
        """A^H."""
        return replace(self, value=self.value.conj_physical())

    def of(self, value: Tensor, tokens: int) -> Self:
        """The same kind of transition over another stretch of so many tokens."""
        return replace(self, value=value)


class Decay(Transition):
    """A = diag(exp(value)). value: log decays, with the first dims of the state: [B, H] or [B, H, K] for [B, H, K, V]."""

    def apply(self, state: Tensor) -> Tensor:
        return _trailing(_exp(self.value), state.ndim - self.value.ndim) * state

    def then(self, later: Self) -> Self:
        return replace(self, value=_add(self.value, later.value))

    def gradient(self, before: Tensor, d_after: Tensor) -> Tensor:
        product = self.apply(before).conj_physical() * d_after
        total = _sum(product, list(range(self.value.ndim, before.ndim)))
        return total if self.value.is_complex() or not total.is_complex() else total.real

    def fits(self, state: Tensor) -> bool:
        return self.value.shape == state.shape[: self.value.ndim]


@dataclass(frozen=True, eq=False)
class FixedDecay(Transition):
    """A = diag(exp(value * tokens)), the same for every sample, known to all ranks from the layout and therefore never sent.

    value: log decay of one token; its dims are those of the state after the batch: [D, N] for [B, D, N], [H] for [B, H, K, V],
    [] for one number. Multiplied out in float64. A real part of -inf counts as -1e4, so that over no token it decays nothing.
    """

    tokens: int
    is_sent: ClassVar[bool] = False

    def apply(self, state: Tensor) -> Tensor:
        double = torch.complex128 if self.value.is_complex() else torch.float64
        log = self.value.to(double)
        magnitude = torch.exp(log.real.clamp(min=-1e4) * self.tokens)
        decay = magnitude
        if log.is_complex():
            phase = log.imag * self.tokens
            decay = torch.complex(magnitude * torch.cos(phase), magnitude * torch.sin(phase))
        decay = decay.to(state.dtype)
        return _trailing(decay, state.ndim - 1 - decay.ndim) * state

    def then(self, later: Self) -> Self:
        return replace(self, tokens=self.tokens + later.tokens)

    def gradient(self, before: Tensor, d_after: Tensor) -> Tensor:
        product = self.apply(before).conj_physical() * d_after
        total = _sum(product, [0, *range(1 + self.value.ndim, before.ndim)]) * self.tokens
        return total if self.value.is_complex() or not total.is_complex() else total.real

    def fits(self, state: Tensor) -> bool:
        return state.ndim >= 1 and self.value.shape == state.shape[1 : 1 + self.value.ndim]

    def of(self, value: Tensor, tokens: int) -> Self:
        return replace(self, value=value, tokens=tokens)


class Dense(Transition):
    """A = value [..., K, K], multiplied from the left with states [..., K, V]: the delta rules."""

    def apply(self, state: Tensor) -> Tensor:
        return _product(self.value, state)

    def then(self, later: Self) -> Self:
        return replace(self, value=_product(later.value, self.value))

    def gradient(self, before: Tensor, d_after: Tensor) -> Tensor:
        return _product(d_after, before.mH)

    def fits(self, state: Tensor) -> bool:
        K = state.shape[-2] if state.ndim >= 2 else -1
        return self.value.shape == (*state.shape[:-2], K, K)

    def adjoint(self) -> Self:
        return replace(self, value=self.value.mT.conj_physical().contiguous())


@dataclass(frozen=True, eq=False)
class Summary:
    """The map S -> A S + b of a stretch of tokens. b is the state after it if there was none before it.

    transition: A; None for A = 0, a map whose result does not depend on S. state: b.
    """

    transition: Transition | None
    state: Tensor

    def __call__(self, before: Tensor) -> Tensor:
        """The state after the stretch."""
        return self.state if self.transition is None else self.transition.apply(before) + self.state

    def then(self, later: "Summary") -> "Summary":
        """The map of this stretch and the one that follows it."""
        if self.transition is None or later.transition is None:
            return Summary(None, later(self.state))
        return Summary(self.transition.then(later.transition), later(self.state))


def _parts(summary: Summary) -> list[Tensor]:
    """What another rank has to be told."""
    transition = summary.transition
    return [summary.state] if transition is None or not transition.is_sent else [summary.state, transition.value]


def _numbers(x: Tensor) -> int:
    return x.numel() * (2 if x.is_complex() else 1)


def pack(summary: Summary) -> Tensor:
    """One flat real tensor, a fresh one: the state and, if there is one and it is sent, the value of the transition."""
    parts = [x.resolve_conj().resolve_neg() for x in _parts(summary)]
    return torch.cat([(torch.view_as_real(x) if x.is_complex() else x).reshape(-1) for x in parts])


def empty_message(like: Summary) -> Tensor:
    """What `pack` would give for a summary like this one, not filled."""
    numbers = sum(_numbers(x) for x in _parts(like))
    return torch.empty(numbers, dtype=like.state.real.dtype, device=like.state.device)


def unpack(message: Tensor, like: Summary) -> Summary:
    """The summary in a message: of the kind, shapes and tokens of another; views of the message."""
    found, start = [], 0
    for x in _parts(like):
        flat = message[start : start + _numbers(x)]
        found.append((torch.view_as_complex(flat.view(-1, 2)) if x.is_complex() else flat).view(x.shape))
        start += _numbers(x)
    transition = like.transition
    if transition is not None and transition.is_sent:
        transition = replace(transition, value=found[1])
    return Summary(transition, found[0])


def check_summary(name: str, summary: Summary, tokens: int) -> Transition:
    """The transition, if it goes with the state and with so many tokens; ValueError otherwise."""
    transition, state = summary.transition, summary.state
    check(name, isinstance(transition, Transition), "summary must have a transition", transition)
    assert transition is not None
    value, kind = transition.value, type(transition).__name__
    check(name, state.dtype in STATE_DTYPES, "the state must be float32 or float64, or complex of them", state.dtype)
    check(name, value.dtype in STATE_DTYPES, "{} must be float32 or float64, or complex of them", value.dtype, kind)
    must = "{} must be real for a real state"
    check(name, state.is_complex() or not value.is_complex(), must, value.dtype, kind)
    must = "{} must have the precision of the state, {}"
    is_same = not transition.is_sent or value.real.dtype == state.real.dtype
    check(name, is_same, must, value.dtype, kind, state.dtype)
    check(name, transition.fits(state), "{} must fit the state {}", value.shape, kind, tuple(state.shape))
    check(name, value.device == state.device, "{} must be on {}, like the state", value.device, kind, state.device)
    if isinstance(transition, FixedDecay):
        must = "FixedDecay must be over the {} tokens of this rank"
        check(name, transition.tokens == tokens, must, transition.tokens, tokens)
    return transition
