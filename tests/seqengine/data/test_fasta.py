"""Reading FASTA: against a plain reading of the same text, and every mistake by its message."""

import gzip
import os
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqengine.data.fasta import read_records
from seqengine.errors import InputError

BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def plain_reading(text):
    """The whole of FASTA in six lines, to compare with."""
    records = []
    for line in text.splitlines():
        if line.startswith(">"):
            records.append((line[1:].split()[0], ""))
        elif line.strip():
            records[-1] = (records[-1][0], records[-1][1] + line)
    return records


def bgzip(data, block=200):
    """A BGZF file: gzip members with a block-size field, and the empty one at the end."""
    blocks = []
    for i in range(0, len(data), block):
        piece = data[i : i + block]
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = packer.compress(piece) + packer.flush()
        head = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0" + struct.pack("<H", len(body) + 25)
        blocks.append(head + body + struct.pack("<II", zlib.crc32(piece), len(piece)))
    return b"".join(blocks) + BGZF_END


def read(path, workdir, **options):
    records = []
    for record in read_records(path, workdir, **options):
        letters = b"".join(record.chunks).decode()
        assert len(letters) == record.length
        records.append((record.name, letters))
    return records


@pytest.fixture
def check(tmp_path):
    """Reads bytes as a FASTA file in a directory that nothing may be written to."""
    source, work = tmp_path / "source", tmp_path / "work"
    source.mkdir()
    work.mkdir()

    def run(data, name="genome.fa", **options):
        path = source / name
        path.write_bytes(data)
        source.chmod(0o555)
        try:
            return read(path, work, **options)
        finally:
            source.chmod(0o755)
            assert os.listdir(source) == [name]
            for left in (path, *work.iterdir()):
                left.unlink()

    return run


TEXTS = {
    "plain": ">chr1 first record\nACGTNacgtn\nACGTNacgtn\nAC\n>chr2\nTTTT\n",
    "empty records": ">a\n>b\nACGT\n>c\n\n>d\n",
    "no newline at the end": ">a\nACGTACGT\nACGT",
    "one line, no newline": ">a\nACGTACGTA",
    "full last line": ">a\nACGT\nACGT\n>b\nAC\nGT\n",
    "blank lines at the end": ">a\nACGT\nAC\n\n\n\n",
    "blank lines between records": ">a\nACGT\nAC\n\n\n>b\nGG\n\n\n\n>c\nT\n",
    "ambiguity codes and gaps": ">a\nACGTACGTACGTACGTACGTRYSWKMBDHVryswkm-.U\n",
    "only N": ">a\nNNNNNN\n",
}


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bgzip], ids=["plain", "gzip", "bgzip"])
def test_equals_a_plain_reading(check, text, ending, compress):
    data = compress(text.replace("\n", ending).encode())
    for chunk_bases in (1, 3, 1000):
        assert check(data, chunk_bases=chunk_bases) == plain_reading(text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.text("ACGTNacgtn", max_size=60), min_size=1, max_size=5).filter(any),
    width=st.integers(1, 20),
    chunk=st.integers(1, 30),
    ending=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_any_records_widths_and_chunks(check, records, width, chunk, ending, last):
    lines = []
    for i, letters in enumerate(records):
        lines += [f">r{i} x"] + [letters[j : j + width] for j in range(0, len(letters), width)]
    data = ending.join(lines) + (ending if last else "")
    assert check(data.encode(), chunk_bases=chunk) == [(f"r{i}", s) for i, s in enumerate(records)]


def test_gzip_of_several_members(check):
    data = gzip.compress(b">a\nACGTA") + gzip.compress(b"CGT\nACG\n") + gzip.compress(b">b\nTT\n")
    assert check(data, "genome.fa.gz") == [("a", "ACGTACGTACG"), ("b", "TT")]


def test_the_name_of_the_file_does_not_matter(check):
    assert check(b">a\nACGT\n", "genome.gz") == [("a", "ACGT")]
    assert check(gzip.compress(b">a\nACGT\n"), "genome.fa") == [("a", "ACGT")]


PROTEIN = b">nt\nACGT\n>alb\nMKWVTFISLL\nFLFSSAYS\n"
NOISE = gzip.compress(b">a\n" + bytes(range(65, 70)) * 9000 + b"\n", 0)

