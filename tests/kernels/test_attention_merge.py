"""merge_attention: any split of the keys gives the whole, gradients included; empty sets; precision; bad input."""

import math

import pytest
import torch

from seqengine.kernels.attention.op import attention, merge_attention
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parts(dtype=torch.float64, B=2, T=5, H=3, V=4, count=2):
    """Outputs and log-sum-exps of `count` key sets."""
    return [(randn(B, T, H, V, seed=2 * i, dtype=dtype), 3 * randn(B, H, T, seed=2 * i + 1)) for i in range(count)]


@pytest.mark.parametrize("backend", ["torch", "sdpa", "reference"])
@pytest.mark.parametrize("cuts", [[40, 1, 23], [1] * 64, [0, 64], [10, 0, 54]], ids=lambda c: str(c[:4]))
def test_any_split_of_the_keys_is_the_whole_with_gradients(cuts, backend):
    def whole_or_split(sizes):
        q, k, v = (randn(2, n, h, 4, seed=n + h).requires_grad_() for n, h in ((9, 6), (64, 2), (64, 3)))
        v = v[:, :, :2]
        order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
        merged = None
        for index in order.split(sizes):
            part = attention(q, k[:, index], v[:, index], causal=False, return_lse=True, backend=backend)
            merged = part if merged is None else merge_attention(*merged, *part)
        out, lse = merged
        found = torch.autograd.grad([out, lse], [q, k, v], [randn(*out.shape, seed=7), randn(*lse.shape, seed=8)])
        return (out, lse, *found)

    for actual, expected in zip(whole_or_split(cuts), whole_or_split([64]), strict=True):
        assert_close(actual, expected)


def test_causal_blocks_of_a_ring_merge_to_causal_attention():
    q, k, v = (randn(1, 30, 2, 4, seed=i) for i in range(3))
    expected = attention(q, k, v)
    for start, stop in ((0, 10), (10, 20), (20, 30)):
        own = attention(q[:, start:stop], k[:, start:stop], v[:, start:stop], return_lse=True)
        before = attention(q[:, start:stop], k[:, :start], v[:, :start], causal=False, return_lse=True)
        out, _ = merge_attention(*own, *before)
        assert_close(out, expected[:, start:stop])


def test_merging_is_associative_and_commutative():
    a, b, c = parts(count=3)
    left, right = merge_attention(*merge_attention(*a, *b), *c), merge_attention(*a, *merge_attention(*b, *c))
    swapped = merge_attention(*c, *merge_attention(*b, *a))
    for one, other, third in zip(left, right, swapped, strict=True):
        assert_close(one, other)
        assert_close(one, third)


def test_gradcheck_to_second_order():
    leaves = [t.requires_grad_() for part in parts(B=1, T=2, H=2, V=3) for t in part]
    assert torch.autograd.gradcheck(merge_attention, leaves)
    assert torch.autograd.gradgradcheck(merge_attention, leaves)


@pytest.mark.parametrize("empty", ["a", "b", "both"])
def test_sets_without_keys_leave_the_other_and_finite_gradients(empty):
    (out_a, lse_a), (out_b, lse_b) = parts()
    if empty != "b":
        out_a, lse_a = out_a * 0, torch.full_like(lse_a, -math.inf)
    if empty != "a":
        out_b, lse_b = out_b * 0, torch.full_like(lse_b, -math.inf)
    leaves = [t.requires_grad_() for t in (out_a, lse_a, out_b, lse_b)]
    out, lse = merge_attention(*leaves)
    expected = {"a": leaves[2:], "b": leaves[:2], "both": [torch.zeros_like(out), lse_a]}[empty]
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    found = torch.autograd.grad([out, lse], leaves, [randn(*out.shape), randn(*lse.shape, seed=1)])
    assert all(bool(torch.isfinite(t).all()) for t in found)
    for name, index in (("a", 1), ("b", 3)):
        if empty in (name, "both"):
            assert float(found[index].abs().max()) == 0


def test_far_apart_sums_do_not_overflow():
    (out_a, lse_a), (out_b, lse_b) = parts(dtype=torch.float32)
    lse_a, lse_b = (lse_a + 1e4).float().requires_grad_(), (lse_b - 1e4).float().requires_grad_()
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out, out_a)
    assert torch.equal(lse, lse_a)
    (out.sum() + lse.sum()).backward()
    assert_close(lse_a.grad, torch.ones_like(lse_a))
    assert torch.equal(lse_b.grad, torch.zeros_like(lse_b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_merges_in_float32(dtype):
    (out_a, lse_a), (out_b, lse_b) = parts(dtype=dtype)
    out, lse = merge_attention(out_a, lse_a.float(), out_b, lse_b.float())
    exact, exact_lse = merge_attention(out_a.double(), lse_a, out_b.double(), lse_b)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_close(out, exact, tolerance=RELATIVE[dtype])
    assert_close(lse, exact_lse)
    wide, _ = merge_attention(out_a.float(), lse_a.float(), out_b, lse_b.float())
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(dtype), out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, again_lse = merge_attention(out_a, lse_a.float(), out_b, lse_b.float())
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)


def test_empty_tensors_and_one_graph():
    out, lse = merge_attention(*parts(T=0)[0], *parts(T=0)[1])
    assert (out.shape, lse.shape) == ((2, 0, 3, 4), (2, 3, 0))
    leaves = [t for part in parts() for t in part]
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*leaves), merge_attention(*leaves), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_a": torch.zeros(2, 3, 4)}, r"merge_attention: out_a must be \[B, T, H, V\]; got \(2, 3, 4\)"),
        ({"out_b": torch.zeros(1, 2, 3, 5)}, r"out_b must be \[B, T, H, V\] = \[1, 2, 3, 4\]; got \(1, 2, 3, 5\)"),
        ({"lse_a": torch.zeros(1, 2, 3)}, r"lse_a must be \[B, H, T\] = \[1, 3, 2\]; got \(1, 2, 3\)"),
        ({"lse_b": torch.zeros(1, 3)}, r"lse_b must be \[B, H, T\]"),
        ({"lse_b": torch.zeros(1, 3, 2, dtype=torch.int64)}, "lse_b must be float64, float32"),
        ({"out_b": torch.zeros(1, 2, 3, 4, device="meta")}, "out_b must be on cpu"),
    ],
)
def test_rejects(change, message):
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=message):
        merge_attention(**{"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse, **change})
