"""delta_summary: the affine map of a stretch of tokens, against the product of its steps and against delta_rule."""

import math

import pytest
import torch
from torch.nn import functional as F

from seqengine.kernels.delta_rule.op import delta_rule
from seqengine.kernels.delta_rule.summary import delta_summary
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXTREME = (0.0, -1e-3, -80.0, -1e4, -math.inf)


def tensors(T, gates="mild", B=2, H=2, K=16, V=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = [F.normalize(randn(B, T, H, K), dim=-1), randn(B, T, H, V), randn(B, T, H).sigmoid()]
    if gates == "mild":
        made.append(-(randn(B, T, H) ** 2) / 10)
    elif gates == "extreme":
        picks = torch.randint(0, len(EXTREME), (B, T, H), generator=generator)
        made.append(torch.tensor(EXTREME, dtype=torch.float64)[picks])
    return made


def product_of_steps(k, v, beta, g=None):
    """(A, b) by one dense matrix a token."""
    B, T, H, K = k.shape
    one = torch.eye(K, dtype=k.dtype)
    A, b = one.expand(B, H, K, K), torch.zeros(B, H, K, v.shape[-1], dtype=k.dtype)
    for t in range(T):
        key, strength = k[:, t, :, :, None], beta[:, t, :, None, None]
        step = one - strength * key * key.mT
        if g is not None:
            step = step * g[:, t, :, None, None].exp()
        A, b = step @ A, step @ b + strength * key * v[:, t, :, None, :]
    return A, b


def with_gradients(function, arguments):
    leaves = [x.clone().requires_grad_() for x in arguments]
    results = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in results)
    loss.backward()
    return [*results, *(x.grad for x in leaves)]


def assert_same(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("gates", ["none", "mild", "extreme"])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
def test_is_the_product_of_the_steps_with_gradients(T, gates):
    a = tensors(T, gates)
    assert_same(with_gradients(delta_summary, a), with_gradients(product_of_steps, a))


@pytest.mark.parametrize("gates", ["none", "mild", "extreme"])
def test_takes_an_initial_state_to_the_final_one_with_gradients(gates):
    k, v, beta, *g = tensors(130, gates)
    state = torch.randn(2, 2, 16, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def by_summary(state, k, v, beta, *g):
        A, b = delta_summary(k, v, beta, *g)
        return (A @ state + b,)

    def by_rule(state, k, v, beta, *g):
        return (delta_rule(k, k, v, beta, *g, initial_state=state, output_final_state=True)[1],)

    assert_same(with_gradients(by_summary, [state, k, v, beta, *g]), with_gradients(by_rule, [state, k, v, beta, *g]))


@pytest.mark.parametrize("sizes", [[100, 30], [1, 0, 129], [60, 64, 6]], ids=str)
def test_summaries_of_parts_compose_to_that_of_the_whole(sizes):
    def by_parts(*arguments):
        A, b = delta_summary(*(x[:, :0] for x in arguments))
        for part in zip(*(x.split(sizes, 1) for x in arguments), strict=True):
            later, add = delta_summary(*part)
            A, b = later @ A, later @ b + add
        return A, b

    a = tensors(130)
    assert_same(with_gradients(by_parts, a), with_gradients(delta_summary, a))


@pytest.mark.parametrize("gates", ["none", "mild"])
def test_gradcheck_and_gradgradcheck(gates):
    a = [x.requires_grad_() for x in tensors(5, gates, B=1, K=2, V=1)]
    assert torch.autograd.gradcheck(delta_summary, a)
    assert torch.autograd.gradgradcheck(delta_summary, a)


def test_without_a_token_it_is_the_identity_with_zero_gradients():
    a = [x.requires_grad_() for x in tensors(0)]
    A, b = delta_summary(*a)
    assert torch.equal(A, torch.eye(16, dtype=torch.float64).expand(2, 2, 16, 16))
    assert torch.equal(b, torch.zeros(2, 2, 16, 3, dtype=torch.float64))
    (A.sum() + b.sum()).backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summaries_are_in_the_dtype_of_states(dtype):
    a = [x.to(dtype) for x in tensors(100)]
    A, b = delta_summary(*a)
    assert A.dtype == b.dtype == torch.float32
    expected = product_of_steps(*(x.double() for x in a))
    assert_same((A, b), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(1, 6, 3)}, r"delta_summary: k must be \[B, T, H, K\]"),
        ({1: torch.zeros(1, 5, 2, 4)}, r"v \[B, T, H, V\] must have B, T, H = \(1, 6, 2\)"),
        ({2: torch.zeros(1, 6)}, r"beta must be \[B, T, H\]"),
        ({3: torch.zeros(1, 6, 2, dtype=torch.int32)}, "g must be float64"),
    ],
)
def test_bad_arguments_are_named(change, message):
    a = [torch.zeros(1, 6, 2, 3), torch.zeros(1, 6, 2, 4), torch.zeros(1, 6, 2), torch.zeros(1, 6, 2)]
    with pytest.raises(ValueError, match=message):
        delta_summary(*(change.get(i, x) for i, x in enumerate(a)))
