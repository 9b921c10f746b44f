"""Pathfinder: the class follows from the drawing, both have the same ink, a drawing is a function of (seed, number)."""

import numpy as np
import pytest

from seqengine.data.pathfinder import DISC, Pathfinder
from seqengine.errors import InputError

TASK = Pathfinder(seed=4)
COUNT = 120


def labels(count):
    return np.array([TASK.label(n) for n in range(count)])


@pytest.fixture(scope="module")
def images():
    return np.stack([TASK.image(n) for n in range(COUNT)])


def part_of(shape, start):
    """The pixels that hang together with one, diagonals included."""
    found, waiting = {start}, [start]
    while waiting:
        row, column = waiting.pop()
        for at in [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
            if at in found or not (0 <= at[0] < len(shape) and 0 <= at[1] < len(shape)) or not shape[at]:
                continue
            found.add(at)
            waiting.append(at)
    return found


def discs(image):
    """Middles of the two discs: the brightest squares of 3 x 3 pixels that do not overlap."""
    size = len(image)
    sums = sum(image[i : size - 2 + i, j : size - 2 + j].astype(int) for i in range(3) for j in range(3))
    first = np.unravel_index(sums.argmax(), sums.shape)
    rows, columns = np.indices(sums.shape)
    apart = np.hypot(rows - first[0], columns - first[1]) > 2 * DISC + 1
    second = np.unravel_index(np.where(apart, sums, -1).argmax(), sums.shape)
    return [(int(a) + 1, int(b) + 1) for a, b in (first, second)]


def test_the_class_says_whether_a_curve_without_its_gaps_joins_the_discs(images):
    for number in range(60):
        whole = TASK.image(number, dashed=False)
        first, second = discs(images[number])
        assert (second in part_of(whole > 25, first)) == bool(TASK.label(number)), number
        # Shades too faint to see do not join curves either: two long ones, three distractors.
        left, parts = whole > 0, 0
        while left.any():
            for at in part_of(left, tuple(int(i) for i in np.argwhere(left)[0])):
                left[at] = False
            parts += 1
        assert parts == 5, number


def test_dashes_take_ink_away_and_nothing_else(images):
    for number in range(20):
        whole = TASK.image(number, dashed=False)
        assert (whole >= images[number]).all()
        assert images[number].sum() < 0.9 * whole.sum()


def test_classes_are_balanced_and_ink_and_distance_do_not_tell_them(images):
    found = labels(COUNT)
    assert (found[::2] + found[1::2] == 1).all()
    assert 0.3 < found[::2].mean() < 0.7  # which of two comes first is drawn
    ink = images.reshape(COUNT, -1).mean(axis=1)
    assert ink[found == 0].mean() == pytest.approx(ink[found == 1].mean(), rel=0.03)
    squares = (images.astype(float) ** 2).reshape(COUNT, -1).mean(axis=1)
    assert squares[found == 0].mean() == pytest.approx(squares[found == 1].mean(), rel=0.04)
    apart = np.array([np.hypot(*np.subtract(*discs(image))) for image in images])
    assert (apart[found == 1][:, None] > apart[found == 0]).mean() == pytest.approx(0.5, abs=0.15)
    assert images.max() == 255
    assert len(np.unique(images)) > 100


def test_a_drawing_is_a_function_of_seed_and_number(images):
    again = Pathfinder(seed=4)
    for number in (COUNT - 1, 0, 17):
        ids, label = again.example(number)
        assert np.array_equal(ids, images[number].reshape(-1))
        assert ids.dtype == np.uint8
        assert label == TASK.label(number)
    assert (
        len({image.tobytes() for image in images} | {Pathfinder(seed=5).image(n).tobytes() for n in range(5)})
        == COUNT + 5
    )


def test_larger_drawings_have_longer_curves():
    large = Pathfinder(size=64, distractors=2, seed=1).image(0)
    assert large.shape == (64, 64)
    assert (large > 0).sum() > (Pathfinder(size=32, distractors=2, seed=1).image(0) > 0).sum()


def test_sizes_and_curves_that_find_no_room_are_refused():
    for settings in ({"size": 15}, {"distractors": -1}):
        with pytest.raises(ValueError, match="Pathfinder: size must be at least 16"):
            Pathfinder(**settings)
    with pytest.raises(InputError, match="20 distractors must find room in 16 x 16 pixels"):
        Pathfinder(size=16, distractors=20).image(0)
