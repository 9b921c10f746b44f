"""Damage is found whatever it is, named, and passed over; nothing that a checkpoint's files hold is executed."""

import io
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from seqengine.checkpoint.manifest import MANIFEST, sha256
from seqengine.checkpoint.store import CheckpointError, CheckpointStore
from seqengine.errors import InputError
from tests.ranks import run_ranks
from tests.seqengine.checkpoints import blank, is_equal, mesh_of, read, save, save_on, sign_again, single, values

FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "engine.json", MANIFEST)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A checkpoint that two ranks wrote. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks(2, save_on, folder)
    return folder / "step-00000005"


def corrupt(directory: Path, chance: random.Random) -> None:
    """One fault: a flipped bit, a cut, a lost file, or two files in each other's place."""
    path = directory / chance.choice(FILES)
    content = bytearray(path.read_bytes())
    how = chance.choice(["flip", "truncate", "delete", "swap"])
    if how == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif how == "delete":
        path.unlink()
    else:
        other = directory / chance.choice([name for name in FILES if name != path.name])
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)


@pytest.mark.parametrize("seed", range(100))
def test_every_corruption_is_found_and_none_is_loaded(by_two, tmp_path, seed):
    directory = shutil.copytree(by_two, tmp_path / by_two.name)
    corrupt(directory, random.Random(seed))
    store = CheckpointStore(tmp_path, single())
    assert store.damage(directory) != []
    with pytest.raises(InputError, match="no checkpoint is whole: step-00000005: "):
        store.newest()


def test_what_is_not_corrupted_is_whole(by_two):
    assert CheckpointStore(by_two.parent, single()).damage(by_two) == []


@pytest.mark.parametrize("name", FILES)
def test_every_single_bit_of_the_small_files_is_guarded(by_two, tmp_path, name):
    """Of the manifest each bit, of the others some: hashes are the same everywhere."""
    directory = shutil.copytree(by_two, tmp_path / by_two.name)
    store = CheckpointStore(tmp_path, single())
    content = (directory / name).read_bytes()
    places = range(len(content)) if name == MANIFEST else range(0, len(content), len(content) // 10)
    for place in places:
        (directory / name).write_bytes(
            content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        )
        assert store.damage(directory) != [], f"bit {place % 8} of byte {place}"


def lose_the_line_and_the_file(directory):
    (directory / "__1_0.distcp").unlink()
    lines = (directory / MANIFEST).read_text().splitlines(keepends=True)
    (directory / MANIFEST).write_text("".join(line for line in lines if "__1_0" not in line))


def lose_the_line(directory):
    lines = (directory / MANIFEST).read_text().splitlines(keepends=True)
    (directory / MANIFEST).write_text("".join(line for line in lines if "__1_0" not in line))


def write_the_lines_in_another_order(directory):
    lines = (directory / MANIFEST).read_text().splitlines(keepends=True)
    (directory / MANIFEST).write_text("".join(reversed(lines)))


def take_those_of_another_seed(directory):
    other = save(directory.parent / "other", 5, seed=2)
    shutil.copy(other / "__0_0.distcp", directory / "__0_0.distcp")


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (write_the_lines_in_another_order, "MANIFEST.sha256 is damaged"),
        (lose_the_line, "MANIFEST.sha256 does not list __1_0.distcp"),
        (
            lose_the_line_and_the_file,
            ".metadata cannot be read safely: .*'__1_0.distcp', which is no file of the checkpoint",
        ),
        (take_those_of_another_seed, "__0_0.distcp does not have the contents that were saved"),
        (empty, "step-00000006 has no MANIFEST.sha256"),
        (lambda d: (d / MANIFEST).write_text(""), "MANIFEST.sha256 is empty"),
        (lambda d: (d / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda d: ((d / ".metadata").unlink(), (d / ".metadata").mkdir()), ".metadata cannot be read: Is a directory"),
        (lambda d: None, "engine.json is of step 5"),
    ],
)
def test_damage_is_named_and_the_newest_whole_checkpoint_is_used(by_two, tmp_path, fault, named):
    shutil.copytree(by_two, tmp_path / "step-00000005")
    broken = shutil.copytree(by_two, tmp_path / "step-00000006")
    fault(broken)
    (tmp_path / "latest").write_text("step-00000077\n")  # it is for people, and is not believed
    found = CheckpointStore(tmp_path, single()).newest()
    assert found.directory.name == "step-00000005"
    (skipped,) = found.skipped
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(skipped)
    assert skipped.startswith("step-00000006: ")
    with pytest.raises(InputError, match=f"{broken}: must be as it was saved; .*{named}"):
        CheckpointStore(tmp_path, single()).verified(broken)
    assert is_equal(read(found.directory), values())


def _newest_on(group, folder):
    found = CheckpointStore(folder, mesh_of(group)).newest()
    return found.directory.name, found.skipped


