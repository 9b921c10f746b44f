"""HyenaDNA's interval file: what is read, and every bad line by its number."""

import random

import pytest

from seqengine.data.bed import Interval, read_bed
from seqengine.errors import InputError

LENGTHS = {"chr1": 1000, "chr2": 500, "empty": 0}


@pytest.fixture
def bed(tmp_path):
    def run(text):
        path = tmp_path / "intervals.bed"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_bed(path, LENGTHS)

    return run


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_reads_tabs_spaces_comments_and_tracks(bed, ending):
    text = "# comment\ntrack name=x\nbrowser position chr1\n\nchr1\t0\t100\ttrain\nchr1  100 200   val\n \nchr2\t0\t500\ttest"
    assert bed(text.replace("\n", ending)) == [
        Interval("chr1", 0, 100, "train", 5),
        Interval("chr1", 100, 200, "valid", 6),
        Interval("chr2", 0, 500, "test", 8),
    ]


def test_same_split_may_overlap_and_splits_may_touch(bed):
    assert len(bed("chr1 0 100 train\nchr1 50 150 train\nchr1 150 200 valid\nchr2 0 200 valid\n")) == 4


BAD_LINES = {
    "columns": ("chr1 0 100", r"needs 4 columns \(chromosome, start, end, split\); got 3"),
    "too many": ("chr1 0 100 train +", "needs 4 columns .*; got 5"),
    "text": ("chr1 zero 100 train", "whole numbers of bases from 0; got 'zero' and '100'"),
    "negative": ("chr1 -5 100 train", "whole numbers of bases from 0; got '-5'"),
    "fraction": ("chr1 0 1e2 train", "whole numbers"),
    "empty interval": ("chr1 100 100 train", "start must be less than end; got 100 and 100"),
    "backwards": ("chr1 100 50 train", "start must be less than end; got 100 and 50"),
    "split": ("chr1 0 100 Train", "must be train, valid or test; got 'Train'"),
    "chromosome": ("chr3 0 100 train", r"must be a record of the FASTA file; got 'chr3' \(it has 'chr1', 'chr2'"),
    "end": ("chr1 0 1001 train", "must end within 'chr1', which has 1000 bases; got end 1001"),
    "empty record": ("empty 0 1 train", "must end within 'empty', which has 0 bases"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named(bed, line, message):
    with pytest.raises(InputError, match=rf"intervals\.bed, line 3: .*{message}"):
        bed(f"# x\nchr2 0 10 valid\n{line}\nchr2 20 30 test\n")


def test_a_missing_chr_prefix_is_suggested(tmp_path):
    path = tmp_path / "x.bed"
    path.write_text("chr7 0 10 train\n")
    with pytest.raises(InputError, match="the FASTA file calls it '7'"):
        read_bed(path, {"7": 100})


def test_all_bad_lines_are_reported_up_to_twenty(bed):
    with pytest.raises(InputError) as caught:
        bed("chr1 0 1 train\n" + "chr1 5 5 train\n" * 19 + "chr9 0 1 train\n")
    assert len(caught.value.problems) == 20
    assert "line 21: the chromosome" in caught.value.problems[-1]
    with pytest.raises(InputError) as caught:
        bed("chr1 5 5 train\n" * 50)
    assert len(caught.value.problems) == 21
    assert "line 20:" in caught.value.problems[-2]
    assert caught.value.problems[-1].endswith("and 30 more bad lines")


def test_splits_that_overlap_name_both_lines(bed):
    with pytest.raises(InputError, match=r"line 2: .*chr1:99-120 \(valid\) overlaps line 1, 0-100 \(train\)"):
        bed("chr1 0 100 train\nchr1 99 120 valid\n")
    # In any order, and behind an interval that ends before an earlier one does.
    with pytest.raises(InputError, match=r"line 3: .*chr1:0-100 \(train\) overlaps line 1, 90-120 \(test\)"):
        bed("chr1 90 120 test\nchr1 20 30 train\nchr1 0 100 train\n")
    with pytest.raises(InputError, match=r"line 3: .* overlaps line 1"):
        bed("chr1 0 900 train\nchr1 10 20 train\nchr1 500 600 valid\n")


def test_overlaps_agree_with_a_search_of_all_pairs(bed):
    pick = random.Random(1)
    for _ in range(150):
        rows = []
        for _ in range(pick.randint(1, 6)):
            start = pick.randint(0, 60)
            rows.append((start, start + pick.randint(1, 25), pick.choice(["train", "valid", "test"])))
        bad = any(a[2] != b[2] and a[0] < b[1] and b[0] < a[1] for a in rows for b in rows)
        text = "".join(f"chr1 {s} {e} {w}\n" for s, e, w in rows)
        if bad:
            with pytest.raises(InputError, match="must not overlap"):
                bed(text)
        else:
            assert len(bed(text)) == len(rows)


def test_unreadable_files(bed, tmp_path):
    with pytest.raises(InputError, match=r"must be readable; got: No such file.*Set data\.bed"):
        read_bed(tmp_path / "none.bed", LENGTHS)
    with pytest.raises(InputError, match=r"must hold intervals .*; got none"):
        bed("# nothing\n\n")
    with pytest.raises(InputError, match="must be plain text; got gzip"):
        bed(b"\x1f\x8b\x08\0rest")
    with pytest.raises(InputError, match="must be text; got the byte 0xfe"):
        bed(b"chr1\xfe 0 10 train\n")
