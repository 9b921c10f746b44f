"""The recurrent cells compile for GPUs that are not here, and stay within their budgets of memory and registers."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the compiler needs a session without TRITON_INTERPRET", allow_module_level=True)

from seqengine.kernels.rnn import triton_rnn
from seqengine.kernels.rnn.loop import CHUNK_TOKENS
from seqengine.kernels.rnn.reference import NUM_GATES, NUM_STATES
from tests.kernels.ahead_of_time import SHARED_LIMIT_BYTES, compile_ahead

KERNELS = {"forward": triton_rnn.rnn_fwd_kernel, "backward": triton_rnn.rnn_bwd_kernel}
SHARED_BUDGET_BYTES = {
    ("forward", "fp32", 64): 16_384,
    ("backward", "fp32", 64): 16_384,
    ("forward", "bf16", 128): 135_168,
    ("backward", "bf16", 128): 147_456,
    ("forward", "fp16", 128): 135_168,
    ("backward", "fp16", 128): 147_456,
}
STACK_BUDGET_BYTES = {
    ("slstm", "backward", "fp32", 64): 304,
    ("slstm", "backward", "bf16", 128): 224,
    ("slstm", "backward", "fp16", 128): 256,
    ("lstm", "backward", "fp32", 64): 240,
    ("gru", "backward", "fp32", 64): 48,
}
"""Spills, bytes a thread, of the variants that have any: the larger of sm_80 and sm_90."""
VARIANTS = [
    *((90, cell, what, "fp32", 64) for cell in ("slstm", "lstm") for what in KERNELS),
    *((90, cell, what, "bf16", 128) for cell in ("slstm", "gru", "elman") for what in KERNELS),
    *((80, "slstm", what, "fp32", 64) for what in KERNELS),
    *((80, "slstm", what, "fp16", 128) for what in KERNELS),
    (80, "lstm", "backward", "bf16", 128),
    (80, "gru", "backward", "fp32", 64),
]


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_rnn(arch, cell, what, dtype, BK, **constants):
    """Gates and weights in `dtype`, everything else in float32."""
    kernel = KERNELS[what]
    own = {"gates": f"*{dtype}", "recurrent": f"*{dtype}", **dict.fromkeys(("B", "T", "H", "K"), "i32")}
    given = {"CELL": cell, "G": NUM_GATES[cell], "S": NUM_STATES[cell], "CHUNK": CHUNK_TOKENS, "INTERPRETED": False}
    given |= {"BB": triton_rnn.BLOCK_SAMPLES, "BK": BK}
    if what == "backward":
        absent = {"of_n": cell != "gru", "memory": NUM_STATES[cell] == 1}
        given |= {name: None for name, is_absent in absent.items() if is_absent}
    signature = {name: own.get(name, "*fp32") for name in kernel.arg_names}
    return compile_ahead(kernel, arch, signature, {**given, **constants}, num_warps=triton_rnn.NUM_WARPS)


@pytest.mark.parametrize(("arch", "cell", "what", "dtype", "BK"), VARIANTS, ids=str)
def test_stays_within_its_budgets(arch, cell, what, dtype, BK):
    built = compile_rnn(arch, cell, what, dtype, BK)
    assert built.shared_bytes <= SHARED_BUDGET_BYTES[what, dtype, BK] <= SHARED_LIMIT_BYTES[80]
    assert built.stack_bytes <= STACK_BUDGET_BYTES.get((cell, what, dtype, BK), 0)
    assert built.uses("mma.sync")  # tensor cores, also for float32: three products of tf32


@pytest.mark.parametrize("what", KERNELS)
def test_sizes_of_one(what):
    """Triton makes them constants, all but T."""
    built = compile_rnn(90, "gru", what, "bf16", 16, B=1, H=1, K=1)
    assert built.stack_bytes == 0


@pytest.mark.parametrize("what", KERNELS)
def test_one_kernel_serves_all_lengths(what):
    specialised = {p.name for p in KERNELS[what].params if not p.do_not_specialize and not p.is_constexpr}
    assert "T" not in specialised
    assert "B" in specialised
