"""The operators under long_conv: both methods, closed under differentiation, traced and compiled whole, little saved."""

import pytest
import torch

from seqengine.kernels.api import long_conv, long_conv_bidirectional
from seqengine.kernels.conv import ops, reference
from seqengine.kernels.conv.plan import BLOCK_ELEMENTS, Plan, plan
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def through_one_transform(x, k):
    """The definition by a transform so long that nothing can wrap, differentiated by torch."""
    size = x.shape[-1] + 2 * k.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(k, n=size), n=size)[..., : x.shape[-1]]


@pytest.mark.parametrize(
    ("T", "L"),
    [
        (2048, 2),
        (3001, 33),
        (5000, 256),
        (10007, 511),
        (9000, 1000),
        (4097, 4097),
        (30000, 257),
        (40000, 40000),
        (40001, 5000),
        (70003, 9000),
        (500_001, 9000),
    ],
    ids=str,
)
@pytest.mark.parametrize("filters", ["shared", "batch"])
def test_both_methods_match_one_long_transform_with_gradients(T, L, filters):
    x, k = randn(2, 3, T), randn(*((2,) if filters == "batch" else ()), 3, L, seed=1)
    dy = randn(2, 3, T, seed=2)
    leaves, plain = ([t.clone().requires_grad_() for t in (x, k)] for _ in range(2))
    y, expected = ops.causal_conv(*leaves, None), through_one_transform(*plain)
    assert_close(y, expected, "y")
    (y * dy).sum().backward()
    (expected * dy).sum().backward()
    for a, b, name in zip(leaves, plain, ("dx", "dk"), strict=True):
        assert_close(a.grad, b.grad, name)


def test_plan_follows_the_documented_table():
    assert plan(1 << 16, 128, "cpu").method == "many frames"
    assert plan(1 << 14, 1 << 14, "cpu").count == plan(1 << 15, 1 << 15, "cpu").count == 1
    assert plan(1 << 14, 1 << 11, "cpu").count == 2
    assert plan(1 << 15, 1 << 12, "cpu").count == 2
    assert plan(1 << 16, 1 << 13, "cpu") == Plan("frames", 3 << 13, 1 << 14, 4)
    assert plan(1 << 17, 1 << 14, "cpu").count == 4
    assert plan(1 << 18, 1 << 16, "cpu").size == 1 << 17, "a power of two, though there are more points in all"
    assert plan(1 << 20, 1 << 14, "cpu") == Plan("frames", 1 << 16, 49153, 22)
    assert plan(100, 3, "cpu").count == 1
    assert plan(1 << 17, 1 << 17, "cpu") == Plan("frames", 1 << 18, 1 << 17, 1)
    assert plan(1 << 19, 1 << 19, "cpu") == Plan("frames", 1 << 20, 1 << 19, 1)
    assert plan(1 << 20, 1 << 20, "cpu").method == plan(1 << 22, 1 << 21, "cpu").method == "partitions"
    assert plan(1 << 22, 1 << 22, "cpu").count == 8
    assert plan(1 << 16, 128, "cuda").count == 1
    for T, L, keep in [(5000, 3, 2), (5000, 250, 0), (100_003, 8191, 8190), (60_000, 8191, 0), (100_003, 100_003, 0)]:
        how = plan(T, L, "cpu", keep)
        assert how.count * how.hop >= T + keep
        assert how.method == "partitions" or how.size >= how.hop + (L if keep == 0 or how.count > 1 else 0) - 1


def test_gradgradcheck():
    x, k = randn(2, 2, 5).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(ops.causal_conv, (x, k, None))
    per_sample, skip = randn(2, 2, 4, seed=2).requires_grad_(), randn(2, seed=3).requires_grad_()
    assert torch.autograd.gradgradcheck(ops.causal_conv, (x, per_sample, None))
    assert torch.autograd.gradgradcheck(ops.causal_conv, (x, k, skip))
    assert torch.autograd.gradgradcheck(ops.causal_conv, (x, per_sample, skip))


