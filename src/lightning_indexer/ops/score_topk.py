"""Score every cached entry against each query and keep the best: `score_topk`, and its dense twin `index_scores`."""

import functools
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cache.view import IndexerView, check_view
from lightning_indexer.checks import check_choice, check_range, check_tensor, choose_impl
from lightning_indexer.precision import full_float32
from lightning_indexer.query import QuantizedQuery
from lightning_indexer.tracing import is_traced, query_parts, view_parts

MAX_HEADS = 128
MAX_TOP_K = 4096

_ORDERS, _OUTPUTS = ("index", "score"), ("entry", "slot")


def index_scores(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    *,
    valid_lens: Tensor,
    seq_ids: Tensor | None = None,
    out: Tensor | None = None,
    validate: bool | None = None,
    impl: str = "auto",
) -> Tensor:
    """Dense scores, for tests, debugging and distillation: exactly the numbers that `score_topk` ranks.

        score[t, s] = sum_h weights[t, h] * max(0, <q[t, h], k[s]>)

    Args:
        q, weights, view, valid_lens, seq_ids, validate, impl: as for `score_topk`.
        out: fp32 [T, max_len], written in place; max_len must be at least the largest length.
            Default: a new tensor with max_len = max(valid_lens), for which a GPU has to be waited for.
    Returns:
        fp32 [T, max_len]: -inf beyond each row's length, NaN where the operands make one, never -0.
    """
    run = _index_scores_through_torch if is_traced() else eager_index_scores
    return run(q, weights, view, valid_lens, seq_ids, out, validate, impl)


def eager_index_scores(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    out: Tensor | None,
    validate: bool | None,
    impl: str,
) -> Tensor:
    """`index_scores`, unseen by torch's dispatcher."""
    op = "index_scores"
    _check_operands(op, q, weights, view, valid_lens, seq_ids)
    impl = choose_impl(op, impl, view.device, has_cuda=True)
    if _wants_checks(validate, view):
        _check_rows(op, view, valid_lens, seq_ids)
    longest = min(max(int(valid_lens.max()), 0), view.max_entries) if out is None and len(valid_lens) else 0
    if out is None:
        out = torch.empty(len(weights), longest, dtype=torch.float32, device=view.device)
    check_tensor(op, "out", out, dtype=torch.float32, shape=(len(weights), "max_len"), device=view.device)
    if impl == "cuda":
        _streaming(impl).index_scores(q, weights, view, valid_lens, seq_ids, out)
        return out
    valid_lens, seq_ids = _clamp_rows(view, valid_lens, seq_ids)
    longest = int(valid_lens.max()) if len(valid_lens) else 0
    if out.shape[1] < longest:
        raise ValueError(f"{op}: out must have at least max(valid_lens) = {longest} columns, got {out.shape[1]}")
    if impl == "reference":
        _reference_scores(q, weights, view, valid_lens, seq_ids, out)
    else:
        _streaming(impl).index_scores(q, weights, view, valid_lens, seq_ids, out)
    return out


@overload
def score_topk(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    *,
    top_k: int,
    valid_lens: Tensor,
    seq_ids: Tensor | None = None,
    order: str = "index",
    output: str = "entry",
    return_scores: Literal[False] = False,
    out: Tensor | None = None,
    scores_out: Tensor | None = None,
    workspace: Tensor | None = None,
    validate: bool | None = None,
    impl: str = "auto",
) -> Tensor: ...


