"""modal_conv against its definition and against long_conv: values, every gradient, states, memory, bad input."""

import math

import pytest
import torch

from seqengine.kernels.conv.op import long_conv
from seqengine.kernels.modal import scan
from seqengine.kernels.modal.op import modal_conv, modal_filter
from tests.kernels.largest_tensor import LargestTensor
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOKENS = [1, 2, 3, 63, 64, 65, 257, 1000]
KINDS = ["real", "complex"]


def tensors(B, D, T, N, kind, dtype=torch.float64, seed=0):
    """Sequences in `dtype`; parameters in float64 or, for lower dtypes, float32."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_poles = -torch.rand(D, N, generator=generator, dtype=torch.float64) * 0.5 - 1e-3
    residues, state, skip = randn(D, N) / N**0.5, randn(B, D, N), randn(D)
    if kind == "complex":
        log_poles = torch.complex(log_poles, 3 * randn(D, N))
        residues, state = torch.complex(residues, randn(D, N)), torch.complex(state, randn(B, D, N))
    a = {"log_poles": log_poles, "residues": residues, "skip": skip, "initial_state": state}
    if dtype != torch.float64:
        a = {name: t.to(torch.complex64 if t.is_complex() else torch.float32) for name, t in a.items()}
    return {
        "u": randn(B, D, T).to(dtype),
        "pre_gate": randn(B, D, T).to(dtype),
        "post_gate": randn(B, D, T).to(dtype),
        **a,
    }


def real(t):
    return torch.view_as_real(t) if t.is_complex() else t


def double(arguments):
    return {n: t.to(torch.complex128 if t.is_complex() else torch.float64) for n, t in arguments.items()}


def run(arguments, backend="auto"):
    """Output, final state, and the gradients of a fixed random projection of both."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items()}
    y, state = modal_conv(**leaves, output_final_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (real(t).double() * torch.randn(real(t).shape, generator=generator, dtype=torch.float64)).sum()
        for t in (y, state)
    )
    loss.backward()
    return {"y": y, "state": state, **{f"d_{name}": t.grad for name, t in leaves.items()}}


def assert_matches(actual, expected, tolerance=None):
    for name, value in actual.items():
        assert_close(real(value), real(expected[name]), name, tolerance)


