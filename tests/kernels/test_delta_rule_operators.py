"""delta_rule as torch sees it: contract of the operators, compiling, fake tensors, autocast, documents, bad input."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from seqengine.kernels.delta_rule import ops
from seqengine.kernels.delta_rule.op import delta_rule
from seqengine.kernels.delta_rule.summary import delta_summary
from seqengine.kernels.linear_attention import layout
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BOUNDS = [[0, 5, 12], [0, 1, 2, 12], [0, 0, 7, 7, 12], [0, 12], [0, 12, 12]]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(gated, B, T, H, K, V, rows=None, dtype=torch.float64):
    made = {"q": randn(B, T, H, K, seed=1), "k": F.normalize(randn(B, T, H, K, seed=2), dim=-1)}
    made["v"], made["beta"] = randn(B, T, H, V, seed=3), randn(B, T, H, seed=6).sigmoid()
    if gated:
        made["g"] = -(randn(B, T, H, seed=4) ** 2)
    made["initial_state"] = randn(B if rows is None else rows, H, K, V, seed=5)
    return {name: x.to(dtype) for name, x in made.items()}


@pytest.mark.parametrize("bounds", [None, [0, 4, 4, 9]], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("queries", [True, False])
def test_operators_keep_torchs_contract(gated, bounds, queries):
    a = tensors(gated, 1, 9, 2, 3, 4, rows=1 if bounds is None else 3)
    if not queries:
        del a["q"]
    ends = None if bounds is None else torch.tensor(bounds)

    def arguments(a):
        return (*(a.get(name) for name in ("q", "k", "v", "beta", "g")), 0.5, a["initial_state"], ends)

    torch.library.opcheck(ops.delta_rule, arguments({name: x.clone().requires_grad_() for name, x in a.items()}))
    o, state, starts = ops.delta_rule(*arguments(a))
    torch.library.opcheck(ops.delta_rule_backward, (o if queries else None, state, *arguments(a), starts))


def test_the_second_derivative_keeps_torchs_contract():
    a = {name: x.requires_grad_() for name, x in tensors(True, 1, 5, 2, 3, 4).items()}
    arguments = (*(a[name] for name in ("q", "k", "v", "beta", "g")), 0.5, a["initial_state"], None)
    o, state, starts = (x.detach() for x in ops.delta_rule(*arguments))
    torch.library.opcheck(ops.delta_rule_backward, (o, state, *arguments, starts))


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("gated", [True, False])
def test_compiles_as_one_graph_with_backward(gated, T):
    a = tensors(gated, 2, T, 2, 3, 4, dtype=torch.float32)

    def loss(**arguments):
        o, state = delta_rule(**arguments, output_final_state=True)
        return o.sin().sum() + state.cos().sum()

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
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (70, 133):
        a = tensors(True, 1, T, 2, 3, 4, rows=2)
        bounds = torch.tensor([0, 33, T])
        o, state = compiled(**a, cu_seqlens=bounds, output_final_state=True)
        expected, last = delta_rule(**a, cu_seqlens=bounds, output_final_state=True)
        assert_close(o, expected)
        assert_close(state, last)


def test_the_summary_compiles_as_one_graph_with_backward():
    a = tensors(True, 1, 70, 2, 3, 4)
    torch.compiler.reset()
    found = []
    for function in (delta_summary, torch.compile(delta_summary, fullgraph=True, backend="aot_eager")):
        leaves = [a[name].clone().requires_grad_() for name in ("k", "v", "beta", "g")]
        A, b = function(*leaves)
        (A.sin().sum() + b.cos().sum()).backward()
        found.append([A, b, *(x.grad for x in leaves)])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("T", [0, 1, 70])
@pytest.mark.parametrize("gated", [True, False])
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(gated, T):
    a = tensors(gated, 2, T, 3, 4, 5, dtype=torch.bfloat16)
    a["initial_state"] = a["initial_state"].float()
    real = delta_rule(**a, output_final_state=True)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        fake = delta_rule(**{name: mode.from_tensor(x) for name, x in a.items()}, output_final_state=True)
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("T", [1, 100])
@pytest.mark.parametrize("gated", [True, False])
def test_autocast_changes_nothing(gated, T):
    a = tensors(gated, 1, T, 2, 8, 8, dtype=torch.float32)

    def run():
        leaves = {name: x.clone().requires_grad_() for name, x in a.items()}
        o, _ = delta_rule(**leaves)
        first = torch.autograd.grad(o.sum(), leaves.values(), create_graph=True)
        return [o, *first, *torch.autograd.grad(sum(x.pow(2).sum() for x in first), leaves.values())]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run()
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def run_documents(a, bounds, packed, **options):
    """Output, states and gradients of a projection of both; packed in one call, or document by document."""
    a = {name: x.clone().requires_grad_() for name, x in a.items()}
    if packed:
        ends = torch.tensor(bounds, dtype=torch.int32)
        o, state = delta_rule(**a, output_final_state=True, cu_seqlens=ends, **options)
    else:
        outputs, states = [], []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            part = {name: x[:, start:stop] for name, x in a.items()}
            part["initial_state"] = a["initial_state"][n : n + 1]
            out, last = delta_rule(**part, output_final_state=True, backend="reference")
            outputs.append(out)
            states.append(last)
        o, state = torch.cat(outputs, 1), torch.cat(states)
    ((o * randn(*o.shape, seed=7)).sum() + (state * randn(*state.shape, seed=8)).sum()).backward()
    return {"o": o, "state": state, **{f"d_{name}": x.grad for name, x in a.items()}}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bounds", [*BOUNDS, [0, 1], [0, 64, 65, 200, 200, 210, 330]], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_each_document_is_as_if_alone(gated, bounds, backend):
    a = tensors(gated, 1, bounds[-1], 2, 3, 4, rows=len(bounds) - 1)
    expected = run_documents(a, bounds, packed=False)
    for name, value in run_documents(a, bounds, packed=True, backend=backend).items():
        assert_close(value, expected[name], name)


def test_documents_may_be_cut_by_segments(monkeypatch):
    monkeypatch.setattr(layout, "TILE_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(layout, "SEGMENT_CHUNKS", 2)
    bounds = [0, 3, 90, 90, 91, 150, 151]
    a = tensors(True, 1, 151, 2, 3, 4, rows=6)
    expected = run_documents(a, bounds, packed=False)
    for name, value in run_documents(a, bounds, packed=True).items():
        assert_close(value, expected[name], name)


def test_nothing_leaks_over_a_boundary():
    a = tensors(True, 1, 40, 2, 3, 4, rows=2)
    bounds = torch.tensor([0, 15, 40])
    before, states = delta_rule(**a, cu_seqlens=bounds, output_final_state=True)
    a["v"][:, :15] += 1e6
    a["k"][:, :15] *= -0.5
    after, changed = delta_rule(**a, cu_seqlens=bounds, output_final_state=True)
    assert torch.equal(after[:, 15:], before[:, 15:])
    assert torch.equal(changed[1], states[1])
    assert not torch.equal(changed[0], states[0])


def test_second_derivative_of_documents():
    a = tensors(True, 1, 6, 1, 2, 2, rows=3)
    names = list(a)

    def function(*values):
        arguments = dict(zip(names, values, strict=True))
        return delta_rule(**arguments, cu_seqlens=torch.tensor([0, 2, 2, 6]), output_final_state=True)

    leaves = [x.requires_grad_() for x in a.values()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_no_document_has_a_token():
    a = tensors(True, 1, 0, 2, 3, 4, rows=2)
    o, state = delta_rule(**a, cu_seqlens=torch.tensor([0, 0, 0]), output_final_state=True)
    assert o.shape == (1, 0, 2, 4)
    assert torch.equal(state, a["initial_state"])
    del a["initial_state"]
    _, state = delta_rule(**a, cu_seqlens=torch.tensor([0, 0, 0]), output_final_state=True)
    assert torch.equal(state, torch.zeros(2, 2, 3, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 4)}, r"delta_rule: q must be \[B, T, H, K\], K >= 1; got \(2, 6, 4\)"),
        ({"q": torch.zeros(1, 6, 2, 3, dtype=torch.int64)}, "q must be float64"),
        ({"k": torch.zeros(1, 6, 2, 4)}, r"k must be \[B, T, H, K\] = \[1, 6, 2, 3\]; got \(1, 6, 2, 4\)"),
        ({"k": torch.zeros(1, 6, 2, 3, dtype=torch.complex64)}, "k must be float64"),
        ({"v": torch.zeros(1, 6, 4)}, r"v must be \[B, T, H, V\]"),
        ({"v": torch.zeros(1, 7, 2, 4)}, r"must have B, T, H = \(1, 6, 2\)"),
        ({"beta": torch.zeros(1, 6, 2, 1)}, r"beta must be \[B, T, H\] = \[1, 6, 2\]"),
        ({"beta": torch.zeros(1, 6, 2, dtype=torch.bool)}, "beta must be float64"),
        ({"g": torch.zeros(1, 6, 2, 3)}, r"g must be \[B, T, H\] = \[1, 6, 2\]"),
        ({"g": torch.zeros(2)}, r"g must be \[B, T, H\]"),
        ({"initial_state": torch.zeros(1, 2, 4, 3)}, r"initial_state must be \[B, H, K, V\] = \[1, 2, 3, 4\]"),
        ({"initial_state": torch.zeros(1, 2, 3, 4, dtype=torch.complex64)}, "initial_state must be float64"),
        ({"initial_state": torch.zeros(1, 2, 3, 4, device="meta")}, "initial_state must be on cpu"),
        ({"backend": "triton"}, "backend must be 'auto', 'torch' or 'reference'; got triton"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "ascend from 0 to T=6"),
        ({"cu_seqlens": torch.tensor([0, 5]), "backend": "reference"}, "ascend from 0 to T=6"),
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
def test_bad_arguments_are_named(change, message):
    arguments = {name: torch.zeros(1, 6, 2, 3) for name in "qk"} | {"v": torch.zeros(1, 6, 2, 4)}
    with pytest.raises(ValueError, match=message):
        delta_rule(**arguments | {"beta": torch.zeros(1, 6, 2)} | change)


def test_documents_are_one_row():
    a = {name: torch.zeros(2, 6, 2, 3) for name in "qkv"}
    with pytest.raises(ValueError, match="must be one row"):
        delta_rule(**a, beta=torch.zeros(2, 6, 2), cu_seqlens=torch.tensor([0, 6]))
