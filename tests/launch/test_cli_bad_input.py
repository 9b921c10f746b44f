"""Bad input to the command: exit code 2, one clear message, and nothing written: no run, no cache, no half a file."""

import gzip
import random
from pathlib import Path

import pytest

from seqengine.launch.cli import main

GENOME = "".join(random.Random(0).choices("ACGT", k=6000))


def fasta(sequence: str = GENOME, name: str = "chr1") -> str:
    return f">{name}\n" + "\n".join(sequence[i : i + 60] for i in range(0, len(sequence), 60)) + "\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("genome.fa").write_text(fasta())
    Path("tiny.toml").write_text(
        'extends = "hyenadna-tiny-1k"\n[data]\nfasta = "genome.fa"\nseq_len = 64\n[train]\nsteps = 2\nbatch_tokens = 256\n'
    )
    return tmp_path


def refused(capsys, *arguments: str, command: str = "train") -> str:
    before = set(Path.cwd().rglob("*"))
    code = main([command, *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert set(Path.cwd().rglob("*")) == before, "something was left behind"
    assert "Traceback" not in captured.err
    return captured.err


def test_typo_in_a_key(folder, capsys):
    message = refused(capsys, "tiny.toml", "optim.lrr=1")
    assert "optim.lrr: unknown key; did you mean 'optim.lr'? (command line)" in message


def test_text_where_a_number_belongs(folder, capsys):
    assert "optim.lr: must be a number above 0, got 'fast'" in refused(capsys, "tiny.toml", "optim.lr=fast")


def test_every_problem_at_once(folder, capsys):
    message = refused(capsys, "tiny.toml", "optim.lrr=1", "optim.lr=fast", "data.fasta=nowhere.fa", "train.clip=-1")
    assert len(message.splitlines()) == 4


def test_missing_fasta(folder, capsys):
    message = refused(capsys, "tiny.toml", "data.fasta=nowhere.fa")
    assert "data.fasta" in message
    assert "nowhere.fa" in message


def test_no_fasta(folder, capsys):
    assert "data.fasta" in refused(capsys, "hyenadna-tiny-1k")


def test_protein_fasta(folder, capsys):
    Path("protein.fa").write_text(fasta("MKVLAAGIEELFPQLLPEWK" * 200, "sp|P1"))
    message = refused(capsys, "tiny.toml", "data.fasta=protein.fa")
    assert "protein" in message
    assert "sp|P1" in message


def test_not_a_fasta(folder, capsys):
    Path("genome.txt").write_text("ACGT\n" * 100)
    assert "genome.txt" in refused(capsys, "tiny.toml", "data.fasta=genome.txt")


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_truncated_gzip(folder, capsys, keep):
    whole = gzip.compress(fasta().encode())
    Path("cut.fa.gz").write_bytes(whole[: int(len(whole) * keep)])
    assert "cut.fa.gz" in refused(capsys, "tiny.toml", "data.fasta=cut.fa.gz")


def test_corrupt_gzip(folder, capsys):
    content = bytearray(gzip.compress(fasta().encode()))
    content[len(content) // 2] ^= 0xFF
    Path("bad.fa.gz").write_bytes(content)
    assert "bad.fa.gz" in refused(capsys, "tiny.toml", "data.fasta=bad.fa.gz")


# A BED is held against the genome, which is packed by then: the cache is whole, and may stay.


def refused_with_cache(capsys, *arguments: str) -> str:
    code = main(["train", *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert not list(Path("runs").glob("[!c]*")), "a run's directory was made"
    assert not list(Path("runs/cache").glob(".*")), "half a file is in the cache"
    return captured.err


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("chr1\t0\t3000\ttrain\nchr1\t3000\t9000\tvalid\n", ["line 2", "9000", "6000"]),
        ("chr1\t0\t3000\ttrain\nchr1\t3000\tmany\tvalid\n", ["line 2", "many"]),
        ("chr1\t0\t3000\ttrain\n\nchr1\t5000\t4000\tvalid\n", ["line 3"]),
        ("chrX\t0\t3000\ttrain\n", ["line 1", "chrX"]),
        ("chr1\t0\t3000\ttrain\nchr1\t2000\t4000\tvalid\n", ["overlap", "1", "2"]),
        ("chr1\t0\t3000\n", ["line 1"]),
    ],
)
def test_bad_bed(folder, capsys, lines, words):
    Path("bad.bed").write_text(lines)
    message = refused_with_cache(capsys, "tiny.toml", "data.bed=bad.bed")
    assert all(word in message for word in [*words, "bad.bed"]), message


def test_sequence_length_that_leaves_no_validation_window(folder, capsys):
    message = refused_with_cache(capsys, "tiny.toml", "data.seq_len=512", "train.batch_tokens=1024")
    assert "data.seq_len" in message
    assert "valid" in message


def test_more_ranks_than_tokens(folder, capsys):
    message = refused(capsys, "tiny.toml", "parallel.sequence=65")
    assert "more ranks than tokens" in message


def test_pattern_that_matches_no_parameter(folder, capsys):
    Path("groups.toml").write_text('extends = "tiny.toml"\n[[optim.groups]]\nmatch = "*.fliter.*"\n')
    assert "'*.fliter.*' must match a parameter" in refused(capsys, "groups.toml")


def test_cuda_where_there_is_none(folder, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "run.device: CUDA is not available here" in refused(capsys, "tiny.toml", "run.device=cuda")


def test_missing_config_and_missing_run(folder, capsys):
    assert "nothing.toml" in refused(capsys, "nothing.toml")
    assert "must be a run's directory" in refused(capsys, "runs/none", command="eval")
    assert "nothing.toml" in refused(capsys, "nothing.toml", command="check")


def test_half_an_environment_of_a_launcher(folder, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE='two'" in refused(capsys, "tiny.toml")


def test_mesh_that_does_not_cover_the_processes(folder, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert "must be the number of processes; got 3" in refused(capsys, "tiny.toml", "parallel.sequence=2")
