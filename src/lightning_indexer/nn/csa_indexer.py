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
from lightning_indexer.nn.rope import LayerFrequencies
from lightning_indexer.ops.indexer_query import indexer_query
from lightning_indexer.ops.score_topk import score_topk
from lightning_indexer.query import QuantizedQuery


class CSAIndexer(LoadedModule):
    """Which entries a token should attend to.

        q = quantise(Hadamard(RoPE(W_IUQ c_Q)));  w = W_w h / sqrt(H * D);  score[s] = sum_h w_h max(0, <q_h, K_s>)

    Owns W_IUQ (`wq_b`), W_w (`weights_proj`) and the compressor of the index keys; not W_DQ, whose output c_Q the main
    attention shares. Queries take the cache's format; an unquantised cache takes unquantised queries.

    Args:
        config: geometry.
        layer: a CSA layer; default the first one.
    """

    def __init__(self, config: DSV4Config, layer: int | None = None) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers)
        if layer is None:
            layer = next((i for i in layers if config.layer_kind(i) == "CSA"), None)
        if layer is None or config.layer_kind(layer) != "CSA":
            raise ValueError(f"CSAIndexer: layer must be a CSA layer, got {layer} of ratios {config.compress_ratios}")
        self.num_heads, self.head_dim = config.indexer_num_heads, config.indexer_head_dim
        self.hidden_size, self.query_compression_dim = config.hidden_size, config.query_compression_dim
        self.top_k, self.rotate = config.csa_top_k, config.indexer_hadamard
        self.frequencies = LayerFrequencies(config, layer)
        self.compressor = Compressor(config, layer, dim=self.head_dim, rotate=self.rotate)
        self.wq_b: Linear | None = None
        self.weights_proj: Linear | None = None

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take `wq_b.*` [H * D, q_rank], `weights_proj.*` [H, hidden] and `compressor.*`, as `load_attention_weights`
        names them without their "indexer." prefix."""
        wq_b = linear_for("wq_b", weights, self.query_compression_dim, self.num_heads * self.head_dim)
        weights_proj = linear_for("weights_proj", weights, self.hidden_size, self.num_heads)
        self.compressor.load_weights(strip(weights, "compressor."))
        self.wq_b, self.weights_proj = wq_b, weights_proj

    @torch.no_grad()
    def forward(self, c_Q: Tensor, h_t: Tensor, cache: LayerCacheHandle) -> Tensor:
        """Write the index keys that this step completes, then choose each token's entries.

        Args:
            c_Q: [T, query_compression_dim], the normalised query latent.
            h_t: [T, hidden], the attention block's input.
            cache: with a step of T tokens in progress. Its index pool and indexer state are updated.
        Returns:
            int32 [T, csa_top_k], ascending, -1 where a token sees fewer entries.
        """
        step = cache.require_step()
        floats = (torch.bfloat16, torch.float32, torch.float16)
        latent, device = (step.num_tokens, self.query_compression_dim), step.positions.device
        check_tensor("CSAIndexer", "c_Q", c_Q, dtype=floats, shape=latent, device=device)
        check_tensor("CSAIndexer", "h_t", h_t, dtype=floats, shape=(step.num_tokens, self.hidden_size), device=device)
        if cache.indexer_state is None or cache.paged.schema.dim != self.head_dim:
            raise ValueError(
                f"CSAIndexer: cache must be that of a CSA layer with index keys of {self.head_dim} dims, "
                f"got kind {cache.kind}" + ("" if cache.indexer_state is None else f", {cache.paged.schema.dim} dims")
            )
        q, weights = self.query(c_Q, h_t, step.positions, cache.paged.schema.format)
        self.compressor.write(h_t, cache, "index")
        return score_topk(
            q,
            weights,
            cache.read_indexer_view(),
            top_k=self.top_k,
            valid_lens=step.valid_lens,
            seq_ids=step.seq_ids,
        )

    def query(self, c_Q: Tensor, h_t: Tensor, positions: Tensor, format: str) -> tuple[Tensor | QuantizedQuery, Tensor]:
        """Queries [T, H, D] in the cache's `format` and fp32 weights [T, H] with both scale factors folded in."""
        if self.wq_b is None or self.weights_proj is None:
            raise WeightsNotLoaded("CSAIndexer: wq_b and weights_proj are not loaded (call load_weights first)")

        if isinstance(self.wq_b, Nvfp4Linear) and self.wq_b.output_format is not None:
            q, format = self.wq_b.dense(c_Q), self.wq_b.output_format
        else:
            q = self.wq_b(c_Q)
        return indexer_query(
            q.unflatten(-1, (self.num_heads, self.head_dim)),
            self.weights_proj(h_t),
            positions,
            self.frequencies.on(q.device),
            format=format if format in QUERY_FORMATS else None,
            rotate=self.rotate,
            weight_scale=self.head_dim**-0.5 * self.num_heads**-0.5,
        )
