"""What goes into the store comes out on any number of ranks, whole or in shards, and nothing is left out silently."""

import hashlib
import json
import os
import shutil
import subprocess

import pytest
import torch

from seqengine.checkpoint.state import Progress, Record, model_tensors, optimizer_tensors, restore_rng, rng_tensors
from seqengine.checkpoint.store import CheckpointStore
from seqengine.errors import InputError
from tests.ranks import run_ranks
from tests.seqengine.checkpoints import (
    CPU,
    EVERYTHING,
    blank,
    is_equal,
    mesh_of,
    read,
    record,
    save,
    save_on,
    sharded,
    single,
    values,
    whole,
)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A checkpoint that two ranks wrote; tests only read it."""
    folder = tmp_path_factory.mktemp("two")
    assert set(run_ranks(2, save_on, folder)) == {"step-00000005"}
    return folder / "step-00000005"


def _load_on(group, directory, dim):
    mesh = mesh_of(group)
    store = CheckpointStore(directory.parent, mesh)
    found = store.newest()
    tensors = sharded(blank(), mesh, dim)
    is_exact = found.record.was_on(mesh.axes)
    everything = tensors | (rng_tensors(mesh.rank, CPU) if is_exact else {})
    store.load(found.directory, everything, prefixes=EVERYTHING if is_exact else ("model.", "optim."))
    if is_exact:
        restore_rng(everything, mesh.rank, CPU)
    return whole(tensors), found, is_exact, torch.rand(3)


@pytest.mark.parametrize(("readers", "dim"), [(2, 0), (3, 1)])
def test_what_two_ranks_wrote_comes_back_exactly_on_any_number(by_two, readers, dim):
    for rank, (tensors, found, is_exact, noise) in enumerate(run_ranks(readers, _load_on, by_two, dim)):
        assert is_equal(tensors, values())
        assert found.record.progress == Progress(5, 500, 10, 1.5, 1)
        assert found.record.stream == {"seed": 1, "epoch": 0, "samples": 10}
        assert found.record.extra == {"spikes": [1, 2]}
        assert is_exact == (readers == 2)
        if readers == 2:
            expected = torch.rand(3, generator=torch.Generator().manual_seed(100 + rank))
            assert torch.equal(noise, expected), "this rank's random state goes on where it was"


def test_shards_of_two_ranks_are_plain_tensors_on_one(by_two):
    assert is_equal(read(by_two), values())


def test_shards_of_more_ranks_than_rows_come_back(tmp_path):
    """Of 5 rows over 3 ranks the last has one, and of 7 x 5 no rank more than others' share is written twice."""
    run_ranks(3, save_on, tmp_path)
    assert is_equal(read(tmp_path / "step-00000005"), values())


def test_checkpoint_is_shared_out_and_sha256sum_agrees_with_the_manifest(by_two):
    names = {p.name for p in by_two.iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "engine.json", "MANIFEST.sha256"} == names
    sizes = [(by_two / name).stat().st_size for name in ("__0_0.distcp", "__1_0.distcp")]
    assert min(sizes) > 0.3 * max(sizes), "what all ranks hold alike is written once, by turns"
    assert (by_two.parent / "latest").read_text() == "step-00000005\n"
    assert {p.name for p in by_two.parent.iterdir()} == {"latest", "step-00000005"}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "MANIFEST.sha256"], cwd=by_two, check=True)
    lines = (by_two / "MANIFEST.sha256").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == names - {"MANIFEST.sha256"}
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((by_two / name).read_bytes()).hexdigest() == digest
    assert str(by_two.parent).encode() not in (by_two / ".metadata").read_bytes(), "no paths of this machine"


def test_every_file_is_synced_before_the_rename_and_the_directory_after(tmp_path, monkeypatch):
    order = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    rename = type(tmp_path).rename
    monkeypatch.setattr(type(tmp_path), "rename", lambda a, b: (order.append(f"rename {b}"), rename(a, b))[1])
    save(tmp_path)
    aside, final = f"{tmp_path}/step-00000005.tmp", f"{tmp_path}/step-00000005"
    renamed = order.index(f"rename {final}")
    files = [f"{aside}/{name}" for name in ("__0_0.distcp", "engine.json", "MANIFEST.sha256")]
    assert set(files) <= set(order[:renamed])
    assert any(".metadata" in name for name in order[:renamed])
    assert order[renamed - 2 : renamed] == [aside, f"{tmp_path}/latest.tmp"]
    assert tmp_path.as_posix() in order[renamed:]


