"""How tensors and cache layouts are handed to kernels."""

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import PagedView

ALIGNMENT = 16  # bytes; kernels read and write in such pieces
INPUT_TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16", torch.float32: "Float32"}
FLOAT_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `Floats` of kernels/memory.cuh

_VALUES_PER_LANE = {"mxfp4": 16, "nvfp4": 16, "fp8": 16, "fp8_ds_mla": 16, "bf16": 8, "fp16": 8, "fp32": 8}
_ROUNDINGS = {"nearest_even": "Rounding::kNearestEven", "toward_zero": "Rounding::kTowardZero"}


def row_type(format: str, dim: int, rounding: str = "nearest_even", *, is_plain: bool = False) -> str:
    """Which writer of rows (kernels/formats.cuh) `format` has: "Mxfp4<128, Rounding::kNearestEven>".

    is_plain: of "nvfp4" from bf16, see `append.is_plain_global_scale`.
    """
    if format == "fp8_ds_mla":
        return "Fp8DsMla"
    options = f", {_ROUNDINGS[rounding]}" if format in ("mxfp4", "nvfp4") else ""
    options += f", {str(is_plain).lower()}" if format == "nvfp4" else ""
    return f"{format.capitalize()}<{dim}{options}>"


def lanes(format: str, dim: int) -> int:
    """How many threads hold a row while it is written."""
    return dim // _VALUES_PER_LANE[format]


def block_type(schema: CacheSchema) -> str:
    """`Block<...>` of kernels/memory.cuh. The distance between blocks is not in it: that stays a run-time argument."""
    numbers = (schema.entries_per_block, schema.data_bytes, schema.scale_bytes, schema.scale_offset)
    return f"Block<{', '.join(str(number) for number in numbers)}>"


def readable(x: Tensor) -> Tensor:
    """x, or a copy of it, with contiguous rows of its last dimension at multiples of ALIGNMENT bytes."""
    *strides, last = x.stride()
    size = x.element_size()
    if last == 1 and x.data_ptr() % ALIGNMENT == 0 and not any(stride * size % ALIGNMENT for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def check_storage(op: str, view: PagedView) -> None:
    """Raise ValueError unless the kernels can read the storage in whole pieces."""
    address = view.storage.data_ptr()
    if address % ALIGNMENT:
        raise ValueError(
            f"{op}: on a GPU storage must start at a multiple of {ALIGNMENT} bytes, got address {address:#x}"
        )
