"""The operators under rnn: traced and compiled whole, differentiable twice, little saved, few operations a token."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqengine.kernels.rnn import loop, ops
from seqengine.kernels.rnn.op import rnn
from seqengine.kernels.rnn.reference import NUM_GATES, NUM_STATES
from tests.kernels.largest_tensor import LargestTensor
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CELLS = list(NUM_GATES)


def tensors(cell, B, T, H, K, dtype=torch.float64):
    """Gates, recurrent weights, and states in one tensor, which could be those of any cell."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, NUM_GATES[cell], H, K), (NUM_GATES[cell], H, K, K), (NUM_STATES[cell], B, H, K)]
    gates, recurrent, state = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return gates, recurrent / K**0.5, state.abs() + 0.5


def function(gates, recurrent, state, cell, backend="torch"):
    h, final = rnn(gates, recurrent, cell=cell, initial_state=state.unbind(0), output_final_state=True, backend=backend)
    return h, torch.stack(final)


@pytest.mark.parametrize(("cell", "T"), [("slstm", 0), *((cell, 2) for cell in CELLS)])
def test_operators_keep_torchs_contract(cell, T):
    inputs = [t.requires_grad_() for t in tensors(cell, 1, T, 1, 2)]
    torch.library.opcheck(ops.rnn_forward, (*inputs, cell, False))
    h, final, starts = (t.detach() for t in ops.rnn_forward(*inputs, cell, False))
    upstream = (torch.randn_like(h).requires_grad_(), torch.randn_like(final).requires_grad_())
    torch.library.opcheck(ops.rnn_backward, (*upstream, *inputs, h, starts, cell, False))


@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck(cell):
    inputs = [t.requires_grad_() for t in tensors(cell, 1, 2, 1, 2)]
    assert torch.autograd.gradgradcheck(lambda *x: function(*x, cell), inputs)


@pytest.mark.parametrize("cell", CELLS)
def test_second_and_third_derivatives_match_reference(cell):
    found = {}
    for backend in ("torch", "reference"):
        inputs = [t.requires_grad_() for t in tensors(cell, 2, 5, 2, 3)]
        total = sum((t**2).sum() for t in function(*inputs, cell, backend))
        for _ in range(2):
            total = sum((t**2).sum() for t in torch.autograd.grad(total, inputs, create_graph=True))
        found[backend] = torch.autograd.grad(total, inputs)
    for actual, expected, name in zip(*found.values(), ("gates", "recurrent", "state")):
        assert_close(actual, expected, name)


def test_second_derivative_by_the_weights_alone():
    gates, recurrent, _ = tensors("gru", 2, 5, 2, 3)
    found = []
    for backend in ("torch", "reference"):
        weights = recurrent.clone().requires_grad_()
        h, _ = rnn(gates, weights, cell="gru", backend=backend)
        (first,) = torch.autograd.grad((h**2).sum(), weights, create_graph=True)
        found.append(torch.autograd.grad((first**2).sum(), weights)[0])
    assert_close(*found)


@pytest.mark.parametrize("cell", CELLS)
def test_compiles_whole_forward_and_backward(cell):
    inputs = tensors(cell, 2, 40, 2, 3, torch.float32)
    eager, compiled = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))

    def loss(*x):
        h, final = function(*x, cell)
        return h.sin().sum() + final.sum()

    expected = loss(*eager)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled)
    assert_close(actual, expected)
    expected.backward()
    actual.backward()
    for a, b in zip(compiled, eager):
        assert_close(a.grad, b.grad)


def test_compiled_once_for_all_lengths():
    compiled = torch.compile(lambda *x: function(*x, "slstm")[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (3, 40):
        inputs = tensors("slstm", 2, T, 2, 3)
        assert_close(compiled(*inputs), function(*inputs, "slstm")[0])


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        h, state = rnn(
            torch.empty(2, 70, 3, 4, 5, dtype=torch.bfloat16),
            torch.empty(3, 4, 5, 5),
            cell="gru",
            output_final_state=True,
        )
        assert (h.shape, h.dtype) == ((2, 70, 4, 5), torch.bfloat16)
        assert [(t.shape, t.dtype) for t in state] == [((2, 4, 5), torch.float32)]


def saved_bytes(function):
    """Bytes that autograd keeps for the backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())


@pytest.mark.parametrize("cell", CELLS)
def test_saves_its_arguments_h_and_a_state_a_chunk(cell):
    T = 10 * loop.CHUNK_TOKENS
    gates, recurrent, state = (t.requires_grad_() for t in tensors(cell, 2, T, 2, 8, torch.float32))
    h_bytes = gates.nbytes // NUM_GATES[cell]
    own = gates.nbytes + recurrent.nbytes + h_bytes + 11 * state.nbytes
    assert saved_bytes(lambda: function(gates, recurrent, state, cell)) == own
    assert 10 * state.nbytes <= h_bytes / 8
    if cell == "slstm":
        assert saved_bytes(lambda: function(gates, recurrent, state, cell, "reference")) > 3 * own


@pytest.mark.parametrize("cell", CELLS)
def test_never_builds_the_gates_of_all_tokens(cell):
    inputs = tensors(cell, 2, 20 * loop.CHUNK_TOKENS, 2, 4)
    with LargestTensor() as largest:
        h, final, starts = loop.forward(*inputs, cell)
    assert largest.elements <= h.numel()
    upstream = torch.ones_like(h), torch.ones_like(final)
    with LargestTensor() as largest:
        loop.backward(*upstream, *inputs[:2], h, starts, cell)
    assert largest.elements <= max(inputs[0].numel(), h.numel())  # the gradient of the gates


class Operations(TorchDispatchMode):
    """Counts the operations that compute something: all but views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(function):
    with Operations() as counted:
        function()
    return counted.count


@pytest.mark.parametrize(
    ("cell", "forward", "backward"), [("slstm", 13, 11), ("lstm", 8, 7), ("gru", 6, 3), ("elman", 2, 2)]
)
def test_a_token_costs_few_operations(cell, forward, backward):
    """Counted between two lengths of whole chunks; the work for a whole chunk counts once in CHUNK_TOKENS."""

    def count(T):
        inputs = tensors(cell, 2, T, 2, 4)
        h, final, starts = loop.forward(*inputs, cell)
        upstream = torch.ones_like(h), torch.zeros_like(final)
        return (
            operations(lambda: loop.forward(*inputs, cell)),
            operations(lambda: loop.backward(*upstream, *inputs[:2], h, starts, cell)),
        )

    few, many = count(2 * loop.CHUNK_TOKENS), count(4 * loop.CHUNK_TOKENS)
    each = [(b - a) / (2 * loop.CHUNK_TOKENS) for a, b in zip(few, many)]
    assert each[0] <= forward + 1
    assert each[1] <= backward + 2
