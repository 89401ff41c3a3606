"""The byte layout of a cache block. No other file knows a byte count.

A block holds `entries_per_block` entries: all their data rows first, then all their scale rows, then padding up to
the block stride. This "segregated" order is what vLLM, SGLang, DeepGEMM and FlashMLA write, although they *view* a
block as [entries, 1, bytes_per_entry]: byte j of that view's entry i is not byte j of entry i.
"""

from dataclasses import dataclass

_KV_FP8_DIM = 512
_STRIDE_ALIGNMENT = 16
_MLA_STRIDE_ALIGNMENT = 576  # FlashMLA's tensor maps want it; a smaller stride is read all the same

_DATA_BITS = {"mxfp4": 4, "nvfp4": 4, "fp8": 8, "bf16": 16, "fp32": 32}
_INDEX_ONLY = ("mxfp4", "nvfp4", "fp8")


@dataclass(frozen=True)
class CacheSchema:
    """Where each byte of a block lies.

    Args:
        format: an index format ("mxfp4", "nvfp4", "fp8", "bf16"), a KV format ("fp8_ds_mla", "bf16"), or "fp32".
        entries_per_block: for index keys a multiple of 16 from 16 to 256; for KV any number from 1.
        block_stride: bytes from one block to the next, a multiple of 16 that is at least `payload_bytes`.
            Default: `payload_bytes`, rounded up to a multiple of 576 for "fp8_ds_mla".
        head_dim: values per entry. Default 512 for "fp8_ds_mla" (its only size), otherwise 128;
            "bf16" KV entries are CacheSchema("bf16", n, head_dim=512).
    """

    format: str
    entries_per_block: int = 64
    block_stride: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if self.format not in (*_DATA_BITS, "fp8_ds_mla"):
            raise ValueError(f"CacheSchema: format must be one of {(*_DATA_BITS, 'fp8_ds_mla')}, got {self.format!r}")
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", _KV_FP8_DIM if self.format == "fp8_ds_mla" else 128)
        self._check_head_dim()
        self._check_entries_per_block()
        if self.block_stride is None:
            alignment = _MLA_STRIDE_ALIGNMENT if self.format == "fp8_ds_mla" else _STRIDE_ALIGNMENT
            object.__setattr__(self, "block_stride", -(-self.payload_bytes // alignment) * alignment)
        if self.stride % _STRIDE_ALIGNMENT or self.stride < self.payload_bytes:
            raise ValueError(
                f"CacheSchema: block_stride must be a multiple of {_STRIDE_ALIGNMENT} and at least "
                f"{self.payload_bytes} bytes ({self.entries_per_block} x {self.format}), got {self.block_stride}"
            )

    @property
    def data_bytes(self) -> int:
        """Bytes of one entry's data row."""
        if self.format == "fp8_ds_mla":
            return 448 + 64 * 2  # E4M3 dims, then bf16 RoPE dims
        return self.dim * _DATA_BITS[self.format] // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of one entry's scale row, padding included."""
        return {"mxfp4": 4, "nvfp4": self.dim // 16, "fp8": 4, "fp8_ds_mla": 8}.get(self.format, 0)

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one entry, data and scale."""
        return self.data_bytes + self.scale_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of a block that mean something."""
        return self.entries_per_block * self.bytes_per_entry

    @property
    def scale_offset(self) -> int:
        """Where a block's scale rows begin."""
        return self.entries_per_block * self.data_bytes

    @property
    def stride(self) -> int:
        """`block_stride` with its default filled in."""
        assert self.block_stride is not None, "block_stride is filled in on construction"
        return self.block_stride

    @property
    def dim(self) -> int:
        """`head_dim` with its default filled in."""
        assert self.head_dim is not None, "head_dim is filled in on construction"
        return self.head_dim

    def check_index(self) -> None:
        """Raise ValueError unless blocks of this schema can hold index keys."""
        if self.format == "fp8_ds_mla":
            raise ValueError("IndexerView: format 'fp8_ds_mla' holds KV entries, not index keys")
        if self.dim not in (64, 128):
            raise ValueError(f"IndexerView: head_dim must be 64 or 128, got {self.dim}")
        _check_index_block(self.entries_per_block)

    def check_kv(self) -> None:
        """Raise ValueError unless blocks of this schema can hold KV entries."""
        if self.format in _INDEX_ONLY:
            raise ValueError(f"KVView: format {self.format!r} holds index keys, not KV entries")

    def _check_head_dim(self) -> None:
        if self.format == "fp8_ds_mla" and self.head_dim != _KV_FP8_DIM:
            raise ValueError(f"CacheSchema: 'fp8_ds_mla' stores {_KV_FP8_DIM} dims, got head_dim={self.head_dim}")
        if self.format in _INDEX_ONLY and self.head_dim not in (64, 128):
            raise ValueError(f"CacheSchema: {self.format!r} stores 64 or 128 dims, got head_dim={self.head_dim}")
        if self.dim < 8 or self.dim % 8:
            raise ValueError(f"CacheSchema: head_dim must be a positive multiple of 8, got {self.head_dim}")

    def _check_entries_per_block(self) -> None:
        if self.format in _INDEX_ONLY:
            _check_index_block(self.entries_per_block)
        if self.entries_per_block < 1:
            raise ValueError(f"CacheSchema: entries_per_block must be at least 1, got {self.entries_per_block}")


def _check_index_block(entries_per_block: int) -> None:
    if entries_per_block % 16 or not 16 <= entries_per_block <= 256:
        raise ValueError(
            f"CacheSchema: entries_per_block of index keys must be a multiple of 16 in 16..256, got {entries_per_block}"
        )
