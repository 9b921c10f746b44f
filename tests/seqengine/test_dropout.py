"""Dropout by token: the same mask for any split, order, dtype and block; a fair coin; nothing of it is saved."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import seqengine.dropout as module
from seqengine.dropout import keep_mask, token_dropout
from seqengine.parallel.api import SequenceContext
from seqengine.parallel.layout import offsets, split_sizes

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
KEYS = torch.tensor([11, -5, 2**63 - 1])


def mix(x):
    """The finaliser of splitmix64 on Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dropped(x, p=0.3, keys=KEYS, positions=None, site=2):
    positions = torch.arange(x.shape[1]) if positions is None else positions
    return token_dropout(x, p, keys, positions, site, training=True)


def parts(T, kind):
    """The positions of every rank."""
    if kind == "zigzag":
        bounds = offsets(split_sizes(T, 3))
        return [SequenceContext(None, rank, bounds).zigzag().positions() for rank in range(3)]
    sizes = {1: [T], 2: split_sizes(T, 2), 3: split_sizes(T, 3), "uneven": [1, 0, T - 8, 7]}[kind]
    bounds = offsets(sizes)
    return [SequenceContext(None, rank, bounds).positions() for rank in range(len(sizes))]


def test_the_mask_is_the_hash_of_key_site_position_and_channel():
    positions, D, p, site = torch.tensor([0, 7, 2**40]), 3, 0.4, 5
    mask = keep_mask(torch.Size((3, 3, D)), p, KEYS, positions, site)
    for b, key in enumerate(KEYS.tolist()):
        window = mix((key + (site + 1) * GOLDEN) & WORD)
        for t, position in enumerate(positions.tolist()):
            token = mix((window + position * GOLDEN) & WORD)
            for d in range(D):
                bits = mix(token ^ mix((d * GOLDEN + 1) & WORD))
                assert bool(mask[b, t, d]) == (bits >> 40 >= int(p * 2**24))


@pytest.mark.parametrize("kind", [1, 2, 3, "uneven", "zigzag"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_split_draws_the_masks_of_the_whole_bit_for_bit(kind, dtype):
    x, dy = normal(3, 41, 5, dtype=dtype).requires_grad_(), normal(3, 41, 5, dtype=dtype, seed=1)
    whole = dropped(x)
    (dx,) = torch.autograd.grad(whole, x, dy)
    mask = keep_mask(x.shape, 0.3, KEYS, torch.arange(41), 2)
    assert torch.equal(whole != 0, mask)
    assert torch.equal(dx, torch.where(mask, dy / 0.7, 0.0))
    seen = 0
    for positions in parts(41, kind):
        part = x.detach()[:, positions].requires_grad_()
        y = dropped(part, positions=positions)
        assert torch.equal(y, whole[:, positions])
        assert torch.equal(torch.autograd.grad(y, part, dy[:, positions])[0], dx[:, positions])
        seen += len(positions)
    assert seen == 41


def test_blocks_of_tokens_change_nothing(monkeypatch):
    x = normal(3, 41, 5)
    expected = dropped(x)
    for elements in (1, 15, 150, 41 * 15):
        monkeypatch.setitem(module.BLOCK_ELEMENTS, "cpu", elements)
        assert torch.equal(dropped(x), expected)
        assert torch.equal(dropped(x.transpose(1, 2).contiguous().transpose(1, 2)), expected)


def test_the_mask_is_not_saved_but_drawn_again(poisoned_memory, monkeypatch):
    monkeypatch.setitem(module.BLOCK_ELEMENTS, "cpu", 300)
    x = normal(3, 100, 8).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = dropped(x)
    assert sum(kept) == 8 * (3 + 100)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx != 0, y != 0)
    assert torch.equal(dx[dx != 0], torch.full_like(dx[dx != 0], 1 / 0.7))


def test_recomputing_under_activation_checkpointing_draws_the_same_mask():
    x = normal(3, 20, 4).requires_grad_()

    def f(x):
        return dropped(dropped(x).sin(), site=3)

    (expected,) = torch.autograd.grad(f(x).sum(), x)
    again = checkpoint(f, x, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], expected)


