"""What a sequence mixer is: a module from (inputs, state) to (outputs, state), for a whole sequence, a chunk, or a rank's part.

A mixer is one file with its config class beside it, and one line in `registry.py`. It implements `forward` and nothing else:

    state = None    a whole sequence, and no state is wanted                 (training)
    state = START   the first tokens of a sequence; the state after them     (prefill)
    state = S       the tokens after those that S came from                  (next chunk, decoding)
    ctx             x is this rank's part of a sequence over several ranks   (sequence parallelism)

All four give the tokens the same outputs. A state is a NamedTuple of tensors with the batch first; what belongs to all samples
is `Shared`.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from torch import Tensor, nn

from seqengine.parallel.context import SequenceContext


class Start(Enum):
    """The type of START."""

    START = "start"


START: Final = Start.START
"""The state before the first token, of any mixer and any batch."""

S = TypeVar("S")


class Shared(NamedTuple):
    """Part of a state that all samples have in common."""

    tensors: tuple[Tensor, ...]


class Place(NamedTuple):
    """Where in a model a mixer stands."""

    d_model: int
    """Width of x."""
    max_len: int
    """Longest sequence that filters have to reach over, in tokens."""
    layer: int = 0
    num_layers: int = 1
    causal: bool = True


class ParameterRule(NamedTuple):
    """How some parameters of a mixer are optimised, unless the config says otherwise. None: as all others."""

    weight_decay: float | None = None
    lr_scale: float = 1.0
    """Share of the learning rate."""
    lr_most: float | None = None
    """Largest learning rate, before the schedule."""


class Mixer(nn.Module):
    """Base of all mixers. x [B, T, D] -> (y [B, T, D], state).

    A mixer is made by `Kind(config, place)`. It makes its weights as published; linear layers without a rule of their own
    get the model's N(0, 0.02), and `out_proj` is scaled down with the depth.
    """

    mixes_sequence: ClassVar[bool] = True
    """For `parallel.guard`: needs a context on a part of a sequence."""
    is_bidirectional: ClassVar[bool] = False
    """Whether it can do without causality."""
    keeps_documents_apart: ClassVar[bool] = True
    """Whether it can begin anew at the boundaries of packed documents, which its context then has."""
    is_bounded: ClassVar[bool] = False
    """Whether its filters end at `place.max_len` tokens."""
    rules: Mapping[str, ParameterRule] = {}
    """By pattern over the mixer's own parameter names; the first match counts."""

    def forward(self, x: Tensor, *, state: Any = None, ctx: SequenceContext | None = None) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def initialise(self) -> None:
        """Weights that the model's rule for linear layers would get wrong; called after it."""


def carried(state: S | Start | None) -> tuple[S | None, bool]:
    """(the state to begin with, whether the one after is wanted)."""
    return (None, state is not None) if state is None or isinstance(state, Start) else (state, True)


def context_of(x: Tensor, ctx: SequenceContext | None) -> SequenceContext:
    """The context of x [B, T, D]: the given one, or that of a sequence which is all here."""
    return ctx or SequenceContext.single(x.shape[1])
