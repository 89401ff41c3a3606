"""Indexer queries that are already quantised, in the layouts that engines hold."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer.checks import check_choice, check_tensor
from lightning_indexer.formats import MXFP4_GROUP, NVFP4_GROUP, QUERY_FORMATS, dequantize, quantize

_SCALE_ROW_BYTES = 4  # mxfp4 keeps four scale bytes per row at D=64 too


@dataclass(frozen=True, eq=False)
class QuantizedQuery:
    """Queries [T, H, D] as codes and scales.

    Args:
        format: "mxfp4", "nvfp4" or "fp8".
        data: "mxfp4"/"nvfp4": uint8 or int8 [T, H, D/2], low nibble = even dim. "fp8": float8_e4m3fn [T, H, D].
        scale: "mxfp4": UE8M0 as uint8 [T, H, 4], or the same four bytes packed in int32 [T, H].
            "nvfp4": float8_e4m3fn or uint8 [T, H, D/16]. "fp8": fp32 [T, H], or None where it is already folded into
            the weights (as vLLM and SGLang do).
        global_scale: "nvfp4" only, multiplies every value.
    """

    format: str
    data: Tensor
    scale: Tensor | None
    global_scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice("QuantizedQuery", "format", self.format, QUERY_FORMATS)
        if not 0 < self.global_scale < float("inf") or (self.global_scale != 1.0 and self.format != "nvfp4"):
            raise ValueError(
                f"QuantizedQuery: global_scale must be positive and finite, and 1.0 but for 'nvfp4', "
                f"got {self.global_scale} for {self.format!r}"
            )
        if self.format == "fp8":
            self._check_fp8()
        else:
            self._check_fp4()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, D)."""
        num_tokens, num_heads, width = self.data.shape
        return num_tokens, num_heads, width if self.format == "fp8" else 2 * width

    @property
    def device(self) -> torch.device:
        """Where the query lies."""
        return self.data.device

    def __getitem__(self, rows: slice | list[int]) -> "QuantizedQuery":
        """The queries of some tokens, as `q[rows]` gives them of a plain tensor: of a slice over the same memory."""
        scale = None if self.scale is None else self.scale[rows]
        return QuantizedQuery(self.format, self.data[rows], scale, self.global_scale)

    def scale_bytes(self) -> Tensor:
        """uint8 [T, H, scale bytes]: the scale rows as `formats.dequantize` reads them (FP4 formats)."""
        assert self.scale is not None, "only fp8 queries may come without a scale"
        if self.scale.dtype == torch.int32:
            return self.scale.contiguous().unsqueeze(-1).view(torch.uint8)
        return self.scale.view(torch.uint8)

    def dequantize(self) -> Tensor:
        """fp32 [T, H, D], exactly the values that the bytes stand for."""
        data = self.data.view(torch.uint8)
        if self.format == "fp8":
            values = self.data.float()
            return values if self.scale is None else values * self.scale.unsqueeze(-1)
        return dequantize(data, self.scale_bytes(), self.format, global_scale=self.global_scale)

    def _check_fp8(self) -> None:
        name = "QuantizedQuery"
        check_tensor(name, "data", self.data, dtype=torch.float8_e4m3fn, shape=("T", "H", "D"))
        if self.scale is not None:
            shape = self.data.shape[:2]
            check_tensor(name, "scale", self.scale, dtype=torch.float32, shape=shape, device=self.data.device)

    def _check_fp4(self) -> None:
        name = "QuantizedQuery"
        check_tensor(name, "data", self.data, dtype=(torch.uint8, torch.int8), shape=("T", "H", "D/2"))
        tokens, heads, width = self.data.shape
        if self.scale is None:
            raise TypeError(f"{name}: scale must be a torch.Tensor for format {self.format!r}, got None")
        if self.format == "nvfp4":
            dtypes = (torch.float8_e4m3fn, torch.uint8)
            shape: tuple[int, ...] = (tokens, heads, 2 * width // NVFP4_GROUP)
        elif self.scale.ndim == 2:
            dtypes, shape = (torch.int32, torch.int32), (tokens, heads)
        else:
            dtypes, shape = (torch.uint8, torch.float8_e8m0fnu), (tokens, heads, _SCALE_ROW_BYTES)
        check_tensor(name, "scale", self.scale, dtype=dtypes, shape=shape, device=self.data.device)


def quantize_query(q: Tensor, format: str, *, rounding: str = "nearest_even") -> QuantizedQuery:
    """Quantise queries for `score_topk`.

    Args:
        q: [T, H, D] floating point, D 64 or 128.
        format: "mxfp4" and "nvfp4" as the keys are quantised; "fp8" with one power-of-two fp32 scale per (token, head).
        rounding: FP4 ties, see `formats.quantize`.
    """
    check_choice("quantize_query", "format", format, QUERY_FORMATS)
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    check_tensor("quantize_query", "q", q, dtype=dtypes, shape=("T", "H", "D"))
    data, scale = quantize(q, format, rounding=rounding)
    if format == "fp8":
        return QuantizedQuery(format, data.view(torch.float8_e4m3fn), scale.view(torch.float32).squeeze(-1))
    return QuantizedQuery(format, data, scale.view(torch.float8_e4m3fn) if format == "nvfp4" else scale)


assert MXFP4_GROUP * _SCALE_ROW_BYTES == 128, "four scale bytes cover the largest head dim"
