"""What every mixer promises: the whole = chunks = token by token = parts over ranks, and that it trains."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from seqengine.mixers.mixer import START, Shared
from seqengine.mixers.registry import MIXERS
from seqengine.parallel.context import SequenceContext
from tests.ranks import run_ranks
from tests.seqengine.mixers.tiny import MAX_LEN, D, inputs, make
from tests.tolerances import assert_close

TOLERANCE = 1e-10
NAMES = sorted(MIXERS)
each_mixer = pytest.mark.parametrize("name", NAMES)


def close(got, expected, what=""):
    assert_close(got, expected, what, TOLERANCE)


def in_chunks(mixer, x, cuts):
    state, outputs = START, []
    for chunk in x.split(cuts, dim=1):
        y, state = mixer(chunk, state=state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def gradients(mixer, x, y):
    """Of a fixed weighting of y: of x and of every parameter."""
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
    parameters = dict(mixer.named_parameters())
    found = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()], allow_unused=True)
    return dict(zip(["x", *parameters], found, strict=True))


@each_mixer
@pytest.mark.parametrize("cuts", [[1] * 23, [7, 16], [22, 1], [5, 1, 9, 8]], ids=str)
def test_any_cut_with_states_is_the_whole(name, cuts):
    mixer, x = make(name), inputs(2, 23)
    with torch.no_grad():
        whole, none = mixer(x)
        chunks, _ = in_chunks(mixer, x, cuts)
    assert none is None
    close(chunks, whole)


@each_mixer
def test_gradients_through_states_are_those_of_the_whole(name):
    mixer, x = make(name), inputs(2, 17).requires_grad_()
    expected = gradients(mixer, x, mixer(x)[0])
    found = gradients(mixer, x, in_chunks(mixer, x, [6, 1, 10])[0])
    for key, value in expected.items():
        assert value is not None, f"{name}: {key} takes no part in the output"
        close(found[key], value, key)


def rows(state, index):
    if isinstance(state, torch.Tensor):
        return state[index]
    if isinstance(state, Shared):
        return state
    parts = [rows(part, index) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


@each_mixer
def test_rows_of_a_state_are_states_of_those_rows(name):
    mixer, x = make(name), inputs(3, 12)
    with torch.no_grad():
        _, state = mixer(x[:, :8], state=START)
        together, _ = mixer(x[:, 8:], state=state)
        alone, _ = mixer(x[1:2, 8:], state=rows(state, slice(1, 2)))
    close(alone, together[1:2])


@each_mixer
def test_no_output_knows_a_later_input(name):
    mixer, x = make(name), inputs(1, 20)
    other = x.clone()
    other[:, 13:] += 1.0
    with torch.no_grad():
        a, b = mixer(x)[0], mixer(other)[0]
    close(b[:, :13], a[:, :13])
    assert float((a[:, 13] - b[:, 13]).abs().max()) > 1e-6


def _on_rank(group, bounds):
    ctx = SequenceContext(group, group.rank(), bounds)
    found = {}
    for name in NAMES:
        mixer, x = make(name), inputs(2, bounds[-1])
        x = ctx.split(x, 1).clone().requires_grad_()
        y, _ = mixer(x, ctx=ctx)
        weights = torch.randn(2, bounds[-1], D, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
        parameters = dict(mixer.named_parameters())
        wanted = [x, *parameters.values()]
        got = torch.autograd.grad((y * ctx.split(weights, 1)).sum(), wanted, allow_unused=True)
        found[name] = (y.detach(), dict(zip(["x", *parameters], got, strict=True)))
    return found


@pytest.mark.parametrize("bounds", [(0, 9, 20), (0, 1, 12, 23), (0, 7, 7, 16)], ids=str)
def test_parts_over_ranks_are_the_whole(bounds):
    results = run_ranks(len(bounds) - 1, _on_rank, bounds)
    for name in NAMES:
        mixer, x = make(name), inputs(2, bounds[-1]).requires_grad_()
        whole, _ = mixer(x)
        close(torch.cat([r[name][0] for r in results], dim=1), whole.detach(), name)
        for key, value in gradients(mixer, x, whole).items():
            parts = [r[name][1][key] for r in results]
            parts = [part for part in parts if part is not None]
            close(torch.cat(parts, dim=1) if key == "x" else sum(parts), value, f"{name}: {key}")


@each_mixer
def test_compiled_is_eager(name):
    mixer, x = make(name), inputs(2, 16).requires_grad_()
    expected = mixer(x)[0]
    y = torch.compile(mixer, backend="aot_eager")(x)[0]
    close(y, expected)
    found = gradients(mixer, x, y)
    for key, value in gradients(mixer, x, expected).items():
        close(found[key], value, key)
    torch._dynamo.reset()


@each_mixer
def test_checkpointed_is_plain(name):
    mixer, x = make(name), inputs(2, 16).requires_grad_()
    expected = gradients(mixer, x, mixer(x)[0])
    found = gradients(mixer, x, checkpoint(lambda z: mixer(z)[0], x, use_reentrant=False))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@each_mixer
def test_saved_weights_are_the_mixer(name):
    mixer, other, x = make(name), make(name, seed=5), inputs(1, 9)
    with torch.no_grad():
        assert not torch.equal(mixer(x)[0], other(x)[0])
        other.load_state_dict(copy.deepcopy(mixer.state_dict()))
        assert torch.equal(mixer(x)[0], other(x)[0])


@each_mixer
def test_bf16_autocast_is_near_float64(name):
    mixer, x = make(name), inputs(2, MAX_LEN)
    with torch.no_grad():
        exact, _ = mixer(x)
    single = mixer.float()
    z = x.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = single(z)
    y.float().square().sum().backward()
    error = float((y.detach().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-6))
    assert error < 0.05
    assert all(torch.isfinite(p.grad).all() for p in single.parameters() if p.grad is not None)
    assert torch.isfinite(z.grad).all()


@each_mixer
@pytest.mark.parametrize("shape", [(0, 5), (2, 1)], ids=str)
def test_empty_batch_and_single_token(name, shape):
    y, _ = make(name)(inputs(*shape))
    assert y.shape == (*shape, D)
