"""Other ways to the same selection, on the same queries and keys.

"two_step" is what one writes in PyTorch: keys already dequantised to bf16 and contiguous per sequence, a bf16 matrix
product, ReLU, the weighted sum over heads in fp32, torch.topk; in pieces, so that it runs at all. "deep_gemm" is the
logits kernel of that library, then torch.topk; "flashinfer" is flashinfer.top_k over the same logits, or over those of
"two_step" where deep_gemm is missing.
"""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.bench.cuda.cases import ScoringCase
from lightning_indexer.bench.cuda.operands import ScoringOperands
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.ops.append import append_entries
from lightning_indexer.query import QuantizedQuery, quantize_query

TWO_STEP = "two_step"
PEERS = ("deep_gemm", "flashinfer")

_PIECE_BYTES = 4 * 2**30  # of a piece's products
_PRODUCT_BYTES = 2 + 4  # a (query, head, entry): bf16, and its fp32 copy
_TRAFFIC_BYTES = 2 + 2 * 2 + 2 + 4 + 4  # the same, written and read by product, ReLU, conversion and sum
_LONGEST_S = 20.0
_MARGIN_BYTES = 2**30

Select = Callable[[Tensor, int], Tensor]


class Unavailable(Exception):
    """A peer that cannot run here; the message is the reason."""


class Memory(Protocol):
    """Of a device."""

    def free_bytes(self) -> int: ...


def peer(
    name: str, case: ScoringCase, operands: ScoringOperands, memory: Memory, read_gb_s: float
) -> Callable[[], Tensor]:
    """A function that computes the selection, int [T, k].

    Raises:
        Unavailable: with the reason.
    """
    if name == TWO_STEP:
        return two_step(case, operands, memory, read_gb_s, torch_topk)
    if name == "deep_gemm":
        return _deep_gemm(_import(name), case, operands, memory, torch_topk)
    if name == "flashinfer":
        select = _flashinfer_topk(_import(name))
        try:
            deep_gemm = _import("deep_gemm")
        except Unavailable:
            return two_step(case, operands, memory, read_gb_s, select)
        return _deep_gemm(deep_gemm, case, operands, memory, select)
    raise Unavailable("runs on a CPU only (--device cpu)")


def torch_topk(scores: Tensor, top_k: int) -> Tensor:
    """int64 [T, k]."""
    return scores.topk(min(top_k, scores.shape[1]), dim=1).indices


def two_step(
    case: ScoringCase, operands: ScoringOperands, memory: Memory, read_gb_s: float, select: Select
) -> Callable[[], Tensor]:
    """PyTorch's own way; see the top of this file."""
    key_bytes = 2 * case.num_seqs * case.entries * case.head_dim
    _check_fits(memory, key_bytes + min(_PIECE_BYTES, piece_bytes(case, case.num_queries)))
    seconds = traffic_bytes(case) / read_gb_s / 1e9
    if seconds > _LONGEST_S:
        raise Unavailable(f"would take about {seconds:.0f} s")
    keys = torch.empty(case.num_seqs, case.entries, case.head_dim, dtype=torch.bfloat16, device=operands.device)
    for seq_id in range(case.num_seqs):
        keys[seq_id] = reference.read_entries(operands.view, seq_id, case.entries)
    query = operands.query
    q = query.dequantize().bfloat16() if isinstance(query, QuantizedQuery) else query
    per_seq = (case.num_seqs, case.tokens)
    q, weights = q.unflatten(0, per_seq), operands.weights.unflatten(0, per_seq)
    lens = operands.valid_lens[: case.tokens].unsqueeze(1)
    entry = torch.arange(case.entries, device=operands.device)

    def run() -> Tensor:
        chosen = torch.empty(*per_seq, min(case.top_k, case.entries), dtype=torch.int64, device=operands.device)
        for seqs, tokens in pieces(case):
            piece_q = q[seqs, tokens]  # [seqs, tokens, H, D]
            products = torch.bmm(piece_q.flatten(1, 2), keys[seqs].transpose(1, 2)).relu_()
            products = products.unflatten(1, piece_q.shape[1:3]).flatten(0, 1)  # [seqs * tokens, H, entries]
            scores = torch.bmm(weights[seqs, tokens].flatten(0, 1).unsqueeze(1), products.float()).squeeze(1)
            scores = scores.unflatten(0, piece_q.shape[:2]).masked_fill_(entry >= lens[tokens], -torch.inf)
            chosen[seqs, tokens] = select(scores.flatten(0, 1), case.top_k).unflatten(0, piece_q.shape[:2])
        return chosen.flatten(0, 1)

    return run