def test_derivatives_of_any_order_are_right():
    x = normal(3, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(dropped, (x,))
    assert torch.autograd.gradgradcheck(dropped, (x,))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_the_rate_is_right_within_the_error_of_a_coin(p):
    """Five standard deviations; of all elements, of every window, of every channel and of every position."""
    shape = torch.Size((8, 500, 256))
    lost = ~keep_mask(shape, p, torch.arange(8), torch.arange(500), 0)
    for dims in ((0, 1, 2), (1, 2), (0, 1), (0, 2)):
        rate = lost.double().mean(dims)
        n = lost.numel() / rate.numel()
        assert float((rate - p).abs().max()) < 5 * math.sqrt(p * (1 - p) / n) + 2**-24


def test_masks_of_other_sites_keys_positions_and_channels_are_independent():
    """Neighbouring ones are the hardest: correlations stay within five standard deviations of none."""
    T, D = 1000, 256

    def coins(key=3, site=0, first=0, step=1, channels=slice(0, D)):
        positions = first + step * torch.arange(T)
        mask = keep_mask(torch.Size((1, T, 2 * D)), 0.5, torch.tensor([key]), positions, site)
        return mask[0, :, channels].double() - 0.5

    base = coins()
    others = {
        **{f"key {key}": coins(key=key) for key in (2, 4, -3, 3 + 2**32, 2**62)},
        **{f"site {site}": coins(site=site) for site in (1, 2, 63)},
        **{f"position {shift}": coins(first=shift) for shift in (1, 2, 64, 2**20, 2**40)},
        **{f"channel {shift}": coins(channels=slice(shift, D + shift)) for shift in (1, 2, 64)},
        "other sequences of positions": coins(first=10**6, step=2),
        "the next site and the position before": coins(site=1, first=-1),
        "the next key and site": coins(key=4, site=1),
    }
    for what, other in others.items():
        assert abs(float((base * other).mean())) * 4 < 5 / math.sqrt(T * D), what


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_torch_compile_traces_it_whole():
    x, positions = normal(3, 41, 5).requires_grad_(), torch.arange(41)

    def f(x, keys, positions):
        return token_dropout(x, 0.3, keys, positions, 2, training=True)

    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x, KEYS, positions)
    assert torch.equal(y, dropped(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(dropped(x).sum(), x)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_mask_does_not_depend_on_the_device():
    shape, positions = torch.Size((3, 1000, 64)), torch.arange(1000)
    here = keep_mask(shape, 0.3, KEYS, positions, 2)
    assert torch.equal(keep_mask(shape, 0.3, KEYS.cuda(), positions.cuda(), 2).cpu(), here)


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 3), (3, 1, 1), (3, 4, 0)])
def test_odd_sizes(shape):
    x = normal(*shape).requires_grad_()
    y = dropped(x, keys=torch.arange(shape[0]))
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_without_a_chance_or_outside_training_x_is_untouched():
    x = normal(3, 4, 2)
    assert dropped(x, p=0.0) is x
    assert token_dropout(x, 0.3, KEYS, torch.arange(4), 0, training=False) is x


def test_a_certain_drop_is_zero_and_finite():
    x = normal(3, 4, 2).requires_grad_()
    y = dropped(x, p=1.0)
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, r"p must be from 0 to 1; got 1.5"),
        ({"p": float("nan")}, r"p must be from 0 to 1; got nan"),
        ({"keys": torch.arange(2)}, r"keys must have one number for each of the 3 windows; got \(2,\)"),
        ({"positions": torch.arange(5)}, r"positions must be those of the 4 tokens; got \(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dropped(normal(3, 4, 2), **options)
