"""Attention against its definition in loops; caches that grow, slide, and differ in length from row to row."""

import math

import pytest
import torch

from seqengine.errors import InputError
from seqengine.mixers.attention import Attention, AttentionConfig
from seqengine.mixers.mixer import START, Place
from seqengine.mixers.rotary import Rotary
from seqengine.parallel.context import SequenceContext
from seqengine.states import select_rows, stack_states
from tests.ranks import run_ranks
from tests.tolerances import assert_close

D = 12


def make(causal=True, **settings):
    torch.manual_seed(0)
    settings = {"num_heads": 3, "num_kv_heads": 1, **settings}
    mixer = Attention(AttentionConfig(**settings), Place(D, 64, causal=causal)).double()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return mixer


def inputs(batch, tokens, seed=1):
    return torch.randn(batch, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turned(x, position, config, width):
    """x [K] at a position, pair by pair."""
    dims = config.rotary_dim or width
    result = list(x.unbind())
    for i in range(dims // 2):
        a, b = (2 * i, 2 * i + 1) if config.rotary_interleaved else (i, i + dims // 2)
        angle = position / config.rotary_scale * config.rotary_base ** (-2 * i / dims)
        result[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        result[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return torch.stack(result)


def definition(mixer, config, x, causal=True):
    B, T, _ = x.shape
    H, G = config.num_heads, config.num_kv_heads or config.num_heads
    K = D // H
    rows = []
    for b in range(B):
        q, k, v = [], [], []
        for t in range(T):
            qkv = mixer.qkv_proj.weight @ x[b, t] + (mixer.qkv_proj.bias if config.bias else 0)
            heads = [qkv[i * K : (i + 1) * K] for i in range(H + 2 * G)]
            turn = (lambda z, t=t: turned(z, t, config, K)) if config.rotary else (lambda z: z)
            q.append([turn(z) for z in heads[:H]])
            k.append([turn(z) for z in heads[H : H + G]])
            v.append(heads[H + G :])
        for t in range(T):
            out = []
            for h in range(H):
                g = h // (H // G)
                seen = [s for s in range(T) if (s <= t or not causal)]
                if config.window:
                    seen = [s for s in seen if abs(t - s) < config.window]
                scores = torch.stack([q[t][h] @ k[s][g] / math.sqrt(K) for s in seen])
                out.append(torch.softmax(scores, 0) @ torch.stack([v[s][g] for s in seen]))
            y = mixer.out_proj.weight @ torch.cat(out)
            rows.append(y + mixer.out_proj.bias if config.out_bias else y)
    return torch.stack(rows).view(B, T, D)


CONFIGS = {
    "multi-query": {},
    "grouped, half turned": {"num_heads": 6, "num_kv_heads": 3, "rotary_dim": 2, "bias": False},
    "plain heads, interleaved": {"num_kv_heads": None, "rotary_interleaved": True, "rotary_base": 100.0},
    "interpolated": {"rotary_scale": 3.5, "out_bias": False},
    "no positions": {"rotary": False, "num_heads": 12, "num_kv_heads": 4},
    "window": {"window": 3},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_its_definition_with_every_gradient(name, causal):
    mixer, x = make(causal, **CONFIGS[name]), inputs(2, 7).requires_grad_()
    config = AttentionConfig(**{"num_heads": 3, "num_kv_heads": 1, **CONFIGS[name]})
    y, expected = mixer(x)[0], definition(mixer, config, x, causal)
    assert_close(y, expected, name, 1e-10)
    weights = torch.randn(y.shape, dtype=y.dtype)
    wanted = {"x": x, **dict(mixer.named_parameters())}
    found = torch.autograd.grad((y * weights).sum(), list(wanted.values()))
    for key, a, b in zip(
        wanted, found, torch.autograd.grad((expected * weights).sum(), list(wanted.values())), strict=True
    ):
        # That of the keys' bias without positions is zero but for rounding: a constant added to all scores.
        assert float((a - b).abs().max()) <= 1e-10 * max(1.0, float(b.abs().max())), key


def cut(mixer, x, cuts):
    state, outputs = START, []
    for chunk in x.split(cuts, dim=1):
        y, state = mixer(chunk, state=state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("cuts", [[1] * 17, [6, 11], [2, 1, 9, 5], [17], [3, 0, 14]], ids=str)
def test_caches_give_the_uncut_result_and_hold_no_more_than_the_window(window, cuts):
    mixer, x = make(window=window), inputs(2, 17)
    with torch.no_grad():
        y, state = cut(mixer, x, cuts)
        assert_close(y, mixer(x)[0], tolerance=1e-10)
    assert state.keys.shape == state.values.shape == (2, min(17, window or 17), 1, 4)
    assert state.length.tolist() == [17, 17]
    assert state.length.dtype == torch.int64


@pytest.mark.parametrize("window", [None, 2, 5, 30])
@pytest.mark.parametrize("after", [[1] * 6, [6], [2, 4]], ids=str)
@pytest.mark.parametrize("filling", [0.0, math.nan])
def test_rows_of_different_length_go_on_together(window, after, filling):
    mixer, tokens = make(window=window), [3, 9, 1, 4]
    rows = [inputs(1, n + 6, seed=n) for n in tokens]
    with torch.no_grad():
        states = [mixer(x[:, :n], state=START)[1] for x, n in zip(rows, tokens, strict=True)]
        state = stack_states(states)
        empty = torch.arange(state.keys.shape[1]) >= torch.tensor(tokens)[:, None]
        state.keys[empty], state.values[empty] = filling, filling
        outputs = []
        for chunk in torch.cat([x[:, n:] for x, n in zip(rows, tokens, strict=True)]).split(after, dim=1):
            y, state = mixer(chunk, state=state)
            outputs.append(y)
        together = torch.cat(outputs, dim=1)
        for i, (x, n) in enumerate(zip(rows, tokens, strict=True)):
            assert_close(together[i : i + 1], mixer(x)[0][:, n:], f"row {i}", 1e-10)
        assert state.length.tolist() == [n + 6 for n in tokens]
        more = inputs(1, 5, seed=20)
        shortest = select_rows(state, torch.tensor([2]))
        alone = mixer(more, state=shortest)[0]
        assert_close(alone, mixer(torch.cat([rows[2], more], dim=1))[0][:, 7:], "a row taken out", 1e-10)


def test_gradients_through_rows_of_different_length():
    mixer = make(window=4)
    rows = [inputs(1, 8, seed=n).requires_grad_() for n in range(2)]
    tokens = [2, 5]
    _, expected = [mixer(x)[0] for x in rows], []
    for x, n in zip(rows, tokens, strict=True):
        expected.append(torch.autograd.grad(mixer(x)[0][:, n : n + 3].square().sum(), x)[0])
    state = stack_states([mixer(x[:, :n], state=START)[1] for x, n in zip(rows, tokens, strict=True)])
    chunk = torch.cat([x[:, n : n + 3] for x, n in zip(rows, tokens, strict=True)])
    first, state = mixer(chunk[:, :2], state=state)
    second, _ = mixer(chunk[:, 2:], state=state)
    found = torch.autograd.grad(first.square().sum() + second.square().sum(), rows)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, tolerance=1e-10)


def test_scores_a_million_tokens_on_are_those_of_the_start():
    rotary = Rotary(8)
    q, k = torch.randn(2, 1, 50, 3, 8, generator=torch.Generator().manual_seed(2))
    near, far = torch.arange(50), torch.arange(50) + 10**6
    scores = [torch.einsum("bthk,bshk->bhts", *rotary(positions, q, k)) for positions in (near, far)]
    assert_close(scores[1], scores[0])


def test_frequencies_of_the_weights_survive_saving_and_every_cast():
    mixer, other = make(), make()
    rounded = mixer.rotary.frequencies.bfloat16().double() * 1.5
    mixer.rotary.set_frequencies(rounded)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other.bfloat16().float().rotary.frequencies, rounded)


def _both_ways_on_rank(group, bounds, window):
    ctx = SequenceContext(group, group.rank(), bounds)
    with torch.no_grad():
        return make(causal=False, window=window)(ctx.split(inputs(2, bounds[-1]), 1), ctx=ctx)[0]


@pytest.mark.parametrize("window", [None, 5])
def test_parts_of_attention_to_both_sides_are_the_whole(window):
    parts = run_ranks(3, _both_ways_on_rank, (0, 7, 8, 19), window)
    with torch.no_grad():
        assert_close(torch.cat(parts, dim=1), make(causal=False, window=window)(inputs(2, 19))[0], tolerance=1e-10)


def _with_state_on_ranks(group):
    ctx = SequenceContext.even(group, 6)
    with pytest.raises(ValueError, match="a state can be carried only on one rank"):
        make()(inputs(1, ctx.local_tokens), state=START, ctx=ctx)
    return True


def test_bad_input_is_named():
    assert all(run_ranks(2, _with_state_on_ranks))
    with pytest.raises(ValueError, match="only with causal attention"):
        make(causal=False)(inputs(1, 3), state=START)
    with pytest.raises(ValueError, match="num_kv_heads = 2 must divide num_heads = 3"):
        AttentionConfig(num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match="rotary_dim = 3 must be even"):
        AttentionConfig(rotary_dim=3)
    with pytest.raises(InputError, match=r"num_heads = 5 must divide model\.d_model = 12"):
        make(num_heads=5, num_kv_heads=None)
    with pytest.raises(InputError, match=r"rotary_dim = 6 must be even and at most d_model / num_heads = 4"):
        make(rotary_dim=6)
