"""Loss spikes: a loss far above those of the last steps."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

MIN_LOSSES = 50
"""With fewer losses there is no spike: the first ones fall too fast to tell."""


class SpikeDetector:
    """A loss is a spike if loss > median + factor * MAD, over the last `window` finite losses before it, once there are 50.

    MAD is the median of |loss - median|. It counts as 1e-6 of the median at least, so that rounding among equal losses is no
    spike. Every finite loss joins the window, a spike too: after a lasting rise (longer sequences, say) half a window of steps
    is needed until the new level is the usual one. A loss that is not finite is no spike, and does not join.
    Ranks that see the same losses decide the same.
    """

    def __init__(self, *, window: int = 200, factor: float = 6.0) -> None:
        if window < MIN_LOSSES:
            raise ValueError(f"train.spike_window: must be at least {MIN_LOSSES}; got {window}.")
        if not factor > 0:
            raise ValueError(f"train.spike_factor: must be above 0; got {factor}.")
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=window)

    @property
    def limit(self) -> float:
        """The next loss is a spike above this; infinite while losses are too few."""
        if len(self._losses) < MIN_LOSSES:
            return math.inf
        middle = median(self._losses)
        spread = median(abs(loss - middle) for loss in self._losses)
        return middle + self._factor * max(spread, 1e-6 * abs(middle))

    def is_spike(self, loss: float) -> bool:
        """Whether this step's loss is one; the loss joins the window."""
        if not math.isfinite(loss):
            return False
        found = loss > self.limit
        self._losses.append(loss)
        return found

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"losses": list(self._losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. A smaller window keeps the newest of its losses."""
        self._losses.clear()
        self._losses.extend(float(loss) for loss in state["losses"])
