"""Masked tokens: the published shares, the same whatever the split, and a run that learns from them."""

import hashlib

import pytest
import torch

from seqengine.data.masking import IGNORE, chosen_tokens, mask_tokens
from seqengine.data.tokenizer import MASK, A
from seqengine.errors import InputError
from tests.seqengine.runs import config, losses, train_on

KEYS = torch.arange(100, 164)
POSITIONS = torch.arange(500)
IDS = torch.randint(7, 11, (64, 500), generator=torch.Generator().manual_seed(0))


def test_shares_are_the_published_ones():
    inputs, labels = mask_tokens(IDS, KEYS, POSITIONS, 0.15)
    chosen = labels != IGNORE
    assert torch.equal(chosen, chosen_tokens(KEYS, POSITIONS, 0.15))
    assert torch.equal(labels[chosen], IDS[chosen])
    assert torch.equal(inputs[~chosen], IDS[~chosen])
    share = [chosen, inputs[chosen] == MASK, inputs[chosen] == IDS[chosen]]
    # A replaced base is the old one in a quarter of the cases.
    for found, expected in zip(share, [0.15, 0.8, 0.1 + 0.1 / 4], strict=True):
        assert float(found.double().mean()) == pytest.approx(expected, abs=0.02)
    others = inputs[chosen & (inputs != MASK)]
    assert set(others.unique().tolist()) == set(range(A, A + 4))
    for window in chosen:  # no window without, none with all
        assert 0.02 < float(window.double().mean()) < 0.4


def test_any_split_hides_the_same_tokens():
    whole = mask_tokens(IDS, KEYS, POSITIONS, 0.3)
    for start, stop in ((0, 170), (170, 171), (171, 500)):
        part = mask_tokens(IDS[5:9, start:stop], KEYS[5:9], POSITIONS[start:stop], 0.3)
        for found, expected in zip(part, whole, strict=True):
            assert torch.equal(found, expected[5:9, start:stop])
    assert not torch.equal(chosen_tokens(KEYS[:1], POSITIONS, 0.5), chosen_tokens(KEYS[1:2], POSITIONS, 0.5))
    assert bool(chosen_tokens(KEYS, POSITIONS, 1.0).all())


def test_masks_of_dna_never_change():
    found = hashlib.sha256()
    for part in mask_tokens(IDS, KEYS, POSITIONS, 0.15):
        found.update(part.numpy().tobytes())
    assert found.hexdigest() == "a0bec59ef1259782a1294b42854de6086ab6ed5a10a6bb1679807e5c638663af"


@pytest.mark.parametrize("replacements", [range(256), range(2, 1002), range(5, 6), range(10, 40, 3)])
def test_any_source_has_its_own_mask_and_replacements(replacements):
    ids = IDS + 3000
    inputs, labels = mask_tokens(ids, KEYS, POSITIONS, 0.5, mask_id=2000, replacements=replacements)
    chosen = labels != IGNORE
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen])
    assert float((inputs[chosen] == 2000).double().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((inputs[chosen] == ids[chosen]).double().mean()) == pytest.approx(0.1, abs=0.02)
    others = inputs[chosen & (inputs != 2000) & (inputs != ids)]
    counts = torch.bincount(others)
    assert set(others.tolist()) <= set(replacements)
    expected = len(others) / len(replacements)
    assert float((counts[replacements.start :: replacements.step] - expected).abs().max()) < 6 * expected**0.5


def test_no_replacement_is_an_error():
    with pytest.raises(ValueError, match="replacements must not be empty"):
        mask_tokens(IDS, KEYS, POSITIONS, 0.5, replacements=range(3, 3))


MASKED = (
    "model.arch=lm", "model.pattern=['attention']", "model.causal=false", "model.filter.order=64", "train.mask_rate=0.3",
    "model.mixers.attention.num_heads=2", "precision.params=fp64", "model.embed_dropout=0.2",
)  # fmt: skip


def test_a_masked_run_is_the_same_on_every_mesh_and_learns(tmp_path):
    folders = []
    for ranks, sequence in ((1, 1), (2, 2), (2, 1)):
        folder = tmp_path / f"{ranks}-{sequence}"
        folder.mkdir()
        folders.append(folder)
        train_on(ranks, folder, *MASKED, "train.steps=8", f"parallel.sequence={sequence}")
    alone = losses(folders[0])
    assert len(alone) == 8
    assert alone[-1] < alone[0]
    for folder in folders[1:]:
        assert losses(folder) == pytest.approx(alone, rel=1e-10)


def test_a_run_on_a_genome_refuses_a_model_that_tells_classes(tmp_path):
    with pytest.raises(
        InputError, match=r"num_classes = 3 needs sequences with classes, got data\.source = 'synthetic'"
    ):
        config(tmp_path, "model.arch=lm", "model.filter.order=64", "model.num_classes=3")
