"""Blocks that threads share out are what one thread makes of them, digit for digit, and nothing is left of the threads."""

import threading
from contextlib import contextmanager

import pytest
import torch

from seqengine.kernels.api import long_conv
from seqengine.kernels.conv import plan as plan_module
from seqengine.kernels.conv import spectral, workers
from seqengine.kernels.conv.plan import MOST_WORKERS, Block, Plan, blocks, num_workers, plan
from seqengine.kernels.conv.workers import can_share, share
from seqengine.unfilled import Unfilling
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_openmp = pytest.mark.skipif(not can_share(), reason="torch has no OpenMP that a thread can limit")
WHOLE = Plan("frames", 2**17, 2**16, 1)
CASES = {
    "whole": (2, 24, 24, 700, 700),
    "two frames": (1, 24, 24, 5000, 500),
    "many frames": (1, 16, 16, 20000, 60),
    "groups": (1, 30, 15, 300, 300),
    "groups in parts": (3, 32, 8, 200, 100),
    "a filter for each sample": (2, 12, None, 256, 64),
}


@pytest.fixture
def shared(monkeypatch):
    """However little there is to do."""
    monkeypatch.setattr(plan_module, "WORTH_WORKERS", 0)


@contextmanager
def one_after_another(set_num_threads):
    """The same blocks: MKL's transforms differ in the last digit between one row and several."""
    set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectral, "share", lambda blocks, _, start: share(blocks, 1, start))
        yield


def arguments(case, dtype=torch.float32, gated=False):
    B, D, G, T, L = CASES[case]
    generator = torch.Generator().manual_seed(T)

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    gates = [randn(B, D, T), randn(B, D, T), randn(B, D, L - 1)] if gated else [None] * 3
    filters = randn(B, D, L) if G is None else randn(G, L)
    return randn(B, D, T), randn(B, D, T), filters, randn(D), *gates


def both(dy, *inputs):
    needed = [t is not None for t in inputs]
    return [spectral.convolve(*inputs), *spectral.gradients(dy, *inputs, needed)]


@needs_openmp
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_one_thread(case, gated, count, set_num_threads, monkeypatch):
    B, _, _, T, _ = CASES[case]
    monkeypatch.setitem(plan_module.BLOCK_ELEMENTS, "cpu", 12 * B * T)  # several blocks, of parts of groups too
    monkeypatch.setattr(plan_module, "FEW_CHANNELS", 1)
    monkeypatch.setattr(spectral, "num_workers", lambda *_: count)
    given, seen = arguments(case, gated=gated), set()
    with one_after_another(set_num_threads):
        expected = both(*given)
    set_num_threads(count)
    make = spectral._method
    monkeypatch.setattr(spectral, "_method", lambda how: seen.add(threading.get_ident()) or make(how))
    for actual, value in zip(both(*given), expected, strict=True):
        assert torch.equal(actual, value)
    assert seen
    assert threading.get_ident() not in seen
    assert torch.get_num_threads() == count


@needs_openmp
def test_long_sequences_in_partitions(set_num_threads, monkeypatch):
    monkeypatch.setattr(plan_module, "LONGEST_TRANSFORM", 1 << 10)
    monkeypatch.setattr(plan_module, "SMALLEST_PIECE", 1 << 8)
    plan.cache_clear()
    try:
        given = (
            torch.randn(2, 16, 1500),
            torch.randn(2, 16, 1500),
            torch.randn(16, 1400),
            torch.randn(16),
            *[None] * 3,
        )
        assert plan(1500, 1400, "cpu").method == "partitions"
        monkeypatch.setattr(spectral, "num_workers", lambda *_: 2)
        with one_after_another(set_num_threads):
            expected = both(*given)
        set_num_threads(2)
        for actual, value in zip(both(*given), expected, strict=True):
            assert torch.equal(actual, value)
    finally:
        plan.cache_clear()


@needs_openmp
def test_gradients_of_the_public_function_second_ones_too(set_num_threads, shared):
    def found():
        generator = torch.Generator().manual_seed(0)
        u, k, skip = (
            torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
            for shape in ((2, 16, 90), (16, 90), (16,))
        )
        y, _ = long_conv(u, k, skip=skip)
        first = torch.autograd.grad(y.square().sum(), (u, k, skip), create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (u, k, skip))]

    set_num_threads(1)
    expected = found()
    set_num_threads(2)
    for actual, value in zip(found(), expected, strict=True):
        assert_close(actual, value)


@needs_openmp
def test_in_inference_mode_and_what_comes_out_of_it(set_num_threads, shared):
    set_num_threads(2)
    u, k = torch.randn(1, 16, 64), torch.randn(16, 64)
    with torch.inference_mode():
        y, _ = long_conv(u, k)
        assert y.is_inference()
        again, _ = long_conv(y, k)
    outside, _ = long_conv(u, k)
    assert not outside.is_inference()
    assert_close(again, long_conv(outside, k)[0])


