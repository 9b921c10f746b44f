"""The checkpoint store: what goes in comes out on any number of ranks, damage is found and named, nothing is lost."""

import hashlib
import shutil
import subprocess

import pytest
import torch

from seqengine.checkpoint.state import Progress, Record
from seqengine.checkpoint.store import CheckpointError, CheckpointStore, mesh_record
from seqengine.config.model import ModelConfig
from seqengine.config.optim import OptimSection
from seqengine.errors import InputError
from seqengine.model import build_model
from seqengine.optim import build_optimizer
from seqengine.parallel.mesh import Mesh
from tests.ranks import run_ranks
from tests.seqengine.runs import is_same

MODEL = ModelConfig(d_model=8, n_layer=1, max_len=16, embed_dropout=0.0)
CPU = torch.device("cpu")


def mesh_of(group):
    return Mesh.single(CPU) if group is None or group.size() == 1 else Mesh.create(1, group.size(), CPU)


def trained(seed=0, steps=2):
    """A model and its optimiser after a few steps on random tokens."""
    model = build_model(MODEL, seed=seed, params="fp32", device=CPU)
    optimizer = build_optimizer(model, OptimSection(lr=0.01))
    for step in range(steps):
        ids = torch.randint(7, 11, (2, 16), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model.loss(ids, ids)[0].backward()
        optimizer.step()
    return model, optimizer


def record(mesh, step):
    return Record(
        Progress(step, step * 100, step * 2, 1.5),
        {"seed": 1, "epoch": 0, "samples": 2 * step},
        mesh_record(mesh),
        "d" * 64,
    )


def everything(model, optimizer):
    state = {f"{n}.{k}": v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}
    return {**model.state_dict(), **state}


def save(directory, step=5, keep=3, mesh=None):
    mesh = mesh or Mesh.single(CPU)
    return CheckpointStore(directory, mesh, keep=keep).save(*trained(steps=2), record(mesh, step))


def _save_on(group, directory):
    torch.manual_seed(100 + group.rank())
    path = save(directory, mesh=mesh_of(group))
    return path.name, torch.rand(3)


def _load_on(group, directory):
    model, optimizer = trained(seed=9, steps=0)
    loaded = CheckpointStore(directory, mesh_of(group)).load_latest(model, optimizer)
    return everything(model, optimizer), loaded.record, loaded.same_mesh, torch.rand(3)


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (2, 2), (2, 1), (1, 3), (3, 2)])
def test_weights_and_moments_come_back_exactly_on_any_number_of_ranks(tmp_path, writers, readers):
    saved = run_ranks(writers, _save_on, tmp_path)
    assert {name for name, _ in saved} == {"step-00000005"}
    model, optimizer = trained()
    for rank, (tensors, found, same_mesh, noise) in enumerate(run_ranks(readers, _load_on, tmp_path)):
        assert is_same(tensors, everything(model, optimizer))
        assert found.progress == Progress(5, 500, 10, 1.5)
        assert found.stream == {"seed": 1, "epoch": 0, "samples": 10}
        assert same_mesh == (writers == readers)
        if same_mesh:
            assert torch.equal(noise, saved[rank][1]), "this rank's random state goes on where it was"


