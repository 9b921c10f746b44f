"""attention on P ranks is the kernel on the whole: out, lse, every gradient, every algorithm, bytes as predicted."""

import itertools
import random

import pytest
import torch

from seqengine.kernels import api as kernels
from seqengine.parallel import api as parallel
from seqengine.parallel import attention_cost
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.attention_exchange import collect, distribute
from seqengine.parallel.attention_plan import Mask, gather_plan, ring_plan
from tests.parallel.test_attention_plan import draw, whole_mask
from tests.ranks import run_ranks
from tests.tolerances import RELATIVE, assert_close

CUTS = {
    1: [[9]],
    2: [[9, 4], [1, 6], [0, 0]],
    3: [[4, 0, 7], [5, 5, 5], [1, 1, 9]],
    4: [[1, 3, 0, 7], [0, 4, 4, 0]],
    5: [[2, 2, 1, 1, 5], [0, 0, 3, 0, 9]],
    8: [[3, 0, 1, 2, 0, 0, 6, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 2]],
}
RANKS = pytest.mark.parametrize("P", CUTS)
HEADS = [(4, 4), (6, 2), (3, 1), (5, 5), (1, 1)]
"""(H, G): plain, grouped, multi-query, and not divided by any P."""


def schedules(P, causal):
    """Every way to run it on P ranks."""
    found = [{"algorithm": "auto"}, {"algorithm": "gather"}, {"algorithm": "ulysses"}, {"algorithm": "ring_ulysses"}]
    found += [{"algorithm": "ring", "balance": False}] + [{"algorithm": "ring", "balance": True}] * causal
    for u in range(2, P):
        if P % u == 0:
            found += [{"algorithm": "ring_ulysses", "head_ranks": u, "balance": b} for b in (False, True)[: 1 + causal]]
    return found


