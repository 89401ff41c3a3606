"""Numeric formats of the caches: E2M1, E4M3 and UE8M0 codes, and the rows that entries are stored as.

A cached entry is two rows of bytes: a *data* row (the codes) and a *scale* row (what to multiply them by).
`quantize` makes both rows from real numbers and `dequantize` reads them back; where the rows lie in a block is
the business of `cache/schema.py`.

    format        data row                             scale row                 value
    "mxfp4"       packed E2M1, low nibble = even dim   UE8M0 per 32 dims         code * 2^(byte - 127)
    "nvfp4"       packed E2M1, low nibble = even dim   E4M3 per 16 dims          code * scale * global_scale
    "fp8"         E4M3                                 one fp32                  code * scale
    "bf16"        bf16                                 none                      value
    "fp8_ds_mla"  448 E4M3, then 64 bf16 (RoPE dims)   7 UE8M0 per 64 dims, pad  code * 2^(byte - 127); bf16 as is
    "fp32"        fp32                                 none                      value (no engine writes it: the exact
                                                                                route for comparing with an fp32 model)

Non-finite input makes the whole scale group NaN, so that it stays visible.
"""

import functools

import torch
from torch import Tensor

INDEX_FORMATS = ("mxfp4", "nvfp4", "fp8", "bf16", "fp32")
KV_FORMATS = ("fp8_ds_mla", "bf16", "fp32")
QUERY_FORMATS = ("mxfp4", "nvfp4", "fp8")
ROUNDINGS = ("nearest_even", "toward_zero")

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # smallest subnormal
UE8M0_BIAS = 127
UE8M0_NAN = 255

MXFP4_GROUP = 32
NVFP4_GROUP = 16
MLA_GROUP = 64
FP8_BLOCK = 128  # of a weight, both ways
V41_FP8_BLOCK = 32
MLA_FP8_DIMS = 448
MLA_ROPE_DIMS = 64
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = {"nearest_even": E2M1_MAX * 2.0**-126, "toward_zero": 1e-4}


