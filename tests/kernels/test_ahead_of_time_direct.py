"""The direct convolutions compile for GPUs that are not here, and stay within their budgets of memory and registers."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compiler needs a session without TRITON_INTERPRET", allow_module_level=True)

import triton.language as tl

from seqengine.kernels.conv import triton_gates, triton_short, triton_toeplitz
from tests.kernels.ahead_of_time import SHARED_LIMIT_BYTES, compile_ahead

SHORT_KERNELS = {
    "forward": triton_short.short_conv_fwd_kernel,
    "weights": triton_short.short_conv_weight_bwd_kernel,
    "input": triton_short.short_conv_input_bwd_kernel,
}
SHORT_BUDGET = {"shared_bytes": 64, "registers": 80, "stack_bytes": 8}

SHARED_BUDGET_BYTES = {
    ("conv", "fp16", "bf16"): 74_240,
    ("conv", "fp16", "fp32"): 82_432,
    ("conv", "tf32", "bf16"): 57_344,
    ("conv", "tf32", "fp32"): 81_920,
    ("conv", "bf16x3", "bf16"): 16_384,
    ("conv", "bf16x3", "fp32"): 16_384,
    ("conv", "ieee", "fp32"): 32_768,
    ("filter", "fp16", "bf16"): 49_152,
    ("filter", "fp16", "fp32"): 98_304,
    ("filter", "tf32", "bf16"): 49_152,
    ("filter", "tf32", "fp32"): 98_304,
    ("filter", "bf16x3", "bf16"): 32_768,
    ("filter", "bf16x3", "fp32"): 98_304,
    ("filter", "ieee", "fp32"): 32_768,
}
"""By kernel, precision and tensor dtype: the larger of sm_80 and sm_90."""
STACK_BUDGET_BYTES = {
    (80, "forward", "tf32", "fp32"): 24,
    (80, "input", "bf16x3", "bf16"): 8,
    (80, "filter", "bf16x3", "fp32"): 72,
}
"""Spills, bytes a thread, of the variants that have any; sm_90 has none."""

VARIANTS = [
    (what, *key[1:]) for key in SHARED_BUDGET_BYTES for what in {"conv": ("forward", "input")}.get(key[0], key[:1])
]
INTEGERS = {"sb", "sd", "st", "tiles", "D", "G", "T", "L", "first", "length", "channels", "chunks", "columns"}


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def signature(kernel, dtype, integer="i32"):
    """Tensors of activations in `dtype`, parameters and sums in float32."""
    fixed = {"w": "*fp32", "bias": "*fp32", "k": "*fp32", "skip": "*fp32", "partial": "*fp32", "positions": "*i32"}
    return {
        name: integer if name.split("_")[-1] in INTEGERS else fixed.get(name, f"*{dtype}") for name in kernel.arg_names
    }


def compile_short(kernel, arch, dtype, integer="i32", **constants):
    W = constants["W"]
    given = {"SILU": True, "ACC": tl.float32, "UNROLL": min(W, triton_short.UNROLL), **constants}
    known = {name: value for name, value in given.items() if name in kernel.arg_names}
    return compile_ahead(
        kernel, arch, signature(kernel, dtype, integer), known, num_warps=triton_short.NUM_WARPS, num_stages=3
    )


def compile_toeplitz(what, arch, precision, dtype, integer="i32", **constants):
    """The largest variant: gates, skip, and the past or the second result."""
    conv = what != "filter"
    kernel = triton_toeplitz.toeplitz_conv_kernel if conv else triton_toeplitz.toeplitz_filter_bwd_kernel
    table = triton_toeplitz.CONV_BLOCKS if conv else triton_toeplitz.FILTER_BLOCKS
    blocks = table[precision][dtype in ("fp32", "fp64")]
    given = {name: 1 for name in kernel.arg_names if name.endswith("_st")}
    given |= {"ACC": tl.float64 if dtype == "fp64" else tl.float32, "INTERPRETED": False, "PRECISION": precision}
    given |= {"NUM_BANDS": 3, "C": blocks.C, "BN": blocks.BN}
    if conv:
        absent = ("past",) if what == "input" else ("second_gate", "second_out")
        given |= {"REVERSE": what == "input", **dict.fromkeys(absent)}
    else:
        given["SPLIT_TILES"] = 16
    return compile_ahead(
        kernel, arch, signature(kernel, dtype, integer), {**given, **constants},
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip


@pytest.mark.parametrize("what", SHORT_KERNELS)
@pytest.mark.parametrize(("arch", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_short_conv_stays_within_its_budget(arch, dtype, what):
    BD, BT = triton_short.tile_shape(4096, 1)
    built = compile_short(SHORT_KERNELS[what], arch, dtype, W=4, BD=BD, BT=BT, x_st=1, dy_st=1, dz_st=1)
    assert {name: max(getattr(built, name), budget) for name, budget in SHORT_BUDGET.items()} == SHORT_BUDGET


@pytest.mark.parametrize("what", SHORT_KERNELS)
@pytest.mark.parametrize("case", ["channels last", "64 taps", "least", "ones", "wide offsets"])
def test_short_conv_special_cases(case, what):
    """Other tiles, no optional tensor, sizes of 1 (which Triton makes constants), strides of 64 bits."""
    kernel, sizes = SHORT_KERNELS[what], dict(zip(("BD", "BT"), triton_short.tile_shape(4096, 4096)))
    if case == "channels last":
        built = compile_short(kernel, 90, "bf16", W=4, **sizes, x_sd=1, dy_sd=1, dz_sd=1)
    elif case == "64 taps":
        built = compile_short(kernel, 90, "bf16", W=64, BD=1, BT=1024)
    elif case == "least":
        absent = dict.fromkeys(("bias", "past", "positions", *(("dz",) if what == "weights" else ())))
        built = compile_short(kernel, 90, "fp16", W=3, SILU=False, BD=1, BT=1024, **absent)
    elif case == "ones":
        ones = {n: 1 for n in kernel.arg_names if n.split("_")[-1] in INTEGERS}
        built = compile_short(kernel, 90, "bf16", W=1, BD=64, BT=16, **ones, past=None)
    else:
        built = compile_short(kernel, 90, "bf16", "i64", W=4, BD=1, BT=1024)
    assert built.stack_bytes == 0


@pytest.mark.parametrize("what", ["pad", "cut"])
@pytest.mark.parametrize(("arch", "dtype"), [(80, "fp32"), (90, "bf16")])
def test_the_edges_of_a_transform_do_not_spill(arch, dtype, what):
    kernel = triton_gates.pad_gated_kernel if what == "pad" else triton_gates.cut_gated_kernel
    wide = {"p_out": "*fp32", "p_z": "*fp32"}
    types = {n: (wide.get(n, f"*{dtype}") if n.startswith("p_") else "i32") for n in kernel.arg_names}
    known = {n: 1 for n in kernel.arg_names if n.endswith("_st")}
    built = compile_ahead(kernel, arch, types, {"ACC": tl.float32, "BT": triton_gates.TILE_ELEMENTS, **known})
    assert built.shared_bytes <= 4096  # 16-bit loads and 32-bit stores have different owners
    assert built.stack_bytes == 0
    assert built.registers <= 80


@pytest.mark.parametrize(("what", "precision", "dtype"), VARIANTS, ids=lambda v: v)
@pytest.mark.parametrize("arch", SHARED_LIMIT_BYTES)
def test_toeplitz_stays_within_its_budgets(arch, what, precision, dtype):
    built = compile_toeplitz(what, arch, precision, dtype)
    budget = SHARED_BUDGET_BYTES["filter" if what == "filter" else "conv", precision, dtype]
    assert built.shared_bytes <= budget <= SHARED_LIMIT_BYTES[arch]
    assert built.stack_bytes <= STACK_BUDGET_BYTES.get((arch, what, precision, dtype), 0)
    if precision == "ieee":
        assert not built.uses("mma.sync")
        assert not built.uses("wgmma.mma_async")
    else:
        assert built.uses("wgmma.mma_async" if arch == 90 else "mma.sync")


@pytest.mark.parametrize("what", ["input", "filter"])
@pytest.mark.parametrize("case", ["least", "ones", "wide offsets", "float64"])
def test_toeplitz_special_cases(case, what):
    """No optional tensor, sizes of 1 (which Triton makes constants), strides of 64 bits, float64."""
    absent = dict.fromkeys(("gate", "past", "skip", "out_gate", "second_gate", "second_out", "post_gate", "pre_gate"))
    if what == "filter":
        absent = {name: absent[name] for name in ("past", "post_gate", "pre_gate")}
    else:
        absent = {name: None for name in absent if name not in ("post_gate", "pre_gate")}
    if case == "least":
        built = compile_toeplitz(what, 90, "fp16", "fp16", **absent)
        assert built.stack_bytes == 0
    elif case == "ones":
        kernel = getattr(triton_toeplitz, f"toeplitz_{'filter_bwd' if what == 'filter' else 'conv'}_kernel")
        ones = {n: 1 for n in kernel.arg_names if n.split("_")[-1] in INTEGERS}
        built = compile_toeplitz(what, 90, "fp16", "bf16", NUM_BANDS=1, **ones)
    elif case == "wide offsets":
        built = compile_toeplitz(what, 90, "fp16", "bf16", "i64")
    else:
        built = compile_toeplitz(what, 90, "ieee", "fp64")
    assert built.shared_bytes <= SHARED_LIMIT_BYTES[80]
