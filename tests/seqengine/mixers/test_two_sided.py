"""Convolutional mixers that see what follows: against both filters written out, over ranks, and learning.

Models of them are compiled, saved and split with those of all other mixers (`tests/seqengine/test_models.py`).
"""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection
from seqengine.data.masking import mask_tokens
from seqengine.data.tokenizer import MASK, A
from seqengine.mixers.mixer import START, Place
from seqengine.mixers.registry import MIXERS
from seqengine.mixers.two_sided import two_sided_conv
from seqengine.model import build_model
from seqengine.optim import group_settings
from seqengine.parallel.context import SequenceContext
from tests.ranks import run_ranks
from tests.seqengine.mixers.test_contract import close, gradients
from tests.seqengine.mixers.tiny import MAX_LEN, SETTINGS, D, inputs
from tests.seqengine.mixers.tiny import make as make_tiny
from tests.tolerances import assert_close

NAMES = ["hyena", "long_conv", "s4_ptd", "s4d", "sgconv"]
SECOND_FILTER = {
    "hyena": ("filter.backward_layers", "filter.backward_output"),
    "long_conv": ("taps_backward",),
    "s4_ptd": ("ssm.C_backward",),
    "s4d": ("ssm.C_backward",),
    "sgconv": ("pieces_backward",),
}
each_mixer = pytest.mark.parametrize("name", NAMES)


def make(name, seed=0):
    return make_tiny(name, causal=False, seed=seed)


def sine_network(mixer, layers, output, length):
    filter = mixer.filter
    h = filter.z[:length]
    for layer in layers:
        h = torch.sin(filter.frequency * (h @ layer.weight.T + layer.bias))
    window = torch.exp(-filter.decay[:, None] * filter.z[:length, 0]) + filter.shift
    return (output.weight @ h.T) * window


def hyena_taps(mixer, length):
    """[2 convolutions, 2 directions, D, length]"""
    networks = (
        (mixer.filter.hidden_layers, mixer.filter.output),
        (
            mixer.filter.backward_layers,
            mixer.filter.backward_output,
        ),
    )
    both = [sine_network(mixer, *network, length).unflatten(0, (2, D)) for network in networks]
    return torch.stack(both, dim=1)


def long_conv_taps(mixer, length):
    directions = []
    for taps in (mixer.taps, mixer.taps_backward):
        padded = F.pad(taps, (1, 1))
        k = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
        k = torch.where(k > 0.003, k - 0.003, torch.where(k < -0.003, k + 0.003, 0 * k))
        directions.append(k[:, :length])
    return directions


def sgconv_taps(mixer, length):
    directions = []
    for pieces in (mixer.pieces, mixer.pieces_backward):
        parts, last = [], len(pieces) - 1
        for i, piece in enumerate(pieces):
            factor = 2 ** max(0, i - 1)
            stretched = F.interpolate(piece[None], scale_factor=factor, mode="linear")[0] if factor > 1 else piece
            parts.append(stretched * 2.0 ** (last - i))
        k = torch.cat(parts, dim=1)
        directions.append((k / first_norm(k))[:, :length])
    return directions


def first_norm(k):
    """Of the filter as it is at first: a number, in float32 as the buffer was made."""
    return k.detach().float().norm(dim=1, keepdim=True).double()


def ssm_taps(mixer, length):
    ssm, factor = mixer.ssm, {True: 2, False: 1}[type(mixer).__name__ == "S4D"]
    dt = ssm.log_step.exp()[:, None]
    pole = dt * torch.complex(-ssm.log_decay.exp(), ssm.frequency)
    gain = (torch.exp(pole) - 1) / pole * dt * torch.view_as_complex(ssm.B)
    lags = torch.arange(length, dtype=torch.float64)
    return [
        factor * torch.einsum("hm,hml->hl", gain * torch.view_as_complex(C), torch.exp(pole[..., None] * lags)).real
        for C in (ssm.C, ssm.C_backward)
    ]


def both_sides(k, k_backward, skip, x):
    """x [B, D, T]: every output a sum over every token, before, at and after it."""
    T, columns = x.shape[2], []
    for t in range(T):
        total = skip[:, None] * x[..., t : t + 1]
        for s in range(T):
            tap = k[:, t - s] if s <= t else k_backward[:, s - t - 1]
            total = total + tap[:, None] * x[..., s : s + 1]
        columns.append(total)
    return torch.cat(columns, dim=2)


