"""The operators under modal_filter and modal_conv: any order of derivative, traced and compiled whole, little saved."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqengine.kernels.modal import ops, reference
from seqengine.kernels.modal.op import modal_conv, modal_filter
from tests.kernels.largest_tensor import LargestTensor
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch's own tracing does so
]
KINDS = ["real", "complex"]
NAMES = ("u", "log_poles", "residues", "skip", "pre_gate", "post_gate", "initial_state")
OPTIONAL = ("skip", "pre_gate", "post_gate", "initial_state")


def randn(*shape, seed, kind="real"):
    dtype = torch.complex128 if kind == "complex" else torch.float64
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(D, N, kind):
    decay = -torch.rand(D, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5 - 1e-3
    log_poles = torch.complex(decay, 3 * randn(D, N, seed=1)) if kind == "complex" else decay
    return log_poles, randn(D, N, seed=2, kind=kind)


def inputs(B, D, T, N, kind, without=()):
    """Every argument of modal_conv by name, in the order of the operator, in float64."""
    log_poles, residues = parameters(D, N, kind)
    sequences = (randn(B, D, T, seed=seed) for seed in (3, 4, 5))
    values = (next(sequences), log_poles, residues, randn(D, seed=6), *sequences, randn(B, D, N, seed=7, kind=kind))
    return {name: t for name, t in zip(NAMES, values, strict=True) if name not in without}


def leaves_of(tensors, wanted=None):
    return {n: t.detach().clone().requires_grad_(wanted is None or n in wanted) for n, t in tensors.items()}


def real(t):
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def projection(tensors, seed):
    """A fixed random linear function of several tensors."""
    parts = [(real(t).double() * randn(*real(t).shape, seed=seed + i)).sum() for i, t in enumerate(tensors)]
    return torch.stack(parts).sum()


def derivatives(function, leaves, order):
    """Gradients of a random projection of the gradients ... of a random projection of the outputs, and of the cotangents."""
    outputs = [t for t in function(**leaves) if t is not None]
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    cotangents = {f"at output {i}": torch.ones_like(t).mul(1.5).requires_grad_() for i, t in enumerate(outputs)}
    found = torch.autograd.grad(outputs, wanted.values(), cotangents.values(), create_graph=True)
    if order > 1:
        wanted = {**wanted, **cotangents}
    for i in range(1, order):
        found = torch.autograd.grad(
            projection(found, 10 * i), wanted.values(), create_graph=i + 1 < order, materialize_grads=True
        )
    return dict(zip(wanted, found, strict=True))


def convolve(backend):
    return lambda **arguments: modal_conv(**arguments, output_final_state=True, backend=backend)


def filter_of(function, length):
    return lambda log_poles, residues: (function(log_poles, residues, length),)


def assert_same(actual, expected, tolerance=None):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(real(value), real(expected[name]), name, tolerance)


def assert_derivatives_match(arguments, order, wanted=None):
    results = [derivatives(convolve(b), leaves_of(arguments, wanted), order) for b in ("torch", "reference")]
    assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 6, 17])
def test_gradgradcheck_of_the_convolution_with_states(T, kind):
    arguments = leaves_of(inputs(1, 2, T, 2, kind))

    def function(*values):
        return modal_conv(**dict(zip(arguments, values, strict=True)), output_final_state=True)

    assert torch.autograd.gradgradcheck(function, list(arguments.values()), fast_mode=T == 17)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 9])
def test_gradgradcheck_of_the_filter(length, kind):
    leaves = [t.requires_grad_() for t in parameters(2, 3, kind)]
    assert torch.autograd.gradgradcheck(lambda p, r: modal_filter(p, r, length), leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [2, 3, 65, 257])
def test_second_derivatives_match_reference(T, kind):
    assert_derivatives_match(inputs(2, 3, T, 4, kind), order=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without", [*((n,) for n in OPTIONAL), OPTIONAL], ids=str)
def test_second_derivatives_match_reference_without(without, kind):
    assert_derivatives_match(inputs(2, 3, 20, 4, kind, without), order=2)


@pytest.mark.parametrize("wanted", [["u"], ["log_poles"], ["residues", "initial_state"], ["skip", "pre_gate"]], ids=str)
def test_second_derivatives_of_a_few_arguments_only(wanted):
    assert_derivatives_match(inputs(2, 3, 20, 4, "complex"), order=2, wanted=wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_third_derivatives_match_reference(kind):
    assert_derivatives_match(inputs(1, 2, 18, 2, kind), order=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "order"), [(1, 2), (2, 2), (65, 2), (257, 2), (20, 3)])
def test_derivatives_of_the_filter_match_reference(length, order, kind):
    leaves = dict(zip(("log_poles", "residues"), parameters(3, 4, kind), strict=True))
    functions = (filter_of(f, length) for f in (modal_filter, reference.modal_filter))
    assert_same(*(derivatives(f, leaves_of(leaves), order) for f in functions))


def test_one_tensor_as_two_arguments():
    a = inputs(1, 2, 20, 3, "real")
    u, poles = a["u"].requires_grad_(), a["log_poles"].requires_grad_()

    def second(backend):
        y, _ = modal_conv(u, poles, poles, pre_gate=u, post_gate=u, backend=backend)
        first = torch.autograd.grad(projection([y], 1), (u, poles), create_graph=True)
        return dict(zip(("u", "poles"), torch.autograd.grad(projection(first, 2), (u, poles)), strict=True))

    assert_same(second("torch"), second("reference"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 40])
def test_second_derivative_of_a_pole_at_zero_is_zero_and_finite(T, kind):
    arguments = inputs(2, 2, T, 3, kind)
    arguments["log_poles"][0, 1] = -math.inf if kind == "real" else complex(-math.inf, 0.3)
    arguments["log_poles"][1, 2] = -740 if kind == "real" else complex(-740, 0.3)  # its exponential is denormal
    pairs = [(convolve("torch"), arguments), (filter_of(modal_filter, T), {n: arguments[n] for n in NAMES[1:3]})]
    for function, given in pairs:
        found = derivatives(function, leaves_of(given), 2)
        assert found["log_poles"][0, 1] == 0
        assert all(bool(torch.isfinite(real(t)).all()) for t in found.values())


def test_second_derivative_of_half_precision_has_its_dtypes_and_is_near_float64():
    exact = inputs(2, 3, 70, 4, "real")
    halves = {n: t.to(torch.bfloat16 if t.shape == exact["u"].shape else torch.float32) for n, t in exact.items()}
    found = derivatives(convolve("torch"), leaves_of(halves), 2)
    expected = derivatives(convolve("reference"), leaves_of({n: t.double() for n, t in halves.items()}), 2)
    assert all(found[n].dtype == t.dtype for n, t in halves.items())
    assert_same(found, expected, 2e-2)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_second_derivatives_of_empty_tensors_are_zero(shape):
    for name, t in derivatives(convolve("auto"), leaves_of(inputs(*shape, 4, "real")), 2).items():
        assert name.startswith(("at", "initial_state")) or not bool(t.any())


@pytest.mark.parametrize("kind", KINDS)
def test_two_second_derivatives_agree_bit_for_bit(kind):
    arguments = inputs(2, 3, 100, 4, kind)
    first, second = (derivatives(convolve("torch"), leaves_of(arguments), 2) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_never_holds_all_powers(kind):
    B, D, T, N = 1, 2, 4096, 16
    with LargestTensor() as largest:
        derivatives(convolve("torch"), leaves_of(inputs(B, D, T, N, kind)), 2)
    assert largest.elements <= 2 * B * D * T
    leaves = leaves_of(dict(zip(NAMES[1:3], parameters(D, N, kind), strict=True)))
    with LargestTensor() as largest:
        derivatives(filter_of(modal_filter, T), leaves, 2)
    assert largest.elements <= 2 * D * T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without", [(), OPTIONAL[:3], ("initial_state",)], ids=str)
def test_convolution_operators_keep_torchs_contract(without, kind):
    """With every argument, and with derivatives of the gradients; without some, the gradients alone."""
    arguments = leaves_of(inputs(2, 3, 17, 2, kind, without))
    state = arguments.get("initial_state", torch.zeros_like(randn(2, 3, 2, seed=0, kind=kind)))
    given = [arguments.get(n) for n in NAMES[:-1]] + [state]
    torch.library.opcheck(ops.modal_conv, given)
    y, final, starts = (t.detach() for t in ops.modal_conv(*given))
    needed = [t is not None and t.requires_grad for t in given]
    if without:
        given = [None if t is None else t.detach() for t in given]
    else:
        y.requires_grad_()
        final.requires_grad_()
    torch.library.opcheck(ops.modal_conv_backward, (y, final, *given, starts, needed))


@pytest.mark.parametrize("kind", KINDS)
def test_filter_operators_keep_torchs_contract(kind):
    leaves = [t.requires_grad_() for t in parameters(3, 4, kind)]
    torch.library.opcheck(ops.modal_filter, (*leaves, 20))
    torch.library.opcheck(ops.modal_filter_backward, (randn(3, 20, seed=3).requires_grad_(), *leaves))


def loss_of(u, log_poles, residues, **others):
    y, state = modal_conv(u, log_poles, residues, **others, output_final_state=True)
    k = modal_filter(log_poles, residues, 30)
    return y.sin().sum() + state.abs().sum() + k.cos().sum()


def gradients_of(function, arguments):
    leaves = leaves_of(arguments)
    loss = function(**leaves)
    loss.backward()
    return {"loss": loss, **{n: t.grad for n, t in leaves.items()}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "without"), [(100, ()), (100, OPTIONAL), (1, ())], ids=str)
def test_compiles_whole_forward_and_backward(T, without, kind):
    arguments = inputs(2, 3, T, 4, kind, without)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(gradients_of(compiled, arguments), gradients_of(loss_of, arguments))


def test_compiled_for_any_length_equals_eager():
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (100, 131):
        arguments = inputs(2, 3, T, 4, "complex")
        assert_same(gradients_of(compiled, arguments), gradients_of(loss_of, arguments))


def test_compiled_with_pending_conjugation_and_negation():
    def function(pair, log_poles, residues, initial_state):
        u = pair.conj().imag  # minus the imaginary part, not yet computed
        return loss_of(u, log_poles.conj(), residues.conj(), initial_state=initial_state.conj())

    arguments = inputs(2, 3, 40, 4, "complex", OPTIONAL[:3])
    del arguments["u"]
    arguments["pair"] = randn(2, 3, 40, seed=8, kind="complex")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(gradients_of(compiled, arguments), gradients_of(function, arguments))


@pytest.mark.parametrize("T", [1, 70])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(T):
    with torch._subclasses.fake_tensor.FakeTensorMode():
        u, poles = torch.empty(2, 3, T, dtype=torch.bfloat16), torch.empty(3, 5, dtype=torch.complex64)
        y, state = modal_conv(u, poles, poles, pre_gate=u, output_final_state=True)
        k = modal_filter(poles, poles, T)
    assert (y.shape, y.dtype) == ((2, 3, T), torch.bfloat16)
    assert (state.shape, state.dtype) == ((2, 3, 5), torch.complex64)
    assert (k.shape, k.dtype) == ((3, T), torch.float32)


def test_under_autocast_parameters_and_gradients_keep_their_dtypes():
    exact = inputs(2, 3, 70, 4, "real")
    halves = {n: t.to(torch.bfloat16 if t.shape == exact["u"].shape else torch.float32) for n, t in exact.items()}
    expected = derivatives(convolve("torch"), leaves_of(halves), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = modal_conv(**halves, output_final_state=True)
        first, second = (derivatives(convolve("torch"), leaves_of(halves), order) for order in (1, 2))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    for name, t in halves.items():
        assert first[name].dtype == second[name].dtype == t.dtype
    assert all(torch.equal(second[n], expected[n]) for n in expected)


def saved_bytes(function):
    """Bytes that autograd keeps for the backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    assert result is not None
    return sum(kept.values())


def test_saves_its_inputs_and_one_state_a_segment():
    B, D, T, N = 1, 8, 16384, 4
    exact = inputs(B, D, T, N, "real")
    halves = {n: t.to(torch.bfloat16 if t.shape == exact["u"].shape else torch.float32) for n, t in exact.items()}
    leaves = leaves_of(halves)
    kept = saved_bytes(lambda: modal_conv(**leaves))
    own = sum(t.nbytes for t in leaves.values())
    assert own <= kept <= own + leaves["u"].nbytes / 16
    assert kept <= 6.2 * B * D * T
    poles = leaves["log_poles"]
    assert saved_bytes(lambda: modal_filter(poles, leaves["residues"], T)) == 2 * poles.nbytes


class ElementsWritten(TorchDispatchMode):
    """Counts the elements that all operations returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.elements += sum(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_costs_a_few_numbers_for_each_of_the_state(kind):
    written = {}
    for N in (16, 64):
        arguments = inputs(2, 3, 1, N, kind)
        with ElementsWritten() as count:
            modal_conv(**arguments, output_final_state=True)
        written[N] = count.elements
        assert count.elements <= 16 * arguments["initial_state"].numel()
    assert written[64] <= 4 * written[16]
