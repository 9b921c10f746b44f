"""linear_cross_entropy against whole logits: values, gradients at any upstream scale, masks, tiles."""

import pytest
import torch

from seqengine.kernels.api import linear_cross_entropy
from seqengine.kernels.loss import ops, reference
from seqengine.kernels.loss.op import tile_sizes
from tests.kernels.largest_tensor import LargestTensor
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


@pytest.mark.parametrize(("tokens", "words"), [(4, 3), (100, 5), (1, 1), (7, 11)])
def test_a_vocabulary_in_tiles_is_the_whole_one(tokens, words):
    hidden, weight, labels = tensors()
    hidden[0, 0] *= 300  # logits far apart from tile to tile
    leaves, plain = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    nats, lse = ops.linear_cross_entropy(leaves[0].flatten(0, 1), leaves[1], labels.flatten(), -100, tokens, words)
    expected, _ = reference.linear_cross_entropy(*plain, labels, -100)
    assert_close(nats, expected)
    assert_close(lse, torch.logsumexp((hidden @ weight.T).flatten(0, 1), dim=1))
    for a, b in zip(torch.autograd.grad(nats * 0.3, leaves), torch.autograd.grad(expected * 0.3, plain), strict=True):
        assert_close(a, b)


def test_memory_beyond_the_inputs_is_a_small_part_of_the_logits():
    N, V, D = 4096, 50_000, 8
    rows, words = tile_sizes(V, "cpu", None)
    hidden, weight, labels = tensors((N,), D, V, torch.float32)
    with LargestTensor() as largest:
        total, lse = ops.linear_cross_entropy._init_fn(hidden, weight, labels, -100, rows, words)
        ops.linear_cross_entropy_backward._init_fn(
            torch.tensor(1.0), hidden, weight, labels, lse, -100, rows, words, True, True
        )
    assert bool(torch.isfinite(total))
    assert largest.elements <= max(V * D, rows * words) <= 0.01 * N * V


def test_saves_its_inputs_and_a_number_a_token():
    hidden, weight, labels = tensors((64,), 16, 100, torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert sum(kept.values()) == hidden.nbytes + weight.nbytes + labels.nbytes + 4 * 64


def test_operators_keep_torchs_contract():
    hidden, weight, labels = tensors((6,))
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    torch.library.opcheck(ops.linear_cross_entropy, (*leaves, labels, -100, 4, 5))
    _, lse = ops.linear_cross_entropy(*leaves, labels, -100, 4, 5)
    upstream = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for needed in ((True, True), (True, False), (False, True)):
        arguments = (upstream, *leaves, labels, lse.detach(), -100, 4, 5, *needed)
        torch.library.opcheck(ops.linear_cross_entropy_backward, arguments)


def test_compiles_whole_forward_and_backward():
    hidden, weight, labels = tensors()

    def function(h, w, y):
        nats, count = linear_cross_entropy(h, w, y)
        return nats / count

    eager, compiled = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    expected = function(*eager, labels)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled, labels)
    assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, compiled), torch.autograd.grad(expected, eager), strict=True):
        assert_close(a, b)


def test_under_autocast_logits_are_not_rounded():
    hidden, weight, labels = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats, _ = linear_cross_entropy(hidden, weight, labels)
    assert_close(nats, linear_cross_entropy(hidden.double(), weight.double(), labels)[0])


def test_two_runs_agree_bit_for_bit():
    runs = []
    for _ in range(2):
        leaves = [t.requires_grad_() for t in tensors((50,), 32, 300, torch.float32)[:2]]
        nats, _ = linear_cross_entropy(*leaves, tensors((50,), 32, 300)[2])
        runs.append([nats, *torch.autograd.grad(nats, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradgradcheck():
    hidden, weight, labels = tensors((2, 2), 3, 4)

    def function(h, w):
        return linear_cross_entropy(h, w, labels, tile=2)[0] ** 2

    assert torch.autograd.gradgradcheck(function, [hidden.requires_grad_(), weight.requires_grad_()])


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
        ({"labels": torch.zeros(3, 7, dtype=torch.int64, device="meta")}, "labels must be on cpu"),
        ({"weight": torch.zeros(11, 5, dtype=torch.int64)}, "weight must be float64"),
    ],
)
def test_rejects(change, message):
    hidden, weight, labels = tensors()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **change})