def definition(name, mixer, x):
    T = x.shape[1]
    if name == "hyena":
        u = (x @ mixer.in_proj.weight.T + mixer.in_proj.bias).transpose(1, 2)
        w = mixer.short_filter_weight
        u = sum(F.pad(w[:, s, None] * u, (s, 0))[..., :T] for s in range(w.shape[1])) + mixer.short_filter_bias[:, None]
        first, second, third, v = u.split(D, dim=1)
        for (k, k_backward), gate, skip in zip(
            hyena_taps(mixer, T), (third, second), mixer.filter_skip.split(D), strict=True
        ):
            v = both_sides(k, k_backward, skip, gate * v)
        return (first * v).transpose(1, 2) @ mixer.out_proj.weight.T + mixer.out_proj.bias
    of = {"long_conv": long_conv_taps, "sgconv": sgconv_taps}.get(name, ssm_taps)
    y = both_sides(*of(mixer, T), mixer.skip, x.transpose(1, 2)).transpose(1, 2)
    return F.glu(mixer.out_proj(F.gelu(y)), dim=-1)


@each_mixer
@pytest.mark.parametrize("T", [1, 2, 9, MAX_LEN])
def test_outputs_and_every_gradient_are_those_of_both_filters_written_out(name, T):
    mixer, x = make(name), inputs(2, T).requires_grad_()
    y, expected = mixer(x)[0], definition(name, mixer, x)
    close(y, expected, name)
    found, wanted = gradients(mixer, x, y), gradients(mixer, x, expected)
    for key, value in wanted.items():
        ahead = key.startswith(SECOND_FILTER[name])
        if T == 1 and ahead:  # nothing follows
            assert float(found[key].abs().max()) == 0
            continue
        close(found[key], value, f"{name}: {key}")
        assert T < MAX_LEN or float(value.abs().max()) > 0, key


@pytest.mark.parametrize("name", ["long_conv", "sgconv"])
def test_filters_of_taps_reach_max_len_tokens_ahead_and_no_further(name):
    mixer, T = make(name), MAX_LEN + 6
    if name == "long_conv":
        with torch.no_grad():
            mixer.taps_backward.fill_(1.0)  # initial taps so far ahead are squashed to zero
    x = inputs(1, T).requires_grad_()
    (seen,) = torch.autograd.grad(mixer(x)[0][0, 0].sum(), x)
    reach = seen[0].abs().amax(dim=1)
    assert float(reach[: MAX_LEN + 1].min()) > 1e-6 * float(reach.max())
    assert float(reach[MAX_LEN + 1 :].max()) < 1e-12 * float(reach.max())


def only_the_convolution(name):
    """(x [1, T, D] -> [D, T], [k, k_backward]): the mixer with skips, gates and projections that do nothing."""
    if name == "hyena":
        torch.manual_seed(0)
        mixer = MIXERS[name].make(MIXERS[name].config(), Place(D, MAX_LEN, causal=False)).double()
        with torch.no_grad():
            for p in (mixer.in_proj.weight, mixer.in_proj.bias, mixer.short_filter_weight, mixer.short_filter_bias):
                p.zero_()
            mixer.in_proj.weight[2 * D :] = torch.eye(D)
            mixer.short_filter_weight[:, 0] = 1.0
            mixer.short_filter_bias[: 2 * D] = 1.0
            mixer.filter_skip.zero_()
            mixer.out_proj.weight.copy_(torch.eye(D))
            mixer.out_proj.bias.zero_()
            filter = mixer.filter
            ways = (filter.hidden_layers, filter.output), (filter.backward_layers, filter.backward_output)
            return lambda x: mixer(x)[0][0].T, [sine_network(mixer, *way, MAX_LEN) for way in ways]
    mixer = make(name)
    mixer.skip.data.zero_()
    of = {"long_conv": long_conv_taps, "sgconv": sgconv_taps}.get(name, ssm_taps)
    return lambda x: mixer.convolve_both_ways(x.transpose(1, 2), SequenceContext.single(x.shape[1]))[0], of(
        mixer, MAX_LEN
    )


@each_mixer
def test_an_impulse_shows_the_second_filter_from_the_token_before_it_backwards(name):
    respond, (k, k_backward) = only_the_convolution(name)
    T, place = 17, 11
    x = torch.zeros(1, T, D, dtype=torch.float64)
    x[0, place] = 1.0
    with torch.no_grad():
        y = respond(x)
        assert_close(y[:, place:], k[:, : T - place])
        assert_close(y[:, :place].flip(1), k_backward[:, :place])
        assert float((k - k_backward).abs().max()) > 1e-3
        assert float(k_backward[:, 0].abs().max()) > 1e-3


