"""What one kernel saves where torch takes dozens: `indexer_query` and `compress_entries`, at V4-Flash size.

    python -m lightning_indexer.bench.cuda.fused

prints a JSON line per operation and number of tokens: microseconds by CUDA-graph replay with a cold L2 cache, of the
operation and of its torch path (eagerly where torch cannot be captured). Up to 256 tokens are a decode step of as many
sequences, each of which completes an entry; more are one sequence's prefill.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_indexer.bench.cuda.gpu import Gpu, Spread
from lightning_indexer.bench.cuda.run import Machine
from lightning_indexer.cache.handle import LayerCacheHandle
from lightning_indexer.cache.ring import TokenRing
from lightning_indexer.cache.step import Step
from lightning_indexer.cache.view import PagedView
from lightning_indexer.config import CSA_RATIO, DSV4Config
from lightning_indexer.nn.rope import layer_frequencies
from lightning_indexer.ops.append import append_entries
from lightning_indexer.ops.compress import compress_entries, pooled_entries
from lightning_indexer.ops.indexer_query import indexer_query
from lightning_indexer.query import QuantizedQuery

TOKENS = (1, 16, 64, 256, 8_192)

_MOST_SEQUENCES = 256
_FORMAT = "mxfp4"


@dataclass(frozen=True)
class Pair:
    """An operation and its torch path; each call gives the bytes it made."""

    name: str
    fused: Callable[[], list[Tensor]]
    torch_path: Callable[[], list[Tensor]]


@torch.no_grad()
def compare(machine: Machine, tokens: Sequence[int] = TOKENS) -> Iterator[dict[str, Any]]:
    """Yield a JSON-able record per operation and number of tokens.

    Raises:
        AssertionError: the two give different bytes; nothing is timed on red.
    """
    config = DSV4Config.v4_flash()
    layer = config.compress_ratios.index(CSA_RATIO)
    for count in tokens:
        for pair in (_query(config, layer, count, machine.device), *_compressors(config, layer, count, machine.device)):
            for mine, theirs in zip(pair.fused(), pair.torch_path(), strict=True):
                wrong = int((mine != theirs).sum())
                assert not wrong, f"{pair.name}-{count}: {wrong} of {mine.numel()} bytes differ from the torch path"
            fused = machine.time(pair.fused, graph=True, cold=True)
            mode, plain = _time_torch(machine, pair.torch_path)
            yield {
                "case": f"{pair.name}-{count}",
                "fused_us": fused.record(),
                "torch_us": plain.record(),
                "torch_mode": mode,
                "time_ratio": plain.median / fused.median,
            }
            machine.release()


def _query(config: DSV4Config, layer: int, tokens: int, device: torch.device) -> Pair:
    generator = torch.Generator(device).manual_seed(0)
    shape = (tokens, config.indexer_num_heads, config.indexer_head_dim)
    q = torch.randn(shape, generator=generator, device=device).bfloat16()
    weights = torch.randn(shape[:2], generator=generator, device=device).bfloat16()
    positions = torch.arange(100_000, 100_000 + tokens, device=device)
    frequencies = layer_frequencies(config, layer).to(device)
    scale = config.indexer_head_dim**-0.5 * config.indexer_num_heads**-0.5

    def run(impl: str) -> list[Tensor]:
        query, scaled = indexer_query(
            q, weights, positions, frequencies, format=_FORMAT, rotate=True, weight_scale=scale, impl=impl
        )
        assert isinstance(query, QuantizedQuery) and query.scale is not None
        return [query.data, query.scale, scaled]

    return Pair("indexer_query", lambda: run("auto"), lambda: run("reference"))


def _compressors(config: DSV4Config, layer: int, tokens: int, device: torch.device) -> Iterator[Pair]:
    """Those of the index keys and of the KV entries, each with a cache of its own for either path."""
    num_seqs = tokens if tokens <= _MOST_SEQUENCES else 1
    before, now = (CSA_RATIO - 1, 1) if tokens <= _MOST_SEQUENCES else (0, tokens)
    num_blocks = num_seqs * -(-(before + now) // (CSA_RATIO * 64))
    caches = [
        LayerCacheHandle(config, layer, max_seqs=num_seqs, num_blocks=num_blocks, index_format=_FORMAT, device=device)
        for _ in range(2)
    ]
    for cache in caches:
        for seq_id in range(num_seqs):
            cache.alloc(seq_id)
        cache.begin_step(range(num_seqs), [before] * num_seqs)
        cache.begin_step(range(num_seqs), [now] * num_seqs)
    yield _compressor("index", config, layer, tokens, caches)
    yield _compressor("kv", config, layer, tokens, caches)


def _compressor(kind: Any, config: DSV4Config, layer: int, tokens: int, caches: Sequence[LayerCacheHandle]) -> Pair:
    is_index = kind == "index"
    dim, device = (config.indexer_head_dim if is_index else config.head_dim), caches[0].require_step().positions.device
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    values, gates = random(tokens, 2 * dim), random(tokens, 2 * dim)
    options: dict[str, Any] = {
        "ape": random(CSA_RATIO, 2 * dim),
        "norm": random(dim),
        "frequencies": layer_frequencies(config, layer).to(device),
        "eps": config.rms_norm_eps,
        "rotate": is_index,
        "dtype": torch.bfloat16,
    }

    def target(cache: LayerCacheHandle) -> tuple[Step, TokenRing, PagedView, Tensor]:
        ring = cache.indexer_state if is_index else cache.compressor_state
        assert ring is not None, "a CSA layer has both"
        return cache.require_step(), ring, *cache.target(kind)

    (step, ring, view, slots), (other_step, other_ring, other_view, other_slots) = (target(cache) for cache in caches)

    def fused() -> list[Tensor]:
        compress_entries(values, gates, step, ring, view, slots, **options)
        return [view.storage, ring.rows]

    def torch_path() -> list[Tensor]:
        append_entries(pooled_entries(values, gates, other_step, other_ring, **options), other_view, other_slots)
        return [other_view.storage, other_ring.rows]

    return Pair(f"compress_entries-{kind}", fused, torch_path)


def _time_torch(machine: Machine, run: Callable[[], object]) -> tuple[str, Spread]:
    try:
        return "graph", machine.time(run, graph=True, cold=True)
    except RuntimeError:  # said in the record, as its mode
        machine.release()
    return "eager", machine.time(run, graph=False, cold=True)


if __name__ == "__main__":
    for record in compare(Gpu()):
        print(json.dumps(record), flush=True)
