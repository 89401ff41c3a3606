"""indexer_query on a CPU: what it composes, and what it refuses."""

import pytest
import torch

from lightning_indexer.ops.indexer_query import indexer_query
from lightning_indexer.query import QuantizedQuery, quantize_query
from lightning_indexer.rotary import apply_rope, hadamard, rope_frequencies

FREQUENCIES = rope_frequencies(64, 160_000.0, yarn_factor=16.0)
OPTIONS = {"format": "mxfp4", "rotate": True, "weight_scale": 0.25}


def inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {
        "q": torch.randn(5, 16, 128).to(dtype),
        "weights": torch.randn(5, 16).to(dtype),
        "positions": torch.tensor([0, 1, 7, 4096, 1_048_575]),
        "frequencies": FREQUENCIES,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rotate", [True, False], ids=["hadamard", "plain"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8", None])
def test_it_is_rope_then_hadamard_then_quantised(
    format: str | None, rotate: bool, dtype: torch.dtype, impl: str
) -> None:
    given = inputs(dtype)
    query, weights = indexer_query(**given, format=format, rotate=rotate, weight_scale=0.011, impl=impl)
    rotated = apply_rope(given["q"], given["positions"], FREQUENCIES)
    rotated = hadamard(rotated) if rotate else rotated
    assert weights.dtype == torch.float32 and torch.equal(weights, given["weights"].float() * 0.011)
    if format is None:
        assert query.dtype == dtype and torch.equal(query, rotated)
        return
    want = quantize_query(rotated, format)
    assert isinstance(query, QuantizedQuery) and query.format == format
    assert torch.equal(query.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(query.scale.view(torch.uint8), want.scale.view(torch.uint8))


def test_no_tokens() -> None:
    given = {name: x if name == "frequencies" else x[:0] for name, x in inputs().items()}
    query, weights = indexer_query(**given, **OPTIONS)
    assert query.shape == (0, 16, 128) and weights.shape == (0, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(5, 16, 128).double()}, TypeError, "q must be bfloat16 or float32 or float16, got float64"),
        ({"q": torch.zeros(5, 2048)}, ValueError, r"q must have shape \[T, H, D\], got \[5, 2048\]"),
        ({"weights": torch.zeros(5, 8)}, ValueError, r"weights must have shape \[5, 16\], got \[5, 8\]"),
        ({"weights": torch.zeros(5, 16).long()}, TypeError, "weights must be bfloat16 or .*, got int64"),
        ({"positions": torch.zeros(4).long()}, ValueError, r"positions must have shape \[5\], got \[4\]"),
        ({"positions": torch.zeros(5)}, TypeError, "positions must be int64 or int32, got float32"),
        ({"positions": torch.zeros(5, device="meta").long()}, ValueError, "positions must be on cpu, got meta"),
        (
            {"frequencies": FREQUENCIES.double()},
            TypeError,
            r"frequencies must be float32, got float64 \(use",
        ),
        ({"frequencies": torch.ones(65)}, ValueError, "frequencies must be those of 2 to 128 channels, got 130"),
        ({"format": "bf16"}, ValueError, r"format must be one of \('mxfp4', 'nvfp4', 'fp8'\), got 'bf16'"),
        ({"impl": "cuda"}, NotImplementedError, "impl='cuda' does not serve tensors on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_told_in_one_line(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"indexer_query: {message}"):
        indexer_query(**{**inputs(), **OPTIONS, **changes})
