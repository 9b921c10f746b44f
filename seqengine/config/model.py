"""[model]: what the language model is built of."""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import Field, create_model, model_validator

from seqengine.config.values import Count, Section
from seqengine.mixers.hyena import FilterConfig, HyenaConfig
from seqengine.mixers.mixer import Place
from seqengine.mixers.registry import MIXERS, Kind

Positive = Annotated[Count, Field(gt=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]

MixerSettings: type[Section] = create_model(
    "MixerSettings",
    __base__=Section,
    __doc__="[model.mixers]: a table for each kind of mixer, `[model.mixers.hyena]` and so on.",
    **{name: (kind.config, kind.config()) for name, kind in MIXERS.items()},  # type: ignore[call-overload]
)


class LayerGroup(Section):
    """[[model.layers]]: some layers in a row."""

    mixer: str
    """Name of a mixer."""
    repeat: Positive = 1
    """So many layers of it."""


HYENADNA_KEYS = ("order", "short_filter", "filter")
LM_KEYS = (
    "pattern", "layers", "mixers", "norm", "norm_place", "mlp", "mlp_bias", "causal", "num_classes", "pooling",
)  # fmt: skip


class ModelConfig(Section):
    """[model]: sizes and layers. Filters may be functions of t / max_len: it is part of the model, not only a limit."""

    arch: Literal["hyenadna", "lm"] = "hyenadna"
    """hyenadna: the published DNA model. lm: any mixture of mixers, by `pattern` or `layers`."""
    d_model: Positive = 128
    """Width of the residual stream."""
    n_layer: Positive = 2
    """Blocks."""
    d_inner: Positive | None = None
    """Width of the MLP; 4 * d_model if not given."""
    max_len: Positive = 1024
    """Longest sequence in tokens; the published l_max of hyenadna is max_len + 2."""
    order: Annotated[int, Field(ge=2)] = 2
    """hyenadna: order N of the Hyena operator: N gates, N - 1 long convolutions."""
    short_filter: Positive = 3
    """hyenadna: taps of the short convolution."""
    filter: FilterConfig = FilterConfig()
    """hyenadna: the implicit long filter."""
    pattern: tuple[str, ...] = ("hyena",)
    """lm: mixers of the first layers; repeated down the depth, which must be a multiple of it."""
    layers: tuple[LayerGroup, ...] = ()
    """lm: instead of `pattern`, groups of equal layers from the first to the last."""
    mixers: MixerSettings = MixerSettings()
    """lm: settings of each kind of mixer."""
    norm: Literal["layer", "rms", "rms_outer"] = "layer"
    """lm: LayerNorm, RMSNorm, or RMSNorm with norm_eps outside of the root (StripedHyena 2)."""
    norm_place: Literal["pre", "post"] = "pre"
    """lm: before each mixer and MLP, or after what they add."""
    mlp: Literal["gelu", "swiglu", "geglu", "evo2", "none"] = "gelu"
    """lm: GPT-2's two matrices, or a gated unit; evo2 = gated, with GELU in the first layer and no activation in others."""
    mlp_bias: bool = True
    """lm: biases in the MLP."""
    causal: bool = True
    """lm: false = every token sees the whole sequence, for mixers that can (training with masked tokens, classification)."""
    num_classes: Annotated[Count, Field(ge=0)] = 0
    """lm: above 0, a head that tells so many classes of sequences instead of the next token."""
    pooling: Literal["mean", "last", "first"] = "mean"
    """lm: what of the tokens the head for classes sees."""
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

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, data: Any) -> Any:
        """TOML has arrays where the section has tuples; `layers` say how many they are."""
        if not isinstance(data, dict):
            return data
        found = {k: tuple(v) if k in ("pattern", "layers") and isinstance(v, list) else v for k, v in data.items()}
        groups = found.get("layers")
        if groups and "n_layer" not in found and isinstance(groups, tuple):
            repeats: list[Any] = [
                g.get("repeat", 1) if isinstance(g, dict) else getattr(g, "repeat", None) for g in groups
            ]
            if all(isinstance(n, int) for n in repeats):
                found["n_layer"] = sum(repeats)
        return found

    @model_validator(mode="after")
    def _possible(self) -> Self:
        foreign = HYENADNA_KEYS if self.arch == "lm" else LM_KEYS
        for key in foreign:
            if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                other = "hyenadna" if self.arch == "lm" else "lm"
                hint = f"set model.mixers.hyena.{key}" if self.arch == "lm" else "or set model.arch = 'lm'"
                raise ValueError(f"model.{key} belongs to model.arch = {other!r}; got {self.arch!r}: delete it, {hint}")
        if self.arch == "lm":
            self._check_layers()
        return self

    def _check_layers(self) -> None:
        if self.layers and self.pattern != type(self).model_fields["pattern"].default:
            raise ValueError("model.layers and model.pattern exclude each other; delete one of them")
        for name in self.pattern if not self.layers else [group.mixer for group in self.layers]:
            if name not in MIXERS:
                close = get_close_matches(name, MIXERS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(MIXERS)}"
                raise ValueError(f"model.{'layers' if self.layers else 'pattern'}: unknown mixer {name!r}; {hint}")
            if not self.causal and not getattr(MIXERS[name].make, "is_bidirectional", False):
                can = [n for n, kind in MIXERS.items() if getattr(kind.make, "is_bidirectional", False)]
                raise ValueError(
                    f"model.causal = false: {name!r} is causal by nature; those that can do: {', '.join(can)}"
                )
        if self.layers:
            depth = sum(group.repeat for group in self.layers)
            if depth != self.n_layer:
                raise ValueError(
                    f"model.layers has {depth} layers, model.n_layer = {self.n_layer}; delete model.n_layer"
                )
        elif not self.pattern or self.n_layer % len(self.pattern):
            raise ValueError(
                f"model.n_layer = {self.n_layer} must be a multiple of the {len(self.pattern)} mixers of model.pattern; "
                "change one of them, or give model.layers"
            )

    @property
    def mixer_names(self) -> tuple[str, ...]:
        """Of every layer."""
        if self.arch == "hyenadna":
            return ("hyena",) * self.n_layer
        if self.layers:
            return tuple(group.mixer for group in self.layers for _ in range(group.repeat))
        return self.pattern * (self.n_layer // len(self.pattern))

    @property
    def l_max(self) -> int:
        """Taps of the longest filters, and tokens of the longest sequence."""
        return self.max_len + 2 if self.arch == "hyenadna" else self.max_len

    @property
    def inner(self) -> int:
        return self.d_inner or 4 * self.d_model

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple

    def mixer(self, layer: int) -> tuple[Kind, Section, Place]:
        """How the mixer of a layer is made: kind.make(settings, place)."""
        name = self.mixer_names[layer]
        place = Place(self.d_model, self.l_max, layer, self.n_layer, self.causal)
        if self.arch == "hyenadna":
            settings: Section = HyenaConfig(order=self.order, short_filter=self.short_filter, filter=self.filter)
        else:
            settings = getattr(self.mixers, name)
        return MIXERS[name], settings, place
