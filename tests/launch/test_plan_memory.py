"""The memory of a plan, against what a step on a CPU allocates, as torch's own allocator reports it."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from seqengine.backends.backend import Backend, arithmetic
from seqengine.launch.planning.memory import Activations, count_sizes, rank_memory
from seqengine.launch.planning.trace import trace_block
from seqengine.launch.planning.traffic import Layout
from seqengine.memory import activation_bytes, split_context
from seqengine.mixers.registry import MIXERS
from seqengine.model import LanguageModel, build_model
from seqengine.parallel.context import SequenceContext
from seqengine.parallel.mesh import Mesh
from tests.launch.test_plan_bytes import run_config

CPU = torch.device("cpu")


def alone(checkpoint):
    return Layout(1, 1, 1, "none", None, checkpoint, 1)


def batch(rows, tokens):
    ids = torch.randint(7, 11, (rows, tokens))
    return ids, ids.clone(), ids[:, 0].clone()


def kept_bytes(config, rows, tokens):
    """What autograd keeps, as its own hooks see it."""
    model = build_model(config.model, seed=0, params=config.precision.params, device=CPU)
    model.save_memory(config.activation.checkpoint)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found, alive = {}, []

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    ids, labels, keys = batch(rows, tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), arithmetic(config, CPU):
        model.objective(ids, labels, ctx=SequenceContext.single(tokens), dropout_keys=keys)
    return sum(found.values())


def step_peak(config, rows, tokens):
    """Weights, moments, and the most that was allocated at once in the second step of a run."""
    model = build_model(config.model, seed=0, params=config.precision.params, device=CPU)
    model.save_memory(config.activation.checkpoint)
    backend = Backend(model, config, Mesh.single(CPU))
    ids, labels, keys = batch(rows, tokens)

    def step():
        backend.begin()
        backend.accumulate(ids, labels, float(ids.numel()), last=True, dropout_keys=keys)
        backend.finish()
        backend.update()

    step()
    backend.begin()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > 0
    return most + sum(x.untyped_storage().nbytes() for x in backend.tensors().values())


CASES = [
    (("hyena", "attention", "gla"), "none", "fp32", 1024, 2),
    (("hyena_se", "hyena_li", "long_conv"), "selective", "fp32", 512, 4),
    (("hyena", "hyena_mr"), "block", "bf16", 2048, 2),
    # Short windows, where what operators need for a while is a good part.
    *(((name, name), "block", "fp32", 256, 4) for name in MIXERS),
    (("long_conv", "sgconv", "attention"), "block", "fp32", 256, 4),
    (("retention", "s4d"), "none", "fp32", 256, 4),
    # Longer ones than are looked into.
    (("gated_delta",), "block", "fp32", 4608, 1),
]


@pytest.mark.parametrize(("pattern", "checkpoint", "params", "tokens", "rows"), CASES)
def test_a_step_allocates_what_the_plan_says(pattern, checkpoint, params, tokens, rows):
    config = run_config(pattern, params=params, checkpoint=checkpoint, d_model=64, max_len=tokens)
    needs = Activations(config, "cpu").timeline(rows, tokens, alone(checkpoint))
    assert needs.kept + needs.received == kept_bytes(config, rows, tokens)
    with torch.device("meta"):
        sizes = count_sizes(config, LanguageModel(config.model))
    planned = rank_memory(config, sizes, alone(checkpoint), needs, 1)
    assert planned.total == pytest.approx(step_peak(config, rows, tokens), rel=0.15)


def test_more_ranks_than_are_traced_keep_what_a_trace_of_them_keeps():
    config = run_config(("hyena",), d_model=16, max_len=1024)
    said = Activations(config, "cpu").timeline(1, 1024, Layout(1, 1, 8, "none", None, "none", 8))
    traced = trace_block(config, 0, 1, split_context(1024, 8, 4))
    stem_and_head = Activations(config, "cpu").timeline(1, 128, alone("none")).kept
    stem_and_head -= trace_block(config, 0, 1, split_context(128, 1, 0)).kept
    assert said.kept == pytest.approx(traced.kept + stem_and_head, rel=0.02)


def test_what_the_trainer_counts_on_several_ranks_is_what_the_plan_counts():
    config = run_config(("hyena", "hyena_se"), d_model=16, max_len=256, embed_dropout=0.1)
    planned = Activations(config, "cpu").timeline(1, 256, Layout(1, 1, 2, "none", None, "none", 2))
    # A plan counts labels and keys apart from the ids: 8 bytes a token and window.
    assert planned.kept - activation_bytes(config, 1, 256, 2) == 8 * 128 + 8


def test_of_many_windows_a_search_reckons_from_one_and_two():
    config = run_config(("hyena",), d_model=16)
    exact, reckoned = Activations(config, "cpu"), Activations(config, "cpu", exact=False)
    assert reckoned.timeline(5, 64, alone("none")).kept == exact.timeline(5, 64, alone("none")).kept


def test_weights_are_cut_as_the_backend_cuts_them():
    config = run_config(("hyena",), d_model=32)
    with torch.device("meta"):
        sizes = count_sizes(config, LanguageModel(config.model))
    needs, whole = Activations(config, "cpu").timeline(1, 64, alone("none")), 4 * sizes.numbers

    def cut(backend, zero, micro_batches=1):
        found = rank_memory(config, sizes, Layout(1, 4, 1, backend, zero, "none", 4), needs, micro_batches)
        return found.weights, found.gradients, found.moments

    assert cut("ddp", None) == (whole, whole, 2 * whole)
    assert cut("fsdp2", None) == (whole // 4, whole // 4, 2 * whole // 4)
    assert cut("fsdp2", None, micro_batches=2) == (whole // 4, whole, 2 * whole // 4)
    assert cut("deepspeed", 1) == (whole, whole, 2 * whole // 4)
    assert cut("deepspeed", 2) == (whole, whole // 4, 2 * whole // 4)
    assert cut("deepspeed", 3) == (whole // 4, whole // 4, 2 * whole // 4)
