"""linear_cross_entropy against whole logits: values, gradients at any upstream scale, masks, tiles."""

import pytest
import torch

from seqengine.kernels.api import linear_cross_entropy
from seqengine.kernels.loss import reference
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def tensors(shape=(3, 7), D=5, V=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, V, shape, generator=generator)
    labels.view(-1)[::4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("tile", [None, 1, 4, 100])
def test_matches_whole_logits(tile):
    hidden, weight, labels = tensors()
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    nats, count = linear_cross_entropy(*leaves, labels, tile=tile)
    (nats * 0.37 / count).backward()
    plain = [t.clone().requires_grad_() for t in (hidden, weight)]
    expected, expected_count = reference.linear_cross_entropy(*plain, labels, -100)
    (expected * 0.37 / expected_count).backward()
    assert int(count) == int(expected_count)
    assert_close(nats, expected, "nats")
    for a, b, name in zip(leaves, plain, ("d_hidden", "d_weight"), strict=True):
        assert_close(a.grad, b.grad, name)


def test_gradients_of_hidden_and_weight_scale_with_the_upstream_gradient():
    hidden, weight, labels = tensors()
    gradients = []
    for scale in (1.0, 1 / 16):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        (linear_cross_entropy(*leaves, labels)[0] * scale).backward()
        gradients.append([t.grad for t in leaves])
    for one, sixteenth in zip(*gradients, strict=True):
        assert_close(sixteenth * 16, one)


def test_micro_batches_of_unequal_counts_sum_to_the_whole():
    hidden, weight, labels = tensors((4, 9))
    whole = weight.clone().requires_grad_()
    nats, count = linear_cross_entropy(hidden, whole, labels)
    (nats / count).backward()
    parts = weight.clone().requires_grad_()
    for rows in (slice(0, 1), slice(1, 4)):
        (linear_cross_entropy(hidden[rows], parts, labels[rows])[0] / count).backward()
    assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_near_float64(dtype):
    hidden, weight, labels = tensors((2, 200), D=32, dtype=dtype)
    expected, _ = linear_cross_entropy(hidden.double(), weight.double(), labels)
    nats, _ = linear_cross_entropy(hidden, weight, labels)
    assert nats.dtype == torch.float32
    assert_close(nats, expected)


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    nats, _ = linear_cross_entropy(hidden, torch.eye(2), torch.tensor([1]))
    nats.backward()
    assert float(nats.detach()) == pytest.approx(2000.0)
    assert torch.equal(hidden.grad, torch.tensor([[1.0, -1.0]]))


def test_all_labels_ignored_and_no_tokens_give_zero():
    hidden, weight, labels = tensors()
    weight.requires_grad_()
    for h, y in ((hidden, torch.full_like(labels, -100)), (hidden[:0], labels[:0])):
        nats, count = linear_cross_entropy(h, weight, y)
        nats.backward()
        assert float(nats.detach()) == 0
        assert int(count) == 0
        assert float(weight.grad.abs().sum()) == 0


def test_gradcheck():
    hidden, weight, labels = tensors((2, 3))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, tile=2)[0], [hidden.requires_grad_(), weight.requires_grad_()]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(11, 4)}, "must agree in D"),
        ({"labels": torch.zeros(3, 6, dtype=torch.int64)}, "labels must be int64 of shape"),
        ({"labels": torch.zeros(3, 7)}, "labels must be int64"),
        ({"labels": torch.full((3, 7), 11)}, r"labels must lie in \[0, 11\)"),
        ({"labels": torch.full((3, 7), -1)}, r"labels must lie in \[0, 11\)"),
        ({"tile": 0}, "tile must be at least 1"),
    ],
)
def test_rejects(change, message):
    hidden, weight, labels = tensors()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **change})
