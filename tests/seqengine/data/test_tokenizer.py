"""The character tokenizer against the published ids, letter by letter."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqengine.data import tokenizer
from seqengine.data.tokenizer import COMPLEMENT, decode, encode, reverse_complement


def test_ids_are_the_published_ones():
    names = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N"]
    assert list(tokenizer.TOKENS) == names
    assert tokenizer.VOCABULARY == 12
    assert (tokenizer.CLS, tokenizer.PAD, tokenizer.UNK, tokenizer.A, tokenizer.N) == (0, 4, 6, 7, 11)
    assert encode("ACGTN").tolist() == [7, 8, 9, 10, 11]
    assert encode(b"ACGTN").dtype == np.uint8


def test_every_byte_in_both_modes():
    for byte in range(256):
        letter = chr(byte)
        unk = {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11}.get(letter, 6)
        upper = {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11}.get(letter.upper() if byte < 128 else letter, 6)
        assert encode(bytes([byte]), "unk").tolist() == [unk]
        assert encode(bytes([byte]), "upper").tolist() == [upper]


def test_non_ascii_text_is_one_unknown_per_character():
    assert encode("AéT").tolist() == [7, 6, 10]


def test_decode_names_special_tokens_and_refuses_others():
    assert decode([0, 7, 8, 9, 10, 11, 6, 1]) == "[CLS]ACGTN[UNK][SEP]"
    assert decode(np.empty(0, dtype=np.uint8)) == ""
    with pytest.raises(ValueError, match=r"every id must be in 0\.\.11; got 12"):
        decode([7, 12])


@given(st.text(alphabet="ACGTN"))
def test_decode_is_the_inverse_of_encode(text):
    assert decode(encode(text)) == text


def test_complement_pairs_and_leaves_the_rest():
    assert decode(reverse_complement(encode("AACGTN"))) == "NACGTT"
    assert COMPLEMENT[:7].tolist() == list(range(7))
    assert COMPLEMENT[COMPLEMENT].tolist() == list(range(12))
    with pytest.raises(ValueError, match="read-only"):
        COMPLEMENT[7] = 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_reverse_complement_of_a_tensor_is_that_of_the_array(dtype):
    ids = np.random.default_rng(0).integers(0, 12, (3, 50)).astype(np.uint8)
    tensor = reverse_complement(torch.from_numpy(ids).to(dtype))
    assert tensor.dtype == dtype
    assert np.array_equal(tensor.numpy(), reverse_complement(ids))
    assert np.array_equal(reverse_complement(reverse_complement(ids)), ids)
