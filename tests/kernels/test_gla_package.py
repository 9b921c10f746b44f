"""backend="fla": refusals, and with a stand-in for the package, which arguments it gets."""

import sys
from types import SimpleNamespace

import pytest
import torch

from seqengine.kernels.api import gla, simple_gla
from seqengine.kernels.linear_attention import fla, ops
from tests.tolerances import assert_close


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stand_in(monkeypatch, version="0.6.0"):
    """A package fla that computes the definitions."""
    calls = []

    def chunk_gla(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens):
        calls.append("gla")
        return gla(q, k, v, g, scale=scale, initial_state=initial_state, output_final_state=True, backend="reference")

    def chunk_simple_gla(q, k, v, scale, initial_state, output_final_state, cu_seqlens, g=None, g_gamma=None):
        calls.append("g" if g is not None else "g_gamma" if g_gamma is not None else "none")
        how = {"scale": scale, "initial_state": initial_state, "output_final_state": True, "backend": "reference"}
        return simple_gla(q, k, v, g if g is not None else g_gamma, **how)

    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "fla.ops.gla", SimpleNamespace(chunk_gla=chunk_gla))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", SimpleNamespace(chunk_simple_gla=chunk_simple_gla))
    return calls


@pytest.mark.parametrize(
    ("gates", "called"), [((1, 6, 2, 3), "gla"), ((1, 6, 2), "g"), ((2,), "g_gamma"), (None, "none")], ids=str
)
@pytest.mark.parametrize("with_state", [True, False])
def test_the_package_gets_its_gates_under_their_names(gates, called, with_state, monkeypatch):
    calls = stand_in(monkeypatch)
    q, k, v = randn(1, 6, 2, 3), randn(1, 6, 2, 3, seed=1), randn(1, 6, 2, 4, seed=2)
    g = None if gates is None else -randn(*gates, seed=3).abs()
    initial = randn(1, 2, 3, 4, seed=4).float().double() if with_state else None

    o, final, _ = ops.gla(q, k, v, g, 0.5, initial, None, "fla")
    expected, state, _ = ops.gla(q, k, v, g, 0.5, initial, None, "torch")
    assert_close(o, expected, "o")
    assert_close(final, state, "final")
    assert calls[0] == called


def test_refusals(monkeypatch):
    q = torch.zeros(1, 4, 1, 8)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ValueError, match="pip install seqengine-train"):
        fla.load("gla")
    stand_in(monkeypatch, "1.0.0")
    with pytest.raises(ValueError, match=r"needs fla-core >= 0.5, < 1.*got 1.0.0"):
        fla.load("gla")
    with pytest.raises(ValueError, match="backend 'fla' needs q, k, v on a CUDA device"):
        gla(q, q, q, q, backend="fla")
    with pytest.raises(ValueError, match="backend 'triton' needs Triton and q on a CUDA device"):
        simple_gla(q, q, q, backend="triton")
