"""Mamba-2 against its definition, token by token and head by head."""

import math

import pytest
import torch
import torch.nn.functional as F

from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection
from seqengine.errors import InputError
from seqengine.mixers.mixer import Place
from seqengine.mixers.ssd import Ssd, SsdConfig
from seqengine.model import LanguageModel
from seqengine.optim import group_settings
from tests.seqengine.mixers.test_contract import close, gradients
from tests.seqengine.mixers.tiny import with_far_weights

D = 6


def mixer_and_inputs(T=9, **settings):
    return with_far_weights(Ssd(SsdConfig(**settings), Place(D, 16)), D, T, 1 / 2)


def definition(m, x, c):
    inner, P, N, G = c.expand * D, c.head_dim, c.state_size, c.num_groups
    H = inner // P
    w, b = m.inputs.conv_weight, m.inputs.conv_bias
    projected = x @ m.inputs.proj.weight.T
    plain = [sum(w[:, s] * projected[:, t - s] for s in range(min(w.shape[1], t + 1))) + b for t in range(x.shape[1])]
    xbc = torch.stack(plain, dim=1)
    xbc = xbc * torch.sigmoid(xbc)
    u, B, C = xbc.split([inner, G * N, G * N], dim=-1)
    dt = torch.log(1 + torch.exp(x @ m.dt_proj.weight.T + m.decay.dt_bias))
    heads = []
    for h in range(H):
        j = h // (H // G)
        S, rows = torch.zeros(x.shape[0], N, P, dtype=x.dtype), []
        for t in range(x.shape[1]):
            ut, Bt, Ct = u[:, t, h * P : (h + 1) * P], B[:, t, j * N : (j + 1) * N], C[:, t, j * N : (j + 1) * N]
            step = dt[:, t, h, None, None]
            S = torch.exp(-torch.exp(m.decay.A_log[h]) * step) * S + step * Bt[:, :, None] * ut[:, None, :]
            rows.append(torch.einsum("bn,bnp->bp", Ct, S) + m.D[h] * ut)
        heads.append(torch.stack(rows, dim=1))
    z = x @ m.gate.weight.T
    o = torch.cat(heads, dim=-1) * z * torch.sigmoid(z)
    parts = []
    for part in o.split(inner // G, dim=-1):
        parts.append(part / torch.sqrt(part.square().mean(dim=-1, keepdim=True) + c.norm_eps))
    return (torch.cat(parts, dim=-1) * m.norm.weight.flatten()) @ m.out_proj.weight.T


@pytest.mark.parametrize(
    "settings",
    [
        {"head_dim": 4, "state_size": 5},
        {"head_dim": 3, "state_size": 4, "num_groups": 2, "short_filter": 2},
        {"head_dim": 6, "state_size": 3, "num_groups": 2, "norm_eps": 0.1},
        {"head_dim": 6, "state_size": 2, "expand": 3, "num_groups": 3, "short_filter": 1},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_the_definition(settings):
    mixer, x = mixer_and_inputs(**settings)
    expected, (y, _) = definition(mixer, x, SsdConfig(**settings)), mixer(x)
    close(y, expected)
    found = gradients(mixer, x, y)
    for key, value in gradients(mixer, x, expected).items():
        close(found[key], value, key)


def test_steps_and_decays_begin_in_the_published_ranges():
    torch.manual_seed(0)
    mixer = Ssd(SsdConfig(head_dim=1, state_size=2), Place(2048, 16))
    A, dt = torch.exp(mixer.decay.A_log.detach()), F.softplus(mixer.decay.dt_bias.detach())
    assert 1.0 <= float(A.min()) < 1.1
    assert 15.9 < float(A.max()) <= 16.0
    assert 0.999e-3 <= float(dt.min()) < 1.1e-3
    assert 0.09 < float(dt.max()) <= 0.1001
    assert float(dt.log().mean()) == pytest.approx(math.log(1e-2), abs=0.1)
    assert torch.equal(mixer.D.detach(), torch.ones(4096))
    mixer.initialise()
    assert float(mixer.gate.weight.detach().abs().max()) == pytest.approx(2048**-0.5, rel=1e-3)


def test_decays_steps_and_skip_are_not_decayed_but_matrices_are():
    config = ModelConfig(
        arch="lm", d_model=8, n_layer=1, pattern=("ssd",), mixers={"ssd": {"head_dim": 4, "state_size": 3}}
    )
    model = LanguageModel(config)
    names = [name for name, _ in model.named_parameters()]
    settings = group_settings(names, OptimSection(weight_decay=0.1), model.rules)
    undecayed = {n.removeprefix("blocks.0.mixer.") for n in names if "mixer" in n and settings[n][0] == 0.0}
    assert undecayed == {"D", "decay.A_log", "decay.dt_bias", "inputs.conv_bias", "norm.weight"}


def test_what_cannot_work_is_named():
    with pytest.raises(
        InputError, match=r"model\.mixers\.ssd: expand \* model\.d_model = 12 .* head_dim \* num_groups = 8 \* 1"
    ):
        Ssd(SsdConfig(head_dim=8), Place(D, 16))
    with pytest.raises(ValueError, match="decay_range"):
        SsdConfig(decay_range=(0.0, 4.0))
    assert SsdConfig.model_validate({"decay_range": [1.0, 4.0]}).decay_range == (1.0, 4.0)
