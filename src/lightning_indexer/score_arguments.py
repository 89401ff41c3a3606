"""Checks of what `score_topk`, `index_scores` and `select_candidates` have in common: queries, keys and rows."""

import torch
from torch import Tensor

from lightning_indexer.cache.view import IndexerView, check_view
from lightning_indexer.checks import check_range, check_tensor
from lightning_indexer.query import QuantizedQuery

MAX_HEADS = 128
BLOCK_ENTRIES = (8, 16)  # that a block of candidates may have: a page holds a whole number of either


def check_operands(
    op: str,
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
) -> tuple[int, int]:
    """Check everything that shapes and dtypes tell. Returns T and H."""
    check_view(op, view, IndexerView)
    device = view.device
    check_tensor(op, "weights", weights, dtype=torch.float32, shape=("T", "H"), device=device)
    num_tokens, num_heads = weights.shape
    check_heads(op, "weights", num_heads)
    q_shape = (num_tokens, num_heads, view.schema.dim)
    if isinstance(q, QuantizedQuery):
        if q.shape != q_shape or q.device != device:
            raise ValueError(
                f"{op}: q must be a QuantizedQuery of shape {list(q_shape)} on {device}, "
                f"got {list(q.shape)} on {q.device}"
            )
    else:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        check_tensor(op, "q", q, dtype=dtypes, shape=q_shape, device=device)
    check_tensor(op, "valid_lens", valid_lens, dtype=torch.int32, shape=(num_tokens,), device=device)
    if seq_ids is not None:
        check_tensor(op, "seq_ids", seq_ids, dtype=(torch.int32, torch.int64), shape=(num_tokens,), device=device)
    elif num_tokens > view.num_seqs:
        raise ValueError(
            f"{op}: without seq_ids query t uses row t of block_table, which has {view.num_seqs} rows "
            f"for {num_tokens} queries (pass seq_ids)"
        )
    return num_tokens, num_heads


def wants_checks(validate: bool | None, view: IndexerView) -> bool:
    """Whether to look at what the tensors hold, which on a GPU waits for the device."""
    return validate if validate is not None else view.storage.is_cpu


def check_rows(op: str, view: IndexerView, valid_lens: Tensor, seq_ids: Tensor | None) -> None:
    if seq_ids is None:
        seq_ids = _own_rows(valid_lens)
    if len(seq_ids):
        check_range(op, "seq_ids", seq_ids, 0, view.num_seqs - 1)
    check_range(op, "valid_lens", valid_lens, 0, view.max_entries)
    view.check_blocks(op, seq_ids, valid_lens)


def clamp_rows(view: IndexerView, valid_lens: Tensor, seq_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lengths and sequences within the view, seq_ids with its default filled in. (The kernels do this themselves.)"""
    if seq_ids is None:
        seq_ids = _own_rows(valid_lens)
    return valid_lens.clamp(0, view.max_entries), seq_ids.clamp(0, max(view.num_seqs - 1, 0))


def _own_rows(valid_lens: Tensor) -> Tensor:
    """Query t uses row t of the block table."""
    return torch.arange(len(valid_lens), dtype=torch.int32, device=valid_lens.device)


def check_heads(op: str, name: str, num_heads: int) -> None:
    if num_heads % 8 or not 8 <= num_heads <= MAX_HEADS:
        raise ValueError(f"{op}: {name} must have a multiple of 8 heads up to {MAX_HEADS}, got {num_heads}")