def test_gradgradcheck_of_the_gated_convolution_with_states():
    shapes = {
        "u": (1, 2, 4),
        "k": (2, 3),
        "skip": (2,),
        "pre_gate": (1, 2, 4),
        "post_gate": (1, 2, 4),
        "initial_state": (1, 2, 2),
    }
    values = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes.values())]

    def function(*tensors):
        return long_conv(**dict(zip(shapes, tensors, strict=True)), output_final_state=True)

    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize(
    "needed", [[True] * 6, [True] + [False] * 5, [False, True, True, False, False, False]], ids=str
)
@pytest.mark.parametrize("k_shape", [(3, 5), (1, 5), (2, 3, 5)])
def test_operators_keep_torchs_contract(needed, k_shape):
    x, k, dy = (
        randn(2, 3, 9).requires_grad_(),
        randn(*k_shape, seed=1).requires_grad_(),
        randn(2, 3, 9, seed=2).requires_grad_(),
    )
    skip = randn(3, seed=3).requires_grad_()
    torch.library.opcheck(ops.causal_conv, (x, k, None))
    pre, post = randn(2, 3, 9, seed=4).requires_grad_(), randn(2, 3, 9, seed=5).requires_grad_()
    past = randn(2, 3, 4, seed=6).requires_grad_()
    torch.library.opcheck(ops.causal_conv, (x, k, skip))
    torch.library.opcheck(ops.causal_conv, (x, k, skip, pre, post, past))
    plain = [need and i < 3 for i, need in enumerate(needed)]
    torch.library.opcheck(ops.causal_conv_backward, (dy, x, k, skip, None, None, None, plain))
    torch.library.opcheck(ops.causal_conv_backward, (dy, x, k, skip, pre, post, past, needed))


def test_compiles_whole_forward_and_backward():
    tensors = [randn(2, 3, 50, seed=i, dtype=torch.float32) for i in range(3)]
    k, skip = randn(3, 20, seed=4, dtype=torch.float32), randn(3, seed=5, dtype=torch.float32)

    def function(u, pre, post, k, skip):
        y, state = long_conv(u, k, skip=skip, pre_gate=pre, post_gate=post, output_final_state=True)
        return y.sin().sum() + state.sum()

    eager, compiled = ([t.clone().requires_grad_() for t in (*tensors, k, skip)] for _ in range(2))
    expected = function(*eager)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled)
    assert_close(actual, expected)
    expected.backward()
    actual.backward()
    for a, b in zip(compiled, eager, strict=True):
        assert_close(a.grad, b.grad)


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        y, state = long_conv(torch.empty(2, 3, 7, dtype=torch.bfloat16), torch.empty(3, 5), output_final_state=True)
        assert (y.shape, y.dtype) == ((2, 3, 7), torch.bfloat16)
        assert (state.shape, state.dtype) == ((2, 3, 4), torch.bfloat16)


