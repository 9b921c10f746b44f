"""delta_rule against the recurrence token by token: values, every gradient, states, extreme gates and strengths, memory."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from seqengine.kernels.delta_rule.op import delta_rule
from seqengine.kernels.linear_attention import layout
from seqengine.kernels.linear_attention.op import simple_gla
from tests.kernels.largest_tensor import LargestTensor
from tests.tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOKENS = [1, 2, 3, 63, 64, 65, 257]
GATES = (0.0, -1e-3, -80.0, -1e4, -math.inf)
TOKEN_ARGUMENTS = ("q", "k", "v", "beta", "g")


def tensors(B, T, H, K, V, dtype=torch.float64, seed=0, gated=True):
    """Keys of length 1, strengths from 0 to 2."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    made = {"q": randn(B, T, H, K), "k": F.normalize(randn(B, T, H, K), dim=-1), "v": randn(B, T, H, V)}
    made["beta"] = 2 * rand(B, T, H)
    if gated:
        made["g"] = -(rand(B, T, H) ** 4)
    made = {name: x.to(dtype) for name, x in made.items()}
    made["initial_state"] = randn(B, H, K, V).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return made


def choose(values, *shape, seed=0):
    """Random picks of the values."""
    picks = torch.randint(0, len(values), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values, dtype=torch.float64)[picks]


