"""When a call has to be seen by torch, and how its arguments are handed over then.

Public functions take views and quantised queries; operators that torch knows (`torch_library.py`) take tensors and
numbers. An ordinary call needs no operator: it goes straight to the implementation, which spares it torch's dispatcher.
"""

from typing import TypeVar

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import PagedView, check_view
from lightning_indexer.query import QuantizedQuery

_TRACERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)

View = TypeVar("View", bound=PagedView)
ViewParts = tuple[Tensor, Tensor, str, int, int, float]
QueryParts = tuple[Tensor, Tensor | None, str | None, float]


def is_traced() -> bool:
    """Whether the call is being compiled or exported, or traced by `make_fx`, or its tensors may hold nothing."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() == 0:  # in all ordinary calls
        return False
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACERS)


def view_parts(op: str, view: PagedView, kind: type[PagedView]) -> ViewParts:
    """What `join_view` takes, of a view of this kind; TypeError for another."""
    check_view(op, view, kind)
    schema = view.schema
    return view.storage, view.block_table, schema.format, schema.entries_per_block, schema.dim, view.global_scale


def join_view(
    kind: type[View],
    storage: Tensor,
    block_table: Tensor,
    format: str,
    entries_per_block: int,
    head_dim: int,
    global_scale: float,
) -> View:
    """The view that has these parts. Blocks lie as far apart as those of `storage`, of which torch may make copies."""
    block_stride = storage.stride(0) if storage.shape[0] > 1 else None
    return kind(storage, CacheSchema(format, entries_per_block, block_stride, head_dim), block_table, global_scale)


def query_parts(q: Tensor | QuantizedQuery) -> QueryParts:
    """What `join_query` takes."""
    return (q.data, q.scale, q.format, q.global_scale) if isinstance(q, QuantizedQuery) else (q, None, None, 1.0)


def join_query(data: Tensor, scale: Tensor | None, format: str | None, global_scale: float) -> Tensor | QuantizedQuery:
    """The query that has these parts; a format of None is that of a plain tensor."""
    return data if format is None else QuantizedQuery(format, data, scale, global_scale)
