"""gla and simple_gla as torch sees them: contract of the operators, compiling, fake tensors, autocast, documents, bad input."""

import itertools

import pytest
import torch

from seqengine.kernels.linear_attention import layout, ops
from seqengine.kernels.linear_attention.op import gla, simple_gla
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
GATES = ["channel", "head", "fixed", "none"]
BOUNDS = [[0, 5, 12], [0, 1, 2, 12], [0, 0, 7, 7, 12], [0, 12], [0, 12, 12]]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(gates, B, T, H, K, V, rows=None, dtype=torch.float64):
    made = {"q": randn(B, T, H, K, seed=1), "k": randn(B, T, H, K, seed=2), "v": randn(B, T, H, V, seed=3)}
    shape = {"channel": (B, T, H, K), "head": (B, T, H), "fixed": (H,)}.get(gates)
    if shape is not None:
        made["g"] = -(randn(*shape, seed=4) ** 2)
    made["initial_state"] = randn(B if rows is None else rows, H, K, V, seed=5)
    return {name: x.to(dtype) for name, x in made.items()}


def function_of(gates):
    return gla if gates == "channel" else simple_gla


@pytest.mark.parametrize(
    ("gates", "bounds"),
    [*((gates, None) for gates in GATES), *((gates, [0, 4, 4, 9]) for gates in GATES if gates != "fixed")],
    ids=str,
)
def test_operators_keep_torchs_contract(gates, bounds):
    """With documents simple_gla spreads fixed decays over the tokens."""
    a = tensors(gates, 1, 9, 2, 3, 4, rows=1 if bounds is None else 3)
    ends = None if bounds is None else torch.tensor(bounds)
    leaves = {name: x.clone().requires_grad_() for name, x in a.items()}
    torch.library.opcheck(
        ops.gla, (leaves["q"], leaves["k"], leaves["v"], leaves.get("g"), 0.5, leaves["initial_state"], ends)
    )
    o, state, starts = ops.gla(a["q"], a["k"], a["v"], a.get("g"), 0.5, a["initial_state"], ends)
    given = (o, state, a["q"], a["k"], a["v"], a.get("g"), 0.5, a["initial_state"], starts, ends)
    torch.library.opcheck(ops.gla_backward, given)
    torch.library.opcheck(ops.gla_backward, (*given, "torch", False))


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("gates", ["channel", "head", "fixed"])
def test_gates_that_need_no_gradient_change_none(gates, T):
    """Of the first and of the second order; nothing is computed for the gates."""
    a, found = tensors(gates, 2, T, 2, 3, 4), []
    for needs in (True, False):
        leaves = {name: x.clone().requires_grad_(name != "g" or needs) for name, x in a.items()}
        o, state = function_of(gates)(**leaves, output_final_state=True)
        asked = [x for name, x in leaves.items() if name != "g"]
        first = torch.autograd.grad(o.sin().sum() + state.cos().sum(), asked, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(x.sin().sum() for x in first), asked)))
    for with_gates, without in zip(*found, strict=True):
        assert torch.equal(with_gates, without)
    o, state, starts = ops.gla(a["q"], a["k"], a["v"], a["g"], 0.5, a["initial_state"], None)
    given = (o, state, a["q"], a["k"], a["v"], a["g"], 0.5, a["initial_state"], starts, None)
    assert ops.gla_backward(*given, of_gates=False)[3].shape == (0,)


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("gates", [*GATES, "normalize"])
def test_compiles_as_one_graph_with_backward(gates, T):
    a = tensors(gates if gates != "normalize" else "head", 2, T, 2, 3, 4, dtype=torch.float32)
    if gates == "normalize":
        a["q"], a["k"] = a["q"].abs(), a["k"].abs()
        del a["initial_state"]
    options = {"normalize": True} if gates == "normalize" else {}

    def loss(**arguments):
        o, state = function_of(gates)(**arguments, output_final_state=True, **options)
        return o.sin().sum() + sum(x.cos().sum() for x in (state if isinstance(state, tuple) else (state,)))

    torch.compiler.reset()
    eager, compiled = ({name: x.clone().requires_grad_() for name, x in a.items()} for _ in range(2))
    expected = loss(**eager)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)(**compiled)
    assert_close(actual, expected)
    expected.backward()
    actual.backward()
    for name in a:
        assert_close(compiled[name].grad, eager[name].grad, name)