def run(arguments, **options):
    """Output, final state, and the gradients of a fixed random projection of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in arguments.items()}
    o, state = delta_rule(**leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in (o, state))
    loss.backward()
    return {"o": o, "state": state, **{f"d_{name}": x.grad for name, x in leaves.items()}}


def assert_matches(actual, expected, tolerance=None):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], name, tolerance)


@pytest.mark.parametrize(("K", "V"), [(1, 3), (3, 1), (5, 8), (64, 4)])
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("gated", [True, False])
def test_matches_reference_with_every_gradient(T, K, V, gated):
    arguments = tensors(2, T, 2, K, V, gated=gated)
    assert_matches(run(arguments, backend="torch"), run(arguments, backend="reference"))


@pytest.mark.parametrize(("K", "V"), [(60, 100), (100, 60)])
def test_matches_reference_for_wide_heads(K, V):
    arguments = tensors(1, 130, 1, K, V)
    assert_matches(run(arguments), run(arguments, backend="reference"))


@pytest.mark.parametrize("gated", [True, False])
def test_matches_reference_without_a_state_and_with_a_scale(gated):
    arguments = tensors(2, 90, 2, 4, 5, gated=gated)
    del arguments["initial_state"]
    assert_matches(run(arguments, scale=0.7), run(arguments, scale=0.7, backend="reference"))
    assert_close(run(arguments)["o"] * 2.0, run(arguments, scale=1.0)["o"])


@pytest.mark.parametrize("elements", [1, 3000])
def test_matches_reference_over_many_blocks_and_segments(elements, monkeypatch):
    monkeypatch.setattr(layout, "TILE_ELEMENTS", {"cpu": elements})
    monkeypatch.setattr(layout, "SEGMENT_CHUNKS", 2)
    arguments = tensors(3, 450, 3, 2, 3)
    assert_matches(run(arguments), run(arguments, backend="reference"))
    plan = layout.make_plan(3, 450, 3, 2, 3, None, "cpu")
    assert plan.segments == 5
    assert len(layout.blocks(plan, 3, 3)) == (9 if elements == 1 else 2)


@pytest.mark.parametrize("strengths", [(0.0,), (1.0,), (2.0,), (-0.5,), (0.0, 1.0, 2.0, -0.5)], ids=str)
def test_any_strength_matches_reference(strengths):
    arguments = tensors(2, 130, 2, 6, 4)
    arguments["beta"] = choose(strengths, 2, 130, 2)
    assert_matches(run(arguments), run(arguments, backend="reference"))


def test_short_keys_of_any_length_match_reference():
    arguments = tensors(2, 200, 2, 5, 4)
    arguments["k"] *= torch.rand(2, 200, 2, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_matches(run(arguments), run(arguments, backend="reference"))


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_the_same_key_for_every_token_matches_reference(strength):
    arguments = tensors(1, 130, 2, 5, 4)
    arguments["k"] = arguments["k"][:, :1].expand(1, 130, 2, 5)
    arguments["beta"] = torch.full_like(arguments["beta"], strength)
    assert_matches(run(arguments), run(arguments, backend="reference"))


@pytest.mark.parametrize("pair", [*itertools.product(GATES, GATES)], ids=str)
def test_any_two_extreme_gates_match_reference(pair):
    arguments = tensors(1, 70, 2, 3, 2)
    arguments["g"] = choose(pair, 1, 70, 2)
    assert_matches(run(arguments), run(arguments, backend="reference"))


@pytest.mark.parametrize("seed", range(3))
def test_extreme_and_mild_gates_and_strengths_mixed_match_reference(seed):
    arguments = tensors(2, 200, 2, 5, 3, seed=seed)
    rare = choose((*GATES, *[-0.01] * 20), 2, 200, 2, seed=seed)
    arguments["g"] = torch.where(rare == -0.01, arguments["g"], rare)
    arguments["beta"] = torch.where(rare == -80.0, choose((0.0, 1.0, 2.0, -1.0), 2, 200, 2), arguments["beta"])
    actual = run(arguments)
    assert_matches(actual, run(arguments, backend="reference"))
    assert bool((actual["d_g"][torch.isinf(arguments["g"])] == 0).all())


def test_gradients_of_strong_gates_are_right_to_their_own_size():
    arguments = tensors(1, 100, 1, 3, 2)
    arguments["g"] = torch.full_like(arguments["g"], -60.0)
    arguments["g"][:, ::2] = -30.0
    actual, expected = run(arguments)["d_g"], run(arguments, backend="reference")["d_g"]
    assert float(expected.abs().max()) < 1e-12
    assert float(((actual - expected) / expected).abs().max()) < 1e-10


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gates_stay_finite_in_lower_precision(gate, dtype):
    arguments = tensors(1, 150, 2, 4, 4, dtype=dtype)
    arguments["g"][:, 40:90] = gate
    assert all(bool(torch.isfinite(x).all()) for x in run(arguments).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("T", [1, 300])
def test_lower_precision_is_near_float64(T, gated, dtype):
    arguments = tensors(2, T, 2, 16, 8, dtype=dtype, gated=gated)
    arguments["beta"] /= 2  # reflections would remember, and amplify, every rounding of a key's length
    expected = run({name: x.double() for name, x in arguments.items()}, backend="reference")
    actual = run(arguments)
    assert actual["o"].dtype == actual["d_beta"].dtype == dtype
    assert actual["state"].dtype == torch.float32
    assert_matches(actual, expected, RELATIVE[dtype])


def test_single_precision_remembers_for_as_long_as_double():
    a = tensors(1, 1 << 15, 1, 2, 2, dtype=torch.float32)
    a["g"] = torch.full_like(a["g"], -1e-6)
    a["beta"] *= 1e-4
    a["q"], a["k"], a["v"], a["initial_state"] = (a[name].abs() for name in ("q", "k", "v", "initial_state"))
    assert_matches(run(a), run({name: x.double() for name, x in a.items()}))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("T", [1, 2, 6])
def test_gradcheck_and_gradgradcheck(T, gated):
    arguments = tensors(1, T, 2, 2, 3, gated=gated)
    names = list(arguments)

    def function(*values):
        return delta_rule(**dict(zip(names, values, strict=True)), output_final_state=True)

    leaves = [x.requires_grad_() for x in arguments.values()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_second_and_third_derivatives_match_reference():
    arguments = tensors(1, 70, 2, 3, 2)
    arguments["g"][:, 20:24] = choose(GATES, 1, 4, 2)
    found = {}
    for backend in ("torch", "reference"):
        leaves = [x.clone().requires_grad_() for x in arguments.values()]
        o, _ = delta_rule(**dict(zip(arguments, leaves, strict=True)), backend=backend)
        first = torch.autograd.grad(o.pow(2).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.pow(2).sum() for x in first), leaves, create_graph=True)
        third = torch.autograd.grad(sum(x.sum() for x in second), leaves)
        found[backend] = [*second, *third]
    for actual, expected in zip(found["torch"], found["reference"], strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("use", ["output", "state"])
def test_derivatives_of_only_the_output_or_only_the_state_match_reference(use):
    arguments = tensors(1, 70, 2, 16, 2)
    arguments["beta"] /= 4  # what the first token wrote must not be all but overwritten in the last state
    found = {}
    for backend in ("torch", "reference"):
        leaves = [x.clone().requires_grad_() for x in arguments.values()]
        result = delta_rule(**dict(zip(arguments, leaves, strict=True)), backend=backend, output_final_state=True)
        loss = result[use == "state"].pow(2).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum(x.pow(2).sum() for x in first if x is not None), leaves, allow_unused=True)
        found[backend] = [torch.zeros(()) if x is None or not x.any() else x for x in (*first, *second)]
    for actual, expected in zip(found["torch"], found["reference"], strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("cuts", [[1] * 70, [5, 0, 65], [69, 1], [17, 33, 20], [1, 64, 5]], ids=str)
@pytest.mark.parametrize("gates", ["none", "mild", "extreme"])
def test_any_cut_with_states_is_the_uncut_result_with_gradients(cuts, gates):
    def whole_or_cut(sizes):
        a = tensors(2, 70, 2, 3, 4, seed=3, gated=gates != "none")
        if gates == "extreme":
            a["g"] = choose((*GATES, -0.1), 2, 70, 2)
        a = {name: x.requires_grad_() for name, x in a.items()}
        state, outputs = a["initial_state"], []
        for parts in zip(*(a[name].split(sizes, 1) for name in TOKEN_ARGUMENTS if name in a), strict=True):
            o, state = delta_rule(*parts, initial_state=state, output_final_state=True)
            outputs.append(o)
        o = torch.cat(outputs, 1)
        ((o * torch.arange(70.0, dtype=torch.float64)[:, None, None]).sum() + (state**2).sum()).backward()
        return {"o": o, "state": state, **{name: x.grad for name, x in a.items()}}

    assert_matches(whole_or_cut(cuts), whole_or_cut([70]))


@pytest.mark.parametrize("gated", [True, False])
def test_decoding_is_one_call(gated):
    a = tensors(2, 20, 2, 4, 3, gated=gated)
    expected, last = delta_rule(**a, output_final_state=True)
    state, outputs = a.pop("initial_state"), []
    for t in range(20):
        token = {name: x[:, t : t + 1] for name, x in a.items()}
        o, state = delta_rule(**token, initial_state=state, output_final_state=True)
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), expected)
    assert_close(state, last)


def test_one_token_builds_nothing_larger_than_the_state():
    arguments = tensors(2, 1, 3, 16, 8)
    with LargestTensor() as largest:
        run(arguments)
    assert largest.elements == arguments["initial_state"].numel()


@pytest.mark.parametrize("gated", [True, False])
def test_orthogonal_keys_make_it_linear_attention_of_scaled_values(gated):
    a = tensors(2, 64, 2, 64, 5, gated=gated)
    del a["initial_state"]
    a["k"] = torch.linalg.qr(a["k"].transpose(1, 2))[0].transpose(1, 2)
    o, state = delta_rule(**a, output_final_state=True)
    values = a.pop("beta")[..., None] * a.pop("v")
    expected, last = simple_gla(**a, v=values, output_final_state=True)
    assert_close(o, expected)
    assert_close(state, last)


def test_a_strength_of_one_overwrites_what_the_key_held():
    a = tensors(2, 130, 2, 6, 4)
    a["beta"] = torch.ones_like(a["beta"])
    o, _ = delta_rule(**a | {"q": a["k"]}, scale=1.0)
    assert_close(o, a["v"])


def test_a_strength_of_zero_only_forgets():
    a = tensors(2, 130, 2, 6, 4)
    a["beta"] = torch.zeros_like(a["beta"])
    _, state = delta_rule(**a, output_final_state=True)
    assert_close(state, a["initial_state"] * a["g"].sum(dim=1).exp()[..., None, None])


def test_a_strength_of_two_without_values_keeps_the_length_of_the_state():
    a = tensors(2, 130, 2, 6, 4, gated=False)
    a["beta"], a["v"] = torch.full_like(a["beta"], 2.0), torch.zeros_like(a["v"])
    _, state = delta_rule(**a, output_final_state=True)
    assert_close(state.norm(dim=2), a["initial_state"].norm(dim=2))


def test_future_does_not_reach_the_past():
    a = tensors(1, 300, 2, 4, 4)
    before, _ = delta_rule(**a)
    a["v"][:, 150] += 1e6
    a["k"][:, 150] *= -0.5
    a["g"][:, 150:] = -5.0
    a["beta"][:, 150:] = 0.3
    after, _ = delta_rule(**a)
    assert torch.equal(after[:, :150], before[:, :150])
    assert float((after - before)[:, 150].abs().max()) > 1


def test_a_gate_of_zero_forgets_everything_before_it():
    a = tensors(1, 130, 2, 3, 3)
    a["g"][:, 100] = -math.inf
    whole, state = delta_rule(**a, output_final_state=True)
    rest, last = delta_rule(*(a[name][:, 100:] for name in TOKEN_ARGUMENTS), output_final_state=True)
    assert_close(whole[:, 100:], rest)
    assert_close(state, last)


@pytest.mark.parametrize("shape", [(0, 5, 2, 3, 4), (2, 0, 2, 3, 4), (2, 5, 0, 3, 4)], ids=str)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_empty_tensors_give_empty_results_and_zero_gradients(shape, with_state, gated):
    a = tensors(*shape, gated=gated)
    if not with_state:
        del a["initial_state"]
    a = {name: x.requires_grad_() for name, x in a.items()}
    o, state = delta_rule(**a, output_final_state=True)
    (o.sum() + state.sum()).backward()
    assert o.shape == a["v"].shape
    assert state.shape == (shape[0], shape[2], 3, 4)
    assert torch.equal(state, a["initial_state"] if with_state else torch.zeros_like(state))
    for name in a.keys() - {"initial_state"}:
        assert torch.equal(a[name].grad, torch.zeros_like(a[name]))


def test_non_contiguous_inputs():
    a = tensors(2, 70, 3, 4, 5)
    strided = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in a.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    assert_matches(run(strided), run(a))


def test_inputs_are_left_as_they_were():
    a = tensors(1, 128, 1, 64, 64)
    kept = {name: x.clone() for name, x in a.items()}
    run(a)
    delta_rule(**a)
    assert all(torch.equal(a[name], kept[name]) for name in a)


def test_two_runs_agree_bit_for_bit():
    a = tensors(2, 333, 3, 8, 8, dtype=torch.float32)
    first, second = run(a), run(a)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_temporaries_do_not_grow_with_the_sequence():
    a = tensors(1, 32768, 2, 16, 16, dtype=torch.float32)
    with LargestTensor() as largest:
        run(a)
    assert largest.elements <= a["q"].numel()


def test_saves_its_arguments_and_few_states():
    a = {name: x.requires_grad_() for name, x in tensors(1, 8192, 2, 16, 16, dtype=torch.float32).items()}
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
        delta_rule(**a)
    own = {x.data_ptr() for x in a.values()}
    assert own <= saved.keys()
    assert sum(x.numel() for address, x in saved.items() if address not in own) <= a["q"].numel() / 50
