"""backend="triton" through the public functions, in Triton's interpreter: every kernel, state, kind of filter and gradient."""

import pytest
import torch

from seqengine.kernels.api import long_conv, long_conv_bidirectional, short_conv
from seqengine.kernels.conv import ops, triton_dispatch, triton_monarch, triton_toeplitz, triton_two_level
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TOLERANCE = {"auto": 2e-4, "ieee": 2e-5, "bf16x3": 2e-4, "tf32": 2e-5, "fp16": 5e-3}
"""Largest error of float32 tensors relative to the largest value; the interpreter truncates to bfloat16 and has no TF32."""


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(B, D, T, L, filters="channel", dtype=torch.float32, left_out=()):
    k_shape = {"channel": (D, L), "group": (D // 2, L), "sample": (B, D, L)}[filters]
    shapes = {
        "u": (B, D, T), "k": k_shape, "skip": (D,), "pre_gate": (B, D, T), "post_gate": (B, D, T),
        "initial_state": (B, D, L - 1),
    }  # fmt: skip
    return {n: randn(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(shapes.items()) if n not in left_out}


def run(function, arguments, dtype=None, **settings):
    """Outputs and every gradient."""
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in arguments.items()}
    y, state = function(**leaves, output_final_state=True, **settings)
    dy, dstate = randn(*y.shape, seed=90).to(y.dtype), randn(*state.shape, seed=91).to(y.dtype)
    wanted = torch.autograd.grad((y, state), list(leaves.values()), (dy, dstate))
    return {"y": y, "state": state, **{f"d{n}": g for n, g in zip(leaves, wanted, strict=True)}}


def assert_like_torch(arguments, tolerance, function=long_conv, **settings):
    expected = run(function, arguments, torch.float64, backend="torch", **{**settings, "precision": "auto"})
    for name, actual in run(function, arguments, backend="triton", **settings).items():
        assert_close(actual, expected[name], name, tolerance)


@pytest.mark.parametrize("filters", ["channel", "group", "sample"])
@pytest.mark.parametrize(
    "left_out", [(), ("pre_gate", "initial_state"), ("skip", "post_gate", "initial_state")], ids=str
)
@pytest.mark.parametrize(("T", "L"), [(70, 9), (200, 600)], ids=str)
def test_long_conv_with_every_gradient(T, L, left_out, filters):
    assert_like_torch(tensors(2, 4, T, L, filters, left_out=left_out), TOLERANCE["auto"], precision="auto")


@pytest.mark.parametrize("precision", ["fp16", "tf32", "bf16x3", "ieee"])
@pytest.mark.parametrize(("T", "L"), [(65, 30), (530, 530)], ids=str)
def test_each_precision(T, L, precision):
    arguments = tensors(3, 2, T, L, left_out=("initial_state",))
    assert_like_torch(arguments, TOLERANCE[precision], precision=precision)


@pytest.mark.parametrize("state", ["state", "no state"])
def test_two_levels_for_what_no_program_can_hold(state):
    arguments = tensors(
        1, 2, 4200, 4200 if state == "no state" else 700, left_out=() if state == "state" else ("initial_state",)
    )
    assert_like_torch(arguments, TOLERANCE["auto"], precision="auto")


def test_the_dispatch_is_as_documented():
    u = torch.zeros(1, 2, 10_000)

    def longest(L, how="bf16x3", T=10_000):
        return triton_dispatch._fft_kernels(T, L, how)[0]

    assert triton_dispatch._takes_toeplitz(u, torch.zeros(2, 512), None)
    assert not triton_dispatch._takes_toeplitz(u, torch.zeros(2, 513), None)
    assert triton_dispatch._takes_toeplitz(u[..., :512], torch.zeros(2, 9000), None)
    assert not triton_dispatch._takes_toeplitz(u[..., :5], torch.zeros(2, 513), torch.zeros(1, 2, 512))
    assert triton_dispatch._takes_toeplitz(u.double(), torch.zeros(2, 1024), None)
    assert longest(600, T=3000) is triton_monarch.monarch_forward
    assert longest(9000, T=2048) is triton_monarch.monarch_forward
    assert longest(2049, T=2048) is triton_monarch.monarch_forward
    assert longest(600, T=4000) is triton_two_level.two_level_forward
    assert longest(600, "fp16", T=4000) is triton_monarch.monarch_forward
    assert longest(600) is triton_two_level.two_level_forward
    assert triton_toeplitz.CONV_BLOCKS.keys() == {"fp16", "tf32", "bf16x3", "ieee"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype):
    arguments = tensors(2, 2, 100, 40, dtype=dtype)
    limit = RELATIVE[dtype] if dtype == torch.float64 else 5e-3
    assert_like_torch(arguments, limit, precision="auto")


@pytest.mark.parametrize("cuts", [[1] * 9, [5, 0, 4], [8, 1]], ids=str)
def test_any_cut_with_states_is_the_uncut_result(cuts):
    a = tensors(1, 2, 9, 4, dtype=torch.float64)
    whole, end = long_conv(**a, output_final_state=True, backend="triton")
    state, parts = a["initial_state"], []
    for u, pre, post in zip(*(a[n].split(cuts, 2) for n in ("u", "pre_gate", "post_gate")), strict=True):
        y, state = long_conv(
            u, a["k"], skip=a["skip"], pre_gate=pre, post_gate=post, initial_state=state, output_final_state=True,
            backend="triton",
        )  # fmt: skip
        parts.append(y)
    assert_close(torch.cat(parts, 2), whole, "y")
    assert_close(state, end, "state")


def test_second_derivatives():
    a = {n: t.requires_grad_() for n, t in tensors(1, 2, 3, 2, dtype=torch.float64).items()}

    def function(*values):
        return long_conv(**dict(zip(a, values, strict=True)), backend="triton")[0]

    assert torch.autograd.gradgradcheck(function, list(a.values()))


def test_operators_keep_torchs_contract():
    x, dy, k = (randn(2, 4, n, seed=i).requires_grad_() for i, n in enumerate((9, 9, 3)))
    torch.library.opcheck(ops.causal_conv, (x, k, None, None, None, None, "triton", "ieee"))
    needed = [True, True, False, False, False, False]
    torch.library.opcheck(ops.causal_conv_backward, (dy, x, k, None, None, None, None, needed, "triton", "ieee"))


def test_bidirectional():
    u, f, b = randn(2, 2, 90), randn(2, 90, seed=1), randn(2, 40, seed=2)
    y = long_conv_bidirectional(u, f, b, backend="triton")
    assert_close(y, long_conv_bidirectional(u.double(), f.double(), b.double()), "y", TOLERANCE["auto"])


def test_packed_documents():
    a = {"u": randn(1, 3, 50), "k": randn(3, 20, seed=1), "cu_seqlens": torch.tensor([0, 7, 7, 30, 50])}
    y, _ = long_conv(**a, backend="triton")
    assert_close(y, long_conv(**a)[0], "y", TOLERANCE["auto"])
    w = randn(3, 4, seed=2)
    bounds = a["cu_seqlens"]
    y, _ = short_conv(a["u"], w, cu_seqlens=bounds, activation="silu", backend="triton")
    assert_close(y, short_conv(a["u"], w, cu_seqlens=bounds, activation="silu", backend="reference")[0], "y")


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("left_out", [(), ("bias", "initial_state")], ids=str)
def test_short_conv_with_every_gradient(left_out, activation):
    a = {
        "u": randn(2, 5, 33),
        "w": randn(5, 4, seed=1),
        "bias": randn(5, seed=2),
        "initial_state": randn(2, 5, 3, seed=3),
    }
    a = {n: t for n, t in a.items() if n not in left_out}
    expected = run(short_conv, a, torch.float64, backend="reference", activation=activation)
    for name, actual in run(short_conv, a, backend="triton", activation=activation).items():
        assert_close(actual, expected[name], name)


def test_float64_beyond_the_toeplitz_product_is_refused():
    with pytest.raises(ValueError, match="float64 for at most 1024 taps"):
        long_conv(randn(1, 1, 8, dtype=torch.float64), randn(1, 1025, dtype=torch.float64), backend="triton")
    with pytest.raises(ValueError, match="float64 has the precision 'ieee' only"):
        long_conv(
            randn(1, 1, 8, dtype=torch.float64), randn(1, 3, dtype=torch.float64), backend="triton", precision="fp16"
        )


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 2, 0)], ids=str)
def test_empty_inputs(shape):
    B, D, T = shape
    a = tensors(B, D, T, 3)
    for name, actual in run(long_conv, a, backend="triton").items():
        assert bool(torch.isfinite(actual).all()), name