@needs_openmp
def test_threads_have_their_part_and_later_threads_have_all(set_num_threads):
    set_num_threads(4)
    seen, both_began = [], threading.Barrier(2)

    def start():
        if len(seen) < 2:
            both_began.wait(20)
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return lambda block: None

    share(blocks(1, 16, 16, WHOLE, "cpu", 2), 2, start)
    assert seen == [(2, False)] * 2, "two threads at the same time"
    assert torch.get_num_threads() == 4
    later = threading.Thread(target=start)
    later.start()
    later.join()
    assert seen[-1] == (4, True)


@needs_openmp
def test_an_error_is_raised_once_all_have_ended():
    def start():
        def work(block):
            if block.channels.start == 4:
                raise ValueError("a block that cannot be")

        return work

    before = threading.active_count()
    with pytest.raises(ValueError, match="a block that cannot be"):
        share(blocks(1, 16, 16, WHOLE, "cpu", 2), 2, start)
    assert threading.active_count() == before


@needs_openmp
def test_blocks_of_a_filter_stay_together_and_in_order():
    seen = {}

    def start():
        def work(block):
            seen.setdefault(block.filters.start, []).append((threading.get_ident(), block.channels.start))

        return work

    parts = [Block(slice(c, c + 2), slice(c // 8, c // 8 + 1), c % 8 == 0) for c in range(0, 64, 2)]
    share(parts, 3, start)
    assert sorted(seen) == list(range(8))
    for i, found in seen.items():
        assert [channel for _, channel in found] == list(range(8 * i, 8 * i + 8, 2))
        assert len({thread for thread, _ in found}) == 1


@pytest.mark.parametrize(
    ("of", "threads", "expected", "why"),
    [
        ((1, 256, 256, WHOLE, "cpu"), 1, 1, "one thread"),
        ((1, 256, 256, WHOLE, "cpu"), 2, 2, "two threads"),
        ((1, 256, 256, WHOLE, "cpu"), 64, MOST_WORKERS, "no more than so many"),
        ((1, 256, 256, WHOLE, "cuda"), 8, 1, "a GPU"),
        ((1, 64, 64, WHOLE, "cpu"), 2, 1, "too little"),
        ((2, 256, 8, WHOLE, "cpu"), 8, 2, "four filters each"),
        ((2, 256, 1, WHOLE, "cpu"), 8, 1, "one filter"),
        ((1, 256, 256, Plan("frames", 2**20, 2**19, 1), "cpu"), 8, 2, "long rows take memory"),
        ((4, 256, 256, Plan("frames", 2**20, 2**19, 1), "cpu"), 8, 1, "longer than a block"),
        ((1, 256, 256, Plan("many frames", 2**10, 2**9, 128), "cpu"), 2, 2, "all frames count"),
    ],
    ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "",
)
def test_how_many_workers(of, threads, expected, why):
    assert num_workers(*of, threads) == expected


@pytest.mark.parametrize("points", [2**12, 2**15, 2**18, 2**20])
def test_blocks_of_all_workers_are_bounded(points):
    how = Plan("frames", points, points // 2, 1)
    for threads in (1, 2, 8, 100):
        at_once = num_workers(1, 4096, 4096, how, "cpu", threads)
        width = max(block.groups for block in blocks(1, 4096, 4096, how, "cpu", at_once))
        assert width * at_once * points <= plan_module.LARGEST_BLOCK


def test_functions_that_change_nothing_for_torch_are_none():
    """Of another OpenMP than the one that torch's threads come from."""
    before = torch.get_num_threads()
    assert not workers._takes_effect(lambda _: None)
    assert torch.get_num_threads() == before


@needs_openmp
def test_what_is_found_takes_effect_and_on_one_thread_only():
    before = torch.get_num_threads()
    assert workers._takes_effect(workers._set_own_threads())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("why", ["no OpenMP", "no data"])
def test_one_thread_does_all_where_others_cannot(why, set_num_threads, shared, monkeypatch):
    set_num_threads(2)

    def refuse(*_):
        raise AssertionError("no thread of its own")

    monkeypatch.setattr(workers, "ThreadPoolExecutor", refuse)
    if why == "no OpenMP":
        monkeypatch.setattr(spectral, "can_share", lambda: False)
        u, k = torch.randn(1, 16, 64), torch.randn(16, 64)
        assert spectral.convolve(u, k, None, None, None, None).shape == u.shape
    else:
        with Unfilling():
            u, k = torch.ones(1, 16, 64), torch.ones(16, 64)
            assert spectral.convolve(u, k, None, None, None, None).shape == (1, 16, 64)


def test_too_little_work_asks_nothing_about_threads(set_num_threads, monkeypatch):
    set_num_threads(2)

    def refuse():
        raise AssertionError("not asked")

    monkeypatch.setattr(spectral, "can_share", refuse)
    u, k = torch.randn(1, 16, 64), torch.randn(16, 64)
    assert spectral.convolve(u, k, None, None, None, None).shape == u.shape
