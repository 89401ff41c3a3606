"""What to report of a finished selection: sizes, ranks, texts."""

import torch
from torch import Tensor

from lightning_indexer.bench.memory import MemoryUse
from lightning_indexer.cache.pool import PagedPool
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.config import CSA_RATIO
from lightning_indexer.demo import report
from lightning_indexer.demo.layer import Layer, Queries
from lightning_indexer.demo.passages import PLANTED, Passage
from lightning_indexer.demo.text import Context
from lightning_indexer.ops.score_topk import score_topk_workspace_bytes

BEST_PER_EXAMPLE = 3
NEIGHBOUR_TOKENS = 8
_FP32_BYTES = 4


def cache_sizes(layer: Layer) -> report.Cache:
    """Bytes of both pools, against bf16."""
    index, kv = layer.cache.index_pool, layer.cache.kv_pool
    assert index is not None and kv is not None, "a CSA layer has both"
    return report.Cache(
        index_format=index.schema.format,
        index_bytes=index.storage.numel(),
        index_bf16_bytes=_bf16_bytes(index),
        kv_format=kv.schema.format,
        kv_bytes=kv.storage.numel(),
        kv_bf16_bytes=_bf16_bytes(kv),
    )


def memory_sizes(layer: Layer, use: MemoryUse, num_queries: int, num_tokens: int) -> report.Memory:
    """What selection took, and what dense scores would have taken."""
    config = layer.config
    row = layer.num_entries * _FP32_BYTES
    heads = config.indexer_num_heads
    return report.Memory(
        select_rise=use.rise,
        peak=use.peak,
        workspace=score_topk_workspace_bytes(
            num_heads=heads, head_dim=config.indexer_head_dim, top_k=config.csa_top_k, device=layer.device
        ),
        dense_scores=num_queries * row,
        eager_scores=num_queries * heads * row,
        prefill_dense_scores=num_tokens * row,
        prefill_eager_scores=num_tokens * heads * row,
    )


def rank_planted(layer: Layer, queries: Queries, passages: list[Passage], context: Context) -> list[report.Planted]:
    """Where each planted sentence's own query ranks it, among the scores of all entries."""
    rows = [i for i, passage in enumerate(passages) if passage.kind == "planted"]
    found = []
    for i, scores in zip(rows, layer.scores(queries.take(rows)), strict=True):
        target = passages[i].target
        assert target is not None, "a planted passage has a target"
        span = context.planted[target]
        order = scores.argsort(descending=True, stable=True).tolist()
        rank, entry = next((rank, entry) for rank, entry in enumerate(order, 1) if _covers(entry, span))
        found.append(
            report.Planted(
                sentence=PLANTED[target][0],
                query=passages[i].text,
                first_token=span.start,
                entry=entry,
                rank=rank,
                score=float(scores[entry]),
                in_top_k=rank <= layer.config.csa_top_k,
            )
        )
    return found


def attention_share(layer: Layer, queries: Queries, lse: Tensor) -> float:
    """Of the attention to all entries, the share that falls on the chosen ones: mean over queries and heads."""
    return float(torch.exp(lse - layer.full_lse(queries)).mean())


def example(passage: Passage, indices: Tensor, scores: Tensor, context: Context) -> report.Example:
    """A query's best entries, without those that overlap a better one or repeat its text."""
    best: list[report.Found] = []
    for entry, score in zip(indices.tolist(), scores.tolist(), strict=True):
        span = source_tokens(entry)
        text = context.text(span.start, span.stop)
        repeated = any(text == other.text or abs(entry - other.entry) < 2 for other in best)
        if entry < 0 or repeated:
            continue
        before = context.text(span.start - NEIGHBOUR_TOKENS, span.start)
        after = context.text(span.stop, span.stop + NEIGHBOUR_TOKENS)
        best.append(report.Found(entry, max(span.start, 0), score, before, text, after))
        if len(best) == BEST_PER_EXAMPLE:
            break
    return report.Example(passage.text.strip(), passage.kind, best)


def source_tokens(entry: int) -> range:
    """The tokens that an entry pools: its own window and the one before (negative before the context begins)."""
    return range(CSA_RATIO * (entry - 1), CSA_RATIO * (entry + 1))


def _covers(entry: int, span: range) -> bool:
    tokens = source_tokens(entry)
    return tokens.start < span.stop and span.start < tokens.stop


def _bf16_bytes(pool: PagedPool) -> int:
    schema = CacheSchema("bf16", pool.schema.entries_per_block, head_dim=pool.schema.dim)
    return pool.num_blocks * schema.stride
