"""The last tokens of each sequence, by position: a layer's window, and what its compressors are still to pool."""

import itertools

import torch
from torch import Tensor

from lightning_indexer.cache.step import Step


class TokenRing:
    """The last `size` tokens of each sequence: row `position % size`.

    A row is always written before it is read, because whoever reads masks negative positions; so nothing has to be
    cleared when a sequence begins. There is no way back: a token's row takes the place of one `size` tokens earlier.
    """

    def __init__(
        self,
        max_seqs: int,
        size: int,
        features: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.size = size
        self.rows = torch.zeros(max_seqs, size, *features, dtype=dtype, device=device)

    def with_chunk(self, step: Step, chunk: Tensor) -> Tensor:
        """[S * size + T, ...]: the rings of the step's sequences, then the step's own tokens."""
        return torch.cat([self.rows[step.seqs].flatten(0, 1), chunk.to(self.rows.dtype)])

    def find(self, step: Step, batch_rows: Tensor, positions: Tensor) -> Tensor:
        """Rows of `with_chunk` that hold `positions` [N, P] of sequences `batch_rows` [N]; any row where negative."""
        batch_rows = batch_rows.unsqueeze(1)
        ahead = positions - step.starts[batch_rows]
        old = batch_rows * self.size + positions % self.size
        return torch.where(ahead >= 0, len(step.seqs) * self.size + step.offsets[batch_rows] + ahead, old)

    def update(self, step: Step, chunk: Tensor) -> None:
        """Keep the last `size` of each sequence's tokens, the step's included."""
        kept = self._kept(step)
        self.rows[step.seq_ids[kept].long(), step.positions[kept] % self.size] = chunk[kept].to(self.rows.dtype)

    def copy(self, src: int, dst: int) -> None:
        """Let sequence `dst` have the rows of `src`."""
        self.rows[dst] = self.rows[src]

    def _kept(self, step: Step) -> slice | Tensor:
        """Rows of the step's tokens that stay, told from its counts."""
        if max(step.counts, default=0) <= self.size:
            return slice(None)
        ends = zip(itertools.accumulate(step.counts), step.counts, strict=True)
        rows = [torch.arange(end - min(n, self.size), end, device=self.rows.device) for end, n in ends]
        return torch.cat(rows)
