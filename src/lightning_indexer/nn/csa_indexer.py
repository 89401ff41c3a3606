"""The lightning indexer of a CSA layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_indexer.cache.handle import LayerCacheHandle
from lightning_indexer.checks import check_tensor
from lightning_indexer.config import DSV4Config
from lightning_indexer.formats import QUERY_FORMATS
from lightning_indexer.nn.compressor import Compressor
from lightning_indexer.nn.linear import Linear, LoadedModule, Nvfp4Linear, WeightsNotLoaded, linear_for, strip
from lightning_indexer.nn.norm import rms_norm
from lightning_indexer.nn.rope import LayerFrequencies
from lightning_indexer.ops.indexer_query import indexer_query
from lightning_indexer.ops.score_topk import score_topk
from lightning_indexer.ops.select_candidates import select_candidates
from lightning_indexer.query import QuantizedQuery
from lightning_indexer.rotary import apply_rope


class CSAIndexer(LoadedModule):
    """Which entries a token should attend to.

        q = quantise(Hadamard(RoPE(W_IUQ c_Q)));  w = W_w h / sqrt(H * D);  score[s] = sum_h w_h max(0, <q_h, K_s>)

    Owns W_IUQ (`wq_b`), W_w (`weights_proj`) and the compressor of the index keys; not W_DQ, whose output c_Q the main
    attention shares. Queries take the cache's format; an unquantised cache takes unquantised queries.

    In V4.1, K = RoPE(RMSNorm(W_k latent)) of the latents that the layer's KV entries are made from, without Hadamard
    rotation: a full layer owns W_k (`wk`) and the norm's weight (`k_norm`) instead of a compressor, and a reindex layer
    reads the index keys of another layer. The candidate source also chooses blocks of entries, with its own queries:
    the layers that choose after it, in the same step, choose among these.

    Args:
        config: geometry.
        layer: a CSA layer that chooses; default the first one.
    """

    def __init__(self, config: DSV4Config, layer: int | None = None) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers)
        if layer is None:
            layer = next((i for i in layers if config.layer_kind(i) == "CSA"), None)
        if layer is None or config.layer_kind(layer) != "CSA":
            raise ValueError(f"CSAIndexer: layer must be a CSA layer, got {layer} of ratios {config.compress_ratios}")
        role = config.layer_role(layer)
        if role == "reuse":
            raise ValueError(
                f"CSAIndexer: layer {layer} attends to what layer {config.layer_index_source(layer)} chose"
            )
        self.config, self.layer = config, layer
        self.num_heads, self.head_dim = config.indexer_num_heads, config.indexer_head_dim
        self.hidden_size, self.query_compression_dim = config.hidden_size, config.query_compression_dim
        self.top_k, self.rotate = config.csa_top_k, config.indexer_hadamard
        self.frequencies = LayerFrequencies(config, layer)
        self.compressor: Compressor | None = None
        if not config.is_v41:
            self.compressor = Compressor(config, layer, dim=self.head_dim, rotate=self.rotate)
        self.makes_keys_of_latents = config.is_v41 and role == "full"
        self.wk: Linear | None = None
        self.wq_b: Linear | None = None
        self.weights_proj: Linear | None = None

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take `wq_b.*` [H * D, q_rank], `weights_proj.*` [H, hidden] and `compressor.*`, as `load_attention_weights`
        names them without their "indexer." prefix. V4.1: `wk.weight` [D, head_dim] and `k_norm.weight` [D] instead of
        `compressor.*` in full layers, neither in reindex layers."""
        wq_b = linear_for("wq_b", weights, self.query_compression_dim, self.num_heads * self.head_dim)
        weights_proj = linear_for("weights_proj", weights, self.hidden_size, self.num_heads)
        if self.makes_keys_of_latents:
            self._load_key_weights(weights)
        if self.compressor is not None:
            self.compressor.load_weights(strip(weights, "compressor."))
        self.wq_b, self.weights_proj = wq_b, weights_proj

    def _check_keepable(self, dtype: torch.dtype) -> None:
        """Raise unless the weights are loaded."""
        self._query_linears()

    @torch.no_grad()
    def forward(self, c_Q: Tensor, h_t: Tensor, cache: LayerCacheHandle, *, latents: Tensor | None = None) -> Tensor:
        """Write the index keys that this step completes, then choose each token's entries.

        Args:
            c_Q: [T, query_compression_dim], the normalised query latent.
            h_t: [T, hidden], the attention block's input.
            cache: with a step of T tokens in progress. Its index pool and indexer state are updated.
            latents: [E, head_dim] of the entries that this step completes, from `Compressor.write`: in full layers of
                V4.1, nowhere else.
        Returns:
            int32 [T, csa_top_k], ascending, -1 where a token sees fewer entries.
        Raises:
            RuntimeError: the candidates of this step are not there. Nothing was written.
        """
        step = cache.require_step()
        floats = (torch.bfloat16, torch.float32, torch.float16)
        latent, device = (step.num_tokens, self.query_compression_dim), step.positions.device
        check_tensor("CSAIndexer", "c_Q", c_Q, dtype=floats, shape=latent, device=device)
        check_tensor("CSAIndexer", "h_t", h_t, dtype=floats, shape=(step.num_tokens, self.hidden_size), device=device)
        if cache.kind != "CSA" or cache.paged.schema.dim != self.head_dim:
            raise ValueError(
                f"CSAIndexer: cache must be that of a CSA layer with index keys of {self.head_dim} dims, "
                f"got kind {cache.kind}" + ("" if cache.kind != "CSA" else f", {cache.paged.schema.dim} dims")
            )
        candidates = self._candidates(cache)
        q, weights = self.query(c_Q, h_t, step.positions, cache.paged.schema.format)
        self.write_keys(h_t, cache, latents=latents)
        if self.layer == self.config.candidate_source_layer_id and self._restricts(cache):
            self._choose_candidates(q, weights, cache)
        return score_topk(
            q,
            weights,
            cache.read_indexer_view(),
            top_k=self.top_k,
            valid_lens=step.valid_lens,
            seq_ids=step.seq_ids,
            candidates=candidates,
            candidate_entries=self.config.candidate_block_size,
        )

    @torch.no_grad()
    def write_keys(self, h_t: Tensor, cache: LayerCacheHandle, *, latents: Tensor | None = None) -> None:
        """Write the index keys that this step completes, as `forward` does, and choose nothing.

        For a layer that attends to another's choice in this step and may choose in a later one.
        """
        if (latents is None) == self.makes_keys_of_latents:
            wanted = "be given in a full layer of V4.1" if latents is None else "be left out here"
            raise ValueError(f"CSAIndexer: latents must {wanted} (layer {self.layer})")
        if latents is not None:
            cache.append(self._keys(latents, cache), "index")
        elif self.compressor is not None:
            self.compressor.write(h_t, cache, "index")

    def query(self, c_Q: Tensor, h_t: Tensor, positions: Tensor, format: str) -> tuple[Tensor | QuantizedQuery, Tensor]:
        """Queries [T, H, D] in the cache's `format` and fp32 weights [T, H] with both scale factors folded in."""
        wq_b, weights_proj = self._query_linears()
        if isinstance(wq_b, Nvfp4Linear) and wq_b.output_format is not None:
            q, format = wq_b.dense(c_Q), wq_b.output_format
        else:
            q = wq_b(c_Q)
        return indexer_query(
            q.unflatten(-1, (self.num_heads, self.head_dim)),
            weights_proj(h_t),
            positions,
            self.frequencies.on(q.device),
            format=format if format in QUERY_FORMATS else None,
            rotate=self.rotate,
            weight_scale=self.head_dim**-0.5 * self.num_heads**-0.5,
        )

    def _query_linears(self) -> tuple[Linear, Linear]:
        if self.wq_b is None or self.weights_proj is None:
            raise WeightsNotLoaded("CSAIndexer: wq_b and weights_proj are not loaded (call load_weights first)")
        return self.wq_b, self.weights_proj

    def _keys(self, latents: Tensor, cache: LayerCacheHandle) -> Tensor:
        """[E, D]: V4.1's index keys of the step's entries."""
        if self.wk is None:
            raise WeightsNotLoaded("CSAIndexer: wk is not loaded (call load_weights first)")
        step, dim = cache.require_step(), self.wk.in_features
        dtypes = (torch.bfloat16, torch.float32, torch.float16)
        check_tensor("CSAIndexer", "latents", latents, dtype=dtypes, shape=(len(step.entry_rows), dim))
        keys = rms_norm(self.wk(latents), self.get("k_norm"), self.config.rms_norm_eps)
        return apply_rope(keys, step.entry_indices * cache.compress_ratio, self.frequencies.on(keys.device))

    def _load_key_weights(self, weights: Mapping[str, Tensor]) -> None:
        wk = linear_for("wk", weights, self.config.head_dim, self.head_dim)
        if "k_norm.weight" not in weights:
            raise KeyError(f"CSAIndexer: k_norm.weight is missing, got {sorted(weights)}")
        dtypes = (torch.bfloat16, torch.float32, torch.float16)
        check_tensor("CSAIndexer", "k_norm.weight", weights["k_norm.weight"], dtype=dtypes, shape=(self.head_dim,))
        self.wk = wk
        self.put("k_norm", weights["k_norm.weight"])

    def _candidates(self, cache: LayerCacheHandle) -> Tensor | None:
        """int32 [T, candidate_topk_blocks]: what this layer may choose from; None for everything."""
        config = self.config
        if not config.layer_chooses_among_candidates(self.layer) or not self._restricts(cache):
            return None
        candidates = _with_keys(cache).candidates
        if candidates is None:
            raise RuntimeError(
                f"CSAIndexer: layer {config.candidate_source_layer_id}, among whose candidates layer {self.layer} "
                "chooses, must choose first in this step"
            )
        return candidates

    def _choose_candidates(self, q: Tensor | QuantizedQuery, weights: Tensor, cache: LayerCacheHandle) -> None:
        step, config = cache.require_step(), self.config
        _with_keys(cache).candidates = select_candidates(
            q,
            weights,
            cache.read_indexer_view(),
            valid_lens=step.valid_lens,
            seq_ids=step.seq_ids,
            num_blocks=config.candidate_topk_blocks,
            block_entries=config.candidate_block_size,
        )

    def _restricts(self, cache: LayerCacheHandle) -> bool:
        """Whether some token may see more entries than there are candidates: else all are candidates."""
        most = self.config.candidate_topk_blocks * self.config.candidate_block_size
        return _with_keys(cache).require_step().max_visible > most


def _with_keys(cache: LayerCacheHandle) -> LayerCacheHandle:
    """The handle of the layer whose index keys are read: where the candidates among them are found."""
    return cache if cache.source is None else cache.source
