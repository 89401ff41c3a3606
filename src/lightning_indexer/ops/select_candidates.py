"""Choose the blocks of entries that later layers select from: the first level of DeepSeek-V4.1's two."""

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.checks import check_choice, check_tensor, choose_impl
from lightning_indexer.precision import full_float32
from lightning_indexer.query import QuantizedQuery
from lightning_indexer.score_arguments import BLOCK_ENTRIES, check_operands, check_rows, clamp_rows, wants_checks
from lightning_indexer.selection import EMPTY, block_keys, key_indices, order_by_index
from lightning_indexer.tracing import is_traced, query_parts, view_parts

_DENSE_BYTES = 64 * 2**20  # of scores and blocks at a time on a GPU, but at least one query's


def select_candidates(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    *,
    valid_lens: Tensor,
    seq_ids: Tensor | None = None,
    num_blocks: int = 2048,
    block_entries: int = 8,
    out: Tensor | None = None,
    validate: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """For each query the blocks of entries with the largest scores: `candidates` for `score_topk`.

        score[t, s] = sum_h weights[t, h] * max(0, <q[t, h], k[s]>)
        block b of query t: the largest of score[t, b * block_entries : (b + 1) * block_entries], up to valid_lens[t]

    The block that holds the newest visible entry is always chosen, a block whose scores are all -inf never (but as the
    newest); NaN counts as -inf. Ties go to the smaller id, which the model leaves open. Scores are those of
    `index_scores`, bit for bit, so the choice is the same on every run. DeepSeek-V4.1 chooses in its candidate source
    layer, with that layer's queries; its later index layers call `score_topk(..., candidates=...)` with their own.

    Args:
        q, weights, view, valid_lens, seq_ids: as for `score_topk`.
        num_blocks: at least 1; may exceed the number of blocks, and then all are chosen.
        block_entries: 8 or 16.
        out: int32 [T, num_blocks], written in place; a new tensor by default.
        validate: as for `score_topk`.
        impl: "auto", "cpu" (streams, multithreaded), "cuda" (not fused: dense scores of some queries at a time, as wide
            as the block table, in 64 MiB or one query's row, and torch operators on them that may hold as much again;
            nothing is read back) or "reference" (plain torch, materialises [T, longest]).
    Returns:
        int32 [T, num_blocks] block ids, ascending, -1 where there are fewer.
    """
    check_choice("select_candidates", "block_entries", block_entries, BLOCK_ENTRIES)
    if not isinstance(num_blocks, int) or isinstance(num_blocks, bool) or num_blocks < 1:
        raise ValueError(f"select_candidates: num_blocks must be an int of at least 1, got {num_blocks!r}")
    check_tensor("select_candidates", "weights", weights, dtype=torch.float32, shape=("T", "H"))
    shape = (weights.shape[0], num_blocks)
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=weights.device)
    check_tensor("select_candidates", "out", out, dtype=torch.int32, shape=shape, device=weights.device)
    if is_traced():
        parts = (*query_parts(q), weights, *view_parts("select_candidates", view, IndexerView))
        torch.ops.lightning_indexer.select_candidates(*parts, valid_lens, seq_ids, out, block_entries, validate, impl)
    else:
        eager_select_candidates(q, weights, view, valid_lens, seq_ids, out, block_entries, validate, impl)
    return out


@torch.no_grad()
def eager_select_candidates(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    out: Tensor,
    block_entries: int,
    validate: bool | None,
    impl: str,
) -> None:
    """`select_candidates` into given memory, unseen by torch's dispatcher."""
    op = "select_candidates"
    num_tokens, _ = check_operands(op, q, weights, view, valid_lens, seq_ids)
    impl = choose_impl(op, impl, view.device, has_cuda=True)
    check_choice(op, "block_entries", block_entries, BLOCK_ENTRIES)
    check_tensor(op, "out", out, dtype=torch.int32, shape=(num_tokens, "num_blocks"), device=view.device)
    if wants_checks(validate, view):
        check_rows(op, view, valid_lens, seq_ids)
    valid_lens, seq_ids = clamp_rows(view, valid_lens, seq_ids)
    if impl == "reference":
        _reference(q, weights, view, valid_lens, seq_ids, block_entries, out)
    elif impl == "cpu":
        from lightning_indexer.cpu.select_candidates import select_candidates as streaming

        streaming(q, weights, view, valid_lens, seq_ids, block_entries=block_entries, out=out)
    else:
        _from_dense(q, weights, view, valid_lens, seq_ids, block_entries, out)


@full_float32()
def _reference(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor,
    block_entries: int,
    out: Tensor,
) -> None:
    longest = int(valid_lens.max()) if len(valid_lens) else 0
    dense = reference.index_scores(q, weights, view, valid_lens=valid_lens, seq_ids=seq_ids, max_len=longest)
    for t, length in enumerate(valid_lens.tolist()):
        out[t] = reference.select_blocks(dense[t], length, out.shape[1], block_entries)


def _from_dense(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor,
    block_entries: int,
    out: Tensor,
) -> None:
    """Some queries at a time: dense scores by the kernel, then their blocks."""
    from lightning_indexer.cuda.score_topk import index_scores

    (num_tokens, num_blocks), width = out.shape, view.max_entries
    if width == 0 or num_tokens == 0:
        out.fill_(-1)
        return
    each = min(max(_DENSE_BYTES // (4 * width + 8 * num_blocks), 1), num_tokens)
    dense = torch.empty(each, width, dtype=torch.float32, device=view.device)
    none = torch.full((each, num_blocks), EMPTY, dtype=torch.int64, device=view.device)
    for start in range(0, num_tokens, each):
        rows = slice(start, min(start + each, num_tokens))
        scores, lens = dense[: rows.stop - start], valid_lens[rows]
        index_scores(q[rows], weights[rows], view, lens, seq_ids[rows], scores)
        keys = block_keys(scores, lens.unsqueeze(1), 0, block_entries)
        keys = torch.cat([none[: len(keys)], keys], 1).topk(num_blocks, dim=1, sorted=False).values
        out[rows] = key_indices(order_by_index(keys))
