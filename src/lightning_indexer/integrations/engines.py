"""The top k of paged keys from the tensors that vLLM, SGLang and DeepGEMM hold, as FlashMLA wants it.

Both functions take the arguments of DeepGEMM's `fp8_fp4_paged_mqa_logits`, without its schedule. The tensors are read
where they lie: none is converted or copied, nothing waits for the device, and a call can be captured in a CUDA graph.
docs/engines.md goes through the engines one by one.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.checks import check_choice, check_range, check_tensor
from lightning_indexer.ops.score_topk import index_scores, score_topk
from lightning_indexer.query import QuantizedQuery

EngineQuery = Tensor | tuple[Tensor, Tensor | None]
_layout = functools.lru_cache(CacheSchema)  # an engine has a few layouts and calls often


def paged_mqa_topk(
    q: EngineQuery,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    top_k: int,
    *,
    output: str = "slot",
    order: str = "index",
    seq_ids: Tensor | None = None,
    out: Tensor | None = None,
    lengths_out: Tensor | None = None,
    workspace: Tensor | None = None,
    validate: bool | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Score the paged keys of each request and keep the `top_k` best for each query token, as `score_topk` does.

    Args:
        q: FP8 queries, float8_e4m3fn [B, next_n, H, D] or a tuple of that and None, their scale folded into `weights`;
            or FP4 queries, a tuple of int8 or uint8 codes [B, next_n, H, D/2] and int32 scales [B, next_n, H], four
            UE8M0 bytes in each. H is a multiple of 8 up to 128; D is 64 or 128. Contiguous, as are `weights`,
            `context_lens` and `seq_ids`.
        kv_cache: uint8 [num_blocks, block_size, 1, record], record D/2 + 4 bytes (MXFP4) or D + 4 (FP8); queries may
            be of the other kind. All data rows of a page come first, then all scale rows. `stride(0)` is a multiple
            of 16, at least a page's bytes: pages may be padded, or a slice of a slab that other layers share.
        weights: fp32 [B * next_n, H], scale factors folded in.
        context_lens: int32 [B, next_n], how many entries each query token sees, in compressed units: of the token at
            position p, (p + 1) // compress_ratio. 0 is allowed, and lengths of a request may come in any order.
        block_table: int32 [B, max_blocks]. Entries past the blocks that a length needs are never read.
        top_k: 1 .. 4096; may exceed the length.
        output: "slot" (block * block_size + row of `kv_cache`) or "entry" (index within the request).
        order: "index" (ascending entry) or "score" (descending, ties by entry).
        seq_ids: int32 or int64 [B * next_n], each query's row of `block_table`, which may then have any number of rows.
            Default: b for the queries of request b, for which next_n > 1 makes a tensor: give it to allocate nothing.
        out: int32 [B, next_n, top_k], any tensor that views as [B * next_n, top_k]; lengths_out: int32 [B, next_n];
            workspace: as for `score_topk`. Each is written in place; new tensors by default.
        validate, impl: as for `score_topk`.
    Returns:
        indices: int32 [B, next_n, top_k], -1 behind the last of each row: `indices` or `extra_indices_in_kvcache` of
            FlashMLA's decode.
        lengths: int32 [B, next_n], min(context_lens, top_k), how many indices a row has. FlashMLA's `topk_length` is
            [B], one for all tokens of a request: give it `lengths.amax(1)`, the -1 behind shorter rows do the rest.
    Raises:
        TypeError, ValueError: naming the argument, before anything is written.
    """
    op = "paged_mqa_topk"
    call = _read(op, q, kv_cache, weights, context_lens, block_table, seq_ids)
    batch, next_n = context_lens.shape
    flat_out = None if out is None else _flat_out(op, out, (batch, next_n, top_k), kv_cache.device)
    if lengths_out is not None:
        check_tensor(op, "lengths_out", lengths_out, dtype=torch.int32, shape=(batch, next_n), device=kv_cache.device)
    if _wants_checks(validate, kv_cache):
        call.check(op, context_lens, call.view.max_entries)
    indices = score_topk(
        call.q,
        weights,
        call.view,
        top_k=top_k,
        valid_lens=call.valid_lens,
        seq_ids=call.seq_ids,
        order=order,
        output=output,
        out=flat_out,
        workspace=workspace,
        validate=False,  # done above, in the caller's words
        impl=impl,
    )
    lengths = torch.clamp(context_lens, 0, min(top_k, call.view.max_entries), out=lengths_out)
    return indices.view(batch, next_n, top_k) if out is None else out, lengths


