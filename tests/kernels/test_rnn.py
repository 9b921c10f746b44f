"""rnn against its definition and against torch.nn: values, every gradient, states, extremes, bad input."""

import pytest
import torch

from seqengine.kernels.rnn import loop
from seqengine.kernels.rnn.op import rnn
from seqengine.kernels.rnn.reference import NUM_GATES, NUM_STATES
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CELLS = list(NUM_GATES)
NAMES = ["h", "c", "n", "m"]


def tensors(cell, B, T, H, K, dtype=torch.float64, seed=0):
    """Gates, recurrent weights and a state that a cell could have come to, in one dictionary."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    G = NUM_GATES[cell]
    drawn = {"gates": 2 * randn(B, T, G, H, K), "recurrent": randn(G, H, K, K) / K**0.5}
    for name in NAMES[: NUM_STATES[cell]]:
        drawn[name] = 1 + randn(B, H, K).abs() if name == "n" else randn(B, H, K)
    return {name: t.to(dtype) for name, t in drawn.items()}


def call(a, cell, backend="torch", **changed):
    a = {**a, **changed}
    state = tuple(a[name] for name in NAMES if name in a) or None
    h, final = rnn(a["gates"], a["recurrent"], cell=cell, initial_state=state, output_final_state=True, backend=backend)
    return h, final


def run(a, cell, backend="torch", final_too=True):
    """h, the final state, and the gradients of a fixed random projection of them."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in a.items()}
    h, final = call(leaves, cell, backend)
    results = {"h": h, **{f"final {name}": t for name, t in zip(NAMES, final)}}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
        for t in (results.values() if final_too else [h])
    )
    loss.backward()
    return results | {f"d_{name}": t.grad for name, t in leaves.items()}


def assert_matches(actual, expected, tolerance=None):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], name, tolerance)


@pytest.mark.parametrize("K", [1, 3, 16, 33, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_matches_reference_with_every_gradient_for_heads_of_any_size(cell, K):
    a = tensors(cell, 2, 40, 3, K)
    assert_matches(run(a, cell), run(a, cell, "reference"))


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 97])
@pytest.mark.parametrize("cell", CELLS)
def test_matches_reference_with_every_gradient_for_any_length(cell, T):
    a = tensors(cell, 3, T, 2, 5)
    assert_matches(run(a, cell), run(a, cell, "reference"))
    assert_matches(run(a, cell, final_too=False), run(a, cell, "reference", final_too=False))


@pytest.mark.parametrize("cell", CELLS)
def test_starts_from_zeros(cell):
    a = tensors(cell, 2, 40, 2, 5)
    zeros = {n: torch.zeros_like(t) if n in NAMES else t for n, t in a.items()}
    bare = {n: t for n, t in a.items() if n not in NAMES}
    expected = run(zeros, cell, "reference")
    assert_matches(run(zeros, cell), expected)
    assert_matches(run(bare, cell), {n: t for n, t in expected.items() if n[:2] != "d_" or n[2:] in bare})


@pytest.mark.parametrize("kind", ["lstm", "gru", "elman"])
def test_one_head_is_torchs_module(kind):
    torch.manual_seed(0)
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}[kind]
    module = module(6, 5, batch_first=True, dtype=torch.float64)
    x, G = torch.randn(3, 50, 6, dtype=torch.float64), NUM_GATES[kind]
    with torch.no_grad():
        module.bias_hh_l0[-5:] = 0  # of the GRU's n gate; elsewhere it is a bias like the other
        gates = (x @ module.weight_ih_l0.T + module.bias_ih_l0 + module.bias_hh_l0).view(3, 50, G, 1, 5)
        h, final = rnn(gates, module.weight_hh_l0.view(G, 1, 5, 5), cell=kind, output_final_state=True)
        expected, last = module(x)
    assert_close(h[:, :, 0], expected)
    for a, b in zip(final, last if kind == "lstm" else (last,)):
        assert_close(a[:, 0], b[0])


def test_slstm_is_the_ratio_of_unstabilised_sums():
    """With R = 0: h = s(o) C / N, where C and N add e^i tanh z and e^i and decay by s(f)."""
    a = tensors("slstm", 2, 30, 2, 4)
    i, f, z, o = a["gates"].unbind(2)
    C, N = torch.zeros_like(i[:, 0]), torch.zeros_like(i[:, 0])
    expected = []
    for t in range(30):
        C = torch.sigmoid(f[:, t]) * C + torch.exp(i[:, t]) * torch.tanh(z[:, t])
        N = torch.sigmoid(f[:, t]) * N + torch.exp(i[:, t])
        expected.append(torch.sigmoid(o[:, t]) * C / N)
    h, (_, c, n, m) = rnn(a["gates"], torch.zeros_like(a["recurrent"]), cell="slstm", output_final_state=True)
    assert_close(h, torch.stack(expected, 1))
    assert_close(c * m.exp(), C)
    assert_close(n * m.exp(), N)


