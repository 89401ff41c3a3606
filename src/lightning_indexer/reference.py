"""Every op again in plain torch, one row at a time, to be read beside the paper. It is the truth for the tests.

Arithmetic is in `dtype` (float64 where a caller wants an exact answer) on the values that the bytes stand for.
"""

import torch
from torch import Tensor

from lightning_indexer.cache.view import IndexerView, PagedView
from lightning_indexer.formats import dequantize, quantize
from lightning_indexer.query import QuantizedQuery
from lightning_indexer.rotary import apply_rope, hadamard


def read_entries(view: PagedView, seq_id: int, length: int) -> Tensor:
    """fp32 [length, D]: the first `length` entries of one sequence, dequantised."""
    seq = torch.tensor([seq_id], device=view.device)
    slots = view.slots(seq, torch.arange(length, device=view.device).unsqueeze(0))[0]
    block, row = slots // view.schema.entries_per_block, slots % view.schema.entries_per_block
    data, scale = view.data_rows[block, row], view.scale_rows[block, row]
    return dequantize(data, scale, view.schema.format, global_scale=view.global_scale)


def append_entries(entries: Tensor, view: PagedView, slots: Tensor, *, rounding: str = "nearest_even") -> None:
    """Write each entry's rows at its slot; slot -1 is skipped."""
    data, scale = quantize(entries, view.schema.format, rounding=rounding, global_scale=view.global_scale)
    for i, slot in enumerate(slots.tolist()):
        if 0 <= slot < view.num_blocks * view.schema.entries_per_block:
            block, row = divmod(slot, view.schema.entries_per_block)
            view.data_rows[block, row] = data[i]
            view.scale_rows[block, row] = scale[i]


