"""Gated linear attention compiles for GPUs that are not here, and stays within its budgets of memory and registers."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compiler needs a session without TRITON_INTERPRET", allow_module_level=True)

import torch
import triton.language as tl

from seqengine.kernels.linear_attention import triton_gla, triton_gla_backward, triton_simple_gla, triton_states
from tests.kernels.ahead_of_time import SHARED_LIMIT_BYTES, compile_ahead

KERNELS = {
    "state": (triton_states.state_kernel, triton_states.STATE_BLOCKS),
    "join": (triton_states.join_kernel, triton_states.STATE_BLOCKS),
    "scores": (triton_gla.gla_scores_kernel, triton_gla.SCORE_BLOCKS),
    "output": (triton_gla.gla_output_kernel, triton_gla.OUTPUT_BLOCKS),
    "score gradients": (triton_gla_backward.gla_score_gradients_kernel, triton_gla_backward.SCORE_GRADIENT_BLOCKS),
    "intra": (triton_gla_backward.gla_intra_bwd_kernel, triton_gla_backward.INTRA_BLOCKS),
    "inter": (triton_gla_backward.gla_inter_bwd_kernel, triton_gla_backward.INTER_BLOCKS),
    "simple output": (triton_simple_gla.simple_gla_output_kernel, triton_simple_gla.OUTPUT_BLOCKS),
    "simple gradients": (triton_simple_gla.simple_gla_gradients_kernel, triton_simple_gla.GRADIENT_BLOCKS),
}
SUMS = {"scores", "d_scores", "states", "d_states", "start", "starts", "local", "final", "part_q", "part_k", "part_g"}
TABLES = {"ends", "offsets", "documents", "spans"}
INTEGERS = {"sb", "st", "sh", "sk", "sv", "sample", "document", "chunks", "B", "T", "H", "K", "V"}

SHARED_BUDGET_BYTES = {
    ("state", "fp32"): 41_216,
    ("state", "bf16"): 65_536,
    ("join", "fp32"): 0,
    ("join", "bf16"): 0,
    ("scores", "fp32"): 20_480,
    ("scores", "bf16"): 20_480,
    ("output", "fp32"): 32_768,
    ("output", "bf16"): 36_864,
    ("score gradients", "fp32"): 32_768,
    ("score gradients", "bf16"): 32_768,
    ("intra", "fp32"): 24_576,
    ("intra", "bf16"): 16_384,
    ("inter", "fp32"): 65_536,
    ("inter", "bf16"): 65_536,
    ("simple output", "fp32"): 33_024,
    ("simple output", "bf16"): 32_768,
    ("simple gradients", "fp32"): 34_816,
    ("simple gradients", "bf16"): 49_152,
}
"""By kernel and tensor dtype: the largest of sm_80, sm_90 and all variants."""
STACK_BUDGET_BYTES = {
    (80, "score gradients", "bf16"): 24,
    (80, "inter", "bf16"): 8,
    (80, "simple gradients", "bf16"): 8,
    (80, "state", "fp32"): 8,
    (80, "output", "fp32"): 104,
    (90, "scores", "fp32"): 24,
}
"""Spills, bytes a thread, of those that have any; in 16 bits sm_90 has none."""


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def signature(kernel, dtype, integer):
    """Tensors of activations in `dtype`; gates, states and sums in float32, the sums of gates in float64."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    types = {}
    for name in kernel.arg_names:
        if name in TABLES:
            types[name] = "*i64"
        elif name.split("_")[-1] in INTEGERS:
            types[name] = integer
        elif name == "scale":
            types[name] = "fp32"
        elif name == "sums":
            types[name] = "*fp64"
        elif name in SUMS or name == "g":
            types[name] = f"*{wide}"
        else:
            types[name] = f"*{dtype}"
    return types