def pieces(case: ScoringCase) -> Iterator[tuple[slice, slice]]:
    """Sequences and tokens of each piece: whole sequences if one fits, else some tokens of one."""
    queries = max(_PIECE_BYTES // piece_bytes(case, 1), 1)
    seqs, tokens = (queries // case.tokens, case.tokens) if queries >= case.tokens else (1, queries)
    for seq in range(0, case.num_seqs, seqs):
        for token in range(0, case.tokens, tokens):
            yield slice(seq, seq + seqs), slice(token, token + tokens)


def piece_bytes(case: ScoringCase, queries: int) -> int:
    """What scoring `queries` queries at once holds."""
    return queries * case.entries * (case.num_heads * _PRODUCT_BYTES + 4)


def traffic_bytes(case: ScoringCase) -> int:
    """What the two-step way reads and writes, roughly."""
    return case.num_queries * case.entries * case.num_heads * _TRAFFIC_BYTES


# --- deep_gemm, flashinfer ------------------------------------------------------------------------------------


def _deep_gemm(
    deep_gemm: ModuleType, case: ScoringCase, operands: ScoringOperands, memory: Memory, select: Select
) -> Callable[[], Tensor]:
    """FP8 keys, the only ones that it has logits for on Hopper, whatever the format of ours."""
    if case.query_format == "bf16":
        raise Unavailable("has no logits for bf16 queries")
    fp8_bytes = case.num_seqs * case.entries * CacheSchema("fp8").bytes_per_entry
    _check_fits(memory, 2 * case.dense_bytes + 2 * fp8_bytes)
    query = _fp8_query(operands.query)
    weights = operands.weights if query.scale is None else operands.weights * query.scale
    view = _fp8_view(case, operands.view)
    logits = _prefill_logits if case.kind == "prefill" else _paged_logits
    try:
        compute = logits(deep_gemm, case, operands, query.data, weights, view)

        def run() -> Tensor:
            return select(compute()[:, : case.entries], case.top_k)

        run()
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise Unavailable(f"refuses: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    return run


def _paged_logits(
    deep_gemm: ModuleType, case: ScoringCase, operands: ScoringOperands, q: Tensor, weights: Tensor, view: IndexerView
) -> Callable[[], Tensor]:
    schema = view.schema
    q = q.unflatten(0, (case.num_seqs, case.tokens))
    pages = view.storage.unflatten(1, (schema.entries_per_block, 1, schema.bytes_per_entry))
    lens = operands.valid_lens.view(case.num_seqs, case.tokens)
    plan = deep_gemm.get_paged_mqa_logits_metadata(lens, schema.entries_per_block, deep_gemm.get_num_sms())
    tail = min(case.tokens, case.entries)  # the columns that some query does not see: the kernel leaves garbage there
    hidden = torch.arange(case.entries - tail, case.entries, device=view.device) >= operands.valid_lens.unsqueeze(1)

    def run() -> Tensor:
        scores: Tensor = deep_gemm.fp8_paged_mqa_logits(
            q, pages, weights, lens, view.block_table, plan, case.entries, clean_logits=False
        )
        if case.tokens > 1:
            scores[:, case.entries - tail : case.entries].masked_fill_(hidden, -torch.inf)
        return scores

    return run


def _prefill_logits(
    deep_gemm: ModuleType, case: ScoringCase, operands: ScoringOperands, q: Tensor, weights: Tensor, view: IndexerView
) -> Callable[[], Tensor]:
    """Keys are gathered beforehand, as engines do."""
    slots = view.slots(torch.zeros(1, device=view.device), torch.arange(case.entries, device=view.device).unsqueeze(0))
    block, row = slots[0] // view.schema.entries_per_block, slots[0] % view.schema.entries_per_block
    data = view.data_rows[block, row].view(torch.float8_e4m3fn)
    scale = view.scale_rows[block, row].view(torch.float32).squeeze(1)
    start = torch.zeros_like(operands.valid_lens)

    def run() -> Tensor:
        scores: Tensor = deep_gemm.fp8_mqa_logits(q, (data, scale), weights, start, operands.valid_lens)
        return scores

    return run


def _fp8_query(query: Tensor | QuantizedQuery) -> QuantizedQuery:
    if isinstance(query, QuantizedQuery) and query.format == "fp8":
        return query
    return quantize_query(query.dequantize() if isinstance(query, QuantizedQuery) else query, "fp8")


def _fp8_view(case: ScoringCase, view: IndexerView) -> IndexerView:
    """The same entries in the same blocks, as fp8."""
    if case.format == "fp8":
        return view
    schema = CacheSchema("fp8", view.schema.entries_per_block, head_dim=case.head_dim)
    storage = torch.zeros(view.num_blocks, schema.stride, dtype=torch.uint8, device=view.device)
    result = IndexerView(storage, schema, view.block_table)
    index = torch.arange(case.entries, device=view.device).unsqueeze(0)
    for seq_id in range(case.num_seqs):
        slots = view.slots(torch.tensor([seq_id], device=view.device), index)[0]
        append_entries(reference.read_entries(view, seq_id, case.entries), result, slots)
    return result


def _flashinfer_topk(flashinfer: Any) -> Select:
    def select(scores: Tensor, top_k: int) -> Tensor:
        _, indices = flashinfer.top_k(scores, min(top_k, scores.shape[1]))
        found: Tensor = indices
        return found

    return select


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library that is there but broken is one that cannot be timed
        raise Unavailable(f"cannot be imported: {type(error).__name__}: {error}") from error


def _check_fits(memory: Memory, needed: int) -> None:
    free = memory.free_bytes()
    if needed + _MARGIN_BYTES > free:
        raise Unavailable(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
