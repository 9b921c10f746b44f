"""Documents as their definition says, whatever the size of a piece, the block of a read, and the compression."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqengine.data import documents
from seqengine.data.documents import Piece, byte_pieces, json_pieces, split_document, text_pieces

TEXT = st.text(alphabet="ab \nλ𝄞\r#", max_size=120)


def by_definition(text, separator):
    """The documents of a text, slowly."""
    if not separator:
        found = [text]
    elif "\n" in separator:
        found = text.split(separator)
    else:
        found = [""]
        for line in text.split("\n"):
            if line.rstrip("\r") == separator:
                found.append("")
            else:
                found[-1] += line + "\n"
        found[-1] = found[-1][:-1]  # of a newline that the text does not have
    return [d.encode() for d in found if d.strip(" \n\r")]


def pieces_by_definition(document, size):
    rest, found = document, []
    while len(rest) > size:
        head = rest[:size]
        cut = (head.rfind(b"\n") + 1) or (head.rfind(b" ") + 1)
        if not cut:
            cut = size
            while rest[cut] & 0xC0 == 0x80:
                cut -= 1
        found.append(rest[:cut])
        rest = rest[cut:]
    return [*found, rest]


def joined(pieces):
    found, current = [], b""
    for piece in pieces:
        current += piece.data
        if piece.ends:
            found.append(current)
            current = b""
    assert current == b""
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("documents")


@settings(max_examples=400, deadline=None)
@given(
    text=TEXT,
    separator=st.sampled_from(["", "\n\n\n", "\n", "a\nb", " \n", "#", "ab"]),
    size=st.integers(5, 40),
    packed=st.booleans(),
)
def test_text_is_parted_as_defined(folder, text, separator, size, packed):
    path = folder / "t.txt"
    path.write_bytes(gzip.compress(text.encode(), 1) if packed else text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", size)
        found = list(text_pieces(path, separator))
    expected = by_definition(text, separator)
    # A long document of white space alone is kept: its first piece is given out before the rest is known.
    kept = [d for d in joined(found) if d.strip(b" \n\r")]
    assert kept == expected
    assert all(len(d) > size for d in joined(found) if d not in expected)
    of_documents = [piece for d in joined(found) for piece in pieces_by_definition(d, size)]
    assert [p.data for p in found] == of_documents
    assert all(len(p.data) <= size for p in found)
    for p in found:
        p.data.decode()


@settings(max_examples=100, deadline=None)
@given(text=TEXT, size=st.integers(5, 40))
def test_a_whole_document_is_cut_into_the_same_pieces(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", size)
        found = list(split_document(text.encode()))
    expected = pieces_by_definition(text.encode(), size) if text.strip(" \n\r") else []
    assert [p.data for p in found] == expected
    assert [p.ends for p in found] == [False] * (len(expected) - 1) + [True] * bool(expected)


def test_lines_are_documents(folder):
    path = folder / "l.jsonl"
    texts = ["one", "two\nlines", "", " ", "λ", "\ud834\udd1e".encode("utf-16", "surrogatepass").decode("utf-16")]
    lines = "\n".join(json.dumps({"n": i, "t": text}) for i, text in enumerate(texts)) + "\n\n"
    for data in (lines.encode(), gzip.compress(lines.encode()), lines.rstrip().replace("\n", "\r\n").encode()):
        path.write_bytes(data)
        assert list(json_pieces(path, "t")) == [Piece(t.encode(), True) for t in texts if t.strip()]


def test_bytes_are_as_they_lie(folder, monkeypatch):
    path = folder / "b.raw"
    monkeypatch.setattr(documents, "PIECE_BYTES", 10)
    for data in (b"", b"\xff" * 9, b"\x1f\x8b" + b"a" * 8, bytes(range(30)), b" \n"):
        path.write_bytes(data)
        found = list(byte_pieces(path))
        assert b"".join(p.data for p in found) == data
        assert [p.ends for p in found] == [False] * (len(found) - 1) + [True] * bool(data)
