"""Retention against its definition: a decayed sum over all pairs of tokens."""

import math

import pytest
import torch

from seqengine.errors import InputError
from seqengine.mixers.mixer import START, Place
from seqengine.mixers.retention import Retention, RetentionConfig, RetentionState
from seqengine.parallel.context import SequenceContext
from tests.ranks import run_ranks
from tests.seqengine.mixers.test_contract import close, gradients
from tests.seqengine.mixers.tiny import with_far_weights

D = 12


def mixer_and_inputs(T=9, **settings):
    return with_far_weights(Retention(RetentionConfig(**settings), Place(D, 16)), D, T, 1 / 3)


def turned(x, position, base):
    """x [B, K]: channels i and i + K / 2 as a complex number, times e^(i position frequency)."""
    half = x.shape[1] // 2
    angle = position * torch.tensor([base ** (-i / half) for i in range(half)], dtype=torch.float64)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angle)
    return torch.cat([z.real, z.imag], dim=1)


def definition(m, x, c, first=0):
    H, K, V = c.num_heads, int(D * c.expand_k) // c.num_heads, int(D * c.expand_v) // c.num_heads
    q, k, v = (x @ m.inputs.proj.weight.T).split([H * K, H * K, H * V], dim=-1)
    heads = []
    for h in range(H):
        decay, rows = 1 - 2 ** (-5 - h), []
        for t in range(x.shape[1]):
            query = turned(q[:, t, h * K : (h + 1) * K], first + t, c.rotary_base)
            o = 0
            for s in range(t + 1):
                key = turned(k[:, s, h * K : (h + 1) * K], first + s, c.rotary_base)
                weight = decay ** (t - s) * (query * key).sum(-1) / math.sqrt(K)
                o = o + weight[:, None] * v[:, s, h * V : (h + 1) * V]
            rows.append(o)
        o = torch.stack(rows, dim=1)
        o = o / torch.sqrt(o.square().mean(dim=-1, keepdim=True) + c.norm_eps)
        heads.append(o if m.norm.weight is None else o * m.norm.weight)
    o = torch.cat(heads, dim=-1)
    if c.output_gate:
        z = x @ m.gate.weight.T
        o = o * z / (1 + torch.exp(-z))
    return o @ m.out_proj.weight.T


@pytest.mark.parametrize(
    "settings",
    [
        {"num_heads": 3},
        {"num_heads": 1, "expand_v": 1.0, "rotary_base": 50.0},
        {"num_heads": 2, "output_gate": False, "norm_weight": False},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_definition(settings):
    mixer, x = mixer_and_inputs(**settings)
    expected, (y, _) = definition(mixer, x, RetentionConfig(**settings)), mixer(x)
    close(y, expected)
    found = gradients(mixer, x, y)
    for key, value in gradients(mixer, x, expected).items():
        close(found[key], value, key)


def test_state_counts_the_tokens_and_rows_may_differ():
    mixer, x = mixer_and_inputs(T=12, num_heads=3)
    with torch.no_grad():
        whole, _ = mixer(x)
        _, long = mixer(x[:1, :9], state=START)
        _, short = mixer(x[1:, :4], state=START)
        assert long.length.tolist() == [9]
        assert long.length.dtype == torch.int64
        both = RetentionState(*(torch.cat(pair) for pair in zip(long, short, strict=True)))
        y, after = mixer(torch.stack([x[0, 9:], x[1, 4:7]]), state=both)
    close(y, torch.stack([whole[0, 9:], whole[1, 4:7]]))
    assert after.length.tolist() == [12, 7]


def _state_on_rank(group, bounds):
    mixer, x = mixer_and_inputs(T=bounds[-1] + 5, num_heads=3)
    ctx = SequenceContext(group, group.rank(), bounds)
    with torch.no_grad():
        _, state = mixer(x[:, :5], state=START)
        y, after = mixer(ctx.split(x[:, 5:], 1), state=state, ctx=ctx)
    return y, after


def test_positions_go_on_over_a_state_and_over_ranks():
    mixer, x = mixer_and_inputs(T=12, num_heads=3)
    results = run_ranks(2, _state_on_rank, (0, 3, 7))
    whole, state = mixer(x, state=START)
    close(torch.cat([y for y, _ in results], dim=1), whole[:, 5:])
    for _, after in results:
        assert after.length.tolist() == [12, 12]
        close(after.recurrent, state.recurrent)


def test_projections_begin_by_the_published_rule():
    mixer = Retention(RetentionConfig(), Place(256, 16))
    mixer.initialise()
    q, k, v = mixer.inputs.proj.weight.detach().split(mixer.inputs.widths)
    for weight in (q, k, v, mixer.gate.weight.detach()):
        bound = 2**-2.5 * math.sqrt(6 / sum(weight.shape))
        assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-3)


def test_widths_that_do_not_fit_are_named():
    with pytest.raises(
        InputError, match=r"model\.mixers\.retention: expand_k \* model\.d_model / num_heads = 3 must be even"
    ):
        Retention(RetentionConfig(num_heads=4), Place(D, 16))
    with pytest.raises(
        InputError, match=r"expand_k \* model\.d_model = 12 channels must be a multiple of num_heads = 8"
    ):
        Retention(RetentionConfig(), Place(D, 16))
