"""Blocks of entries by their best scores, streaming: scores of a chunk at a time, as `cpu/score_topk.py` makes them."""

import torch
from torch import Tensor

from lightning_indexer.cache.view import IndexerView
from lightning_indexer.cpu.score_topk import ENTRIES_PER_CHUNK, QueryPass, Scratch, query_passes, score_chunk
from lightning_indexer.precision import full_float32
from lightning_indexer.query import QuantizedQuery
from lightning_indexer.selection import EMPTY, block_keys, key_indices, order_by_index


@torch.no_grad()
@full_float32()
def select_candidates(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor,
    *,
    block_entries: int,
    out: Tensor,
) -> None:
    """Fill `out` [T, NB] with the ids of the best blocks of each row."""
    sizes = (weights.shape[1], view.schema.dim, 0)
    scratch = Scratch.carve(torch.empty(Scratch.nbytes(*sizes), dtype=torch.uint8, device="cpu"), *sizes)
    for group in query_passes(q, weights, valid_lens, seq_ids):
        best = _best_blocks(group, view, out.shape[1], block_entries, scratch)
        out[group.rows] = key_indices(order_by_index(best))


def _best_blocks(group: QueryPass, view: IndexerView, num_blocks: int, block_entries: int, scratch: Scratch) -> Tensor:
    """int64 [Q, NB] keys of the best blocks, in no order, EMPTY where there are fewer."""
    rows = len(group.lens)
    lens = torch.tensor(group.lens, device="cpu").unsqueeze(1)
    best = torch.full((rows, num_blocks), EMPTY, dtype=torch.int64, device="cpu")
    for start in range(0, group.max_len, ENTRIES_PER_CHUNK):
        width = score_chunk(group, view, start, scratch).shape[1]
        whole = -(-width // block_entries) * block_entries  # what lies behind the last entry is ignored
        fresh = block_keys(scratch.scores[:rows, :whole], lens, start, block_entries)
        best = torch.cat([best, fresh], 1).topk(num_blocks, dim=1, sorted=False).values
    return best
