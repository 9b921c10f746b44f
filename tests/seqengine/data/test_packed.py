"""Packed genomes: the bytes, the cache, and what happens when something goes wrong."""

import gzip
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from seqengine.config.data import DataSection, SyntheticSection
from seqengine.data import packed
from seqengine.data.packed import PackedRecord, pack
from seqengine.data.synthetic import generate
from seqengine.data.tokenizer import decode, encode
from seqengine.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the tests fork

TEXT = ">a one\nACGTNacgtn\nACGTNRYacg\nTT\n>empty\n>b\nGGGG\n"


@pytest.fixture
def section(tmp_path):
    (tmp_path / "source").mkdir()
    fasta = tmp_path / "source" / "tiny.fa"
    fasta.write_text(TEXT)
    return DataSection(fasta=fasta, cache=str(tmp_path / "deep" / "cache"))


def entries(cache):
    return sorted(str(p.relative_to(cache)) for p in Path(cache).rglob("*"))


def test_tokens_records_and_hash(section):
    genome = pack(section)
    assert decode(genome.tokens()) == "ACGTNACGTNACGTN[UNK][UNK]ACGTTGGGG"
    assert genome.records == (PackedRecord("a", 0, 22), PackedRecord("empty", 22, 0), PackedRecord("b", 22, 4))
    assert genome.num_tokens == 26
    assert genome.directory.name.startswith("tiny-")
    expected = hashlib.sha256(genome.tokens().tobytes())
    expected.update(b'[["a", 0, 22], ["empty", 22, 0], ["b", 22, 4]]')
    assert genome.content_hash == expected.hexdigest()
    assert entries(section.cache) == [
        genome.directory.name, f"{genome.directory.name}/index.json", f"{genome.directory.name}/tokens.bin",
    ]  # fmt: skip
    assert os.listdir(section.fasta.parent) == ["tiny.fa"]
    index = json.loads((genome.directory / "index.json").read_text())
    assert (index["format"], index["soft_mask"], index["source"]) == (1, "upper", str(section.fasta))
    with pytest.raises(ValueError, match="read-only"):
        genome.tokens()[0] = 0


def test_soft_masked_bases_can_be_unknown(section):
    genome = pack(section.model_copy(update={"soft_mask": "unk"}))
    assert genome.tokens().tolist()[:12] == [7, 8, 9, 10, 11, 6, 6, 6, 6, 6, 7, 8]
    assert genome.directory != pack(section).directory


def test_is_made_once_and_anew_when_the_file_changes(section, monkeypatch):
    first = pack(section)
    monkeypatch.setattr(packed, "_write", None)
    assert pack(section) == first
    monkeypatch.undo()
    section.fasta.write_text(TEXT + "A\n")
    second = pack(section)
    assert second.num_tokens == 27
    assert second.content_hash != first.content_hash


def test_content_hash_is_of_the_content(section, tmp_path):
    other = tmp_path / "other.fa.gz"
    other.write_bytes(gzip.compress(TEXT.replace("\n", "\r\n").replace("acg", "ACG").encode()))
    twin = pack(DataSection(fasta=other, cache=section.cache))
    assert twin.directory.name.startswith("other-")
    assert twin.content_hash == pack(section).content_hash
    other.write_text(TEXT.replace(">b", ">c"))
    assert pack(DataSection(fasta=other, cache=section.cache)).content_hash != twin.content_hash


def test_a_link_and_its_target_are_one_genome(section, tmp_path):
    link = tmp_path / "link.fa"
    link.symlink_to(section.fasta)
    assert pack(section.model_copy(update={"fasta": link})) == pack(section)


def test_many_chunks_make_the_same_file(section, monkeypatch):
    whole = pack(section)
    tokens = whole.tokens().tolist()
    shutil.rmtree(section.cache)
    read_records = packed.read_records
    monkeypatch.setattr(packed, "read_records", lambda path, work: read_records(path, work, chunk_bases=3))
    assert pack(section) == whole
    assert pack(section).tokens().tolist() == tokens