def test_compiles_with_documents_and_any_length():
    torch.compiler.reset()
    compiled = torch.compile(gla, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (70, 133):
        a = tensors("channel", 1, T, 2, 3, 4, rows=2)
        bounds = torch.tensor([0, 33, T])
        o, state = compiled(**a, cu_seqlens=bounds, output_final_state=True)
        expected, last = gla(**a, cu_seqlens=bounds, output_final_state=True)
        assert_close(o, expected)
        assert_close(state, last)


@pytest.mark.parametrize("T", [0, 1, 70])
@pytest.mark.parametrize("gates", GATES)
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(gates, T):
    a = tensors(gates, 2, T, 3, 4, 5, dtype=torch.bfloat16)
    a["initial_state"] = a["initial_state"].float()
    real = function_of(gates)(**a, output_final_state=True)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = function_of(gates)(**{name: mode.from_tensor(x) for name, x in a.items()}, output_final_state=True)
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("T", [1, 100])
@pytest.mark.parametrize("gates", GATES)
def test_autocast_changes_nothing(gates, T):
    a = tensors(gates, 1, T, 2, 8, 8, dtype=torch.float32)

    def run():
        leaves = {name: x.clone().requires_grad_() for name, x in a.items()}
        o, _ = function_of(gates)(**leaves)
        o.sum().backward()
        return [o, *(x.grad for x in leaves.values())]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run()
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def run_documents(function, a, bounds, packed, **options):
    """Output, states and gradients of a projection of both; packed in one call, or document by document."""
    a = {name: x.clone().requires_grad_() for name, x in a.items()}
    if packed:
        o, state = function(**a, output_final_state=True, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **options)
    else:
        outputs, states = [], []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            part = {name: x[:, start:stop] if x.ndim > 1 else x for name, x in a.items()}
            part["initial_state"] = a["initial_state"][n : n + 1]
            out, last = function(**part, output_final_state=True, backend="reference")
            outputs.append(out)
            states.append(last)
        o, state = torch.cat(outputs, 1), torch.cat(states)
    ((o * randn(*o.shape, seed=7)).sum() + (state * randn(*state.shape, seed=8)).sum()).backward()
    return {"o": o, "state": state, **{f"d_{name}": x.grad for name, x in a.items()}}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bounds", [*BOUNDS, [0, 64, 65, 200, 200, 210, 330]], ids=str)
@pytest.mark.parametrize("gates", GATES)
def test_each_document_is_as_if_alone(gates, bounds, backend):
    a = tensors(gates, 1, bounds[-1], 2, 3, 4, rows=len(bounds) - 1)
    expected = run_documents(function_of(gates), a, bounds, packed=False)
    actual = run_documents(function_of(gates), a, bounds, packed=True, backend=backend)
    for name, value in actual.items():
        assert_close(value, expected[name], name)


@pytest.mark.parametrize("gates", ["channel", "head"])
def test_documents_may_be_cut_by_segments(gates, monkeypatch):
    monkeypatch.setattr(layout, "TILE_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(layout, "SEGMENT_CHUNKS", 2)
    bounds = [0, 3, 90, 90, 91, 150, 151]
    a = tensors(gates, 1, 151, 2, 3, 4, rows=6)
    expected = run_documents(function_of(gates), a, bounds, packed=False)
    for name, value in run_documents(function_of(gates), a, bounds, packed=True).items():
        assert_close(value, expected[name], name)


@pytest.mark.parametrize("gates", GATES)
def test_nothing_leaks_over_a_boundary(gates):
    a = tensors(gates, 1, 40, 2, 3, 4, rows=2)
    bounds = torch.tensor([0, 15, 40])
    before, states = function_of(gates)(**a, cu_seqlens=bounds, output_final_state=True)
    for name in "kv":
        a[name][:, :15] += 1e6
    after, changed = function_of(gates)(**a, cu_seqlens=bounds, output_final_state=True)
    assert torch.equal(after[:, 15:], before[:, 15:])
    assert torch.equal(changed[1], states[1])
    assert not torch.equal(changed[0], states[0])


def test_second_derivative_of_documents():
    a = tensors("channel", 1, 6, 1, 2, 2, rows=3)
    names = list(a)

    def function(*values):
        arguments = dict(zip(names, values, strict=True))
        return gla(**arguments, cu_seqlens=torch.tensor([0, 2, 2, 6]), output_final_state=True)

    leaves = [x.requires_grad_() for x in a.values()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_no_document_has_a_token():
    a = tensors("channel", 1, 0, 2, 3, 4, rows=2)
    o, state = gla(**a, cu_seqlens=torch.tensor([0, 0, 0]), output_final_state=True)
    assert o.shape == (1, 0, 2, 4)
    assert torch.equal(state, a["initial_state"])


def test_short_documents_cost_little_more_than_their_tokens():
    bounds = list(range(0, 4097, 8))
    plan = layout.make_plan(1, 4096, 2, 8, 8, len(bounds) - 1, "cpu")
    made = layout.segments(plan, 4096, torch.tensor(bounds), torch.device("cpu"), "gla")
    assert sum(part.chunks * part.chunk for part in made) == 4096
    assert len(made) <= plan.segments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 4)}, r"gla: q must be \[B, T, H, K\], K >= 1; got \(2, 6, 4\)"),
        ({"q": torch.zeros(1, 6, 2, 3, dtype=torch.int64)}, "q must be float64"),
        ({"k": torch.zeros(1, 6, 2, 4)}, r"k must be \[B, T, H, K\] = \[1, 6, 2, 3\]; got \(1, 6, 2, 4\)"),
        ({"v": torch.zeros(1, 6, 4)}, r"v must be \[B, T, H, V\]"),
        ({"v": torch.zeros(1, 7, 2, 4)}, r"must have B, T, H = \(1, 6, 2\)"),
        ({"g": torch.zeros(1, 6, 2)}, r"g must be \[B, T, H, K\]"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, r"initial_state must be \[B, H, K, V\] = \[1, 2, 3, 4\]"),
        ({"initial_state": torch.zeros(1, 2, 3, 4, dtype=torch.complex64)}, "initial_state must be float64"),
        ({"backend": "cudnn"}, "backend must be"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "ascend from 0 to T=6"),
        ({"cu_seqlens": torch.tensor([1, 6])}, "ascend from 0 to T=6"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "ascend from 0 to T=6"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, r"cu_seqlens must be integers \[N \+ 1\]"),
        ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens must be integers \[N \+ 1\]"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 6]), "initial_state": torch.zeros(1, 2, 3, 4)},
            r"initial_state must be \[N, H, K, V\] = \[2, 2, 3, 4\]",
        ),
    ],
    ids=str,
)
def test_gla_rejects(change, message):
    arguments = {name: torch.zeros(1, 6, 2, 3) for name in "qkg"} | {"v": torch.zeros(1, 6, 2, 4)} | change
    with pytest.raises(ValueError, match=message):
        gla(**arguments)


