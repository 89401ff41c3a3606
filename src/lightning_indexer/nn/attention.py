"""The attention sub-block of a layer: CSA, HCA or SWA."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_indexer.cache.handle import LayerCacheHandle
from lightning_indexer.cache.step import Step
from lightning_indexer.checks import check_tensor
from lightning_indexer.config import DSV4Config
from lightning_indexer.formats import fake_quantize
from lightning_indexer.nn.compressor import Compressor
from lightning_indexer.nn.csa_indexer import CSAIndexer
from lightning_indexer.nn.linear import Linear, LoadedModule, WeightsNotLoaded, linear_for, strip
from lightning_indexer.nn.norm import rms_norm
from lightning_indexer.nn.rope import LayerFrequencies
from lightning_indexer.ops.attention import sparse_attention
from lightning_indexer.ops.gather_kv import gather_kv
from lightning_indexer.rotary import apply_rope

_ROWS_PER_TILE = 8_192  # KV rows gathered at a time, over all tokens of a tile: 16 MiB in fp32 at 512 dims


class AttentionSubBlock(LoadedModule):
    """x [T, hidden] -> [T, hidden]: attention over a window of raw tokens and over compressed entries.

    CSA attends to the entries its indexer chose, HCA to all visible entries, SWA to the window alone. Keys and values
    are one vector per row, shared by all heads; the last rope_head_dim channels of a head's output are rotated back
    before the grouped low-rank output projection. Residual, input norm and hyper-connections are the caller's.

    In V4.1 entries may be another layer's, and so may the choice among them (see `config`).
    """

    def __init__(self, config: DSV4Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.kind = config, layer, config.layer_kind(layer)
        self.frequencies = LayerFrequencies(config, layer)
        role = config.layer_role(layer)
        has_entries = self.kind == "HCA" or role == "full"
        self.compressor = Compressor(config, layer, dim=config.head_dim) if has_entries else None
        self.indexer = CSAIndexer(config, layer) if role in ("full", "reindex") else None
        self.linears = torch.nn.ModuleDict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take what `load_attention_weights` returns; a linear layer keeps the format it is stored in.

        `keep_dense` multiplies it out.
        """
        config = self.config
        heads, grouped = config.num_heads * config.head_dim, config.o_groups * config.o_lora_rank
        sizes = {
            "wq_a": (config.hidden_size, config.query_compression_dim),
            "wq_b": (config.query_compression_dim, heads),
            "wkv": (config.hidden_size, config.head_dim),
            "wo_a": (heads // config.o_groups, grouped),
            "wo_b": (grouped, config.hidden_size),
        }
        norms = {
            "q_norm.weight": config.query_compression_dim,
            "kv_norm.weight": config.head_dim,
            "attn_sink": config.num_heads,
        }
        loaded = {name: linear_for(name, weights, *size) for name, size in sizes.items()}
        for name, size in norms.items():
            if name not in weights:
                raise KeyError(f"AttentionSubBlock: {name} is missing, got {sorted(weights)}")
            dtypes = (torch.bfloat16, torch.float32, torch.float16)
            check_tensor("AttentionSubBlock", name, weights[name], dtype=dtypes, shape=(size,))
        if self.compressor is not None:
            self.compressor.check_weights(strip(weights, "compressor."))
        if self.indexer is not None:
            self.indexer.load_weights(strip(weights, "indexer."))
        if self.compressor is not None:
            self.compressor.load_weights(strip(weights, "compressor."))
        self.linears.update(loaded)
        for name in norms:
            self.put(name.removesuffix(".weight"), weights[name])

    def _check_keepable(self, dtype: torch.dtype) -> None:
        """Raise unless the weights are loaded."""
        self._linear("wq_a")

    @torch.no_grad()
    def forward(self, x: Tensor, cache: LayerCacheHandle, *, indices: Tensor | None = None) -> Tensor:
        """Attend with the step's tokens.

        Args:
            x: [T, hidden] bf16, fp32 or fp16, in the order of the step that `cache.begin_step` announced.
            cache: this layer's; all its parts are updated.
            indices: int32 [T, n], the entries to attend to, instead of what this layer's indexer would choose; -1 for
                none. For a CSA layer, from another of the same ratio (`LayerCacheHandle.selected`). Index keys are
                written all the same, so that a later step may choose anew. A reuse layer of V4.1 finds them by itself.
        Returns:
            [T, hidden] in x's dtype.
        """
        step = cache.require_step()
        dtypes = (torch.bfloat16, torch.float32, torch.float16)
        shape = (step.num_tokens, self.config.hidden_size)
        check_tensor("AttentionSubBlock", "x", x, dtype=dtypes, shape=shape, device=step.positions.device)
        if cache.kind != self.kind:
            raise ValueError(f"AttentionSubBlock: layer {self.layer} is {self.kind}, got a cache of kind {cache.kind}")
        if cache.config != self.config:
            raise ValueError(f"AttentionSubBlock: cache must have this layer's config, got one of {cache.config}")
        if self.config.is_v41 and cache.layer != self.layer:
            raise ValueError(f"AttentionSubBlock: cache must be that of layer {self.layer}, got that of {cache.layer}")
        if cache.window.rows.dtype != x.dtype:
            raise TypeError(
                f"AttentionSubBlock: x must have the cache's dtype {cache.window.rows.dtype}, got {x.dtype} "
                "(use LayerCacheHandle(..., dtype=x.dtype))"
            )
        indices = self._given(indices, cache)
        c_Q = self.query_latent(x)
        q = self.query(c_Q, step)
        window_kv = self.window_kv(x, step, cache.kv_format)
        latents = self.compressor.write(x, cache, "kv") if self.compressor is not None else None
        if indices is None:
            indices = self._select(c_Q, x, cache, latents)
        elif self.indexer is not None:
            self.indexer.write_keys(x, cache, latents=latents)
        if cache.keep_selection:
            cache.selected = indices
        attended = self._attend(q, window_kv, indices, cache)
        cache.window.update(step, window_kv)
        return self.project(attended, step)

    def query_latent(self, x: Tensor) -> Tensor:
        """[T, query_compression_dim], normalised: what both the main queries and the indexer's are made from."""
        return rms_norm(self._linear("wq_a")(x), self.get("q_norm"), self.config.rms_norm_eps)

    def query(self, c_Q: Tensor, step: Step) -> Tensor:
        """[T, H, head_dim], rotated."""
        q = self._linear("wq_b")(c_Q).unflatten(-1, (self.config.num_heads, self.config.head_dim))
        q = rms_norm(q, None, self.config.rms_norm_eps)
        return apply_rope(q, step.positions, self.frequencies.on(q.device))

    def window_kv(self, x: Tensor, step: Step, kv_format: str) -> Tensor:
        """[T, head_dim]: this step's raw rows, rounded as the compressed ones are where these are FP8."""
        kv = rms_norm(self._linear("wkv")(x), self.get("kv_norm"), self.config.rms_norm_eps)
        kv = apply_rope(kv, step.positions, self.frequencies.on(x.device))
        return fake_quantize(kv, kv_format) if kv_format == "fp8_ds_mla" else kv

    def _given(self, indices: Tensor | None, cache: LayerCacheHandle) -> Tensor | None:
        """Indices that this layer does not choose, checked: the caller's or, in a reuse layer, its source's."""
        step = cache.require_step()
        if indices is None and cache.role == "reuse":
            indices = cache.source.selected if cache.source is not None else None
            if indices is None:
                source = self.config.layer_index_source(self.layer)
                raise RuntimeError(
                    f"AttentionSubBlock: layer {source}, whose choice layer {self.layer} attends to, must run first"
                )
        if indices is None:
            return None
        if self.kind != "CSA":
            raise ValueError(f"AttentionSubBlock: indices must be left out in layer {self.layer}, which is {self.kind}")
        shape, device = (step.num_tokens, "n"), step.positions.device
        check_tensor("AttentionSubBlock", "indices", indices, dtype=torch.int32, shape=shape, device=device)
        if indices.is_cpu:
            _check_visible(indices, step)
        return indices

    def _select(self, c_Q: Tensor, x: Tensor, cache: LayerCacheHandle, latents: Tensor | None) -> Tensor:
        """int32 [T, k] entries to attend to, -1 where there are fewer."""
        step = cache.require_step()
        if self.indexer is not None:
            chosen: Tensor = self.indexer(c_Q, x, cache, latents=latents)
            return chosen[:, : step.max_visible]  # ascending with -1 at the end: nothing is cut off
        entries = torch.arange(step.max_visible, dtype=torch.int32, device=x.device)
        return torch.where(entries < step.valid_lens.unsqueeze(1), entries, -1)

    def _attend(self, q: Tensor, window_kv: Tensor, indices: Tensor, cache: LayerCacheHandle) -> Tensor:
        """[T, H, head_dim], a tile of tokens at a time so that the gathered rows stay bounded."""
        step = cache.require_step()
        tokens, rows, in_window = self.window_rows(window_kv, cache)
        seen = torch.cat([indices >= 0, in_window], dim=1)
        out = torch.empty_like(q)
        tile = max(1, _ROWS_PER_TILE // seen.shape[1])
        for start in range(0, step.num_tokens, tile):
            part = slice(start, start + tile)
            selected = self._gather(indices[part], step.seq_ids[part], cache, q)
            out[part], _ = sparse_attention(
                q[part],
                selected,
                tokens[rows[part]],
                valid=seen[part],
                sink=self.get("attn_sink").float(),
                softmax_scale=self.config.head_dim**-0.5,
            )
        return out

    def window_rows(self, window_kv: Tensor, cache: LayerCacheHandle) -> tuple[Tensor, Tensor, Tensor]:
        """Old and new tokens [n, head_dim]; each token's window in them, rows [T, W]; which of these exist [T, W]."""
        step = cache.require_step()
        back = torch.arange(1 - cache.window.size, 1, device=window_kv.device)
        positions = step.positions.unsqueeze(1) + back
        tokens = cache.window.with_chunk(step, window_kv)
        return tokens, cache.window.find(step, step.batch_rows, positions), positions >= 0

    def _gather(self, indices: Tensor, seq_ids: Tensor, cache: LayerCacheHandle, q: Tensor) -> Tensor:
        if indices.shape[1] == 0:
            return q.new_empty(len(indices), 0, self.config.head_dim)
        return gather_kv(cache.read_kv_view(), indices, seq_ids=seq_ids)

    def project(self, attended: Tensor, step: Step) -> Tensor:
        """[T, H, head_dim] -> [T, hidden]: rotated back, each group of heads through its block of wo_a, then wo_b."""
        attended = apply_rope(attended, step.positions, self.frequencies.on(attended.device), inverse=True)
        groups = self.config.o_groups
        weight = self._linear("wo_a").dense_weight(attended.dtype).unflatten(0, (groups, -1))  # [G, rank, H/G * D]
        grouped = attended.flatten(1).unflatten(1, (groups, -1)).transpose(0, 1)  # [G, T, H/G * D]
        mixed = torch.bmm(grouped, weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        out: Tensor = self._linear("wo_b")(mixed)
        return out

    def _linear(self, name: str) -> Linear:
        if name not in self.linears:
            raise WeightsNotLoaded(f"AttentionSubBlock: {name} is not loaded (call load_weights first)")
        layer = self.linears[name]
        assert isinstance(layer, Linear), "load_weights puts nothing else here"
        return layer


def _check_visible(indices: Tensor, step: Step) -> None:
    """Raise ValueError for an entry that its token does not see."""
    unseen = (indices >= step.valid_lens.unsqueeze(1)).any(1).nonzero()
    if len(unseen):
        token = int(unseen[0])
        raise ValueError(
            f"AttentionSubBlock: indices must lie below what a token sees, {int(step.valid_lens[token])} for token "
            f"{token}, got {int(indices[token].max())}"
        )
