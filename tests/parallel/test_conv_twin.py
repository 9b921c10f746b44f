"""The convolutions on P ranks are the kernels on the whole: documents, both directions, all algorithms and gradients, bytes."""

import itertools

import pytest
import torch

from seqengine.kernels import api as kernels
from seqengine.kernels.conv.sparse import SparseSpectrum
from seqengine.parallel import api as parallel
from seqengine.parallel import conv_cost, cost, window
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.layout import offsets, split_sizes
from seqengine.parallel.local_ranks import LocalRanks
from seqengine.parallel.recompute import checkpoint
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [9], 2: [40, 13], 3: [20, 0, 5], 4: [1, 3, 0, 25], 5: [20, 2, 1, 1, 13], 8: [3, 0, 1, 2, 0, 0, 30, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
SHARDED = ("u", "pre_gate", "post_gate")
BANDS = SparseSpectrum(64, (True, False))


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def documents_of(cut):
    """One document; each rank its own; across ranks and without tokens; of one token each."""
    T, stops = sum(cut), list(itertools.accumulate(cut))
    few = sorted(torch.randint(0, T + 1, (3,), generator=torch.Generator().manual_seed(T)).tolist())
    return [[0, T], [0, *stops], [0, 0, *few, T, T], [0, *range(max(0, T - 5), T + 1)]]


def case(
    T, taps, *, kind="short", D=4, filters="channel", documents=None, states=False, dtype=torch.float64, **options
):
    """One call: its tensors by name, and what else it is given."""
    B = 1 if documents is not None else 2
    shapes = {"u": (B, D, T)}
    k = {"channel": (D, taps), "group": (max(1, D // 2), taps), "sample": (B, D, taps)}[filters]
    if kind == "short":
        shapes |= {"w": (D, taps), "bias": (D,)}
    else:
        shapes |= {"k": k, "skip": (D,), "pre_gate": (B, D, T), "post_gate": (B, D, T)}
    if kind == "both":
        shapes = {("k_forward" if n == "k" else n): s for n, s in shapes.items()} | {
            "k_backward": (D, max(1, taps // 2))
        }
    if states:
        shapes["initial_state"] = (B if documents is None else len(documents) - 1, D, taps - 1)
    tensors = {name: randn(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    if documents is not None:
        options["cu_seqlens"] = torch.tensor(documents)
    if kind != "both":
        options["output_final_state"] = states
    return kind, tensors, options


FUNCTIONS = {"short": "short_conv", "long": "long_conv", "both": "long_conv_bidirectional"}
OF_TWIN = ("algorithm", "groups", "node_size", "is_hidden")


def run(api, kind, tensors, dy, options):
    """Output, final state, every gradient."""
    a = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    found = getattr(api, FUNCTIONS[kind])(**a, **options)
    y, final = found if isinstance(found, tuple) else (found, None)
    loss = (y * dy).sum()
    result = {"y": y.detach()}
    if final is not None:
        loss = loss + (final * randn(*final.shape, seed=31, dtype=final.dtype)).sum()
        result["final"] = final.detach()
    loss.backward()
    return result | {f"d_{name}": t.grad for name, t in a.items()}


def output_gradient(tensors):
    return randn(*tensors["u"].shape, seed=30, dtype=tensors["u"].dtype)


def on_rank(group, cut, cases):
    ctx = SequenceContext.create(group, cut[group.rank()])
    found = []
    for kind, tensors, options in cases:
        ctx.ledger().clear()
        options = dict(options)
        is_hidden = options.pop("is_hidden", False)  # the exchange, also where it is not worth it
        window.OVERLAP_ELEMENTS, window.OVERLAP_RATIO = (0, 0) if is_hidden else (1 << 20, 64)
        mine = {n: ctx.split(t, 2) if n in SHARDED else t for n, t in tensors.items()}
        result = run(parallel, kind, mine, ctx.split(output_gradient(tensors), 2), {**options, "ctx": ctx})
        found.append((result, {e.operation: ctx.ledger().sent_bytes(e.operation) for e in ctx.ledger().entries}))
    return found


def check(cut, cases):
    """Parts of y and of the inputs' gradients joined, the parameters' gradients summed; states are the same everywhere."""
    results = run_ranks(len(cut), on_rank, cut, cases)
    for i, (kind, tensors, options) in enumerate(cases):
        plain = {n: x for n, x in options.items() if n not in OF_TWIN}
        expected = run(kernels, kind, tensors, output_gradient(tensors), plain)
        for name, value in expected.items():
            parts = [r[i][0][name] for r in results]
            what = f"{kind} {options} {[tuple(t.shape) for t in tensors.values()]}: {name}"
            if name in ("final", "d_initial_state"):
                for part in parts:
                    assert_close(part, value, what)
            else:
                joined = name == "y" or name.removeprefix("d_") in SHARDED
                assert_close(torch.cat(parts, dim=2) if joined else sum(parts), value, what)
    return results


def windows_bytes(cut, rank, tensors, left, right=0, documents=None):
    """Forward and backward of the halo."""
    bounds = offsets(cut)
    needed, row = conv_cost.windows(bounds, left, right, documents), tensors["u"][..., 0].nbytes
    if right == 0:
        assert cost.halo_bytes(bounds, rank, left, row, documents) == conv_cost.window_bytes(bounds, needed, rank, row)
    there = conv_cost.window_bytes(bounds, needed, rank, row)
    return there + conv_cost.window_backward_bytes(bounds, needed, rank, row)


def state_bytes(cut, rank, tensors, keep, documents):
    """Final states forward, the all-reduce of the gradient of the initial ones backward."""
    ends, P = documents or (0, sum(cut)), len(cut)
    join = conv_cost.final_state_bytes(offsets(cut), rank, ends, keep, tensors["u"][..., 0].nbytes)
    return {"join": join, "all_reduce": 2 * (P - 1) * tensors["initial_state"].nbytes // P}


def check_bytes(cut, cases, results):
    for i, (kind, tensors, options) in enumerate(cases):
        documents = options["cu_seqlens"].tolist() if "cu_seqlens" in options else None
        taps = tensors["w" if kind == "short" else "k" if kind == "long" else "k_forward"].shape[-1]
        for rank, result in enumerate(results):
            sent = result[i][1]
            if len(cut) == 1:
                assert sent == {}
                continue
            B, D, _ = tensors["u"].shape
            if kind == "short" or options["algorithm"] == "halo":
                right = tensors["k_backward"].shape[-1] - 1 if kind == "both" else 0
                found, expected = sent.get("halo", 0), windows_bytes(cut, rank, tensors, taps - 1, right, documents)
            elif options.get("node_size") is None:
                found = sent["transpose"]
                expected = 2 * conv_cost.long_conv_bytes(offsets(cut), rank, D, B * tensors["u"].element_size())
            else:
                continue
            assert found == expected, (kind, options, rank)
            if options.get("output_final_state") and taps > 1:
                states = state_bytes(cut, rank, tensors, taps - 1, documents)
                assert {name: sent.get(name, 0) for name in states} == states, (kind, options, rank)


@ALL
def test_documents_over_ranks_are_the_kernel_on_the_whole_and_send_what_the_formula_says(cut):
    T, cases = sum(cut), []
    for documents, states in itertools.product(documents_of(cut), (False, True)):
        cases += [case(T, W, documents=documents, states=states, activation="silu") for W in (1, 2, 4, 12)]
        for L, way in [(1, "halo"), (3, "halo"), (7, "halo"), (2 * T, "halo"), (7, "transpose"), (2 * T, "transpose")]:
            cases.append(case(T, L, kind="long", documents=documents, states=states, filters="group", algorithm=way))
    check_bytes(cut, cases, check(cut, cases))


@ALL
def test_one_sequence_over_ranks_is_the_kernel_on_the_whole_and_sends_what_the_formula_says(cut):
    T, cases = sum(cut), []
    for states in (False, True):
        for W, is_hidden in itertools.product((1, 3, 30), (False, True)):
            cases.append(case(T, W, states=states, is_hidden=is_hidden, activation="silu"))
            cases.append(case(T, W, kind="long", states=states, is_hidden=is_hidden, algorithm="halo"))
        for L, way in itertools.product((1, 3, T, 3 * T), ("halo", "transpose")):
            cases.append(case(T, L, kind="long", states=states, filters="sample", algorithm=way))
        for D, groups in [(1, 1), (4, 2), (5, 3), (11, 2), (11, 11)]:
            cases.append(case(T, T, kind="long", D=D, states=states, algorithm="transpose", groups=groups))
        cases += [case(T, 5, kind="long", D=5, states=states, algorithm="transpose", node_size=n) for n in (1, 2, 3)]
    check_bytes(cut, cases, check(cut, cases))


@ALL
def test_both_directions_over_ranks_are_the_kernel_on_the_whole_and_send_what_the_formula_says(cut):
    T, cases = sum(cut), []
    for L, filters in [(1, "channel"), (4, "group"), (T, "sample"), (3 * T, "channel")]:
        cases += [case(T, L, kind="both", filters=filters, algorithm=way) for way in ("halo", "transpose")]
    cases.append(case(T, 4, kind="both", D=1, algorithm="transpose", node_size=2))
    check_bytes(cut, cases, check(cut, cases))


def test_auto_and_groups_of_choice_and_the_definition():
    cut = CUTS[3]
    options = [{}, {"groups": None}, {"backend": "reference"}]
    check(cut, [case(25, L, kind="long", **o) for L in (3, 25) for o in options] + [case(25, 9, kind="both")])


@pytest.mark.parametrize("cut", [[0, 1], [1, 1, 1], [0, 0], [2, 0, 0]], ids=str)
def test_a_token_or_none_in_all(cut):
    T, cases = sum(cut), []
    for documents in (None, [0, 0, T], [0, T, T]):
        cases += [case(T, 3, documents=documents, states=True)]
        cases += [case(T, 3, kind="long", documents=documents, states=True, algorithm=a) for a in ("halo", "transpose")]
    check(cut, cases + [case(T, 3, kind="both", algorithm=a) for a in ("halo", "transpose")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    cut = CUTS[2]
    documents, T = documents_of(cut)[2], sum(cut)
    cases = [case(T, 3, documents=d, states=True, dtype=dtype, is_hidden=True) for d in (None, documents)]
    for d, way in itertools.product((None, documents), ("halo", "transpose")):
        cases.append(case(T, 4, kind="long", documents=d, states=True, dtype=dtype, algorithm=way))
    check(cut, [*cases, case(T, 4, kind="both", dtype=dtype, algorithm="halo")])


def _leak(group, cut):
    """Whether a change before the boundary changes nothing behind it, and something before it."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    T, boundary = sum(cut), cut[0] + 2
    u, k = randn(1, 2, T, seed=1), randn(2, 6, seed=2)
    changed = torch.where(torch.arange(T) < boundary, u + 1e6, u)
    packed = ctx.with_documents([0, boundary, T])
    behind = ctx.positions() >= boundary
    found = []
    for function, way in (
        (parallel.short_conv, {}),
        *((parallel.long_conv, {"algorithm": a}) for a in ("halo", "transpose")),
    ):
        y, z = (function(ctx.split(x, 2), k, ctx=packed, **way)[0] for x in (u, changed))
        found.append((torch.equal(y[..., behind], z[..., behind]), bool((y != z)[..., ~behind].all())))
    return found


def test_nothing_leaks_over_a_boundary():
    assert run_ranks(3, _leak, [4, 9, 5]) == [[(True, True)] * 3] * 3


def _zigzag(group, cut):
    """With a zigzag context that knows the documents."""
    ctx = SequenceContext.create(group, cut[group.rank()]).with_documents([0, 3, 3, sum(cut)]).zigzag()
    u, k = ctx.split(randn(1, 4, sum(cut), seed=1), 2), randn(4, 6, seed=2)
    return [function(u, k, ctx=ctx)[0] for function in (parallel.short_conv, parallel.long_conv)], ctx.positions()


def test_a_zigzag_context_that_has_documents():
    cut = CUTS[3]
    u, k, packed = randn(1, 4, sum(cut), seed=1), randn(4, 6, seed=2), torch.tensor([0, 3, 3, sum(cut)])
    results = run_ranks(3, _zigzag, cut)
    for i, function in enumerate((kernels.short_conv, kernels.long_conv)):
        y, _ = function(u, k, cu_seqlens=packed)
        for found, positions in results:
            assert_close(found[i], y[..., positions])


def _order(group, cut, groups):
    """Calls in the order in which they happen, forward and backward."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    _, tensors, _ = case(sum(cut), 3, kind="long", D=6)
    mine = {n: ctx.split(t, 2).requires_grad_() if n in SHARDED else t for n, t in tensors.items()}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        from seqengine.kernels.conv import spectral
        from seqengine.parallel import comm
        from seqengine.parallel.exchange import transpose

        def note(place, name, word):
            function = getattr(place, name)
            patch.setattr(place, name, lambda *a, **k: (seen.append(word), function(*a, **k))[1])

        note(comm, "start_all_to_all", "start")
        note(transpose._Pending, "end", "wait")
        note(spectral, "convolve", "work")
        note(spectral, "gradients", "work")
        y, _ = parallel.long_conv(**mine, ctx=ctx, algorithm="transpose", groups=groups)
        forward = len(seen)
        y.sum().backward()
    return seen[:forward], seen[forward:]


def test_while_a_group_of_channels_is_convolved_the_others_travel():
    way = ["start"] * 3 + ["wait", "work", "start"] * 3 + ["wait"] * 3
    for forward, backward in run_ranks(2, _order, [5, 4], 3):
        assert forward == ["work", *way]  # after the checks, on no token
        assert backward == way


def _halo_order(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    u = ctx.split(randn(1, 2, sum(cut), seed=1), 2).requires_grad_()
    w, seen = randn(2, 3, seed=2), []
    with pytest.MonkeyPatch.context() as patch:
        from seqengine.kernels.conv import short
        from seqengine.parallel import comm

        patch.setattr(window, "OVERLAP_ELEMENTS", 0)
        patch.setattr(window, "OVERLAP_RATIO", 0)

        def note(place, name, words):
            function = getattr(place, name)
            patch.setattr(place, name, lambda *a: (seen.append(words(a)), function(*a))[1])

        note(comm, "start_send_and_receive", lambda _: "start")
        note(window._Exchange, "end", lambda _: "wait")
        note(short, "_blocks", lambda a: f"{a[0].shape[-1]} tokens")
        y, _ = parallel.short_conv(u, w, ctx=ctx)
        forward = len(seen)
        y.sum().backward()
    return seen[:forward], seen[forward:]


def test_the_halo_starts_before_the_kernel_and_is_waited_for_after_it():
    for forward, backward in run_ranks(2, _halo_order, [20, 20]):
        assert forward[1:] == ["start", "20 tokens", "wait", "2 tokens", "2 tokens"]  # after the checks, on no token
        assert backward == ["2 tokens", "2 tokens", "start", "20 tokens", "wait"]


def _again(group, cut):
    """Twice the same, and twice through one graph."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    _, tensors, _ = case(sum(cut), 4, kind="long", states=True)
    mine = {n: ctx.split(t, 2) if n in SHARDED else t for n, t in tensors.items()}
    found = []
    for way in ({"algorithm": "halo"}, {"algorithm": "transpose", "groups": 2}, {"algorithm": "fft"}):
        runs = []
        for _ in range(2):
            a = {n: t.clone().requires_grad_() for n, t in mine.items()}
            y, _ = parallel.long_conv(**a, ctx=ctx, **way)
            runs += [torch.autograd.grad(y.square().sum(), list(a.values()), retain_graph=True) for _ in range(2)]
        found.append(all(torch.equal(x, y) for other in runs[1:] for x, y in zip(runs[0], other, strict=True)))
    return found


def test_bitwise_the_same_again():
    assert run_ranks(3, _again, CUTS[3]) == [[True] * 3] * 3


def _checkpointed(group, tokens):
    """Bytes and gradients, without and with a second run of the block."""
    ctx = SequenceContext.even(group, tokens)
    found = []
    whole, weight = randn(1, 4, tokens, seed=1), randn(4, 3, seed=2)
    ways = [{"algorithm": "halo"}, {"algorithm": "transpose", "groups": 2}, {"algorithm": "transpose", "node_size": 2}]
    for way in [*ways, {"algorithm": "fft"}]:

        def block(u, k, way=way):
            y, _ = parallel.short_conv(u, k, ctx=ctx)
            return parallel.long_conv(y, k, ctx=ctx, **way)[0]

        runs = []
        for is_kept in (True, False):
            ctx.ledger().clear()
            u, k = ctx.split(whole, 2).clone().requires_grad_(), weight.clone().requires_grad_()
            y = block(u, k) if is_kept else checkpoint(block, u, k, ctx=ctx)
            runs.append((y.detach(), *torch.autograd.grad(y.square().sum(), [u, k]), ctx.ledger().sent_bytes()))
        (*plain, sent), (*again, sent_again) = runs
        found.append(sent == sent_again and all(torch.equal(x, y) for x, y in zip(plain, again, strict=True)))
    return found


def test_a_checkpointed_block_sends_nothing_twice():
    assert LocalRanks(4).run(lambda group: _checkpointed(group, 30)) == [[True] * 4] * 4


def _many(group, tokens):
    ctx = SequenceContext.even(group, tokens)
    u, k = ctx.split(randn(1, 3, tokens, seed=1), 2).clone().requires_grad_(), randn(3, tokens, seed=2)
    found = []
    for way in ({"algorithm": "halo"}, {"algorithm": "transpose", "node_size": 8}, {"algorithm": "fft"}):
        y, _ = parallel.long_conv(u, k, ctx=ctx, **way)
        found += [y.detach(), *torch.autograd.grad(y, u, y.detach())]
    return found


def test_a_hundred_ranks():
    tokens = 230
    u, k = randn(1, 3, tokens, seed=1).requires_grad_(), randn(3, tokens, seed=2)
    y, _ = kernels.long_conv(u, k)
    (du,) = torch.autograd.grad(y, u, y.detach())
    parts = LocalRanks(100).run(lambda group: _many(group, tokens))
    for i, way in enumerate(("halo", "transpose", "fft")):
        assert_close(torch.cat([p[2 * i] for p in parts], dim=2), y, way)
        assert_close(torch.cat([p[2 * i + 1] for p in parts], dim=2), du, way)


def _nothing(group):
    ctx = SequenceContext.even(group, 8)
    u, k = torch.zeros(0, 2, 4, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    shapes = []
    for way in ("halo", "transpose", "fft"):
        y, _ = parallel.long_conv(u, k, ctx=ctx, algorithm=way)
        y.sum().backward()
        shapes.append(tuple(y.shape))
    y, _ = parallel.short_conv(u, k, ctx=ctx)
    y.sum().backward()
    return [*shapes, tuple(y.shape)], tuple(u.grad.shape), ctx.ledger().sent_bytes()


def test_an_empty_batch_sends_nothing():
    assert run_ranks(2, _nothing) == [([(0, 2, 4)] * 4, (0, 2, 4), 0)] * 2


def _sparse_and_made(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    u, k = ctx.split(randn(2, 5, sum(cut), seed=1), 2), randn(5, 8, seed=2)
    sparse = [parallel.long_conv(u, k, ctx=ctx, spectrum=BANDS, groups=n)[0] for n in (1, 2)]
    sizes = []

    def make(channels):
        sizes.append(channels.stop - channels.start)
        return k[channels]

    made = [parallel.long_conv(u, make, ctx=ctx, algorithm=a, groups=2)[0] for a in ("auto", "fft")]
    return sparse, made, sizes


def test_groups_make_their_filters_once_and_take_a_spectrum():
    cut = CUTS[3]
    u, k = randn(2, 5, sum(cut), seed=1), randn(5, 8, seed=2)
    whole, sparse = kernels.long_conv(u, k)[0], kernels.long_conv(u, k, spectrum=BANDS)[0]
    results = run_ranks(3, _sparse_and_made, cut)
    for i in range(2):
        assert_close(torch.cat([r[0][i] for r in results], dim=2), sparse)
        assert_close(torch.cat([r[1][i] for r in results], dim=2), whole)
    assert [r[2] for r in results] == [[n, 5] for n in split_sizes(5, 3)]


def test_bad_input_raises_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))  # it has no group: a message would raise something else
    u, k = torch.zeros(1, 4, 4), torch.zeros(4, 3)
    packed = torch.tensor([0, 5, 9])
    bad = [
        ("rank 0 holds 4 tokens of 9", {"u": torch.zeros(1, 4, 5)}),
        ("u must be", {"u": torch.zeros(4, 4)}),
        ("cu_seqlens must ascend from 0 to T=9", {"cu_seqlens": torch.tensor([0, 4])}),
        ("cu_seqlens must be integers", {"cu_seqlens": torch.tensor([0.0, 9.0])}),
        ("with cu_seqlens u must be one row", {"u": torch.zeros(2, 4, 4), "cu_seqlens": packed}),
        ("initial_state must be", {"cu_seqlens": packed, "initial_state": torch.zeros(1, 4, 2)}),
        ("backend must be", {"backend": "cuda"}),
    ]
    for message, changes in bad:
        with pytest.raises(ValueError, match=message):
            parallel.short_conv(**{"u": u, "w": k} | changes, ctx=ctx)
        with pytest.raises(ValueError, match=message):
            parallel.long_conv(**{"u": u, "k": k} | changes, ctx=ctx)
    long = [
        ("algorithm must be", {"algorithm": "ring"}),
        ("must not be 'halo'", {"k": lambda _: k, "algorithm": "halo"}),
        ("'fft' has no spectrum, no cu_seqlens", {"cu_seqlens": packed, "algorithm": "fft"}),
        ("'fft' has no spectrum, no cu_seqlens", {"spectrum": BANDS, "algorithm": "fft"}),
        ("a spectrum has no states and no cu_seqlens", {"spectrum": BANDS, "cu_seqlens": packed}),
        ("all documents share the filter", {"k": torch.zeros(1, 4, 3), "cu_seqlens": packed}),
        ("groups must be from 1 to D = 4", {"algorithm": "transpose", "groups": 5}),
        ("two-level transpose", {"algorithm": "transpose", "groups": 2, "node_size": 2}),
        ("must have B, D", {"k": torch.zeros(2, 4, 3)}),
        ("initial_state must be", {"k": lambda c: k[c], "initial_state": torch.zeros(1, 4, 9), "algorithm": "fft"}),
        ("pre_gate must be", {"pre_gate": torch.zeros(1, 3, 4)}),
    ]
    for message, changes in long:
        with pytest.raises(ValueError, match=message):
            parallel.long_conv(**{"u": u, "k": k} | changes, ctx=ctx)
    with pytest.raises(ValueError, match="algorithm must be 'auto', 'halo' or 'transpose'"):
        parallel.long_conv_bidirectional(u, k, k, ctx=ctx, algorithm="fft")
    with pytest.raises(ValueError, match="k_backward must be"):
        parallel.long_conv_bidirectional(u, k, torch.zeros(4), ctx=ctx)
    with pytest.raises(ValueError, match="no form for packed documents"):
        parallel.long_conv_bidirectional(u, k, k, ctx=ctx.with_documents([0, 5, 9]))
