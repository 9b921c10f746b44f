"""SGConv: against the filter written out cell by cell, with every gradient; its reach, norm and learning rate."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection
from seqengine.mixers.mixer import START, Place
from seqengine.mixers.sgconv import SGConv, SGConvConfig, stretch
from seqengine.model import build_model
from seqengine.optim import group_settings
from seqengine.parallel.context import SequenceContext
from tests.tolerances import assert_close

D = 3


def interpolated(piece, factor):
    """Linear interpolation between cell middles, one output at a time."""
    cells = []
    for o in range(piece.shape[1] * factor):
        place = max(0.0, (o + 0.5) / factor - 0.5)
        left = math.floor(place)
        right = min(left + 1, piece.shape[1] - 1)
        cells.append(piece[:, left] * (1 - (place - left)) + piece[:, right] * (place - left))
    return torch.stack(cells, dim=1)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("cells", [1, 2, 5])
def test_stretching_is_linear_interpolation(cells, factor):
    torch.manual_seed(0)
    piece = torch.randn(3, cells, dtype=torch.float64)
    assert_close(stretch(piece, factor), interpolated(piece, factor))
    published = F.interpolate(piece[None], scale_factor=factor, mode="linear")[0]
    assert_close(stretch(piece, factor), published)


def written_out(mixer, x, decays, max_len):
    last = len(mixer.pieces) - 1
    rows = []
    for c, decay in enumerate(decays):
        parts = [
            interpolated(p[c : c + 1], 2 ** max(0, i - 1)) * decay ** (last - i) for i, p in enumerate(mixer.pieces)
        ]
        rows.append(torch.cat(parts, dim=1)[0])
    k = torch.stack(rows)
    norm = k.detach().norm(dim=1, keepdim=True)
    k = (k / norm)[:, :max_len]
    T, y = x.shape[1], mixer.skip * x
    for lag in range(min(T, max_len)):
        y = y + F.pad(k[:, lag] * x[:, : T - lag], (0, 0, lag, 0))
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    a, b = (y @ mixer.out_proj.weight.T + mixer.out_proj.bias).chunk(2, dim=-1)
    return a * torch.sigmoid(b)


@pytest.mark.parametrize(("max_len", "scales"), [(2, 1), (4, 1), (5, 2), (13, 3), (17, 4)])
def test_layer_is_stretched_pieces_gelu_and_gate(max_len, scales):
    torch.manual_seed(0)
    mixer = SGConv(SGConvConfig(kernel_dim=4, decay_min=1.5, decay_max=2.5), Place(D, max_len)).double()
    with torch.no_grad():
        mixer.norm.copy_(mixer._whole(slice(0, D)).norm(dim=1, keepdim=True))
    assert len(mixer.pieces) == scales
    x = torch.randn(2, 11, D, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x)[0], written_out(mixer, x, (1.5, 2.0, 2.5), max_len)
    assert_close(y, expected)
    weights = torch.randn_like(y)
    wanted = [x, *mixer.parameters()]
    found = torch.autograd.grad((y * weights).sum(), wanted, materialize_grads=True)
    names = ["x", *dict(mixer.named_parameters())]
    other = torch.autograd.grad((expected * weights).sum(), wanted, materialize_grads=True)
    for name, a, b in zip(names, found, other, strict=True):
        assert_close(a, b, name, 1e-10)


def test_filter_reaches_over_max_len_and_begins_with_norm_one():
    torch.manual_seed(0)
    mixer = SGConv(SGConvConfig(kernel_dim=8), Place(D, 64))
    k = mixer.filter(64, SequenceContext.single(64))(slice(0, D))
    assert k.shape == (D, 64)
    assert torch.allclose(k.norm(dim=1), torch.ones(D), atol=1e-5)
    halves = k.abs().unflatten(1, (8, 8)).mean(dim=2)
    assert bool((halves[:, 0] > 4 * halves[:, -1]).all())


def test_norm_is_of_the_initial_filter_and_is_saved():
    torch.manual_seed(0)
    mixer, other = (SGConv(SGConvConfig(kernel_dim=4), Place(D, 20)) for _ in range(2))
    before = mixer.norm.clone()
    with torch.no_grad():
        for piece in mixer.pieces:
            piece.mul_(3.0)
    x = torch.randn(1, 9, D)
    y, _ = mixer(x)
    assert torch.equal(mixer.norm, before)
    assert not torch.equal(other.norm, before)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other(x)[0], y)


def test_filters_of_a_slice_of_channels_are_those_channels():
    mixer, ctx = SGConv(SGConvConfig(kernel_dim=4), Place(6, 20)), SequenceContext.single(20)
    taps = mixer.filter(15, ctx)
    assert torch.equal(taps(slice(2, 5)), taps(slice(0, 6))[2:5])


def test_state_of_a_row_longer_than_max_len():
    """The filter has max_len taps, also when the sequence goes on."""
    torch.manual_seed(0)
    mixer = SGConv(SGConvConfig(kernel_dim=4), Place(D, 10)).double()
    x = torch.randn(1, 37, D, dtype=torch.float64)
    whole, _ = mixer(x)
    state, parts = START, []
    for chunk in x.split([3, 20, 14], dim=1):
        part, state = mixer(chunk, state=state)
        parts.append(part)
    assert_close(torch.cat(parts, dim=1), whole)
    assert state.inputs.shape == (1, D, 9)


def test_pieces_have_a_learning_rate_of_their_own():
    config = ModelConfig(arch="lm", d_model=8, n_layer=1, max_len=256, pattern=("sgconv",))
    model = build_model(config, seed=0, params="fp32", device=torch.device("cpu"))
    names = [name for name, _ in model.named_parameters()]
    found = group_settings(names, OptimSection(lr=1e-2, weight_decay=0.1), model.rules)
    pieces = [name for name in names if ".pieces." in name]
    assert len(pieces) == 3
    assert all(found[name] == (0.1, 0.1) for name in pieces)


def test_decays_must_be_in_order():
    with pytest.raises(ValidationError, match=r"decay_min must not be above decay_max; got 3\.0 > 2\.0"):
        SGConvConfig(decay_min=3.0)
