"""Pathfinder: does a dashed curve join the two discs? Our own drawings, not the published images.

A drawing has two long curves of one length and shorter distractors, all dashed, none touching another, and two discs, which lie
on the two ends of one long curve (class 1) or on an end of each (class 0). The curves are placed before the class is known, so
that both classes have the same ink: only following a curve tells them apart. Of the four pairs of ends of class 0 that pair is
taken whose distance is nearest to that of the ends of one curve, so that the distance of the discs tells less.

A curve is a walk of half-pixel steps that turns a little more or less from step to step. Pixels are shaded by their distance to
it: 255 at most, 0 beyond one pixel. Examples are a function of (seed, number) alone; of numbers 2k and 2k + 1 one is of each
class.

References: Linsley et al. 2018, Pathfinder, arXiv:1805.08315; Tay et al. 2021, Long Range Arena, arXiv:2011.04006: 32 x 32
pixels as 1,024 gray levels, and Path-X with 128 x 128.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from seqengine.data.tiles import mix
from seqengine.errors import InputError

STEP = 0.5
"""Pixels between two points of a curve."""
DASH, PERIOD = 3.0, 5.0
"""Pixels of a dash, and of a dash and its gap."""
DISC = 1.5
"""Radius of a disc; a curve's is half a pixel."""
LONG, SHORT = 0.6, 0.25
"""Length of a long curve and of a distractor, in widths of the drawing."""
CLEAR = 1.6
"""Pixels between the shades of two curves, more than a diagonal step."""
TURN = 0.45
"""Most that a curve turns in a pixel, in radians."""
_CANDIDATES, _ROUNDS, _LAYOUTS = 12, 8, 200
_CLASS = 1 << 35  # what a word is drawn for: which of two neighbours is of class 1

Points = npt.NDArray[np.float64]
Image = npt.NDArray[np.uint8]


class Layout(NamedTuple):
    """The curves of a drawing, points [n, 2] as (row, column); the first two are the long ones."""

    curves: list[Points]
    phases: list[float]
    """Of each curve's dashes, in pixels."""


