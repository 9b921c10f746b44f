"""monarch_conv against full matrices and, with DFT factors, against long_conv: values, every gradient, memory, bad input."""

import pytest
import torch

from seqengine.kernels.conv import reference as conv
from seqengine.kernels.monarch import blocks, ops
from seqengine.kernels.monarch.op import MonarchFactors, dft_factors, inverse_dft_factors, monarch_conv
from seqengine.kernels.monarch.reference import forward_matrix, inverse_matrix
from tests.kernels.largest_tensor import LargestTensor
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SIZES = [
    (4, 1, 1),
    (4, 3, 2),
    (6, 1, 6),
    (15, 8, 8),
    (36, 30, 7),
    (36, 5, 32),
    (63, 63, 1),
    (63, 32, 32),
    (256, 100, 129),
]
FACTORS = ("outer", "twiddle", "inner")


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.complex(*torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tensors(B, D, n, T, L, dtype=torch.float64, groups=(1, 1), per_sample=False):
    """Factors away from the DFT, in complex128 or, for lower dtypes, complex64."""
    of_factors = torch.complex128 if dtype == torch.float64 else torch.complex64
    made = {
        "u": randn(B, D, T, dtype=dtype),
        "k": randn(*((B, D, L) if per_sample else (D, L)), seed=1, dtype=dtype) / L**0.5,
        "skip": randn(D, seed=2, dtype=dtype),
        "pre_gate": randn(B, D, T, seed=3, dtype=dtype),
        "post_gate": randn(B, D, T, seed=4, dtype=dtype),
    }
    for seed, (way, make, G) in enumerate(
        [("forward", dft_factors, groups[0]), ("inverse", inverse_dft_factors, groups[1])]
    ):
        for what, x in make(n, groups=G, dtype=torch.complex128)._asdict().items():
            noise = randn(*x.shape, seed=10 + 3 * seed + FACTORS.index(what), dtype=torch.complex128)
            made[f"{way}.{what}"] = (x + 0.3 * x.abs().mean() * noise).to(of_factors)
    return made


def call(arguments, **options):
    plain = {name: t for name, t in arguments.items() if "." not in name}
    both = (MonarchFactors(*(arguments[f"{way}.{what}"] for what in FACTORS)) for way in ("forward", "inverse"))
    return monarch_conv(plain.pop("u"), plain.pop("k"), *both, **plain, **options)


def run(arguments, backend="auto"):
    """Output, and the gradients of a fixed random projection of it."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items()}
    y = call(leaves, backend=backend)
    (y.double() * randn(*y.shape, seed=99)).sum().backward()
    return {"y": y, **{f"d_{name}": t.grad for name, t in leaves.items()}}


def real(t):
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def assert_matches(actual, expected, tolerance=None):
    for name, value in actual.items():
        assert_close(real(value), real(expected[name]), name, tolerance)


def assert_matches_reference(arguments):
    assert_matches(run(arguments, "torch"), run(arguments, "reference"))


@pytest.mark.parametrize(("n", "T", "L"), SIZES, ids=str)
def test_matches_reference_with_every_gradient(n, T, L):
    assert_matches_reference(tensors(2, 3, n, T, L))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (6, 6), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 100])
def test_matches_reference_for_groups_filters_and_any_block(width, groups, per_sample, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", {"cpu": width * 2 * 15})
    assert_matches_reference(tensors(2, 6, 15, 9, 6, groups=groups, per_sample=per_sample))


@pytest.mark.parametrize("left_out", ["skip", "pre_gate", "post_gate"])
def test_matches_reference_without(left_out):
    arguments = tensors(2, 3, 36, 20, 9)
    del arguments[left_out]
    assert_matches_reference(arguments)


@pytest.mark.parametrize(
    "wanted", [["u"], ["k"], ["skip"], ["pre_gate"], ["post_gate"], ["forward.inner"], ["inverse.outer"]]
)
def test_gradients_of_one_argument_only(wanted):
    arguments = tensors(2, 4, 36, 20, 9, groups=(2, 2))
    expected = run(arguments)
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in arguments.items()}
    y = call(leaves)
    (y * randn(*y.shape, seed=99)).sum().backward()
    found = {f"d_{name}": t.grad for name, t in leaves.items() if t.grad is not None}
    assert list(found) == [f"d_{name}" for name in wanted]
    assert_matches(found, expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("n", "T", "L"), [(1, 1, 1), *SIZES], ids=str)
def test_with_dft_factors_it_is_the_causal_convolution(n, T, L, groups, backend):
    u, k, skip = randn(2, 4, T), randn(4, L, seed=1), randn(4, seed=2)
    pre, post = randn(2, 4, T, seed=3), randn(2, 4, T, seed=4)
    factors = (make(n, groups=groups, dtype=torch.complex128) for make in (dft_factors, inverse_dft_factors))
    y = monarch_conv(u, k, *factors, skip=skip, pre_gate=pre, post_gate=post, backend=backend)
    assert_close(y, conv.long_conv(u, k, skip, pre, post, None)[0])


@pytest.mark.parametrize("n", [1, 4, 6, 15, 36, 63, 128, 1000])
def test_factors_are_the_fourier_transform_and_its_inverse(n):
    forward, inverse = dft_factors(n, dtype=torch.complex128), inverse_dft_factors(n, dtype=torch.complex128)
    N1, N2 = forward.twiddle.shape[1:]
    x = randn(n, dtype=torch.complex128)
    spectrum = forward_matrix(*forward)[0] @ x  # element (k1, k2) for frequency k1 + N1 k2
    assert_close(real(spectrum.view(N1, N2).T.flatten()), real(torch.fft.fft(x)))
    assert_close(real(inverse_matrix(*inverse)[0] @ spectrum), real(x))


def test_factors_are_as_square_as_the_size_allows():
    shapes = {n: tuple(dft_factors(n).twiddle.shape[1:]) for n in (36, 63, 128, 4096, 74 - 2, 34)}
    assert shapes == {36: (6, 6), 63: (9, 7), 128: (16, 8), 4096: (64, 64), 72: (9, 8), 34: (17, 2)}
    assert [x.shape[0] for x in dft_factors(36, groups=3)] == [3, 3, 3]


def test_learned_factors_reach_the_past_and_know_positions():
    a = tensors(1, 2, 63, 30, 30)
    before = call(a)
    a["u"][:, :, 20] += 1.0
    assert float((call(a) - before)[:, :, :20].abs().max()) > 1e-3


def small(per_sample=False):
    a = tensors(2 if per_sample else 1, 2, 6, 4, 3, groups=(2, 1), per_sample=per_sample)
    return list(a), [t.requires_grad_() for t in a.values()]


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(per_sample):
    names, values = small(per_sample)
    assert torch.autograd.gradcheck(lambda *ts: call(dict(zip(names, ts, strict=True))), values)


def test_gradgradcheck():
    names, values = small()
    assert torch.autograd.gradgradcheck(lambda *ts: call(dict(zip(names, ts, strict=True))), values)


def higher(arguments, backend, orders):
    """The gradients of the sum of squares of the gradients, of it again, and so on."""
    leaves = [t.clone().requires_grad_() for t in arguments.values()]
    value = (call(dict(zip(arguments, leaves, strict=True)), backend=backend) ** 2).sum()
    for _ in range(orders):
        found = torch.autograd.grad(value, leaves, create_graph=True)
        value = sum((real(g) ** 2).sum() for g in found) ** 0.5
    return dict(zip(arguments, found, strict=True))


@pytest.mark.parametrize("orders", [2, 3])
def test_higher_derivatives_are_those_of_the_reference(orders):
    arguments = tensors(2, 4, 15, 7, 5, groups=(2, 1))
    assert_matches(higher(arguments, "torch", orders), higher(arguments, "reference", orders))


def test_second_derivative_when_two_arguments_are_one_tensor():
    arguments = tensors(1, 2, 15, 7, 5)
    found = {}
    for backend in ("torch", "reference"):
        u = arguments["u"].clone().requires_grad_()
        y = call({**arguments, "u": u, "pre_gate": u, "post_gate": u}, backend=backend)
        (first,) = torch.autograd.grad((y**2).sum(), u, create_graph=True)
        (found[backend],) = torch.autograd.grad((first**2).sum(), u)
    assert_close(found["torch"], found["reference"])


def test_operator_keeps_torchs_contract():
    values = small()[1]
    order = [0, 1, *range(5, 11), 2, 3, 4]
    torch.library.opcheck(ops.monarch_conv, tuple(values[i] for i in order))


def test_operator_of_the_backward_keeps_torchs_contract():
    values = [t.detach() for t in small()[1]]
    needs = [True, False, True, False, False, False, True, True, False, False, False]
    arguments = [values[i] for i in (0, 1, *range(5, 11))]
    arguments[0].requires_grad_()
    arguments[2].requires_grad_()
    dy = randn(1, 2, 4, seed=7).requires_grad_()
    torch.library.opcheck(ops.monarch_conv_backward, (dy, *arguments, None, None, None, needs))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_forward_and_backward(dynamic):
    arguments = tensors(2, 4, 36, 20, 9, groups=(2, 1))

    def function(*values):
        a = dict(zip(arguments, values, strict=True))
        # lazy conjugates, and views of them, are resolved in the compiled graph too
        a["forward.inner"], a["inverse.outer"] = a["forward.inner"].conj(), a["inverse.outer"].mH
        a["k"] = a["k"] + a["forward.twiddle"].conj().imag.sum()
        return call(a).sin().sum()

    eager, compiled = ([t.clone().requires_grad_() for t in arguments.values()] for _ in range(2))
    expected = function(*eager)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)(*compiled)
    assert_close(actual, expected)
    expected.backward()
    actual.backward()
    for name, a, b in zip(arguments, compiled, eager, strict=True):
        assert_close(real(a.grad), real(b.grad), name)


def test_compiled_operators_are_the_eager_ones_without_gradients_and_with_lazy_conjugates():
    values = [t.detach() for t in small()[1]]
    arguments = [values[0], values[1], *values[5:11], *values[2:5]]

    def function(dy, *given):
        lazy = [t.conj() if t.is_complex() else t for t in given]
        lazy[0], dy = (torch.complex(t, -t).conj().imag for t in (lazy[0], dy))
        y = ops.monarch_conv(*lazy)
        return [y, *ops.monarch_conv_backward(dy, *lazy, [True] * 11)]

    dy = randn(1, 2, 4, seed=7)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for i, (a, b) in enumerate(zip(compiled(dy, *arguments), function(dy, *arguments), strict=True)):
        assert_close(real(a), real(b), str(i))


def test_conjugate_views_are_what_they_stand_for():
    arguments = tensors(2, 3, 15, 9, 6)
    lazy = {name: t.conj_physical().conj() if t.is_complex() else t for name, t in arguments.items()}
    lazy["u"] = torch.complex(lazy["u"], -lazy["u"]).conj().imag
    assert lazy["u"].is_neg()
    assert_close(call(lazy), call(arguments))


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        u = torch.empty(2, 3, 7, dtype=torch.bfloat16, requires_grad=True)
        forward = MonarchFactors(*(x.requires_grad_() for x in dft_factors(12)))
        y = monarch_conv(u, torch.empty(3, 5), forward, inverse_dft_factors(12))
        y.sum().backward()
    assert (y.shape, y.dtype) == ((2, 3, 7), torch.bfloat16)
    assert (u.grad.shape, u.grad.dtype) == ((2, 3, 7), torch.bfloat16)
    assert all(x.grad.shape == x.shape and x.grad.dtype == torch.complex64 for x in forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_near_float64(dtype):
    arguments = tensors(2, 4, 256, 128, 128, dtype=dtype, groups=(2, 2))
    double = {name: t.to(torch.complex128 if t.is_complex() else torch.float64) for name, t in arguments.items()}
    expected, actual = run(double, "reference"), run(arguments)
    for name, t in arguments.items():
        assert actual[f"d_{name}"].dtype == t.dtype
    assert actual["y"].dtype == dtype
    # the upstream gradient is rounded to u's dtype, and so is everything made from it
    assert_matches(actual, expected, RELATIVE[dtype])


def test_one_double_argument_makes_the_arithmetic_and_the_sums_double(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", {"cpu": 2 * 36})
    arguments = tensors(2, 16, 36, 20, 9, dtype=torch.float32)
    double = {name: t.to(torch.complex128 if t.is_complex() else torch.float64) for name, t in arguments.items()}
    dy = randn(2, 16, 20, dtype=torch.float32)

    def y_and_gradient(a):
        outer = a["forward.outer"].clone().requires_grad_()
        y = call({**a, "forward.outer": outer})
        return y, *torch.autograd.grad(y, outer, dy.to(y.dtype))

    y, d_outer = y_and_gradient(double)
    for wide in ("k", "inverse.inner"):
        found = y_and_gradient({**arguments, wide: double[wide]})
        assert torch.equal(found[0], y.float())
        assert torch.equal(found[1], d_outer.to(torch.complex64))


def test_autocast_changes_nothing():
    a = tensors(2, 3, 36, 20, 9, dtype=torch.float32)
    expected = run(a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(a)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def saved(function):
    """Addresses and bytes of what autograd keeps for the backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return kept


def test_saves_its_inputs_and_nothing_else():
    leaves = {n: t.requires_grad_() for n, t in tensors(2, 4, 256, 128, 129, torch.bfloat16).items()}
    expected = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves.values()}
    assert saved(lambda: call(leaves)) == expected


