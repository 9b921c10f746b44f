"""[optim] and [schedule]: how weights follow their gradients."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from seqengine.config.values import Section, Share, Wording, parse_fraction_or_count


class OptimGroup(Section):
    """[[optim.groups]]: parameters whose name matches get other settings. The first group that matches wins."""

    match: str
    """Shell pattern over parameter names, such as '*.filter.*'; it is an error if nothing matches."""
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    """As it would be without the group, if not given."""
    lr_scale: Annotated[float, Field(ge=0.0)] = 1.0
    """Share of the learning rate."""


class OptimSection(Section):
    """[optim]: AdamW."""

    name: Literal["adamw"] = "adamw"
    """The optimiser."""
    lr: Annotated[float, Field(gt=0.0)] = 6e-4
    """Learning rate after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.95)
    """Memory of the first and second moments."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Of matrices; norms, biases, embeddings and filters are not decayed unless a group says so."""
    groups: tuple[OptimGroup, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, data: Any) -> Any:
        """TOML has arrays where the section has tuples."""
        if not isinstance(data, dict):
            return data
        return {k: tuple(v) if k in ("betas", "groups") and isinstance(v, list) else v for k, v in data.items()}


class ScheduleSection(Section):
    """[schedule]: the learning rate as a pure function of tokens seen."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """The decay after the warm-up."""
    warmup: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, le=1.0)],
        BeforeValidator(parse_fraction_or_count),
        Wording("a share between 0 and 1 or a number of tokens", "0.01, '1%' or '10M'"),
    ] = 0.01
    """A share of all tokens ('1%', 0.01) or tokens ('10M')."""
    min_ratio: Share = 0.1
    """Learning rate at the end, as a share of optim.lr."""
