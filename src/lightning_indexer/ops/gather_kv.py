"""Read the selected KV entries into dense rows for attention."""

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cache.view import KVView
from lightning_indexer.checks import check_range, check_tensor, choose_impl
from lightning_indexer.formats import dequantize


@torch.no_grad()
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
    op = "gather_kv"
    if not isinstance(view, KVView):
        raise TypeError(f"{op}: view must be a KVView, got {type(view).__name__}")
    impl = choose_impl(op, impl, view.device, has_cuda=True)
    int_dtypes = (torch.int32, torch.int64)
    check_tensor(op, "indices", indices, dtype=int_dtypes, shape=("T", "k"), device=view.device)
    num_tokens = len(indices)
    if seq_ids is None:
        if num_tokens > view.num_seqs:
            raise ValueError(
                f"{op}: without seq_ids query t uses row t of block_table, which has {view.num_seqs} rows "
                f"for {num_tokens} queries (pass seq_ids)"
            )
        seq_ids = torch.arange(num_tokens, device=view.device)
    check_tensor(op, "seq_ids", seq_ids, dtype=int_dtypes, shape=(num_tokens,), device=view.device)
    dtype = torch.float32 if view.schema.format == "fp32" else torch.bfloat16
    shape = (*indices.shape, view.schema.dim)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=view.device)
    check_tensor(op, "out", out, dtype=dtype, shape=shape, device=view.device)
    if validate if validate is not None else view.device.type == "cpu":
        check_range(op, "seq_ids", seq_ids, 0, view.num_seqs - 1)
        check_range(op, "indices", indices, torch.iinfo(torch.int32).min, view.max_entries - 1)
        if view.max_entries:
            _check_block_ids(op, view, seq_ids, indices)
    if impl == "cuda":
        from lightning_indexer.cuda.gather import gather_kv as cuda_gather_kv

        cuda_gather_kv(view, seq_ids, indices, out)
        return out
    if view.max_entries == 0 or out.numel() == 0:
        return out.zero_()
    seq_ids, indices = seq_ids.clamp(0, view.num_seqs - 1), indices.clamp(max=view.max_entries - 1)
    if impl == "reference":
        out.copy_(reference.gather_kv(view, indices, seq_ids=seq_ids, dtype=dtype))
    else:
        _gather(view, view.slots(seq_ids, indices), out)
    return out


def _gather(view: KVView, slots: Tensor, out: Tensor) -> None:
    """Dequantise each entry once, however many queries chose it: neighbours choose much the same."""
    distinct, where = slots.unique(return_inverse=True)
    slot = distinct.clamp_min(0)
    block, row = slot // view.schema.entries_per_block, slot % view.schema.entries_per_block
    data, scale = view.data_rows[block, row], view.scale_rows[block, row]
    rows = dequantize(data, scale, view.schema.format, global_scale=view.global_scale).to(out.dtype)
    rows[distinct < 0] = 0.0
    out.copy_(rows[where])


def _check_block_ids(op: str, view: KVView, seq_ids: Tensor, indices: Tensor) -> None:
    block = indices.clamp_min(0).long() // view.schema.entries_per_block
    ids = view.block_table[seq_ids.long().unsqueeze(-1), block]
    check_range(op, "block_table", torch.where(indices < 0, 0, ids), 0, view.num_blocks - 1)
