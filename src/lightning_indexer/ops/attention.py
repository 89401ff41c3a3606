"""Attention of each query over its own selected entries and window, with a sink."""

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.checks import check_tensor, choose_impl
from lightning_indexer.precision import full_float32
from lightning_indexer.tracing import is_traced

_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def sparse_attention(
    q: Tensor,
    kv_selected: Tensor,
    kv_window: Tensor,
    *,
    valid: Tensor,
    sink: Tensor | None,
    softmax_scale: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which keys and values are the same rows, shared by all heads (MQA).

        p[t, h, j] = exp(l[t, h, j]) / (sum_j exp(l[t, h, j]) + exp(sink[h])),  l = softmax_scale * <q[t, h], kv[t, j]>

    Args:
        q: [T, H, D] bf16, fp32 or fp16.
        kv_selected: [T, K, D], the gathered entries; K may be 0.
        kv_window: [T, W, D], the uncompressed recent rows; W may be 0.
        valid: bool [T, K + W], selected rows first; an invalid row may hold anything, NaN included.
        sink: fp32 [H], a logit in the denominator only, or None. -inf has no effect, +inf gives zeros.
        softmax_scale: multiplies the dot products.
        impl: "auto", "cpu" and "cuda" (both plain torch, in fp32) or "reference".
    Returns:
        out: [T, H, D] in q's dtype, zeros for a query with no valid row.
        lse: fp32 [T, H], log-sum-exp without the sink (so that parts can be merged and the sink applied once);
            -inf with no valid row, where FlashMLA reports +inf.
    """
    if not is_traced():
        return eager_sparse_attention(q, kv_selected, kv_window, valid, sink, softmax_scale, impl)
    results: tuple[Tensor, Tensor] = torch.ops.lightning_indexer.sparse_attention(
        q, kv_selected, kv_window, valid, sink, softmax_scale, impl
    )
    return results


@torch.no_grad()
@full_float32()
def eager_sparse_attention(
    q: Tensor,
    kv_selected: Tensor,
    kv_window: Tensor,
    valid: Tensor,
    sink: Tensor | None,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`sparse_attention`, unseen by torch's dispatcher."""
    op = "sparse_attention"
    check_tensor(op, "q", q, dtype=_DTYPES, shape=("T", "H", "D"))
    impl = choose_impl(op, impl, q.device, has_cuda=True)
    num_tokens, num_heads, dim = q.shape
    check_tensor(op, "kv_selected", kv_selected, dtype=_DTYPES, shape=(num_tokens, "K", dim), device=q.device)
    check_tensor(op, "kv_window", kv_window, dtype=_DTYPES, shape=(num_tokens, "W", dim), device=q.device)
    rows = kv_selected.shape[1] + kv_window.shape[1]
    check_tensor(op, "valid", valid, dtype=torch.bool, shape=(num_tokens, rows), device=q.device)
    if sink is not None:
        check_tensor(op, "sink", sink, dtype=torch.float32, shape=(num_heads,), device=q.device)
    kv = torch.empty(num_tokens, rows, dim, dtype=torch.float32, device=q.device)
    kv[:, : kv_selected.shape[1]] = kv_selected
    kv[:, kv_selected.shape[1] :] = kv_window
    if impl == "reference":
        out, lse = reference.sparse_attention(q, kv, valid=valid, sink=sink, softmax_scale=softmax_scale)
        return out.to(q.dtype), lse
    some_invalid = q.device.type != "cpu" or not bool(valid.all())  # elsewhere to look would wait for the device
    if some_invalid:
        kv.masked_fill_(~valid.unsqueeze(-1), 0.0)  # 0 * NaN would leak into the value product
    logits = torch.bmm(q.float() * softmax_scale, kv.transpose(1, 2))  # [T, H, K + W]
    if some_invalid:
        logits.masked_fill_(~valid.unsqueeze(1), -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    total = lse if sink is None else torch.logaddexp(lse, sink)
    probabilities = logits.sub_(total.unsqueeze(-1)).exp_()
    probabilities.masked_fill_(~valid.any(1).view(-1, 1, 1), 0.0)  # no valid row: -inf - -inf is NaN
    return torch.bmm(probabilities, kv).to(q.dtype), lse
