"""What is timed. A case is data; its operands are made from its own seed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer.cache.pool import PagedPool
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.formats import QUERY_FORMATS
from lightning_indexer.ops.append import append_entries
from lightning_indexer.query import QuantizedQuery, quantize_query

_CHUNK = 65_536  # entries quantised at a time


@dataclass(frozen=True)
class Case:
    """`num_seqs` sequences of `entries` entries with `tokens` queries each; every query sees every entry."""

    kind: str
    tokens: int
    num_seqs: int
    entries: int
    format: str = "mxfp4"
    top_k: int = 512
    num_heads: int = 64
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.num_seqs}x{self.tokens}-entries{self.entries}-k{self.top_k}-{self.format}"

    @property
    def num_queries(self) -> int:
        return self.tokens * self.num_seqs

    @property
    def flop(self) -> int:
        """Multiplications and additions of the dot products."""
        return 2 * self.num_queries * self.num_heads * self.head_dim * self.entries

    @property
    def dense_bytes(self) -> int:
        """A float32 score per query and entry: what an implementation that writes its scores out holds at least."""
        return 4 * self.num_queries * self.entries


@dataclass(frozen=True, eq=False)
class Operands:
    """q: unquantised values as the cache's arithmetic sees them, fp32 [T, H, D], beside `query`, what is passed."""

    query: Tensor | QuantizedQuery
    q: Tensor
    weights: Tensor
    view: IndexerView
    valid_lens: Tensor
    seq_ids: Tensor


PREFILL = Case("prefill", 512, 1, 32_768)
GRID = (
    Case("decode", 1, 1, 8_192),
    Case("decode", 1, 1, 32_768),
    Case("decode", 1, 1, 262_144),
    Case("decode", 1, 16, 8_192),
    Case("prefill", 128, 1, 8_192),
    PREFILL,
    Case("prefill", 128, 1, 32_768, top_k=2_048),
    Case("prefill", 128, 1, 32_768, format="nvfp4"),
    Case("prefill", 128, 1, 32_768, format="fp8"),
    Case("prefill", 128, 1, 32_768, format="bf16"),
)
QUICK_GRID = (Case("decode", 1, 1, 8_192), Case("prefill", 16, 1, 8_192))


def make_operands(case: Case) -> Operands:
    """Seeded random operands; keys through the real append path."""
    generator = torch.Generator().manual_seed(0)
    schema = CacheSchema(case.format, head_dim=case.head_dim)
    blocks = -(-case.entries // schema.entries_per_block)
    pool = PagedPool(schema, blocks * case.num_seqs, max_seqs=case.num_seqs)
    view = IndexerView(pool.storage, schema, pool.block_table)
    for seq_id in range(case.num_seqs):
        slots = pool.alloc(seq_id, case.entries)
        for part in slots.split(_CHUNK):
            append_entries(torch.randn(len(part), case.head_dim, generator=generator), view, part)
    q = torch.randn(case.num_queries, case.num_heads, case.head_dim, generator=generator)
    query = quantize_query(q, case.format) if case.format in QUERY_FORMATS else q.bfloat16()
    return Operands(
        query=query,
        q=query.dequantize() if isinstance(query, QuantizedQuery) else query.float(),
        weights=torch.randn(case.num_queries, case.num_heads, generator=generator) * 0.011,
        view=view,
        valid_lens=torch.full((case.num_queries,), case.entries, dtype=torch.int32),
        seq_ids=torch.arange(case.num_seqs, dtype=torch.int32).repeat_interleave(case.tokens),
    )
