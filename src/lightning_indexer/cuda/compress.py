"""compress_entries on a GPU: one kernel for the entries, one for the ring of tokens (`kernels/compress.cu`)."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.step import Step
from lightning_indexer.cache.view import PagedView
from lightning_indexer.cuda.compiler import Specialisation
from lightning_indexer.cuda.launcher import FLOAT32, INT32, INT64, POINTER, Kernel, device_arch, load_kernel
from lightning_indexer.cuda.operands import (
    FLOAT_KINDS,
    INPUT_TYPES,
    block_type,
    check_storage,
    readable,
    row_type,
)

_TOKENS = {
    "values": POINTER,
    "value_stride": INT64,
    "gates": POINTER,
    "gate_stride": INT64,
    "ape": POINTER,
    "ring": POINTER,
}
ENTRY_PARAMETERS = {
    **_TOKENS,
    "norm": POINTER,
    "norm_type": INT32,
    "eps": FLOAT32,
    "frequencies": POINTER,
    "num_pairs": INT32,
    **dict.fromkeys(("seqs", "starts", "offsets", "entry_rows", "entry_indices", "slots"), POINTER),
    "slots_are_int64": INT32,
    "storage": POINTER,
    "block_stride": INT64,
    "num_slots": INT64,
    "global_scale": FLOAT32,
}
KEEP_PARAMETERS = {
    **_TOKENS,
    **dict.fromkeys(("batch_rows", "seqs", "starts", "offsets"), POINTER),
    "num_tokens": INT32,
    "num_seqs": INT32,
}
DIMS = (64, 128, 512)
HADAMARD_DIMS = (64, 128)
WINDOWS = {4: 2, 128: 1}  # that an entry pools, by compress_ratio

_MOST_RUN_SLOTS, _CHANNELS_OF_LONG_RUNS, _WARP = 32, 4, 32  # as in the kernel
_KEEP_THREADS = 128


def compress_entries(
    values: Tensor,
    gates: Tensor,
    step: Step,
    ring: Tensor,
    view: PagedView,
    slots: Tensor,
    *,
    ape: Tensor,
    norm: Tensor,
    frequencies: Tensor,
    eps: float,
    rotate: bool,
    dtype: torch.dtype,
) -> None:
    """Write the rows of the entries that the step completes, then the step's tokens into the ring [seqs, size, 2, C].

    The arguments are those of `ops.compress.compress_entries` and have been checked there. Runs on the current stream
    without waiting. The bytes are those of the torch path, with the exceptions that `append_entries` makes for NaN.

    Raises:
        NotImplementedError: the GPU, or the size of the entries, is not one that the kernels serve.
        ValueError: the storage does not start at a multiple of 16 bytes.
    """
    dim, compress_ratio = view.schema.dim, len(ape)
    if dim not in DIMS or (rotate and dim not in HADAMARD_DIMS):
        dims = HADAMARD_DIMS if rotate else DIMS
        with_it = " with the Hadamard rotation" if rotate else ""
        raise NotImplementedError(f"compress_entries: on a GPU entries{with_it} must have {dims} dims, got {dim}")
    if WINDOWS.get(compress_ratio, 0) * dim != ape.shape[1]:
        raise NotImplementedError(
            f"compress_entries: on a GPU ape must be [4, {2 * dim}] or [128, {dim}] for entries of {dim} dims, "
            f"got {list(ape.shape)}"
        )
    check_storage("compress_entries", view)
    if len(values) == 0:
        return
    values, gates, ape, slots = (
        readable(values),
        readable(gates),
        readable(ape.float()).contiguous(),
        slots.contiguous(),
    )
    tokens = (
        values.data_ptr(),
        values.stride(0),
        gates.data_ptr(),
        gates.stride(0),
        ape.data_ptr(),
        ring.data_ptr(),
    )
    sequences = (step.seqs.data_ptr(), step.starts.data_ptr(), step.offsets.data_ptr())
    device_index = ring.device.index
    if len(slots) and view.num_blocks:
        norm, frequencies = norm.contiguous(), frequencies.contiguous()
        _kernel(view.schema, dtype, compress_ratio, rotate, device_index).launch(
            (len(slots), 1, 1),
            *tokens,
            norm.data_ptr(),
            FLOAT_KINDS[norm.dtype],
            eps,
            frequencies.data_ptr(),
            len(frequencies),
            *sequences,
            step.entry_rows.data_ptr(),
            step.entry_indices.data_ptr(),
            slots.data_ptr(),
            slots.dtype == torch.int64,
            view.storage.data_ptr(),
            view.schema.stride,
            view.num_blocks * view.schema.entries_per_block,
            view.global_scale,
        )
    _keep_kernel(dim, compress_ratio, device_index).launch(
        (len(values), 1, 1), *tokens, step.batch_rows.data_ptr(), *sequences, len(values), len(step.seqs)
    )


def specialisation(
    schema: CacheSchema, dtype: torch.dtype, compress_ratio: int, rotate: bool, arch: str
) -> Specialisation:
    """What is compiled for entries that are rounded to `dtype` on their way into blocks of `schema`."""
    arguments = (
        row_type(schema.format, schema.dim),
        INPUT_TYPES[dtype],
        block_type(schema),
        _pooling(schema.dim, compress_ratio),
        str(rotate).lower(),
        str(_shared_bytes(schema.dim, compress_ratio)),
    )
    return Specialisation("compress.cu", "compress_entries", arguments, arch)


def keep_specialisation(dim: int, compress_ratio: int, arch: str) -> Specialisation:
    """What is compiled for the ring of a compressor."""
    return Specialisation("compress.cu", "keep_tokens", (_pooling(dim, compress_ratio), str(_KEEP_THREADS)), arch)


def index_specialisations(schema: CacheSchema, arch: str) -> Iterator[Specialisation]:
    """All that index keys in blocks of `schema` may need."""
    for dtype in INPUT_TYPES:
        for rotate in (False, True):
            yield specialisation(schema, dtype, 4, rotate, arch)
    yield keep_specialisation(schema.dim, 4, arch)


def kv_specialisations(schema: CacheSchema, arch: str) -> Iterator[Specialisation]:
    """All that KV entries in blocks of `schema` may need."""
    for compress_ratio in WINDOWS if schema.dim in DIMS else ():
        for dtype in INPUT_TYPES:
            yield specialisation(schema, dtype, compress_ratio, False, arch)
        yield keep_specialisation(schema.dim, compress_ratio, arch)


@functools.cache
def _kernel(schema: CacheSchema, dtype: torch.dtype, compress_ratio: int, rotate: bool, device_index: int) -> Kernel:
    wanted = specialisation(schema, dtype, compress_ratio, rotate, device_arch(device_index))
    groups, group_threads = _groups(schema.dim, compress_ratio)
    shared_bytes = _shared_bytes(schema.dim, compress_ratio)
    return load_kernel(
        wanted, device_index, ENTRY_PARAMETERS, threads=groups * group_threads, shared_bytes=shared_bytes
    )


@functools.cache
def _keep_kernel(dim: int, compress_ratio: int, device_index: int) -> Kernel:
    wanted = keep_specialisation(dim, compress_ratio, device_arch(device_index))
    return load_kernel(wanted, device_index, KEEP_PARAMETERS, threads=_KEEP_THREADS)


def _pooling(dim: int, compress_ratio: int) -> str:
    return f"Pooling<{dim}, {compress_ratio}, {WINDOWS[compress_ratio]}>"


def _groups(dim: int, compress_ratio: int) -> tuple[int, int]:
    """Groups of threads that share out the slots of an entry, and threads of a group: `Pooling`."""
    slots = WINDOWS[compress_ratio] * compress_ratio
    groups = max(slots // _MOST_RUN_SLOTS, 1)
    return groups, max(dim // (_CHANNELS_OF_LONG_RUNS if groups > 1 else 1), _WARP)


def _shared_bytes(dim: int, compress_ratio: int) -> int:
    """Of `PoolShared`: turns, largest gates, two sums, squares, the entry."""
    groups, group_threads = _groups(dim, compress_ratio)
    return dim // 2 * 8 + 3 * groups * dim * 4 + group_threads // _WARP * 4 + dim * 4
