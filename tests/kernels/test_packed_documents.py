"""Packed documents: each is convolved as if it were alone, states and gradients included."""

import itertools

import pytest
import torch

from seqengine.kernels.api import long_conv, short_conv
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BOUNDS = [[0, 5, 12], [0, 1, 2, 12], [0, 0, 7, 7, 12], [0, 12], [0, 12, 12]]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(function, a, bounds, packed):
    """Output, final states, gradients of a projection of both; packed in one call, or document by document."""
    a = {name: t.clone().requires_grad_() for name, t in a.items()}
    rows = [name for name in ("u", "pre_gate", "post_gate") if name in a]
    if packed:
        y, state = function(**a, output_final_state=True, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    else:
        outputs, states = [], []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            part = {name: a[name][:, :, start:stop] for name in rows}
            rest = {name: t for name, t in a.items() if name not in rows}
            rest["initial_state"] = a["initial_state"][n : n + 1]
            out, last = function(**part, **rest, output_final_state=True)
            outputs.append(out)
            states.append(last)
        y, state = torch.cat(outputs, 2), torch.cat(states)
    ((y * randn(*y.shape, seed=7)).sum() + (state * randn(*state.shape, seed=8)).sum()).backward()
    return {"y": y, "state": state, **{f"d_{name}": t.grad for name, t in a.items()}}


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("L", [1, 3, 20])
def test_long_conv_treats_each_document_as_alone(bounds, L):
    shapes = {"u": (1, 3, 12), "k": (3, L), "skip": (3,), "pre_gate": (1, 3, 12), "post_gate": (1, 3, 12)}
    a = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    a["initial_state"] = randn(len(bounds) - 1, 3, L - 1, seed=9)
    expected = run(long_conv, a, bounds, packed=False)
    for name, actual in run(long_conv, a, bounds, packed=True).items():
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("W", [1, 3, 9])
def test_short_conv_treats_each_document_as_alone(bounds, W):
    a = {"u": randn(1, 3, 12), "w": randn(3, W, seed=1), "bias": randn(3, seed=2)}
    a["initial_state"] = randn(len(bounds) - 1, 3, W - 1, seed=9)
    expected = run(short_conv, a, bounds, packed=False)
    for name, actual in run(short_conv, a, bounds, packed=True).items():
        assert_close(actual, expected[name], name)


def test_nothing_leaks_over_a_boundary():
    u, k = randn(1, 2, 10), randn(2, 10, seed=1)
    bounds = torch.tensor([0, 4, 10])
    before, _ = long_conv(u, k, cu_seqlens=bounds)
    u[:, :, :4] += 1e6
    after, _ = long_conv(u, k, cu_seqlens=bounds)
    assert torch.equal(after[:, :, 4:], before[:, :, 4:])


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (torch.tensor([0, 5, 9]), "ascend from 0 to T=10"),
        (torch.tensor([1, 10]), "ascend from 0 to T=10"),
        (torch.tensor([0, 6, 5, 10]), "ascend from 0 to T=10"),
        (torch.tensor([0.0, 10.0]), "ascend from 0 to T=10"),
        (torch.tensor(10), "ascend from 0 to T=10"),
    ],
)
def test_rejects_boundaries_that_do_not_fit(bounds, message):
    with pytest.raises(ValueError, match=message):
        long_conv(randn(1, 2, 10), randn(2, 3), cu_seqlens=bounds)
    with pytest.raises(ValueError, match=message):
        short_conv(randn(1, 2, 10), randn(2, 3), cu_seqlens=bounds)


def test_rejects_a_batch_and_a_filter_per_row():
    with pytest.raises(ValueError, match="must be one row"):
        long_conv(randn(2, 2, 10), randn(2, 3), cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="share the filter"):
        long_conv(randn(1, 2, 10), randn(1, 2, 3), cu_seqlens=torch.tensor([0, 4, 10]))
