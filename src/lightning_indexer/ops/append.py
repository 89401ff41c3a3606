"""Quantise entries and write them into their slots."""

import functools
from types import ModuleType

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cache.view import PagedView, check_view
from lightning_indexer.checks import check_choice, check_range, check_tensor, choose_impl
from lightning_indexer.formats import ROUNDINGS
from lightning_indexer.tracing import is_traced, view_parts

_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def append_entries(
    entries: Tensor,
    view: PagedView,
    slots: Tensor,
    *,
    rounding: str = "nearest_even",
    validate: bool | None = None,
    impl: str = "auto",
) -> None:
    """Quantise entries to the view's format and write their data and scale rows; no other byte changes.

    Args:
        entries: [N, D] bf16, fp32 or fp16.
        view: `IndexerView` or `KVView`; its storage is written in place.
        slots: int32 or int64 [N], block * entries_per_block + row. -1 is skipped. Slots must be distinct.
        rounding: FP4 ties and floors, see `formats.quantize`.
        validate: raise ValueError for a slot outside the storage, before anything is written. Default: on a CPU yes;
            elsewhere no, because it would wait for the device, and such a slot is skipped.
        impl: "auto", "cpu", "cuda" (one kernel; head_dim up to 2,048; a NaN stored as bf16 gets one fixed pattern) or
            "reference". All write the same bytes otherwise.
    """
    if is_traced():
        torch.ops.lightning_indexer.append_entries(
            entries, *view_parts("append_entries", view, PagedView), slots, rounding, validate, impl
        )
    else:
        eager_append_entries(entries, view, slots, rounding, validate, impl)


def eager_append_entries(
    entries: Tensor, view: PagedView, slots: Tensor, rounding: str, validate: bool | None, impl: str
) -> None:
    """`append_entries`, unseen by torch's dispatcher."""
    op = "append_entries"
    check_view(op, view, PagedView)
    impl = choose_impl(op, impl, view.device, has_cuda=True)
    check_choice(op, "rounding", rounding, ROUNDINGS)
    check_tensor(op, "entries", entries, dtype=_DTYPES, shape=("N", view.schema.dim), device=view.device)
    shape = entries.shape[:1]
    check_tensor(op, "slots", slots, dtype=(torch.int64, torch.int32), shape=shape, device=view.device)
    num_slots = view.num_blocks * view.schema.entries_per_block
    if validate if validate is not None else view.storage.is_cpu:
        check_range(op, "slots", slots, -1, num_slots - 1)
    if impl == "cuda":
        _cuda().append_entries(entries, view, slots, rounding)
    elif impl == "reference":
        with torch.no_grad():
            reference.append_entries(entries, view, slots, rounding=rounding)
    else:
        from lightning_indexer.cpu.append import append_entries as cpu_append_entries

        cpu_append_entries(entries, view, slots, rounding)


@functools.cache
def _cuda() -> ModuleType:
    from lightning_indexer.cuda import append

    return append
