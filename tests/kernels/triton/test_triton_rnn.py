"""The Triton recurrent cells against their definition, in Triton's interpreter."""

import pytest
import torch

from seqengine.kernels.rnn import loop, triton_rnn
from seqengine.kernels.rnn.op import rnn
from seqengine.kernels.rnn.reference import NUM_GATES, NUM_STATES
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CELLS = list(NUM_GATES)
NAMES = ["h", "c", "n", "m"]


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """A token takes milliseconds here, so chunks are short; the real length is an argument like this one."""
    monkeypatch.setattr(loop, "CHUNK_TOKENS", 4)


def tensors(cell, B, T, H, K, dtype=torch.float32, seed=0):
    """Gates, recurrent weights and a state; every second sample of the sLSTM has no past, and n < 1 occurs."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    G = NUM_GATES[cell]
    drawn = {"gates": (2 * randn(B, T, G, H, K)).to(dtype), "recurrent": (randn(G, H, K, K) / K**0.5).to(dtype)}
    for name in NAMES[: NUM_STATES[cell]]:
        drawn[name] = (randn(B, H, K).abs() if name == "n" else randn(B, H, K)).float()
    if cell == "slstm":
        drawn["n"][1::2] = 0
    return drawn


def run(a, cell, backend="triton", final_too=True):
    """h, the final state, and the gradients of a fixed random projection of them."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in a.items()}
    state = tuple(leaves[name] for name in NAMES if name in a) or None
    h, final = rnn(
        leaves["gates"],
        leaves["recurrent"],
        cell=cell,
        initial_state=state,
        output_final_state=True,
        backend=backend,
    )
    results = {"h": h, **{f"final {name}": t for name, t in zip(NAMES, final)}}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
        for t in (results.values() if final_too else [h])
    )
    loss.backward()
    return results | {f"d_{name}": t.grad for name, t in leaves.items()}


def double(a):
    return {name: t.double() for name, t in a.items()}


def assert_matches(actual, expected, tolerance=None):
    for name, value in actual.items():
        assert_close(value, expected[name], name, tolerance)


