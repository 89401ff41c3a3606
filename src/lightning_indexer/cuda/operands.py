"""How tensors and cache layouts are handed to kernels."""

import torch

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import PagedView

ALIGNMENT = 16  # bytes; kernels read and write in such pieces
INPUT_TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "Float32"}


def block_type(schema: CacheSchema) -> str:
    """`Block<...>` of kernels/memory.cuh. The distance between blocks is not in it: that stays a run-time argument."""
    numbers = (schema.entries_per_block, schema.data_bytes, schema.scale_bytes, schema.scale_offset)
    return f"Block<{', '.join(str(number) for number in numbers)}>"


def check_storage(op: str, view: PagedView) -> None:
    """Raise ValueError unless the kernels can read the storage in whole pieces."""
    address = view.storage.data_ptr()
    if address % ALIGNMENT:
        raise ValueError(
            f"{op}: on a GPU storage must start at a multiple of {ALIGNMENT} bytes, got address {address:#x}"
        )