def test_all_ranks_pass_over_a_checkpoint_that_one_of_them_finds_damaged(by_two, tmp_path):
    shutil.copytree(by_two, tmp_path / "step-00000005")
    save(tmp_path, 6)
    file = tmp_path / "step-00000006" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    outcomes = run_ranks(3, _newest_on, tmp_path)
    assert outcomes == [("step-00000005", outcomes[0][1])] * 3
    assert outcomes[0][1] == ("step-00000006: __0_0.distcp does not have the contents that were saved",)


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error_that_names_each(tmp_path):
    store = CheckpointStore(tmp_path, single())
    assert store.newest() is None
    assert CheckpointStore(tmp_path / "nowhere", single()).newest() is None
    for step, name in ((5, "__0_0.distcp"), (6, "engine.json")):
        (save(tmp_path, step) / name).write_bytes(b"x")
    with pytest.raises(
        InputError, match=r"step-00000006: engine\.json does not.* \| step-00000005: __0_0\.distcp does not"
    ):
        store.newest()


class Evil:
    """Runs code when a pickle of it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: Metadata({}, planner_data=evil, storage_data={})])
def test_metadata_that_run_code_are_refused_and_nothing_is_executed(tmp_path, wrap):
    directory, trace = save(tmp_path / "ckpt"), tmp_path / "trace"
    (directory / ".metadata").write_bytes(pickle.dumps(wrap(Evil(trace))))
    sign_again(directory)
    store = CheckpointStore(directory.parent, single())
    assert store.damage(directory) == [
        ".metadata cannot be read safely: it names posix.mkdir, which describes no tensor"
    ]
    with pytest.raises(CheckpointError, match=r"it names posix\.mkdir"):
        store.load(directory, blank(), prefixes=("model.",))
    assert not trace.exists()
    pickle.loads((directory / ".metadata").read_bytes())
    assert trace.exists(), "the same bytes do run code where pickles are trusted"


class Call:
    """A pickle that calls something when it is read."""

    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize(
    "call",
    [
        Call(getattr, (Metadata, "__init__")),
        Call(__import__, ("os",)),
        Call(eval, ("1",)),
        Call(torch.load, ("x",)),
        Call(torch.Tensor, ()),
        Call(shutil.rmtree, ("x",)),
    ],
)
def test_functions_are_refused_by_name(tmp_path, call):
    directory = save(tmp_path)
    (directory / ".metadata").write_bytes(pickle.dumps(call))
    sign_again(directory)
    (problem,) = CheckpointStore(tmp_path, single()).damage(directory)
    assert problem.startswith(".metadata cannot be read safely: ")


def test_tensor_files_that_run_code_are_refused_and_nothing_is_executed(tmp_path):
    directory, trace = save(tmp_path / "ckpt"), tmp_path / "trace"
    crafted = io.BytesIO()
    torch.save(Evil(trace), crafted)
    (directory / "__0_0.distcp").write_bytes(crafted.getvalue())
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(crafted.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    sign_again(directory)
    store = CheckpointStore(directory.parent, single())
    assert store.damage(directory) == []
    with pytest.raises(CheckpointError, match="a file of tensors holds something else, which was not executed"):
        store.load(directory, blank(), prefixes=("model.",))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.storage_data.popitem(), "are in no file"),
        (lambda m: m.state_dict_metadata["model.weight"].chunks.clear(), "parts of model.weight are not there"),
        (lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "../x"), "'../x', which is no file"),
        (lambda m: m.state_dict_metadata.update(x=b""), "x is no tensor"),
        (lambda m: setattr(m, "storage_data", None), "describes no checkpoint"),
    ],
)
def test_metadata_that_contradict_the_files_are_refused(tmp_path, change, message):
    directory = save(tmp_path)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    sign_again(directory)
    (problem,) = CheckpointStore(tmp_path, single()).damage(directory)
    assert message in problem


def test_hashes_are_of_what_was_handed_over_not_of_what_the_disk_has(tmp_path, monkeypatch):
    """A disk that keeps something else is caught by the reading back, before an older checkpoint goes."""
    import seqengine.checkpoint.writing as module

    save(tmp_path, 5, keep=1)
    close = module.HashingStream.close

    def close_and_spoil(stream):
        was_open = not stream.closed
        close(stream)
        if was_open and Path(stream.raw.name).suffix == ".distcp":
            content = Path(stream.raw.name).read_bytes()
            Path(stream.raw.name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(module.HashingStream, "close", close_and_spoil)
    with pytest.raises(CheckpointError, match=r"the disk did not keep what was written: __0_0\.distcp does not have"):
        save(tmp_path, 6, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000005"]
    assert CheckpointStore(tmp_path, single()).newest().record.progress.step == 5
    assert len(sha256(tmp_path / "latest")) == 64
