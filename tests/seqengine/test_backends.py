"""Every backend trains the same run: losses, norms, checkpoints, whatever holds the weights."""

import importlib.util

import pytest

from seqengine.errors import InputError
from tests.seqengine.runs import config, is_same, losses, train_on

pytestmark = pytest.mark.usefixtures("deepspeed_imported")
STEPS = "train.steps=20"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)
ZERO = [
    pytest.param(("parallel.backend=deepspeed", f"parallel.zero={stage}"), id=f"zero{stage}", marks=needs_deepspeed)
    for stage in (1, 2, 3)
]
DDP = pytest.param(("parallel.backend=ddp",), id="ddp")
FSDP2 = pytest.param(("parallel.backend=fsdp2",), id="fsdp2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and norms of 20 steps in one process, clipping at work."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for params in ("fp32", "fp64"):
        (folder / params).mkdir()
        train_on(1, folder / params, STEPS, "train.clip=0.05", f"precision.params={params}")
        found[params] = losses(folder / params), losses(folder / params, "grad_norm")
    return found


@pytest.mark.parametrize("backend", [DDP, FSDP2, *ZERO])
@pytest.mark.parametrize("mesh", [(), ("parallel.sequence=2",)], ids=["replicas", "sequence"])
def test_twenty_losses_are_those_of_one_process(tmp_path, alone, backend, mesh):
    train_on(2, tmp_path, STEPS, "train.clip=0.05", "train.micro_batch=2", *backend, *mesh)
    found, norms = alone["fp32"]
    assert max(norms) > 0.05, "clipping must be at work"
    assert losses(tmp_path) == pytest.approx(found, abs=1e-5)
    assert losses(tmp_path, "grad_norm") == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        ("parallel.backend=ddp",),
        ("parallel.backend=fsdp2", "parallel.sequence=2"),
        ("parallel.backend=fsdp2", "parallel.replicate=2", "parallel.shard=2"),
        ("parallel.backend=fsdp2", "parallel.replicate=2", "parallel.sequence=2"),
    ],
    ids=["ddp", "fsdp2 2x2", "hsdp 2x2", "hsdp with sequence"],
)
def test_four_ranks_in_float64_agree_to_rounding(tmp_path, alone, settings):
    train_on(4, tmp_path, STEPS, "train.clip=0.05", "precision.params=fp64", *settings)
    assert losses(tmp_path) == pytest.approx(alone["fp64"][0], rel=1e-10)
    assert losses(tmp_path, "grad_norm") == pytest.approx(alone["fp64"][1], rel=1e-9)


@pytest.mark.parametrize("backend", [FSDP2, *ZERO])
def test_a_checkpoint_goes_on_bit_for_bit_and_on_any_backend(tmp_path, alone, backend):
    every = (STEPS, "train.clip=0.05", "ckpt.every=12", "ckpt.keep=9")
    whole = train_on(2, tmp_path, *every, *backend)
    before = losses(tmp_path)
    cut(tmp_path, 20)
    again = train_on(2, tmp_path, *every, *backend)
    assert losses(tmp_path) == before
    assert all(is_same(a, b) for (_, a), (_, b) in zip(whole, again, strict=True))
    cut(tmp_path, 20)
    train_on(1, tmp_path, *every)
    assert losses(tmp_path) == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("backend", [FSDP2, *ZERO])
def test_a_checkpoint_of_one_process_goes_on_in_any_backend(tmp_path, alone, backend):
    every = (STEPS, "train.clip=0.05", "ckpt.every=12", "ckpt.keep=9")
    train_on(1, tmp_path, *every)
    cut(tmp_path, 20)
    train_on(2, tmp_path, *every, *backend)
    assert losses(tmp_path) == pytest.approx(alone["fp32"][0], abs=1e-5)


@pytest.mark.parametrize("backend", [DDP, FSDP2, *ZERO])
def test_bf16_steps_stay_close_to_those_of_one_process(tmp_path, backend):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for ranks, folder, more in ((1, "one", ()), (2, "two", backend)):
        train_on(ranks, tmp_path / folder, "train.steps=8", "precision.params=bf16", *more)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-3)


@pytest.mark.parametrize("what", ["selective", "block", "block offloaded"])
@pytest.mark.parametrize("settings", [(1, ()), (2, ("parallel.sequence=2",)), (2, ("parallel.backend=fsdp2",))])
def test_activations_made_again_change_nothing(tmp_path, what, settings):
    ranks, mesh = settings
    name, *offload = what.split()
    runs = {}
    again = (f"activation.checkpoint={name}", *(["activation.offload=true"] if offload else []))
    for folder, more in (("kept", ()), ("again", again)):
        (tmp_path / folder).mkdir()
        runs[folder] = train_on(ranks, tmp_path / folder, "model.resid_dropout=0.1", *mesh, *more)
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")
    assert is_same(runs["again"][0][1], runs["kept"][0][1])


def cut(folder, step):
    """Remove the checkpoint of a step."""
    directory = folder / "run" / "ckpt" / f"step-{step:08d}"
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def test_settings_that_exclude_each_other_are_told(tmp_path):
    for settings, words in (
        (("parallel.backend=deepspeed",), "needs parallel.zero"),
        (("parallel.zero=2",), "is of DeepSpeed"),
        (("parallel.shard=2",), "needs a backend that cuts weights"),
        (("parallel.backend=deepspeed", "parallel.zero=1", "precision.params=fp64"), "has no float64"),
        (("parallel.backend=deepspeed", "parallel.zero=1", "parallel.replicate=2"), "one copy"),
        (("parallel.backend=deepspeed", "parallel.zero=3", "optim.ema=0.9"), "needs whole weights"),
        (("activation.offload=true",), "needs activation.checkpoint = 'block'"),
    ):
        with pytest.raises(InputError, match=words):
            config(tmp_path, *settings)
