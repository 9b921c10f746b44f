"""What a Hugging Face folder says of a model beside its weights: config.json, and the tokenizer of HyenaDNA.

Facts of the published models LongSafari/hyenadna-*-hf, whose code is in their repositories on the hub: its modulation, its
norms' eps in the blocks, its short filter and its order are fixed, and its head is a tensor of its own.
"""

from typing import Any

from seqengine.config.model import ModelConfig
from seqengine.data.tokenizer import PAD, TOKENS, VOCABULARY
from seqengine.errors import InputError
from seqengine.interop import gla
from seqengine.interop.files import SPECIAL_TOKENS, TOKENIZER
from seqengine.interop.hyenadna import Layout
from seqengine.model import LanguageModel

CODE = "LongSafari/hyenadna-tiny-1k-seqlen-hf"
"""Repository on the hub with the Python code that opens HyenaDNA folders, of all sizes."""
HYENADNA_LAYOUT = Layout("hyena.backbone.", "lm_head.weight")
BLOCK_NORM_EPS = 1e-5
SPECIAL = {
    "bos_token": "[BOS]", "cls_token": "[CLS]", "eos_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]",
    "sep_token": "[SEP]", "unk_token": "[UNK]",
}  # fmt: skip


def hyenadna_config(model: LanguageModel) -> dict[str, Any]:
    """config.json of a HyenaDNA model. Raises InputError if the published code has no such model."""
    c = model.config
    problems = [
        f"model.{key} must be {must!r}, which the published code has fixed; got {got!r}."
        for key, must, got in (("order", 2, c.order), ("norm_eps", BLOCK_NORM_EPS, c.norm_eps))
        if got != must
    ]
    if problems:
        raise InputError(*problems)
    return {
        "architectures": ["HyenaDNAForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE}--configuration_hyena.HyenaConfig",
            "AutoModel": f"{CODE}--modeling_hyena.HyenaDNAModel",
            "AutoModelForCausalLM": f"{CODE}--modeling_hyena.HyenaDNAForCausalLM",
            "AutoModelForSequenceClassification": f"{CODE}--modeling_hyena.HyenaDNAForSequenceClassification",
        },
        "model_type": "hyenadna",
        "d_model": c.d_model,
        "n_layer": c.n_layer,
        "d_inner": c.inner,
        "max_seq_len": c.l_max,
        "hyena_order": c.order,
        "short_filter_order": c.short_filter,
        "filter_order": c.filter.order,
        "emb_dim": c.filter.emb_dim,
        "num_inner_mlps": c.filter.inner_layers,
        "activation_freq": c.filter.sine_w,
        "train_freq": True,
        "use_bias": True,
        "embed_dropout": c.embed_dropout,
        "hyena_dropout": 0.0,
        "hyena_filter_dropout": 0.0,
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": 0.02,
        "vocab_size": c.vocab_size,
        "pad_vocab_size_multiple": c.pad_vocab_multiple,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        "torch_dtype": _dtype(model),
    }


def tokenizer_documents(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The files of the character tokenizer; none for another vocabulary."""
    if config.vocab_size != VOCABULARY:
        return {}
    assert all(token in TOKENS for token in SPECIAL.values())
    settings = {
        "tokenizer_class": "HyenaDNATokenizer",
        "auto_map": {"AutoTokenizer": [f"{CODE}--tokenization_hyena.HyenaDNATokenizer", None]},
        "model_max_length": config.l_max,
        "padding_side": "left",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER: {**settings, **SPECIAL}, SPECIAL_TOKENS: dict(SPECIAL)}


def gla_config(model: LanguageModel) -> dict[str, Any]:
    """config.json of a gated linear attention model, for flash-linear-attention."""
    return {**gla.published_config(model), "torch_dtype": _dtype(model)}


def _dtype(model: LanguageModel) -> str:
    return str(model.embedding.weight.dtype).removeprefix("torch.")
