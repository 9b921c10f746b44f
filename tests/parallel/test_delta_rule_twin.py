"""delta_rule on P ranks is the kernel on the whole: outputs, states, every gradient, and the bytes that it sends."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from seqengine.kernels import api as kernels
from seqengine.parallel import api as parallel
from seqengine.parallel import cost
from seqengine.parallel.api import SequenceContext
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [9], 2: [130, 47], 3: [70, 0, 5], 4: [1, 3, 0, 65], 5: [20, 2, 1, 1, 33], 8: [3, 0, 1, 2, 0, 0, 40, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
B, H, K, V = 2, 3, 16, 5
SHARDED = ("q", "k", "v", "beta", "g")
WAYS = [("auto", None), ("serial", None), ("gather", None), ("log", None), ("hierarchical", 2)]


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(T, dtype=torch.float64):
    """Keys of length 1; heads that decay slowly, that forget all now and then (-inf), and whose gates are extreme."""
    gates = -(randn(B, T, H, seed=5) ** 2) / 10
    gates[:, ::7, 1] = -math.inf
    gates[:, ::2, 2] = 0.0
    gates[:, 5::9, 2] = -80.0
    made = {
        "q": randn(B, T, H, K, seed=1),
        "k": F.normalize(randn(B, T, H, K, seed=2), dim=-1),
        "v": randn(B, T, H, V, seed=3),
        "beta": randn(B, T, H, seed=4).sigmoid(),
        "g": gates,
        "initial_state": randn(B, H, K, V, seed=6),
    }
    return {name: t.to(dtype) for name, t in made.items()}


def run(function, a, gated, plain, do, d_final, **options):
    """Outputs and gradients; plain: without an initial and a final state."""
    names = [n for n in a if (n != "g" or gated) and (n != "initial_state" or not plain)]
    a = {n: a[n].detach().clone().requires_grad_() for n in names}
    o, final = function(**a, output_final_state=not plain, **options)
    loss = (o * do).sum()
    if not plain:
        loss = loss + (final * d_final).sum()
    loss.backward()
    found = {"o": o.detach(), **{f"d_{n}": a[n].grad for n in names}}
    return found if plain else {**found, "final": final.detach()}


def on_rank(group, cut, cases, dtype):
    ctx = SequenceContext.create(group, cut[group.rank()])
    found = []
    whole = tensors(sum(cut), dtype)
    do, d_final = randn(*whole["v"].shape, seed=20, dtype=dtype), whole["initial_state"].flip(1)
    a = {n: ctx.split(t, 1) if n in SHARDED else t for n, t in whole.items()}
    for gated, plain, (algorithm, node_size) in cases:
        ctx.ledger().clear()
        options = {"algorithm": algorithm, "node_size": node_size}
        options["head_groups"] = {"serial": 1, "gather": 2, "hierarchical": 3}.get(algorithm)
        result = run(parallel.delta_rule, a, gated, plain, ctx.split(do, 1), d_final, ctx=ctx, **options)
        state_bytes = B * H * K * V * dtype.itemsize
        transition_bytes = B * H * K * K * dtype.itemsize
        if algorithm == "auto":
            algorithm = cost.scan_algorithm(
                ctx.size, state_bytes, transition_bytes, output_final=not plain, node_size=node_size
            )
        shared = (ctx.size, ctx.rank, algorithm, state_bytes, transition_bytes)
        predicted = cost.scan_bytes(*shared, output_final=not plain, node_size=node_size)
        predicted += cost.scan_backward_bytes(*shared, initial_gradient=not plain, node_size=node_size)
        found.append((result, ctx.ledger().sent_bytes(), predicted))
    return found


def check(cut, cases, dtype):
    results = run_ranks(len(cut), on_rank, cut, cases, dtype)
    whole = tensors(sum(cut), dtype)
    do = randn(*whole["v"].shape, seed=20, dtype=dtype)
    for i, (gated, plain, way) in enumerate(cases):
        expected = run(kernels.delta_rule, whole, gated, plain, do, whole["initial_state"].flip(1))
        for name, value in expected.items():
            parts = [r[i][0][name] for r in results]
            what = f"gated={gated}, plain={plain}, {way}: {name}"
            if name in ("final", "d_initial_state"):
                for part in parts:
                    assert_close(part, value, what)
            else:
                assert_close(torch.cat(parts, dim=1), value, what)
        for _, sent, predicted in (r[i] for r in results):
            assert sent == predicted


@ALL
def test_parts_are_the_kernel_on_the_whole_with_every_gradient_and_the_bytes_of_the_formula(cut):
    check(cut, list(itertools.product((False, True), (False, True), WAYS if len(cut) > 1 else WAYS[:1])), torch.float64)


@pytest.mark.parametrize("P", [3, 8])
def test_float32(P):
    check(CUTS[P], list(itertools.product((False, True), (False,), WAYS[:1])), torch.float32)


def _windows(group, cut, algorithm):
    ctx = SequenceContext.create(group, cut[group.rank()])
    a = {n: t.requires_grad_() for n, t in tensors(2 * sum(cut)).items()}
    weights = randn(*a["v"].shape, seed=20)
    state, loss, outputs = a["initial_state"], 0.0, []
    for window in range(2):
        parts = {n: ctx.split(a[n].chunk(2, dim=1)[window], 1) for n in SHARDED}
        o, state = parallel.delta_rule(
            **parts, ctx=ctx, initial_state=state, output_final_state=True, algorithm=algorithm
        )
        loss = loss + (o * ctx.split(weights.chunk(2, dim=1)[window], 1)).sum()
        outputs.append(o.detach())
    loss.backward()
    return outputs, {n: t.grad for n, t in a.items()}


@pytest.mark.parametrize("algorithm", ["gather", "log"])
def test_windows_that_hand_the_state_on_are_one_sequence_with_its_gradients(algorithm):
    cut = CUTS[4]
    a = {n: t.requires_grad_() for n, t in tensors(2 * sum(cut)).items()}
    o, _ = kernels.delta_rule(**a)
    (o * randn(*o.shape, seed=20)).sum().backward()
    results = run_ranks(4, _windows, cut, algorithm)
    joined = torch.cat([outputs[window] for window in range(2) for outputs, _ in results], dim=1)
    assert_close(joined, o, "o")
    for name in SHARDED:
        assert_close(sum(grads[name] for _, grads in results), a[name].grad, name)
    for _, grads in results:
        assert_close(grads["initial_state"], a["initial_state"].grad, "initial_state")


def _mixed(group, cut, dtypes, autocast):
    ctx = SequenceContext.create(group, cut[group.rank()])
    a = {n: t.to(dtypes.get(n, torch.float32)) for n, t in tensors(sum(cut)).items()}
    parts = {n: (ctx.split(t, 1) if n in SHARDED else t).clone().requires_grad_() for n, t in a.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        o, state = parallel.delta_rule(**parts, ctx=ctx, output_final_state=True)
    o.to(state.dtype).square().sum().backward()
    return o.detach(), state.detach(), {n: t.grad for n, t in parts.items()}


@pytest.mark.parametrize(
    ("dtypes", "autocast"),
    [
        (dict.fromkeys(SHARDED, torch.bfloat16), False),
        (dict.fromkeys(SHARDED, torch.float16), False),
        ({"q": torch.float64}, False),
        ({"initial_state": torch.float64, "k": torch.bfloat16}, False),
        ({"v": torch.bfloat16}, True),
        ({}, True),
    ],
    ids=["bfloat16", "float16", "float64 queries", "float64 state", "bfloat16 values, autocast", "autocast"],
)
def test_dtypes_in_any_mixture_and_autocast_are_those_of_the_kernel(dtypes, autocast):
    cut = CUTS[3]
    a = {n: t.to(dtypes.get(n, torch.float32)).requires_grad_() for n, t in tensors(sum(cut)).items()}
    o, state = kernels.delta_rule(**a, output_final_state=True)
    o.to(state.dtype).square().sum().backward()
    results = run_ranks(3, _mixed, cut, dtypes, autocast)
    assert results[0][0].dtype == o.dtype
    assert_close(torch.cat([r[0] for r in results], dim=1), o, "o")
    for _, final, grads in results:
        assert final.dtype == state.dtype
        assert_close(final, state, "final")
        assert_close(grads["initial_state"], a["initial_state"].grad, "initial_state")
    for n in SHARDED:
        assert_close(torch.cat([r[2][n] for r in results], dim=1), a[n].grad, n)


def _outputs(group, cut, gates):
    ctx = SequenceContext.create(group, cut[group.rank()])
    a = {n: ctx.split(t, 1) for n, t in tensors(sum(cut)).items() if n in SHARDED} | {"g": ctx.split(gates, 1)}
    return parallel.delta_rule(**a, ctx=ctx, scale=0.5)[0]


def test_documents_are_gates_that_forget_all_at_their_first_tokens():
    cut, bounds = CUTS[5], torch.tensor([0, 3, 21, 22, 50, 57])
    a = {n: t for n, t in tensors(sum(cut)).items() if n in SHARDED}
    gates = a["g"].clone()
    gates[:, bounds[:-1]] = -math.inf
    found = torch.cat(run_ranks(5, _outputs, cut, gates), dim=1)
    for b in range(B):
        o, _ = kernels.delta_rule(**{n: t[b : b + 1] for n, t in a.items()}, scale=0.5, cu_seqlens=bounds)
        assert_close(found[b : b + 1], o)


def documents_of(cut):
    """One document; each rank its own; across ranks and without tokens; of one token each."""
    T, stops = sum(cut), list(itertools.accumulate(cut))
    few = sorted(torch.randint(0, T + 1, (3,), generator=torch.Generator().manual_seed(T)).tolist())
    return [[0, T], [0, *stops], [0, 0, *few, T, T], [0, *range(max(0, T - 5), T + 1)]]


def packed_cases(cut):
    """(documents, gated, plain, algorithm, node_size, head_groups)"""
    forms = [(True, False, *WAYS[0], None), (True, True, *WAYS[0], None), (False, False, *WAYS[1], 2)]
    forms += [(True, False, *way, groups) for way, groups in zip(WAYS[2:], (1, 3, 2), strict=True)]
    return [(documents, *form) for documents in documents_of(cut) for form in (forms if len(cut) > 1 else forms[:2])]


def packed_tensors(cut, documents, dtype=torch.float64):
    rows = randn(len(documents) - 1, H, K, V, seed=30, dtype=dtype)
    return {n: x[:1] for n, x in tensors(sum(cut), dtype).items()} | {"initial_state": rows}


def _packed(group, cut, dtype):
    ctx, found = SequenceContext.create(group, cut[group.rank()]), []
    for documents, gated, plain, algorithm, node_size, head_groups in packed_cases(cut):
        whole = packed_tensors(cut, documents, dtype)
        do, d_final = randn(1, sum(cut), H, V, seed=20, dtype=dtype), whole["initial_state"].flip(1)
        a = {n: ctx.split(x, 1) if n in SHARDED else x for n, x in whole.items()}
        options = {"algorithm": algorithm, "node_size": node_size, "head_groups": head_groups, "ctx": ctx}
        options["cu_seqlens"] = torch.tensor(documents)
        ctx.ledger().clear()
        result = run(parallel.delta_rule, a, gated, plain, ctx.split(do, 1), d_final, **options)
        state, transition = H * K * V * dtype.itemsize, H * K * K * dtype.itemsize
        if algorithm == "auto":
            algorithm = cost.scan_algorithm(ctx.size, state, transition, node_size=node_size)
        shared = (ctx.bounds, ctx.rank, algorithm, state, transition)
        options = {"node_size": node_size, "documents": documents}
        formula = cost.gla_bytes(*shared, output_final=not plain, **options)
        formula += cost.gla_backward_bytes(*shared, initial_gradient=not plain, **options)
        found.append((result, ctx.ledger().sent_bytes(), formula))
    return found


def check_packed(cut, dtype):
    results = run_ranks(len(cut), _packed, cut, dtype)
    for i, (documents, gated, plain, *_) in enumerate(packed_cases(cut)):
        whole = packed_tensors(cut, documents, dtype)
        do, d_final = randn(1, sum(cut), H, V, seed=20, dtype=dtype), whole["initial_state"].flip(1)
        bounds = torch.tensor(documents)
        expected = run(kernels.delta_rule, whole, gated, plain, do, d_final, cu_seqlens=bounds)
        for name, value in expected.items():
            parts = [r[i][0][name] for r in results]
            what = f"{packed_cases(cut)[i]}: {name}"
            for part in parts if name in ("final", "d_initial_state") else [torch.cat(parts, dim=1)]:
                assert_close(part, value, what)
        for _, sent, formula in (r[i] for r in results):
            assert sent == formula, packed_cases(cut)[i]


@ALL
def test_documents_that_cross_ranks_are_the_kernel_on_the_whole_with_their_states_and_bytes(cut):
    check_packed(cut, torch.float64)


def test_documents_in_float32():
    check_packed(CUTS[5], torch.float32)


def _of_one_state(group, cut, number):
    """A loss of the final state of one document alone."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    whole = packed_tensors(cut, FEW)
    a = {n: (ctx.split(x, 1) if n in SHARDED else x).clone().requires_grad_() for n, x in whole.items()}
    _, final = parallel.delta_rule(**a, ctx=ctx, cu_seqlens=torch.tensor(FEW), output_final_state=True)
    final[number].square().sum().backward()
    return {n: x.grad for n, x in a.items()}