BAD = {
    "empty": (b"", "must not be empty; got 0 bytes"),
    "empty gzip": (gzip.compress(b""), "must not be empty; got a gzip file of 0 bytes"),
    "not FASTA": (b"ACGT\n", r"must begin with '>' .*got b'ACGT\\n' at line 1"),
    "FASTQ": (b"@r\nACGT\n+\n!!!!\n", "not a FASTA file"),
    "not FASTA in gzip": (gzip.compress(b"hello\n"), r"not a FASTA file.*b'hello\\n'"),
    "no bases": (b">a\n>b\n\n", r"must hold bases; got 2 record\(s\), all of length 0"),
    "duplicates": (b">a\nAC\n>b\nAC\n>a x\nGT\n", "names must differ; got 'a' at lines 1, 5"),
    "no name": (b">a\nAC\n> \nGT\n", "needs a name behind its '>'; got none at line 3"),
    "uneven": (b">a\nAC\n\n\n>b\nACGT\nAC\nACGT\n", "another length in record 'b' at line 7"),
    "uneven gzip": (gzip.compress(b">b\nACGT\nAC\nACGT\n"), "another length in record 'b' at line 3"),
    "blank inside": (b">b\nACGT\n\nACGT\n", "another length in record 'b' at line 3"),
    "long last line": (b">b\nACGT\nACGTA\n>c\nACGT\n", "longer last line in record 'b'"),
    "long last line at the end": (b">b\nACGT\nACGTACGTA", "longer last line in record 'b'"),
    "long last line that hides": (b">b\nACGT\nACGTACGTA\n>c\nACGT\n", "longer last line in record 'b'"),
    "protein": (PROTEIN, "record 'alb' looks like protein: 'F' at position 6 is no nucleotide code"),
    "stop codon": (b">a\nACG*\n", r"record 'a' looks like protein: '\*' at position 4"),
    "protein by share": (
        b">a\nACGT\nMKVW\nSSRR\n",
        "record 'a' looks like protein: at least half .* got 33%; the first other letter is 'M' at position 5",
    ),
    "digits": (b">a\nACG7\n", "record 'a': every character must be a nucleotide code .*; got '7' at position 4"),
    "space": (b">a\nAC GT\n", "got ' ' at position 3"),
    "second header char": (b">a\nAC>GT\n", "got '>' at position 3"),
    "not text": (b">a\nAC\xff\xfe\n", "must be text; got the byte 0xff"),
    "accent": (">a\nACGé\n".encode(), "record 'a' must be ASCII; got another byte behind base 0"),
    "truncated gzip": (NOISE[:20000], r"truncated gzip file: it ends before its end mark, after some \d+ bytes"),
    "gzip header only": (NOISE[:8], "truncated gzip file"),
    "corrupt gzip": (NOISE[:20000] + b"\0" * 50 + NOISE[20050:], "corrupt gzip file, after some .*Copy or compress"),
    "truncated bgzip": (bgzip(b">a\n" + b"ACGT" * 200 + b"\n")[:-28], "truncated bgzip file: its end-of-file block"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD.keys())
def test_mistakes_are_named(check, data, message):
    with pytest.raises(InputError, match=message) as caught:
        check(data)
    assert "genome.fa" in str(caught.value)


def test_the_letter_is_named_by_its_position_in_the_record_not_in_the_chunk(check):
    with pytest.raises(InputError, match="'X' at position 1003 "):
        check(b">a\n" + b"ACGT" * 250 + b"ACX\n", chunk_bases=100)
    with pytest.raises(InputError, match="first other letter is 'R' at position 9"):
        check(b">a\nACGTACGT" + b"RYKM" * 9 + b"\n", chunk_bases=4)


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "none.fa", tmp_path):
        with pytest.raises(InputError, match=r"FASTA file must be readable; got: .*Set data\.fasta"):
            read(path, tmp_path)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "g.fa"
    path.write_bytes(b">a\n" + b"ACGT\n" * 20000)
    record = next(records := read_records(path, tmp_path, chunk_bases=40000))
    next(record.chunks)
    path.write_bytes(b">a\nACGT\n")
    with pytest.raises(InputError, match="changed while it was read"):
        next(record.chunks)
    records.close()


def test_real_genome():
    folder = os.environ.get("SEQENGINE_TEST_DATA")
    if folder is None:
        pytest.skip("SEQENGINE_TEST_DATA is not set: no real genome to read")
    source = Path(folder) / "lambda.fa.gz"
    with tempfile.TemporaryDirectory() as work:
        (record,) = read(source, Path(work))
    assert [record] == plain_reading(gzip.decompress(source.read_bytes()).decode())
    assert record[0] == "NC_001416"
    assert len(record[1]) == 48502
