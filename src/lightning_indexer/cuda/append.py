"""append_entries on a GPU: one kernel quantises and scatters (`kernels/append.cu`).

Bound by memory: entry bytes read + row bytes written + slot bytes, against the rate of a device-to-device copy, is what
`lightning-indexer bench --only append` reports.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import PagedView
from lightning_indexer.cuda.compiler import Specialisation
from lightning_indexer.cuda.launcher import FLOAT32, INT32, INT64, POINTER, Kernel, device_arch, load_kernel
from lightning_indexer.cuda.operands import INPUT_TYPES, block_type, check_storage, lanes, readable, row_type
from lightning_indexer.formats import ROUNDINGS

PARAMETERS = {
    "entries": POINTER,
    "entry_stride": INT64,
    "num_entries": INT64,
    "slots": POINTER,
    "slots_are_int64": INT32,
    "storage": POINTER,
    "block_stride": INT64,
    "num_slots": INT64,
    "global_scale": FLOAT32,
}
MAX_DIM = 2048  # of "bf16" and "fp32" entries: one thread block must hold one

_THREADS = 128
_TAME_EXPONENT = 40


def append_entries(entries: Tensor, view: PagedView, slots: Tensor, rounding: str) -> None:
    """Quantise entries to the view's format and write their rows, byte for byte as `formats.quantize` does on a CPU.

    The arguments are those of `ops.append.append_entries` and have been checked there. Runs on the current stream
    without waiting. Slots outside the storage are skipped. Entries whose rows are not contiguous or not at multiples of
    16 bytes are copied first.

    (A NaN that becomes bf16 is written as 0xFFFF; a CPU's own choice depends on its vector instructions.)

    Raises:
        NotImplementedError: the GPU, or the size of the entries, is not one that the kernel serves.
        ValueError: the storage does not start at a multiple of 16 bytes.
    """
    num_entries = entries.shape[0]
    if num_entries == 0 or view.num_blocks == 0:
        return
    storage = view.storage
    check_storage("append_entries", view)
    is_plain = entries.dtype == torch.bfloat16 and is_plain_global_scale(view.global_scale)
    kernel, entries_per_cta = _kernel(view.schema, entries.dtype, rounding, is_plain, storage.device.index)
    entries = readable(entries)
    if not slots.is_contiguous():
        slots = slots.contiguous()
    kernel.launch(
        (-(-num_entries // entries_per_cta), 1, 1),
        entries.data_ptr(),
        entries.stride(0) * entries.element_size(),
        num_entries,
        slots.data_ptr(),
        slots.dtype == torch.int64,
        storage.data_ptr(),
        view.schema.stride,
        view.num_blocks * view.schema.entries_per_block,
        view.global_scale,
    )


def is_plain_global_scale(global_scale: float) -> bool:
    """Whether a quotient by it is exact, so that "nvfp4" has a short way: a power of two far from the ends of fp32."""
    mantissa, exponent = math.frexp(global_scale)
    return mantissa == 0.5 and abs(exponent) <= _TAME_EXPONENT


def specialisation(
    schema: CacheSchema, dtype: torch.dtype, rounding: str, arch: str, *, is_plain: bool = False
) -> Specialisation:
    """What is compiled for entries of `dtype` going into blocks of `schema`.

    is_plain: of "nvfp4" from bf16, see `is_plain_global_scale`.
    """
    row, block = row_type(schema.format, schema.dim, rounding, is_plain=is_plain), block_type(schema)
    arguments = (row, INPUT_TYPES[dtype], block, str(_entries_per_cta(schema)))
    return Specialisation("append.cu", "append_entries", arguments, arch)


def specialisations(schema: CacheSchema, arch: str) -> Iterator[Specialisation]:
    """All that blocks of `schema` may need."""
    for dtype in INPUT_TYPES:
        for rounding in ROUNDINGS if schema.format in ("mxfp4", "nvfp4") else ROUNDINGS[:1]:
            for is_plain in (False, True) if (schema.format, dtype) == ("nvfp4", torch.bfloat16) else (False,):
                yield specialisation(schema, dtype, rounding, arch, is_plain=is_plain)


@functools.cache
def _kernel(
    schema: CacheSchema, dtype: torch.dtype, rounding: str, is_plain: bool, device_index: int
) -> tuple[Kernel, int]:
    """The kernel, and how many entries a thread block of it takes."""
    if schema.dim > MAX_DIM:
        raise NotImplementedError(f"append_entries: on a GPU head_dim must be at most {MAX_DIM}, got {schema.dim}")
    wanted = specialisation(schema, dtype, rounding, device_arch(device_index), is_plain=is_plain)
    entries_per_cta = _entries_per_cta(schema)
    threads = entries_per_cta * lanes(schema.format, schema.dim)
    return load_kernel(wanted, device_index, PARAMETERS, threads=threads), entries_per_cta


def _entries_per_cta(schema: CacheSchema) -> int:
    return max(_THREADS // lanes(schema.format, schema.dim), 1)
