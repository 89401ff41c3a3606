"""Where the time of one decode step of a CSA layer goes: V4-Flash's sizes, stage by stage and as a whole.

Stages are what `AttentionSubBlock.forward` does, in its order, each timed alone on the operands that the stages before
it give; the whole is one call of the layer. Between stages timed alone nothing overlaps and "cold" reads everything
from memory, so they need not add up to the whole. Weights, caches and hidden states are random.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import lightning_indexer
from lightning_indexer.bench.cuda.run import Machine
from lightning_indexer.bench.cuda.screen import readable_us
from lightning_indexer.bench.run import commit
from lightning_indexer.cache.handle import LayerCacheHandle
from lightning_indexer.checkpoint import block_scale_shape, expected_shapes
from lightning_indexer.config import DSV4Config
from lightning_indexer.nn.attention import AttentionSubBlock
from lightning_indexer.ops.attention import sparse_attention
from lightning_indexer.ops.gather_kv import gather_kv
from lightning_indexer.ops.score_topk import index_scores, score_topk

WHOLE = "whole step"
BEGIN_STEP = "begin_step (host)"

_ENTRIES_PER_BLOCK = 64
_TOKENS_PER_FILL = 4096
_HOST_STEPS = 64
_FP8_WEIGHTS = ("wq_", "wkv", "wo_", "indexer.wq_b")  # that V4's checkpoints store in FP8
_MODES = {"graph_cold": (True, True), "graph_warm": (True, False), "eager": (False, False)}  # name -> graph, cold


@dataclass(frozen=True)
class LayerCase:
    """`num_seqs` sequences of `tokens` tokens each, which decode one more.

    Args:
        weights: "bf16", or "fp8" as checkpoints store most of them.
        dense: `AttentionSubBlock.keep_dense` was called; else weights are multiplied out at every use.
    """

    num_seqs: int
    tokens: int
    weights: str = "bf16"
    dense: bool = True
    config: DSV4Config = DSV4Config.v4_flash()

    @property
    def name(self) -> str:
        name = f"layer-{self.num_seqs}x1-tokens{self.tokens}-{self.weights}"
        return f"{name}-dense" if self.dense else name


GRID = (
    LayerCase(16, 32_768),
    LayerCase(16, 262_144),
    LayerCase(16, 32_768, weights="fp8"),
    LayerCase(16, 32_768, weights="fp8", dense=False),
)
QUICK_GRID = (LayerCase(2, 4_096),)


@dataclass(frozen=True, eq=False)
class Decode:
    """A layer with a static step of one token per sequence in progress, and the hidden states of these tokens."""

    block: AttentionSubBlock
    cache: LayerCacheHandle
    x: Tensor


@torch.no_grad()
def run_grid(cases: Sequence[LayerCase], machine: Machine) -> Iterator[dict[str, Any]]:
    """Yield a JSON-able record per case: microseconds of each stage, of the whole step and of `begin_step`.

    Raises:
        AssertionError: a step gives something wrong; nothing is timed on red.
    """
    shared = {**machine.describe(), "version": lightning_indexer.__version__, "commit": commit()}
    for case in cases:
        machine.release()
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        decode = make_decode(case, machine.device)
        check(case, decode)
        times = {name: _times(machine, run) for name, run in stages(decode).items()}
        yield {
            "case": case.name,
            "num_seqs": case.num_seqs,
            "tokens": case.tokens,
            "weights": case.weights,
            "dense": case.dense,
            "index_format": decode.cache.paged.schema.format,
            "kv_format": decode.cache.kv_format,
            **shared,
            "time": started,
            "stages_us": times,
            "begin_step_host_us": _begin_steps(decode),
        }
        del decode


def make_decode(case: LayerCase, device: torch.device) -> Decode:
    """A layer whose caches hold `case.tokens` tokens per sequence, in blocks that alternate between sequences."""
    config, seqs = case.config, range(case.num_seqs)
    layer = next(i for i in range(config.num_hidden_layers) if config.layer_kind(i) == "CSA")
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    block = AttentionSubBlock(config, layer)
    block.load_weights(_make_weights(config, layer, case.weights, random))
    if case.dense:
        block.keep_dense()
    most = case.tokens + 2 * _HOST_STEPS
    columns = -(-most // (config.layer_compress_ratio(layer) * _ENTRIES_PER_BLOCK))
    cache = LayerCacheHandle(
        config,
        layer,
        max_seqs=case.num_seqs,
        num_blocks=case.num_seqs * columns,
        entries_per_block=_ENTRIES_PER_BLOCK,
        max_blocks_per_seq=columns,
        device=device,
    )
    for seq in seqs:
        cache.alloc(seq)
    for first in range(0, case.tokens, _TOKENS_PER_FILL):
        count = min(_TOKENS_PER_FILL, case.tokens - first)
        entries = len(cache.begin_step(seqs, [count] * case.num_seqs).entry_rows)
        cache.append(random(entries, config.indexer_head_dim), "index")
        cache.append(random(entries, config.head_dim), "kv")
    for ring in (cache.window, cache.compressor_state, cache.indexer_state):
        assert ring is not None, "a CSA layer has all three"
        ring.rows.normal_(generator=generator)
    cache.begin_step(seqs, [1] * case.num_seqs, static=True)
    return Decode(block, cache, random(case.num_seqs, config.hidden_size))


def check(case: LayerCase, decode: Decode) -> None:
    """The layer gives numbers, the same again, and its indexer the best of all entries by its own scores."""
    block, cache, x = decode.block, decode.cache, decode.x
    out = block(x, cache)
    assert bool(out.isfinite().all()), f"{case.name}: the output has values that are not finite"
    assert torch.equal(block(x, cache), out), f"{case.name}: the same step gave another output"
    assert block.indexer is not None, "a CSA layer has one"
    step, c_Q = cache.require_step(), block.query_latent(x)
    q, weights = block.indexer.query(c_Q, x, step.positions, cache.paged.schema.format)
    view, lens, seq_ids = cache.read_indexer_view(), step.valid_lens, step.seq_ids
    scores = index_scores(q, weights, view, valid_lens=lens, seq_ids=seq_ids)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, : case.config.csa_top_k].sort(dim=1).values
    chosen = block.indexer(c_Q, x, cache)[:, : best.shape[1]]
    assert torch.equal(chosen.long(), best), f"{case.name}: the choice is not that of the scores"


def stages(decode: Decode) -> dict[str, Callable[[], object]]:
    """Name -> one call of it. A step of one token per sequence may be run again, and so may all of these."""
    block, cache, x = decode.block, decode.cache, decode.x
    step, config, indexer, compressor = cache.require_step(), block.config, block.indexer, block.compressor
    assert indexer is not None and compressor is not None, "a CSA layer has both"
    format, sink, scale = cache.paged.schema.format, block.get("attn_sink").float(), config.head_dim**-0.5
    index_view, kv_view = cache.read_indexer_view(), cache.read_kv_view()
    c_Q, window_kv = block.query_latent(x), block.window_kv(x, step, cache.kv_format)
    q, (index_q, weights) = block.query(c_Q, step), indexer.query(c_Q, x, step.positions, format)

    def choose() -> Tensor:
        return score_topk(
            index_q, weights, index_view, top_k=config.csa_top_k, valid_lens=step.valid_lens, seq_ids=step.seq_ids
        )

    def window() -> Tensor:
        tokens, rows, _ = block.window_rows(window_kv, cache)
        return tokens[rows]

    indices = choose()
    selected, recent = gather_kv(kv_view, indices, seq_ids=step.seq_ids), window()
    valid = torch.cat([indices >= 0, block.window_rows(window_kv, cache)[2]], dim=1)

    def attend() -> Tensor:
        return sparse_attention(q, selected, recent, valid=valid, sink=sink, softmax_scale=scale)[0]

    attended = attend()
    return {
        "query latent": lambda: block.query_latent(x),
        "main query": lambda: block.query(c_Q, step),
        "window KV": lambda: block.window_kv(x, step, cache.kv_format),
        "compressor + append": lambda: compressor.write(x, cache, "kv"),
        "indexer query": lambda: indexer.query(c_Q, x, step.positions, format),
        "indexer compressor + append": lambda: indexer.write_keys(x, cache),
        "score_topk": choose,
        "window rows": window,
        "gather_kv": lambda: gather_kv(kv_view, indices, seq_ids=step.seq_ids),
        "sparse_attention": attend,
        "window update": lambda: cache.window.update(step, window_kv),
        "output projection": lambda: block.project(attended, step),
        WHOLE: lambda: block(x, cache),
    }


def line(record: dict[str, Any]) -> str:
    """One finished case."""
    whole = record["stages_us"][WHOLE]
    parts = [f"{name.replace('_', ', ')} {readable_us(whole[name]['median'])}" for name in _MODES]
    return f"{record['case']}: {', '.join(parts)}; begin_step {readable_us(record['begin_step_host_us'])} on the host"


def tables(records: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """One per case: median times of the stages."""
    for record in records:
        result = Table(title=f"{record['case']}, {record['device']}", title_justify="left", box=None)
        result.add_column("stage")
        for name in _MODES:
            result.add_column(name.replace("_", ", "), justify="right")
        alone = [times for name, times in record["stages_us"].items() if name != WHOLE]
        total = {mode: {"median": sum(times[mode]["median"] for times in alone)} for mode in _MODES}
        for name, times in {**record["stages_us"], "sum of the stages": total}.items():
            result.add_row(name, *(readable_us(times[mode]["median"]) for mode in _MODES))
        result.add_row(BEGIN_STEP, "", "", readable_us(record["begin_step_host_us"]))
        yield result


def _make_weights(config: DSV4Config, layer: int, kind: str, random: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Values that keep the scale of what they multiply, by the names of `load_attention_weights`."""
    weights = {}
    for name, shape in expected_shapes(config, layer).items():
        value = random(*shape) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5) + ("norm" in name)
        if kind == "fp8" and name.startswith(_FP8_WEIGHTS):
            scale = torch.full(block_scale_shape(shape), 2.0**-10, device=value.device)
            weights[name], weights[name.replace("weight", "scale")] = (value * 2**10).to(torch.float8_e4m3fn), scale
        else:
            weights[name] = value
    return weights


def _times(machine: Machine, run: Callable[[], object]) -> dict[str, dict[str, float]]:
    return {name: machine.time(run, graph=graph, cold=cold).record() for name, (graph, cold) in _MODES.items()}


def _begin_steps(decode: Decode) -> float:
    """Median microseconds of the host for a static step, the layer not run between them."""
    counts, took = decode.cache.require_step().counts, []
    for _ in range(_HOST_STEPS):
        start = time.perf_counter()
        decode.cache.begin_step(range(len(counts)), counts, static=True)
        took.append((time.perf_counter() - start) * 1e6)
    return median(took)