def compile_kernel(what, arch, dtype, size=128, integer="i32", **constants):
    """Without documents, all tensors dense, unless `constants` says otherwise."""
    kernel, table = KERNELS[what]
    precision = "tf32" if dtype in ("bf16", "fp16") else "ieee"
    blocks = triton_states.pick(table, precision, torch.float64 if dtype == "fp64" else torch.float32, size, size)
    given = {name: 1 for name in kernel.arg_names if name.endswith(("_sk", "_sv"))} | dict.fromkeys(TABLES)
    given |= {"PRECISION": precision, "ACC": tl.float64 if dtype == "fp64" else tl.float32}
    given |= {"C": triton_states.CHUNK, "BC": triton_gla.BLOCK, "BK": blocks.BK, "BV": blocks.BV, "SCALAR": False}
    given |= {"REVERSE": False} | ({"sums": None} if what == "state" else {})
    given |= constants
    known = {name: value for name, value in given.items() if name in kernel.arg_names and value != "present"}
    return compile_ahead(kernel, arch, signature(kernel, dtype, integer), known, num_warps=blocks.num_warps)


def check(built, what, arch, dtype):
    assert built.shared_bytes <= SHARED_BUDGET_BYTES[what, dtype] <= SHARED_LIMIT_BYTES[80]
    assert built.stack_bytes <= STACK_BUDGET_BYTES.get((arch, what, dtype), 0)
    assert (built.uses("mma.sync") or built.uses("wgmma.mma_async")) == (dtype == "bf16" and what != "join")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", SHARED_LIMIT_BYTES)
@pytest.mark.parametrize("what", KERNELS)
def test_stays_within_its_budgets(what, arch, dtype):
    """The tiles of K = V = 64 and of K = V = 128 are the same, and so is the machine code: sizes are run-time arguments."""
    _, table = KERNELS[what]
    precision = "tf32" if dtype == "bf16" else "ieee"
    assert len({triton_states.pick(table, precision, torch.float32, n, n) for n in (64, 128, 256)}) == 1
    check(compile_kernel(what, arch, dtype), what, arch, dtype)


VARIANTS = {
    "reverse": (("state", "output", "simple output"), {"REVERSE": True}),
    "segment alone": (("state",), {"sums": "present", "spans": "present", "start": None, "states": None}),
    "segment from its start": (("state",), {"spans": "present", "final": None}),
    "one gate a head": (("state",), {"SCALAR": True}),
    "documents": (("scores", "intra", "simple gradients"), dict.fromkeys(TABLES, "present")),
    "fixed decay": (("simple output", "simple gradients"), {"g_st": None}),
    "no decay": (("simple output", "simple gradients"), {"g": None, "part_g": None}),
    "wide offsets": (("inter",), {"integer": "i64"}),
}


@pytest.mark.parametrize(("variant", "what"), [(v, w) for v, (whats, _) in VARIANTS.items() for w in whats], ids=str)
def test_variants_stay_within_their_budgets(what, variant):
    check(compile_kernel(what, 90, "bf16", **VARIANTS[variant][1]), what, 90, "bf16")


@pytest.mark.parametrize(
    ("what", "dtype", "size"),
    [
        ("scores", "bf16", 1),
        ("inter", "bf16", 1),
        ("state", "fp64", 64),
        ("intra", "fp64", 64),
        ("simple gradients", "fp64", 64),
    ],
    ids=str,
)
def test_narrow_tiles_and_float64_fit(what, dtype, size):
    assert compile_kernel(what, 90, dtype, size).shared_bytes <= SHARED_LIMIT_BYTES[80]


@pytest.mark.parametrize("what", KERNELS)
def test_sizes_of_1_are_constants(what):
    """Triton makes them so."""
    ones = {name: 1 for name in KERNELS[what][0].arg_names if name.split("_")[-1] in INTEGERS}
    assert compile_kernel(what, 90, "bf16", 1, **ones).shared_bytes <= SHARED_LIMIT_BYTES[80]
