"""long_conv against its definition: values, every gradient, states, odd sizes, bad input."""

import pytest
import torch

from seqengine.kernels.api import SparseSpectrum, long_conv
from seqengine.kernels.conv import stream
from seqengine.kernels.conv.plan import fft_size
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SIZES = [(1, 1), (2, 1), (2, 3), (3, 2), (63, 63), (64, 65), (65, 195), (257, 256), (100, 7), (1000, 129)]


def tensors(B, D, T, L, dtype=torch.float64, filters="shared", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    k_shape = {"shared": (D, L), "grouped": (D // 2, L), "batch": (B, D, L)}[filters]
    return {
        "u": randn(B, D, T),
        "k": randn(*k_shape) / L**0.5,
        "skip": randn(D),
        "pre_gate": randn(B, D, T),
        "post_gate": randn(B, D, T),
        "initial_state": randn(B, D, L - 1),
    }


def run(arguments, backend):
    """Output, final state, and the gradients of a fixed random projection of both."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items()}
    y, state = long_conv(**leaves, output_final_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = sum((t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in (y, state))
    loss.backward()
    return {"y": y, "state": state, **{f"d_{name}": t.grad for name, t in leaves.items()}}


def assert_matches_reference(arguments):
    expected = run(arguments, "reference")
    for name, actual in run(arguments, "torch").items():
        assert_close(actual, expected[name], name)


@pytest.mark.parametrize(("T", "L"), SIZES, ids=lambda n: str(n))
def test_matches_reference_with_every_gradient(T, L):
    assert_matches_reference(tensors(2, 3, T, L))


@pytest.mark.parametrize("filters", ["grouped", "batch"])
def test_matches_reference_for_filters(filters):
    assert_matches_reference(tensors(2, 4, 50, 37, filters=filters))


@pytest.mark.parametrize("left_out", ["skip", "pre_gate", "post_gate", "initial_state"])
def test_matches_reference_without(left_out):
    arguments = tensors(2, 3, 40, 17)
    del arguments[left_out]
    assert_matches_reference(arguments)


def test_matches_reference_over_many_blocks_of_channels():
    arguments = tensors(1, 40, 17000, 3)
    assert_matches_reference({name: arguments[name] for name in ("u", "k", "skip")})


def test_matches_reference_for_large_odd_size():
    arguments = tensors(1, 1, 4097, 4098)
    y, _ = long_conv(arguments["u"], arguments["k"])
    t = 4096
    direct = (arguments["u"][0, 0, : t + 1].flip(0) * arguments["k"][0, : t + 1]).sum()
    assert_close(y[0, 0, t], direct, "last output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_near_float64(dtype):
    arguments = tensors(2, 3, 300, 300, dtype=dtype)
    expected = run({name: t.double() for name, t in arguments.items()}, "reference")
    for name, actual in run(arguments, "torch").items():
        assert actual.dtype == dtype
        assert_close(actual, expected[name], name)


def test_gradcheck():
    arguments = tensors(2, 2, 5, 3)
    names = list(arguments)

    def function(*values):
        return long_conv(**dict(zip(names, values, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(function, [arguments[n].requires_grad_() for n in names])


@pytest.mark.parametrize("cuts", [[1] * 23, [5, 0, 18], [22, 1], [7, 9, 7]], ids=str)
@pytest.mark.parametrize("L", [1, 4, 23, 60])
def test_any_cut_with_states_is_the_uncut_result_with_gradients(cuts, L):
    def whole_or_cut(sizes):
        a = {name: t.requires_grad_() for name, t in tensors(2, 3, 23, L, seed=3).items()}
        state, outputs = a["initial_state"], []
        for u, pre, post in zip(
            a["u"].split(sizes, 2), a["pre_gate"].split(sizes, 2), a["post_gate"].split(sizes, 2), strict=True
        ):
            y, state = long_conv(
                u, a["k"], skip=a["skip"], pre_gate=pre, post_gate=post, initial_state=state, output_final_state=True
            )
            outputs.append(y)
        y = torch.cat(outputs, 2)
        ((y * torch.arange(23.0, dtype=torch.float64)).sum() + (state**2).sum()).backward()
        return {"y": y, "state": state, **{n: t.grad for n, t in a.items()}}

    expected = whole_or_cut([23])
    for name, actual in whole_or_cut(cuts).items():
        assert_close(actual, expected[name], name)


def test_impulse_gives_back_the_filter():
    k = tensors(1, 3, 8, 8)["k"]
    u = torch.zeros(1, 3, 8, dtype=torch.float64)
    u[:, :, 0] = 1
    assert_close(long_conv(u, k)[0][0], k)


def test_future_does_not_reach_the_past():
    a = tensors(1, 2, 64, 64)
    before, _ = long_conv(a["u"], a["k"])
    a["u"][:, :, 40] += 1e6
    after, _ = long_conv(a["u"], a["k"])
    rounding = 1e6 * float(a["k"].abs().sum()) * torch.finfo(torch.float64).eps
    assert float((after - before)[:, :, :40].abs().max()) <= rounding
    assert float((after - before)[:, :, 40].abs().max()) > 1


def test_taps_beyond_the_sequence_get_zero_gradient():
    a = tensors(1, 2, 5, 9)
    k = a["k"].requires_grad_()
    long_conv(a["u"], k)[0].sum().backward()
    assert torch.equal(k.grad[:, 5:], torch.zeros(2, 4, dtype=torch.float64))
    assert bool((k.grad[:, :5] != 0).all())


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_empty_tensors_give_empty_results_and_gradients(shape):
    u = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    k = torch.ones(shape[1], 4, dtype=torch.float64, requires_grad=True)
    y, state = long_conv(u, k, output_final_state=True)
    y.sum().backward()
    assert y.shape == shape
    assert state.shape == (*shape[:2], 3)
    assert u.grad.shape == shape
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_non_contiguous_inputs():
    a = tensors(2, 3, 20, 6)
    u = a["u"].transpose(1, 2).contiguous().transpose(1, 2)
    assert not u.is_contiguous()
    assert_close(long_conv(u, a["k"])[0], long_conv(a["u"], a["k"])[0])


def test_two_runs_agree_bit_for_bit():
    a = tensors(3, 5, 333, 200, dtype=torch.float32)
    first, second = run(a, "torch"), run(a, "torch")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(3, 4)}, r"u must be \[B, D, T\]"),
        ({"k": torch.zeros(5, 4)}, "G dividing D=4"),
        ({"k": torch.zeros(4, 0)}, "L >= 1"),
        ({"k": torch.zeros(1, 4, 3)}, r"B, D = \(2, 4\)"),
        ({"skip": torch.zeros(3)}, "skip must be"),
        ({"pre_gate": torch.zeros(2, 4, 5)}, "pre_gate must be"),
        ({"post_gate": torch.zeros(2, 1, 6)}, "post_gate must be"),
        ({"initial_state": torch.zeros(2, 4, 3)}, r"initial_state must be \[B, D, L-1\]"),
        (
            {"u": torch.zeros(2, 4, 6, dtype=torch.int64)},
            "u must be float64, float32, bfloat16 or float16; got torch.int64",
        ),
        ({"k": torch.zeros(4, 3, dtype=torch.complex64)}, "k must be float64"),
        ({"k": torch.zeros(4, 3, device="meta")}, "k must be on cpu, like the other arguments; got meta"),
        ({"skip": torch.zeros(4, device="meta")}, "skip must be on cpu"),
        ({"backend": "cudnn"}, "backend must be"),
        ({"backend": "triton"}, "backend 'triton' needs Triton and u on a CUDA device"),
        ({"precision": "bf16"}, "precision must be"),
        ({"precision": "tf32"}, "backend 'auto' computes in float32 or float64: precision 'ieee'; got tf32"),
    ],
)
def test_rejects(change, message):
    arguments = {"u": torch.zeros(2, 4, 6), "k": torch.zeros(4, 3), **change}
    with pytest.raises(ValueError, match=message):
        long_conv(**arguments)


def test_a_sparse_spectrum_is_the_masked_transform_with_gates_and_groups():
    def randn(*shape, seed=0):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    a = {"u": randn(2, 4, 50), "k": randn(2, 30, seed=1), "skip": randn(4, seed=2)}
    a |= {"pre_gate": randn(2, 4, 50, seed=3), "post_gate": randn(2, 4, 50, seed=4)}
    spectrum = SparseSpectrum(96, (True, False, False, True, True, False, False, False))
    y, state = long_conv(**a, spectrum=spectrum)
    x = a["pre_gate"] * a["u"]
    masked = torch.fft.rfft(a["k"].repeat_interleave(2, 0), n=96) * spectrum.mask()
    expected = a["post_gate"] * (torch.fft.irfft(torch.fft.rfft(x, n=96) * masked)[..., :50] + a["skip"][:, None] * x)
    assert state is None
    assert_close(y, expected)
    assert_close(long_conv(**a, spectrum=spectrum, backend="reference")[0], expected)
    for refused in ({"output_final_state": True}, {"initial_state": randn(2, 4, 29)}):
        with pytest.raises(ValueError, match="a spectrum has no states"):
            long_conv(**a, spectrum=spectrum, **refused)
    with pytest.raises(ValueError, match=r"T \+ L - 1"):
        long_conv(randn(2, 4, 80), a["k"], spectrum=spectrum)


def test_fft_sizes_are_smooth_even_and_no_larger_than_a_power_of_two():
    for length in [*range(1, 300), 1025, 4097, 65537, 1_000_003]:
        size = fft_size(length)
        assert size >= length
        assert size % (2 if length <= 16 else 16) == 0
        assert size <= max(2, 1 << (length - 1).bit_length())
        for prime in (2, 3, 5):
            while size % prime == 0:
                size //= prime
        assert size == 1
    assert fft_size(1025) == 1152, "1080 = 2^3 3^3 5 has too few twos"
    assert fft_size(39_000) == 40_000


@pytest.mark.parametrize("T", [1, 2, 4, 5])
def test_decoding_after_a_state_makes_no_transform_and_matches_it(T, monkeypatch):
    a = tensors(2, 3, T, 50)
    expected = run(a, "reference")
    for name, actual in run(a, "torch").items():
        assert_close(actual, expected[name], name)
    made = []
    monkeypatch.setattr(stream, "rfft_", lambda rows, n: made.append(n) or torch.fft.rfft(rows[..., :n]))
    long_conv(**a)
    assert bool(made) == (T > 4)


def test_compiles_for_any_length():
    compiled = torch.compile(lambda u, k: long_conv(u, k)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (20, 21, 50):
        a = tensors(2, 3, T, 11)
        assert_close(compiled(a["u"], a["k"]), long_conv(a["u"], a["k"])[0])