@pytest.mark.parametrize("L", [1, 2, 7])
def test_both_filters_are_one_circular_filter_of_twice_the_length_as_published(L):
    generator = torch.Generator().manual_seed(0)
    u, k, k_backward = torch.randn(3, D, L, dtype=torch.float64, generator=generator)
    window = torch.cat([k, k_backward.flip(1)], dim=1)
    expected = torch.fft.irfft(torch.fft.rfft(window) * torch.fft.rfft(u, n=2 * L), n=2 * L)[:, :L]
    assert_close(two_sided_conv(u[None], k, k_backward, ctx=SequenceContext.single(L))[0], expected)


@each_mixer
def test_a_state_is_refused(name):
    mixer = make(name)
    with pytest.raises(ValueError, match=rf"{type(mixer).__name__}: a state can be carried only with causal filters"):
        mixer(inputs(1, 3), state=START)


def _on_rank(group, bounds):
    ctx, found = SequenceContext(group, group.rank(), bounds), {}
    for name in NAMES:
        mixer, x = make(name), ctx.split(inputs(2, bounds[-1]), 1).clone().requires_grad_()
        y, state = mixer(x, ctx=ctx)
        assert state is None
        weights = torch.randn(2, bounds[-1], D, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
        parameters = dict(mixer.named_parameters())
        got = torch.autograd.grad((y * ctx.split(weights, 1)).sum(), [x, *parameters.values()], allow_unused=True)
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
            parts = [r[name][1][key] for r in results if r[name][1][key] is not None]
            close(torch.cat(parts, dim=1) if key == "x" else sum(parts), value, f"{name}: {key}")


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
    causal = make_tiny(name)
    added = set(mixer.state_dict()) - set(causal.state_dict()) - {"norm_backward"}
    assert set(causal.state_dict()) < set(mixer.state_dict())
    assert added
    assert all(key.startswith(SECOND_FILTER[name]) for key in added)


@each_mixer
def test_bf16_autocast_is_near_float64(name):
    mixer, x = make(name), inputs(2, MAX_LEN)
    with torch.no_grad():
        exact, _ = mixer(x)
    single, z = mixer.float(), x.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = single(z)
    y.float().square().sum().backward()
    error = float((y.detach().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert error < 0.05
    assert all(torch.isfinite(p.grad).all() for p in [z, *single.parameters()])


@each_mixer
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_empty_batch_and_no_tokens(name, shape):
    assert make(name)(inputs(*shape))[0].shape == (*shape, D)


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("hyena", (5 + 1) * 64 + 2 * (64 + 1) * 64 + 64 * 64),
        ("long_conv", 64 * 512),
        ("s4_ptd", 64 * 64 * 2),
        ("s4d", 64 * 32 * 2),
        ("sgconv", 4 * 64 * 64),
    ],
)
def test_the_second_filter_has_as_many_parameters_and_begins_like_the_first(name, added):
    torch.manual_seed(0)
    kind = MIXERS[name]
    causal, mixer = (kind.make(kind.config(), Place(64, 512, causal=is_causal)) for is_causal in (True, False))
    count = [sum(p.numel() for p in m.parameters()) for m in (causal, mixer)]
    assert count[1] - count[0] == added
    parameters = dict(mixer.named_parameters())
    for key, second in parameters.items():
        if key.startswith(SECOND_FILTER[name]):
            first = parameters[
                key.replace("backward_layers", "hidden_layers")
                .replace("backward_output", "output")
                .replace("_backward", "")
            ]
            assert first.shape == second.shape
            assert not torch.equal(first, second)
            if second.numel() > 1000:
                assert float(second.detach().std()) == pytest.approx(float(first.detach().std()), rel=0.1), key
    if name == "sgconv":
        k = mixer.filter(512, SequenceContext.single(512), backward=True)(slice(0, 64))
        assert_close(k.detach().norm(dim=1), torch.ones(64), tolerance=1e-5)


def config_of(*pattern, **keys):
    sizes = {"d_model": D, "n_layer": 2, "max_len": MAX_LEN, "mixers": SETTINGS, "embed_dropout": 0.0, "vocab_size": 12}
    return ModelConfig(**({"arch": "lm", "pattern": pattern, "causal": False} | sizes | keys))


def model_of(*pattern, params="fp64", **keys):
    return build_model(config_of(*pattern, **keys), seed=0, params=params, device=torch.device("cpu"))


def test_second_filters_learn_as_slowly_as_the_first():
    model = model_of("long_conv", "sgconv")
    names = [name for name, _ in model.named_parameters()]
    found = group_settings(names, OptimSection(lr=1e-2), model.rules)
    second = [name for name in names if "_backward" in name]
    assert len(second) == 1 + len(model.blocks[1].mixer.pieces)
    for name in second:
        assert found[name] == found[name.replace("_backward", "")]
        assert found[name][1] == 0.1


def test_those_that_stay_causal_are_refused_with_the_names_of_those_that_can():
    can = ["attention", *NAMES]
    for name in set(MIXERS) - set(can):
        with pytest.raises(ValueError, match="is causal by nature; those that can do: ") as refusal:
            config_of(name)
        named = str(refusal.value).split("those that can do: ")[1].split("\n")[0].split(" [")[0]
        assert sorted(named.split(", ")) == sorted(can)


PAIRS = 10


def pairs(B, generator):
    """Every base twice in a row: the first of a pair, when hidden, can be told from the one that follows alone."""
    return (A + torch.randint(0, 4, (B, PAIRS), generator=generator)).repeat_interleave(2, dim=1)


@each_mixer
def test_masked_tokens_are_learned_from_those_that_follow(name):
    model = model_of(name, params="fp32", d_model=16, n_layer=1, max_len=2 * PAIRS, tied_head=False)
    with torch.no_grad():
        model.embedding.weight.mul_(50.0)  # so that a few steps are enough
    rate = 1e-2 if name == "hyena" else 3e-2
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    generator, positions, losses = torch.Generator().manual_seed(0), torch.arange(2 * PAIRS), []
    for step in range(40):
        ids, labels = mask_tokens(pairs(32, generator), torch.arange(32) + 32 * step, positions, 0.3)
        nats, count = model.loss(ids, labels)
        optimizer.zero_grad()
        (nats / count).backward()
        optimizer.step()
        losses.append(float((nats / count).detach()))
    # Of a model that looks at no neighbour 1.32: ln 4 for the 80% of [MASK], and 1.07 for the rest, which are right in 5 of 8.
    assert sum(losses[-5:]) / 5 < 1.25 < losses[0]
    ids = pairs(20 * PAIRS, generator)
    hidden, labels, rows = ids.clone(), torch.full_like(ids, -100), torch.arange(20 * PAIRS)
    first = rows % PAIRS * 2
    hidden[rows, first], labels[rows, first] = MASK, ids[rows, first]
    with torch.no_grad():
        nats, count = model.eval().loss(hidden, labels)
    assert int(count) == 20 * PAIRS
    assert float(nats / count) < 0.9 * math.log(4)


CLASSES = {"num_classes": 3, "pooling": "mean"}


def class_gradients(name, ctx=None):
    model = model_of(name, **CLASSES)
    ids = torch.randint(A, A + 4, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :4], mask[1, 15:] = False, False
    if ctx is not None:
        ids, mask = ctx.split(ids, 1), ctx.split(mask, 1)
    nats, count = model.loss(ids, torch.tensor([2, 0, 1]), ctx=ctx, mask=mask)
    nats.backward()
    return float(nats.detach()), int(count), {key: p.grad for key, p in model.named_parameters()}


def _classes_on_rank(group):
    return {name: class_gradients(name, SequenceContext.even(group, 20)) for name in NAMES}


def test_classes_and_pooling_over_ranks_are_those_of_one_process():
    results = run_ranks(2, _classes_on_rank)
    for name in NAMES:
        nats, count, wanted = class_gradients(name)
        parts = [r[name] for r in results]
        assert sum(part[0] for part in parts) == pytest.approx(nats, rel=1e-10)
        assert sum(part[1] for part in parts) == count == 3
        for key, value in wanted.items():
            close(sum(part[2][key] for part in parts if part[2][key] is not None), value, f"{name}: {key}")


@each_mixer
def test_the_first_token_tells_a_class_that_the_last_decides(name):
    model = model_of(name, num_classes=3, pooling="first")
    ids = torch.full((4, 20), A)
    ids[:, -1] += torch.arange(4)
    with torch.no_grad():
        logits = model(ids)
    assert float((logits[1:] - logits[:1]).abs().max(dim=1).values.min()) > 1e-9
