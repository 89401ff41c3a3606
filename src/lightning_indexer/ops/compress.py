"""Pool the tokens of each entry that a step completes, and write it into the paged cache."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cache.ring import TokenRing
from lightning_indexer.cache.step import Step
from lightning_indexer.cache.view import PagedView
from lightning_indexer.checks import check_tensor, choose_impl
from lightning_indexer.rotary import apply_rope, hadamard

_FLOATS = (torch.bfloat16, torch.float32, torch.float16)
_INTS = (torch.int64, torch.int32)
_MOST_RUN_SLOTS = 32  # that are added one after another


@torch.no_grad()
def compress_entries(
    values: Tensor,
    gates: Tensor,
    step: Step,
    ring: TokenRing,
    view: PagedView,
    slots: Tensor,
    *,
    ape: Tensor,
    norm: Tensor,
    frequencies: Tensor,
    eps: float,
    rotate: bool,
    dtype: torch.dtype,
    impl: str = "auto",
) -> None:
    """Write the entries that a step completes, `pooled_entries` of the same arguments, into a paged cache.

    The ring takes the step's tokens up. Nothing else changes.

    Args:
        values, gates, step, ring, ape, norm, frequencies, eps, rotate, dtype: see `pooled_entries`.
        view: `IndexerView` or `KVView` of entries of D dims; its storage is written in place.
        slots: int32 or int64 [E], where `append_entries` would write the entries; -1 is skipped.
        impl: "auto", "cpu", "cuda" (two kernels; D of 64, 128 or 512, the Hadamard rotation of the first two) or
            "reference" (torch, on any device). All write the same bytes, but for NaN (see `append_entries`).
    """
    op = "compress_entries"
    if not isinstance(view, PagedView):
        raise TypeError(f"{op}: view must be an IndexerView or a KVView, got {type(view).__name__}")
    impl = choose_impl(op, impl, view.device, has_cuda=True)
    check_tensor(op, "norm", norm, dtype=_FLOATS, shape=(view.schema.dim,), device=view.device)
    check_pooling(op, values, gates, step, ring, ape, norm, frequencies)
    check_tensor(op, "slots", slots, dtype=_INTS, shape=(len(step.entry_rows),), device=view.device)
    options: dict[str, Any] = {
        "ape": ape,
        "norm": norm,
        "frequencies": frequencies,
        "eps": eps,
        "rotate": rotate,
        "dtype": dtype,
    }
    if impl == "cuda":
        from lightning_indexer.cuda.compress import compress_entries as cuda_compress_entries

        cuda_compress_entries(values, gates, step, ring.rows, view, slots, **options)
        return
    entries = pooled_entries(values, gates, step, ring, **options)
    if impl == "reference":
        reference.append_entries(entries, view, slots)
    else:
        from lightning_indexer.cpu.append import append_entries as cpu_append_entries

        cpu_append_entries(entries, view, slots, "nearest_even")


@torch.no_grad()
def pooled_entries(
    values: Tensor,
    gates: Tensor,
    step: Step,
    ring: TokenRing,
    *,
    ape: Tensor,
    norm: Tensor,
    frequencies: Tensor,
    eps: float,
    rotate: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Hadamard(RoPE(RMSNorm(sum_i softmax_i(gate_i + ape[i % ratio]) * value_i))) of each entry; the ring is updated.

    The sum runs over the ratio tokens of the entry's window, and with twice as many channels as dims also over those of
    the window before, through the first half of the channels (absent for the first entry).

    In torch, on any device. Exponentials are computed in float64 and rounded, and all sums have a fixed order, so that
    every device and kernel has the same bits.

    Args:
        values, gates: fp32 [T, C], of the step's tokens.
        step: where these stand, and which entries they complete.
        ring: values and gates of earlier tokens, `rows` fp32 [seqs, size, 2, C].
        ape: [ratio, C], added to the gates.
        norm: [D]. C is D, or 2 D.
        frequencies: fp32 [R / 2]; the last R dims are rotated, by the position of the window's first token.
        dtype: the pooled vector, its norm and its rotations are each rounded to it.
    Returns:
        [E, D] in `dtype`, in the order of `step.entry_rows`; of rows that are -1, anything.
    """
    check_pooling("pooled_entries", values, gates, step, ring, ape, norm, frequencies)
    entries = _pooled_latents(values, gates, step, ring, ape, norm, eps, dtype)
    entries = apply_rope(entries, step.entry_indices * len(ape), frequencies)
    return hadamard(entries) if rotate else entries


