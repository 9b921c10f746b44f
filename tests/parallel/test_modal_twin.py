"""modal_conv on P ranks is the kernel on the whole: outputs, states, every gradient, and the bytes that it sends."""

import itertools

import pytest
import torch

from seqengine.kernels import api as kernels
from seqengine.parallel import api as parallel
from seqengine.parallel import cost, modal
from seqengine.parallel.api import SequenceContext
from tests.ranks import run_ranks
from tests.tolerances import assert_close

CUTS = {1: [9], 2: [130, 47], 3: [70, 0, 5], 4: [1, 3, 0, 65], 5: [20, 2, 1, 1, 33], 8: [3, 0, 1, 2, 0, 0, 40, 1]}
ALL = pytest.mark.parametrize("cut", CUTS.values(), ids=lambda c: f"P{len(c)}")
B, D, N = 2, 3, 4
SHARDED = ("u", "pre_gate", "post_gate")
WAYS = [("auto", None, None), ("serial", None, 1), ("gather", None, 2), ("log", None, 3), ("hierarchical", 2, 1)]


def randn(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(
        dtype
    )


def tensors(T, poles, dtype):
    """Slow, fast and forgetful (-inf) modes; poles "real" or "complex"."""
    wide = {torch.float32: torch.complex64, torch.float64: torch.complex128}[dtype]
    of_modes = wide if poles == "complex" else dtype
    log = randn(D, N, seed=1, dtype=of_modes) * torch.tensor([1e-3, 0.1, 1.0, 1.0], dtype=dtype)
    real = -log.real.abs()
    real[:, 3] = -torch.inf
    shapes = {"u": (B, D, T), "pre_gate": (B, D, T), "post_gate": (B, D, T), "skip": (D,)}
    made = {name: randn(*shape, seed=2 + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    made["log_poles"] = torch.complex(real, log.imag) if poles == "complex" else real
    made["residues"] = randn(D, N, seed=8, dtype=of_modes)
    made["initial_state"] = randn(B, D, N, seed=9, dtype=of_modes)
    return made


def run(function, a, plain, dy, d_final, **options):
    """Outputs and gradients; plain: without gates, skip and initial state. Only the first loss sees the final state."""
    a = {n: t.detach().clone().requires_grad_() for n, t in a.items()}
    names = ("u", "log_poles", "residues") if plain else tuple(a)
    y, final = function(**{n: a[n] for n in names}, output_final_state=not plain, **options)
    loss = (y * dy).sum()
    if not plain:
        loss = loss + (final * d_final.conj()).real.sum()
    loss.backward()
    found = {"y": y.detach(), **{f"d_{n}": a[n].grad for n in names}}
    return found if plain else {**found, "final": final.detach()}


def on_rank(group, cut, cases, dtype):
    ctx = SequenceContext.create(group, cut[group.rank()])
    found = []
    for poles, plain, (algorithm, node_size, channel_groups) in cases:
        ctx.ledger().clear()
        whole = tensors(sum(cut), poles, dtype)
        dy, d_final = randn(B, D, sum(cut), seed=20, dtype=dtype), whole["initial_state"].flip(1)
        a = {n: ctx.split(t, 2) if n in SHARDED else t for n, t in whole.items()}
        options = {"algorithm": algorithm, "node_size": node_size, "channel_groups": channel_groups}
        result = run(parallel.modal_conv, a, plain, ctx.split(dy, 2), d_final, ctx=ctx, **options)
        state_bytes = a["initial_state"].nbytes
        if algorithm == "auto":
            algorithm = cost.scan_algorithm(ctx.size, state_bytes, output_final=not plain, node_size=node_size)
        shared = (ctx.size, ctx.rank, algorithm, state_bytes)
        predicted = cost.scan_bytes(*shared, output_final=not plain, node_size=node_size)
        predicted += cost.scan_backward_bytes(*shared, initial_gradient=not plain, node_size=node_size)
        found.append((result, ctx.ledger().sent_bytes(), predicted))
    return found


def check(cut, cases, dtype, tolerance=None):
    results = run_ranks(len(cut), on_rank, cut, cases, dtype)
    for i, (poles, plain, way) in enumerate(cases):
        whole = tensors(sum(cut), poles, dtype)
        dy = randn(B, D, sum(cut), seed=20, dtype=dtype)
        expected = run(kernels.modal_conv, whole, plain, dy, whole["initial_state"].flip(1))
        for name, value in expected.items():
            parts = [r[i][0][name] for r in results]
            what = f"{poles}, plain={plain}, {way}: {name}"
            if name in ("final", "d_initial_state"):
                for part in parts:
                    close(part, value, what, tolerance)
            else:
                is_sharded = name == "y" or name.removeprefix("d_") in SHARDED
                close(torch.cat(parts, dim=2) if is_sharded else sum(parts), value, what, tolerance)
        for _, sent, predicted in (r[i] for r in results):
            assert sent == predicted


def close(actual, expected, what, tolerance=None):
    if expected.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    assert_close(actual, expected, what, tolerance)


@ALL
def test_parts_are_the_kernel_on_the_whole_with_every_gradient_and_the_bytes_of_the_formula(cut):
    ways = WAYS if len(cut) > 1 else WAYS[:1]
    check(cut, list(itertools.product(("real", "complex"), (False, True), ways)), torch.float64)


@pytest.mark.parametrize("P", [3, 8])
def test_float32(P):
    check(CUTS[P], list(itertools.product(("real", "complex"), (False,), WAYS[:1])), torch.float32)


def _windows(group, cut, algorithm):
    ctx = SequenceContext.create(group, cut[group.rank()])
    whole = tensors(2 * sum(cut), "complex", torch.float64)
    a = {n: t.detach().clone().requires_grad_() for n, t in whole.items()}
    dy = randn(B, D, 2 * sum(cut), seed=20)
    state, loss, outputs = a["initial_state"], 0.0, []
    for window in range(2):
        x, weights = (ctx.split(t.chunk(2, dim=2)[window], 2) for t in (a["u"], dy))
        y, state = parallel.modal_conv(
            x, a["log_poles"], a["residues"], ctx=ctx, initial_state=state, output_final_state=True, algorithm=algorithm
        )
        loss = loss + (y * weights).sum()
        outputs.append(y.detach())
    loss.backward()
    return outputs, {n: a[n].grad for n in ("u", "log_poles", "residues", "initial_state")}


@pytest.mark.parametrize("algorithm", ["gather", "log"])
def test_windows_that_hand_the_state_on_are_one_sequence_with_its_gradients(algorithm):
    cut = CUTS[4]
    a = {n: t.requires_grad_() for n, t in tensors(2 * sum(cut), "complex", torch.float64).items()}
    y, _ = kernels.modal_conv(a["u"], a["log_poles"], a["residues"], initial_state=a["initial_state"])
    (y * randn(B, D, 2 * sum(cut), seed=20)).sum().backward()
    results = run_ranks(4, _windows, cut, algorithm)
    joined = torch.cat([outputs[window] for window in range(2) for outputs, _ in results], dim=2)
    close(joined, y.detach(), "y")
    for name in ("u", "log_poles", "residues"):
        close(sum(grads[name] for _, grads in results), a[name].grad, name)
    for _, grads in results:
        close(grads["initial_state"], a["initial_state"].grad, "initial_state")


def _half(group, cut, dtype):
    ctx = SequenceContext.create(group, cut[group.rank()])
    whole = tensors(sum(cut), "real", torch.float32)
    parts = {n: ctx.split(whole[n], 2).to(dtype).requires_grad_() for n in SHARDED}
    y, state = parallel.modal_conv(
        **parts, log_poles=whole["log_poles"], residues=whole["residues"], ctx=ctx, output_final_state=True
    )
    y.float().square().sum().backward()
    return y.detach(), state, parts["u"].grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_single_precision_states(dtype):
    cut = CUTS[2]
    whole = tensors(sum(cut), "real", torch.float32)
    parts = {n: whole[n].to(dtype) for n in SHARDED}
    modes = {n: whole[n] for n in ("log_poles", "residues")}
    y, state = kernels.modal_conv(**{n: x.float() for n, x in parts.items()}, **modes, output_final_state=True)
    results = run_ranks(2, _half, cut, dtype)
    assert results[0][0].dtype == results[0][2].dtype == dtype
    assert_close(torch.cat([r[0] for r in results], dim=2), y)
    for r in results:
        assert r[1].dtype == torch.float32
        assert_close(r[1], state)


def _second(group, cut):
    ctx = SequenceContext.create(group, cut[group.rank()])
    whole = tensors(sum(cut), "real", torch.float64)
    u = ctx.split(whole["u"], 2).clone().requires_grad_()
    y, _ = parallel.modal_conv(u, whole["log_poles"], whole["residues"], ctx=ctx)
    (du,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    try:
        du.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_second_derivative_raises():
    assert all("once_differentiable" in message for message in run_ranks(2, _second, CUTS[2]))


@pytest.mark.parametrize("poles", ["real", "complex"])
@pytest.mark.parametrize("T", [0, 1, 2, 65, 1000])
def test_local_state_is_the_final_state_of_the_kernel_whatever_the_blocks(T, poles, monkeypatch):
    whole = tensors(T, poles, torch.float64)
    d_state = whole["initial_state"]
    names = ("u", "pre_gate", "log_poles")
    expected = {n: whole[n].clone().requires_grad_() for n in names}
    _, state = kernels.modal_conv(**expected, residues=whole["residues"], output_final_state=True)
    if T > 0:
        (state * d_state.conj()).real.sum().backward()
    for budget in (1, 1 << 18):
        monkeypatch.setitem(modal.BLOCK_ELEMENTS, "cpu", budget)
        a = {n: whole[n].mT.contiguous().mT.requires_grad_() for n in names}  # not contiguous
        found = modal._LocalState.apply(a["u"], a["pre_gate"], a["log_poles"], state.dtype)
        close(found, state, "state")
        (found * d_state.conj()).real.sum().backward()
        for n in names:
            close(a[n].grad, expected[n].grad if expected[n].grad is not None else torch.zeros_like(a[n]), n)


def test_bad_input_raises_before_any_message():
    ctx = SequenceContext(None, 0, (0, 4, 9))  # it has no group: a message would raise something else
    u, modes = torch.zeros(2, 3, 4), torch.zeros(3, 5)
    bad = [
        ("rank 0 holds 4 tokens of 9", {"u": torch.zeros(2, 3, 5)}),
        ("rank 0 holds 4 tokens of 9", {"pre_gate": torch.zeros(2, 3, 5)}),
        ("log_poles must be", {"log_poles": torch.zeros(4, 5), "residues": torch.zeros(4, 5)}),
        ("residues must have log_poles' shape", {"residues": torch.zeros(3, 4)}),
        ("post_gate must be", {"post_gate": torch.zeros(1, 3, 4)}),
        ("initial_state must be", {"initial_state": torch.zeros(2, 3, 4)}),
        ("backend must be", {"backend": "triton"}),
        ("channel_groups must be from 1 to D = 3", {"channel_groups": 4}),
        ("algorithm must be one of", {"algorithm": "tree"}),
        ("hierarchical needs a node_size", {"algorithm": "hierarchical"}),
    ]
    for message, changes in bad:
        arguments = {"u": u, "log_poles": modes, "residues": modes} | changes
        with pytest.raises(ValueError, match=message):
            parallel.modal_conv(**arguments, ctx=ctx)


def test_channels_are_grouped_where_that_is_worth_its_cost():
    assert cost.modal_conv_groups(8, 1 << 18, 1 << 30, "cuda") == 1
    assert cost.modal_conv_groups(512, 1 << 22, 1 << 27, "cuda") == 2
