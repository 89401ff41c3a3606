"""Streaming scores and running top-k.

Keys are dequantised a tile at a time and scored against one query per matrix product. Every product has the same
shape whatever the batch, the lengths and the split, so a score's bits depend on its query and its entry alone; rows of
the last tile past the end hold leftovers and are masked. After each chunk of tiles the chunk's candidate keys are
merged with the best so far, so nothing held grows with the context.

Measured choices (2 cores, AVX-512, H=64, D=128): one query per product reaches 0.9 of the fp32 rate of eight, and needs
no padding in decode; tiles of 2,048 keep products, ReLU and head sum inside L2.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer.cache.view import IndexerView
from lightning_indexer.cpu.operands import Operand, fold_weights, key_operand, query_operand
from lightning_indexer.precision import full_float32
from lightning_indexer.query import QuantizedQuery
from lightning_indexer.selection import EMPTY, fill_keys, key_indices, key_scores, order_by_index

ENTRIES_PER_TILE = 2048
ENTRIES_PER_CHUNK = 4 * ENTRIES_PER_TILE
QUERIES_PER_PASS = 64


@dataclass(frozen=True)
class QueryPass:
    """Up to QUERIES_PER_PASS consecutive rows of one sequence, which share each pass over its keys."""

    rows: slice
    seq_id: int
    lens: list[int]
    query: Operand  # [Q, H, D]
    weights: Tensor  # fp32 [Q, H]
    factor: Tensor | None  # fp64 [Q], multiplies the finished scores

    @property
    def max_len(self) -> int:
        return max(self.lens)


@dataclass(frozen=True)
class Scratch:
    """The working memory of a call; its size depends on heads, head dim and k alone."""

    keys: Tensor  # fp32 [tile, D]
    integers: Tensor  # int8 [tile, D]
    dots: Tensor  # fp32 [tile, H]
    integer_dots: Tensor  # int32 [tile, H]
    scores: Tensor  # fp32 [Q, chunk]
    wide_scores: Tensor  # fp64 [Q, tile]
    ranks: Tensor  # int32 [Q, chunk]
    candidates: Tensor  # int64 [Q, k + chunk]

    @staticmethod
    def layout(num_heads: int, head_dim: int, top_k: int) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        tile, chunk, rows = ENTRIES_PER_TILE, ENTRIES_PER_CHUNK, QUERIES_PER_PASS
        return {
            "keys": (torch.float32, (tile, head_dim)),
            "integers": (torch.int8, (tile, head_dim)),
            "dots": (torch.float32, (tile, num_heads)),
            "integer_dots": (torch.int32, (tile, num_heads)),
            "scores": (torch.float32, (rows, chunk)),
            "wide_scores": (torch.float64, (rows, tile)),
            "ranks": (torch.int32, (rows, chunk)),
            "candidates": (torch.int64, (rows, top_k + chunk)),
        }

    @classmethod
    def nbytes(cls, num_heads: int, head_dim: int, top_k: int) -> int:
        return sum(dtype.itemsize * a * b for dtype, (a, b) in cls.layout(num_heads, head_dim, top_k).values())

    @classmethod
    def carve(cls, workspace: Tensor, num_heads: int, head_dim: int, top_k: int) -> "Scratch":
        """Cut the buffers out of a uint8 workspace of at least `nbytes` bytes."""
        buffers, offset = {}, 0
        for name, (dtype, shape) in cls.layout(num_heads, head_dim, top_k).items():
            size = dtype.itemsize * shape[0] * shape[1]
            buffers[name] = workspace[offset : offset + size].view(dtype).view(shape)
            offset += size
        return cls(**buffers)


@torch.no_grad()
@full_float32()
def index_scores(
    q: Tensor | QuantizedQuery, weights: Tensor, view: IndexerView, valid_lens: Tensor, seq_ids: Tensor, out: Tensor
) -> None:
    """Fill `out` [T, max_len] with dense scores, -inf beyond each row's length."""
    out.fill_(-torch.inf)
    num_heads = weights.shape[1]
    layout_bytes = Scratch.nbytes(num_heads, view.schema.dim, 0)
    scratch = Scratch.carve(torch.empty(layout_bytes, dtype=torch.uint8, device="cpu"), num_heads, view.schema.dim, 0)
    for group in query_passes(q, weights, valid_lens, seq_ids):
        for start in range(0, group.max_len, ENTRIES_PER_CHUNK):
            scores = score_chunk(group, view, start, scratch)
            for row, length in enumerate(group.lens):
                end = min(length - start, scores.shape[1])
                if end > 0:
                    out[group.rows.start + row, start : start + end] = scores[row, :end]


@torch.no_grad()
@full_float32()
def score_topk(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor,
    *,
    by_score: bool,
    as_slots: bool,
    out: Tensor,
    scores_out: Tensor | None,
    workspace: Tensor,
    candidates: Tensor | None,
    candidate_entries: int,
) -> None:
    """Fill `out` [T, k] (and `scores_out`) with the best entries of each row.

    Args:
        candidates: int32 [T, NB] blocks of `candidate_entries` entries that each row chooses from, None: from all.
    """
    top_k = out.shape[1]
    scratch = Scratch.carve(workspace, weights.shape[1], view.schema.dim, top_k)
    for group in query_passes(q, weights, valid_lens, seq_ids):
        lists = None if candidates is None else candidates[group.rows]
        best = best_keys(group, view, top_k, scratch, lists, candidate_entries)
        best = best.sort(dim=1, descending=True).values if by_score else order_by_index(best)
        indices = key_indices(best)
        out[group.rows] = view.slots(seq_ids[group.rows], indices) if as_slots else indices
        if scores_out is not None:
            scores_out[group.rows] = key_scores(best)


