"""How many entries a query may see."""

import torch
from torch import Tensor

from lightning_indexer.checks import check_range, check_tensor
from lightning_indexer.tracing import is_traced

_INT_DTYPES = (torch.int32, torch.int64)


def visible_entries(positions: Tensor, compress_ratio: int) -> Tensor:
    """Entries visible from absolute token positions: (position + 1) // compress_ratio.

    A token that completes an entry sees it, so entries are written before queries are scored.

    Args:
        positions: int32 or int64, any shape, 0-based. -1 (no token) sees nothing.
        compress_ratio: tokens per entry, 4 for CSA and 128 for HCA; 1 or 2 in V4.1, 1 for keys of single tokens.
    Returns:
        int32, same shape.
    """
    if is_traced():
        visible: Tensor = torch.ops.lightning_indexer.visible_entries(positions, compress_ratio)
        return visible
    return eager_visible_entries(positions, compress_ratio)


def eager_visible_entries(positions: Tensor, compress_ratio: int) -> Tensor:
    """`visible_entries`, unseen by torch's dispatcher."""
    check_tensor("visible_entries", "positions", positions, dtype=_INT_DTYPES, shape=_any_shape(positions))
    _check_positive("visible_entries", "compress_ratio", compress_ratio)
    if positions.device.type == "cpu":
        check_range("visible_entries", "positions", positions, -1, torch.iinfo(torch.int32).max - 1)
    return ((positions.long() + 1) // compress_ratio).to(torch.int32)


def compute_valid_lens(block_lens: Tensor, entries_per_block: int) -> Tensor:
    """Entries that whole blocks hold: block_lens * entries_per_block, for caches whose blocks are all full.

    Args:
        block_lens: int32 or int64, any shape, blocks per query's sequence, not negative.
        entries_per_block: `cache.paged.schema.entries_per_block`.
    Returns:
        int32, same shape.
    """
    if is_traced():
        lens: Tensor = torch.ops.lightning_indexer.compute_valid_lens(block_lens, entries_per_block)
        return lens
    return eager_compute_valid_lens(block_lens, entries_per_block)


def eager_compute_valid_lens(block_lens: Tensor, entries_per_block: int) -> Tensor:
    """`compute_valid_lens`, unseen by torch's dispatcher."""
    check_tensor("compute_valid_lens", "block_lens", block_lens, dtype=_INT_DTYPES, shape=_any_shape(block_lens))
    _check_positive("compute_valid_lens", "entries_per_block", entries_per_block)
    if block_lens.device.type == "cpu":
        limit = torch.iinfo(torch.int32).max // entries_per_block
        check_range("compute_valid_lens", "block_lens", block_lens, 0, limit)
    return (block_lens.long() * entries_per_block).to(torch.int32)


def _any_shape(tensor: Tensor) -> tuple[str, ...]:
    return ("*",) * tensor.ndim if isinstance(tensor, Tensor) else ()


def _check_positive(op: str, name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{op}: {name} must be an int of at least 1, got {value!r}")
