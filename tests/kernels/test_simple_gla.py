"""simple_gla against the recurrence and against the published parallel forms: SSD, retention, normalised linear attention."""

import itertools
import math

import pytest
import torch

from seqengine.kernels.linear_attention import layout
from seqengine.kernels.linear_attention.op import gla, simple_gla
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOKENS = [1, 2, 3, 63, 64, 65, 257]
KINDS = ["head", "fixed", "none"]
EXTREME = (0.0, -1e-3, -80.0, -1e4, -math.inf)


def tensors(kind, B, T, H, K, V, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {"q": randn(B, T, H, K), "k": randn(B, T, H, K), "v": randn(B, T, H, V)}
    if kind != "none":
        made["g"] = -(
            torch.rand(*((H,) if kind == "fixed" else (B, T, H)), generator=generator, dtype=torch.float64) ** 3
        )
    made = {name: x.to(dtype) for name, x in made.items()}
    made["initial_state"] = randn(B, H, K, V).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return made


def choose(values, *shape, seed=0):
    picks = torch.randint(0, len(values), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values, dtype=torch.float64)[picks]


def run(arguments, **options):
    """Output, final state, and the gradients of a fixed random projection of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in arguments.items()}
    o, state = simple_gla(**leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in (o, state))
    loss.backward()
    return {"o": o, "state": state, **{f"d_{name}": x.grad for name, x in leaves.items()}}


def assert_matches(actual, expected, tolerance=None):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], name, tolerance)


@pytest.mark.parametrize(("K", "V"), [(1, 3), (3, 1), (5, 8), (60, 4)])
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference_with_every_gradient(kind, T, K, V):
    arguments = tensors(kind, 2, T, 3, K, V)
    assert_matches(run(arguments, backend="torch"), run(arguments, backend="reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference_without_a_state_and_with_a_scale(kind):
    arguments = tensors(kind, 2, 90, 2, 4, 5)
    del arguments["initial_state"]
    assert_matches(run(arguments, scale=0.7), run(arguments, scale=0.7, backend="reference"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elements", [1, 3000])
def test_matches_reference_over_many_blocks_and_segments(kind, elements, monkeypatch):
    monkeypatch.setattr(layout, "TILE_ELEMENTS", {"cpu": elements})
    monkeypatch.setattr(layout, "SEGMENT_CHUNKS", 2)
    arguments = tensors(kind, 3, 333, 3, 2, 3)
    assert_matches(run(arguments), run(arguments, backend="reference"))


@pytest.mark.parametrize("pair", [*itertools.product(EXTREME, EXTREME)], ids=str)
@pytest.mark.parametrize("kind", ["head", "fixed"])
def test_any_two_extreme_gates_match_reference(kind, pair):
    arguments = tensors(kind, 1, 70, 2, 3, 2)
    arguments["g"] = torch.tensor(pair, dtype=torch.float64) if kind == "fixed" else choose(pair, 1, 70, 2)
    actual = run(arguments)
    assert_matches(actual, run(arguments, backend="reference"))
    assert bool((actual["d_g"][torch.isinf(arguments["g"])] == 0).all())


@pytest.mark.parametrize("seed", range(3))
def test_extreme_and_mild_gates_mixed_match_reference(seed):
    arguments = tensors("head", 2, 200, 2, 5, 3, seed=seed)
    rare = choose((*EXTREME, *[-0.01] * 20), 2, 200, 2, seed=seed)
    arguments["g"] = torch.where(rare == -0.01, arguments["g"], rare)
    assert_matches(run(arguments), run(arguments, backend="reference"))


def test_gradients_of_strong_gates_are_right_to_their_own_size():
    arguments = tensors("head", 1, 100, 1, 3, 2)
    arguments["g"] = torch.full_like(arguments["g"], -60.0)
    arguments["g"][:, ::2] = -30.0
    actual, expected = run(arguments)["d_g"], run(arguments, backend="reference")["d_g"]
    assert float(((actual - expected) / expected).abs().max()) < 1e-10


def test_is_gla_with_the_same_gate_for_all_channels():
    a = tensors("head", 2, 150, 2, 6, 5)
    expected, last = gla(**(a | {"g": a["g"][..., None].expand(2, 150, 2, 6)}), output_final_state=True)
    o, state = simple_gla(**a, output_final_state=True)
    assert_close(o, expected)
    assert_close(state, last)


def test_is_the_recurrence_of_mamba_2():
    """x [B, T, H, P], dt [B, T, H] > 0, A [H] < 0, B and C [B, T, N] shared by the heads: h = exp(dt A) h + dt B x, y = C h."""
    batch, T, H, P, N = 2, 140, 3, 4, 5
    generator = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(*s, generator=generator).double() for s in ((batch, T, H, P), (batch, T, N), (batch, T, N)))
    dt, a = torch.rand(batch, T, H, generator=generator).double(), -torch.rand(H, generator=generator).double() * 4
    h, expected = torch.zeros(batch, H, P, N, dtype=torch.float64), []
    for t in range(T):
        update = torch.einsum("bh,bn,bhp->bhpn", dt[:, t], b[:, t], x[:, t])
        h = torch.exp(dt[:, t] * a)[:, :, None, None] * h + update
        expected.append(torch.einsum("bn,bhpn->bhp", c[:, t], h))
    shared = (batch, T, H, N)
    y, state = simple_gla(
        c[:, :, None].expand(shared),
        b[:, :, None].expand(shared),
        x * dt[..., None],
        dt * a,
        scale=1.0,
        output_final_state=True,
    )
    assert_close(y, torch.stack(expected, dim=1))
    assert_close(state, h.mT)


def test_fixed_decay_is_the_parallel_form_of_retention():
    """RetNet: (Q K^T * D) V with D[i, j] = gamma^(i - j) for i >= j, gamma = 1 - 2^(-5 - h)."""
    B, T, H, K, V = 2, 150, 3, 4, 5
    a = tensors("none", B, T, H, K, V)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    lag = (torch.arange(T)[:, None] - torch.arange(T)).double()
    decay = (gamma[:, None, None] ** lag.clamp(min=0)).tril()
    scores = torch.einsum("bihk,bjhk->bhij", a["q"], a["k"]) * K**-0.5 * decay
    expected = torch.einsum("bhij,bjhv->bihv", scores, a["v"])
    assert_close(simple_gla(a["q"], a["k"], a["v"], gamma.log())[0], expected)


@pytest.mark.parametrize("T", [1, 2, 65, 150])
def test_normalised_without_gates_is_linear_attention_by_cumulative_sums(T):
    a = tensors("none", 2, T, 3, 4, 5)
    q, k, v = a["q"].exp(), a["k"].exp(), a["v"]
    sums = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(dim=1)
    weight = (q * k.cumsum(dim=1)).sum(dim=-1, keepdim=True)
    o, (state, total) = simple_gla(q, k, v, normalize=True, output_final_state=True)
    assert_close(o, torch.einsum("bthk,bthkv->bthv", q, sums) / weight)
    assert_close(state, sums[:, -1])
    assert_close(total, k.sum(dim=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[70], [1] * 70, [30, 0, 40]], ids=str)
def test_normalised_with_states_is_the_ratio_of_two_recurrences(kind, cuts):
    """Values and gradients, with the state (S, z) handed from piece to piece."""
    made = tensors(kind, 2, 70, 2, 3, 4)
    made["q"], made["k"] = made["q"].exp(), made["k"].exp()
    made["z"] = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def finish(leaves, o, state, z):
        ((o**2).sum() + state.sum() + (z**2).sum()).backward()
        return {"o": o, "state": state, "z": z, **{name: x.grad for name, x in leaves.items()}}

    a = {name: x.clone().requires_grad_() for name, x in made.items()}
    gates = {"g": a["g"]} if "g" in a else {}
    numerator, state = simple_gla(
        a["q"], a["k"], a["v"], **gates, scale=1.0, initial_state=a["initial_state"], output_final_state=True,
        backend="reference",
    )  # fmt: skip
    ones = torch.ones_like(a["v"][..., :1])
    denominator, z = simple_gla(
        a["q"], a["k"], ones, **gates, scale=1.0, initial_state=a["z"][..., None], output_final_state=True,
        backend="reference",
    )  # fmt: skip
    expected = finish(a, numerator / denominator, state, z[..., 0])

    b = {name: x.clone().requires_grad_() for name, x in made.items()}
    states, outputs, start = (b["initial_state"], b["z"]), [], 0
    for size in cuts:
        part = {name: b[name][:, start : start + size] for name in "qkv"}
        if "g" in b:
            part["g"] = b["g"] if kind == "fixed" else b["g"][:, start : start + size]
        o, states = simple_gla(**part, initial_state=states, output_final_state=True, normalize=True)
        outputs.append(o)
        start += size
    assert_matches(finish(b, torch.cat(outputs, 1), *states), expected)


def test_normalised_documents():
    a = tensors("head", 1, 20, 2, 3, 4)
    q, k, v, g = a["q"].exp(), a["k"].exp(), a["v"], a["g"]
    bounds = [0, 7, 7, 20]
    o, (state, z) = simple_gla(q, k, v, g, normalize=True, output_final_state=True, cu_seqlens=torch.tensor(bounds))
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = [x[:, start:stop] for x in (q, k, v, g)]
        expected, (last_state, last_z) = simple_gla(*part, normalize=True, output_final_state=True)
        assert_close(o[:, start:stop], expected)
        assert_close(state[n : n + 1], last_state)
        assert_close(z[n : n + 1], last_z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_output_has_the_dtype_of_the_values(dtype):
    a = tensors("none", 1, 100, 2, 4, 4, dtype=dtype)
    q, k = a["q"].exp(), a["k"].exp()
    o, (state, z) = simple_gla(q, k, a["v"], normalize=True, output_final_state=True)
    assert o.dtype == dtype
    assert state.dtype == z.dtype == torch.float32
    assert_close(o, simple_gla(q.double(), k.double(), a["v"].double(), normalize=True)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[1] * 70, [5, 0, 65], [69, 1], [17, 33, 20]], ids=str)
def test_any_cut_with_states_is_the_uncut_result_with_gradients(kind, cuts):
    def whole_or_cut(sizes):
        a = {name: x.requires_grad_() for name, x in tensors(kind, 2, 70, 2, 3, 4, seed=3).items()}
        state, outputs, start = a["initial_state"], [], 0
        for size in sizes:
            part = {name: a[name][:, start : start + size] for name in "qkv"}
            if "g" in a:
                part["g"] = a["g"] if kind == "fixed" else a["g"][:, start : start + size]
            o, state = simple_gla(**part, initial_state=state, output_final_state=True)
            outputs.append(o)
            start += size
        o = torch.cat(outputs, 1)
        ((o * torch.arange(70.0, dtype=torch.float64)[:, None, None]).sum() + (state**2).sum()).backward()
        return {"o": o, "state": state, **{name: x.grad for name, x in a.items()}}

    assert_matches(whole_or_cut(cuts), whole_or_cut([70]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 5])
def test_gradcheck_and_gradgradcheck(kind, T):
    arguments = tensors(kind, 1, T, 2, 2, 2)
    names = list(arguments)

    def function(*values):
        return simple_gla(**dict(zip(names, values, strict=True)), output_final_state=True)

    leaves = [x.requires_grad_() for x in arguments.values()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_near_float64(kind, dtype):
    arguments = tensors(kind, 2, 300, 2, 16, 8, dtype=dtype)
    expected = run({name: x.double() for name, x in arguments.items()}, backend="reference")
    actual = run(arguments)
    assert actual["o"].dtype == dtype
    assert actual["state"].dtype == torch.float32
    assert_matches(actual, expected, RELATIVE[dtype])


@pytest.mark.parametrize("kind", ["head", "fixed"])
def test_single_precision_remembers_for_as_long_as_double(kind):
    arguments = tensors(kind, 1, 1 << 16, 1, 2, 2, dtype=torch.float32)
    arguments["g"] = torch.full_like(arguments["g"], -1e-6)
    arguments["q"], arguments["k"], arguments["v"] = (arguments[name].abs() for name in "qkv")

    def gradients(a):
        """Of sums of positive terms: a fixed decay's gradient is one number, which must not cancel."""
        leaves = {name: x.clone().requires_grad_() for name, x in a.items()}
        o, state = simple_gla(**leaves, output_final_state=True)
        (o.sum() + state.sum()).backward()
        return {"o": o, "state": state, **{name: x.grad for name, x in leaves.items()}}

    assert_matches(gradients(arguments), gradients({name: x.double() for name, x in arguments.items()}))


@pytest.mark.parametrize("kind", KINDS)
def test_future_does_not_reach_the_past(kind):
    a = tensors(kind, 1, 300, 2, 4, 4)
    before, _ = simple_gla(**a)
    for name in "kv":
        a[name][:, 150] += 1e6
    after, _ = simple_gla(**a)
    assert torch.equal(after[:, :150], before[:, :150])
    assert float((after - before)[:, 150].abs().max()) > 1


@pytest.mark.parametrize("shape", [(0, 5, 2, 3, 4), (2, 0, 2, 3, 4), (2, 5, 0, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty_tensors_give_empty_results_and_zero_gradients(kind, shape):
    a = {name: x.requires_grad_() for name, x in tensors(kind, *shape).items()}
    o, state = simple_gla(**a, output_final_state=True)
    (o.sum() + state.sum()).backward()
    assert o.shape == a["v"].shape
    assert torch.equal(state, a["initial_state"])
    for name in a.keys() - {"initial_state"}:
        assert torch.equal(a[name].grad, torch.zeros_like(a[name]))


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_inputs_and_two_runs_agree_bit_for_bit(kind):
    a = tensors(kind, 2, 70, 3, 4, 5)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in a.items()}
    first, second = run(a), run(strided)
    assert not strided["q"].is_contiguous()
    assert all(torch.equal(first[name], second[name]) for name in first)