@pytest.mark.parametrize("n", [0.0, 0.3, 1.0])
def test_slstm_normalisers_below_one_match_reference(n):
    a = tensors("slstm", 2, 40, 2, 5)
    a["n"] = torch.full_like(a["n"], n)
    a["n"][0] += 0.5
    assert_matches(run(a, "slstm"), run(a, "slstm", "reference"))


def test_slstm_without_past_ignores_c_and_m():
    a = tensors("slstm", 2, 20, 2, 3)
    a["n"] = torch.zeros_like(a["n"])
    h, _ = call(a, "slstm")
    other, _ = call(a, "slstm", c=a["c"] + 7, m=a["m"] + 1e4)
    assert torch.equal(h, other)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell):
    a = tensors(cell, 1, 3, 2, 2, seed=2)
    names = list(a)

    def function(*values):
        h, final = call(dict(zip(names, values)), cell)
        return h, *final

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in a.values()])


@pytest.mark.parametrize("cuts", [[1] * 40, [5, 0, 34, 1], [39, 1], [32, 8], [0, 11, 18, 11]], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_any_cut_with_states_is_the_uncut_result_with_gradients(cell, cuts):
    def whole_or_cut(sizes):
        a = {name: t.requires_grad_() for name, t in tensors(cell, 2, 40, 2, 3, seed=3).items()}
        state, outputs = {n: a[n] for n in a if n in NAMES}, []
        for gates in a["gates"].split(sizes, 1):
            h, final = call(a, cell, gates=gates, **state)
            state = dict(zip(NAMES, final))
            outputs.append(h)
        h = torch.cat(outputs, 1)
        loss = (h * torch.arange(3.0, dtype=torch.float64)).sum() + sum((t**2).sum() for t in state.values())
        loss.backward()
        return {"out": h} | state | {f"d_{n}": t.grad for n, t in a.items()}

    assert_matches(whole_or_cut(cuts), whole_or_cut([40]))


@pytest.mark.parametrize("cell", CELLS)
def test_single_tokens_are_the_whole_call_in_bfloat16(cell):
    a = tensors(cell, 2, 12, 2, 16, torch.bfloat16)
    expected, _ = call(a, cell)
    state, outputs = None, []
    for gates in a["gates"].split(1, 1):
        h, state = rnn(
            gates,
            a["recurrent"],
            cell=cell,
            initial_state=state or tuple(a[n] for n in NAMES if n in a),
            output_final_state=True,
        )
        outputs.append(h)
    assert torch.equal(torch.cat(outputs, 1), expected)


@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cell", CELLS)
def test_extreme_gates_are_finite_and_match_reference(cell, dtype, size):
    a = tensors(cell, 2, 40, 2, 3, dtype)
    signs = torch.randint(-1, 2, a["gates"].shape, generator=torch.Generator().manual_seed(4))
    a["gates"] = a["gates"] + size * signs
    for final_too in (False, True):
        actual, expected = (run(a, cell, backend, final_too) for backend in ("torch", "reference"))
        assert all(bool(torch.isfinite(t).all()) for t in actual.values())
        assert_matches(actual, expected, 1e-4 if dtype == torch.float32 else None)


@pytest.mark.parametrize("gate", range(4))
@pytest.mark.parametrize("sign", [-1, 1])
def test_slstm_with_one_saturated_gate_is_finite(gate, sign):
    a = tensors("slstm", 1, 70, 2, 3, torch.float32)
    a["gates"][:, :, gate] = sign * 1e4
    assert all(bool(torch.isfinite(t).all()) for t in run(a, "slstm").values())


@pytest.mark.parametrize("cell", CELLS)
def test_single_precision_holds_over_a_long_sequence(cell):
    a = tensors(cell, 1, 1000, 2, 8, torch.float32)
    a["gates"][:, :, 1 % NUM_GATES[cell]] += 4  # an LSTM that remembers
    assert_matches(run(a, cell), run({n: t.double() for n, t in a.items()}, cell))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_halves_are_computed_in_single_precision(cell, dtype):
    a = tensors(cell, 2, 40, 2, 8, dtype)
    actual, expected = run(a, cell), run({n: t.double() for n, t in a.items()}, cell, "reference")
    assert actual["h"].dtype == actual["d_gates"].dtype == actual["d_recurrent"].dtype == dtype
    assert_matches(actual, expected, RELATIVE[dtype])
    assert actual["final h"].dtype == torch.float32
    assert_close(actual["final h"], expected["final h"])


@pytest.mark.parametrize("cell", CELLS)
def test_one_double_argument_makes_the_state_double(cell):
    a = tensors(cell, 1, 5, 2, 3, torch.float32)
    h, final = call(a, cell, recurrent=a["recurrent"].double())
    assert h.dtype == torch.float32
    assert all(t.dtype == torch.float64 for t in final)


@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty_tensors_give_empty_results_and_zero_gradients(cell, shape):
    a = tensors(cell, *shape)
    actual = run(a, cell)
    assert actual["h"].shape == call(a, cell, "reference")[0].shape == shape
    for name in NAMES[: NUM_STATES[cell]]:
        assert torch.equal(actual[f"final {name}"], a[name])
    assert torch.equal(actual["d_recurrent"], torch.zeros_like(a["recurrent"]))


@pytest.mark.parametrize("cell", CELLS)
def test_non_contiguous_inputs(cell):
    a = tensors(cell, 2, 40, 2, 3)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in a.items()}
    assert not strided["gates"].is_contiguous()
    assert_matches(run(strided, cell), run(a, cell))


