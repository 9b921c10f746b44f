"""The Monarch and two-level launchers on a CUDA device: every size and precision, and the same bits run after run."""

import pytest
import torch

from tests.gpu.cases import LIMIT, draw, exact_conv, hold, outcome, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

SIZES = {
    "monarch-1024": (500, 499),
    "monarch-4096": (2048, 2048),
    "monarch-8192": (4096, 4096),
    "two-level": (20001, 777),
}
PRECISIONS = ["fp16", "bf16x3", "tf32", "ieee"]
RUNS = 20


@pytest.fixture
def launchers():
    """(forward, input gradient, filter gradient) of a kernel."""
    from seqengine.kernels.conv import triton_monarch as monarch
    from seqengine.kernels.conv import triton_two_level as two_level

    both = {
        "monarch": (monarch.monarch_forward, monarch.monarch_input_gradient, monarch.monarch_filter_gradient),
        "two": (two_level.two_level_forward, two_level.two_level_input_gradient, two_level.two_level_filter_gradient),
    }
    return lambda kernel: both[kernel.partition("-")[0]]


def run_all(three, given, dy, precision):
    """y, du and dk, each by its launcher."""
    forward, input_gradient, filter_gradient = three
    u, k, skip, pre, post = (given.get(name) for name in ("u", "k", "skip", "pre_gate", "post_gate"))
    return {
        "y": forward(u, k, skip, pre, post, precision),
        "du": input_gradient(dy, k, skip, pre, post, precision),
        "dk": filter_gradient(dy, u, k.shape[-1], pre, post, precision),
    }


def check(three, given, dy, precision, record, how):
    found = run_all(three, given, dy, precision)
    exact = outcome(exact_conv, {name: t.double() for name, t in given.items()}, dy.double())
    hold(found, {name: exact[name] for name in found}, LIMIT[precision], record, how)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kernel", SIZES)
def test_every_kernel_in_every_precision(device, launchers, record_error, kernel, precision):
    if kernel == "monarch-8192" and precision != "fp16":
        pytest.skip("8192 points are for fp16 only")
    given, dy = draw(device, 5, 16, *SIZES[kernel], torch.float32)
    check(launchers(kernel), given, dy, precision, record_error, f"launcher {kernel} {precision}")


@pytest.mark.parametrize("B", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("kernel", ["monarch-1024", "monarch-4096", "monarch-8192"])
def test_monarch_gradients_are_the_same_bits_in_every_run(device, launchers, kernel, B):
    """The filter gradient keeps a spectrum in memory between two transforms: a missing barrier would show here."""
    T, L = SIZES[kernel]
    three = launchers(kernel)
    for D, shorter in ((1, 0), (64, 1), (200, T // 3)):
        given, dy = draw(device, B, D, T - shorter, L, torch.float32)
        first = same_bits(lambda given=given, dy=dy: list(run_all(three, given, dy, "fp16").values()), RUNS)
        exact = outcome(exact_conv, {name: t.double() for name, t in given.items()}, dy.double())
        hold(dict(zip(("y", "du", "dk"), first)), {name: exact[name] for name in ("y", "du", "dk")}, LIMIT["fp16"])


@pytest.mark.parametrize("precision", ["bf16x3", "tf32"])
@pytest.mark.parametrize("kernel", ["monarch-1024", "monarch-4096"])
def test_monarch_is_the_same_bits_in_other_precisions(device, launchers, kernel, precision):
    given, dy = draw(device, 7, 96, *SIZES[kernel], torch.float32)
    same_bits(lambda: list(run_all(launchers(kernel), given, dy, precision).values()), RUNS)


@pytest.mark.parametrize("T", [2049, 4096, 8193, 20001, 65537, 200_003])
def test_two_level_in_place_is_the_same_bits_in_every_run(device, launchers, T):
    """Rows of the outer transform are replaced by the inner one where they stand."""
    three = launchers("two-level")
    for B, D in ((1, 3), (3, 40)):
        given, dy = draw(device, B, D, T, T, torch.float32, gated=D == 3)
        first = same_bits(lambda given=given, dy=dy: list(run_all(three, given, dy, "fp16").values()), RUNS)
        exact = outcome(exact_conv, {name: t.double() for name, t in given.items()}, dy.double())
        hold(dict(zip(("y", "du", "dk"), first)), {name: exact[name] for name in ("y", "du", "dk")}, LIMIT["fp16"])


@pytest.mark.parametrize("precision", ["bf16x3", "tf32"])
def test_two_level_is_the_same_bits_in_other_precisions(device, launchers, precision):
    given, dy = draw(device, 2, 24, 20001, 20001, torch.float32)
    same_bits(lambda: list(run_all(launchers("two-level"), given, dy, precision).values()), RUNS)


@pytest.mark.parametrize("kernel", ["monarch-4096", "two-level"])
def test_rows_of_any_size_keep_their_own_scale(device, launchers, kernel):
    T, L = SIZES[kernel]
    given, _ = draw(device, 4, 3, T, L, torch.float32, gated=False, skip=False)
    given["u"] *= torch.tensor([1e-30, 1e4, 0.0, 1e8], device=device)[:, None, None]
    y = launchers(kernel)[0](given["u"], given["k"], None, None, None, "fp16")
    exact = exact_conv(given["u"].double(), given["k"].double())
    for b in (0, 1, 3):
        hold({"y": y[b]}, {"y": exact[b]}, LIMIT["fp16"])
    assert float(y[2].abs().max()) < 1e-37
