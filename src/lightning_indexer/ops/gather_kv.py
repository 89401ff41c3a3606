"""Read the selected KV entries into dense rows for attention."""

import functools
from types import ModuleType

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cache.view import KVView, check_view
from lightning_indexer.checks import check_range, check_tensor, choose_impl
from lightning_indexer.formats import dequantize
from lightning_indexer.tracing import is_traced, view_parts

_INT_DTYPES = (torch.int32, torch.int64)


def gather_kv(
    view: KVView,
    indices: Tensor,
    *,
    seq_ids: Tensor | None = None,
    out: Tensor | None = None,
    validate: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """Dequantise entries `indices` of each query's sequence: what `score_topk` chose, ready for `sparse_attention`.

    Exact: E4M3 times a power of two fits bf16, and the RoPE half is copied.

    Args:
        view: the paged KV entries.
        indices: int32 or int64 [T, k], entry indices within the sequence; negative gives a row of zeros.
        seq_ids: int32 or int64 [T], each query's row of `view.block_table`; None means query t uses row t.
        out: [T, k, D], written in place; a new tensor by default.
        validate: raise ValueError for an index, seq_id or block id out of range before anything is written. Default: on
            a CPU yes; elsewhere no, because it would wait for the device, and they are clamped.
        impl: "auto", "cpu", "cuda" (one kernel; rows of `out` at multiples of 16 bytes) or "reference".
    Returns:
        [T, k, D] bf16 (fp32 where the cache is "fp32"); D is 512 in the model.
    """
    if not is_traced():
        return eager_gather_kv(view, indices, seq_ids, out, validate, impl)
    parts = view_parts("gather_kv", view, KVView)
    if out is None:
        out = torch.empty(*indices.shape, view.schema.dim, dtype=_out_dtype(view), device=view.device)
    torch.ops.lightning_indexer.gather_kv(*parts, indices, seq_ids, out, validate, impl)
    return out


def eager_gather_kv(
    view: KVView, indices: Tensor, seq_ids: Tensor | None, out: Tensor | None, validate: bool | None, impl: str
) -> Tensor:
    """`gather_kv`, unseen by torch's dispatcher."""
    op = "gather_kv"
    check_view(op, view, KVView)
    device = view.device
    impl = choose_impl(op, impl, device, has_cuda=True)
    check_tensor(op, "indices", indices, dtype=_INT_DTYPES, shape=("T", "k"), device=device)
    num_tokens, top_k = indices.shape
    if seq_ids is not None:
        check_tensor(op, "seq_ids", seq_ids, dtype=_INT_DTYPES, shape=(num_tokens,), device=device)
    elif num_tokens > view.num_seqs:
        raise ValueError(
            f"{op}: without seq_ids query t uses row t of block_table, which has {view.num_seqs} rows "
            f"for {num_tokens} queries (pass seq_ids)"
        )
    shape, dtype = (num_tokens, top_k, view.schema.dim), _out_dtype(view)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    check_tensor(op, "out", out, dtype=dtype, shape=shape, device=device)
    if validate if validate is not None else view.storage.is_cpu:
        _check_values(op, view, _seq_ids(seq_ids, indices), indices)
    if impl == "cuda":
        _cuda().gather_kv(view, seq_ids, indices, out)
    else:
        _gather_in_torch(view, _seq_ids(seq_ids, indices), indices, out, impl)
    return out


def _out_dtype(view: KVView) -> torch.dtype:
    return torch.float32 if view.schema.format == "fp32" else torch.bfloat16


def _seq_ids(seq_ids: Tensor | None, indices: Tensor) -> Tensor:
    """With the default filled in: query t uses row t. (The kernel does this itself.)"""
    return torch.arange(len(indices), device=indices.device) if seq_ids is None else seq_ids


@functools.cache
def _cuda() -> ModuleType:
    from lightning_indexer.cuda import gather

    return gather


@torch.no_grad()
def _gather_in_torch(view: KVView, seq_ids: Tensor, indices: Tensor, out: Tensor, impl: str) -> None:
    if view.max_entries == 0 or out.numel() == 0:
        out.zero_()
        return
    seq_ids, indices = seq_ids.clamp(0, view.num_seqs - 1), indices.clamp(max=view.max_entries - 1)
    if impl == "reference":
        out.copy_(reference.gather_kv(view, indices, seq_ids=seq_ids, dtype=out.dtype))
    else:
        _gather(view, view.slots(seq_ids, indices), out)


def _gather(view: KVView, slots: Tensor, out: Tensor) -> None:
    """Dequantise each entry once, however many queries chose it: neighbours choose much the same."""
    distinct, where = slots.unique(return_inverse=True)
    slot = distinct.clamp_min(0)
    block, row = slot // view.schema.entries_per_block, slot % view.schema.entries_per_block
    data, scale = view.data_rows[block, row], view.scale_rows[block, row]
    rows = dequantize(data, scale, view.schema.format, global_scale=view.global_scale).to(out.dtype)
    rows[distinct < 0] = 0.0
    out.copy_(rows[where])


def _check_values(op: str, view: KVView, seq_ids: Tensor, indices: Tensor) -> None:
    """Raise ValueError for a sequence, an index or a block id out of range."""
    check_range(op, "seq_ids", seq_ids, 0, view.num_seqs - 1)
    check_range(op, "indices", indices, torch.iinfo(torch.int32).min, view.max_entries - 1)
    if view.max_entries == 0:
        return
    block = indices.clamp_min(0).long() // view.schema.entries_per_block
    ids = view.block_table[seq_ids.long().unsqueeze(-1), block]
    check_range(op, "block_table", torch.where(indices < 0, 0, ids), 0, view.num_blocks - 1)
