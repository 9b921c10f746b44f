"""A long convolution by a Fourier transform over ranks: exact, whatever the shards; its bytes; when it is chosen."""

import itertools

import pytest
import torch

from seqengine.kernels import api as kernels
from seqengine.parallel import api as parallel
from seqengine.parallel import conv_cost
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.conv_cost import FourStep
from seqengine.parallel.distributed_fft import _Transform
from seqengine.parallel.layout import offsets, split_sizes
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [9], 2: [64, 33], 3: [70, 0, 1], 4: [1, 3, 0, 97], 5: [20, 2, 1, 1, 35], 8: [3, 0, 1, 2, 0, 0, 150, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
SHARDED = ("u", "pre_gate", "post_gate")


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tensors(T, L, filters="channel", D=2, B=2, states=False, dtype=torch.float64):
    k = {"channel": (D, L), "one": (1, L), "sample": (B, D, L)}[filters]
    shapes = {"u": (B, D, T), "k": k, "skip": (D,), "pre_gate": (B, D, T), "post_gate": (B, D, T)}
    if states:
        shapes["initial_state"] = (B, D, L - 1)
    return {name: randn(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


def run(function, a, states, **options):
    a = {name: t.detach().clone().requires_grad_() for name, t in a.items()}
    y, final = function(**a, output_final_state=states, **options)
    return a, y, final


def differentiate(a, y, final, dy):
    loss = (y * dy).sum()
    result = {"y": y.detach()}
    if final is not None:
        loss = loss + (final * randn(*final.shape, seed=31, dtype=final.dtype)).sum()
        result["final"] = final.detach()
    loss.backward()
    return result | {f"d_{name}": t.grad for name, t in a.items()}


def on_rank(group, cut, cases):
    ctx = SequenceContext.create(group, cut[group.rank()])
    found = []
    for *shape, states, dtype in cases:
        whole = tensors(sum(cut), *shape, states=states, dtype=dtype)
        mine = {n: ctx.split(t, 2) if n in SHARDED else t for n, t in whole.items()}
        ctx.ledger().clear()
        a, y, final = run(parallel.long_conv, mine, states, ctx=ctx, algorithm="fft")
        forward = ctx.ledger().sent_bytes("fft")
        result = differentiate(a, y, final, ctx.split(randn(*whole["u"].shape, seed=30, dtype=dtype), 2))
        sent = forward, ctx.ledger().sent_bytes("fft") - forward
        predicted = (0, 0)
        if ctx.size > 1:
            layout, k, u = FourStep.of(ctx.bounds, shape[0], states), whole["k"], whole["u"]
            sizes = (u.shape[0] * u.shape[1], k[..., 0].numel(), u.element_size(), max(4, u.element_size()))
            predicted = tuple(layout.sent_bytes(ctx.rank, *sizes, backward=b) for b in (False, True))
        found.append((result, sent, predicted))
    return found


def check(cut, cases):
    results = run_ranks(len(cut), on_rank, cut, cases)
    for i, (*shape, states, dtype) in enumerate(cases):
        whole = tensors(sum(cut), *shape, states=states, dtype=dtype)
        dy = randn(*whole["u"].shape, seed=30, dtype=dtype)
        expected = differentiate(*run(kernels.long_conv, whole, states), dy)
        for name, value in expected.items():
            parts = [r[i][0][name] for r in results]
            if name in ("final", "d_initial_state"):
                for part in parts:
                    assert_close(part, value, f"{cases[i]}: {name}")
            else:
                joined = name == "y" or name.removeprefix("d_") in SHARDED
                assert_close(torch.cat(parts, dim=2) if joined else sum(parts), value, f"{cases[i]}: {name}")
        for _, sent, predicted in (r[i] for r in results):
            assert sent == predicted, cases[i]


@ALL
def test_parts_are_the_kernel_on_the_whole_with_every_gradient_and_the_bytes_of_the_formula(cut):
    T = sum(cut)
    taps = (1, 2, 7, T - 1, T, 3 * T)
    cases = [(L, "channel", 2, 2, states, torch.float64) for L in taps for states in (False, True)]
    cases += [(T, filters, D, 2, True, torch.float64) for filters, D in [("one", 3), ("sample", 1), ("channel", 1)]]
    check(cut, cases)


@pytest.mark.parametrize("cut", [[0, 1], [1, 1, 1], [0, 0], [2, 0, 0], [101]], ids=str)
def test_a_token_or_none_in_all_and_a_prime_number(cut):
    check(cut, [(L, "channel", 1, 2, states, torch.float64) for L in (1, 3) for states in (False, True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_transformed_in_single_precision(dtype):
    check(CUTS[3], [(L, "channel", 2, 2, True, dtype) for L in (5, 71)])


def _adjoint(group, cut, taps):
    """<Ax, y> and <x, A'y> of each exchange with its transform, and the way there and back."""
    ctx = SequenceContext.create(group, cut[group.rank()])
    found = []
    for has_state in (False, True):
        layout = FourStep.of(ctx.bounds, taps, has_state)
        transform = _Transform(layout, ctx, torch.float64, torch.device("cpu"))
        x = ctx.split(randn(2, 3, sum(cut), seed=1), 2).clone().requires_grad_()
        columns = transform.to_columns(x, None)
        rows = transform.forward(columns)
        again = transform.inverse(rows)
        back = transform.to_tokens(again)
        assert_close(again, columns)
        assert_close(back, x)
        for i, y in enumerate((columns, rows, again, back)):
            w = randn(*y.shape, 2, seed=10 * i + ctx.rank)
            w = torch.view_as_complex(w) if y.is_complex() else w[..., 0]
            (dx,) = torch.autograd.grad(y, x, w, retain_graph=True)
            found.append(((y * w.conj()).real.sum().detach(), (x * dx).sum().detach()))
    return found


@pytest.mark.parametrize("P", [2, 3, 5])
def test_the_gradient_of_each_step_is_its_adjoint(P):
    results = run_ranks(P, _adjoint, CUTS[P], 9)
    for i in range(len(results[0])):
        assert_close(sum(r[i][0] for r in results), sum(r[i][1] for r in results), f"step {i}: <Ax, y> = <x, A'y>")


def _second(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    u = ctx.split(randn(1, 1, sum(cut), seed=1), 2).clone().requires_grad_()
    k = randn(1, 5, seed=2).requires_grad_()
    y, _ = parallel.long_conv(u, k, ctx=ctx, algorithm="fft")
    (dk,) = torch.autograd.grad(y.pow(3).sum(), k, create_graph=True)
    (du,) = torch.autograd.grad(dk.square().sum(), u)
    return dk.detach(), du


def test_any_derivative():
    cut = CUTS[2]
    u, k = randn(1, 1, sum(cut), seed=1).requires_grad_(), randn(1, 5, seed=2).requires_grad_()
    y, _ = kernels.long_conv(u, k)
    (dk,) = torch.autograd.grad(y.pow(3).sum(), k, create_graph=True)
    results = run_ranks(2, _second, cut)
    assert_close(sum(r[0] for r in results), dk)
    # Each rank's loss is of its part of dk: the sum over ranks of |dk_r|^2, which own taps alone make |dk|^2.
    (du,) = torch.autograd.grad(dk.square().sum(), u)
    assert all(int((a != 0).sum() > 0) for a, _ in results)
    assert_close(torch.cat([r[1] for r in results], dim=2), du)


@pytest.mark.parametrize(
    ("total", "taps", "P"), [(1, 1, 1), (7, 7, 3), (97, 300, 5), (4096, 4096, 8), (999_983, 50, 64)]
)
def test_the_layout_is_even_smooth_and_complete(total, taps, P):
    bounds = offsets(split_sizes(total, P))
    for has_state in (False, True):
        layout = FourStep.of(bounds, taps, has_state)
        n1, n2 = layout.sizes
        assert n1 % 2 == 0
        assert n1 * n2 >= total + layout.taps - 1
        for n in (n1, n2):
            for factor in (2, 3, 5):
                while n % factor == 0:
                    n //= factor
            assert n == 1
        counts = [[layout.tokens(holder, rank) for rank in range(P)] for holder in range(P)]
        assert [sum(row) for row in counts] == split_sizes(total, P)
        if total < 5000:
            owner = [r for r, width in enumerate(layout.columns) for _ in range(width)]
            for holder, rank in itertools.product(range(P), repeat=2):
                positions = range(bounds[holder] + layout.shift, bounds[holder + 1] + layout.shift)
                assert counts[holder][rank] == sum(owner[n % n2] == rank for n in positions)


def test_a_large_transform_sends_six_numbers_a_token_and_channel():
    P, total, D = 8, 1 << 20, 2
    bounds = offsets(split_sizes(total, P))
    layout = FourStep.of(bounds, total, False)
    sent = [layout.sent_bytes(r, D, 0, 4, 4) for r in range(P)]
    assert max(sent) / ((P - 1) / P * 6 * (total // P) * D * 4) == pytest.approx(1, abs=0.03)


def test_fewer_channels_than_ranks_take_the_transform_where_it_is_quicker():
    choose, bounds = conv_cost.long_conv_algorithm, offsets(split_sizes(1 << 20, 16))
    assert choose(bounds, 1 << 20) == "transpose"
    assert choose(bounds, 1 << 20, channels=16) == "transpose"
    assert choose(bounds, 1 << 20, channels=1) == "fft"
    assert choose(bounds, 100, channels=1) == "halo"
    assert choose(offsets(split_sizes(1 << 20, 2)), 1 << 20, channels=1, device="cuda") == "transpose"
    for channels, device in itertools.product((1, 2, 5, 15), ("cpu", "cuda")):
        shape = (bounds, 1 << 20, channels, 1, 2, device)
        seconds = {a: conv_cost.long_conv_seconds(a, *shape) for a in ("transpose", "fft")}
        assert choose(*shape) == min(seconds, key=seconds.get)


def _chosen(group, tokens):
    ctx = SequenceContext.even(group, tokens)
    u = torch.zeros(1, 1, ctx.local_tokens)
    parallel.long_conv(u, torch.zeros(1, tokens), ctx=ctx)
    return sorted(ctx.ledger().counts())


def test_auto_takes_it():
    tokens = 1 << 16
    expected = conv_cost.long_conv_algorithm(offsets(split_sizes(tokens, 5)), tokens, 1, 1, 4, "cpu")
    assert expected == "fft"
    assert run_ranks(5, _chosen, tokens) == [["fft"]] * 5