@torch.no_grad()
def pooled_latents(
    values: Tensor,
    gates: Tensor,
    step: Step,
    ring: TokenRing,
    *,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """`pooled_entries` of the same arguments before they are rotated: what V4.1 makes entries and index keys from."""
    check_pooling("pooled_latents", values, gates, step, ring, ape, norm)
    return _pooled_latents(values, gates, step, ring, ape, norm, eps, dtype)


def check_pooling(
    op: str,
    values: Tensor,
    gates: Tensor,
    step: Step,
    ring: TokenRing,
    ape: Tensor,
    norm: Tensor,
    frequencies: Tensor | None = None,
) -> None:
    """Raise unless the tensors fit one another."""
    device = ring.rows.device
    check_tensor(op, "norm", norm, dtype=_FLOATS, shape=("D",), device=device)
    check_tensor(op, "ape", ape, dtype=_FLOATS, shape=("ratio", "C"), device=device)
    (ratio, channels), dim = ape.shape, len(norm)
    if channels not in (dim, 2 * dim):
        raise ValueError(f"{op}: ape must have {dim} or {2 * dim} channels, as norm has {dim}, got {channels}")
    tokens = (len(step.positions), channels)
    check_tensor(op, "values", values, dtype=torch.float32, shape=tokens, device=device)
    check_tensor(op, "gates", gates, dtype=torch.float32, shape=tokens, device=device)
    size = (len(ring.rows), channels // dim * ratio, 2, channels)
    check_tensor(op, "ring", ring.rows, dtype=torch.float32, shape=size)
    if frequencies is None:
        return
    check_tensor(op, "frequencies", frequencies, dtype=torch.float32, shape=("R / 2",), device=device)
    if not 1 <= len(frequencies) <= dim // 2:
        raise ValueError(f"{op}: frequencies must be those of 2 to {dim} dims, got {2 * len(frequencies)}")


def _pooled_latents(
    values: Tensor,
    gates: Tensor,
    step: Step,
    ring: TokenRing,
    ape: Tensor,
    norm: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    chunk = torch.stack((values, gates + ape.float()[step.positions % len(ape)]), dim=1)
    pooled = _pool(ring.with_chunk(step, chunk), step, ring, len(ape), len(norm))
    ring.update(step, chunk)
    return _rms_norm(pooled.to(dtype), norm, eps)


def _pool(tokens: Tensor, step: Step, ring: TokenRing, ratio: int, dim: int) -> Tensor:
    """fp32 [E, dim] from `tokens` [n, 2, windows * dim] (values, gates)."""
    windows = tokens.shape[2] // dim
    offsets = torch.arange(ratio - windows * ratio, ratio, device=tokens.device)
    positions = step.entry_indices.unsqueeze(1) * ratio + offsets  # [E, windows * ratio]
    rows = ring.find(step, step.entry_rows.clamp_min(0), positions)
    parts = []
    for window in range(windows):  # the window before through the first channels, its own through the last
        channels = slice(window * dim, (window + 1) * dim)
        parts.append(tokens[:, :, channels][rows[:, window * ratio : (window + 1) * ratio]])
    values, gates = torch.cat(parts, dim=1).unbind(2)  # [E, windows * ratio, dim]
    absent = (positions < 0).unsqueeze(-1)
    gates = gates.masked_fill(absent, torch.finfo(torch.float32).min)  # -inf would make an entry of nothing NaN
    above = (gates - gates.amax(1, keepdim=True)).double()
    weights = torch.exp(above, out=torch.empty_like(gates))
    return _sum_slots(weights * values.masked_fill(absent, 0.0)) / _sum_slots(weights)


def _sum_slots(x: Tensor) -> Tensor:
    """[E, slots, D] -> [E, D]: runs of slots one after another, then their sums by halves."""
    length = min(_MOST_RUN_SLOTS, x.shape[1])
    runs = x.unflatten(1, (-1, length))
    total: Tensor = runs[:, :, 0]
    for slot in range(1, length):
        total = total + runs[:, :, slot]
    while total.shape[1] > 1:
        low, high = total.chunk(2, dim=1)
        total = low + high
    return total.squeeze(1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`nn.norm.rms_norm` with its sum in a fixed order, neighbours first, and a root and a quotient that round once.

    fp32 roots of torch are not IEEE's on every CPU.
    """
    y = x.float()
    total = F.pad(y.square(), (0, (1 << (y.shape[-1] - 1).bit_length()) - y.shape[-1]))
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    root = (total / y.shape[-1] + eps).double().sqrt().float()
    return (y / root * weight.float()).to(x.dtype)