def test_checkpoint_is_sharded_and_sha256sum_agrees_with_the_manifest(tmp_path):
    run_ranks(2, _save_on, tmp_path)
    directory = tmp_path / "step-00000005"
    names = {p.name for p in directory.iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "engine.json", "MANIFEST.sha256"} == names
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    assert not list(tmp_path.glob("*.tmp*"))
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", "MANIFEST.sha256"], cwd=directory, check=True)
    for line in (directory / "MANIFEST.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest


def damage(directory, how):
    file = directory / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    if how == "flipped byte":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "missing file":
        file.unlink()
    elif how == "no manifest":
        (directory / "MANIFEST.sha256").unlink()
    elif how == "changed record":
        (directory / "engine.json").write_text("{}")


@pytest.mark.parametrize("how", ["flipped byte", "truncated", "missing file", "no manifest", "changed record"])
def test_damage_is_named_and_the_newest_whole_checkpoint_is_used(tmp_path, how):
    save(tmp_path, step=5)
    save(tmp_path, step=6)
    damage(tmp_path / "step-00000006", how)
    model, optimizer = trained(seed=9, steps=0)
    loaded = CheckpointStore(tmp_path, Mesh.single(CPU)).load_latest(model, optimizer)
    assert loaded.record.progress.step == 5
    (skipped,) = loaded.skipped
    named = {"no manifest": "MANIFEST.sha256", "changed record": "engine.json"}.get(how, "__0_0.distcp")
    assert skipped.startswith("step-00000006: ")
    assert named in skipped


def _load_damaged(group, directory):
    model, optimizer = trained(seed=9, steps=0)
    loaded = CheckpointStore(directory, mesh_of(group)).load_latest(model, optimizer)
    return loaded.record.progress.step, loaded.skipped


def test_all_ranks_pass_over_a_checkpoint_that_one_of_them_finds_damaged(tmp_path):
    save(tmp_path, step=5)
    save(tmp_path, step=6)
    damage(tmp_path / "step-00000006", "flipped byte")
    results = run_ranks(3, _load_damaged, tmp_path)
    assert [step for step, _ in results] == [5, 5, 5]
    assert len({skipped for _, skipped in results}) == 1


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error(tmp_path):
    store = CheckpointStore(tmp_path, Mesh.single(CPU))
    model, optimizer = trained(steps=0)
    assert store.load_latest(model, optimizer) is None
    save(tmp_path, step=5)
    damage(tmp_path / "step-00000005", "truncated")
    with pytest.raises(InputError, match=r"no checkpoint is whole: step-00000005: __0_0\.distcp does not have"):
        store.load_latest(model, optimizer)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step=step, keep=2)
    assert CheckpointStore(tmp_path, Mesh.single(CPU)).names() == ["step-00000003", "step-00000004"]


def test_what_a_killed_save_left_is_not_read_and_is_cleared_by_the_next(tmp_path):
    save(tmp_path, step=5)
    half = tmp_path / "step-00000006.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    model, optimizer = trained(seed=9, steps=0)
    assert CheckpointStore(tmp_path, Mesh.single(CPU)).load_latest(model, optimizer).record.progress.step == 5
    save(tmp_path, step=7)
    assert not half.exists()


def _save_fails_on_one(group, directory):
    import seqengine.checkpoint.store as module

    if group.rank() == 1:

        def full(path):
            raise OSError(28, "No space left on device")

        module.sha256 = full
    try:
        save(directory, step=6, mesh=mesh_of(group))
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_the_old_checkpoint(tmp_path):
    save(tmp_path, step=5)
    for message in run_ranks(2, _save_fails_on_one, tmp_path):
        assert "could not hash the checkpoint's files: rank 1: OSError: [Errno 28] No space left" in message
    store = CheckpointStore(tmp_path, Mesh.single(CPU))
    assert store.names() == ["step-00000005"]
    assert store.damage(tmp_path / "step-00000005") == []


def test_a_path_that_cannot_be_a_directory_is_a_clear_error(tmp_path):
    (tmp_path / "ckpt").write_text("a file")
    with pytest.raises(CheckpointError, match="could not make a directory for the checkpoint"):
        save(tmp_path / "ckpt")


def test_loading_a_model_of_another_shape_is_an_error_not_a_mixture(tmp_path):
    save(tmp_path)
    other = build_model(MODEL.model_copy(update={"d_model": 16}), seed=0, params="fp32", device=CPU)
    with pytest.raises(CheckpointError, match="could not read"):
        CheckpointStore(tmp_path, Mesh.single(CPU)).load_latest(other, None)