def score_row(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """score[s] = sum_h weights[h] * max(0, <q[h], keys[s]>) for q [H, D], weights [H], keys [S, D]."""
    return weights @ (q @ keys.T).clamp_min(0)


def index_scores(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    *,
    valid_lens: Tensor,
    seq_ids: Tensor,
    max_len: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Dense scores [T, max_len] in `dtype`, -inf beyond each row's length."""
    values = q.dequantize() if isinstance(q, QuantizedQuery) else q
    out = torch.full((len(weights), max_len), -torch.inf, dtype=dtype, device=weights.device)
    for t, (seq_id, length) in enumerate(zip(seq_ids.tolist(), valid_lens.tolist(), strict=True)):
        keys = read_entries(view, seq_id, length).to(dtype)
        out[t, :length] = score_row(values[t].to(dtype), weights[t].to(dtype), keys) + 0.0  # no -0
    return out


def select(scores: Tensor, length: int, top_k: int) -> Tensor:
    """Indices of the `top_k` best of scores[:length], best first: ties to the smaller index, NaN last, -1 tail."""
    row = scores[:length]
    order = torch.where(row.isnan(), -torch.inf, row + 0.0).argsort(descending=True, stable=True)
    order = order[row[order].isnan().int().argsort(stable=True)][:top_k]
    tail = order.new_full((top_k - len(order),), -1)
    return torch.cat([order, tail])


def select_listed(scores: Tensor, length: int, top_k: int, blocks: Tensor, block_entries: int) -> Tensor:
    """`select`, from the entries of some blocks alone: those whose ids are in `blocks`."""
    entries = torch.arange(length, device=scores.device)
    listed = entries[torch.isin(entries // block_entries, blocks)]
    best = select(scores[listed], len(listed), top_k)
    return torch.where(best < 0, -1, torch.nn.functional.pad(listed, (0, 1))[best])


def select_blocks(scores: Tensor, length: int, num_blocks: int, block_entries: int) -> Tensor:
    """Ids of the blocks of scores[:length] with the largest maxima, ascending, -1 tail.

    The last block always; of others none whose maximum is -inf (NaN counts as -inf), and ties go to the smaller id.
    """
    newest = (length - 1) // block_entries  # -1 where there is none
    row = torch.where(scores[:length].isnan(), -torch.inf, scores[:length])
    maxima = row[: max(newest, 0) * block_entries].view(-1, block_entries).amax(-1).tolist()  # of all but the newest
    others = sorted((-largest, block) for block, largest in enumerate(maxima) if largest > -torch.inf)
    chosen = sorted([block for _, block in others[: num_blocks - 1]] + [newest] * (newest >= 0))
    return torch.tensor(chosen + [-1] * (num_blocks - len(chosen)), dtype=torch.int32, device=scores.device)


def gather_kv(view: PagedView, indices: Tensor, *, seq_ids: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[T, k, D] in `dtype`: the selected entries, zeros where the index is -1."""
    out = torch.zeros(*indices.shape, view.schema.dim, dtype=dtype, device=view.device)
    for t, seq_id in enumerate(seq_ids.tolist()):
        for j, index in enumerate(indices[t].tolist()):
            if index >= 0:
                out[t, j] = read_entries(view, seq_id, index + 1)[index].to(dtype)
    return out


def sparse_attention(
    q: Tensor,
    kv: Tensor,
    *,
    valid: Tensor,
    sink: Tensor | None,
    softmax_scale: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """out[t, h] = sum_j p_j kv[t, j] with the sink in the denominator only; lse without the sink."""
    num_tokens, num_heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full((num_tokens, num_heads), -torch.inf, dtype=dtype, device=q.device)
    for t in range(num_tokens):
        rows = kv[t, valid[t]].to(dtype)  # [n, D]
        logits = softmax_scale * q[t].to(dtype) @ rows.T  # [H, n]
        lse[t] = torch.logsumexp(logits, dim=-1)
        total = lse[t] if sink is None else torch.logaddexp(lse[t], sink.to(dtype))
        if len(rows):
            out[t] = torch.exp(logits - total.unsqueeze(-1)) @ rows
    return out, lse


def compress(
    x: Tensor,
    *,
    wkv: Tensor,
    wgate: Tensor | None,
    ape: Tensor | None,
    norm: Tensor,
    compress_ratio: int,
    frequencies: Tensor | None,
    eps: float,
    rotate: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """All entries [L // ratio, d] of one sequence x [L, hidden] from position 0, with no state.

    Entry w pools tokens w*ratio .. w*ratio + ratio - 1; with ratio 4 it also pools the window before, through the
    first half of the channels (absent for w = 0). Softmax over the pooled tokens, channel by channel.

    V4.1 has no `ape`, and no `wgate` at ratio 1. Without `frequencies` entries are not rotated: V4.1's latents.
    """
    d, overlap = len(norm), compress_ratio == 4
    values = x.to(dtype) @ wkv.to(dtype).T  # [L, d or 2d]
    gates = torch.zeros_like(values) if wgate is None else x.to(dtype) @ wgate.to(dtype).T
    ape = torch.zeros(compress_ratio, values.shape[1], device=x.device) if ape is None else ape
    entries = []
    for w in range(len(x) // compress_ratio):
        own = range(w * compress_ratio, (w + 1) * compress_ratio)
        pooled = [(values[i, -d:], gates[i, -d:] + ape[i % compress_ratio, -d:].to(dtype)) for i in own]
        if overlap and w > 0:
            before = range((w - 1) * compress_ratio, w * compress_ratio)
            pooled += [(values[i, :d], gates[i, :d] + ape[i % compress_ratio, :d].to(dtype)) for i in before]
        weight = torch.stack([gate for _, gate in pooled]).softmax(0)
        entries.append((weight * torch.stack([value for value, _ in pooled])).sum(0))
    out = torch.stack(entries) if entries else values.new_empty(0, d)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps) * norm.to(dtype)
    if frequencies is not None:
        out = apply_rope(out, torch.arange(len(out), device=x.device) * compress_ratio, frequencies)
    return hadamard(out) if rotate else out
