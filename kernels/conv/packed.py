"""Packed documents: several sequences end to end in one row, worked on as a batch, so that nothing crosses a boundary.

A row [1, D, T] with boundaries cu_seqlens = [0, n_1, n_1 + n_2, ..., T] becomes a batch [N, D, M], M the longest document,
zeros behind the shorter ones. A causal kernel cannot see behind a document, so its outputs there are not read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a row lie."""

    lengths: Tensor
    """int64 [N]; documents may be empty."""
    document: Tensor
    """int64 [T]: the document of each token."""
    position: Tensor
    """int64 [T]: each token's place in its document."""
    longest: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, u: Tensor, name: str) -> "Documents":
        """Raises ValueError unless u is [1, D, T] and cu_seqlens an ascending integer vector from 0 to T."""
        T = u.shape[-1]
        if u.ndim != 3 or u.shape[0] != 1:
            raise ValueError(f"{name}: with cu_seqlens u must be one row [1, D, T]; got {tuple(u.shape)}.")
        is_vector = cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 2 and not cu_seqlens.is_floating_point()
        bounds = cu_seqlens.to(device=u.device, dtype=torch.int64) if is_vector else cu_seqlens
        is_cover = is_vector and int(bounds[0]) == 0 and int(bounds[-1]) == T
        if not is_cover or bool((bounds.diff() < 0).any()):
            raise ValueError(
                f"{name}: cu_seqlens must be integers that ascend from 0 to T={T}; "
                f"got {cu_seqlens.dtype} {cu_seqlens.tolist()}."
            )
        lengths = bounds.diff()
        document = torch.repeat_interleave(torch.arange(lengths.numel(), device=u.device), lengths, output_size=T)
        position = torch.arange(T, device=u.device) - bounds[document]
        return cls(lengths, document, position, int(lengths.max()) if T else 0)

    def to_batch(self, x: Tensor) -> Tensor:
        """[1, D, T] -> [N, D, M]."""
        batch = x.new_zeros(self.lengths.numel(), self.longest, x.shape[1])
        batch = batch.index_put((self.document, self.position), x[0].T)
        return batch.transpose(1, 2)

    def from_batch(self, y: Tensor) -> Tensor:
        """[N, D, M] -> [1, D, T]."""
        return y.transpose(1, 2)[self.document, self.position].T[None]

    def last(self, batch: Tensor, before: Tensor | None, keep: int) -> Tensor:
        """The last `keep` values of each document, [N, D, keep]; those of `before` [N, D, keep], or zeros, precede it."""
        past = batch.new_zeros(*batch.shape[:2], keep) if before is None else before
        stream = torch.cat([past, batch], dim=-1)
        columns = self.lengths[:, None, None] + torch.arange(keep, device=batch.device)
        return stream.gather(2, columns.expand(-1, batch.shape[1], -1))
