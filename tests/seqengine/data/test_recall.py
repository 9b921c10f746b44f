"""The two recall tasks: answers are in the text, nothing else tells them, and every rank makes the same examples."""

from itertools import pairwise

import pytest
import torch

from seqengine.data.recall import IGNORE, RecallTask, accuracy


@pytest.mark.parametrize("task", ["recall", "induction"])
def test_the_answer_stands_behind_what_is_asked(task):
    made = RecallTask(task, length=30, seed=4)
    ids, labels = made.batch(0, 300)
    assert ids.shape == labels.shape == (300, 30)
    assert bool((labels[:, :-1] == IGNORE).all())
    assert int(ids.max()) < made.num_tokens
    for row, answer in zip(ids.tolist(), labels[:, -1].tolist(), strict=True):
        text = row[:-2] if task == "recall" else row[:-1]
        behind = {b for a, b in pairwise(text) if a == row[-1]}
        assert answer in behind
        if task == "recall":
            assert row[-2] == made.mark
            assert behind == {answer}
            assert all(k < 10 <= v for k, v in zip(text[::2], text[1::2], strict=True))
        else:
            assert row.count(made.mark) == 2
            assert answer == row[row.index(made.mark) + 1]


def test_every_repeated_key_can_ask():
    task = RecallTask("recall", seed=3)
    ids, labels = task.batch(0, 50, every=True)
    assert torch.equal(labels[:, -1], task.batch(0, 50)[1][:, -1])
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        seen = {}
        for place in range(0, 38, 2):
            assert asked[place] == seen.get(row[place], IGNORE)
            assert asked[place + 1] == IGNORE
            seen[row[place]] = row[place + 1]


def test_examples_are_functions_of_seed_and_number():
    task = RecallTask("recall", seed=1)
    ids, _ = task.batch(0, 8)
    assert torch.equal(torch.cat([task.batch(0, 3)[0], task.batch(3, 5)[0]]), ids)
    assert not torch.equal(RecallTask("recall", seed=2).batch(0, 8)[0], ids)
    assert len({tuple(row) for row in task.batch(0, 500)[0].tolist()}) == 500


def test_answers_are_spread_over_all_values():
    _, labels = RecallTask("recall").batch(0, 2000)
    counts = torch.bincount(labels[:, -1], minlength=20)
    assert int(counts[:10].sum()) == 0
    assert int(counts[10:].min()) > 120


def test_accuracy_counts_answers_only():
    labels = torch.tensor([[IGNORE, 1], [IGNORE, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1], [0, 1]]), 3).float()
    assert accuracy(logits, labels) == 0.5


@pytest.mark.parametrize("wrong", [{"task": "copy"}, {"vocab_size": 5}, {"length": 4}, {"length": 31}], ids=str)
def test_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match="RecallTask"):
        RecallTask(**{"task": "recall"} | wrong)
