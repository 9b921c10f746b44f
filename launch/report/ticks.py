"""Round numbers along an axis, and how they are written."""

import math
from dataclasses import dataclass

from seqengine.sinks import short_number

LOG_RATIO = 100.0
"""An axis that may be logarithmic is, where values differ by more than this factor."""


@dataclass(frozen=True)
class Axis:
    """From values to a place between 0 and 1."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> list[str]:
        """Of the ticks, all with as many digits as tell them apart."""
        if self.is_log:
            return [_power(tick) for tick in self.ticks]
        largest = max(abs(tick) for tick in self.ticks)
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else largest or 1.0
        if largest >= 1000 and step >= 10:
            return [_thousands(tick, step, largest) for tick in self.ticks]
        if largest < 0.01 and largest > 0:
            power = math.floor(math.log10(largest))
            digits = max(0, power - math.floor(math.log10(step) + 1e-9))
            return ["0" if tick == 0 else f"{tick / 10.0**power:.{digits}f}e{power}" for tick in self.ticks]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [f"{tick:,.{digits}f}" for tick in self.ticks]


def _power(tick: float) -> str:
    if 0.01 <= tick < 1000:
        return f"{tick:g}"
    return short_number(tick) if tick >= 1000 else f"{tick:.0e}".replace("e-0", "e-")


def _thousands(tick: float, step: float, largest: float) -> str:
    """In the unit of the largest, with as many digits as the step needs: 0.75M, 1.00M."""
    limit, unit = next((n, u) for n, u in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if largest >= n)
    digits = max(0, -math.floor(math.log10(step / limit) + 1e-9))
    return "0" if tick == 0 else f"{tick / limit:.{digits}f}{unit}"


def make_axis(values: list[float], *, wanted: int = 5, may_be_log: bool = False, from_zero: bool = False) -> Axis:
    """Over finite values, from half a tick to half a tick, with some room above the largest."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low > LOG_RATIO:
        return _log_axis(low, high)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) * 0.05 or 1.0
        low, high = low - (0.0 if from_zero and low == 0 else pad), high + pad
    step = round_step((high - low) / wanted)
    low = low if from_zero and low == 0 else math.floor(low / step * 2 + 1e-9) * step / 2
    high = math.ceil((high + 0.1 * step) / step * 2 - 1e-9) * step / 2
    return Axis(low, high, False, _multiples(step, low, high))


def axis_from_zero_to(last: float, *, wanted: int = 5) -> Axis:
    """Ends with the last value, above 0."""
    return Axis(0.0, last, False, _multiples(round_step(last / wanted), 0.0, last))


def _multiples(step: float, low: float, high: float) -> tuple[float, ...]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(i * step for i in range(first, last + 1))


def round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * m for m in (1.0, 2.0, 5.0, 10.0) if power * m >= least * (1 - 1e-9))


def _log_axis(low: float, high: float) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 6))
    ticks = tuple(10.0**power for power in range(first, last + 1, every))
    return Axis(10.0**first, 10.0**last, True, ticks)
