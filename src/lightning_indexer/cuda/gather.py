"""gather_kv on a GPU: selected KV entries to dense rows (`kernels/gather.cu`).

To time it: random distinct indices over a pool well beyond the L2 cache, CUDA-graph replay or events around many calls,
and compare (entry bytes read + row bytes written + index bytes) / time with a device-to-device copy of as many bytes.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import KVView
from lightning_indexer.cuda.compiler import Specialisation
from lightning_indexer.cuda.launcher import INT32, INT64, POINTER, Kernel, device_arch, load_kernel
from lightning_indexer.cuda.operands import ALIGNMENT, block_type, check_storage

PARAMETERS = {
    "storage": POINTER,
    "block_stride": INT64,
    "num_blocks": INT32,
    "block_table": POINTER,
    "table_row_stride": INT64,
    "table_column_stride": INT64,
    "num_seqs": INT64,
    "max_entries": INT64,
    "seq_ids": POINTER,
    "seq_ids_are_int64": INT32,
    "indices": POINTER,
    "indices_are_int64": INT32,
    "out": POINTER,
    "out_token_stride": INT64,
    "out_row_stride": INT64,
    "num_tokens": INT32,
    "top_k": INT32,
}
MAX_ROWS = 2**31 - 1  # of `out`

_WARPS = 4
_ROWS_PER_CTA = _WARPS * 4  # kBatch rows per warp


def gather_kv(view: KVView, seq_ids: Tensor | None, indices: Tensor, out: Tensor) -> None:
    """Write entries `indices[t, j]` of sequence `seq_ids[t]` to `out[t, j]`; negative indices give zeros.

    The arguments are those of `ops.gather_kv.gather_kv` and have been checked there; seq_ids None means that query t
    uses row t of the block table. Runs on the current stream without waiting. What lies out of range is clamped.

    Raises:
        NotImplementedError: the GPU is too old, or `out` has more rows than one launch takes.
        ValueError: the storage, or a row of `out`, does not start at a multiple of 16 bytes.
    """
    num_tokens, top_k = indices.shape
    if out.numel() == 0:
        return
    if num_tokens * top_k > MAX_ROWS:
        raise NotImplementedError(
            f"gather_kv: on a GPU out must have at most {MAX_ROWS} rows, got {num_tokens * top_k}"
        )
    check_storage("gather_kv", view)
    storage, table = view.storage, view.block_table
    token_stride, row_stride = _out_strides(out)
    if not indices.is_contiguous():
        indices = indices.contiguous()
    if seq_ids is not None and not seq_ids.is_contiguous():
        seq_ids = seq_ids.contiguous()
    is_empty = view.num_blocks == 0 or view.num_seqs == 0
    _kernel(view.schema, storage.device.index).launch(
        (-(-num_tokens * top_k // _ROWS_PER_CTA), 1, 1),
        storage.data_ptr(),
        view.schema.stride,
        view.num_blocks,
        table.data_ptr(),
        table.stride(0),
        table.stride(1),
        view.num_seqs,
        0 if is_empty else view.max_entries,
        0 if seq_ids is None else seq_ids.data_ptr(),
        seq_ids is not None and seq_ids.dtype == torch.int64,
        indices.data_ptr(),
        indices.dtype == torch.int64,
        out.data_ptr(),
        token_stride,
        row_stride,
        num_tokens,
        top_k,
    )


def specialisation(schema: CacheSchema, arch: str) -> Specialisation:
    """What is compiled for blocks of `schema`."""
    arguments = (_row_type(schema), block_type(schema), str(_WARPS))
    return Specialisation("gather.cu", "gather_kv", arguments, arch)


def specialisations(schema: CacheSchema, arch: str) -> Iterator[Specialisation]:
    """All that blocks of `schema` may need."""
    yield specialisation(schema, arch)


@functools.cache
def _kernel(schema: CacheSchema, device_index: int) -> Kernel:
    wanted = specialisation(schema, device_arch(device_index))
    return load_kernel(wanted, device_index, PARAMETERS, threads=32 * _WARPS)


def _row_type(schema: CacheSchema) -> str:
    return "Fp8DsMlaRow" if schema.format == "fp8_ds_mla" else f"PlainRow<{schema.data_bytes}>"


def _out_strides(out: Tensor) -> tuple[int, int]:
    """Bytes from token to token and from row to row."""
    token_stride, row_stride = (out.stride(i) * out.element_size() if out.shape[i] > 1 else 0 for i in range(2))
    if out.stride(2) != 1 or (out.data_ptr() | token_stride | row_stride) % ALIGNMENT:
        raise ValueError(
            f"gather_kv: on a GPU rows of out must be contiguous and start at multiples of {ALIGNMENT} bytes, got "
            f"strides {out.stride()} at address {out.data_ptr():#x}"
        )
    return token_stride, row_stride