def best_keys(
    group: QueryPass, view: IndexerView, top_k: int, scratch: Scratch, lists: Tensor | None, block_entries: int
) -> Tensor:
    """int64 [Q, k] candidate keys of the best entries, in no order, EMPTY where there are fewer.

    lists: int32 [Q, NB] blocks of entries to choose from, None for all.
    """
    candidates = scratch.candidates[: len(group.lens)]
    candidates[:, :top_k] = EMPTY
    lens = torch.tensor(group.lens, device="cpu").unsqueeze(1)
    for start in range(0, group.max_len, ENTRIES_PER_CHUNK):
        scores = score_chunk(group, view, start, scratch)
        stop = start + scores.shape[1]
        indices = torch.arange(start, stop, device="cpu")
        fresh = candidates[:, top_k : top_k + stop - start]
        fill_keys(scores.view(torch.int32), indices, scratch.ranks[: len(group.lens), : stop - start], fresh)
        if min(group.lens) < stop:
            fresh.masked_fill_(indices >= lens, EMPTY)
        if lists is not None:
            fresh.masked_fill_(~_is_listed(lists, start, stop, block_entries), EMPTY)
        candidates[:, :top_k] = candidates[:, : top_k + stop - start].topk(top_k, dim=1, sorted=False).values
    return candidates[:, :top_k]


def _is_listed(lists: Tensor, start: int, stop: int, block_entries: int) -> Tensor:
    """bool [Q, stop - start]: whether entries lie in blocks of their row's list; `start` is a block's first."""
    count = -(-(stop - start) // block_entries)
    places = lists.long() - start // block_entries
    places.masked_fill_((places < 0) | (places >= count), count)
    listed = torch.zeros(len(lists), count + 1, dtype=torch.bool, device="cpu").scatter_(1, places, True)
    return listed[:, :count].repeat_interleave(block_entries, dim=1)[:, : stop - start]


def score_chunk(group: QueryPass, view: IndexerView, start: int, scratch: Scratch) -> Tensor:
    """fp32 [Q, n] scores of the chunk of entries at `start`; cells past a row's own length are leftovers."""
    stop = min(start + ENTRIES_PER_CHUNK, group.max_len)
    for first in range(start, stop, ENTRIES_PER_TILE):
        last = min(first + ENTRIES_PER_TILE, stop)
        keys = key_operand(view, group.seq_id, first, last)
        scores = scratch.scores[: len(group.lens), first - start : first - start + ENTRIES_PER_TILE]
        _score_tile(group, keys, first, scores, scratch)
        _apply_scales(scores[:, : last - first], group.factor, keys.scale, scratch)
    return scratch.scores[: len(group.lens), : stop - start].add_(0.0)  # -0 + 0 is +0


def query_passes(
    q: Tensor | QuantizedQuery, weights: Tensor, valid_lens: Tensor, seq_ids: Tensor
) -> Iterator[QueryPass]:
    """Split the rows into passes: consecutive rows of the same sequence."""
    seqs, lens = seq_ids.tolist(), valid_lens.tolist()
    start = 0
    while start < len(seqs):
        stop = start + 1
        while stop < min(len(seqs), start + QUERIES_PER_PASS) and seqs[stop] == seqs[start]:
            stop += 1
        rows = slice(start, stop)
        query = query_operand(q[rows])
        folded, factor = fold_weights(weights[rows], query.scale)
        yield QueryPass(rows, seqs[start], lens[start:stop], query, folded, factor)
        start = stop


def _score_tile(group: QueryPass, keys: Operand, first: int, scores: Tensor, scratch: Scratch) -> None:
    """Unscaled scores of one tile into `scores` [Q, tile]; rows that end before the tile are left alone."""
    num_keys = len(keys.mantissa)
    query = group.query
    exact = query.integers is not None and keys.integers is not None
    if exact:
        assert keys.integers is not None, "exact means both operands are integers"
        scratch.integers[:num_keys] = keys.integers
    else:
        scratch.keys[:num_keys] = keys.mantissa
    for row, length in enumerate(group.lens):
        if length <= first:
            continue
        if exact:
            assert query.integers is not None, "exact means both operands are integers"
            torch._int_mm(scratch.integers, query.integers[row].t(), out=scratch.integer_dots)
            scratch.dots.copy_(scratch.integer_dots)
        else:
            torch.mm(scratch.keys, query.mantissa[row].t(), out=scratch.dots)
        scratch.dots.relu_()
        torch.mm(scratch.dots, group.weights[row].unsqueeze(1), out=scores[row].unsqueeze(1))


def _apply_scales(scores: Tensor, query_factor: Tensor | None, key_scale: Tensor | None, scratch: Scratch) -> None:
    """Multiply scores [Q, n] by both scales at once: in fp64, since either alone may leave fp32's range."""
    if query_factor is None and key_scale is None:
        return
    wide = scratch.wide_scores[: scores.shape[0], : scores.shape[1]].copy_(scores)
    if query_factor is not None:
        wide.mul_(query_factor.unsqueeze(1))
    if key_scale is not None:
        wide.mul_(key_scale)
    scores.copy_(wide)
