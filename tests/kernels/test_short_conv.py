"""short_conv against its definition and against torch's Conv1d."""

import sys
from types import SimpleNamespace

import pytest
import torch

from seqengine.kernels.api import short_conv
from seqengine.kernels.conv import causal_conv1d
from seqengine.kernels.conv import short as ops
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def tensors(B, D, T, W, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (B, D, T), "w": (D, W), "bias": (D,), "initial_state": (B, D, W - 1)}
    return {n: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def run(arguments, backend, **options):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items()}
    y, state = short_conv(**leaves, output_final_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in (y, state))
    loss.backward()
    return {"y": y, "state": state, **{f"d_{name}": t.grad for name, t in leaves.items()}}


@pytest.mark.parametrize(("T", "W"), [(1, 1), (1, 3), (2, 4), (3, 3), (5, 1), (63, 3), (257, 7), (4, 9)], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_matches_reference_with_every_gradient(T, W, activation):
    arguments = tensors(2, 3, T, W)
    expected = run(arguments, "reference", activation=activation)
    for name, actual in run(arguments, "torch", activation=activation).items():
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("left_out", ["bias", "initial_state"])
def test_matches_reference_without(left_out):
    arguments = tensors(2, 3, 9, 4)
    del arguments[left_out]
    expected = run(arguments, "reference")
    for name, actual in run(arguments, "torch").items():
        assert_close(actual, expected[name], name)


def test_matches_reference_over_many_blocks_of_channels():
    arguments = tensors(2, 7, 40000, 3)
    expected = run(arguments, "reference")
    for name, actual in run(arguments, "torch").items():
        assert_close(actual, expected[name], name)


def test_is_a_conv1d_with_its_taps_reversed():
    a = tensors(2, 4, 30, 3)
    conv1d = torch.nn.functional.conv1d(a["u"], a["w"].flip(1)[:, None], a["bias"], padding=2, groups=4)[..., :30]
    assert_close(short_conv(a["u"], a["w"], a["bias"])[0], conv1d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_near_float64(dtype):
    arguments = tensors(2, 3, 100, 3, dtype=dtype)
    expected = run({name: t.double() for name, t in arguments.items()}, "reference")
    for name, actual in run(arguments, "torch").items():
        assert actual.dtype == dtype
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize("cuts", [[1] * 11, [4, 0, 7], [10, 1]], ids=str)
@pytest.mark.parametrize("W", [1, 3, 20])
def test_any_cut_with_states_is_the_uncut_result(cuts, W):
    a = tensors(2, 3, 11, W)
    whole, last = short_conv(**a, output_final_state=True)
    state, outputs = a["initial_state"], []
    for u in a["u"].split(cuts, 2):
        y, state = short_conv(u, a["w"], a["bias"], initial_state=state, output_final_state=True)
        outputs.append(y)
    assert_close(torch.cat(outputs, 2), whole)
    assert_close(state, last)


def test_gradcheck():
    a = tensors(2, 2, 4, 3)
    names = list(a)

    def function(*values):
        return short_conv(**dict(zip(names, values, strict=True)), activation="silu", output_final_state=True)

    assert torch.autograd.gradcheck(function, [a[n].requires_grad_() for n in names])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(4, 6)}, r"u must be \[B, D, T\]"),
        ({"w": torch.zeros(3, 3)}, "w must be"),
        ({"bias": torch.zeros(5)}, "bias must be"),
        ({"initial_state": torch.zeros(2, 4, 3)}, "initial_state must be"),
        ({"activation": "gelu"}, "activation must be"),
        ({"backend": "cudnn"}, "backend must be"),
        ({"backend": "triton"}, "backend 'triton' needs Triton and u on a CUDA device"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        short_conv(**{"u": torch.zeros(2, 4, 6), "w": torch.zeros(4, 3), **change})


@pytest.mark.parametrize("left_out", [(), ("bias",), ("initial_state",), ("bias", "initial_state")])
def test_gradgradcheck(left_out):
    a = {name: t.requires_grad_() for name, t in tensors(2, 2, 4, 3).items() if name not in left_out}

    def function(*values):
        return short_conv(**dict(zip(a, values, strict=True)), activation="silu", output_final_state=True)

    assert torch.autograd.gradgradcheck(function, list(a.values()))


@pytest.mark.parametrize("needed", [[True, True, True, True], [True, False, False, False], [False, True, True, False]])
def test_operators_keep_torchs_contract(needed):
    a = {name: t.requires_grad_() for name, t in tensors(2, 3, 7, 3).items()}
    torch.library.opcheck(ops.short_conv, (a["u"], a["w"], a["bias"], a["initial_state"]))
    torch.library.opcheck(ops.short_conv, (a["u"], a["w"], None, None))
    dy = tensors(2, 3, 7, 3)["u"].requires_grad_()
    positions = torch.tensor([0, 1, 2, 0, 0, 1, 2], dtype=torch.int32)
    for silu in (False, True):
        torch.library.opcheck(ops.short_conv, (a["u"], a["w"], a["bias"], None, silu, positions))
        for bias, past in ((a["bias"], a["initial_state"]), (None, None)):
            torch.library.opcheck(ops.short_conv_backward, (dy, a["u"], a["w"], bias, past, needed, silu))


def test_compiles_whole():
    a = tensors(2, 3, 30, 4, dtype=torch.float32)
    compiled = torch.compile(
        lambda u, w, b: short_conv(u, w, b, activation="silu")[0], fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(a["u"], a["w"], a["bias"]), short_conv(a["u"], a["w"], a["bias"], activation="silu")[0])


def stand_in(monkeypatch, version="1.5.2"):
    """A package causal_conv1d that computes the definition, taps in conv1d order."""
    calls = []

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        calls.append((weight, bias, activation))
        return short_conv(x, weight.flip(1), bias, activation=activation, backend="reference")[0]

    package = SimpleNamespace(__version__=version, causal_conv1d_fn=causal_conv1d_fn)
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    return calls


def test_the_causal_conv1d_package_gets_its_order_of_taps(monkeypatch):
    a = tensors(2, 3, 9, 4)
    calls = stand_in(monkeypatch)
    y = ops.short_conv(a["u"], a["w"], a["bias"], None, True, None, "causal-conv1d")
    expected, _ = short_conv(a["u"], a["w"], a["bias"], activation="silu", backend="reference")
    assert_close(y, expected)
    assert torch.equal(calls[0][0], a["w"].flip(1))
    assert calls[0][2] == "silu"


@pytest.mark.parametrize("version", ["1.3.9", "2.0.0", "0.9"])
def test_other_versions_of_the_package_are_refused(version, monkeypatch):
    stand_in(monkeypatch, version)
    with pytest.raises(ValueError, match=f"needs causal_conv1d >= 1.4, < 2.*got {version}"):
        causal_conv1d.load()


def test_the_package_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    with pytest.raises(ValueError, match="pip install seqengine-train"):
        causal_conv1d.load()
    stand_in(monkeypatch)
    with pytest.raises(ValueError, match="'causal-conv1d' needs u on a CUDA device"):
        short_conv(torch.zeros(1, 2, 3), torch.zeros(2, 3), backend="causal-conv1d")
    cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, element_size=lambda: 4)
    with pytest.raises(ValueError, match="2 to 4 taps"):
        causal_conv1d.check_runs(cuda, torch.zeros(2, 5), False)
    with pytest.raises(ValueError, match="takes no initial_state"):
        causal_conv1d.check_runs(cuda, torch.zeros(2, 4), True)