def quantize(
    x: Tensor, format: str, *, rounding: str = "nearest_even", global_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Turn entries into the bytes of their data and scale rows.

    Args:
        x: [..., D] floating point, one entry per last dim. D is 64 or 128 for index formats, 512 for "fp8_ds_mla".
        format: one of INDEX_FORMATS or KV_FORMATS.
        rounding: FP4 only. "nearest_even": ties to even, scale floor 6*2^-126, sign of zero kept (official, vLLM).
            "toward_zero": ties toward zero, amax floor 1e-4, zero always +0 (DeepGEMM's and SGLang's writers).
        global_scale: "nvfp4" only, positive, multiplies every stored value.
    Returns:
        data, scale: uint8 [..., data bytes] and [..., scale bytes]; the scale row is empty for "bf16" and "fp32".
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"quantize: rounding must be one of {ROUNDINGS}, got {rounding!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
        came = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantize: x must be a floating point tensor [..., D], got {came}")
    if not 0 < global_scale < float("inf"):
        raise ValueError(f"quantize: global_scale must be positive and finite, got {global_scale}")
    check_entry_dim(format, x.shape[-1])
    if format in ("bf16", "fp32"):
        dtype = torch.bfloat16 if format == "bf16" else torch.float32
        data = _as_bytes(x.to(dtype))
        return data, data.new_empty((*x.shape[:-1], 0))
    x = x.float()
    if format == "mxfp4":
        return _quantize_mxfp4(x, rounding)
    if format == "nvfp4":
        return _quantize_nvfp4(x, rounding, global_scale)
    if format == "fp8":
        scale = ue8m0_decode(_fp8_scale_byte(x.abs().amax(-1, keepdim=True)))
        return e4m3_encode(x / scale).view(torch.uint8), _as_bytes(scale)
    return _quantize_fp8_ds_mla(x)


def dequantize(data: Tensor, scale: Tensor, format: str, *, global_scale: float = 1.0) -> Tensor:
    """Read data and scale rows back: fp32 [..., D], exactly the values that the bytes stand for.

    Args:
        data, scale: uint8 rows as `quantize` returns them (any strides; `scale` may carry trailing pad bytes).
    """
    if format in ("bf16", "fp32"):
        return _reinterpret(data, torch.bfloat16 if format == "bf16" else torch.float32).float()
    if format == "mxfp4":
        codes = e2m1_decode(unpack_nibbles(data))
        groups = codes.shape[-1] // MXFP4_GROUP
        return _scale_groups(codes, ue8m0_decode(scale[..., :groups]), MXFP4_GROUP)
    if format == "nvfp4":
        codes = e2m1_decode(unpack_nibbles(data))
        groups = codes.shape[-1] // NVFP4_GROUP
        scales = _reinterpret(scale[..., :groups], torch.float8_e4m3fn).float()
        # code * scale has at most six significant bits, so only the product with global_scale can round
        return _scale_groups(codes, scales, NVFP4_GROUP) * global_scale
    if format == "fp8":
        return _reinterpret(data, torch.float8_e4m3fn).float() * _reinterpret(scale[..., :4], torch.float32)
    if format == "fp8_ds_mla":
        codes = _reinterpret(data[..., :MLA_FP8_DIMS], torch.float8_e4m3fn).float()
        nope = _scale_groups(codes, ue8m0_decode(scale[..., : MLA_FP8_DIMS // MLA_GROUP]), MLA_GROUP)
        rope = _reinterpret(data[..., MLA_FP8_DIMS:], torch.bfloat16).float()
        return torch.cat([nope, rope], dim=-1)
    raise ValueError(f"dequantize: format must be one of {_all_formats()}, got {format!r}")


def dequantize_block_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype, *, block_size: int = FP8_BLOCK) -> Tensor:
    """Multiply out an FP8 weight: W[i, j] = code[i, j] * scale[i // block_size, j // block_size].

    In fp32, rounded once to `dtype`.

    Args:
        weight: [out, in] float8_e4m3fn.
        scale: [ceil(out / block_size), ceil(in / block_size)] float8_e8m0fnu or float32.
        block_size: 128, or 32 in V4.1.
    """
    result = torch.empty_like(weight, dtype=dtype)
    for block, row_scale in enumerate(scale.float()):  # one row of blocks at a time keeps the fp32 copy small
        rows = slice(block * block_size, (block + 1) * block_size)
        result[rows] = (weight[rows].float() * row_scale.repeat_interleave(block_size)[: weight.shape[1]]).to(dtype)
    return result


def fake_quantize(x: Tensor, format: str, *, rounding: str = "nearest_even") -> Tensor:
    """Round x to the values that `format` can hold and keep its dtype and shape."""
    data, scale = quantize(x, format, rounding=rounding)
    return dequantize(data, scale, format).to(x.dtype)


def check_entry_dim(format: str, dim: int) -> None:
    """Raise ValueError unless entries of `dim` values can be stored in `format`."""
    if format not in _all_formats():
        raise ValueError(f"format must be one of {_all_formats()}, got {format!r}")
    if format == "fp8_ds_mla" and dim != MLA_FP8_DIMS + MLA_ROPE_DIMS:
        raise ValueError(f"format 'fp8_ds_mla' stores {MLA_FP8_DIMS + MLA_ROPE_DIMS} dims, got {dim}")
    if format in QUERY_FORMATS and dim not in (64, 128):
        raise ValueError(f"format {format!r} stores 64 or 128 dims, got {dim}")


# --- E2M1 -----------------------------------------------------------------------------------------------------


def e2m1_encode(x: Tensor, *, rounding: str = "nearest_even") -> Tensor:
    """4-bit codes (uint8, 0..15, bit 3 = sign) of x, saturating at 6. NaN gives code 0: its scale must carry it."""
    bounds = _constants(_E2M1_BOUNDS[rounding], x.device)
    magnitude = x.float().abs().nan_to_num(0.0, posinf=E2M1_MAX).contiguous()
    code = torch.bucketize(magnitude, bounds, out_int32=True).to(torch.uint8)
    sign = torch.signbit(x)
    if rounding == "toward_zero":
        sign = sign & (code > 0)
    return code | (sign.to(torch.uint8) << 3)


def e2m1_decode(codes: Tensor) -> Tensor:
    """fp32 values of 4-bit codes (uint8, 0..15)."""
    return _constants(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), codes.device)[codes.int()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., D] codes -> uint8 [..., D/2]; the even dim takes the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., D/2] -> uint8 [..., D] codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _tie_bounds(rounding: str) -> tuple[float, ...]:
    """Largest float that still rounds down at each midpoint: a code is the number of bounds below |x|."""
    bounds = []
    for code, (low, high) in enumerate(zip(E2M1_VALUES, E2M1_VALUES[1:], strict=False)):
        midpoint = torch.tensor((low + high) / 2, dtype=torch.float32, device="cpu")
        if rounding == "nearest_even" and code % 2 == 1:  # the upper neighbour is even: the tie goes up
            midpoint = torch.nextafter(midpoint, torch.zeros_like(midpoint))
        bounds.append(midpoint.item())
    return tuple(bounds)


_E2M1_BOUNDS = {rounding: _tie_bounds(rounding) for rounding in ROUNDINGS}


@functools.cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32 numbers on a device, put there once: each time would wait for it."""
    return torch.tensor(values, dtype=torch.float32, device=device)


# --- E4M3 and UE8M0 -------------------------------------------------------------------------------------------


def e4m3_encode(x: Tensor) -> Tensor:
    """float8_e4m3fn of x, round to nearest even, saturating at 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def ue8m0_encode(scale: Tensor) -> Tensor:
    """uint8 exponent byte of the smallest power of two >= scale (fp32, non-negative); NaN and inf give 255.

    Zero gives byte 0 (2^-127); any other subnormal gives byte 1 (2^-126), as the official bit trick does.
    """
    bits = scale.float().contiguous().view(torch.int32)
    byte = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0)
    return torch.where(torch.isfinite(scale), byte, UE8M0_NAN).to(torch.uint8)