@pytest.mark.parametrize(
    ("change", "prefixes", "message"),
    [
        ({"model.weight": None}, EVERYTHING, "it also holds model.weight"),
        ({"model.more": torch.zeros(1)}, EVERYTHING, "it lacks model.more"),
        ({"model.half": torch.zeros(34)}, EVERYTHING, r"model.half is \[33\] there and \[34\] here"),
        ({"optim.weight.step": torch.zeros(1)}, ("model.",), r"optim.weight.step is \[\] there and \[1\] here"),
        ({f"model.{i}": torch.zeros(1) for i in range(9)}, ("model.",), r"model.4 and 4 more"),
        ({"rng.rank-0": None}, EVERYTHING, "it also holds rng.rank-0"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_left_as_it_was(by_two, change, prefixes, message):
    tensors = {name: t for name, t in (blank() | rng_tensors(0, CPU) | change).items() if t is not None}
    before = {name: t.clone() for name, t in tensors.items()}
    with pytest.raises(InputError, match=message):
        CheckpointStore(by_two.parent, single()).load(by_two, tensors, prefixes=prefixes)
    assert is_equal(tensors, before)


def test_only_what_begins_with_a_prefix_must_be_asked_for(by_two):
    tensors = {name: t for name, t in blank().items() if name.startswith("model.")}
    CheckpointStore(by_two.parent, single()).load(by_two, tensors, prefixes=("model.",))
    assert is_equal(tensors, {name: t for name, t in values().items() if name in tensors})


def test_a_model_of_another_shape_on_one_rank_is_refused_on_all(by_two):
    outcomes = run_ranks(2, _misfit_on, by_two)
    assert outcomes[0] == outcomes[1]
    assert "it lacks model.only-on-1" in outcomes[0]


def _misfit_on(group, directory):
    tensors = blank() | ({"model.only-on-1": torch.zeros(1)} if group.rank() else {})
    try:
        CheckpointStore(directory.parent, mesh_of(group)).load(directory, tensors, prefixes=("model.",))
    except InputError as error:
        return str(error)
    return "no error"


def test_a_checkpoint_of_format_1_is_still_read(tmp_path):
    from tests.seqengine.checkpoints import sign_again

    directory = save(tmp_path)
    old = json.loads((directory / "engine.json").read_text())
    del old["extra"], old["progress"]["stage"], old["mesh"]["shard"]
    (directory / "engine.json").write_text(json.dumps(old | {"format": 1}))
    sign_again(directory)
    found = CheckpointStore(tmp_path, single()).newest()
    assert found.record.progress == Progress(5, 500, 10, 1.5, 0)
    assert found.record.extra == {}
    assert found.record.was_on(single().axes)
    assert found.record.was_on(single().axes | {"backend": "fsdp2"}), "it did not say"
    assert not found.record.was_on(single().axes | {"shard": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be the record"),
        ("[]", "got list"),
        ('{"format": 3}', "must be 1 or 2; got 3"),
        ('{"format": 2}', "record"),
    ],
)
def test_a_record_that_is_none_is_bad_input(tmp_path, text, message):
    (tmp_path / "engine.json").write_text(text)
    with pytest.raises(InputError, match=message):
        Record.read(tmp_path)


def test_the_record_is_that_of_the_save_not_of_later(tmp_path):
    now = record(single(), 5)
    store = CheckpointStore(tmp_path, single(), asynchronous=True)
    store.save(values(), now)
    now.progress.step = 99
    assert store.wait().name == "step-00000005"
    assert store.newest().record.progress.step == 5
    store.close()


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
        lambda ps: torch.optim.AdamW(ps, lr=0.1, amsgrad=True, foreach=True),
        lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2], lr=0.1),
    ],
    ids=["fused AdamW", "AMSGrad", "Muon"],
)
def test_an_optimiser_that_has_not_stepped_takes_the_state_of_one_that_has(tmp_path, make):
    def step(model, optimizer, times):
        for _ in range(times):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()

    model, fresh = _model(), _model()
    optimizer, late = make(list(model.parameters())), make(list(fresh.parameters()))
    step(model, optimizer, 3)
    saved = model_tensors(model) | optimizer_tensors(model, optimizer)
    store = CheckpointStore(tmp_path, single())
    store.save(saved, record(single(), 3))
    weights = {name: t.clone() for name, t in fresh.state_dict().items()}
    tensors = model_tensors(fresh) | optimizer_tensors(fresh, late)
    assert all(torch.equal(t, weights[name]) for name, t in fresh.state_dict().items()), "making state moves no weight"
    assert all(not t.any() for name, t in tensors.items() if name.startswith("optim."))
    store.load(store.wait(), tensors, prefixes=EVERYTHING)
    assert is_equal(tensors, saved)
    step(model, optimizer, 2)
    step(fresh, late, 2)
    assert is_equal(model_tensors(fresh), model_tensors(model)), "it goes on bit for bit"


def test_plain_numbers_of_an_optimiser_become_tensors_in_its_state():
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state[model[0].weight] = {"step": 3, "exp_avg": torch.ones(4, 3)}
    tensors = optimizer_tensors(model, optimizer)
    assert tensors["optim.0.weight.step"].item() == 3
    assert tensors["optim.0.weight.step"] is optimizer.state[model[0].weight]["step"]
    with pytest.raises(TypeError, match="got SGD"):
        optimizer_tensors(model, torch.optim.SGD(model.parameters(), lr=0.1))
