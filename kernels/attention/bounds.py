"""Which keys a query sees. Causality, windows and documents all leave one interval per query: [first, stop).

Query t stands at position p = t + S - T, so that the last query and the last key share a position. It sees key s if

    s <= p                  causal
    p - window < s          with a window; not causal: |p - s| < window
    s in the document of t  with cu_seqlens (then T = S)

Both ends never fall as t grows. So a block of queries sees one interval of keys, and only its ends need a mask.
"""

import torch
from torch import Tensor


def key_intervals(
    T: int, S: int, causal: bool, window: int | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(first, stop), int64 [T]: query t sees the keys first[t] <= s < stop[t]. first == stop if it sees none."""
    tokens = torch.arange(T, device=device)
    position = tokens + (S - T)
    if cu_seqlens is None:
        start, end = torch.zeros_like(tokens), torch.full_like(tokens, S)
    else:
        ends = cu_seqlens.to(device=device, dtype=torch.int64)
        document = torch.searchsorted(ends, tokens, right=True) - 1
        start, end = ends[document], ends[document + 1]
    low = start if window is None else torch.maximum(start, position - (window - 1))
    high = end
    if causal:
        high = torch.minimum(end, position + 1)
    elif window is not None:
        high = torch.minimum(end, position + window)
    return low, torch.maximum(low, high)