FEW = [0, 10, 21, 21, 25, 57]


@pytest.mark.parametrize("number", range(5))
def test_a_loss_of_one_final_state_has_its_gradient_on_every_rank(number):
    cut = CUTS[5]
    a = {n: x.clone().requires_grad_() for n, x in packed_tensors(cut, FEW).items()}
    _, final = kernels.delta_rule(**a, cu_seqlens=torch.tensor(FEW), output_final_state=True)
    final[number].square().sum().backward()
    results = run_ranks(5, _of_one_state, cut, number)
    for name, x in a.items():
        parts = [r[name] for r in results]
        for part in [torch.cat(parts, dim=1)] if name in SHARDED else parts:
            assert_close(part, x.grad, name)


def test_one_rank_is_the_kernel_with_documents_and_their_states():
    a, bounds = tensors(9), torch.tensor([0, 4, 4, 9])
    row = {n: a[n][:1] for n in SHARDED} | {"initial_state": randn(3, H, K, V, seed=30)}
    options = {"cu_seqlens": bounds, "output_final_state": True, "scale": 0.5}
    found = parallel.delta_rule(**row, **options, ctx=SequenceContext.single(9))
    for x, y in zip(found, kernels.delta_rule(**row, **options), strict=True):
        assert torch.equal(x, y)


