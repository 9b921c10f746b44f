"""The FFT convolutions compile for GPUs that are not here, and stay within their budgets of memory and registers."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compiler needs a session without TRITON_INTERPRET", allow_module_level=True)

from seqengine.kernels.conv import triton_monarch as monarch
from seqengine.kernels.conv import triton_two_level as two_level
from tests.kernels.ahead_of_time import SHARED_LIMIT_BYTES, compile_ahead

ARCHITECTURES = [80, 90]

MONARCH_STACK_BYTES = {
    (1024, "fp16"): (0, 0),
    (4096, "fp16"): (0, 8),
    (8192, "fp16"): (48, 64),
    (1024, "tf32"): (0, 16),
    (4096, "tf32"): (16, 192),
    (1024, "bf16x3"): (0, 0),
    (4096, "bf16x3"): (1024, 96),
    (1024, "ieee"): (0, 0),
}
"""Spills, bytes a thread, of (forward, filter gradient) where the sequence fills half of the points."""

TWO_LEVEL_STACK_BYTES = {
    "fp16": {"outer": 0, "inverse": 0, "inner": 0, "filter": 32},
    "tf32": {"outer": 64, "inverse": 0, "inner": 160, "filter": 384},
    "bf16x3": {"outer": 96, "inverse": 64, "inner": 160, "filter": 96},
}


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(kernel, arch, pointers, constants, num_warps, num_stages=1, floats=()):
    signature = dict.fromkeys(kernel.arg_names, "i32") | pointers | dict.fromkeys(floats, "fp32")
    built = compile_ahead(kernel, arch, signature, constants, num_warps=num_warps, num_stages=num_stages)
    assert built.shared_bytes <= SHARED_LIMIT_BYTES[arch]
    return built


def tables_type(precision):
    return "*fp16" if precision == "fp16" else "*fp32"


def compile_monarch(what, arch, N, precision, full=False, conj=False):
    N1, N2 = monarch.FACTORS[N]
    constants = {"N1": N1, "N2": N2, "BR": N1 if full else N1 // 2, "PRECISION": precision, "UPCAST": False}
    pointers = dict.fromkeys(["p_u", "p_pre", "p_post"], "*bf16") | {"p_tables": tables_type(precision)}
    if what == "forward":
        kernel = monarch.monarch_fwd_kernel
        constants["CONJ"] = conj
        pointers |= dict.fromkeys(["p_kr", "p_ki"], tables_type(precision))
        pointers |= {"p_skip": "*fp32", "p_scale": "*fp32", "p_y": "*bf16"}
    else:
        kernel = monarch.monarch_filter_bwd_kernel
        pointers |= dict.fromkeys(["p_xr", "p_xi", "p_dkr", "p_dki"], "*fp32") | {"p_dy": "*bf16"}
    return compile_kernel(kernel, arch, pointers, constants, monarch.num_warps(N, precision))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("N", "precision"), MONARCH_STACK_BYTES)
@pytest.mark.parametrize("what", ["forward", "filter"])
def test_monarch(what, N, precision, arch):
    built = compile_monarch(what, arch, N, precision)
    assert built.stack_bytes <= MONARCH_STACK_BYTES[N, precision][what == "filter"]
    assert built.shared_bytes <= 96 * 1024
    assert (built.uses("mma.sync") or built.uses("wgmma.mma_async")) == (precision != "ieee")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("what", ["forward", "filter"])
def test_monarch_in_float16_with_all_rows(what, arch):
    """A short filter: the sequence fills more than half of the 4096 points."""
    built = compile_monarch(what, arch, 4096, "fp16", full=True, conj=True)
    assert built.stack_bytes <= 8
    assert built.uses("wgmma.mma_async" if arch == 90 else "mma.sync")


def compile_two_level(what, arch, precision):
    table, inner = tables_type(precision), {"PRECISION": precision, "UPCAST": False, "SIDE": 64}
    outer = {"PRECISION": precision, "UPCAST": False, "M": 4096, "BM": two_level.COLUMNS, "BK": 64, "BR": 64}
    scale = {"p_scale": "*fp32"} if precision == "fp16" else {}
    no_scale = {} if scale else {"p_scale": None}
    rows = dict.fromkeys(["p_u", "p_pre", "p_post"], "*bf16") | {"p_skip": "*fp32", "p_kscale": "*fp32", "p_y": "*bf16"}
    warps = monarch.num_warps(4096, precision)
    if what == "outer":
        pointers = rows | dict.fromkeys(["p_table", "p_ar", "p_ai"], table) | {"p_twiddle": "*fp32"} | scale
        kernel, constants = two_level.outer_fwd_kernel, outer | {"SIDE": 64} | no_scale
        return compile_kernel(kernel, arch, pointers, constants, two_level._outer_warps(precision), 3, ["FACTOR"])
    if what == "inverse":
        pointers = rows | dict.fromkeys(["p_table", "p_zr", "p_zi"], table) | scale
        kernel, constants = two_level.outer_inverse_kernel, outer | no_scale
        return compile_kernel(kernel, arch, pointers, constants, two_level._outer_warps(precision), 3, ["FACTOR"])
    if what == "inner":
        pointers = dict.fromkeys(["p_ar", "p_ai", "p_kr", "p_ki", "p_tables"], table) | {"p_twiddle": "*fp32"}
        return compile_kernel(two_level.inner_fwd_kernel, arch, pointers, inner | {"CONJ": False}, warps)
    pointers = dict.fromkeys(["p_xr", "p_xi", "p_gr", "p_gi", "p_tables"], table)
    pointers |= dict.fromkeys(["p_dkr", "p_dki"], "*fp32")
    pointers |= dict.fromkeys(["p_xscale", "p_gscale"], "*fp32") if scale else {}
    absent = {} if scale else {"p_xscale": None, "p_gscale": None}
    return compile_kernel(two_level.inner_filter_bwd_kernel, arch, pointers, inner | absent, warps)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("precision", TWO_LEVEL_STACK_BYTES)
@pytest.mark.parametrize("what", ["outer", "inverse", "inner", "filter"])
def test_two_level(what, precision, arch):
    built = compile_two_level(what, arch, precision)
    assert built.stack_bytes <= TWO_LEVEL_STACK_BYTES[precision][what]
    assert built.uses("wgmma.mma_async" if arch == 90 else "mma.sync")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("what", ["outer", "inverse"])
def test_two_level_outer_in_float32(what, arch):
    """Exact float32 products run on the ordinary cores; they are for comparison, not for speed."""
    assert compile_two_level(what, arch, "ieee").stack_bytes <= 384


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_largest_elements(arch):
    pointers = {"p_u": "*bf16", "p_pre": "*bf16", "p_max": "*fp32"}
    built = compile_kernel(two_level.row_max_kernel, arch, pointers, {"CHUNK": two_level.CHUNK}, 4)
    assert built.stack_bytes == 0
