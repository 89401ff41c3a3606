"""One layer's caches for a batch of sequences, and the step that is being computed.

A step is a ragged batch: for each of some sequences, its next `n` tokens. `begin_step` says which, reserves the slots
of the entries that these tokens complete, and works out everything that the layer needs to know about positions; it
either does all of that or raises and changes nothing. Neither it nor the layer waits for a GPU.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_indexer.cache.pool import PagedPool
from lightning_indexer.cache.ring import TokenRing
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.step import Step, StepBuffer
from lightning_indexer.cache.view import IndexerView, KVView, PagedView
from lightning_indexer.checks import check_choice
from lightning_indexer.config import CSA_RATIO, DSV4Config
from lightning_indexer.ops.append import append_entries


class LayerCacheHandle:
    """The caches of one layer: paged index keys and KV entries, token window, compressor state.

    Which of them exist follows from the layer's kind: SWA has the window alone, HCA adds KV entries and a compressor
    state, CSA adds index keys and the indexer's compressor state.

    In V4.1 a full layer has the window, both pools and one compressor state, of which index keys are made too. Reindex
    and reuse layers have the window alone and read the rest through `source`; theirs begins each step first.

    Args:
        config, layer: geometry.
        max_seqs: sequences are 0 .. max_seqs - 1.
        num_blocks: blocks in each pool.
        entries_per_block: of both pools.
        index_format, kv_format: see `formats`. "fp32" for both is the exact route for comparing with a model in fp32.
            V4.1's own KV formats (288 and 528 bytes) are not there: "bf16" or "fp32".
        max_blocks_per_seq: columns of the block tables. Default: what the longest context needs, or all blocks.
        dtype: of the hidden states, and of the window.
        device: where all of it lies, and where the hidden states have to be.
        source: the handle of layer `config.layer_source(layer)`, where there is such a layer.
        keep_selection: hold on to what the layer chose in a step, in `selected`, until the next step begins. In V4.1 a
            layer that chooses does so anyway.
    """

    def __init__(
        self,
        config: DSV4Config,
        layer: int,
        *,
        max_seqs: int,
        num_blocks: int,
        entries_per_block: int = 64,
        index_format: str = "mxfp4",
        kv_format: str = "fp8_ds_mla",
        max_blocks_per_seq: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        source: "LayerCacheHandle | None" = None,
        keep_selection: bool = False,
    ) -> None:
        self.config, self.layer, self.kind = config, layer, config.layer_kind(layer)
        self.role = config.layer_role(layer)
        _check_source(config, layer, source)
        if config.is_v41 and kv_format not in ("bf16", "fp32"):
            raise ValueError(
                f"LayerCacheHandle: kv_format must be 'bf16' or 'fp32' for DeepSeek-V4.1, got {kv_format!r} (its own "
                "formats of 288 and 528 bytes are not implemented)"
            )
        self.compress_ratio = config.layer_compress_ratio(layer)
        self.kv_format = kv_format
        self.source = source
        self.selected: Tensor | None = None  # int32 [T, n] of the step in progress, where it is kept
        self.candidates: Tensor | None = None  # int32 [T, candidate_topk_blocks] of the step, beside the index keys
        self.keep_selection = keep_selection or (config.is_v41 and self.role in ("full", "reindex"))
        self.step: Step | None = None
        self._device = torch.device(device)
        self._max_seqs = max_seqs
        self._num_tokens: dict[int, int] = {}
        self._announced: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # seq_ids and num_tokens of the step
        self._slots: dict[str, Tensor] = {}
        self._static: dict[tuple[int, ...], StepBuffer] = {}

        def pool(format: str, head_dim: int) -> PagedPool:
            schema = CacheSchema(format, entries_per_block, head_dim=head_dim)
            most = -(-config.max_position_embeddings // (self.compress_ratio * entries_per_block))
            columns = min(num_blocks, most) if max_blocks_per_seq is None else max_blocks_per_seq
            return PagedPool(schema, num_blocks, max_seqs=max_seqs, max_blocks_per_seq=columns, device=device)

        def state(dim: int) -> TokenRing:
            windows = 2 if self.compress_ratio == CSA_RATIO else 1  # CSA's overlap: an entry pools two
            size, features = windows * self.compress_ratio, (2, windows * dim)  # values and gates
            return TokenRing(max_seqs, size, features, dtype=torch.float32, device=device)

        self.window = TokenRing(max_seqs, config.sliding_window, (config.head_dim,), dtype=dtype, device=device)
        has_kv, has_keys = self.kind != "SWA" and source is None, self.kind == "CSA" and source is None
        self.kv_pool = pool(kv_format, config.head_dim) if has_kv else None
        self.compressor_state = state(config.head_dim) if has_kv else None
        self.index_pool = pool(index_format, config.indexer_head_dim) if has_keys else None
        self.indexer_state = state(config.indexer_head_dim) if has_keys and not config.is_v41 else None

    @property
    def paged(self) -> PagedPool:
        """The pool that the indexer reads, or that of the KV entries where there is no indexer."""
        if self.source is not None:
            return self.source.paged
        pool = self.index_pool or self.kv_pool
        if pool is None:
            raise ValueError(f"LayerCacheHandle: layer {self.layer} is SWA and has no paged cache")
        return pool

    def num_tokens(self, seq_id: int) -> int:
        """Tokens of sequence `seq_id` so far, those of the step in progress included."""
        self._check_known(seq_id)
        return self._num_tokens[seq_id]

    def alloc(self, seq_id: int) -> None:
        """Start an empty sequence."""
        if not 0 <= seq_id < self._max_seqs:
            raise ValueError(f"LayerCacheHandle: seq_id must lie in 0..{self._max_seqs - 1}, got {seq_id}")
        if seq_id in self._num_tokens:
            raise ValueError(f"LayerCacheHandle: sequence {seq_id} is already allocated (free it first)")
        for pool in self._pools().values():
            pool.alloc(seq_id)
        self._num_tokens[seq_id] = 0

    def free(self, seq_id: int) -> None:
        """Forget a sequence and release its blocks."""
        self._check_known(seq_id)
        for pool in self._pools().values():
            pool.free(seq_id)
        del self._num_tokens[seq_id]

    def fork(self, src: int, dst: int) -> None:
        """Start sequence `dst` as a copy of `src`, sharing its full blocks."""
        self._check_known(src)
        if dst in self._num_tokens or not 0 <= dst < self._max_seqs:
            raise ValueError(f"LayerCacheHandle: dst must be free and in 0..{self._max_seqs - 1}, got {dst}")
        forked: list[PagedPool] = []
        try:
            for pool in self._pools().values():
                pool.fork(src, dst)
                forked.append(pool)
        except Exception:
            for pool in forked:
                pool.free(dst)
            raise
        for ring in (self.window, self.compressor_state, self.indexer_state):
            if ring is not None:
                ring.copy(src, dst)
        self._num_tokens[dst] = self._num_tokens[src]

    def begin_step(self, seq_ids: Sequence[int], num_tokens: Sequence[int], *, static: bool = False) -> Step:
        """Announce the next `num_tokens[i]` tokens of sequence `seq_ids[i]`; their rows come in this order.

        The layer has to be run on them before the next step begins: nobody else fills the slots reserved here.

        A CUDA graph of the layer is captured on a static step and replayed after each later one of the same
        `num_tokens`, begun outside the capture. Steps of one token per sequence may be run again, as to warm up:
        the same rows are written. A longer one may not: it overwrites tokens that its first tokens look back to.

        Args:
            static: write over the last static step with the same `num_tokens`, in the same memory, and let HCA attend
                to as many rows as the block table can address (most of them masked), not to those visible now.
        Raises:
            OutOfBlocks: the entries that these tokens complete do not fit. Nothing was changed.
            ValueError: wrong counts, or the layer that this one reads has not begun the step. Nothing was changed.
        """
        if len(set(seq_ids)) != len(seq_ids) or len(seq_ids) != len(num_tokens):
            raise ValueError(f"begin_step: want distinct seq_ids with one count each, got {seq_ids} and {num_tokens}")
        for seq_id, count in zip(seq_ids, num_tokens, strict=True):
            self._check_known(seq_id)
            if count < 0:
                raise ValueError(f"begin_step: num_tokens of sequence {seq_id} must not be negative, got {count}")
        starts = [self._num_tokens[seq_id] for seq_id in seq_ids]
        ends = [start + count for start, count in zip(starts, num_tokens, strict=True)]
        self._check_source_is_ahead(seq_ids, num_tokens, ends)
        completed = [self._entries(end) - self._entries(start) for start, end in zip(starts, ends, strict=True)]
        for pool in self._pools().values():
            pool.check_extend(seq_ids, completed)
        visible = self._entries(max(ends, default=0))
        buffer = self._static_buffer(num_tokens) if static else self._buffer(num_tokens, visible)
        # all pools hold the same entries, allocated in the same order, but may give them different slots
        buffer.write(seq_ids, starts, {name: pool.reserve(seq_ids, completed) for name, pool in self._pools().items()})
        self._num_tokens.update(zip(seq_ids, ends, strict=True))
        self._announced = (tuple(seq_ids), tuple(num_tokens))
        self.step, self._slots = buffer.step, buffer.slots
        self.selected = self.candidates = None
        return self.step

    def append(self, entries: Tensor, kind: Literal["index", "kv"]) -> None:
        """Write the entries [E, D] of the step, in the order of `entry_rows`, into the index or the KV pool.

        Rows of no entry may hold anything and go nowhere.
        """
        step, (view, slots) = self.require_step(), self.target(kind)
        if len(entries) != len(step.entry_rows):
            raise ValueError(f"append: entries must have {len(step.entry_rows)} rows for this step, got {len(entries)}")
        append_entries(entries, view, slots)

    def target(self, kind: Literal["index", "kv"]) -> tuple[PagedView, Tensor]:
        """Where the entries of the step go: the index or the KV pool, and their slots [E] in it, -1 for no entry."""
        self.require_step()
        check_choice("append", "kind", kind, ("index", "kv"))
        if kind not in self._slots:
            if self.source is not None:
                raise ValueError(f"LayerCacheHandle: layer {self.layer} reads the entries of layer {self.source.layer}")
            raise ValueError(f"LayerCacheHandle: layer {self.layer} is {self.kind} and has no {kind!r} pool")
        return (self.read_indexer_view() if kind == "index" else self.read_kv_view()), self._slots[kind]

    def read_indexer_view(self) -> IndexerView:
        """The paged index keys, as `score_topk` reads them."""
        if self.source is not None:
            return self.source.read_indexer_view()
        if self.index_pool is None:
            raise ValueError(f"LayerCacheHandle: layer {self.layer} is {self.kind} and has no index keys")
        return IndexerView(self.index_pool.storage, self.index_pool.schema, self.index_pool.block_table)

    def read_kv_view(self) -> KVView:
        """The paged KV entries, as `gather_kv` reads them."""
        if self.source is not None:
            return self.source.read_kv_view()
        if self.kv_pool is None:
            raise ValueError(f"LayerCacheHandle: layer {self.layer} is {self.kind} and has no KV entries")
        return KVView(self.kv_pool.storage, self.kv_pool.schema, self.kv_pool.block_table)

    def require_step(self) -> Step:
        """The step in progress."""
        if self.step is None:
            raise RuntimeError("LayerCacheHandle: no step in progress (call begin_step first)")
        if self._device.type == "cuda" and not self.step.is_static and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("LayerCacheHandle: a CUDA graph needs a static step (use begin_step(..., static=True))")
        return self.step

    def _static_buffer(self, counts: Sequence[int]) -> StepBuffer:
        """The memory that all static steps of these counts share."""
        key = tuple(counts)
        if key not in self._static:
            most = 0 if self.kind == "SWA" else self.paged.block_table.shape[1] * self.paged.schema.entries_per_block
            self._static[key] = self._buffer(key, most, is_static=True)
        return self._static[key]

    def _buffer(self, counts: Sequence[int], max_visible: int, *, is_static: bool = False) -> StepBuffer:
        pools, device = tuple(self._pools()), self._device
        return StepBuffer(
            counts, self.compress_ratio, pools, max_visible=max_visible, is_static=is_static, device=device
        )

    def _entries(self, num_tokens: int) -> int:
        return num_tokens // self.compress_ratio if self.compress_ratio else 0

    def _pools(self) -> dict[str, PagedPool]:
        """By the names that `append` knows them by."""
        named = {"kv": self.kv_pool, "index": self.index_pool}
        return {name: pool for name, pool in named.items() if pool is not None}

    def _check_known(self, seq_id: int) -> None:
        if seq_id not in self._num_tokens:
            raise ValueError(f"LayerCacheHandle: sequence {seq_id} is not allocated, have {sorted(self._num_tokens)}")

    def _check_source_is_ahead(self, seq_ids: Sequence[int], num_tokens: Sequence[int], ends: Sequence[int]) -> None:
        """Its rows and this layer's must be those of the same tokens."""
        source = self.source
        if source is None:
            return
        lengths = [source._num_tokens.get(seq_id) for seq_id in seq_ids]
        if source._announced != (tuple(seq_ids), tuple(num_tokens)) or lengths != ends:
            raise ValueError(
                f"begin_step: layer {source.layer}, which layer {self.layer} reads, must begin the same step first, "
                f"{num_tokens} tokens of {seq_ids}, up to {ends}; got {source._announced}, up to {lengths}"
            )


def _check_source(config: DSV4Config, layer: int, source: LayerCacheHandle | None) -> None:
    """Raise unless `source` is the handle of the layer that this one reads, or None where it reads its own."""
    wanted = config.layer_source(layer)
    if wanted is None:
        if source is not None:
            raise ValueError(f"LayerCacheHandle: layer {layer} reads its own entries, source must be left out")
        return
    if source is None or source.layer != wanted or source.config != config:
        got = "none" if source is None else f"one of layer {source.layer}"
        raise ValueError(f"LayerCacheHandle: source of layer {layer} must be the handle of layer {wanted}, got {got}")
