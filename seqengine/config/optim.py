"""[optim] and [schedule]: how weights follow their gradients.

A key that does nothing beside the chosen `name` or `kind` is refused, unless its value is the default.
"""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from seqengine.config.values import Positive, Section, Share, Wording, parse_fraction_or_count

Rate = Annotated[float, Field(gt=0.0)]
Memory = Annotated[float, Field(ge=0.0, lt=1.0)]
ShareOrTokens = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, le=1.0)],
    BeforeValidator(parse_fraction_or_count),
    Wording("a share between 0 and 1 or a number of tokens", "0.01, '1%' or '10M'"),
]


def _refuse_idle(section: Section, name: str, keys: tuple[str, ...], choice: str, wanted: str, got: str) -> None:
    """Raise for a key of `keys` that was given: it would do nothing, because `choice` is not `wanted`."""
    for key in keys:
        default = type(section).model_fields[key].default
        if key in section.model_fields_set and getattr(section, key) != default:
            raise ValueError(
                f"{name}.{key} would do nothing: it needs {name}.{choice} = {wanted}; got {got!r}; delete {name}.{key}, or "
                f"change {name}.{choice}"
            )


class OptimGroup(Section):
    """[[optim.groups]]: parameters whose name matches get other settings. The first group that matches wins."""

    match: str
    """Shell pattern over parameter names, such as '*.filter.*'; it is an error if nothing matches."""
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    """As it would be without the group, if not given."""
    lr_scale: Annotated[float, Field(ge=0.0)] = 1.0
    """Share of the learning rate."""


MUON_KEYS = ("muon_lr", "muon_momentum", "muon_ns_steps", "muon_precision")


class OptimSection(Section):
    """[optim]: the optimiser, and what goes with it."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: orthogonalised momentum for the matrices of the blocks, AdamW for all other parameters."""
    lr: Rate = 6e-4
    """Learning rate after the warm-up."""
    betas: tuple[Memory, Memory] = (0.9, 0.95)
    """Memory of the first and second moments of AdamW."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Of matrices; norms, biases, embeddings and filters are not decayed unless a group says so."""
    muon_lr: Rate | None = None
    """muon: learning rate of its matrices after the warm-up; optim.lr if not given, as its steps are as large as AdamW's."""
    muon_momentum: Memory = 0.95
    """muon: memory of the momentum (Nesterov's)."""
    muon_ns_steps: Annotated[Positive, Field(le=20)] = 5
    """muon: Newton-Schulz iterations of the orthogonalisation."""
    muon_precision: Literal["fp32", "bf16"] = "fp32"
    """muon: arithmetic of the iterations. bf16, as published, is fast on a GPU; meshes then agree to three digits only."""
    ema: Memory = 0.0
    """Share of the average that a step keeps, such as 0.999; averaged weights are saved beside the trained ones. 0 = none."""
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the squared logarithm of the softmax's sum in the loss, such as 1e-4 (PaLM). 0 = none."""
    groups: tuple[OptimGroup, ...] = ()

    @model_validator(mode="after")
    def _no_idle_key(self) -> Self:
        if self.name != "muon":
            _refuse_idle(self, "optim", MUON_KEYS, "name", "'muon'", self.name)
        return self


class ScheduleSection(Section):
    """[schedule]: the learning rate as a pure function of tokens seen."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """The decay after the warm-up. wsd: stable, then a decay over the last `decay` of the run."""
    warmup: ShareOrTokens = 0.01
    """A share of all tokens ('1%', 0.01) or tokens ('10M')."""
    decay: ShareOrTokens = 0.2
    """wsd: length of the decay, a share of all tokens or tokens."""
    decay_shape: Literal["linear", "sqrt", "cosine"] = "sqrt"
    """wsd: 1 - x, 1 - sqrt(x), or half a cosine, where x goes from 0 to 1 over the decay."""
    min_ratio: Share = 0.1
    """Learning rate at the end, as a share of optim.lr."""

    @model_validator(mode="after")
    def _no_idle_key(self) -> Self:
        if self.kind != "wsd":
            _refuse_idle(self, "schedule", ("decay", "decay_shape"), "kind", "'wsd'", self.kind)
        if self.kind == "constant":
            _refuse_idle(self, "schedule", ("min_ratio",), "kind", "'cosine', 'linear' or 'wsd'", self.kind)
        is_share = isinstance(self.warmup, float) and isinstance(self.decay, float)
        if self.kind == "wsd" and is_share and self.warmup + self.decay > 1.0:
            raise ValueError(
                f"schedule.decay = {self.decay} and schedule.warmup = {self.warmup} must be at most 1 together; "
                "shorten one of them"
            )
        return self

    def warmup_tokens(self, total_tokens: int) -> float:
        """Tokens of the warm-up of a run."""
        return _tokens(self.warmup, total_tokens)

    def decay_tokens(self, total_tokens: int) -> float:
        """Tokens of the decay of a run, with kind = 'wsd'."""
        return _tokens(self.decay, total_tokens)


def _tokens(share_or_tokens: int | float, total_tokens: int) -> float:
    return share_or_tokens if isinstance(share_or_tokens, int) else share_or_tokens * total_tokens
