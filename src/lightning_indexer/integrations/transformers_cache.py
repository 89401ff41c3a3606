"""The cache of a CSA layer of transformers' DeepSeek-V4, with its index keys in a `PagedPool`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache

from lightning_indexer.cache.pool import PagedPool
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.formats import QUERY_FORMATS
from lightning_indexer.ops.append import append_entries
from lightning_indexer.ops.score_topk import score_topk
from lightning_indexer.query import QuantizedQuery, quantize_query
from lightning_indexer.rotary import hadamard


@dataclass(frozen=True)
class IndexOptions:
    """How index keys are kept and scored.

    schema: bytes of a block. max_entries: per sequence; None: the pool grows. impl: of the ops.
    """

    schema: CacheSchema
    max_entries: int | None
    impl: str

    @property
    def quantized(self) -> bool:
        return self.schema.format in QUERY_FORMATS


_Base: Any = DeepseekV4CSACache  # Any, so that type checks are the same with every version and without one


class PagedCSACache(_Base):  # type: ignore[misc]
    """transformers' cache of a CSA layer; the index keys alone lie elsewhere, in `pool`.

    The batch's sequences are `rows` of the pool's block table. Window, compressed KV and the state of both compressors
    are kept as transformers keeps them.
    """

    _layer_type = None  # with a name, transformers would give this class to every V4 model of the process

    options: IndexOptions
    pool: PagedPool | None
    rows: list[int]
    position_ids: Tensor | None  # of the forward pass in progress; None outside of one

    @classmethod
    def adopt(cls, layer: Any, options: IndexOptions) -> "PagedCSACache":
        """Turn an empty `DeepseekV4CSACache` into one of this class, in place: its compressor has it in hand already.

        One that is of this class stays as it is, with the options it began with.
        """
        if isinstance(layer, cls):
            return layer
        if layer.buffer_kv["indexer"] is not None:
            raise ValueError(
                "accelerate: past_key_values must be new or come from an accelerated model, got one that the model "
                "alone has filled (start with a new cache)"
            )
        layer.__class__ = cls
        layer.options, layer.pool, layer.rows, layer.position_ids = options, None, [], None
        adopted: PagedCSACache = layer
        return adopted

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        """As transformers' own, but that index keys [B, n, D] are written to the pool, and [B, 0, D] is returned."""
        if name != "indexer":
            states: Tensor = super().update_compressor_states(name, compressed)
            return states
        if self.position_ids is None:
            raise RuntimeError(
                "PagedCSACache: past_key_values comes from an accelerated model, whose index keys this model cannot "
                "read (accelerate it, or start with a new cache)"
            )
        batch, count, _ = compressed.shape
        pool = self._make_room(batch, count, compressed.device)
        slots = pool.extend(self.rows, [count] * batch)
        keys = hadamard(compressed) if self.options.quantized else compressed
        append_entries(keys.flatten(0, 1), self._view(pool), slots, impl=self.options.impl)
        self.entry_count["indexer"] += count
        return compressed[:, :0]

    def select(self, q: Tensor, weights: Tensor, top_k: int) -> Tensor:
        """The `top_k` best entries of each query, of those that its position lets it see.

        Args:
            q: [B, S, H, D], after RoPE. weights: fp32 [B, S, H], scale factors folded in.
        Returns:
            int64 [B, S, min(top_k, entries)], ascending, -1 where a query sees fewer.
        """
        assert self.position_ids is not None and self.pool is not None, "keys are appended before queries are scored"
        batch, seq_len = q.shape[:2]
        entries = self.entry_count["indexer"]
        visible = ((self.position_ids + 1) // self.compress_rate).clamp(0, entries).expand(batch, seq_len)
        rows = torch.tensor(self.rows, dtype=torch.int32, device=q.device)
        chosen = score_topk(
            self._query(q.flatten(0, 1)),
            weights.flatten(0, 1),
            self._view(self.pool),
            top_k=top_k,
            valid_lens=visible.flatten().int(),
            seq_ids=rows.repeat_interleave(seq_len),
            impl=self.options.impl,
        )
        return chosen[:, :entries].long().view(batch, seq_len, -1)  # nothing but -1 is cut off

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]; beams share the blocks that are full."""
        super().reorder_cache(beam_idx)
        if self.pool is None:
            return
        old, batch = self.rows, len(self.rows)
        self.rows = [(row + batch) % (2 * batch) for row in old]
        for source, row in zip(beam_idx.tolist(), self.rows, strict=True):
            self.pool.fork(old[source], row)
        for row in old:
            self.pool.free(row)

    def reset(self) -> None:
        super().reset()
        self.pool, self.rows = None, []

    def _query(self, q: Tensor) -> Tensor | QuantizedQuery:
        return quantize_query(hadamard(q), self.options.schema.format) if self.options.quantized else q

    def _view(self, pool: PagedPool) -> IndexerView:
        return IndexerView(pool.storage, pool.schema, pool.block_table)

    def _make_room(self, batch: int, count: int, device: torch.device) -> PagedPool:
        """The pool, with blocks for `count` more entries of each sequence and one more each, for `reorder_cache`."""
        schema, most = self.options.schema, self.options.max_entries
        entries = self.entry_count["indexer"] + count
        if most is not None and entries > most:
            raise ValueError(
                f"accelerate: max_tokens must cover a whole sequence, got room for {most} entries of "
                f"{self.compress_rate} tokens and a sequence of {entries} (give more, or none to let the cache grow)"
            )
        columns = max(1, -(-(entries if most is None else most) // schema.entries_per_block))
        if self.pool is None:
            self.rows = list(range(batch))
            self.pool = PagedPool(
                schema, batch * (columns + 1), max_seqs=2 * batch, max_blocks_per_seq=columns, device=device
            )
            for row in self.rows:
                self.pool.alloc(row)
        elif columns > self.pool.block_table.shape[1]:
            columns = max(columns, 2 * self.pool.block_table.shape[1])
            self.pool.grow(len(self.rows) * (columns + 1), max_blocks_per_seq=columns)
        return self.pool
