"""merge_topk on a GPU: candidates to keys, and the best of several shards' keys (`kernels/candidates.cu`)."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_indexer.cuda.compiler import Specialisation
from lightning_indexer.cuda.launcher import INT32, INT64, POINTER, Kernel, device_arch, load_kernel

PACK_PARAMETERS = {
    "indices": POINTER,
    "index_row_stride": INT64,
    "index_column_stride": INT64,
    "scores": POINTER,
    "score_row_stride": INT64,
    "score_column_stride": INT64,
    "keys": POINTER,
    "count": INT64,
    "width": INT32,
}
MERGE_PARAMETERS = {
    "keys": POINTER,
    "shards": INT32,
    "rows": INT32,
    "width": INT32,
    "top_k": INT32,
    "out": POINTER,
    "out_row_stride": INT64,
    "out_column_stride": INT64,
    "scores_out": POINTER,
    "scores_row_stride": INT64,
    "scores_column_stride": INT64,
}
MAX_TOP_K = 4096

_PACK_THREADS = 256
_MERGE_THREADS = 512
# With two lists of so many keys a block fits the 99 KiB of sm_86 and sm_89; eight shards' 512 need one pass.
_CAPACITY = 11 * _MERGE_THREADS
_SCRATCH_BYTES = 4096  # `Team::Scratch` and what stands beside it, and a margin


def check_top_k(op: str, top_k: int) -> None:
    if top_k > MAX_TOP_K:
        raise NotImplementedError(
            f"{op}: on a GPU top_k must be at most {MAX_TOP_K}, got {top_k} (impl='reference' serves it)"
        )


def pack_candidates(indices: Tensor, scores: Tensor) -> Tensor:
    """int64 [T, C] keys of `selection.candidate_keys`, EMPTY where an index is negative; indices int32, scores fp32."""
    keys = torch.empty(indices.shape, dtype=torch.int64, device=indices.device)
    if keys.numel() == 0:
        return keys
    _kernel("pack_candidates", indices.device.index).launch(
        (-(-keys.numel() // _PACK_THREADS), 1, 1),
        indices.data_ptr(),
        indices.stride(0),
        indices.stride(1),
        scores.data_ptr(),
        scores.stride(0),
        scores.stride(1),
        keys.data_ptr(),
        keys.numel(),
        keys.shape[1],
    )
    return keys


def merge_candidates(keys: Tensor, out: Tensor, scores_out: Tensor) -> None:
    """Write the best of int64 keys [shards, T, C] (contiguous), best first, to `out` and `scores_out` [T, top_k]."""
    shards, num_tokens, width = keys.shape
    if num_tokens == 0:
        return
    assert keys.is_contiguous(), "made here or by the exchange"
    _kernel("merge_candidates", keys.device.index).launch(
        (num_tokens, 1, 1),
        keys.data_ptr(),
        shards,
        num_tokens,
        width,
        out.shape[1],
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        scores_out.data_ptr(),
        scores_out.stride(0),
        scores_out.stride(1),
    )


def specialisation(kernel: str, arch: str) -> Specialisation:
    """One of the two kernels."""
    sizes = {
        "pack_candidates": (_PACK_THREADS,),
        "merge_candidates": (_CAPACITY, MAX_TOP_K, _MERGE_THREADS),
    }
    return Specialisation("candidates.cu", kernel, tuple(map(str, sizes[kernel])), arch)


def specialisations(arch: str) -> Iterator[Specialisation]:
    """Both."""
    yield specialisation("pack_candidates", arch)
    yield specialisation("merge_candidates", arch)


@functools.cache
def _kernel(name: str, device_index: int) -> Kernel:
    wanted = specialisation(name, device_arch(device_index))
    if name == "pack_candidates":
        return load_kernel(wanted, device_index, PACK_PARAMETERS, threads=_PACK_THREADS)
    shared_bytes = 2 * 8 * _CAPACITY + _SCRATCH_BYTES
    return load_kernel(wanted, device_index, MERGE_PARAMETERS, threads=_MERGE_THREADS, shared_bytes=shared_bytes)