@dataclass(frozen=True)
class Pathfinder:
    """Drawings of size x size pixels; see the module. Threads may share it."""

    size: int = 32
    distractors: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 16 or self.distractors < 0:
            raise ValueError(
                f"Pathfinder: size must be at least 16 and distractors at least 0; got {self.size}, {self.distractors}"
            )

    def label(self, number: int) -> int:
        """1 if a curve joins the discs. Does not draw."""
        return (mix(_CLASS, self.seed, number >> 1) ^ number) & 1

    def example(self, number: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Gray levels, row after row, uint8 [size * size], and the class of a drawing. Raises: as image."""
        return self.image(number).reshape(-1), self.label(number)

    def image(self, number: int, *, dashed: bool = True) -> Image:
        """A drawing: uint8 [size, size]. dashed: or else its curves without gaps.

        Raises: InputError if so many curves find no room.
        """
        layout = self._layout(np.random.Philox(key=np.array([self.seed, number], dtype=np.uint64)))
        size = self.size
        distance = np.full((size, size), np.inf)
        for curve, phase in zip(layout.curves, layout.phases, strict=True):
            along = np.arange(len(curve)) * STEP + phase
            _lower(distance, curve[along % PERIOD < DASH] if dashed else curve, 0.5, reach=2)
        for end in _ends(layout, self.label(number)):
            _lower(distance, end[None], DISC, reach=3)
        return (255 * np.clip(0.5 - distance, 0, 1)).round().astype(np.uint8)

    def _layout(self, random: np.random.Philox) -> Layout:
        """Curves that keep their distance, drawn anew if one of them finds no room."""
        pixels = [round(LONG * self.size)] * 2 + [round(SHORT * self.size)] * self.distractors
        for _ in range(_LAYOUTS):
            taken = np.full((self.size, self.size), np.inf)  # from each pixel to the nearest curve's edge
            curves: list[Points] = []
            for length in pixels:
                curve = self._place(random, length * round(1 / STEP), taken, is_long=len(curves) < 2)
                if curve is None:
                    break
                curves.append(curve)
                _lower(taken, curve[:: round(1 / STEP)], 1.0, reach=7)  # as far as two discs must be apart
                if len(curves) <= 2:
                    _lower(taken, curve[:1], DISC + 0.5, reach=7)
                    _lower(taken, curve[-1:], DISC + 0.5, reach=7)
            else:
                return Layout(curves, list(PERIOD * _uniform(random, len(pixels))))
        raise InputError(
            f"data.pathfinder: {self.distractors} distractors must find room in {self.size} x {self.size} pixels; "
            f"{_LAYOUTS} drawings had none. Lower distractors, or raise size."
        )

    def _place(self, random: np.random.Philox, count: int, taken: Points, *, is_long: bool) -> Points | None:
        """A curve of `count` steps that is clear of all that is there and of itself; None: none was found."""
        margin = DISC + 0.5 if is_long else 1.0
        for _ in range(_ROUNDS):
            many = _CANDIDATES if is_long else 4 * _CANDIDATES
            drawn = _uniform(random, many * (count + 3)).reshape(many, count + 3)
            # The curvature is a walk too, so that a curve bends rather than trembles.
            bend = 2 * np.pi * drawn[:, 3:4] + 0.35 * np.cumsum(drawn[:, 3:] - 0.5, axis=1)
            angle = 2 * np.pi * drawn[:, 2:3] + TURN * STEP * np.cumsum(np.sin(bend), axis=1)
            points = np.zeros((many, count + 1, 2))
            np.cumsum(np.stack([np.sin(angle), np.cos(angle)], axis=2) * STEP, axis=1, out=points[:, 1:])
            # Anywhere inside, as far as it fits.
            low, high = points.min(axis=1), points.max(axis=1)
            spare = self.size - 1 - 2 * margin - (high - low)
            points += (margin - low + drawn[:, :2] * spare)[:, None]
            points = points[(spare >= 0).all(axis=1)]
            at = points.round().astype(np.int64)
            # A point lies up to 0.71 pixels from the middle of its own.
            room = taken[at[:, :, 0], at[:, :, 1]] - 0.71 - CLEAR
            is_clear = (room >= 1.0).all(axis=1)
            if is_long:
                is_clear &= (room[:, [0, -1]] >= DISC + 0.5).all(axis=1)
            for curve in points[is_clear]:
                if not _meets_itself(curve, is_long=is_long):
                    return np.asarray(curve)
        return None


def _meets_itself(curve: Points, *, is_long: bool) -> bool:
    """Whether parts of a curve that are not neighbours touch, or its discs would."""
    coarse = curve[:: round(1 / STEP)]
    apart = np.hypot(*(coarse[:, None] - coarse[None]).transpose(2, 0, 1))
    order = np.arange(len(coarse))
    far = np.abs(order[:, None] - order[None]) > 6
    discs_meet = is_long and float(np.hypot(*(curve[0] - curve[-1]))) < 2 * (DISC + 0.5) + CLEAR
    return discs_meet or bool((apart[far] < 2 + CLEAR).any())


def _ends(layout: Layout, label: int) -> tuple[Points, Points]:
    """Where the discs lie."""
    first, second = layout.curves[:2]
    if label:
        return first[0], first[-1]
    wanted = np.hypot(*(first[0] - first[-1]))
    pairs = [(a, b) for a in (first[0], first[-1]) for b in (second[0], second[-1])]
    return min(pairs, key=lambda pair: abs(np.hypot(*(pair[0] - pair[1])) - wanted))


def _lower(distance: Points, points: Points, radius: float, *, reach: int) -> None:
    """To the distance from each pixel to discs of `radius` around the points, where it is shorter; changes `distance`.

    reach: pixels around them for which it is asked.
    """
    if not len(points):
        return
    low = np.maximum(points.min(axis=0).astype(np.int64) - reach, 0)
    high = np.minimum(points.max(axis=0).astype(np.int64) + reach + 2, distance.shape)
    rows, columns = np.arange(low[0], high[0]), np.arange(low[1], high[1])
    squares = (rows[:, None] - points[:, 0]) ** 2, (columns[:, None] - points[:, 1]) ** 2
    nearest = (squares[0][:, None] + squares[1][None]).min(axis=2)
    part = distance[low[0] : high[0], low[1] : high[1]]
    np.minimum(part, np.sqrt(nearest) - radius, out=part)


def _uniform(random: np.random.Philox, count: int) -> Points:
    """Numbers from 0 to 1, of raw words, which numpy keeps the same over its versions."""
    return np.asarray((random.random_raw(count) >> np.uint64(11)) * 2.0**-53, dtype=np.float64)
