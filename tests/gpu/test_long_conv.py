"""long_conv on a CUDA device: both backends, every kernel and precision, every gradient, against float64."""

import pytest
import torch

from seqengine.kernels.api import long_conv, long_conv_bidirectional
from tests.gpu.cases import check_long_conv, draw, exact_conv, hold, limit, outcome, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KERNELS = {"toeplitz": (1001, 130), "monarch-4096": (1999, 1001), "two-level": (9001, 9001)}
"""T and L that the Triton backend gives to each kernel."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "L"), [(1, 1), (1000, 130), (4097, 4097), (65537, 40000)], ids=str)
def test_torch_with_every_gradient(device, record_error, T, L, dtype):
    check_long_conv(*draw(device, 2, 6, T, L, dtype), "torch", "auto", record_error)


@pytest.mark.parametrize("precision", ["auto", "fp16", "tf32", "ieee"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_triton_in_float32_with_every_gradient(device, record_error, kernel, precision):
    T, L = KERNELS[kernel]
    check_long_conv(*draw(device, 3, 6, T, L, torch.float32), "triton", precision, record_error, kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", [*KERNELS, "monarch-8192"])
def test_triton_in_halves_with_every_gradient(device, record_error, kernel, dtype):
    T, L = KERNELS.get(kernel, (4001, 3001))
    check_long_conv(*draw(device, 3, 6, T, L, dtype), "triton", "auto", record_error, kernel)


@pytest.mark.parametrize("L", [1, 65, 600])
def test_triton_in_float64(device, record_error, L):
    check_long_conv(*draw(device, 2, 6, 777, L, torch.float64), "triton", "auto", record_error, "toeplitz")


VARIANTS = {
    "plain": {"gated": False, "skip": False},
    "skip": {"gated": False},
    "grouped": {"filters": 2},
    "filter a sample": {"filters": "each"},
    "state": {"past": True},
    "grouped state": {"filters": 3, "past": True, "gated": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("T", "L"), [(517, 65), (3001, 900), (6001, 6500)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_variants_with_every_gradient(device, backend, T, L, variant):
    check_long_conv(*draw(device, 3, 6, T, L, torch.float32, **VARIANTS[variant]), backend, "auto")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("T", [1, 2, 3, 63, 65, 257])
def test_small_odd_lengths(device, backend, T):
    for L in sorted({1, 2, max(1, T - 1), T, T + 1, 3 * T}):
        check_long_conv(*draw(device, 3, 2, T, L, torch.float32), backend, "auto")


def test_triton_with_a_million_tokens(device, record_error):
    given, dy = draw(device, 1, 8, 2**20, 2**20, torch.bfloat16)
    check_long_conv(given, dy, "triton", "auto", record_error, "two-level 2^20")


def test_torch_with_a_million_tokens(device, record_error):
    check_long_conv(*draw(device, 1, 8, 2**20, 2**20, torch.float32), "torch", "auto", record_error, "2^20")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("L", [100, 3000])
def test_cut_with_states_is_the_uncut_result(device, backend, L):
    given, _ = draw(device, 2, 4, 7001, L, torch.float32)
    whole, final = long_conv(**given, output_final_state=True, backend=backend)
    parts, state = [], None
    for first, last in [(0, 1), (1, 4), (4, 2048), (2048, 7001)]:
        piece = {name: t[..., first:last] if t.shape == given["u"].shape else t for name, t in given.items()}
        y, state = long_conv(**piece, initial_state=state, output_final_state=True, backend=backend)
        parts.append(y)
    hold({"y": torch.cat(parts, dim=-1)}, {"y": whole}, 2 * limit(backend, "auto", torch.float32, L))
    assert torch.equal(state, final)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("L", [100, 3000])
def test_strided_inputs_give_the_same(device, backend, L):
    given, dy = draw(device, 2, 6, 3001, L, torch.bfloat16)
    large = ("u", "pre_gate", "post_gate")
    turned = {n: t.mT.contiguous().mT if n in large else t for n, t in given.items()}
    joined = torch.cat([given[n] for n in large], dim=1).split(6, dim=1)
    check_long_conv(turned, dy.mT.contiguous().mT, backend, "auto")
    check_long_conv(given | dict(zip(large, joined)), dy[..., :1].expand_as(dy), backend, "auto")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("L", [200, 3001])
def test_bidirectional_with_every_gradient(device, backend, L):
    given, dy = draw(device, 2, 6, 3001, L, torch.float32)
    given["k_forward"] = given.pop("k")
    given["k_backward"] = given["k_forward"].flip(-1).contiguous()

    def exact(u, skip, pre_gate, post_gate, k_forward, k_backward):
        x = pre_gate * u
        mirrored = exact_conv(x.flip(-1), k_backward).flip(-1)
        return post_gate * (exact_conv(x, k_forward, skip) + mirrored)

    found = outcome(lambda **x: long_conv_bidirectional(**x, backend=backend), given, dy)
    expected = outcome(exact, {n: t.double() for n, t in given.items()}, dy.double())
    hold(found, expected, limit(backend, "auto", torch.float32, L))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("L", [100, 1500, 6001])
def test_bitwise_the_same_in_five_runs(device, backend, L):
    given, dy = draw(device, 4, 32, 6001, L, torch.bfloat16)
    same_bits(lambda: list(outcome(lambda **x: long_conv(**x, backend=backend)[0], given, dy).values()), 5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("L", [100, 1500, 6001])
def test_a_stream_of_its_own_waits_for_its_inputs(device, backend, L):
    """On the default stream the kernels would read u before the sleeping stream has written it."""
    given, dy = draw(device, 2, 16, 3001, L, torch.float32)

    def run(arguments):
        return outcome(lambda **x: long_conv(**x, backend=backend)[0], arguments, dy)

    expected = run(given)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {name: torch.zeros_like(t) for name, t in given.items()}
        torch.cuda._sleep(200_000_000)
        for name, t in given.items():
            late[name].copy_(t)
        found = run(late)
    stream.synchronize()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("L", [100, 1500, 6001])
def test_later_inputs_change_nothing_before_them(device, backend, L):
    given, _ = draw(device, 2, 4, 6001, L, torch.float32)
    before, _ = long_conv(**given, backend=backend)
    given["u"][..., 3000:] = -given["u"][..., 3000:]
    after, _ = long_conv(**given, backend=backend)
    hold({"y": after[..., :3000]}, {"y": before[..., :3000]}, limit(backend, "auto", torch.float32, L))
    assert not torch.equal(after[..., 3000:], before[..., 3000:])