def _second(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    a = {n: ctx.split(t, 1) for n, t in tensors(sum(cut)).items() if n in SHARDED}
    v = a["v"].clone().requires_grad_()
    o, _ = parallel.delta_rule(**a | {"v": v}, ctx=ctx)
    (dv,) = torch.autograd.grad(o.square().sum(), v, create_graph=True)
    try:
        dv.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_second_derivative_raises():
    assert all("once_differentiable" in message for message in run_ranks(2, _second, CUTS[2]))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_bad_input_raises_on_every_rank_before_any_message(rank):
    ctx = SequenceContext(None, rank, (0, 4, 4, 5))  # it has no group: a message would raise something else
    T = ctx.local_tokens
    local = rf"rank {rank} holds {T} tokens of 5"

    def zeros(*shape):
        return torch.zeros(shape)

    good = {"q": zeros(2, T, 3, 16), "k": zeros(2, T, 3, 16), "v": zeros(2, T, 3, 5), "beta": zeros(2, T, 3)}
    one = {n: x[:1] for n, x in good.items()}
    bad = [
        (local, {"q": zeros(2, T + 1, 3, 16)}),
        (local, {"k": zeros(2, T + 1, 3, 16)}),
        (local, {"v": zeros(2, T + 1, 3, 5)}),
        (local, {"beta": zeros(2, T + 1, 3)}),
        (local, {"g": zeros(2, T + 1, 3)}),
        (local, {n: torch.cat([x, x[:, :1] if T else zeros(2, 1, *x.shape[2:])], dim=1) for n, x in good.items()}),
        ("q must be", {"q": zeros(T)}),
        ("q must be", {"q": torch.tensor(0.0)}),
        ("k must be", {"k": zeros(2, T, 3, 15)}),
        ("v must be", {"v": zeros(2, T, 3)}),
        ("beta must be", {"beta": zeros(2, T, 3, 1)}),
        ("g must be", {"g": zeros(2, T, 1)}),
        ("g must be float64, float32", {"g": zeros(2, T, 3).long()}),
        ("initial_state must be", {"initial_state": zeros(2, 3, 5, 16)}),
        ("must be one row", {"cu_seqlens": torch.tensor([0, 5])}),
        ("cu_seqlens must be integers", {"cu_seqlens": torch.tensor([0.0, 5.0])} | one),
        ("cu_seqlens must ascend from 0 to T=5", {"cu_seqlens": torch.tensor([0, 6])} | one),
        ("initial_state must be", {"cu_seqlens": torch.tensor([0, 2, 5]), "initial_state": zeros(1, 3, 16, 5)} | one),
        ("head_groups must be from 1 to H = 3", {"head_groups": 4}),
        ("backend must be", {"backend": "triton"}),
        ("algorithm must be one of", {"algorithm": "tree"}),
        ("node_size must be >= 1", {"node_size": 0}),
        ("hierarchical needs a node_size", {"algorithm": "hierarchical"}),
    ]
    for message, changes in bad:
        with pytest.raises(ValueError, match=message):
            parallel.delta_rule(**good | changes, ctx=ctx)
