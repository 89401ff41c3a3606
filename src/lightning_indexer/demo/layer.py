"""The demo's CSA layer: write a context into its caches, ask, select, attend."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer.cache.handle import LayerCacheHandle
from lightning_indexer.config import CSA_RATIO
from lightning_indexer.demo.model import (
    LAYER,
    config_for,
    make_compressor,
    make_indexer,
    make_main_query,
    project_main_query,
)
from lightning_indexer.demo.options import Options
from lightning_indexer.nn.norm import rms_norm
from lightning_indexer.ops.attention import sparse_attention
from lightning_indexer.ops.gather_kv import gather_kv
from lightning_indexer.ops.score_topk import index_scores, score_topk
from lightning_indexer.ops.valid_lens import visible_entries
from lightning_indexer.query import QuantizedQuery

Advance = Callable[[int], None]

_TOKENS_PER_STEP = 4096
_QUERIES_PER_TILE = 16  # gathered at a time: with 512 entries of 512 dims each, 16 MiB in fp32
_ENTRIES_PER_TILE = 4096
_ENTRIES_PER_BLOCK = 64
_SEQ = 0


@dataclass(frozen=True, eq=False)
class Queries:
    """T queries on the context.

    latents: bf16 [T, query_compression_dim]. q: [T, H, D] in the cache's format. weights: fp32 [T, H].
    positions: int64 [T]. valid_lens, seq_ids: int32 [T].
    """

    latents: Tensor
    q: Tensor | QuantizedQuery
    weights: Tensor
    positions: Tensor
    valid_lens: Tensor
    seq_ids: Tensor

    def take(self, rows: list[int]) -> "Queries":
        """Some of the queries."""
        others = (self.weights, self.positions, self.valid_lens, self.seq_ids)
        return Queries(self.latents[rows], self.q[rows], *(tensor[rows] for tensor in others))


class Layer:
    """One CSA layer with the demo's weights, and its caches for one sequence, on one device."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.config = config_for(options.top_k)
        self.device = device
        self.indexer = make_indexer(self.config, options.seed).to(device)
        self.compressor = make_compressor(self.config).to(device)
        self.main_query = make_main_query(self.config, options.seed).to(device)  # fp32 [H * D, hidden]
        self.num_entries = options.tokens // CSA_RATIO
        self.cache = LayerCacheHandle(
            self.config,
            LAYER,
            max_seqs=1,
            num_blocks=-(-self.num_entries // _ENTRIES_PER_BLOCK),
            entries_per_block=_ENTRIES_PER_BLOCK,
            index_format=options.format,
            device=device,
        )
        self.cache.alloc(_SEQ)

    def write(self, vectors: Tensor, tokens: Tensor, advance: Advance) -> None:
        """Compress the context [N], whose hidden states are rows of `vectors`, and write its entries.

        Both on the layer's device.
        """
        cache = self.cache
        assert cache.indexer_state is not None and cache.compressor_state is not None, "a CSA layer has both"
        for ids in tokens.split(_TOKENS_PER_STEP):
            x = vectors[ids]  # [n, hidden]
            step = cache.begin_step([_SEQ], [len(ids)])
            self.indexer.write_keys(x, cache)
            cache.append(self.compressor(x, step, cache.compressor_state), "kv")
            advance(len(ids))

    def ask(self, hidden: Tensor) -> Queries:
        """Queries of hidden states [T, hidden], each as if it were that of the context's last token."""
        num_queries = len(hidden)
        latents = rms_norm(hidden, None, self.config.rms_norm_eps)
        positions = torch.full((num_queries,), self.cache.num_tokens(_SEQ) - 1, device=self.device)
        q, weights = self.indexer.query(latents, hidden, positions, self.cache.paged.schema.format)
        seq_ids = torch.full((num_queries,), _SEQ, dtype=torch.int32, device=self.device)
        return Queries(latents, q, weights, positions, visible_entries(positions, CSA_RATIO), seq_ids)

    def select(self, queries: Queries) -> tuple[Tensor, Tensor]:
        """The chosen entries int32 [T, top_k], best first, and their scores."""
        return score_topk(
            queries.q,
            queries.weights,
            self.cache.read_indexer_view(),
            top_k=self.config.csa_top_k,
            valid_lens=queries.valid_lens,
            seq_ids=queries.seq_ids,
            order="score",
            return_scores=True,
        )

    def scores(self, queries: Queries) -> Tensor:
        """fp32 [T, num_entries]: every entry's score, for the few queries whose ranks are reported."""
        view = self.cache.read_indexer_view()
        return index_scores(queries.q, queries.weights, view, valid_lens=queries.valid_lens, seq_ids=queries.seq_ids)

    def attend(self, queries: Queries, indices: Tensor, advance: Advance) -> tuple[Tensor, Tensor]:
        """Attention of each query over its chosen entries, without a window: out [T, H, D] and lse [T, H]."""
        view, parts = self.cache.read_kv_view(), []
        q = project_main_query(self.config, self.main_query, queries.latents, queries.positions)
        for rows in torch.arange(len(indices), device=self.device).split(_QUERIES_PER_TILE):
            kv = gather_kv(view, indices[rows], seq_ids=queries.seq_ids[rows])
            no_window = kv[:, :0]
            scale = self.config.head_dim**-0.5
            valid = indices[rows] >= 0
            parts.append(sparse_attention(q[rows], kv, no_window, valid=valid, sink=None, softmax_scale=scale))
            advance(len(rows))
        out, lse = zip(*parts, strict=True)
        return torch.cat(out), torch.cat(lse)

    def full_lse(self, queries: Queries) -> Tensor:
        """fp32 [T, H]: log-sum-exp of the attention over all entries, a tile of them at a time."""
        view = self.cache.read_kv_view()
        q = project_main_query(self.config, self.main_query, queries.latents, queries.positions).float()
        total = torch.full(q.shape[:2], -torch.inf, device=self.device)
        for entries in torch.arange(self.num_entries, device=self.device).split(_ENTRIES_PER_TILE):
            kv = gather_kv(view, entries.unsqueeze(0), seq_ids=queries.seq_ids[:1])[0].float()  # [n, D]
            logits = q @ kv.T * self.config.head_dim**-0.5  # [T, H, n]
            total = torch.logaddexp(total, torch.logsumexp(logits, dim=-1))
        return total
