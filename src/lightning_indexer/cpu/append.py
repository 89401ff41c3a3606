"""append_entries in plain torch, all entries at once."""

import torch
from torch import Tensor

from lightning_indexer.cache.view import PagedView
from lightning_indexer.formats import quantize


@torch.no_grad()
def append_entries(entries: Tensor, view: PagedView, slots: Tensor, rounding: str) -> None:
    """Quantise entries and write their rows. Slots outside the storage are skipped."""
    written = (slots >= 0) & (slots < view.num_blocks * view.schema.entries_per_block)
    slots = slots[written].long()
    block, row = slots // view.schema.entries_per_block, slots % view.schema.entries_per_block
    data, scale = quantize(entries[written], view.schema.format, rounding=rounding, global_scale=view.global_scale)
    view.data_rows[block, row] = data
    view.scale_rows[block, row] = scale
