"""backend="triton" of gla and simple_gla through the public functions, in Triton's interpreter."""

import pytest
import torch

from seqengine.kernels.api import gla, simple_gla
from seqengine.kernels.linear_attention import ops
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORMS = {"channel": (gla, "bthk"), "head": (simple_gla, "bth"), "fixed": (simple_gla, "h"), "none": (simple_gla, None)}


def tensors(form, B, T, H, K, V, N=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = {"bthk": (B, T, H, K), "bth": (B, T, H), "h": (H,)}
    letters = FORMS[form][1]
    a = {"q": randn(B, T, H, K), "k": randn(B, T, H, K), "v": randn(B, T, H, V)}
    if letters:
        a["g"] = torch.nn.functional.logsigmoid(randn(*sizes[letters]))
    a["initial_state"] = randn(N or B, H, K, V)
    return {name: t.to(dtype) for name, t in a.items()}


def run(form, arguments, dtype=None, **settings):
    leaves = {n: t.detach().to(dtype or t.dtype).requires_grad_() for n, t in arguments.items()}
    o, state = FORMS[form][0](**leaves, output_final_state=True, **settings)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (o, state)]
    found = torch.autograd.grad((o, state), list(leaves.values()), weights)
    return {"o": o, "state": state, **{f"d{n}": t for n, t in zip(leaves, found, strict=True)}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("documents", [None, [0, 0, 5, 70]], ids=str)
def test_every_form_with_states_and_every_gradient(form, documents):
    settings = {} if documents is None else {"cu_seqlens": torch.tensor(documents)}
    a = tensors(form, 1 if documents else 2, 70, 2, 20, 9, None if documents is None else 3)
    expected = run(form, a, torch.float64, backend="torch", **settings)
    for name, actual in run(form, a, backend="triton", **settings).items():
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("form", ["channel", "head"])
def test_float64_to_twelve_digits(form):
    a = tensors(form, 1, 66, 1, 5, 3, dtype=torch.float64)
    expected = run(form, a, backend="reference")
    for name, actual in run(form, a, backend="triton").items():
        assert_close(actual, expected[name], name)


def test_operators_keep_torchs_contract():
    a = {n: t.requires_grad_() for n, t in tensors("channel", 1, 9, 1, 4, 3).items()}
    arguments = (*(a[n] for n in ("q", "k", "v", "g")), 0.5, a["initial_state"], None, "triton")
    torch.library.opcheck(
        ops.gla, arguments, test_utils=["test_schema", "test_autograd_registration", "test_faketensor"]
    )


def test_normalised_linear_attention():
    a = tensors("none", 1, 40, 2, 8, 5)
    a = {n: t.abs() for n, t in a.items() if n != "initial_state"}
    o, _ = simple_gla(**a, normalize=True, backend="triton")
    assert_close(o, simple_gla(**a, normalize=True)[0], "o")


def test_mixed_float64_is_refused():
    a = tensors("channel", 1, 9, 1, 4, 3)
    with pytest.raises(ValueError, match="all in float64, or none"):
        gla(a["q"].double(), a["k"], a["v"], a["g"], backend="triton")
