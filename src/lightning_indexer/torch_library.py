"""The library's operators as torch knows them: `torch.ops.lightning_indexer.<name>`.

`torch.compile`, `torch.export` and dispatch modes see each of them as one call whose schema says what it writes, and
learn the shapes of results from fake kernels, without computing. Public functions call these where a call is traced.

An operator runs what the public function of its name runs, with all its checks. Views and queries come in parts, in the
order of `join_view` and `join_query`; a `q_format` of None means a plain tensor. Nothing has a gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel, register_fake

from lightning_indexer.cache.view import IndexerView, KVView, PagedView
from lightning_indexer.ops.append import eager_append_entries
from lightning_indexer.ops.attention import eager_sparse_attention
from lightning_indexer.ops.gather_kv import eager_gather_kv
from lightning_indexer.ops.merge import eager_merge_topk
from lightning_indexer.ops.score_topk import eager_index_scores, eager_score_topk
from lightning_indexer.ops.select_candidates import eager_select_candidates
from lightning_indexer.ops.valid_lens import eager_compute_valid_lens, eager_visible_entries
from lightning_indexer.tracing import join_query, join_view

NAMESPACE = "lightning_indexer"

# `torch.library.custom_op` would do too, but adds some 20 us to every call of a compiled model (measured on a CPU).
_library = Library(NAMESPACE, "DEF")

_QUERY = "Tensor q, Tensor? q_scale, str? q_format, float q_global_scale"
_LAYOUT = "Tensor block_table, str format, int entries_per_block, int head_dim, float global_scale"
_VIEW = f"Tensor storage, {_LAYOUT}"
_ROWS = "Tensor valid_lens, Tensor? seq_ids"
_OPTIONS = "bool? validate=None, str impl='auto'"


def _write_nothing(*_arguments: object, **_options: object) -> None:
    """The fake kernel of operators that only write into their arguments."""


def _like_integers(values: Tensor, _factor: int) -> Tensor:
    return torch.empty_like(values, dtype=torch.int32, memory_format=torch.contiguous_format)


def _attended(q: Tensor, *_arguments: object, **_options: object) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


def _operator(
    arguments: str, returns: str = "()", *, fake: Callable[..., object] = _write_nothing
) -> Callable[[Callable[..., object]], None]:
    """Register a function under its own name, for all devices."""

    def register(function: Callable[..., object]) -> None:
        name = function.__name__
        _library.define(f"{name}({arguments}) -> {returns}")
        _library.impl(name, function, "CompositeExplicitAutograd")
        _library.impl(name, fallthrough_kernel, "Autograd")
        register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)

    return register


@_operator(
    f"{_QUERY}, Tensor weights, {_VIEW}, {_ROWS}, Tensor(a!) out, Tensor(b!)? scores_out, Tensor(c!)? workspace, "
    f"SymInt top_k, str order='index', str output='entry', {_OPTIONS}, Tensor? candidates=None, int candidate_entries=8"
)
def score_topk(
    q: Tensor,
    q_scale: Tensor | None,
    q_format: str | None,
    q_global_scale: float,
    weights: Tensor,
    storage: Tensor,
    block_table: Tensor,
    format: str,
    entries_per_block: int,
    head_dim: int,
    global_scale: float,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    out: Tensor,
    scores_out: Tensor | None,
    workspace: Tensor | None,
    top_k: int,
    order: str = "index",
    output: str = "entry",
    validate: bool | None = None,
    impl: str = "auto",
    candidates: Tensor | None = None,
    candidate_entries: int = 8,
) -> None:
    layout = (format, entries_per_block, head_dim, global_scale)
    eager_score_topk(
        join_query(q, q_scale, q_format, q_global_scale),
        weights,
        join_view(IndexerView, storage, block_table, *layout),
        top_k,
        valid_lens,
        seq_ids,
        order,
        output,
        False,
        out,
        scores_out,
        workspace,
        validate,
        impl,
        candidates,
        candidate_entries,
    )


@_operator(f"{_QUERY}, Tensor weights, {_VIEW}, {_ROWS}, Tensor(a!) out, {_OPTIONS}")
def index_scores(
    q: Tensor,
    q_scale: Tensor | None,
    q_format: str | None,
    q_global_scale: float,
    weights: Tensor,
    storage: Tensor,
    block_table: Tensor,
    format: str,
    entries_per_block: int,
    head_dim: int,
    global_scale: float,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    out: Tensor,
    validate: bool | None = None,
    impl: str = "auto",
) -> None:
    query = join_query(q, q_scale, q_format, q_global_scale)
    layout = (format, entries_per_block, head_dim, global_scale)
    view = join_view(IndexerView, storage, block_table, *layout)
    eager_index_scores(query, weights, view, valid_lens, seq_ids, out, validate, impl)


@_operator(f"{_QUERY}, Tensor weights, {_VIEW}, {_ROWS}, Tensor(a!) out, int block_entries=8, {_OPTIONS}")
def select_candidates(
    q: Tensor,
    q_scale: Tensor | None,
    q_format: str | None,
    q_global_scale: float,
    weights: Tensor,
    storage: Tensor,
    block_table: Tensor,
    format: str,
    entries_per_block: int,
    head_dim: int,
    global_scale: float,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    out: Tensor,
    block_entries: int = 8,
    validate: bool | None = None,
    impl: str = "auto",
) -> None:
    query = join_query(q, q_scale, q_format, q_global_scale)
    layout = (format, entries_per_block, head_dim, global_scale)
    view = join_view(IndexerView, storage, block_table, *layout)
    eager_select_candidates(query, weights, view, valid_lens, seq_ids, out, block_entries, validate, impl)


@_operator(f"Tensor entries, Tensor(a!) storage, {_LAYOUT}, Tensor slots, str rounding='nearest_even', {_OPTIONS}")
def append_entries(
    entries: Tensor,
    storage: Tensor,
    block_table: Tensor,
    format: str,
    entries_per_block: int,
    head_dim: int,
    global_scale: float,
    slots: Tensor,
    rounding: str = "nearest_even",
    validate: bool | None = None,
    impl: str = "auto",
) -> None:
    layout = (format, entries_per_block, head_dim, global_scale)
    view = join_view(PagedView, storage, block_table, *layout)
    eager_append_entries(entries, view, slots, rounding, validate, impl)


@_operator(f"{_VIEW}, Tensor indices, Tensor? seq_ids, Tensor(a!) out, {_OPTIONS}")
def gather_kv(
    storage: Tensor,
    block_table: Tensor,
    format: str,
    entries_per_block: int,
    head_dim: int,
    global_scale: float,
    indices: Tensor,
    seq_ids: Tensor | None,
    out: Tensor,
    validate: bool | None = None,
    impl: str = "auto",
) -> None:
    layout = (format, entries_per_block, head_dim, global_scale)
    eager_gather_kv(join_view(KVView, storage, block_table, *layout), indices, seq_ids, out, validate, impl)


@_operator(
    "Tensor q, Tensor kv_selected, Tensor kv_window, Tensor valid, Tensor? sink, float softmax_scale, str impl='auto'",
    "(Tensor, Tensor)",
    fake=_attended,
)
def sparse_attention(
    q: Tensor,
    kv_selected: Tensor,
    kv_window: Tensor,
    valid: Tensor,
    sink: Tensor | None,
    softmax_scale: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    return eager_sparse_attention(q, kv_selected, kv_window, valid, sink, softmax_scale, impl)


# Plain torch, but kept whole: a compiler has no business in arithmetic on the bits of scores.
@_operator("Tensor indices, Tensor scores, Tensor(a!) out, Tensor(b!) scores_out, str impl='auto'")
def merge_topk(indices: Tensor, scores: Tensor, out: Tensor, scores_out: Tensor, impl: str = "auto") -> None:
    eager_merge_topk(indices, scores, out, scores_out, impl)


# These two check what their tensors hold, on a CPU, which a compiler cannot see through.
@_operator("Tensor positions, int compress_ratio", "Tensor", fake=_like_integers)
def visible_entries(positions: Tensor, compress_ratio: int) -> Tensor:
    return eager_visible_entries(positions, compress_ratio)


@_operator("Tensor block_lens, int entries_per_block", "Tensor", fake=_like_integers)
def compute_valid_lens(block_lens: Tensor, entries_per_block: int) -> Tensor:
    return eager_compute_valid_lens(block_lens, entries_per_block)