def test_builds_no_more_than_the_spectra_of_a_block_and_no_full_matrix(monkeypatch):
    B, D, n, T = 2, 16, 1024, 512
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", {"cpu": 2 * B * n})
    values = tensors(B, D, n, T, 500, groups=(4, 1))
    names = [*(f"forward.{f}" for f in FACTORS), *(f"inverse.{f}" for f in FACTORS)]
    a = blocks.Arguments(*(values[name] for name in ("u", "k", *names, "skip", "pre_gate", "post_gate")))
    with LargestTensor() as largest:  # not through the operators: what they do inside would not be seen
        blocks.convolve(a)
        blocks.gradients(a.u, a, dict.fromkeys(a._fields, True))
    assert largest.elements <= max(B * D * T, 2 * B * n)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_tensors_give_empty_results_and_zero_gradients(shape, backend):
    B, D, T = shape
    leaves = {n: t.requires_grad_() for n, t in tensors(B, D, 15, T, 6, groups=(1, 2)).items()}
    y = call(leaves, backend=backend)
    assert y.shape == shape
    found = torch.autograd.grad(y.sum(), list(leaves.values()), create_graph=True)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(found, leaves.values(), strict=True))
    again = torch.autograd.grad(sum(real(g).sum() for g in found), list(leaves.values()), allow_unused=True)
    assert all(g is None or not bool(g.any()) for g in again)


