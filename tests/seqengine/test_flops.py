"""FLOPs for a token: matrices as torch counts them, mixing by the stated formulas, and MFU."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from seqengine.config.load import load
from seqengine.config.model import ModelConfig
from seqengine.flops import (
    Flops,
    Utilisation,
    convolution,
    flops_per_token,
    mean_keys,
    model_flops,
    peak_flops,
    peak_of,
)
from seqengine.mixers.registry import MIXERS
from seqengine.model import LanguageModel

LM = {"arch": "lm", "d_model": 32, "n_layer": 2, "max_len": 256, "embed_dropout": 0.0}


def matrix_products(config: ModelConfig, tokens: int) -> int:
    """Operations of products with 2-d weights in a forward pass, as torch counts them, the embedding's gather left out."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LanguageModel(config)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if str(op).split(".")[1] in ("mm", "addmm", "bmm", "baddbmm"))


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_matrices_of_blocks_and_head_are_those_that_torch_counts(mlp):
    config = ModelConfig(**LM, mlp=mlp, pattern=("s4d",))
    counted = model_flops(config, 64)
    assert (counted.weights.forward + counted.head.forward) * 64 == matrix_products(config, 64)
    assert counted.weights.backward == 2 * counted.weights.forward


def test_attention_is_the_projections_and_the_keys_that_a_token_sees():
    config = ModelConfig(**LM, pattern=("attention",), mlp="none")
    counted = model_flops(config, 100)
    assert counted.weights.forward == 2 * (2 * 4 * 32 * 32)
    assert counted.mixing.forward == 2 * (4 * 32 * 50.5)
    assert counted.mixing.backward == 2 * counted.mixing.forward


def test_keys_seen_are_counted_one_by_one():
    for T in (1, 2, 7, 30):
        for window in (None, 1, 3, 7, 100):
            reach = T if window is None else window
            causal = sum(min(t + 1, reach) for t in range(T)) / T
            assert mean_keys(T, window, causal=True) == pytest.approx(causal, rel=1e-12)
            both = sum(min(t + 1, reach) + min(T - t, reach) - 1 for t in range(T)) / T
            assert mean_keys(T, window, causal=False) == pytest.approx(both, rel=1e-12)


def test_a_long_convolution_costs_two_real_ffts_of_twice_the_length():
    T = 4096
    assert convolution(T, 10 * T) == Flops(10 * math.log2(2 * T) + 6, 10 * math.log2(2 * T) + 12)
    assert convolution(T, 3) == Flops(6.0, 12.0), "tap by tap is cheaper"
    assert convolution(10**6, 64).total < convolution(10**6, 10**6).total


def test_a_hyena_model_is_the_sum_of_its_parts():
    D, T = 128, 1024
    config = load("hyenadna-tiny-1k", need_data=False).config.model
    counted = model_flops(config, T)
    short = 3 * 3 * D
    assert counted.weights.forward == 2 * 2 * (4 * D * D + 8 * D * D)
    assert counted.mixing.forward == 2 * (D * convolution(T, T).forward + 2 * short)
    assert counted.head.total == 6 * 16 * D
    assert counted.total == flops_per_token(config, T)


def test_every_mixer_has_a_count_and_counting_draws_no_random_numbers():
    state = torch.random.get_rng_state()
    for name in MIXERS:
        counted = model_flops(lm_of(name), 255)
        assert counted.mixing.total > 0, name
        assert counted.weights.total > 0, name
    assert torch.equal(state, torch.random.get_rng_state())


def test_presets_cost_about_six_operations_a_parameter_and_more():
    for name in ("hyenadna-large-1m", "gla-tiny", "h3-tiny", "hyena-tiny", "striped-hyena2-tiny"):
        config = load(name, ["train.steps=1", "schedule.warmup=0"], need_data=False).config
        with torch.device("meta"):
            model = LanguageModel(config.model)
        parameters = sum(p.numel() for p in model.parameters()) if config.model.tied_head else 0
        assert flops_per_token(config.model, config.data.seq_len) > 5 * parameters, name


def lm_of(name: str, **changes) -> ModelConfig:
    """A model of one kind of mixer, small enough for its heads."""
    small = {"gated_delta": {"head_dim": 16, "num_heads": 2}, "ssd": {"head_dim": 16}}
    return ModelConfig(**{**LM, **changes}, pattern=(name,), mixers={k: v for k, v in small.items() if k == name})


@pytest.mark.parametrize("name", ["gla", "retention", "linear_attention", "ssd", "gated_delta"])
def test_states_cost_the_same_at_any_length(name):
    assert flops_per_token(lm_of(name), 8) == flops_per_token(lm_of(name), 256)
    K, V, H = {"gla": (4, 8, 4), "retention": (4, 8, 8), "linear_attention": (4, 4, 8), "ssd": (128, 16, 4),
               "gated_delta": (16, 32, 2)}[name]  # fmt: skip
    assert state_products(lm_of(name, n_layer=1)) == (6 if name == "gated_delta" else 4) * H * K * V


def state_products(config: ModelConfig) -> float:
    """Forward mixing of the one layer, without its short convolution."""
    kind, settings, place = config.mixer(0)
    with torch.device("meta"):
        mixer = kind.make(settings, place)
    short = sum(2 * p.numel() for n, p in mixer.named_parameters() if n.endswith("conv_weight"))
    return model_flops(config, 64).mixing.forward - short


def test_mfu_is_the_work_asked_for_over_what_all_devices_could_do():
    config = ModelConfig(d_model=8, n_layer=1, max_len=64)
    used = Utilisation(config, num_ranks=4, peak=1e9)
    work = flops_per_token(config, 64)
    assert used.figures(1000.0, 64) == {"mfu": 1000.0 * work / 4e9}
    assert Utilisation(config, num_ranks=4, peak=None).figures(1000.0, 64) == {}


def test_peaks_are_known_by_name_or_told():
    assert peak_of("NVIDIA H200", "bf16") == pytest.approx(989.4e12)
    assert peak_of("NVIDIA H100 PCIe", "bf16") < peak_of("NVIDIA H100 80GB HBM3", "bf16")
    assert peak_of("NVIDIA A100-SXM4-80GB", "fp32") == pytest.approx(19.5e12)
    assert peak_of("Something else", "bf16") is None
    assert peak_flops(torch.device("cpu"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "fp32", tflops=0.5) == 5e11


def test_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="tokens: must be at least 1; got 0"):
        flops_per_token(ModelConfig(), 0)