@pytest.mark.parametrize("cell", CELLS)
def test_future_does_not_reach_the_past(cell):
    a = tensors(cell, 1, 70, 2, 4)
    before, _ = call(a, cell)
    a["gates"][:, 40] += 3
    after, _ = call(a, cell)
    assert torch.equal(after[:, :40], before[:, :40])
    assert float((after - before)[:, 40].abs().max()) > 1e-3


@pytest.mark.parametrize("cell", CELLS)
def test_heads_do_not_see_each_other(cell):
    a = tensors(cell, 2, 40, 3, 4)
    h, _ = call(a, cell)
    one = {n: t[..., 1:2, :] for n, t in a.items() if n != "recurrent"}
    alone, _ = call({**one, "recurrent": a["recurrent"][:, 1:2]}, cell)
    assert_close(h[:, :, 1:2], alone)


@pytest.mark.parametrize("cell", CELLS)
def test_two_runs_agree_bit_for_bit(cell):
    a = tensors(cell, 3, 70, 2, 16, torch.float32)
    first, second = run(a, cell), run(a, cell)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_chunk_length_does_not_change_the_result(monkeypatch):
    a = tensors("slstm", 2, 50, 2, 3)
    expected = run(a, "slstm")
    monkeypatch.setattr(loop, "CHUNK_TOKENS", 7)
    assert_matches(run(a, "slstm"), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_changes_nothing(cell):
    a = tensors(cell, 2, 40, 2, 8, torch.float32)
    expected, (h, _) = run(a, cell), call(a, cell, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, (again, _) = run(a, cell), call(a, cell, "reference")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(h, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "rwkv"}, "cell must be 'slstm', 'lstm', 'gru' or 'elman'; got rwkv"),
        ({"backend": "cudnn"}, "backend must be"),
        ({"gates": torch.zeros(2, 5, 3, 2, 4)}, r"gates must be \[B, T, G, H, K\] with G=4 for lstm; got \(2, 5, 3, 2, 4\)"),
        ({"gates": torch.zeros(2, 5, 4, 8)}, "gates must be"),
        ({"gates": torch.zeros(2, 5, 4, 2, 4, dtype=torch.int64)}, "gates must be float64"),
        ({"recurrent": torch.zeros(4, 2, 4, 3)}, r"recurrent must be \[G, H, K, K\] = \[4, 2, 4, 4\]"),
        ({"recurrent": torch.zeros(4, 2, 4, 4, device="meta")}, "recurrent must be on cpu"),
        ({"initial_state": torch.zeros(2, 2, 4)}, "initial_state must be a tuple of 2 tensors for lstm"),
        ({"initial_state": (torch.zeros(2, 2, 4),)}, "initial_state must be a tuple of 2 tensors for lstm"),
        ({"initial_state": (torch.zeros(2, 2, 4), torch.zeros(2, 2, 3))}, r"initial_state\[1\] must be \[B, H, K\]"),
        ({"backend": "triton"}, "backend 'triton' needs CUDA tensors; got cpu"),
    ],
)  # fmt: skip
def test_rejects(change, message):
    arguments = {"gates": torch.zeros(2, 5, 4, 2, 4), "recurrent": torch.zeros(4, 2, 4, 4), "cell": "lstm", **change}
    with pytest.raises(ValueError, match=message):
        rnn(**arguments)