@overload
def score_topk(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    *,
    top_k: int,
    valid_lens: Tensor,
    seq_ids: Tensor | None = None,
    order: str = "index",
    output: str = "entry",
    return_scores: Literal[True],
    out: Tensor | None = None,
    scores_out: Tensor | None = None,
    workspace: Tensor | None = None,
    validate: bool | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def score_topk(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    *,
    top_k: int,
    valid_lens: Tensor,
    seq_ids: Tensor | None = None,
    order: str = "index",
    output: str = "entry",
    return_scores: bool = False,
    out: Tensor | None = None,
    scores_out: Tensor | None = None,
    workspace: Tensor | None = None,
    validate: bool | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Score every visible entry of each query's sequence and keep the `top_k` best.

        score[t, s] = sum_h weights[t, h] * max(0, <q[t, h], k[s]>)

    The result equals a stable descending sort of `index_scores`, cut at k, bit for bit: ties go to the smaller index,
    +0 equals -0, and NaN ranks after everything else, -inf included. No allocation grows with T x context.

    Args:
        q: [T, H, D] fp32, bf16 or fp16, or a `QuantizedQuery`. H is a multiple of 8 up to 128; D is 64 or 128.
        weights: fp32 [T, H], the model's scale factors (and, for fp8 queries without a scale, theirs) folded in.
        view: the paged keys. Blocks past a row's length and bytes of unused slots are never read into a result.
        top_k: 1 .. 4096; may exceed the length.
        valid_lens: int32 [T], how many entries each query may see, `visible_entries(positions, compress_ratio)`.
        seq_ids: int32 or int64 [T], each query's row of `view.block_table`; None means query t uses row t.
            Consecutive rows of one sequence share one pass over its keys.
        order: "index" (ascending entry index) or "score" (descending, ties by index).
        output: "entry" (index within the sequence) or "slot" (block * entries_per_block + row; `order` still speaks of
            the entry index).
        out: int32 [T, top_k] and scores_out: fp32 [T, top_k], written in place; new tensors by default.
        workspace: uint8, at least `score_topk_workspace_bytes(...)` bytes; a new tensor by default.
        validate: check lengths, seq_ids and block ids against the storage before any work, ValueError naming the worst.
            Default: on a CPU yes; elsewhere no, because it would wait for the device, and they are clamped.
        impl: "auto", "cpu" (streams, multithreaded), "cuda" (fused kernels) or "reference" (plain torch, materialises
            each row).
    Returns:
        int32 [T, top_k], -1 where there are fewer entries; with return_scores also fp32 [T, top_k], -inf there (and
        for NaN).
    """
    run = _score_topk_through_torch if is_traced() else eager_score_topk
    return run(
        q,
        weights,
        view,
        top_k,
        valid_lens,
        seq_ids,
        order,
        output,
        return_scores,
        out,
        scores_out,
        workspace,
        validate,
        impl,
    )


def eager_score_topk(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    top_k: int,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    order: str,
    output: str,
    return_scores: bool,
    out: Tensor | None,
    scores_out: Tensor | None,
    workspace: Tensor | None,
    validate: bool | None,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """`score_topk`, unseen by torch's dispatcher."""
    op = "score_topk"
    num_tokens, num_heads = _check_operands(op, q, weights, view, valid_lens, seq_ids)
    device = view.device
    impl = choose_impl(op, impl, device, has_cuda=True)
    check_choice(op, "order", order, _ORDERS)
    check_choice(op, "output", output, _OUTPUTS)
    _check_top_k(op, top_k)
    shape = (num_tokens, top_k)
    if out is not None:
        check_tensor(op, "out", out, dtype=torch.int32, shape=shape, device=device)
    if scores_out is not None:
        check_tensor(op, "scores_out", scores_out, dtype=torch.float32, shape=shape, device=device)
    workspace = _check_workspace(op, workspace, num_heads, view, top_k)
    if _wants_checks(validate, view):
        _check_rows(op, view, valid_lens, seq_ids)
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=device)
    if return_scores and scores_out is None:
        scores_out = torch.empty(shape, dtype=torch.float32, device=device)
    by_score, as_slots = order == "score", output == "slot"
    if impl == "reference":
        rows = _clamp_rows(view, valid_lens, seq_ids)
        _reference(q, weights, view, *rows, by_score, as_slots, out, scores_out)
    else:
        if impl == "cpu":  # the kernels clamp for themselves
            valid_lens, seq_ids = _clamp_rows(view, valid_lens, seq_ids)
        _streaming(impl).score_topk(
            q,
            weights,
            view,
            valid_lens,
            seq_ids,
            by_score=by_score,
            as_slots=as_slots,
            out=out,
            scores_out=scores_out,
            workspace=workspace,
        )
    return _results(out, scores_out, return_scores)


def _score_topk_through_torch(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    top_k: int,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    order: str,
    output: str,
    return_scores: bool,
    out: Tensor | None,
    scores_out: Tensor | None,
    workspace: Tensor | None,
    validate: bool | None,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    parts = (*query_parts(q), weights, *view_parts("score_topk", view, IndexerView))
    _check_top_k("score_topk", top_k)
    shape = (weights.shape[0], top_k)
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=view.device)
    if return_scores and scores_out is None:
        scores_out = torch.empty(shape, dtype=torch.float32, device=view.device)
    tensors = (valid_lens, seq_ids, out, scores_out, workspace)
    torch.ops.lightning_indexer.score_topk(*parts, *tensors, top_k, order, output, validate, impl)
    return _results(out, scores_out, return_scores)


def _results(out: Tensor, scores_out: Tensor | None, return_scores: bool) -> Tensor | tuple[Tensor, Tensor]:
    if not return_scores:
        return out
    assert scores_out is not None, "allocated where it is returned"
    return out, scores_out


def score_topk_workspace_bytes(*, num_heads: int, head_dim: int, top_k: int, device: torch.device | str = "cpu") -> int:
    """Bytes of working memory that `score_topk` uses: no more for a longer context or more queries.

    Args:
        device: where the call runs. On a GPU at most 64 MiB, and nothing is allocated beside it and the outputs; on a
            CPU, operators of torch itself hold up to about 20 MiB beside it for a moment, equally bounded.
    """
    op = "score_topk_workspace_bytes"
    _check_top_k(op, top_k)
    _check_heads(op, "num_heads", num_heads)
    check_choice(op, "head_dim", head_dim, (64, 128))
    device = torch.device(device)
    if device.type == "cuda":
        from lightning_indexer.cuda.score_topk import workspace_bytes

        index = torch.cuda.current_device() if device.index is None else device.index
        return workspace_bytes(top_k, index)
    from lightning_indexer.cpu.score_topk import Scratch

    return Scratch.nbytes(num_heads, head_dim, top_k)


def _index_scores_through_torch(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    out: Tensor | None,
    validate: bool | None,
    impl: str,
) -> Tensor:
    parts = (*query_parts(q), weights, *view_parts("index_scores", view, IndexerView))
    if out is None:
        longest = min(max(int(valid_lens.max()), 0), view.max_entries) if len(valid_lens) else 0
        out = torch.empty(weights.shape[0], longest, dtype=torch.float32, device=view.device)
    torch.ops.lightning_indexer.index_scores(*parts, valid_lens, seq_ids, out, validate, impl)
    return out


@torch.no_grad()
@full_float32()
def _reference_scores(
    q: Tensor | QuantizedQuery, weights: Tensor, view: IndexerView, valid_lens: Tensor, seq_ids: Tensor, out: Tensor
) -> None:
    width = out.shape[1]
    out.copy_(reference.index_scores(q, weights, view, valid_lens=valid_lens, seq_ids=seq_ids, max_len=width))


@torch.no_grad()
@full_float32()
def _reference(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor,
    by_score: bool,
    as_slots: bool,
    out: Tensor,
    scores_out: Tensor | None,
) -> None:
    longest = int(valid_lens.max()) if len(valid_lens) else 0
    dense = reference.index_scores(q, weights, view, valid_lens=valid_lens, seq_ids=seq_ids, max_len=longest)
    for t, length in enumerate(valid_lens.tolist()):
        best = reference.select(dense[t], length, out.shape[1])
        if not by_score:
            best = torch.cat([best[best >= 0].sort().values, best[best < 0]])
        if scores_out is not None:
            scores_out[t] = -torch.inf
            found = dense[t, best[best >= 0]]
            scores_out[t, : len(found)] = torch.where(found.isnan(), -torch.inf, found)
        out[t] = view.slots(seq_ids[t : t + 1], best.unsqueeze(0))[0] if as_slots else best


@functools.cache
def _streaming(impl: str) -> ModuleType:
    """The module of "cpu" or "cuda", which have the same two functions."""
    if impl == "cuda":
        from lightning_indexer.cuda import score_topk as cuda

        return cuda
    from lightning_indexer.cpu import score_topk as cpu

    return cpu


def _check_operands(
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
    _check_heads(op, "weights", num_heads)
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


def _wants_checks(validate: bool | None, view: IndexerView) -> bool:
    """Whether to look at what the tensors hold, which on a GPU waits for the device."""
    return validate if validate is not None else view.storage.is_cpu


def _check_rows(op: str, view: IndexerView, valid_lens: Tensor, seq_ids: Tensor | None) -> None:
    if seq_ids is None:
        seq_ids = _own_rows(valid_lens)
    if len(seq_ids):
        check_range(op, "seq_ids", seq_ids, 0, view.num_seqs - 1)
    check_range(op, "valid_lens", valid_lens, 0, view.max_entries)
    view.check_blocks(op, seq_ids, valid_lens)


def _clamp_rows(view: IndexerView, valid_lens: Tensor, seq_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lengths and sequences within the view, seq_ids with its default filled in. (The kernels do this themselves.)"""
    if seq_ids is None:
        seq_ids = _own_rows(valid_lens)
    return valid_lens.clamp(0, view.max_entries), seq_ids.clamp(0, max(view.num_seqs - 1, 0))


def _own_rows(valid_lens: Tensor) -> Tensor:
    """Query t uses row t of the block table."""
    return torch.arange(len(valid_lens), dtype=torch.int32, device=valid_lens.device)


def _check_heads(op: str, name: str, num_heads: int) -> None:
    if num_heads % 8 or not 8 <= num_heads <= MAX_HEADS:
        raise ValueError(f"{op}: {name} must have a multiple of 8 heads up to {MAX_HEADS}, got {num_heads}")


def _check_top_k(op: str, top_k: int) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"{op}: top_k must be an int in 1..{MAX_TOP_K}, got {top_k!r}")


def _check_workspace(op: str, workspace: Tensor | None, num_heads: int, view: IndexerView, top_k: int) -> Tensor:
    device = view.device
    needed = _workspace_bytes(num_heads, view.schema.dim, top_k, device)
    if workspace is None:
        return torch.empty(needed, dtype=torch.uint8, device=device)
    check_tensor(op, "workspace", workspace, dtype=torch.uint8, shape=("bytes",), device=device)
    if workspace.shape[0] < needed:
        raise ValueError(f"{op}: workspace must have at least {needed} bytes, got {len(workspace)}")
    if not workspace.is_contiguous() or workspace.data_ptr() % 64:
        raise ValueError(f"{op}: workspace must be contiguous and 64-byte aligned, got stride {workspace.stride()}")
    return workspace


@functools.cache
def _workspace_bytes(num_heads: int, head_dim: int, top_k: int, device: torch.device) -> int:
    """`device` is a tensor's, which has an index where there are several."""
    return score_topk_workspace_bytes(num_heads=num_heads, head_dim=head_dim, top_k=top_k, device=device)