@pytest.mark.parametrize("K", [1, 3, 16, 33, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_matches_reference_with_every_gradient_for_heads_of_any_size(cell, K):
    a = tensors(cell, 2, 2, 1 if K > 16 else 2, K)
    assert_matches(run(a, cell), run(double(a), cell, "reference"))


@pytest.mark.parametrize(("B", "T"), [(1, 1), (17, 2), (2, 4), (2, 5), (2, 10)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_matches_reference_with_every_gradient_for_any_length_and_batch(cell, B, T):
    a = tensors(cell, B, T, 1, 3)
    assert_matches(run(a, cell), run(double(a), cell, "reference"))


@pytest.mark.parametrize("cell", ["slstm", "gru"])
def test_chunks_of_the_real_length(monkeypatch, cell):
    monkeypatch.undo()
    assert loop.CHUNK_TOKENS > 4
    a = tensors(cell, 1, loop.CHUNK_TOKENS + 1, 1, 3)
    assert_matches(run(a, cell), run(double(a), cell, "reference"))


@pytest.mark.parametrize("cell", CELLS)
def test_starts_from_zeros(cell):
    a = {name: t for name, t in tensors(cell, 2, 3, 2, 3).items() if name not in NAMES}
    assert_matches(run(a, cell), run(double(a), cell, "reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_halves(cell, dtype):
    a = tensors(cell, 2, 9, 1, 8, dtype)
    actual = run(a, cell, final_too=False)
    assert actual["h"].dtype == actual["d_gates"].dtype == actual["d_recurrent"].dtype == dtype
    assert_matches(actual, run(double(a), cell, "reference", final_too=False), RELATIVE[dtype])


def test_large_heads_of_halves():
    a = tensors("lstm", 2, 3, 1, 128, torch.float16)
    assert_matches(run(a, "lstm"), run(double(a), "lstm", "reference"), RELATIVE[torch.float16])


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_gradients_of_halves_may_leave_their_range(size):
    a = tensors("lstm", 1, 4, 1, 8, torch.float16)
    leaves = [a["gates"].float(), a["recurrent"], a["h"].requires_grad_(), a["c"].requires_grad_()]
    found = []
    for kind, backend in ((torch.Tensor.clone, "triton"), (torch.Tensor.double, "reference")):
        h, _ = rnn(kind(leaves[0]), kind(leaves[1]), cell="lstm", initial_state=tuple(leaves[2:]), backend=backend)
        found.append(torch.autograd.grad((h.double() * size).sum(), leaves[2:]))
    for actual, expected in zip(*found):
        assert_close(actual, expected, tolerance=RELATIVE[torch.float16])


@pytest.mark.parametrize("cell", CELLS)
def test_any_cut_with_states_is_the_uncut_result_with_gradients(cell):
    def whole_or_cut(sizes):
        a = {name: t.requires_grad_() for name, t in tensors(cell, 2, 10, 1, 3, seed=3).items()}
        state, outputs = tuple(a[n] for n in NAMES if n in a), []
        for gates in a["gates"].split(sizes, 1):
            h, state = rnn(
                gates, a["recurrent"], cell=cell, initial_state=state, output_final_state=True, backend="triton"
            )
            outputs.append(h)
        h = torch.cat(outputs, 1)
        ((h * torch.arange(3.0)).sum() + sum((t**2).sum() for t in state)).backward()
        return {"out": h} | {f"d_{n}": t.grad for n, t in a.items()}

    assert_matches(whole_or_cut([1, 0, 6, 3]), whole_or_cut([10]))


@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("cell", CELLS)
def test_extreme_gates_are_finite(cell, size):
    a = tensors(cell, 2, 9, 1, 3)
    signs = torch.randint(-1, 2, a["gates"].shape, generator=torch.Generator().manual_seed(4))
    a["gates"] = a["gates"] + size * signs
    actual = run(a, cell)
    assert all(bool(torch.isfinite(t).all()) for t in actual.values())
    if size == 80:  # of the others, float32 keeps three digits behind the point
        assert_close(actual["h"], run(double(a), cell, "reference")["h"])


@pytest.mark.parametrize("cell", CELLS)
def test_non_contiguous_inputs(cell):
    a = tensors(cell, 2, 3, 1, 3)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in a.items()}
    assert_matches(run(strided, cell), run(a, cell))


@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 0, 2, 3)], ids=str)
def test_empty(shape):
    a = tensors("slstm", *shape)
    actual = run(a, "slstm")
    assert actual["h"].shape == shape
    assert torch.equal(actual["final c"], a["c"])


@pytest.mark.parametrize("cell", CELLS)
def test_bitwise_the_same_twice(cell):
    a = tensors(cell, 3, 6, 1, 5)
    first, second = run(a, cell), run(a, cell)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_forward_launcher_gives_the_states_before_each_chunk():
    a = tensors("lstm", 2, 10, 2, 3)
    h, final, starts = triton_rnn.forward(a["gates"], a["recurrent"], torch.stack((a["h"], a["c"])), "lstm")
    assert starts.shape == (3, 2, 2, 2, 3)
    assert torch.equal(starts[0, 1], a["c"].transpose(0, 1))
    assert torch.equal(starts[2, 0], h[:, 7].transpose(0, 1))
    assert torch.equal(final[0], h[:, -1])


@pytest.mark.parametrize(
    ("K", "dtype", "message"),
    [
        (65, torch.float32, r"needs heads K <= 64 for torch.float32 weights; backend 'torch' takes any; got 65"),
        (129, torch.bfloat16, "needs heads K <= 128"),
        (3, torch.float64, "computes in float32"),
    ],
)
def test_rejects_what_it_cannot_run(K, dtype, message):
    a = tensors("elman", 1, 2, 1, K)
    with pytest.raises(ValueError, match=message):
        rnn(a["gates"].to(dtype), a["recurrent"].to(dtype), cell="elman", backend="triton")
