"""A tiny model of each published format, with weights that matter."""

from typing import Any

import torch

from seqengine.config.model import ModelConfig
from seqengine.interop.formats import FORMATS
from seqengine.model import LanguageModel

LM: dict[str, Any] = {"arch": "lm", "d_model": 8, "max_len": 64}
MODELS: dict[str, dict[str, Any]] = {
    "hyenadna": {"d_model": 8, "n_layer": 2, "max_len": 62, "filter": {"order": 8}},
    "h3": LM | {
        "n_layer": 3, "pattern": ("h3", "attention", "h3"),
        "mixers": {"h3": {"d_state": 4, "head_dim": 2, "init": "inv"}, "attention": {"num_heads": 2, "rotary_dim": 2}},
    },
    "gla": LM | {
        "n_layer": 2, "pattern": ("gla",), "norm": "rms", "norm_eps": 1e-6, "mlp": "swiglu", "mlp_bias": False,
        "mixers": {"gla": {"num_heads": 2, "short_filter": 3}},
    },
    "evo2": LM | {
        "layers": tuple({"mixer": m} for m in ("hyena_se", "hyena_mr", "hyena_li", "attention", "hyena_se")),
        "norm": "rms_outer", "mlp": "evo2", "mlp_bias": False,
        "mixers": {"attention": {"num_heads": 2, "bias": False}, "hyena_mr": {"num_groups": 4}, "hyena_li": {"state_size": 4}},
    },
}  # fmt: skip
assert MODELS.keys() == FORMATS.keys()


def tiny(name: str, **changes: Any) -> LanguageModel:
    """In evaluation mode; its next tokens depend on all that came before."""
    torch.manual_seed(3)
    model = LanguageModel(ModelConfig.model_validate(MODELS[name] | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model
