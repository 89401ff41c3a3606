"""Correct first: what a case computes is compared on a few rows before anything is timed."""

from typing import Any

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.bench.agreement import compare
from lightning_indexer.bench.cuda.cases import AppendCase, GatherCase, ScoringCase
from lightning_indexer.bench.cuda.operands import AppendOperands, GatherOperands, ScoringOperands
from lightning_indexer.formats import quantize

_CHECKED_QUERIES = 6
_CHECKED_ROWS = 16  # per query, of what is gathered
_CHECKED_ENTRIES = 1_024
_PEER_OVERLAP = 0.9  # bf16 products are rounded before the weighted sum: near ties may change places


def check_scoring(case: ScoringCase, operands: ScoringOperands, indices: Tensor) -> dict[str, Any]:
    """Compare a few queries' choices with float64; returns what was found.

    Raises:
        AssertionError: they differ by more than the arithmetic's promise allows, or lie out of order.
    """
    totals = {"queries": 0, "choices": 0, "agreeing": 0, "identical": 0}
    widest = 0.0
    for t in _spread_out(case.num_queries, _CHECKED_QUERIES):
        rows = slice(t, t + 1)
        seq_id, length = int(operands.seq_ids[t]), int(operands.valid_lens[t])
        agreement = compare(
            operands.query[rows],
            operands.weights[rows],
            operands.view,
            indices[rows],
            num_entries=length,
            seq_id=seq_id,
        )
        right = f"{agreement.agreeing} of {agreement.choices} choices agree with float64 up to ±{agreement.band:.2g}"
        assert agreement.complete, f"{case.name}, query {t} of sequence {seq_id} with {length} entries: {right}"
        found = indices[t, : agreement.choices]
        assert bool((found[1:] > found[:-1]).all()), f"{case.name}, query {t}: the indices do not ascend"
        totals["queries"] += 1
        for name in ("choices", "agreeing", "identical"):
            totals[name] += getattr(agreement, name)
        widest = max(widest, agreement.band)
    return {**totals, "band": widest}


def check_peer(case: ScoringCase, name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise AssertionError unless a peer's choices int [T, k] are much the same as ours."""
    for t in _spread_out(case.num_queries, _CHECKED_QUERIES):
        found = ours[t][ours[t] >= 0]
        share = float(torch.isin(found, theirs[t].to(found.dtype)).float().mean()) if len(found) else 1.0
        assert share >= _PEER_OVERLAP, f"{case.name}, query {t}: {name} shares only {share:.0%} of the choices"


def check_gather(case: GatherCase, operands: GatherOperands, out: Tensor) -> None:
    """Raise AssertionError unless a few gathered rows are those of the reference, bit for bit."""
    columns = _spread_out(case.top_k, _CHECKED_ROWS)
    for t in _spread_out(case.tokens, _CHECKED_QUERIES):
        indices, seq_ids = operands.indices[t : t + 1, columns], operands.seq_ids[t : t + 1]
        want = reference.gather_kv(operands.view, indices, seq_ids=seq_ids)
        wrong = (out[t : t + 1, columns] != want).any(-1).sum()
        assert not bool(wrong), f"{case.name}, query {t}: {int(wrong)} of {len(columns)} rows differ from the reference"


def check_append(case: AppendCase, operands: AppendOperands) -> None:
    """Raise AssertionError unless a few written entries have the bytes that a CPU writes."""
    chosen = torch.tensor(_spread_out(case.count, _CHECKED_ENTRIES))
    view = operands.view
    data, scale = quantize(operands.entries.cpu()[chosen], view.schema.format)
    slots = operands.slots.cpu()[chosen].to(view.device)
    block, row = slots // view.schema.entries_per_block, slots % view.schema.entries_per_block
    for name, rows, want in (("data", view.data_rows, data), ("scale", view.scale_rows, scale)):
        got = rows[block, row].cpu()
        wrong = (got != want).any(-1).nonzero().flatten()
        assert not len(wrong), (
            f"{case.name}: {len(wrong)} of {len(chosen)} {name} rows differ from the CPU's, "
            f"the first is that of entry {int(chosen[wrong[0]])}"
        )


def _spread_out(count: int, wanted: int) -> list[int]:
    """Up to `wanted` numbers below `count`, the first and the last among them."""
    if count <= wanted:
        return list(range(count))
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})
