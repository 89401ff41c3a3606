"""DeepSeek-V4's lightning indexer: score paged keys, keep the top k, gather them, attend."""

from lightning_indexer import torch_library as torch_library  # registers torch.ops.lightning_indexer
from lightning_indexer.cache.handle import LayerCacheHandle
from lightning_indexer.cache.pool import OutOfBlocks, PagedPool
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView, KVView
from lightning_indexer.checkpoint import load_attention_weights
from lightning_indexer.config import DSV4Config
from lightning_indexer.formats import dequantize, quantize
from lightning_indexer.nn.attention import AttentionSubBlock
from lightning_indexer.nn.compressor import Compressor
from lightning_indexer.nn.csa_indexer import CSAIndexer
from lightning_indexer.nn.linear import Fp8BlockLinear, Nvfp4Linear
from lightning_indexer.ops.append import append_entries
from lightning_indexer.ops.attention import sparse_attention
from lightning_indexer.ops.gather_kv import gather_kv
from lightning_indexer.ops.merge import merge_topk
from lightning_indexer.ops.score_topk import index_scores, score_topk, score_topk_workspace_bytes
from lightning_indexer.ops.select_candidates import select_candidates
from lightning_indexer.ops.shard import ContiguousShard, InterleavedShard
from lightning_indexer.ops.valid_lens import compute_valid_lens, visible_entries
from lightning_indexer.query import QuantizedQuery, quantize_query

__version__ = "0.1.0"

__all__ = [
    "AttentionSubBlock",
    "CSAIndexer",
    "CacheSchema",
    "Compressor",
    "ContiguousShard",
    "DSV4Config",
    "Fp8BlockLinear",
    "IndexerView",
    "InterleavedShard",
    "KVView",
    "LayerCacheHandle",
    "Nvfp4Linear",
    "OutOfBlocks",
    "PagedPool",
    "QuantizedQuery",
    "append_entries",
    "compute_valid_lens",
    "dequantize",
    "gather_kv",
    "index_scores",
    "load_attention_weights",
    "merge_topk",
    "quantize",
    "quantize_query",
    "score_topk",
    "score_topk_workspace_bytes",
    "select_candidates",
    "sparse_attention",
    "visible_entries",
]
