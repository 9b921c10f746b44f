"""gla and simple_gla on P ranks are the kernels on the whole: outputs, states, every gradient, and the bytes that they send."""

import itertools

import pytest
import torch

from seqengine.kernels import api as kernels
from seqengine.kernels.linear_attention import ops, summary
from seqengine.parallel import api as parallel
from seqengine.parallel import cost
from seqengine.parallel.api import SequenceContext
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [9], 2: [130, 47], 3: [70, 0, 5], 4: [1, 3, 0, 65], 5: [20, 2, 1, 1, 33], 8: [3, 0, 1, 2, 0, 0, 40, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
H, K, V = 3, 4, 5
FORMS = ("channel", "head", "fixed", "none", "normalized", "normalized fixed")
WAYS = [("auto", None, None), ("serial", None, 2), ("gather", None, 1), ("log", None, 3), ("hierarchical", 2, 2)]
LEVELS = torch.tensor([0.0, -1e-3, -0.1, -80.0, -1e4, -torch.inf], dtype=torch.float64)
SHARDED = ("q", "k", "v")


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gates(*shape, seed):
    """Moderate ones, and some of each extreme."""
    generator = torch.Generator().manual_seed(seed)
    moderate = -torch.rand(*shape, generator=generator, dtype=torch.float64) * 0.2
    extreme = LEVELS[torch.randint(len(LEVELS), shape, generator=generator)]
    return torch.where(torch.rand(*shape, generator=generator) < 0.1, extreme, moderate)


def tensors(form, T, rows, B=2, dtype=torch.float64):
    """Arguments of one form; rows: of its initial states."""
    made = {"q": randn(B, T, H, K, seed=1), "k": randn(B, T, H, K, seed=2), "v": randn(B, T, H, V, seed=3)}
    made["S"] = randn(rows, H, K, V, seed=4)
    if form == "channel":
        made["g"] = gates(B, T, H, K, seed=5)
    elif form in ("head", "normalized"):
        made["g"] = gates(B, T, H, seed=5)
    elif form != "none":
        made["g"] = torch.tensor([-0.03, 0.0, -torch.inf], dtype=torch.float64)
    if form.startswith("normalized"):
        made["q"], made["k"], made["z"] = made["q"].abs() + 0.1, made["k"].abs() + 0.1, randn(rows, H, K, seed=6).abs()
    return {name: x.to(dtype) for name, x in made.items()}


def is_sharded(name, x):
    return name in SHARDED or (name == "g" and x.ndim > 1)


def run(api, form, a, plain, do, d_final, **options):
    """Outputs and gradients; plain: without initial and final state."""
    a = {name: x.detach().clone().requires_grad_() for name, x in a.items() if not (plain and name in "Sz")}
    inputs = {name: x for name, x in a.items() if name not in "Sz"}
    if form.startswith("normalized"):
        options["normalize"] = True
    if not plain:
        options["initial_state"] = (a["S"], a["z"]) if "z" in a else a["S"]
    function = api.gla if form == "channel" else api.simple_gla
    o, final = function(**inputs, output_final_state=not plain, **options)
    finals = () if plain else final if isinstance(final, tuple) else (final,)
    loss = (o * do).sum() + sum((x * d.to(x.dtype)).sum() for x, d in zip(finals, d_final, strict=False))
    loss.backward()
    found = {"o": o.detach(), **{f"d_{name}": x.grad for name, x in a.items()}}
    return found | {f"final {i}": x.detach() for i, x in enumerate(finals)}


def predicted(ctx, form, a, plain, algorithm, node_size, documents):
    """Bytes of forward and backward, as the formulas say."""
    rows, element = a["S"].shape[0] if documents is None else 1, a["S"].element_size()
    state = rows * H * K * (V + ("z" in a)) * element
    decays = H * K if form == "channel" else H
    is_sent = documents is not None or ("g" in a and a["g"].ndim > 1)
    transition = rows * decays * element if is_sent else 0
    if algorithm == "auto":
        output_final = not plain and documents is None
        algorithm = cost.scan_algorithm(ctx.size, state, transition, output_final=output_final, node_size=node_size)
    shared = (ctx.bounds, ctx.rank, algorithm, state, transition)
    options = {"node_size": node_size, "documents": documents}
    forward = cost.gla_bytes(*shared, output_final=not plain, **options)
    return forward + cost.gla_backward_bytes(*shared, initial_gradient=not plain, **options)


def case(form, cut, documents, dtype):
    T, B = sum(cut), 2 if documents is None else 1
    rows = B if documents is None else len(documents) - 1
    d_final = (randn(rows, H, K, V, seed=21), randn(rows, H, K, seed=22))
    return tensors(form, T, rows, B, dtype), randn(B, T, H, V, seed=20, dtype=dtype), d_final


def on_rank(group, cut, cases, dtype, backend):
    ctx = SequenceContext.create(group, cut[group.rank()])
    found = []
    for form, plain, (algorithm, node_size, head_groups), documents in cases:
        ctx.ledger().clear()
        whole, do, d_final = case(form, cut, documents, dtype)
        a = {name: ctx.split(x, 1) if is_sharded(name, x) else x for name, x in whole.items()}
        options = {"algorithm": algorithm, "node_size": node_size, "head_groups": head_groups, "backend": backend}
        options["cu_seqlens"] = None if documents is None else torch.tensor(documents)
        result = run(parallel, form, a, plain, ctx.split(do, 1), d_final, ctx=ctx, **options)
        sent = ctx.ledger().sent_bytes()
        found.append((result, sent, predicted(ctx, form, whole, plain, algorithm, node_size, documents)))
    return found


def check(cut, cases, dtype=torch.float64, backend="auto"):
    results = run_ranks(len(cut), on_rank, cut, cases, dtype, backend)
    for i, (form, plain, way, documents) in enumerate(cases):
        whole, do, d_final = case(form, cut, documents, dtype)
        bounds = None if documents is None else torch.tensor(documents)
        expected = run(kernels, form, whole, plain, do, d_final, cu_seqlens=bounds)
        for name, value in expected.items():
            parts = [r[i][0][name] for r in results]
            what = f"{form}, plain={plain}, {way}, {documents}: {name}"
            if name.startswith("final") or name in ("d_S", "d_z"):
                for part in parts:
                    assert_close(part, value, what)
            else:
                joined = name == "o" or is_sharded(name.removeprefix("d_"), value)
                assert_close(torch.cat(parts, dim=1) if joined else sum(parts), value, what)
        for _, sent, formula in (r[i] for r in results):
            assert sent == formula, f"{form}, plain={plain}, {way}, {documents}"


@ALL
def test_parts_are_the_kernel_on_the_whole_with_every_gradient_and_the_bytes_of_the_formula(cut):
    ways = WAYS if len(cut) > 1 else WAYS[:1]
    cases = [(form, False, way, None) for form in FORMS for way in ways]
    check(cut, cases + [(form, True, WAYS[0], None) for form in FORMS])


@pytest.mark.parametrize("cut", [[0, 1], [1, 1, 1], [0, 0]], ids=str)
def test_a_token_or_none_in_all(cut):
    check(cut, [(form, False, way, d) for form in FORMS for way in WAYS[:2] for d in (None, [0, sum(cut), sum(cut)])])


def documents_of(cut):
    """One document; each rank its own; across ranks and without tokens; of one token each."""
    T, stops = sum(cut), list(itertools.accumulate(cut))
    few = sorted(torch.randint(0, T + 1, (3,), generator=torch.Generator().manual_seed(T)).tolist())
    return [[0, T], [0, *stops], [0, 0, *few, T, T], [0, *range(max(0, T - 5), T + 1)]]


@ALL
def test_documents_that_cross_ranks_are_the_kernel_on_the_whole(cut):
    cases = []
    for number, (form, documents) in enumerate(itertools.product(FORMS, documents_of(cut))):
        way = WAYS[number % len(WAYS) if len(cut) > 1 else 0]
        cases += [(form, False, way, documents), (form, True, WAYS[0], documents)]
    check(cut, cases)


@pytest.mark.parametrize("P", [3, 8])
def test_float32(P):
    kinds = (None, documents_of(CUTS[P])[2])
    check(CUTS[P], [(form, False, WAYS[0], d) for form in FORMS for d in kinds], torch.float32)


def test_the_definition_can_be_asked_for():
    kinds = (None, documents_of(CUTS[5])[2])
    check(CUTS[5], [(form, False, WAYS[0], d) for form in FORMS for d in kinds], backend="reference")


def _windows(group, cut, algorithm):
    ctx = SequenceContext.create(group, cut[group.rank()])
    a = {n: x.requires_grad_() for n, x in tensors("channel", 2 * sum(cut), 2).items()}
    do = randn(2, 2 * sum(cut), H, V, seed=20)
    state, loss, outputs = a["S"], 0.0, []
    for window in range(2):
        *x, weights = (ctx.split(t.chunk(2, dim=1)[window], 1) for t in (*(a[n] for n in "qkvg"), do))
        o, state = parallel.gla(*x, ctx=ctx, initial_state=state, output_final_state=True, algorithm=algorithm)
        loss = loss + (o * weights).sum()
        outputs.append(o.detach())
    loss.backward()
    return outputs, {n: x.grad for n, x in a.items()}


@pytest.mark.parametrize("algorithm", ["gather", "log"])
def test_windows_that_hand_the_state_on_are_one_sequence_with_its_gradients(algorithm):
    cut = CUTS[4]
    a = {n: x.requires_grad_() for n, x in tensors("channel", 2 * sum(cut), 2).items()}
    o, _ = kernels.gla(*(a[n] for n in "qkvg"), initial_state=a["S"])
    (o * randn(2, 2 * sum(cut), H, V, seed=20)).sum().backward()
    results = run_ranks(4, _windows, cut, algorithm)
    assert_close(torch.cat([outputs[window] for window in range(2) for outputs, _ in results], dim=1), o)
    for name in "qkvg":
        assert_close(sum(gradients[name] for _, gradients in results), a[name].grad, name)
    for _, gradients in results:
        assert_close(gradients["S"], a["S"].grad, "S")


def _parts_of_a_loss(group, cut):
    """Of o on rank 0 and of the final state: each alone, after others, and what one did not ask for must not stay."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    a = {n: ctx.split(x, 1) if n in "qkvg" else x for n, x in tensors("channel", sum(cut), 2).items()}
    a = {n: x.clone().requires_grad_() for n, x in a.items()}
    o, final = parallel.gla(*(a[n] for n in "qkvg"), ctx=ctx, initial_state=a["S"], output_final_state=True)
    keep = {"retain_graph": True, "allow_unused": True}
    of_o = torch.autograd.grad(o.square().sum() * (ctx.rank == 0), [a["S"]], **keep)
    of_final = torch.autograd.grad(final.square().sum(), list(a.values()), **keep)
    again = torch.autograd.grad(final.square().sum(), list(a.values()))
    assert all(torch.equal(x, y) for x, y in zip(of_final, again, strict=True))
    return of_o[0], dict(zip(a, of_final, strict=True))


def test_a_loss_of_the_state_alone_or_of_one_rank_has_its_gradient():
    cut = CUTS[3]
    a = {n: x.requires_grad_() for n, x in tensors("channel", sum(cut), 2).items()}
    o, final = kernels.gla(*(a[n] for n in "qkvg"), initial_state=a["S"], output_final_state=True)
    (d_S,) = torch.autograd.grad(o[:, : cut[0]].square().sum(), [a["S"]], retain_graph=True)
    expected = dict(zip(a, torch.autograd.grad(final.square().sum(), list(a.values())), strict=True))
    results = run_ranks(3, _parts_of_a_loss, cut)
    for of_o, of_final in results:
        assert_close(of_o, d_S)
        assert_close(of_final["S"], expected["S"])
    for name in "kvg":
        assert_close(torch.cat([of_final[name] for _, of_final in results], dim=1), expected[name], name)


def _half(group, cut, dtype):
    ctx = SequenceContext.create(group, cut[group.rank()])
    x = {n: t.to(dtype) for n, t in tensors("channel", sum(cut), 2).items() if n in "qkvg"}
    x = {n: ctx.split(t, 1).clone().requires_grad_() for n, t in x.items()}
    o, state = parallel.gla(**x, ctx=ctx, output_final_state=True)
    o.float().square().sum().backward()
    return o.detach(), state.detach(), x["k"].grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_single_precision_states(dtype):
    cut = CUTS[2]
    x = {n: t.to(dtype).float() for n, t in tensors("channel", sum(cut), 2).items() if n in "qkvg"}
    o, state = kernels.gla(**x, output_final_state=True)
    results = run_ranks(2, _half, cut, dtype)
    assert results[0][0].dtype == results[0][2].dtype == dtype
    assert_close(torch.cat([r[0] for r in results], dim=1), o)
    for r in results:
        assert r[1].dtype == torch.float32
        assert_close(r[1], state)


def _second(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    x = [ctx.split(t, 1) for n, t in tensors("channel", sum(cut), 2).items() if n in "qkvg"]
    q, k, v, g = (t.clone().requires_grad_() for t in x)
    o, _ = parallel.gla(q, k, v, g, ctx=ctx)
    (dk,) = torch.autograd.grad(o.square().sum(), k, create_graph=True)
    try:
        dk.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_second_derivative_raises():
    assert all("once_differentiable" in message for message in run_ranks(2, _second, CUTS[2]))


def _nothing(group):
    ctx = SequenceContext.even(group, 8)
    q = torch.zeros(0, 4, H, K, requires_grad=True)
    o, final = parallel.gla(q, q, q, q, ctx=ctx, output_final_state=True)
    o.sum().backward()
    return tuple(q.grad.shape), tuple(final.shape), ctx.ledger().sent_bytes()


def test_an_empty_batch_sends_nothing():
    assert run_ranks(2, _nothing) == [((0, 4, H, K), (0, H, K, K), 0)] * 2


@pytest.mark.parametrize("form", ["channel", "head", "fixed", "none"])
@pytest.mark.parametrize("T", [1, 2, 65, 3000])
def test_summaries_are_the_final_state_of_the_kernel_and_the_gradient_of_its_first(form, T):
    a = tensors(form, T, 2)
    q, k, v, S = (a[n].mT.contiguous().mT for n in "qkvS")  # not contiguous
    do, g, scale = randn(2, T, H, V, seed=7), a.get("g"), 0.3
    o, final, _ = ops.gla(q, k, v, g, scale, S.requires_grad_(), None)
    (d_S,) = torch.autograd.grad((o * do).sum(), S)
    state, log_decay = summary.state_after(k, v, g, torch.float64)
    log_decay = log_decay[(..., *(None,) * (4 - log_decay.ndim))]
    assert_close(state + torch.exp(log_decay) * S, final)
    assert_close(summary.state_gradient(q, do, g, scale, torch.float64)[0], d_S)


def test_slow_gates_are_remembered_in_single_precision():
    T = 40_000
    k, v = (torch.ones(1, T, 1, 1) for _ in range(2))
    g = torch.full((1, T, 1, 1), -1e-4)
    state, log_decay = summary.state_after(k, v, g, torch.float32)
    exact = (1 - torch.exp(g.double().sum())) / (1 - torch.exp(g[0, 0, 0, 0].double()))
    assert_close(state.reshape(()), exact.reshape(()).float(), tolerance=1e-6)
    assert_close(log_decay.reshape(()), g.double().sum().float())


def test_bad_input_raises_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))  # it has no group: a message would raise something else
    x, values = torch.zeros(1, 4, H, K), torch.zeros(1, 4, H, V)
    bad = [
        ("rank 0 holds 4 tokens of 9", {n: torch.zeros(1, 5, H, K) for n in "qkg"} | {"v": torch.zeros(1, 5, H, V)}),
        ("rank 0 holds 4 tokens of 9", {"g": torch.zeros(1, 5, H, K)}),
        ("k must be", {"k": torch.zeros(1, 4, H, K + 1)}),
        ("q must be", {"q": torch.zeros(4)}),
        ("g must be", {"g": torch.zeros(1, 4, H, 1)}),
        ("initial_state must be", {"initial_state": torch.zeros(2, H, K, V)}),
        ("initial_state must be", {"initial_state": torch.zeros(1, H, K, V), "cu_seqlens": torch.tensor([0, 1, 9])}),
        ("cu_seqlens must ascend from 0 to T=9", {"cu_seqlens": torch.tensor([0, 4])}),
        ("cu_seqlens must ascend from 0 to T=9", {"cu_seqlens": torch.tensor([0, 5, 4, 9])}),
        ("cu_seqlens must be integers", {"cu_seqlens": torch.tensor([0.0, 9.0])}),
        ("backend must be", {"backend": "cuda"}),
        ("head_groups must be from 1 to H = 3", {"head_groups": 4}),
        ("algorithm must be one of", {"algorithm": "tree"}),
        ("hierarchical needs a node_size", {"algorithm": "hierarchical"}),
    ]
    for message, changes in bad:
        with pytest.raises(ValueError, match=message):
            parallel.gla(**{"q": x, "k": x, "v": values, "g": x} | changes, ctx=ctx)
    simple = [
        ("g must be", {"g": torch.zeros(H + 1)}),
        ("scale must be None", {"normalize": True, "scale": 1.0}),
        ("initial_state must be a tuple", {"normalize": True, "initial_state": torch.zeros(1, H, K, V)}),
        ("rank 0 holds 4 tokens of 9", {"g": torch.zeros(1, 5, H)}),
    ]
    for message, changes in simple:
        with pytest.raises(ValueError, match=message):
            parallel.simple_gla(**{"q": x, "k": x, "v": values} | changes, ctx=ctx)
