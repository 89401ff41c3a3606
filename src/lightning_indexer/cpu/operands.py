"""Queries and keys as matrix-product operands: mantissas that multiply exactly, and scales that are applied later.

The score is Σ_h w_h·max(0, <q_h, k>) and every scale is positive, so a query's scale moves into its weight and a
key's scale multiplies the finished score. What is left to multiply are small numbers: for mxfp4, the doubled E2M1
codes (-12 .. 12) shifted left by at most three binary places relative to the row's largest group. Where all groups of
a row lie within three binades, such a row is a row of int8, and an int8 product accumulated in int32 is exact. The
same row as fp32 gives the same integers, all below 2^24, in any order of summation; so which of the two is used may
depend on the neighbours without a bit of the result depending on it.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_indexer.cache.view import IndexerView
from lightning_indexer.formats import MXFP4_GROUP, UE8M0_BIAS, UE8M0_NAN, dequantize, ue8m0_decode
from lightning_indexer.query import QuantizedQuery

_INT_SHIFT = 3  # 12 << 3 = 96 fits int8
_UNIT = 2.0 ** -(1 + _INT_SHIFT)  # what mantissa 1 stands for, relative to the scale of the largest group
_DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)


@dataclass(frozen=True)
class Operand:
    """Rows whose values are `mantissa * scale`.

    mantissa: fp32 [..., D]. integers: the same numbers as int8, or None where they do not fit.
    scale: fp64 [...], or None for all ones.
    """

    mantissa: Tensor
    integers: Tensor | None
    scale: Tensor | None


def query_operand(q: Tensor | QuantizedQuery) -> Operand:
    """Queries [T, H, D] as an operand with a scale per (token, head)."""
    if not isinstance(q, QuantizedQuery):
        return Operand(_own(q.float()), None, None)
    if q.format == "mxfp4":
        return _mxfp4_operand(q.data.view(torch.uint8), q.scale_bytes())
    if q.format == "fp8":
        return Operand(_own(q.data.float()), None, None if q.scale is None else q.scale.double())
    values = dequantize(q.data.view(torch.uint8), q.scale_bytes(), q.format)
    return Operand(values, None, _global_scale(q.global_scale, values))


def key_operand(view: IndexerView, seq_id: int, start: int, stop: int) -> Operand:
    """Entries start..stop-1 of one sequence as an operand with a scale per entry."""
    data, scale = _read_rows(view, seq_id, start, stop)
    if view.schema.format == "mxfp4":
        return _mxfp4_operand(data, scale)
    if view.schema.format == "fp8":
        mantissa = data.contiguous().view(torch.float8_e4m3fn).float()
        return Operand(mantissa, None, scale.contiguous().view(torch.float32).squeeze(-1).double())
    values = dequantize(data, scale, view.schema.format)
    return Operand(values, None, _global_scale(view.global_scale, values))


def fold_weights(weights: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move query scales [T, H] into weights [T, H], keeping a power of two per row aside: the largest is then below 1.

    Returns:
        fp32 [T, H] weights and the fp64 [T] factor for the finished scores (None for all ones).
    """
    padded = torch.zeros(len(weights), -(-weights.shape[1] // 16) * 16, dtype=torch.float32, device="cpu")
    folded = padded[:, : weights.shape[1]]  # every row begins at a multiple of 64 bytes: same address, same bits
    if scale is None:
        return folded.copy_(weights), None
    product = weights.double() * scale
    largest = torch.where(torch.isfinite(product), product.abs(), 0.0).amax(-1)
    common = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)
    return folded.copy_(product / common.unsqueeze(-1)), common


@lru_cache(maxsize=1)
def has_exact_int8_matmul() -> bool:
    """Whether torch multiplies int8 into int32 exactly and fast here (some CPUs saturate in between, or crawl)."""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)() or not hasattr(torch, "_int_mm"):
        return False
    a = torch.full((32, 128), 96, dtype=torch.int8, device="cpu")
    product: Tensor = torch._int_mm(a, -a.t())
    return bool((product == -96 * 96 * 128).all())


def _mxfp4_operand(data: Tensor, scale: Tensor) -> Operand:
    codes = _doubled_codes(data)  # int8 [..., D]
    groups = codes.unflatten(-1, (-1, MXFP4_GROUP))
    exponent = scale[..., : groups.shape[-2]].to(torch.int16)
    top = exponent.amax(-1)
    drop = top.unsqueeze(-1) - exponent  # binades below the row's largest group
    if _largest(drop) > _INT_SHIFT:  # not counting groups of zeros, which fit at any exponent
        live = (groups != 0).any(-1) | (exponent == UE8M0_NAN)
        exponent = torch.where(live, exponent, 0)
        top = exponent.amax(-1)
        drop = torch.where(live, top.unsqueeze(-1) - exponent, 0)
    unit = ue8m0_decode(top).double() * _UNIT
    if has_exact_int8_matmul() and _largest(drop) <= _INT_SHIFT:
        integers = (groups << (_INT_SHIFT - drop).to(torch.int8).unsqueeze(-1)).flatten(-2)
        return Operand(integers.float(), integers, unit)
    factor = ue8m0_decode((UE8M0_BIAS + _INT_SHIFT - drop).clamp_min(0))
    return Operand((groups * factor.unsqueeze(-1)).flatten(-2), None, unit)


def _largest(values: Tensor) -> int:
    return int(values.max()) if values.numel() else 0


def _own(values: Tensor) -> Tensor:
    """A contiguous copy at an address of torch's choosing: a product's bits may depend on its operands' alignment."""
    return values.clone(memory_format=torch.contiguous_format)


def _doubled_codes(packed: Tensor) -> Tensor:
    """int8 [..., D]: twice the E2M1 values, two at a time by a table over the packed byte."""
    pairs = _PAIR_TABLE.index_select(0, packed.reshape(-1).int())  # int16, low byte = even dim
    return pairs.view(torch.int8).view(*packed.shape[:-1], -1)


def _pair_table() -> Tensor:
    doubled = torch.tensor(_DOUBLED_E2M1 + tuple(-v for v in _DOUBLED_E2M1), dtype=torch.int8, device="cpu")
    byte = torch.arange(256, device="cpu")
    return torch.stack((doubled[byte & 15], doubled[byte >> 4]), dim=-1).view(torch.int16).squeeze(-1)


_PAIR_TABLE = _pair_table()


def _read_rows(view: IndexerView, seq_id: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Data and scale rows [stop - start, bytes] of one sequence, whole blocks at a time."""
    per_block = view.schema.entries_per_block
    first = start // per_block
    blocks = view.block_table[seq_id, first : -(-stop // per_block)].clamp(0, max(view.num_blocks - 1, 0)).long()
    rows = slice(start - first * per_block, stop - first * per_block)
    return view.data_rows[blocks].flatten(0, 1)[rows], view.scale_rows[blocks].flatten(0, 1)[rows]


def _global_scale(global_scale: float, like: Tensor) -> Tensor | None:
    if global_scale == 1.0:
        return None
    return torch.full(like.shape[:-1], global_scale, dtype=torch.float64, device="cpu")
