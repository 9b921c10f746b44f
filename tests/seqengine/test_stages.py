"""Length stages: which steps are whose, the same run on every mesh, resume inside a stage."""

import pytest
import torch

from seqengine.backends.backend import arithmetic
from seqengine.errors import InputError
from seqengine.memory import StepMemory, activation_bytes, check_memory, shares
from seqengine.model import build_model
from seqengine.parallel.context import SequenceContext
from seqengine.stages import stage_at, stages_of
from tests.seqengine.runs import config, is_same, losses, train_on
from tests.seqengine.test_stop_and_resume import samples

TWO = "data.stages=[{ tokens = 1000, seq_len = 16 }, { seq_len = 32 }]"
LAID_OUT = "data.stages=[{ tokens = 1000, seq_len = 16, sequence = 1 }, { seq_len = 32, sequence = 2 }]"
STEPS = "train.steps=8"
CPU = torch.device("cpu")


def test_a_step_belongs_to_the_stage_of_its_first_token(tmp_path):
    stages = stages_of(config(tmp_path, STEPS, TWO).config)
    # 256 tokens a step: the steps from tokens 0, 256, 512 and 768 begin before token 1000, that from 1024 does not.
    assert [(s.first_step, s.end_step, s.seq_len, s.windows_per_step) for s in stages] == [
        (0, 4, 16, 16),
        (4, 8, 32, 8),
    ]
    assert [stage_at(stages, step).index for step in range(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert stages[0].seed != stages[1].seed


def test_without_stages_a_run_is_one(tmp_path):
    (stage,) = stages_of(config(tmp_path, STEPS).config)
    assert (stage.first_step, stage.end_step, stage.seq_len, stage.windows_per_step) == (0, 8, 32, 8)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    results = train_on(1, folder, STEPS, TWO, "log.samples=true", "precision.params=fp64")
    return folder, results


@pytest.mark.parametrize("settings", [(TWO,), (LAID_OUT,), (LAID_OUT, "parallel.backend=fsdp2")])
def test_every_layout_of_stages_trains_the_same_run(tmp_path, one_process, settings):
    train_on(2, tmp_path, STEPS, "precision.params=fp64", *settings)
    assert losses(tmp_path) == pytest.approx(losses(one_process[0]), rel=1e-10)


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_run_stopped_inside_a_stage_goes_on_there(tmp_path, one_process, stop_at):
    folder, whole = one_process
    common = (STEPS, TWO, "log.samples=true", "precision.params=fp64")
    train_on(1, tmp_path, *common, stop_at=stop_at)
    cut = train_on(1, tmp_path, *common)
    assert losses(tmp_path) == losses(folder)
    assert samples(tmp_path, 1) == samples(folder, 1)
    assert is_same(cut[0][1], whole[0][1])


def test_stages_that_cannot_work_are_told(tmp_path):
    for stages, words in (
        ("[{ seq_len = 16 }, { seq_len = 32 }]", r"data\.stages\[0\]\.tokens: missing"),
        ("[{ tokens = 1000, seq_len = 16 }]", r"data\.stages\[0\]\.tokens: the last stage runs to the end"),
        (
            "[{ tokens = 1000, seq_len = 16 }, { seq_len = 64 }]",
            r"data\.seq_len = 32 must be data\.stages\[1\]\.seq_len = 64",
        ),
        ("[{ tokens = 4000, seq_len = 16 }, { seq_len = 32 }]", r"have 4000 tokens, which must be less than the 2048"),
        (
            "[{ tokens = 1000, seq_len = 24 }, { seq_len = 32 }]",
            r"must be a multiple of data\.stages\[0\]\.seq_len = 24",
        ),
        (
            "[{ tokens = 1000, seq_len = 128 }, { seq_len = 32 }]",
            r"data\.stages\[0\]\.seq_len = 128 must be at most model\.max_len",
        ),
        ("[{ tokens = 1000, seq_len = 16, sequence = 64 }, { seq_len = 32 }]", r"more ranks than tokens"),
        ("[{ tokens = 1000, seq_len = 16, micro_batch = 5 }, { seq_len = 32 }]", r"data\.stages\[0\]\.micro_batch = 5"),
    ):
        with pytest.raises(InputError, match=words):
            config(tmp_path, STEPS, f"data.stages={stages}")


@pytest.mark.parametrize("kept", ["none", "selective", "block"])
@pytest.mark.parametrize("params", ["fp32", "fp64", "bf16"])
def test_activations_are_counted_to_the_byte(tmp_path, kept, params):
    loaded = config(tmp_path, STEPS, f"activation.checkpoint={kept}", f"precision.params={params}")
    model = build_model(loaded.config.model, seed=0, params=params, device=CPU)
    model.save_memory(kept)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found, alive = {}, []

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    ids = torch.randint(7, 11, (3, 32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), arithmetic(loaded.config, CPU):
        model.objective(ids, ids, ctx=SequenceContext.single(32), dropout_keys=ids[:, 0])
    assert activation_bytes(loaded.config, 3, 32) == sum(found.values())


@pytest.mark.parametrize(
    ("backend", "zero", "micro_batches", "expected"),
    [
        ("none", None, 1, (1, 1, 1)),
        ("ddp", None, 3, (1, 1, 1)),
        ("fsdp2", None, 1, (4, 4, 4)),
        ("fsdp2", None, 2, (4, 1, 4)),
        ("deepspeed", 1, 2, (1, 1, 4)),
        ("deepspeed", 2, 2, (1, 4, 4)),
        ("deepspeed", 3, 2, (4, 4, 4)),
    ],
)
def test_a_rank_holds_the_share_that_its_backend_cuts(backend, zero, micro_batches, expected):
    assert shares(backend, zero, 4, micro_batches) == expected
    assert shares(backend, zero, 1, micro_batches) == (1, 1, 1)


def test_a_stage_that_cannot_fit_is_named(tmp_path):
    short, long = stages_of(config(tmp_path, STEPS, TWO).config)
    needs = {short: StepMemory(10, 10, 20, 100), long: StepMemory(10, 10, 20, 1000)}
    check_memory(needs, 2080, 2)
    with pytest.raises(InputError, match=r"stage 2: 32 tokens over 1 ranks, steps 4 to 8 needs at least"):
        check_memory(needs, 2079, 2)


def test_a_stage_that_does_not_fit_stops_the_run_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("seqengine.memory.available_bytes", lambda device: 1 << 10)
    with pytest.raises(AssertionError, match="Split windows over more ranks"):
        train_on(1, tmp_path, STEPS, TWO)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