def test_non_contiguous_inputs():
    a = tensors(2, 4, 36, 20, 9, groups=(2, 2))
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in a.items()}
    assert not strided["u"].is_contiguous()
    assert_matches(run(strided), run(a))


def test_two_runs_agree_bit_for_bit():
    a = tensors(3, 6, 256, 128, 129, torch.float32, groups=(3, 1))
    first, second = run(a), run(a)
    assert all(torch.equal(first[name], second[name]) for name in first)


WIDE = torch.zeros(2, 4, 3, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(4, 6)}, r"monarch_conv: u must be \[B, D, T\]; got \(4, 6\)"),
        ({"u": torch.zeros(2, 4, 6, dtype=torch.int64)}, "u must be float64, float32"),
        ({"k": torch.zeros(3, 4)}, r"k must be \[D, L\] or \[B, D, L\] with B, D = 2, 4, L >= 1; got \(3, 4\)"),
        ({"k": torch.zeros(3, 4, 2)}, r"k must be .*got \(3, 4, 2\)"),
        ({"k": torch.zeros(4, 0)}, r"L >= 1; got \(4, 0\)"),
        ({"k": torch.zeros(4)}, r"k must be .*got \(4,\)"),
        (
            {"k": torch.zeros(4, 8)},
            r"forward.twiddle \[G, N1, N2\] must have N1 N2 >= T \+ L - 1 = 13; got \(1, 4, 3\)",
        ),
        ({"skip": torch.zeros(3)}, r"skip must be \[D\] = \[4\]; got \(3,\)"),
        ({"pre_gate": torch.zeros(2, 4, 5)}, r"pre_gate must be \[B, D, T\] = \[2, 4, 6\]; got \(2, 4, 5\)"),
        ({"post_gate": torch.zeros(2, 1, 6)}, r"post_gate must be \[B, D, T\] = \[2, 4, 6\]; got \(2, 1, 6\)"),
        ({"forward.outer": WIDE}, r"forward.outer must be \[G, N1, N1\] = \[1, 4, 4\]; got \(2, 4, 3\)"),
        ({"inverse.inner": WIDE}, r"inverse.inner must be \[G, N2, N2\] = \[1, 3, 3\]; got \(2, 4, 3\)"),
        ({"inverse.twiddle": WIDE[0]}, r"inverse.twiddle must be \[G, N1, N2\], G, N1, N2 >= 1; got \(4, 3\)"),
        ({"forward.inner": torch.zeros(1, 3, 3)}, "forward.inner must be complex64 or complex128; got torch.float32"),
        ({"backend": "cudnn"}, "backend must be"),
    ],
)
def test_rejects(change, message):
    arguments = {"u": torch.zeros(2, 4, 6), "k": torch.zeros(4, 5)}
    for way, make in (("forward", dft_factors), ("inverse", inverse_dft_factors)):
        arguments |= {f"{way}.{what}": x for what, x in make(12)._asdict().items()}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        call(arguments)


