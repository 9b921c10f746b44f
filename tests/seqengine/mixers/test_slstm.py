"""The sLSTM against its definition in loops, and its published initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F

from seqengine.errors import InputError
from seqengine.mixers.mixer import START, Place
from seqengine.mixers.slstm import SLstm, SLstmConfig
from tests.tolerances import assert_close

D, H, K = 6, 2, 3


def make(**settings):
    torch.manual_seed(0)
    mixer = SLstm(SLstmConfig(num_heads=H, **settings), Place(D, 32)).double()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return mixer


def definition(mixer, x, taps):
    """Token by token and head by head, with gates that do not overflow here, so without a stabiliser."""
    rows = []
    for b in range(x.shape[0]):
        h, c, n = torch.zeros(3, H, K, dtype=x.dtype).unbind()
        for t in range(x.shape[1]):
            seen = x[b, t]
            if taps:
                terms = [mixer.short_weight[:, s] * x[b, t - s] for s in range(taps) if s <= t]
                seen = F.silu(torch.stack(terms).sum(0) + mixer.short_bias)
            pre = []
            for gate, source in enumerate((seen, seen, x[b, t], x[b, t])):
                heads = [
                    mixer.gate_weight[gate, head] @ source[head * K : (head + 1) * K]
                    + mixer.recurrent[gate, head] @ h[head]
                    + mixer.gate_bias[gate, head]
                    for head in range(H)
                ]
                pre.append(torch.stack(heads))
            i, f = torch.exp(pre[0]), torch.sigmoid(pre[1])
            c = f * c + i * torch.tanh(pre[2])
            n = f * n + i
            h = torch.sigmoid(pre[3]) * c / n
            centred = h - h.mean(1, keepdim=True)
            y = centred / torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-5) * mixer.norm_weight
            rows.append(y.flatten())
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("taps", [4, 1, 0])
def test_slstm_is_its_definition_with_every_gradient(taps):
    mixer = make(short_filter=taps)
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x)[0], definition(mixer, x, taps)
    assert_close(y, expected, tolerance=1e-10)
    weights = torch.randn_like(y)
    wanted = {"x": x, **dict(mixer.named_parameters())}
    found = torch.autograd.grad((y * weights).sum(), list(wanted.values()))
    expected = torch.autograd.grad((expected * weights).sum(), list(wanted.values()))
    for key, a, b in zip(wanted, found, expected, strict=True):
        assert_close(a, b, key, 1e-10)


def test_recurrent_weights_and_states_take_part():
    mixer = make()
    x = torch.randn(1, 8, D, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(x[:, :5], state=START)
        whole = mixer(x)[0]
        assert_close(mixer(x[:, 5:], state=state)[0], whole[:, 5:], tolerance=1e-10)
        mixer.recurrent.zero_()
        assert float((mixer(x)[0] - whole)[:, 1:].abs().max()) > 1e-2


@pytest.mark.parametrize(("layer", "exponent"), [(0, 0.3), (2, 0.3 + 1.3 * 2 / 3), (3, 1.6)])
def test_initial_weights_are_the_published_ones(layer, exponent):
    torch.manual_seed(0)
    mixer = SLstm(SLstmConfig(num_heads=2), Place(64, 32, layer=layer, num_layers=4))
    mixer.initialise()
    forget = torch.tensor([5 - 12 * (k / 31) ** exponent for k in range(32)])
    assert_close(mixer.gate_bias, torch.stack([0 * forget, forget, 0 * forget, 0 * forget])[:, None].repeat(1, 2, 1))
    assert not mixer.recurrent.any()
    assert float(mixer.gate_weight.detach().std()) == pytest.approx(math.sqrt(2 / (5 * 64)), rel=0.05)
    assert SLstm(SLstmConfig(num_heads=4), Place(4, 8)).gate_bias[1].flatten().tolist() == [5.0] * 4  # K = 1


def test_heads_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"slstm\.num_heads = 4 must divide model\.d_model = 6"):
        SLstm(SLstmConfig(), Place(6, 8))
