"""How well a selection agrees with scores in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.query import QuantizedQuery

# What `score_topk` promises: relative norm error of a row of scores
CPU_BAND = 1e-5
CUDA_FP8_BAND = 5e-4  # fp8 tensor cores, where both operands are mxfp4 or fp8
CUDA_BAND = 1e-4


@dataclass(frozen=True)
class Agreement:
    """Choices of `num_queries` queries, `per_query` each, against the top-k of float64 scores.

    A choice agrees unless its float64 score lies more than the band below the k-th best, or it stands where an entry
    more than the band above the k-th best was left out. The band is a fraction of the root mean square of a row's
    scores; `band` is the widest of them.
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
    band: float | None = None,
) -> Agreement:
    """Compare selections with the float64 reference, one row at a time, on the device of the view.

    Args:
        q, weights: the queries [T, H, D] and fp32 [T, H] that were scored, all of one sequence.
        indices: int [T, k] what was chosen, in any order, -1 where there were fewer. What is no entry agrees with
            nothing.
        num_entries: entries that every query sees.
        seq_id: the sequence.
        band: as a fraction of the root mean square of a row's scores. Default: `promised_band` of q as it is given, so
            q must be what was scored, not its dequantised values.
    """
    relative = promised_band(view, q) if band is None else band
    values = q.dequantize() if isinstance(q, QuantizedQuery) else q
    keys = reference.read_entries(view, seq_id, num_entries).double()
    per_query = min(indices.shape[1], num_entries)
    agreeing, identical, widest = 0, 0, 0.0
    for t, row in enumerate(indices):
        scores = reference.score_row(values[t].double(), weights[t].double(), keys)
        row_band = relative * float(scores.square().mean().sqrt())
        right, same = _count(scores, row, per_query, row_band)
        agreeing, identical, widest = agreeing + right, identical + same, max(widest, row_band)
    return Agreement(len(indices), per_query, agreeing, identical, widest)


def promised_band(view: IndexerView, q: Tensor | QuantizedQuery) -> float:
    """Relative norm error that the scores of these operands may have, by the device and the arithmetic they get."""
    if view.device.type == "cpu":
        return CPU_BAND
    query_format = q.format if isinstance(q, QuantizedQuery) else "bf16"
    on_fp8_cores = {view.schema.format, query_format} <= {"mxfp4", "fp8"}
    return CUDA_FP8_BAND if on_fp8_cores else CUDA_BAND


def _count(scores: Tensor, row: Tensor, per_query: int, band: float) -> tuple[int, int]:
    """How many choices agree up to the band, and how many are in the float64 top-k."""
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[row[(row >= 0) & (row < len(scores))].long()] = True  # an entry chosen twice counts once
    best = reference.select(scores, len(scores), per_query)
    threshold = scores[best[-1]]
    acceptable = int((chosen & (scores >= threshold - band)).sum())
    missing = int((~chosen & (scores > threshold + band)).sum())
    return min(acceptable, per_query - missing), int(chosen[best].sum())