def test_rejects_factors_that_do_not_fit_each_other_or_the_channels():
    u, k = torch.zeros(2, 4, 6), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"forward.twiddle \[G, N1, N2\] needs G dividing D=4; got \(3, 4, 3\)"):
        monarch_conv(u, k, dft_factors(12, groups=3), inverse_dft_factors(12))
    with pytest.raises(
        ValueError, match=r"inverse.twiddle must have the N1, N2 = \(4, 3\) of forward; got \(1, 4, 4\)"
    ):
        monarch_conv(u, k, dft_factors(12), inverse_dft_factors(16))
    with pytest.raises(ValueError, match=r"inverse.twiddle must have the G = 2 of forward, or 1; got \(4, 4, 3\)"):
        monarch_conv(u, k, dft_factors(12, groups=2), inverse_dft_factors(12, groups=4))


@pytest.mark.parametrize("make", [dft_factors, inverse_dft_factors])
def test_rejects_sizes_without_balanced_factors(make):
    with pytest.raises(ValueError, match=r"size must be N1 N2 with N1 <= 16 N2 and N2 > 1, such as 14; got 13"):
        make(13)
    with pytest.raises(ValueError, match="such as 75; got 74"):
        make(74)
    with pytest.raises(ValueError, match="such as 4; got 2"):
        make(2)
    with pytest.raises(ValueError, match="size must be an int >= 1; got 0"):
        make(0)
    with pytest.raises(ValueError, match="groups must be an int >= 1; got 0"):
        make(12, groups=0)
    with pytest.raises(ValueError, match=r"dtype must be complex64 or complex128; got torch\.float32"):
        make(12, dtype=torch.float32)