def assert_matches_reference(arguments):
    assert_matches(run(arguments, "torch"), run(arguments, "reference"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [1, 3, 16])
@pytest.mark.parametrize("T", TOKENS)
def test_matches_reference_with_every_gradient(T, N, kind):
    assert_matches_reference(tensors(2, 3, T, N, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left_out", ["skip", "pre_gate", "post_gate", "initial_state"])
def test_matches_reference_without(left_out, kind):
    arguments = tensors(2, 3, 90, 4, kind)
    del arguments[left_out]
    assert_matches_reference(arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference_over_many_blocks_and_segments(kind, monkeypatch):
    monkeypatch.setattr(scan, "BLOCK_ELEMENTS", {"cpu": 2000})
    assert_matches_reference(tensors(2, 5, 997, 3, kind))


@pytest.mark.parametrize("kinds", [("real", "complex"), ("complex", "real")], ids=str)
@pytest.mark.parametrize("T", [1, 70])
def test_real_and_complex_parameters_may_be_mixed(kinds, T):
    arguments = tensors(2, 3, T, 4, kinds[0])
    arguments["residues"] = tensors(2, 3, T, 4, kinds[1])["residues"]
    arguments["initial_state"] = tensors(2, 3, T, 4, "real")["initial_state"]
    assert_matches_reference(arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_long_conv_with_the_filter(kind):
    a = tensors(2, 3, 1000, 8, kind)
    del a["initial_state"]
    by_filter = {n: a[n] for n in ("u", "skip", "pre_gate", "post_gate")}
    k = modal_filter(a["log_poles"], a["residues"], 1000)
    assert_close(modal_conv(**a)[0], long_conv(k=k, **by_filter)[0])


@pytest.mark.parametrize(
    "wanted", [["u"], ["residues"], ["post_gate"], ["initial_state"], ["skip", "log_poles"]], ids=str
)
def test_gradients_of_a_few_arguments_only(wanted):
    arguments = tensors(1, 2, 70, 3, "complex")
    expected = run(arguments)
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in arguments.items()}
    y, _ = modal_conv(**leaves)
    y.sum().backward()
    assert {n for n, t in leaves.items() if t.grad is not None} == set(wanted)
    assert_close(y, expected["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_is_near_float64(dtype, kind):
    arguments = tensors(2, 3, 300, 8, kind, dtype=dtype)
    expected, actual = run(double(arguments), "reference"), run(arguments)
    assert actual["y"].dtype == actual["d_u"].dtype == dtype
    assert actual["state"].dtype == (torch.complex64 if kind == "complex" else torch.float32)
    # the upstream gradient is rounded to u's dtype, and so is everything made from it
    assert_matches(actual, expected, RELATIVE[dtype])


def test_double_parameters_make_the_arithmetic_and_the_state_double():
    arguments = tensors(2, 3, 50, 4, "real", dtype=torch.float32)
    arguments["log_poles"] = arguments["log_poles"].double()
    assert run(arguments)["state"].dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 6])
def test_gradcheck(kind, T):
    arguments = tensors(2, 2, T, 3, kind)
    names = list(arguments)

    def function(*values):
        return modal_conv(**dict(zip(names, values, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(function, [arguments[n].requires_grad_() for n in names])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[1] * 23, [5, 0, 18], [22, 1], [7, 9, 7]], ids=str)
@pytest.mark.parametrize("N", [1, 5])
def test_any_cut_with_states_is_the_uncut_result_with_gradients(N, cuts, kind):
    def whole_or_cut(sizes):
        a = {name: t.requires_grad_() for name, t in tensors(2, 3, 23, N, kind, seed=3).items()}
        state, outputs = a["initial_state"], []
        for u, pre, post in zip(
            a["u"].split(sizes, 2), a["pre_gate"].split(sizes, 2), a["post_gate"].split(sizes, 2), strict=True
        ):
            y, state = modal_conv(
                u,
                a["log_poles"],
                a["residues"],
                skip=a["skip"],
                pre_gate=pre,
                post_gate=post,
                initial_state=state,
                output_final_state=True,
            )
            outputs.append(y)
        y = torch.cat(outputs, 2)
        ((y * torch.arange(23.0, dtype=torch.float64)).sum() + (real(state) ** 2).sum()).backward()
        return {"y": y, "state": state, **{n: t.grad for n, t in a.items()}}

    assert_matches(whole_or_cut(cuts), whole_or_cut([23]))


@pytest.mark.parametrize("kind", KINDS)
def test_state_before_acts_through_the_powers_after_it(kind):
    a = tensors(1, 2, 10, 3, kind)
    y, state = modal_conv(
        torch.zeros_like(a["u"]),
        a["log_poles"],
        a["residues"],
        initial_state=a["initial_state"],
        output_final_state=True,
    )
    powers = torch.exp(a["log_poles"][..., None] * torch.arange(1, 11))
    expected = (a["residues"][..., None] * powers * a["initial_state"][0, ..., None]).sum(dim=1)
    assert_close(y[0], expected.real if kind == "complex" else expected)
    assert_close(real(state[0]), real(powers[..., -1] * a["initial_state"][0]))


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_holds_near_the_unit_circle(kind):
    a = tensors(1, 1, 1 << 18, 4, kind, dtype=torch.float32)
    slow = torch.full((1, 4), math.log1p(-1e-6))
    a["log_poles"] = torch.complex(slow, a["log_poles"].imag) if kind == "complex" else slow
    assert_matches(run(a), run(double(a)))


@pytest.mark.parametrize("kind", KINDS)
def test_never_holds_all_powers(kind):
    B, D, T, N = 2, 4, 4096, 16
    arguments = tensors(B, D, T, N, kind)
    names = ("u", "log_poles", "residues", "skip", "pre_gate", "post_gate", "initial_state")
    ordered = tuple(arguments[n] for n in names)
    with LargestTensor() as largest:  # it does not see inside an operator, so it watches what the operators call
        run(arguments)
        y, final, starts = scan.convolve(ordered)
        scan.gradients(y, final, ordered, starts, [True] * len(names))
    assert largest.elements <= 2 * B * D * T


def test_one_token_builds_nothing_longer_than_the_state():
    arguments = tensors(2, 3, 1, 16, "complex")
    with LargestTensor() as largest:
        run(arguments)
    assert largest.elements <= 2 * arguments["initial_state"].numel()


def test_saves_no_more_than_its_arguments_and_few_states():
    arguments = {n: t.requires_grad_() for n, t in tensors(1, 4, 8192, 4, "real", dtype=torch.float32).items()}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        modal_conv(**arguments)
    own = {t.data_ptr() for t in arguments.values()}
    assert sum(t.numel() for address, t in saved.items() if address not in own) <= arguments["u"].numel() / 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 100])
def test_pole_at_zero_forgets_everything(kind, T):
    arguments = tensors(2, 2, T, 3, kind)
    arguments["log_poles"][0, 1] = -math.inf if kind == "real" else complex(-math.inf, 0.3)
    actual = run(arguments)
    assert_close(real(actual["state"][:, 0, 1]).flatten()[0], (arguments["u"] * arguments["pre_gate"])[0, 0, -1])
    assert actual["d_log_poles"][0, 1] == 0
    del arguments["initial_state"]
    assert_close(run(arguments)["y"], run(arguments, "reference")["y"])
    assert all(bool(torch.isfinite(real(t)).all()) for t in actual.values())


def test_impulse_gives_back_the_filter():
    a = tensors(1, 3, 80, 5, "complex")
    u = torch.zeros_like(a["u"])
    u[:, :, 0] = 1
    k = modal_filter(a["log_poles"], a["residues"], 80)
    assert_close(modal_conv(u, a["log_poles"], a["residues"])[0][0], k)


def test_future_does_not_reach_the_past():
    a = tensors(1, 2, 300, 4, "real")
    before, _ = modal_conv(**a)
    a["u"][:, :, 150] += 1e6
    after, _ = modal_conv(**a)
    assert torch.equal(after[:, :, :150], before[:, :, :150])
    assert float((after - before)[:, :, 150].abs().max()) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_empty_tensors_give_empty_results_and_gradients(shape, kind):
    arguments = {n: t.requires_grad_() for n, t in tensors(*shape, 4, kind).items()}
    y, state = modal_conv(**arguments, output_final_state=True)
    (y.sum() + state.real.sum()).backward()
    assert y.shape == shape
    assert torch.equal(state, arguments["initial_state"])
    for name in ("u", "log_poles", "residues", "skip", "pre_gate", "post_gate"):
        assert torch.equal(arguments[name].grad, torch.zeros_like(arguments[name]))


def test_non_contiguous_inputs():
    a = tensors(2, 3, 70, 4, "complex")
    expected = run(a)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in a.items()}
    assert not strided["u"].is_contiguous()
    assert_matches(run(strided), expected)


def test_two_runs_agree_bit_for_bit():
    a = tensors(3, 5, 333, 8, "complex", dtype=torch.float32)
    first, second = run(a), run(a)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing does so
@pytest.mark.parametrize("T", [1, 100])
def test_compiles_as_one_graph_with_backward(T):
    arguments = tensors(1, 2, T, 3, "real", dtype=torch.float32)
    expected = run(arguments)
    leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}
    compiled = torch.compile(modal_conv, backend="aot_eager", fullgraph=True, dynamic=False)
    y, state = compiled(**leaves, output_final_state=True)
    (y.sum() + state.sum()).backward()
    assert_close(y, expected["y"])
    assert_close(state, expected["state"])
    assert all(bool(torch.isfinite(t.grad).all()) for t in leaves.values())


@pytest.mark.parametrize("T", [1, 200])
def test_autocast_changes_nothing(T):
    a = tensors(2, 3, T, 8, "real", dtype=torch.float32)
    expected = run(a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(a)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(4, 6)}, r"modal_conv: u must be \[B, D, T\]; got \(4, 6\)"),
        ({"u": torch.zeros(2, 4, 6, dtype=torch.int64)}, "u must be float64"),
        ({"log_poles": torch.zeros(4)}, r"log_poles must be \[D, N\], N >= 1; got \(4,\)"),
        ({"log_poles": torch.zeros(5, 3), "residues": torch.zeros(5, 3)}, r"log_poles must be \[D, N\] with D=4"),
        ({"log_poles": torch.zeros(4, 3).half()}, "log_poles must be float32"),
        ({"residues": torch.zeros(4, 2)}, r"residues must have log_poles' shape \(4, 3\); got \(4, 2\)"),
        ({"skip": torch.zeros(3)}, r"skip must be \[D\] = \(4,\); got \(3,\)"),
        ({"pre_gate": torch.zeros(2, 4, 5)}, r"pre_gate must be \[B, D, T\] = \(2, 4, 6\)"),
        ({"post_gate": torch.zeros(2, 1, 6)}, "post_gate must be"),
        ({"initial_state": torch.zeros(2, 4, 5)}, r"initial_state must be \[B, D, N\] = \(2, 4, 3\); got \(2, 4, 5\)"),
        ({"initial_state": torch.zeros(2, 4, 3, dtype=torch.complex64)}, "initial_state must be real here"),
        ({"backend": "cudnn"}, "backend must be"),
    ],
)
def test_rejects(change, message):
    arguments = {"u": torch.zeros(2, 4, 6), "log_poles": torch.zeros(4, 3), "residues": torch.zeros(4, 3), **change}
    with pytest.raises(ValueError, match=message):
        modal_conv(**arguments)
