"""How well a selection agrees with scores in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.query import QuantizedQuery

RELATIVE_BAND = 1e-5  # what `score_topk` promises on a CPU: relative norm error of a row of scores


@dataclass(frozen=True)
class Agreement:
    """Choices of `num_queries` queries, `per_query` each, against the top-k of float64 scores.

    A choice agrees unless its float64 score lies more than the band below the k-th best, or it stands where an entry
    more than the band above the k-th best was left out. The band is RELATIVE_BAND times the root mean square of a
    row's scores; `band` is the widest of them.
    """

    num_queries: int
    per_query: int
    agreeing: int
    identical: int  # choices that are in the float64 top-k itself, band or not
    band: float

    @property
    def choices(self) -> int:
        return self.num_queries * self.per_query

    @property
    def complete(self) -> bool:
        return self.agreeing == self.choices


def compare(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    indices: Tensor,
    *,
    num_entries: int,
    seq_id: int = 0,
) -> Agreement:
    """Compare selections with the float64 reference, one row at a time.

    Args:
        q, weights: the queries [T, H, D] and fp32 [T, H] that were scored, all of one sequence.
        indices: int [T, k] what was chosen, in any order, -1 where there were fewer.
        num_entries: entries that every query sees.
        seq_id: the sequence.
    """
    values = q.dequantize() if isinstance(q, QuantizedQuery) else q
    keys = reference.read_entries(view, seq_id, num_entries).double()
    per_query = min(indices.shape[1], num_entries)
    agreeing, identical, widest = 0, 0, 0.0
    for t, row in enumerate(indices):
        scores = reference.score_row(values[t].double(), weights[t].double(), keys)
        band = RELATIVE_BAND * float(scores.square().mean().sqrt())
        right, same = _count(scores, row, per_query, band)
        agreeing, identical, widest = agreeing + right, identical + same, max(widest, band)
    return Agreement(len(indices), per_query, agreeing, identical, widest)


def _count(scores: Tensor, row: Tensor, per_query: int, band: float) -> tuple[int, int]:
    """How many choices agree up to the band, and how many are in the float64 top-k."""
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[row[row >= 0].long()] = True  # an entry chosen twice counts once
    best = reference.select(scores, len(scores), per_query)
    threshold = scores[best[-1]]
    acceptable = int((chosen & (scores >= threshold - band)).sum())
    missing = int((~chosen & (scores > threshold + band)).sum())
    return min(acceptable, per_query - missing), int(chosen[best].sum())
