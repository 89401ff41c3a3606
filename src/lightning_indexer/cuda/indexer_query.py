"""indexer_query on a GPU: rotations, quantisation and weights in one kernel (`kernels/indexer_query.cu`)."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cuda.compiler import Specialisation
from lightning_indexer.cuda.launcher import FLOAT32, INT32, INT64, POINTER, Kernel, device_arch, load_kernel
from lightning_indexer.cuda.operands import FLOAT_KINDS, INPUT_TYPES, lanes, readable, row_type
from lightning_indexer.formats import QUERY_FORMATS
from lightning_indexer.query import QuantizedQuery

PARAMETERS = {
    "q": POINTER,
    "token_stride": INT64,
    "head_stride": INT64,
    "num_heads": INT32,
    "positions": POINTER,
    "positions_are_int64": INT32,
    "frequencies": POINTER,
    "num_pairs": INT32,
    "weights": POINTER,
    "weights_type": INT32,
    "weight_scale": FLOAT32,
    "data": POINTER,
    "scale": POINTER,
    "weights_out": POINTER,
}
HEAD_DIMS = (64, 128)

_THREADS = 256
_TURN_BYTES = 8  # cos and sin of a channel pair
_PLAIN_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def indexer_query(
    q: Tensor,
    weights: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    format: str | None,
    rotate: bool,
    weight_scale: float,
) -> tuple[Tensor | QuantizedQuery, Tensor]:
    """The bytes that `rotary` and `quantize_query` give on a CPU.

    The arguments are those of `ops.indexer_query.indexer_query` and have been checked there. Runs on the current stream
    without waiting. Queries whose rows are not contiguous or not at multiples of 16 bytes are copied first.

    (Of values that are not finite, their place and their NaN scale agree; signs of NaN codes need not.)

    Raises:
        NotImplementedError: the GPU, or head_dim, is not one that the kernel serves.
    """
    num_tokens, num_heads, dim = q.shape
    if dim not in HEAD_DIMS:
        raise NotImplementedError(f"indexer_query: on a GPU head_dim must be one of {HEAD_DIMS}, got {dim}")
    data, scale = _outputs(q, format)
    scaled = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    if scaled.numel():
        q = readable(q)
        kernel, heads_per_cta = _kernel(_format(q.dtype, format), dim, q.dtype, rotate, q.device.index)
        weights, positions, frequencies = weights.contiguous(), positions.contiguous(), frequencies.contiguous()
        kernel.launch(
            (num_tokens * -(-num_heads // heads_per_cta), 1, 1),
            q.data_ptr(),
            q.stride(0) * q.element_size(),
            q.stride(1) * q.element_size(),
            num_heads,
            positions.data_ptr(),
            positions.dtype == torch.int64,
            frequencies.data_ptr(),
            len(frequencies),
            weights.data_ptr(),
            FLOAT_KINDS[weights.dtype],
            weight_scale,
            data.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            scaled.data_ptr(),
        )
    return (data if format is None else QuantizedQuery(format, data, scale)), scaled


def specialisation(format: str, dim: int, dtype: torch.dtype, rotate: bool, arch: str) -> Specialisation:
    """What is compiled for queries of `dtype` that become `format`: the dtype's own where nothing is quantised."""
    arguments = (row_type(format, dim), INPUT_TYPES[dtype], str(rotate).lower(), str(_heads_per_cta(format, dim)))
    return Specialisation("indexer_query.cu", "indexer_query", arguments, arch)


def specialisations(schema: CacheSchema, arch: str) -> Iterator[Specialisation]:
    """All that an indexer over keys of `schema` may need."""
    for dtype in INPUT_TYPES:
        format = _format(dtype, schema.format if schema.format in QUERY_FORMATS else None)
        for rotate in (False, True):
            yield specialisation(format, schema.dim, dtype, rotate, arch)


@functools.cache
def _kernel(format: str, dim: int, dtype: torch.dtype, rotate: bool, device_index: int) -> tuple[Kernel, int]:
    """The kernel, and how many heads a thread block of it takes."""
    wanted = specialisation(format, dim, dtype, rotate, device_arch(device_index))
    shared_bytes = dim // 2 * _TURN_BYTES
    kernel = load_kernel(wanted, device_index, PARAMETERS, threads=_THREADS, shared_bytes=shared_bytes)
    return kernel, _heads_per_cta(format, dim)


def _heads_per_cta(format: str, dim: int) -> int:
    return _THREADS // lanes(format, dim)


def _format(dtype: torch.dtype, format: str | None) -> str:
    return _PLAIN_FORMATS[dtype] if format is None else format


def _outputs(q: Tensor, format: str | None) -> tuple[Tensor, Tensor | None]:
    """Data and scale as `QuantizedQuery` holds them; without a format, a tensor like q."""
    num_tokens, num_heads, dim = q.shape
    if format is None:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device), None
    if format == "fp8":
        data = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
        return data, torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    schema = CacheSchema(format, head_dim=dim)
    data = torch.empty(num_tokens, num_heads, schema.data_bytes, dtype=torch.uint8, device=q.device)
    scale_dtype = torch.float8_e4m3fn if format == "nvfp4" else torch.uint8
    return data, torch.empty(num_tokens, num_heads, schema.scale_bytes, dtype=scale_dtype, device=q.device)