def test_documents_are_one_row():
    a = {name: torch.zeros(2, 6, 2, 3) for name in "qkvg"}
    with pytest.raises(ValueError, match="must be one row"):
        gla(**a, cu_seqlens=torch.tensor([0, 6]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.zeros(1, 6, 2, 3)}, r"simple_gla: g must be \[B, T, H\] = \[1, 6, 2\] or \[H\] = \[2\]"),
        ({"g": torch.zeros(3)}, r"or \[H\] = \[2\]; got \(3,\)"),
        ({"normalize": True, "scale": 1.0}, "scale must be None with normalize=True"),
        ({"normalize": True, "initial_state": torch.zeros(1, 2, 3, 4)}, r"must be a tuple \(S, z\)"),
        (
            {"normalize": True, "initial_state": (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4))},
            r"initial_state\[1\] must be \[B, H, K\] = \[1, 2, 3\]",
        ),
        ({"initial_state": (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))}, "must be one tensor unless normalize"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, r"initial_state must be \[B, H, K, V\]"),
        ({"backend": "cuda"}, "backend must be"),
    ],
    ids=str,
)
def test_simple_gla_rejects(change, message):
    arguments = {name: torch.zeros(1, 6, 2, 3) for name in "qk"} | {"v": torch.zeros(1, 6, 2, 4)} | change
    with pytest.raises(ValueError, match=message):
        simple_gla(**arguments)