DAMAGE = {
    "tokens cut": lambda d: (d / "tokens.bin").write_bytes(b"\7" * 25),
    "tokens grown": lambda d: (d / "tokens.bin").write_bytes(b"\7" * 27),
    "tokens gone": lambda d: (d / "tokens.bin").unlink(),
    "index gone": lambda d: (d / "index.json").unlink(),
    "index cut": lambda d: (d / "index.json").write_text((d / "index.json").read_text()[:-9]),
    "index of another kind": lambda d: (d / "index.json").write_text("[1]"),
    "index without a key": lambda d: (d / "index.json").write_text('{"records": []}'),
    "index with other lengths": lambda d: (d / "index.json").write_text(
        (d / "index.json").read_text().replace("22]", "21]")
    ),
    "index not text": lambda d: (d / "index.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_pack_is_made_anew(section, caplog, damage):
    good = pack(section)
    tokens = good.tokens().tolist()
    damage(good.directory)
    with caplog.at_level(logging.WARNING):
        assert pack(section) == good
    assert "is damaged; packing" in caplog.text
    assert pack(section).tokens().tolist() == tokens


def test_what_a_killed_process_left_is_swept(section):
    good = pack(section)
    shutil.rmtree(good.directory)
    left = Path(section.cache) / f".{good.directory.name}.partial"
    (left / "work").mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"half")
    (Path(section.cache) / f".{good.directory.name}.lock").touch()
    assert pack(section) == good
    assert len(entries(section.cache)) == 3


BAD = {
    "protein": (b">x\nMKWVTFISLL\n", "looks like protein"),
    "late protein": (b">x\n" + b"ACGT\n" * 5000 + b">y\nMKWV\nFFFF\n", "record 'y' looks like protein"),
    "empty": (b"", "must not be empty"),
    "corrupt": (gzip.compress(b">x\n" + b"ACGT\n" * 5000)[:-20], "truncated gzip"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD.keys())
def test_a_failure_leaves_nothing_behind(section, tmp_path, data, message):
    section.fasta.write_bytes(data)
    with pytest.raises(InputError, match=message):
        pack(section)
    assert sorted(os.listdir(tmp_path)) == ["source"]
    Path(section.cache).mkdir(parents=True)
    with pytest.raises(InputError, match=message):
        pack(section)
    assert entries(tmp_path / "deep") == ["cache"]


def test_a_failure_while_writing_leaves_nothing_behind(section, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed.os, "fsync", full)
    with pytest.raises(InputError, match=r"data\.cache: .*No space left on device.*Set data\.cache"):
        pack(section)
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_paths_that_cannot_be(section, tmp_path):
    with pytest.raises(InputError, match=r"data\.fasta: must be a readable file; got .*none\.fa \(No such file"):
        pack(section.model_copy(update={"fasta": tmp_path / "none.fa"}))
    with pytest.raises(InputError, match=r"data\.fasta: must be a regular file; got .*, which is none"):
        pack(section.model_copy(update={"fasta": tmp_path}))
    with pytest.raises(InputError, match=r"data\.fasta: must name a FASTA file"):
        pack(section.model_copy(update={"fasta": None}))
    with pytest.raises(InputError, match=r"data\.cache: the directory .*tiny\.fa must be writable"):
        pack(section.model_copy(update={"cache": str(section.fasta)}))
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_a_ready_pack_is_read_from_a_read_only_cache(section):
    genome = pack(section)
    Path(section.cache).chmod(0o555)
    try:
        assert pack(section) == genome
    finally:
        Path(section.cache).chmod(0o755)


def test_four_processes_pack_once(section):
    section.fasta.write_text(">a\n" + "ACGTACGTGC\n" * 100_000)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        genomes = pool.map(pack, [section] * 4, chunksize=1)
    assert len(set(genomes)) == 1
    assert len(entries(section.cache)) == 3
    assert decode(genomes[0].tokens()[-10:]) == "ACGTACGTGC"


def test_forked_processes_that_wait_pack_once(section, tmp_path):
    """All are at the lock before the first is done; each notes that it packed."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    write = packed._write

    def slow(*arguments):
        (tmp_path / f"packed-{os.getpid()}").touch()
        write(*arguments)

    def child():
        packed._write = slow
        barrier.wait()
        assert pack(section).num_tokens == 26

    run_forked(child, 4)
    assert len(list(tmp_path.glob("packed-*"))) == 1
    assert len(entries(section.cache)) == 3


def test_failures_of_many_processes_leave_no_files(section, tmp_path):
    section.fasta.write_bytes(b">x\n" + b"ACGT\n" * 5000 + b">y\nMKWV\nFFFF\n")
    Path(section.cache).mkdir(parents=True)

    def child():
        with pytest.raises(InputError, match="looks like protein"):
            pack(section)

    run_forked(child, 4)
    assert entries(section.cache) == []


def run_forked(target, count):
    processes = [multiprocessing.get_context("fork").Process(target=target) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * count


def test_survives_fork_and_pickling(section):
    section.fasta.write_text(">a\n" + "ACGTTGCANN\n" * 20_000)
    genome = pack(section)
    whole = genome.tokens().copy()

    def child():
        pick = np.random.default_rng(os.getpid())
        for start in pick.integers(0, len(whole) - 100, 2000):
            assert np.array_equal(genome.tokens()[start : start + 100], whole[start : start + 100])

    run_forked(child, 4)
    copy = pickle.loads(pickle.dumps(genome))
    assert copy == genome
    assert hash(copy) == hash(genome)
    assert len(pickle.dumps(genome)) < 1000
    assert np.array_equal(copy.tokens(), whole)


def test_synthetic_goes_the_same_way(tmp_path):
    synthetic = SyntheticSection(length=1234, lag=9, seed=4)
    section = DataSection(source="synthetic", synthetic=synthetic, cache=str(tmp_path / "cache"))
    genome = pack(section)
    assert np.array_equal(genome.tokens(), encode(generate(synthetic)))
    assert [r.name for r in genome.records] == ["synthetic"]
    assert pack(section) == genome
    assert len(entries(section.cache)) == 4
    shutil.rmtree(section.cache)
    assert pack(section).content_hash == genome.content_hash
    other = section.model_copy(update={"synthetic": SyntheticSection(length=1234, lag=9, seed=5)})
    assert pack(other).content_hash != genome.content_hash


def test_real_genome(tmp_path):
    folder = os.environ.get("SEQENGINE_TEST_DATA")
    if folder is None:
        pytest.skip("SEQENGINE_TEST_DATA is not set: no real genome to pack")
    source = Path(folder) / "ecoli536_first4M.fa.gz"
    genome = pack(DataSection(fasta=source, cache=str(tmp_path)))
    lines = gzip.decompress(source.read_bytes()).split(b"\n")
    assert genome.num_tokens == 4_000_000
    assert np.array_equal(genome.tokens(), encode(b"".join(lines[1:])))