def paged_mqa_logits(
    q: EngineQuery,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_context_len: int,
    *,
    seq_ids: Tensor | None = None,
    out: Tensor | None = None,
    validate: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """Dense scores in the shape of DeepGEMM's logits, to compare with: exactly the numbers that `paged_mqa_topk` ranks.

    Args:
        q, kv_cache, weights, context_lens, block_table, seq_ids: as for `paged_mqa_topk`.
        max_context_len: columns, at least the largest length.
        out: fp32 [B * next_n, max_context_len], written in place; a new tensor by default.
        validate, impl: as for `index_scores`.
    Returns:
        fp32 [B * next_n, max_context_len], row b * next_n + j, -inf from each row's length on (DeepGEMM leaves those
        cells as they were).
    """
    op = "paged_mqa_logits"
    call = _read(op, q, kv_cache, weights, context_lens, block_table, seq_ids)
    if not isinstance(max_context_len, int) or max_context_len < 0:
        raise ValueError(f"{op}: max_context_len must be an int of at least 0, got {max_context_len!r}")
    shape = (len(weights), max_context_len)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=kv_cache.device)
    check_tensor(op, "out", out, dtype=torch.float32, shape=shape, device=kv_cache.device)
    if _wants_checks(validate, kv_cache):
        call.check(op, context_lens, min(call.view.max_entries, max_context_len))
    return index_scores(
        call.q,
        weights,
        call.view,
        valid_lens=call.valid_lens,
        seq_ids=call.seq_ids,
        out=out,
        validate=False,  # done above, in the caller's words
        impl=impl,
    )


def view_pages(kv_cache: Tensor, block_table: Tensor, *, head_dim: int = 128) -> IndexerView:
    """An engine's pages as the view that the library's own ops take: `score_topk`, `append_entries`, and so on.

    Args:
        kv_cache, block_table: as for `paged_mqa_topk`; nothing is copied.
        head_dim: values per entry, 64 or 128. It tells 68 bytes of MXFP4 (128 values) from 68 bytes of FP8 (64).
    """
    return _view("view_pages", kv_cache, block_table, head_dim)


@dataclass(frozen=True)
class _Call:
    """The tensors of an engine as the ops take them, T = B * next_n rows over the same memory."""

    q: QuantizedQuery
    view: IndexerView
    valid_lens: Tensor  # int32 [T]
    seq_ids: Tensor | None  # [T]; None: row t is of request t

    def check(self, op: str, context_lens: Tensor, longest: int) -> None:
        """Raise ValueError unless lengths, sequences and block ids lie within the pages. Reads them: waits on a GPU."""
        seq_ids = self.seq_ids
        if seq_ids is None:
            seq_ids = torch.arange(len(self.valid_lens), device=self.valid_lens.device)
        check_range(op, "context_lens", context_lens, 0, longest)
        check_range(op, "seq_ids", seq_ids, 0, self.view.num_seqs - 1)
        self.view.check_blocks(op, seq_ids, self.valid_lens)


def _read(
    op: str,
    q: EngineQuery,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    seq_ids: Tensor | None,
) -> _Call:
    """Check everything that shapes, dtypes and strides tell, under the names that the caller knows."""
    codes, scale = _query_parts(op, q)
    batch, next_n, num_heads, width = codes.shape
    device = codes.device
    view = _view(op, kv_cache, block_table, width if scale is None else 2 * width, device)
    check_tensor(op, "weights", weights, dtype=torch.float32, shape=(batch * next_n, num_heads), device=device)
    _check_context_lens(op, context_lens, (batch, next_n), device)
    if seq_ids is not None:
        check_tensor(op, "seq_ids", seq_ids, dtype=(torch.int32, torch.int64), shape=(batch * next_n,), device=device)
    elif view.num_seqs != batch:
        raise ValueError(
            f"{op}: block_table must have a row for each of the {batch} requests of q, got {view.num_seqs} rows "
            f"(pass seq_ids to say which row each query uses)"
        )
    elif next_n > 1:
        seq_ids = torch.arange(batch * next_n, dtype=torch.int32, device=device).floor_divide_(next_n)
    for name, tensor in (("weights", weights), ("context_lens", context_lens), ("seq_ids", seq_ids)):
        if tensor is not None:
            _check_contiguous(op, name, tensor)
    query = QuantizedQuery(
        "fp8" if scale is None else "mxfp4", codes.flatten(0, 1), None if scale is None else scale.flatten(0, 1)
    )
    return _Call(query, view, context_lens.flatten(), seq_ids)


