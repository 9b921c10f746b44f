"""Generation: the same tokens as running the whole model again for each, for any batch, chunks and sampling."""

import pytest
import torch

from seqengine.config.model import ModelConfig
from seqengine.generate import Sampling, draw, generate, prefill, stream
from seqengine.model import build_model
from seqengine.states import size_of

CONFIG = ModelConfig(d_model=16, n_layer=2, max_len=64, embed_dropout=0.3)


def small_model(config=CONFIG, seed=0):
    model = build_model(config, seed=seed, params="fp64", device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # so that logits differ
    return model


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(7, 12, (n,), generator=generator) for n in lengths]


def again_and_again(model, prompt, count, sampling, row):
    """The definition: the whole model for every token."""
    model.eval()
    ids, written = prompt.clone(), []
    for number in range(count):
        logits = model(ids[None])[:, -1].detach()
        all_rows = torch.cat([torch.zeros(row, logits.shape[1], dtype=logits.dtype), logits])
        token = draw(all_rows, torch.arange(12), sampling, number)[-1]
        written.append(int(token))
        ids = torch.cat([ids, token[None]])
    return written


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, seed=3), Sampling(0.7, 5, 0.9, 1)], ids=str)
def test_tokens_are_those_of_the_whole_model_run_again_for_each(sampling):
    model, given = small_model(), prompts(5, 11, 5, 1)
    found = generate(model, given, max_new_tokens=9, sampling=sampling, chunk_tokens=4)
    for row, prompt in enumerate(given):
        assert found[row].tolist() == again_and_again(model, prompt, 9, sampling, row)


def test_stream_gives_the_tokens_as_they_are_drawn_and_leaves_the_mode_alone():
    model, given = small_model().train(), prompts(6, 6)
    tokens = torch.stack(list(stream(model, given, max_new_tokens=7)), dim=1)
    assert model.training
    assert [row.tolist() for row in generate(model, torch.stack(given), max_new_tokens=7)] == tokens.tolist()
    assert list(stream(model, given, max_new_tokens=0)) == []


def test_a_continuation_ends_before_the_stop_token():
    model, given = small_model(), prompts(5, 8)
    free = generate(model, given, max_new_tokens=30)
    stop = int(free[0][4])
    for cut, whole in zip(generate(model, given, max_new_tokens=30, stop=stop), free, strict=True):
        expected = whole.tolist()[: whole.tolist().index(stop)] if stop in whole else whole.tolist()
        assert cut.tolist() == expected


def test_draws_follow_the_probabilities_and_the_limits():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    choices = torch.arange(4)
    counts = torch.bincount(draw(logits, choices, Sampling(seed=2), 0), minlength=4) / 2000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.04, rtol=0)
    assert set(draw(logits, choices, Sampling(top_k=2), 0).tolist()) == {0, 1}
    assert set(draw(logits, choices, Sampling(top_p=0.79), 0).tolist()) == {0, 1}
    assert set(draw(logits, choices, Sampling(top_p=0.81), 0).tolist()) == {0, 1, 2}
    assert set(draw(logits, choices, Sampling(top_p=1e-9), 0).tolist()) == {0}
    assert set(draw(logits, torch.tensor([2, 3]), Sampling(), 0).tolist()) == {2, 3}
    sharp = torch.bincount(draw(logits, choices, Sampling(0.25), 0), minlength=4) / 2000
    assert sharp[0] > 0.8


def test_states_of_prompts_of_different_length_stand_together():
    model, given = small_model().eval(), prompts(9, 2, 9, 30)
    with torch.no_grad():
        logits, state = prefill(model, given, chunk_tokens=8)
        alone = [prefill(model, [prompt], chunk_tokens=64) for prompt in given]
    for row, (single, one) in enumerate(alone):
        torch.testing.assert_close(logits[row : row + 1], single, rtol=0, atol=1e-11)
        assert size_of(one).own * len(given) == size_of(state).own
        assert size_of(one).shared == size_of(state).shared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [torch.tensor([], dtype=torch.int64)]}, "prompt 0 must have at least one token"),
        ({"ids": [torch.tensor([7, 16])]}, r"ids must be in 0\.\.15; prompt 0 has 7\.\.16"),
        ({"ids": []}, "at least one prompt"),
        ({"max_new_tokens": -1}, "max_new_tokens >= 0"),
        ({"max_new_tokens": 64}, r"69 tokens; the model's filters reach over 66"),
    ],
    ids=str,
)
def test_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model(), **{"ids": prompts(5), "max_new_tokens": 3} | change)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}], ids=str)
def test_sampling_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_classifier_does_not_write():
    model = small_model(ModelConfig(arch="lm", d_model=8, n_layer=1, max_len=16, num_classes=2, embed_dropout=0.0))
    with pytest.raises(ValueError, match="tell the next token"):
        generate(model, prompts(3), max_new_tokens=1)