def ue8m0_decode(byte: Tensor) -> Tensor:
    """fp32 2^(byte - 127); byte 0 is the subnormal 2^-127 and byte 255 is NaN."""
    exponent = byte.to(torch.int32)
    bits = torch.where(exponent == 0, 1 << 22, exponent << 23)
    return torch.where(exponent == UE8M0_NAN, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


# --- rows -----------------------------------------------------------------------------------------------------


def _quantize_mxfp4(x: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (-1, MXFP4_GROUP))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(FP4_AMAX_FLOOR[rounding])
    byte = ue8m0_encode(amax * (1 / E2M1_MAX))
    codes = e2m1_encode(groups / ue8m0_decode(byte), rounding=rounding).flatten(-2)
    scale = byte.squeeze(-1)
    pad = 4 - scale.shape[-1]  # D=64 keeps the four scale bytes of D=128; the two unused ones hold 1.0
    return pack_nibbles(codes), torch.nn.functional.pad(scale, (0, pad), value=UE8M0_BIAS)


def _quantize_nvfp4(x: Tensor, rounding: str, global_scale: float) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (-1, NVFP4_GROUP))
    # tensors, because on a GPU torch divides by a number as a product with its inverse, which rounds otherwise
    factor, largest = (x.new_full((), value) for value in (global_scale, E2M1_MAX))
    amax = groups.abs().amax(-1, keepdim=True) / factor
    amax = torch.where(torch.isfinite(amax), amax.clamp(E2M1_MAX * E4M3_TINY, E2M1_MAX * E4M3_MAX), torch.nan)
    scale = (amax / largest).to(torch.float8_e4m3fn)
    codes = e2m1_encode(groups / (scale.float() * global_scale), rounding=rounding).flatten(-2)
    return pack_nibbles(codes), scale.squeeze(-1).view(torch.uint8)


def _quantize_fp8_ds_mla(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x[..., :MLA_FP8_DIMS].unflatten(-1, (-1, MLA_GROUP))
    byte = _fp8_scale_byte(groups.abs().amax(-1, keepdim=True))
    codes = e4m3_encode(groups / ue8m0_decode(byte)).flatten(-2).view(torch.uint8)
    rope = _as_bytes(x[..., MLA_FP8_DIMS:].to(torch.bfloat16))
    return torch.cat([codes, rope], dim=-1), torch.nn.functional.pad(byte.squeeze(-1), (0, 1))


def _fp8_scale_byte(amax: Tensor) -> Tensor:
    return ue8m0_encode(amax.clamp_min(FP8_AMAX_FLOOR) * (1 / E4M3_MAX))


def _scale_groups(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    grouped: Tensor = codes.unflatten(-1, (-1, group))
    return (grouped * scales.unsqueeze(-1)).flatten(-2)


def _reinterpret(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., n] as values [..., n / itemsize], from any strides and addresses."""
    if rows.numel() == 0:  # torch gives empty tensors strides that it then refuses to view
        return rows.new_empty((*rows.shape[:-1], rows.shape[-1] // dtype.itemsize), dtype=dtype)
    rows = rows.contiguous()
    return (rows.clone() if rows.storage_offset() % dtype.itemsize else rows).view(dtype)


def _as_bytes(values: Tensor) -> Tensor:
    """Values [..., n] as bytes [..., n * itemsize]."""
    if values.numel() == 0:
        return values.new_empty((*values.shape[:-1], values.shape[-1] * values.itemsize), dtype=torch.uint8)
    return values.contiguous().view(torch.uint8)


def _all_formats() -> tuple[str, ...]:
    return tuple(dict.fromkeys(INDEX_FORMATS + KV_FORMATS))