def masks(T):
    """causal and not; windows shorter and longer than shards; documents cut anywhere, empty ones too."""
    packed = sorted({0, min(1, T), T // 3, min(T // 3 + 1, T), (2 * T) // 3, T})
    packed = torch.tensor([0, *packed, T], dtype=torch.int32)
    for causal in (True, False):
        for window in (None, 1, 2, 5, T + 3):
            yield {"causal": causal, "window": window}
        for window in (None, 3):
            yield {"causal": causal, "window": window, "cu_seqlens": packed}


def tensors(T, H, G, mask, K=3, V=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    B = 1 if "cu_seqlens" in mask else 2
    shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, V), (B, T, H, V), (B, H, T)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def whole(T, H, G, mask, **options):
    q, k, v, dout, dlse = tensors(T, H, G, mask, **options)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = kernels.attention(q, k, v, return_lse=True, **mask)
    gradients = torch.autograd.grad([out, lse], [q, k, v], [dout, dlse], retain_graph=True)
    without_lse = torch.autograd.grad(out, [q, k, v], dout)
    return out.detach(), lse.detach(), gradients, without_lse


def expected_bytes(ctx, q, k, v, mask, schedule):
    """(forward with lse, backward with its gradient), from the layout."""
    sizes = attention_cost.Sizes(q.shape[0], *q.shape[2:3], *k.shape[2:], v.shape[3], q.element_size(), 8)
    ends = mask["cu_seqlens"].tolist() if "cu_seqlens" in mask else [0]
    T, window = ctx.total_tokens, mask["window"]
    window = None if window is None or window >= T else window
    rule = Mask(mask["causal"], window, tuple(sorted({0, T, *ends})))
    options = (schedule["algorithm"], schedule.get("head_ranks"), schedule.get("balance"))
    plan = attention_cost.choose(ctx.cuts, ctx.rank, rule, sizes, "cpu", *options, ctx.layout)
    forward = attention_cost.attention_bytes(plan, sizes, return_lse=True)
    return forward, attention_cost.attention_backward_bytes(plan, sizes, lse_gradient=True)


def check_case(ctx, H, G, mask, schedule, wanted, also_without_lse):
    """One call on this rank against this rank's part of the whole; wrong bytes or numbers raise."""
    q, k, v, dout, dlse = tensors(ctx.total_tokens, H, G, mask)
    q, k, v = (ctx.split(x, 1).clone().requires_grad_() for x in (q, k, v))
    dout, dlse = ctx.split(dout, 1), ctx.split(dlse, 2)
    ctx.ledger().clear()
    out, lse = parallel.attention(q, k, v, ctx=ctx, return_lse=True, **mask, **schedule)
    forward = ctx.ledger().sent_bytes()
    found = torch.autograd.grad([out, lse], [q, k, v], [dout, dlse])
    total = ctx.ledger().sent_bytes()
    if also_without_lse:
        plain = parallel.attention(q, k, v, ctx=ctx, **mask, **schedule)
        found_without = torch.autograd.grad(plain, [q, k, v], dout)
    if ctx.layout == "zigzag" and not schedule.get("balance"):
        ways = {"ring": {"ring"}, "gather": {"attention"}}.get(schedule["algorithm"], {"ring", "attention"})
        assert set(ctx.ledger().counts()) <= ways, "nothing moves for balance"
    expected = expected_bytes(ctx, q, k, v, mask, schedule) if ctx.size > 1 else (0, 0)
    assert (forward, total - forward) == expected, "bytes"
    whole_out, whole_lse, gradients, without_lse = wanted
    assert lse.shape == dlse.shape
    close(ctx, out, whole_out, 1, "out")
    close(ctx, lse, whole_lse, 2, "lse")
    for name, own, others in zip("qkv", found, gradients, strict=True):
        close(ctx, own, others, 1, f"d{name}")
    if also_without_lse:
        assert torch.equal(plain, out), "out without lse"
        for name, own, others, terms in zip("qkv", found_without, without_lse, gradients, strict=True):
            close(ctx, own, others, 1, f"d{name} without lse", terms)


def close(ctx, own, whole, dim, what, terms=None):
    """This rank's part within 1e-12 of the largest of the whole, or of the terms of a sum that may be zero."""
    own, part = own.detach(), ctx.split(whole, dim)
    if own.shape != part.shape or not bool(torch.isfinite(own).all()):
        raise AssertionError(f"{what}: shape or not finite")
    error = float((own - part).abs().max()) if own.numel() else 0.0
    scale = max(float(x.abs().max()) if x.numel() else 0.0 for x in (whole, whole if terms is None else terms))
    if error > 1e-12 * scale:
        raise AssertionError(f"{what}: {error:.2e} of {scale:.2e}")


def _all_cases(group, P, cases):
    failures = []
    for number, (cut, H, G, mask, wanted) in enumerate(cases):
        contiguous = SequenceContext.create(group, cut[group.rank()])
        zigzag = contiguous.zigzag() if number % 2 else uneven_zigzag(contiguous)
        for i, schedule in enumerate(schedules(P, mask["causal"])):
            for ctx in (contiguous, zigzag) if P > 1 and (number // 2 + i) % 3 == 0 else (contiguous,):
                try:
                    check_case(ctx, H, G, mask, schedule, wanted, (H + i) % 3 == 0)
                except (AssertionError, IndexError, ValueError) as error:
                    failures.append(f"{ctx.cuts} H={H} G={G} {mask} {schedule}: {type(error).__name__} {error}")
    return failures


def uneven_zigzag(ctx):
    """The bounds of a context as every other boundary of twice as many chunks, some of them empty."""
    middles = [a + (b - a) // 3 for a, b in itertools.pairwise(ctx.bounds)]
    cuts = (0, *(x for pair in zip(middles, ctx.bounds[1:], strict=True) for x in pair))
    return SequenceContext(ctx.group, ctx.rank, cuts, "zigzag")


@RANKS
def test_every_algorithm_is_the_kernel_on_the_whole_and_sends_what_is_predicted(P):
    cases = []
    for i, cut in enumerate(CUTS[P]):
        T = sum(cut)
        for j, mask in list(enumerate(masks(T)))[i :: len(CUTS[P])]:
            H, G = HEADS[j % len(HEADS)]
            cases.append((cut, H, G, mask, whole(T, H, G, mask)))
    for failures in run_ranks(P, _all_cases, P, cases):
        assert not failures, "\n".join(failures[:20])


def test_pieces_of_a_zigzag_context_compute_each_pair_that_is_seen_once_and_no_other():
    rng = random.Random(1)
    for _ in range(150):
        P, T = rng.choice([2, 3, 4, 6]), rng.choice([1, 7, 16, 29])
        cuts = (0, *sorted(rng.randrange(T + 1) for _ in range(2 * P - 1)), T)
        documents = tuple(sorted({0, T, *(rng.randrange(T + 1) for _ in range(rng.choice([0, 0, 1, 4])))}))
        mask = Mask(rng.random() < 0.6, rng.choice([None, None, *range(1, T)]), documents)
        expected = whole_mask(T, mask)
        u = rng.choice([u for u in range(1, P + 1) if P % u == 0])
        for balance in (False, True):
            found = torch.zeros(T, T, dtype=torch.int)
            for rank in range(0, P, u):
                plan = ring_plan(cuts, rank, mask, 4, 2, u, balance, "zigzag")
                found += sum(draw(plan, T, source) for source in plan.route.members)
            assert torch.equal(found, expected), (cuts, mask, u, balance)
        plans = [gather_plan(cuts, rank, mask, 4, 2, "zigzag") for rank in range(P)]
        gathered = [draw(plan, T, plan.rank) for plan in plans if attention_cost.count(plan.queries[plan.rank]) > 0]
        assert torch.equal(sum(gathered), expected), (cuts, mask)


def _more(group, cut):
    """Claims that need ranks and hold for one layout."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    T, found = sum(cut), {}
    mask = {"causal": True, "window": None}
    ways = [{"algorithm": "gather"}, {"algorithm": "ulysses"}, {"algorithm": "ring", "balance": True}]

    def run(*, algorithm, balance=None, dtype=torch.float64, K=3, V=3, strided=False, **options):
        q, k, v, dout, dlse = tensors(T, 6, 2, mask, K=K, V=V, dtype=dtype)
        parts = [ctx.split(x, 1).clone() for x in (q, k, v)]
        if strided:
            parts = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]
        parts = [x.requires_grad_() for x in parts]
        options = {"return_lse": True, **options}
        ctx.ledger().clear()
        out, lse = parallel.attention(*parts, ctx=ctx, algorithm=algorithm, balance=balance, **options)
        forward = ctx.ledger().sent_bytes()
        cotangents = [ctx.split(dout, 1), ctx.split(dlse, 2).to(lse.dtype)]
        gradients = torch.autograd.grad([out, lse], parts, cotangents)
        return [x.detach() for x in (out, lse, *gradients)], (forward, ctx.ledger().sent_bytes() - forward)

    for way in ways:
        name = way["algorithm"]
        first, _ = run(**way)
        again, _ = run(**way)
        found[name, "bitwise"] = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        found[name, "strided"] = run(**way, strided=True)[0]
        found[name, "torch"] = run(**way, backend="torch")[0]
        found[name, "sdpa"] = run(**way, backend="sdpa")[0]
        found[name, "scale"] = run(**way, scale=0.3)[0]
        for dtype in (torch.float32, torch.bfloat16):
            found[name, dtype], sent = run(**way, dtype=dtype)
            sizes = attention_cost.Sizes(2, 6, 2, 3, 3, dtype.itemsize, 4)
            rule = Mask(True, None, (0, T))
            plan = attention_cost.choose(ctx.bounds, ctx.rank, rule, sizes, "cpu", name, None, way.get("balance"))
            expected = (
                attention_cost.attention_bytes(plan, sizes, True),
                attention_cost.attention_backward_bytes(plan, sizes, True),
            )
            found[name, dtype, "bytes"] = sent == expected
    found["ulysses", "reference"] = run(algorithm="ulysses", backend="reference")[0]
    for backend in ("reference", "flex"):
        with pytest.raises(ValueError, match="backend must be one of"):
            run(algorithm="ring", backend=backend)
    with pytest.raises(ValueError, match="V = K"):
        run(algorithm="ring", backend="sdpa", V=2)
    q = ctx.split(tensors(T, 6, 2, mask)[0], 1).clone().requires_grad_()
    out = parallel.attention(q, q, q, ctx=ctx, algorithm="ring")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
    empty = parallel.attention(q[:0], q[:0], q[:0], ctx=ctx, algorithm="ring", balance=True, return_lse=True)
    found["empty batch"] = [tuple(x.shape) for x in empty]
    return found


def test_dtypes_backends_strides_and_repetition():
    cut = [3, 5, 1]
    T, mask = sum(cut), {"causal": True, "window": None}
    results = run_ranks(3, _more, cut)
    for name, kind in [key for key in results[0] if len(key) == 2 and key != "empty batch"]:
        if kind == "bitwise":
            assert all(r[name, kind] for r in results)
            continue
        options = {"scale": 0.3} if kind == "scale" else {}
        dtype = kind if isinstance(kind, torch.dtype) else torch.float64
        q, k, v, dout, dlse = (x.double() for x in tensors(T, 6, 2, mask, V=3, dtype=dtype))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out, lse = kernels.attention(q, k, v, return_lse=True, **options)
        expected = [out, lse, *torch.autograd.grad([out, lse], [q, k, v], [dout, dlse])]
        for i, wanted in enumerate(expected):
            joined = torch.cat([r[name, kind][i] for r in results], dim=2 if i == 1 else 1)
            assert_close(joined, wanted.to(joined.dtype), f"{name} {kind} {i}", RELATIVE[dtype])
    assert all(
        r[name, dtype, "bytes"]
        for r in results
        for name, dtype, *b in [k for k in r if len(k) == 3 and k[2] == "bytes"]
    )
    assert [r["empty batch"] for r in results] == [[(0, n, 6, 3), (0, 6, n)] for n in cut]


def _exchanges(group, cut):
    """<Ax, y> and <x, A'y> of both exchanges: places that overlap, and places that divide tokens and heads."""
    ctx, T, found = SequenceContext.create(group, cut[group.rank()]), sum(cut), []
    window = gather_plan(ctx.bounds, ctx.rank, Mask(False, 4, (0, T)), 4, 2)
    both = ring_plan(ctx.bounds, ctx.rank, Mask(True, None, (0, T)), 4, 2, 2, True)
    for places in (attention_cost.key_places(window, 2), attention_cost.input_places(both, 4, 2)):
        x = [randn(2, ctx.local_tokens, n, 3, seed=ctx.rank).requires_grad_() for n in places.total]
        held = distribute(x, places, ctx)
        y = [randn(*h.shape, seed=10 + ctx.rank) for h in held]
        back = torch.autograd.grad(held, x, y)
        found.append((products(held, y), products(x, back)))
    x = randn(2, *held[0].shape[1:], seed=ctx.rank).requires_grad_()
    out = collect(x, both.heads, 4, both.queries, ctx)
    y = randn(*out.shape, seed=20 + ctx.rank)
    found.append((products([out], [y]), products([x], torch.autograd.grad(out, x, y))))
    again = distribute([out], attention_cost.query_places(both, 4), ctx)
    return found, torch.equal(again[0], x)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products(xs, ys):
    return sum((x.detach() * y).sum() for x, y in zip(xs, ys, strict=True))


def test_backwards_of_the_exchanges_are_their_adjoints_and_collect_undoes_distribute():
    results = run_ranks(4, _exchanges, [3, 1, 0, 5])
    assert all(is_same for _, is_same in results)
    for i in range(3):
        there, back = (sum(found[i][j] for found, _ in results) for j in (0, 1))
        assert_close(there, back, "<Ax, y> = <x, A'y>")


def _saved(group, cut):
    """Bytes kept for the backward of a ring."""
    ctx, kept = SequenceContext.create(group, cut[group.rank()]), {}
    q, k, v, *_ = (ctx.split(x, 1).clone().requires_grad_() for x in tensors(sum(cut), 4, 2, {})[:3])

    def keep(x):
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out, lse = parallel.attention(q, k, v, ctx=ctx, algorithm="ring", balance=False, return_lse=True)
    return sum(kept.values()), sum(x.nbytes for x in (q, k, v, out, lse))


def test_a_ring_keeps_its_own_tokens_for_the_backward_and_no_other():
    for kept, own in run_ranks(4, _saved, [4, 4, 4, 4]):
        assert kept == own


GOOD = torch.zeros(1, 4, 4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 5, 4, 3)}, "rank 0 holds 4 tokens of 9"),
        ({"k": torch.zeros(1, 9, 4, 3), "v": torch.zeros(1, 9, 4, 3)}, "rank 0 holds 4 tokens of 9"),
        ({"k": torch.zeros(1, 4, 3, 3)}, "G dividing H"),
        ({"v": torch.zeros(1, 4, 4, 3, dtype=torch.float64)}, "v must have q's dtype"),
        ({"algorithm": "tree"}, "algorithm must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"window": 0}, "window must be None or an int >= 1"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "must ascend from 0 to T=9"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "int32 or int64"),
        ({"algorithm": "ulysses", "balance": True}, "balance=True is for a causal ring"),
        ({"algorithm": "ring", "balance": True, "causal": False}, "balance=True is for a causal ring"),
        ({"algorithm": "ring_ulysses", "head_ranks": 3}, "head_ranks must divide the 2 ranks"),
        ({"algorithm": "ring", "head_ranks": 2}, "head_ranks is for"),
        ({"algorithm": "gather", "backend": "flex"}, "backend must be one of"),
        ({"algorithm": "ring", "backend": "sdpa", "window": 2}, "backend 'sdpa' has no window"),
        ({"algorithm": "ulysses", "backend": "sdpa", "window": 2}, "backend 'sdpa' has no window"),
        (
            {"algorithm": "ulysses", "backend": "flex", "q": torch.zeros(1, 4, 4, 3).requires_grad_()},
            "no backward on a CPU",
        ),
    ],
)
def test_bad_input_raises_before_any_message(change, message):
    ctx = SequenceContext(None, 0, (0, 4, 9))
    arguments = {"q": GOOD, "k": GOOD, "v": GOOD, **change}
    with pytest.raises(ValueError, match=message):
        parallel.attention(ctx=ctx, **arguments)