def saved_bytes(function):
    """Bytes that autograd keeps for the backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())


def test_saves_its_inputs_and_no_spectrum():
    u, k = randn(2, 4, 1000, dtype=torch.float32).requires_grad_(), randn(4, 1000, dtype=torch.float32).requires_grad_()
    assert saved_bytes(lambda: long_conv(u, k)) == u.nbytes + k.nbytes
    assert saved_bytes(lambda: through_one_transform(u, k)) > 4 * (u.nbytes + k.nbytes)


def test_gated_in_bfloat16_saves_six_bytes_an_element():
    a = {
        n: randn(2, 4, 1000, seed=i, dtype=torch.bfloat16).requires_grad_()
        for i, n in enumerate(("u", "pre_gate", "post_gate"))
    }
    k, skip = randn(4, 1000, dtype=torch.float32).requires_grad_(), randn(4, dtype=torch.float32).requires_grad_()
    assert saved_bytes(lambda: long_conv(**a, k=k, skip=skip)) == 6 * a["u"].numel() + k.nbytes + skip.nbytes


@pytest.mark.parametrize(
    ("T", "L", "with_state"), [(3000, 40, True), (9000, 9000, False), (70_000, 9000, True)], ids=str
)
def test_a_grouped_filter_is_the_repeated_one_with_gradients(T, L, with_state, monkeypatch):
    monkeypatch.setattr("seqengine.kernels.conv.plan.FEW_CHANNELS", 1)
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", 3 * T)  # blocks of fewer channels than a group, and of several groups
    u, k, skip = randn(1, 12, T), randn(3, L, seed=1), randn(12, seed=2)
    state = randn(1, 12, L - 1, seed=3) if with_state else None
    grouped, repeated = ([t.clone().requires_grad_() for t in (u, k, skip)] for _ in range(2))
    y, _ = long_conv(grouped[0], grouped[1], skip=grouped[2], initial_state=state)
    expected, _ = long_conv(repeated[0], repeated[1].repeat_interleave(4, 0), skip=repeated[2], initial_state=state)
    assert_close(y, expected, "y")
    (y**2).sum().backward()
    (expected**2).sum().backward()
    for a, b, name in zip(grouped, repeated, ("du", "dk", "dskip"), strict=True):
        assert_close(a.grad, b.grad, name)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("T", "L"), [(20_001, 20_001), (30_000, 17_000), (17_000, 30_000)], ids=str)
def test_partitions_are_one_transform_with_every_gradient(T, L, gated, monkeypatch):
    u, k, skip, dy = randn(2, 3, T), randn(3, L, seed=1), randn(3, seed=2), randn(2, 3, T, seed=3)
    gates = {"pre_gate": randn(2, 3, T, seed=4), "post_gate": randn(2, 3, T, seed=5)} if gated else {}
    found = []
    for longest in (1 << 18, 1 << 14):
        monkeypatch.setattr("seqengine.kernels.conv.plan.LONGEST_TRANSFORM", longest)
        plan.cache_clear()
        assert plan(T, min(L, T), "cpu").method == ("frames" if longest > T else "partitions")
        leaves = [x.clone().requires_grad_() for x in (u, k, skip, *gates.values())]
        y, _ = long_conv(leaves[0], leaves[1], skip=leaves[2], **dict(zip(gates, leaves[3:], strict=True)))
        found.append((y, *torch.autograd.grad(y, leaves, dy)))
    plan.cache_clear()
    for whole, pieces in zip(*found, strict=True):
        assert_close(pieces, whole)


@pytest.mark.parametrize(("T", "L"), [(3000, 40), (5000, 3000), (20_000, 30_000), (70_000, 9000)], ids=str)
def test_states_gates_and_their_gradients_in_every_way(T, L):
    shapes = {
        "u": (1, 2, T),
        "pre_gate": (1, 2, T),
        "post_gate": (1, 2, T),
        "initial_state": (1, 2, L - 1),
        "k": (2, L),
    }
    a = {n: randn(*shape, seed=i).requires_grad_() for i, (n, shape) in enumerate(shapes.items())}
    y, _ = long_conv(**a)
    stream = torch.cat([a["initial_state"], a["pre_gate"] * a["u"]], dim=-1)
    expected = a["post_gate"] * through_one_transform(stream, a["k"])[..., L - 1 :]
    assert_close(y, expected, "y")
    dy = randn(1, 2, T, seed=9)
    found, wanted = (torch.autograd.grad(v, list(a.values()), dy) for v in (y, expected))
    for name, actual, other in zip(a, found, wanted, strict=True):
        assert_close(actual, other, name)


def test_under_autocast_the_filter_keeps_its_precision():
    u, k = randn(1, 2, 64, dtype=torch.bfloat16), randn(2, 64, seed=1, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = long_conv(u, k)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert k.grad.dtype == torch.float32
    assert_close(y, reference.causal_conv(u.double(), k.detach().double()))


def bidirectional_by_sums(x, forward, backward):
    T = x.shape[-1]
    y = torch.zeros_like(x)
    for t in range(T):
        for s in range(min(forward.shape[-1], t + 1)):
            y[..., t] += forward[:, s] * x[..., t - s]
        for s in range(min(backward.shape[-1], T - t)):
            y[..., t] += backward[:, s] * x[..., t + s]
    return y


@pytest.mark.parametrize(("T", "L", "M"), [(1, 1, 1), (7, 3, 5), (20, 20, 20), (11, 30, 2), (16, 1, 40)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bidirectional_is_the_two_sided_sum(T, L, M, backend):
    u, f, b = randn(2, 3, T), randn(3, L, seed=1), randn(3, M, seed=2)
    pre, post, skip = randn(2, 3, T, seed=3), randn(2, 3, T, seed=4), randn(3, seed=5)
    y = long_conv_bidirectional(u, f, b, skip=skip, pre_gate=pre, post_gate=post, backend=backend)
    assert_close(y, post * (bidirectional_by_sums(pre * u, f, b) + skip[:, None] * pre * u))


def test_bidirectional_gradients():
    shapes = {
        "u": (2, 2, 5),
        "k_forward": (2, 3),
        "k_backward": (1, 4),
        "skip": (2,),
        "pre_gate": (2, 2, 5),
        "post_gate": (2, 2, 5),
    }
    values = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes.values())]

    def function(*tensors):
        return long_conv_bidirectional(**dict(zip(shapes, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


def test_bidirectional_rejects_filters_that_do_not_fit():
    with pytest.raises(ValueError, match="k_backward must be"):
        long_conv_bidirectional(torch.zeros(1, 2, 3), torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="G dividing D=2"):
        long_conv_bidirectional(torch.zeros(1, 2, 3), torch.zeros(2, 3), torch.zeros(3, 3))