def _query_parts(op: str, q: EngineQuery) -> tuple[Tensor, Tensor | None]:
    """FP8 queries and None, or FP4 codes and their scales."""
    is_pair = isinstance(q, tuple) and len(q) == 2
    codes, scale = q if is_pair else (q, None)
    if not isinstance(codes, Tensor) or scale is None and codes.dtype != torch.float8_e4m3fn:
        came = str(codes.dtype).removeprefix("torch.") if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(
            f"{op}: q must be float8_e4m3fn [B, next_n, H, D], or a tuple of int8 [B, next_n, H, D/2] and int32 "
            f"[B, next_n, H], got {came}{' alone' if isinstance(codes, Tensor) else ''}"
        )
    if scale is None:
        check_tensor(op, "q", codes, dtype=torch.float8_e4m3fn, shape=("B", "next_n", "H", "D"))
        _check_contiguous(op, "q", codes)
        return codes, None
    check_tensor(op, "q[0]", codes, dtype=(torch.int8, torch.uint8), shape=("B", "next_n", "H", "D/2"))
    check_tensor(op, "q[1]", scale, dtype=(torch.int32,) * 2, shape=codes.shape[:3], device=codes.device)
    _check_contiguous(op, "q[0]", codes)
    _check_contiguous(op, "q[1]", scale)
    return codes, scale


def _view(
    op: str, kv_cache: Tensor, block_table: Tensor, head_dim: int, device: torch.device | None = None
) -> IndexerView:
    check_choice(op, "the head dim D", head_dim, (64, 128))
    schema = _schema(op, kv_cache, head_dim)
    if device is not None and kv_cache.device != device:
        raise ValueError(f"{op}: kv_cache must be on {device}, as q is, got {kv_cache.device}")
    device = kv_cache.device
    check_tensor(op, "block_table", block_table, dtype=torch.int32, shape=("B", "max_blocks"), device=device)
    return IndexerView(kv_cache, schema, block_table)


def _schema(op: str, kv_cache: Tensor, head_dim: int) -> CacheSchema:
    """The layout of `kv_cache`, after checking that it is one."""
    records = {_layout(name, head_dim=head_dim).bytes_per_entry: name for name in ("mxfp4", "fp8")}
    if isinstance(kv_cache, Tensor) and kv_cache.ndim in (2, 3):
        remedy = "unsqueeze(2)" if kv_cache.ndim == 3 else "unflatten(1, (block_size, 1, record))"
        raise ValueError(
            f"{op}: kv_cache must have shape [num_blocks, block_size, 1, record], got {list(kv_cache.shape)} "
            f"(use kv_cache.{remedy})"
        )
    shape = ("num_blocks", "block_size", 1, "record")
    check_tensor(op, "kv_cache", kv_cache, dtype=(torch.uint8,) * 2, shape=shape)
    num_blocks, block_size, _, record = kv_cache.shape
    if record not in records:
        wanted = " or ".join(f"{size} ({name})" for size, name in records.items())
        raise ValueError(f"{op}: kv_cache must have records of {wanted} bytes for D = {head_dim}, got {record}")
    strides = kv_cache.stride()
    if num_blocks and not kv_cache[0].is_contiguous():
        raise ValueError(f"{op}: kv_cache must have pages of contiguous bytes, got strides {strides}")
    try:
        return _layout(records[record], block_size, strides[0] if num_blocks > 1 else None, head_dim)
    except ValueError as error:
        shape_came = f"{list(kv_cache.shape)} with strides {strides}"
        raise ValueError(f"{op}: kv_cache {shape_came} cannot be read in place ({error})") from None


def _check_context_lens(op: str, context_lens: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if isinstance(context_lens, Tensor) and context_lens.ndim == 1:
        remedy = " (use context_lens.unsqueeze(1))" if (len(context_lens), 1) == shape else ""
        raise ValueError(
            f"{op}: context_lens must have shape {list(shape)}, a length for each query token, "
            f"got {list(context_lens.shape)}{remedy}"
        )
    check_tensor(op, "context_lens", context_lens, dtype=torch.int32, shape=shape, device=device)


def _check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    """What the ops would copy is an error here."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous to be read in place, got strides {tensor.stride()} "
            f"(use {name}.contiguous())"
        )


def _flat_out(op: str, out: Tensor, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """`out` [B, next_n, top_k] as [B * next_n, top_k] over the same memory."""
    check_tensor(op, "out", out, dtype=torch.int32, shape=shape, device=device)
    batch, next_n, top_k = shape
    try:
        return out.view(batch * next_n, top_k)
    except RuntimeError:
        raise ValueError(
            f"{op}: out must view as [{batch * next_n}, {top_k}], got strides {out.stride()} for {list(shape)}"
        ) from None


def _wants_checks(validate: bool | None, kv_cache: Tensor) -> bool:
    """As the ops: on a GPU looking would wait for the device."""
    return validate if validate is not None else kv_cache.device.type == "cpu"
