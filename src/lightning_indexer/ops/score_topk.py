"""Score every cached entry against each query and keep the best: `score_topk`, and its dense twin `index_scores`."""

import functools
from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.checks import check_choice, check_range, check_tensor, choose_impl
from lightning_indexer.precision import full_float32
from lightning_indexer.query import QuantizedQuery
from lightning_indexer.score_arguments import (
    BLOCK_ENTRIES,
    check_heads,
    check_operands,
    check_rows,
    clamp_rows,
    wants_checks,
)
from lightning_indexer.tracing import is_traced, query_parts, view_parts

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
    check_operands(op, q, weights, view, valid_lens, seq_ids)
    impl = choose_impl(op, impl, view.device, has_cuda=True)
    if wants_checks(validate, view):
        check_rows(op, view, valid_lens, seq_ids)
    longest = min(max(int(valid_lens.max()), 0), view.max_entries) if out is None and len(valid_lens) else 0
    if out is None:
        out = torch.empty(len(weights), longest, dtype=torch.float32, device=view.device)
    check_tensor(op, "out", out, dtype=torch.float32, shape=(len(weights), "max_len"), device=view.device)
    if impl == "cuda":
        _streaming(impl).index_scores(q, weights, view, valid_lens, seq_ids, out)
        return out
    valid_lens, seq_ids = clamp_rows(view, valid_lens, seq_ids)
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
    candidates: Tensor | None = None,
    candidate_entries: int = 8,
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
    candidates: Tensor | None = None,
    candidate_entries: int = 8,
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
    candidates: Tensor | None = None,
    candidate_entries: int = 8,
    validate: bool | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Score every visible entry of each query's sequence, or those in its candidate blocks, and keep the `top_k` best.

        score[t, s] = sum_h weights[t, h] * max(0, <q[t, h], k[s]>)

    The result equals a stable descending sort of `index_scores`, cut at k, bit for bit: ties go to the smaller index,
    +0 equals -0, and NaN ranks after everything else, -inf included. No allocation grows with T x context. With
    `candidates` the sort is of the same scores, bit for bit, without the entries that are in none of a query's blocks.

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
        candidates: int32 [T, NB], the blocks of entries that each query may choose from, as `select_candidates` lists
            them: ids ascend, -1 behind the last. Block i holds entries `i * candidate_entries` up to the next block's;
            those beyond `valid_lens` are left out. A GPU scores what is listed and no more, each query by itself; a
            CPU scores everything and drops the rest.
        candidate_entries: 8 or 16.
        validate: check lengths, seq_ids, block ids and candidates before any work, ValueError naming the worst.
            Default: on a CPU yes; elsewhere no, because it would wait for the device, and they are clamped. Candidates
            out of range are then ignored; of those that do not ascend some may be passed over, and of those that repeat
            entries may be returned twice.
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
        candidates,
        candidate_entries,
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
    candidates: Tensor | None = None,
    candidate_entries: int = 8,
) -> Tensor | tuple[Tensor, Tensor]:
    """`score_topk`, unseen by torch's dispatcher."""
    op = "score_topk"
    num_tokens, num_heads = check_operands(op, q, weights, view, valid_lens, seq_ids)
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
    if candidates is not None:
        check_choice(op, "candidate_entries", candidate_entries, BLOCK_ENTRIES)
        check_tensor(op, "candidates", candidates, dtype=torch.int32, shape=(num_tokens, "NB"), device=device)
    workspace = _check_workspace(op, workspace, num_heads, view, top_k)
    if wants_checks(validate, view):
        check_rows(op, view, valid_lens, seq_ids)
        if candidates is not None:
            _check_lists(op, candidates, view.max_entries // candidate_entries)
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=device)
    if return_scores and scores_out is None:
        scores_out = torch.empty(shape, dtype=torch.float32, device=device)
    by_score, as_slots = order == "score", output == "slot"
    if impl == "reference":
        rows = clamp_rows(view, valid_lens, seq_ids)
        _reference(q, weights, view, *rows, by_score, as_slots, out, scores_out, candidates, candidate_entries)
    else:
        if impl == "cpu":  # the kernels clamp for themselves
            valid_lens, seq_ids = clamp_rows(view, valid_lens, seq_ids)
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
            candidates=candidates,
            candidate_entries=candidate_entries,
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
    candidates: Tensor | None = None,
    candidate_entries: int = 8,
) -> Tensor | tuple[Tensor, Tensor]:
    parts = (*query_parts(q), weights, *view_parts("score_topk", view, IndexerView))
    _check_top_k("score_topk", top_k)
    shape = (weights.shape[0], top_k)
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=view.device)
    if return_scores and scores_out is None:
        scores_out = torch.empty(shape, dtype=torch.float32, device=view.device)
    tensors = (valid_lens, seq_ids, out, scores_out, workspace)
    options = (order, output, validate, impl, candidates, candidate_entries)
    torch.ops.lightning_indexer.score_topk(*parts, *tensors, top_k, *options)
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
    check_heads(op, "num_heads", num_heads)
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
    candidates: Tensor | None,
    candidate_entries: int,
) -> None:
    longest = int(valid_lens.max()) if len(valid_lens) else 0
    dense = reference.index_scores(q, weights, view, valid_lens=valid_lens, seq_ids=seq_ids, max_len=longest)
    for t, length in enumerate(valid_lens.tolist()):
        if candidates is None:
            best = reference.select(dense[t], length, out.shape[1])
        else:
            best = reference.select_listed(dense[t], length, out.shape[1], candidates[t], candidate_entries)
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


def _check_lists(op: str, candidates: Tensor, num_blocks: int) -> None:
    """Raise ValueError unless each row ascends, -1 behind the last, below `num_blocks`."""
    check_range(op, "candidates", candidates, -1, num_blocks - 1)
    before, after = candidates[:, :-1], candidates[:, 1:]
    wrong = ((after >= 0) & ((after <= before) | (before < 0))).nonzero()
    if len(wrong):
        t, j = wrong[0].tolist()
        pair = f"{int(before[t, j])}, {int(after[t, j])} from [{t}, {j}] on"
        raise ValueError(f"{op}: candidates must ascend in each row, -1 behind the last, got {pair}")


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
