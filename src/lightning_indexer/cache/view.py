"""What an op reads a cache through: storage, layout and block table, made without copying anything.

A view can be built from a `PagedPool` or straight from an engine's own tensors: vLLM's `[blocks, 64, 1, 68]` uint8
pages, FlashMLA's `[blocks, 64, 1, 584]` float8 pages, a slice of a slab where layers interleave, and so on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.checks import check_range, check_tensor

_BYTE_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False)
class PagedView:
    """Base of `IndexerView` and `KVView`.

    Args:
        storage: [num_blocks, ...] of a one-byte dtype. The bytes of a block must be contiguous, at least
            `schema.payload_bytes` of them; blocks lie `schema.block_stride` bytes apart.
        schema: the byte layout of a block.
        block_table: int32 [num_seqs, max_blocks], logical block -> physical block. Entries past the blocks that a
            call needs are never read.
        global_scale: "nvfp4" only, multiplies every stored value.
    Raises:
        TypeError, ValueError: when storage and schema disagree.
    """

    storage: Tensor
    schema: CacheSchema
    block_table: Tensor
    global_scale: float = 1.0
    device: torch.device = field(init=False, repr=False)  # this and the rest follow from the above, once for all calls
    num_blocks: int = field(init=False, repr=False)
    num_seqs: int = field(init=False, repr=False)
    max_entries: int = field(init=False, repr=False)  # that a row of the table can address; 0 without rows or blocks

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "storage", _as_bytes(name, self.storage, self.schema))
        check_tensor(
            name,
            "block_table",
            self.block_table,
            dtype=torch.int32,
            shape=("num_seqs", "max_blocks"),
            device=self.storage.device,
        )
        if not 0 < self.global_scale < float("inf"):
            raise ValueError(f"{name}: global_scale must be positive and finite, got {self.global_scale}")
        if self.global_scale != 1.0 and self.schema.format != "nvfp4":
            raise ValueError(
                f"{name}: only 'nvfp4' has a global_scale, got {self.global_scale} for {self.schema.format!r}"
            )
        num_blocks, (num_seqs, columns) = self.storage.shape[0], self.block_table.shape
        object.__setattr__(self, "device", self.storage.device)
        object.__setattr__(self, "num_blocks", num_blocks)
        object.__setattr__(self, "num_seqs", num_seqs)
        is_empty = num_blocks == 0 or num_seqs == 0
        object.__setattr__(self, "max_entries", 0 if is_empty else columns * self.schema.entries_per_block)

    @property
    def data_rows(self) -> Tensor:
        """uint8 [num_blocks, entries_per_block, data bytes], sharing memory with `storage`."""
        return self._rows(0, self.schema.data_bytes)

    @property
    def scale_rows(self) -> Tensor:
        """uint8 [num_blocks, entries_per_block, scale bytes], sharing memory with `storage`."""
        return self._rows(self.schema.scale_offset, self.schema.scale_bytes)

    def slots(self, seq_ids: Tensor, indices: Tensor) -> Tensor:
        """int64 physical slots of entries `indices` [T, n] of sequences `seq_ids` [T]; negative indices give -1.

        Block ids that point outside the storage are clamped into it.
        """
        if self.max_entries == 0:
            return torch.full_like(indices, -1, dtype=torch.int64)
        per_block = self.schema.entries_per_block
        entry = indices.clamp_min(0).long()
        block = self.block_table[seq_ids.long().unsqueeze(-1), entry // per_block].long()
        slots = block.clamp(0, self.num_blocks - 1) * per_block + entry % per_block
        return torch.where(indices < 0, -1, slots)

    def check_blocks(self, op: str, seq_ids: Tensor, lens: Tensor) -> None:
        """Raise ValueError if a block that rows with these lengths (<= `max_entries`) need is not in the storage."""
        if self.max_entries == 0:
            return
        needed = -(-lens.long() // self.schema.entries_per_block)
        for seq_id in seq_ids.unique().tolist():
            count = int(needed[seq_ids == seq_id].max())
            check_range(op, f"block_table[{seq_id}]", self.block_table[seq_id, :count], 0, self.num_blocks - 1)

    def _rows(self, offset: int, row_bytes: int) -> Tensor:
        shape = (self.num_blocks, self.schema.entries_per_block, row_bytes)
        strides = (self.storage.stride(0), row_bytes, 1)
        return self.storage.as_strided(shape, strides, self.storage.storage_offset() + offset)


class IndexerView(PagedView):
    """The index keys of a batch of sequences: formats "mxfp4", "nvfp4", "fp8", "bf16" (and "fp32")."""

    def __post_init__(self) -> None:
        self.schema.check_index()
        super().__post_init__()


class KVView(PagedView):
    """The compressed KV entries of a batch of sequences: formats "fp8_ds_mla", "bf16" (and "fp32")."""

    def __post_init__(self) -> None:
        self.schema.check_kv()
        super().__post_init__()


def check_view(op: str, view: object, kind: type[PagedView]) -> None:
    """Raise TypeError unless `view` is a view of this kind."""
    if not isinstance(view, kind):
        wanted = {IndexerView: "an IndexerView", KVView: "a KVView"}.get(kind, "an IndexerView or a KVView")
        raise TypeError(f"{op}: view must be {wanted}, got {type(view).__name__}")


def _as_bytes(name: str, storage: Tensor, schema: CacheSchema) -> Tensor:
    """`storage` as uint8 [num_blocks, payload_bytes] over the same memory, after checking it against `schema`."""
    if not isinstance(storage, Tensor) or storage.dtype not in _BYTE_DTYPES:
        came = storage.dtype if isinstance(storage, Tensor) else type(storage).__name__
        raise TypeError(
            f"{name}: storage must be uint8, int8 or float8_e4m3fn, got {came} (use storage.view(torch.uint8))"
        )
    if storage.ndim < 2:
        raise ValueError(f"{name}: storage must have shape [num_blocks, ...], got {list(storage.shape)}")
    num_blocks, *block = storage.shape
    block_bytes = prod(block) if num_blocks else schema.stride
    if block_bytes not in (schema.payload_bytes, schema.stride):
        raise ValueError(
            f"{name}: storage must have {schema.payload_bytes} bytes per block ({schema.entries_per_block} x "
            f"{schema.bytes_per_entry}, format {schema.format!r}) or {schema.stride} with padding, got {block_bytes} "
            f"in shape {list(storage.shape)}"
        )
    block_stride, *strides = storage.stride()
    if num_blocks and not _is_contiguous(block, strides):
        raise ValueError(f"{name}: the bytes of a storage block must be contiguous, got strides {storage.stride()}")
    if num_blocks > 1 and block_stride != schema.stride:
        raise ValueError(
            f"{name}: storage blocks must lie {schema.stride} bytes apart, got {block_stride} "
            f"(use CacheSchema(..., block_stride={block_stride}))"
        )
    if storage.dtype != torch.uint8:
        storage = storage.view(torch.uint8)
    shape, wanted = (num_blocks, schema.payload_bytes), (schema.stride, 1)
    if storage.shape == shape and storage.stride() == wanted:
        return storage
    return storage.as_strided(shape, wanted, storage.storage_offset())


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """As `torch.Tensor.is_contiguous`, without making the tensor."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
