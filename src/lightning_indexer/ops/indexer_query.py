"""Turn the indexer's projections into what `score_topk` takes."""

import torch
from torch import Tensor

from lightning_indexer.checks import check_choice, check_tensor, choose_impl
from lightning_indexer.formats import QUERY_FORMATS
from lightning_indexer.query import QuantizedQuery, quantize_query
from lightning_indexer.rotary import apply_rope, hadamard

_FLOATS = (torch.bfloat16, torch.float32, torch.float16)
_INTS = (torch.int64, torch.int32)


@torch.no_grad()
def indexer_query(
    q: Tensor,
    weights: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    format: str | None,
    rotate: bool,
    weight_scale: float,
    impl: str = "auto",
) -> tuple[Tensor | QuantizedQuery, Tensor]:
    """quantise(Hadamard(RoPE(q))) and weights * weight_scale.

    RoPE and the Hadamard rotation each round to q's dtype, as the model was trained with.

    Args:
        q: [T, H, D] bf16, fp32 or fp16, as projected. On a GPU D is 64 or 128.
        weights: [T, H] bf16, fp32 or fp16, of the heads, as projected.
        positions: int32 or int64 [T].
        frequencies: fp32 [R / 2], see `rotary.rope_frequencies`; the last R channels are rotated.
        format: "mxfp4", "nvfp4" or "fp8"; None leaves the query in q's dtype.
        rotate: apply the Hadamard rotation, as it was applied to the keys.
        weight_scale: of scores and heads, D^-0.5 * H^-0.5 in the model; the product is fp32.
        impl: "auto", "cpu", "cuda" (one kernel) or "reference" (torch, on any device). All give the same bytes, but for
            signs of NaN.
    Returns:
        The query, [T, H, D] or a `QuantizedQuery`, and fp32 weights [T, H].
    """
    op = "indexer_query"
    check_tensor(op, "q", q, dtype=_FLOATS, shape=("T", "H", "D"))
    num_tokens, num_heads, dim = q.shape
    check_tensor(op, "weights", weights, dtype=_FLOATS, shape=(num_tokens, num_heads), device=q.device)
    check_tensor(op, "positions", positions, dtype=_INTS, shape=(num_tokens,), device=q.device)
    check_tensor(op, "frequencies", frequencies, dtype=torch.float32, shape=("R / 2",), device=q.device)
    if not 1 <= len(frequencies) <= dim // 2:
        raise ValueError(f"{op}: frequencies must be those of 2 to {dim} channels, got {2 * len(frequencies)}")
    if format is not None:
        check_choice(op, "format", format, QUERY_FORMATS)
    if choose_impl(op, impl, q.device, has_cuda=True) == "cuda":
        from lightning_indexer.cuda.indexer_query import indexer_query as cuda_indexer_query

        return cuda_indexer_query(
            q, weights, positions, frequencies, format=format, rotate=rotate, weight_scale=weight_scale
        )
    q = apply_rope(q, positions, frequencies)
    q = hadamard(q) if rotate else q
    return (q if format is None else quantize_query(q, format)), weights.float() * weight_scale
