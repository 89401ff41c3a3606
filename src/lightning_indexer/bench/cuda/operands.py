"""Seeded random operands, made on the device that will use them; keys and entries go through the real append path.

Sequences lie in permuted blocks: in a cache that has been in use, neighbours are not neighbours.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_indexer.bench.cuda.cases import AppendCase, GatherCase, ScoringCase
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView, KVView, PagedView
from lightning_indexer.formats import QUERY_FORMATS
from lightning_indexer.ops.append import append_entries
from lightning_indexer.query import QuantizedQuery, quantize_query

_CHUNK_VALUES = 2**25  # random values made at a time
_WEIGHT_SCALE = 64**-0.5 * 128**-0.5  # the factors that the model folds into the weights

View = TypeVar("View", bound=PagedView)


@dataclass(frozen=True, eq=False)
class ScoringOperands:
    """What `score_topk` is called with."""

    query: Tensor | QuantizedQuery
    weights: Tensor
    view: IndexerView
    valid_lens: Tensor
    seq_ids: Tensor

    @property
    def device(self) -> torch.device:
        return self.view.device


@dataclass(frozen=True, eq=False)
class GatherOperands:
    """What `gather_kv` is called with; a query's indices are distinct and ascend, as those of `score_topk` do."""

    view: KVView
    indices: Tensor
    seq_ids: Tensor


@dataclass(frozen=True, eq=False)
class AppendOperands:
    """What `append_entries` is called with; slots are distinct."""

    view: PagedView
    entries: Tensor
    slots: Tensor


def make_scoring(case: ScoringCase, device: torch.device) -> ScoringOperands:
    """Queries, weights and a filled cache."""
    generator = torch.Generator(device).manual_seed(0)
    view = filled_view(IndexerView, case.schema, case.num_seqs, case.entries, generator)
    shape = (case.num_queries, case.num_heads, case.head_dim)
    q = torch.randn(shape, generator=generator, device=device)
    return ScoringOperands(
        query=quantize_query(q, case.query_format) if case.query_format in QUERY_FORMATS else q.bfloat16(),
        weights=torch.randn(shape[:2], generator=generator, device=device) * _WEIGHT_SCALE,
        view=view,
        valid_lens=case.lens().to(device).repeat(case.num_seqs),
        seq_ids=torch.arange(case.num_seqs, dtype=torch.int32, device=device).repeat_interleave(case.tokens),
    )


def make_gather(case: GatherCase, device: torch.device) -> GatherOperands:
    """A filled cache and random indices."""
    generator = torch.Generator(device).manual_seed(0)
    view = filled_view(KVView, case.schema, case.tokens, case.entries, generator)
    drawn = torch.rand(case.tokens, case.entries, generator=generator, device=device).topk(case.top_k).indices
    return GatherOperands(
        view=view,
        indices=drawn.sort().values.to(torch.int32),
        seq_ids=torch.arange(case.tokens, dtype=torch.int32, device=device),
    )


def make_append(case: AppendCase, device: torch.device) -> AppendOperands:
    """Entries and slots for an empty cache."""
    generator = torch.Generator(device).manual_seed(0)
    schema = case.schema
    num_blocks = -(-case.pool_entries // schema.entries_per_block)
    storage = torch.zeros(num_blocks, schema.stride, dtype=torch.uint8, device=device)
    kind = KVView if schema.format == "fp8_ds_mla" else IndexerView
    if case.in_order:
        blocks = torch.randperm(num_blocks, generator=generator, device=device).unsqueeze(1)
        slots = blocks * schema.entries_per_block + torch.arange(schema.entries_per_block, device=device)
    else:
        slots = torch.randperm(case.pool_entries, generator=generator, device=device)
    return AppendOperands(
        view=kind(storage, schema, torch.zeros(1, 1, dtype=torch.int32, device=device)),
        entries=torch.randn(case.count, case.head_dim, generator=generator, device=device).bfloat16(),
        slots=slots.flatten()[: case.count].clone(),
    )


def filled_view(kind: type[View], schema: CacheSchema, num_seqs: int, entries: int, generator: torch.Generator) -> View:
    """`num_seqs` sequences of `entries` random entries in permuted blocks."""
    device = generator.device
    blocks_per_seq = -(-entries // schema.entries_per_block)
    num_blocks = num_seqs * blocks_per_seq
    storage = torch.zeros(num_blocks, schema.stride, dtype=torch.uint8, device=device)
    table = torch.randperm(num_blocks, generator=generator, device=device).to(torch.int32)
    view = kind(storage, schema, table.view(num_seqs, blocks_per_seq))
    chunk = max(_CHUNK_VALUES // schema.dim, 1)
    for seq_id in range(num_seqs):
        for start in range(0, entries, chunk):
            index = torch.arange(start, min(start + chunk, entries), device=device).unsqueeze(0)
            values = torch.randn(index.shape[1], schema.dim, generator=generator, device=device)
            append_entries(values, view, view.slots(torch.tensor([seq_id], device=device), index)[0])
    return view
