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


def with_squares(hidden, weight, labels, z_loss=0.1, **options):
    nats, count, squares = linear_cross_entropy(hidden, weight, labels, output_squares=True, **options)
    return (nats + z_loss * squares) / count


@pytest.mark.parametrize("tile", [None, 1, 4])
@pytest.mark.parametrize(("of_nats", "of_squares"), [(0.37, 0.01), (0.0, 2.0), (-1.0, 3.0), (1.0, 0.0), (0.0, 0.0)])
def test_squares_match_whole_logits(tile, of_nats, of_squares):
    hidden, weight, labels = tensors()
    leaves, plain = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    nats, count, squares = linear_cross_entropy(*leaves, labels, tile=tile, output_squares=True)
    expected, expected_count = reference.linear_cross_entropy(*plain, labels, -100)
    expected_squares = reference.squares(*plain, labels, -100)
    assert_close(nats, expected, "nats")
    assert_close(squares, expected_squares, "squares")
    assert int(count) == int(expected_count)
    (of_nats * nats + of_squares * squares).backward()
    (of_nats * expected + of_squares * expected_squares).backward()
    for a, b, name in zip(leaves, plain, ("d_hidden", "d_weight"), strict=True):
        assert_close(a.grad, b.grad, name)


def test_squares_alone_are_differentiable_and_zero_without_labels():
    hidden, weight, labels = tensors()
    leaves, plain = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    linear_cross_entropy(*leaves, labels, output_squares=True)[2].backward()
    reference.squares(*plain, labels, -100).backward()
    for a, b in zip(leaves, plain, strict=True):
        assert_close(a.grad, b.grad)
    _, count, squares = linear_cross_entropy(*leaves, torch.full_like(labels, -100), output_squares=True)
    gradients = torch.autograd.grad(squares, leaves)
    assert int(count) == float(squares.detach()) == sum(float(g.abs().sum()) for g in gradients) == 0


def test_squares_that_are_not_used_change_no_bit():
    hidden, weight, labels = tensors(dtype=torch.float32)
    runs = []
    for options in ({}, {"output_squares": True}):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        nats = linear_cross_entropy(*leaves, labels, **options)[0]
        runs.append([nats, *torch.autograd.grad(nats * 0.3, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_squares_in_lower_precision_are_near_float64(dtype):
    hidden, weight, labels = tensors((2, 60), D=16, dtype=dtype)
    leaves, wide = ([t.to(d).requires_grad_() for t in (hidden, weight)] for d in (dtype, torch.float64))
    actual, expected = with_squares(*leaves, labels), with_squares(*wide, labels)
    assert actual.dtype == torch.float32
    assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, wide), strict=True):
        assert a.dtype == dtype
        assert_close(a, b)


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
            torch.tensor(1.0), hidden, weight, labels, lse, -100, rows, words, True, True, lse
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


def test_squares_save_a_number_and_a_flag_a_token_more():
    hidden, weight, labels = tensors((64,), 16, 100, torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, output_squares=True)
    assert sum(kept.values()) == hidden.nbytes + weight.nbytes + labels.nbytes + (4 + 4 + 1) * 64


def test_operators_keep_torchs_contract():
    hidden, weight, labels = tensors((6,))
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    torch.library.opcheck(ops.linear_cross_entropy, (*leaves, labels, -100, 4, 5))
    _, lse = ops.linear_cross_entropy(*leaves, labels, -100, 4, 5)
    upstream = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    d_lse = torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)
    for needed in ((True, True, None), (True, False, None), (False, True, d_lse)):
        arguments = (upstream, *leaves, labels, lse.detach(), -100, 4, 5, *needed)
        torch.library.opcheck(ops.linear_cross_entropy_backward, arguments)


def per_token(hidden, weight, labels):
    nats, count = linear_cross_entropy(hidden, weight, labels)
    return nats / count


@pytest.mark.parametrize("function", [per_token, with_squares])
def test_compiles_whole_forward_and_backward(function):
    hidden, weight, labels = tensors()
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


@pytest.mark.parametrize("result", [[0], [0, 2]], ids=["nats", "nats and squares"])
def test_gradcheck_and_gradgradcheck(result):
    hidden, weight, labels = tensors((2, 2), 3, 4)

    def function(h, w):
        found = linear_cross_entropy(h, w, labels, tile=2, output_squares=len(result) > 1)
        return sum(found[i] ** 2 for i in result)

    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


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
