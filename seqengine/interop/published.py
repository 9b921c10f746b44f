"""The settings of H3 and StripedHyena 2 models under their published names: the inverse of `to_config`.

These models have no folder on the hub that one library opens; config.json holds what their code is made with.
"""

from typing import Any

from seqengine.config.model import ModelConfig
from seqengine.interop.evo2 import MIXERS as STRIPED
from seqengine.interop.evo2 import Layout


def h3_config(config: ModelConfig) -> dict[str, Any]:
    """d_model, n_layer, ssm_cfg and so on of a model of H3 layers, with attention in some."""
    h3, attention = _settings(config, "h3"), _settings(config, "attention")
    where = [i for i, name in enumerate(config.mixer_names) if name == "attention"]
    settings = {
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "d_inner": config.inner,
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.pad_vocab_multiple,
        "ssm_cfg": {
            "mode": "diag",
            "measure": f"diag-{h3.init}",
            "disc": h3.discretisation,
            "d_state": h3.d_state,
            "head_dim": h3.head_dim,
            "dt_min": h3.step_min,
            "dt_max": h3.step_max,
            "l_max": config.max_len,
        },
        "attn_layer_idx": where,
        "embed_dropout": config.embed_dropout,
        "resid_dropout": config.resid_dropout,
        "layer_norm_epsilon": config.norm_eps,
    }
    if where:
        settings["attn_cfg"] = {
            "num_heads": attention.num_heads,
            "num_heads_kv": attention.num_kv_heads,
            "causal": True,
            "rotary_emb_dim": _turning(config, attention),
            "rotary_emb_base": attention.rotary_base,
            "rotary_emb_interleaved": attention.rotary_interleaved,
            "qkv_proj_bias": attention.bias,
            "out_proj_bias": attention.out_bias,
        }
    return settings


def evo2_config(config: ModelConfig) -> dict[str, Any]:
    """What the configuration files of the Evo 2 models have, with the row order of `evo2.Layout`."""
    names, layout = config.mixer_names, Layout()
    long, middle, short = (_settings(config, name) for name in ("hyena_li", "hyena_mr", "hyena_se"))
    attention = _settings(config, "attention")
    one = next((_settings(config, name) for name in names if name != "attention"), short)
    heads, groups = attention.num_heads, attention.num_heads // (attention.num_kv_heads or attention.num_heads)
    return {
        "hidden_size": config.d_model,
        "num_layers": config.n_layer,
        "vocab_size": config.padded_vocab,
        "max_seqlen": config.max_len,
        "inner_mlp_size": config.inner,
        "eps": config.norm_eps,
        "final_norm": True,
        "tie_embeddings": config.tied_head,
        "mlp_activation": "silu" if config.mlp == "swiglu" else "gelu",
        "evo2_style_activations": config.mlp == "evo2",
        **{f"{kind}_layer_idxs": [i for i, n in enumerate(names) if n == name] for kind, name in STRIPED.items()},
        "short_filter_length": one.short_filter,
        "short_filter_bias": one.short_bias,
        "hyena_out_proj_bias": one.out_bias,
        "qkv_proj_bias": attention.bias if set(names) == {"attention"} else one.bias,
        "mha_out_proj_bias": attention.out_bias,
        "state_size": long.state_size,
        "hcm_filter_length": middle.taps,
        "hcm_filter_groups": middle.num_groups or config.d_model,
        "hcs_filter_length": short.taps,
        "hcs_filter_groups": short.num_groups or config.d_model,
        "num_attention_heads": heads,
        "proj_groups": groups,
        "rotary_emb_base": attention.rotary_base,
        "use_interpolated_rotary_pos_emb": attention.rotary_scale != 1.0,
        "rotary_emb_scaling_factor": attention.rotary_scale,
        "interleave": layout.interleave,
        "column_split_hyena": layout.column_split_hyena,
        "hyena_flip_x1x2": layout.hyena_flip_x1x2,
        "column_split": layout.column_split and groups == 1,
    }


def _settings(config: ModelConfig, mixer: str) -> Any:
    return getattr(config.mixers, mixer)


def _turning(config: ModelConfig, attention: Any) -> int:
    """Channels of a head that turn; 0 without rotary positions."""
    if not attention.rotary:
        return 0
    return int(attention.rotary_dim or config.d_model // attention.num_heads)
