"""DeepSeek-V4.1's layers, and keys of single tokens, on a GPU: at the models' own sizes and longest contexts."""

from dataclasses import replace

import pytest
import torch
from cases import assert_same_bits
from engines import ENGINES, Engine, promised_error
from test_layer import make_block
from test_layer_v41 import BOUND, make_caches, v41_config

from lightning_indexer import (
    AttentionSubBlock,
    CacheSchema,
    DSV4Config,
    IndexerView,
    PagedPool,
    append_entries,
    quantize_query,
)
from lightning_indexer.formats import dequantize
from lightning_indexer.rotary import apply_rope, rope_frequencies

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = "cuda"

# The model's dims, which the kernels serve; few heads and layers. All entries are chosen where devices are compared: a
# near-tie in a choice of few may fall either way.
CONFIG = v41_config(head_dim=512, rope_head_dim=64, indexer_head_dim=128)
FEW_CANDIDATES = replace(CONFIG, candidate_topk_blocks=2)  # of 8 entries
ALL_CHOSEN = v41_config(head_dim=512, rope_head_dim=64, indexer_head_dim=128, csa_top_k=128)


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


# --- DeepSeek-V4.1's layers -----------------------------------------------------------------------------------


def make_blocks(config, device: str) -> list[AttentionSubBlock]:
    return [make_block(config, layer, seed=layer).to(device) for layer in range(config.num_hidden_layers)]


def run_layers(device: str, index_format: str) -> list[torch.Tensor]:
    """Each layer's output, of a ragged batch in steps of any size."""
    blocks = make_blocks(ALL_CHOSEN, device)
    caches = make_caches(ALL_CHOSEN, index_format=index_format, device=device)
    torch.manual_seed(3)
    outputs: list[list[torch.Tensor]] = [[] for _ in blocks]
    for seq_ids, counts in (([0, 2], [41, 7]), ([2], [1]), ([1, 0], [0, 5]), ([0, 1, 2], [1, 1, 1])):
        x = torch.randn(sum(counts), ALL_CHOSEN.hidden_size).to(device)
        for block, cache, kept in zip(blocks, caches, outputs, strict=True):
            cache.begin_step(seq_ids, counts)
            kept.append(block(x, cache))
            x = x + kept[-1]
    return [torch.cat(parts).cpu() for parts in outputs]


@pytest.mark.parametrize("index_format", ["mxfp4", "bf16"])
def test_v41_layers_give_what_they_give_on_the_cpu(index_format: str) -> None:
    got, want = run_layers(DEVICE, index_format), run_layers("cpu", index_format)
    for layer, (g, w) in enumerate(zip(got, want, strict=True)):
        error = (g - w).norm(dim=-1) / w.norm(dim=-1)
        # each device is within BOUND of float64
        assert error.max() < 2 * BOUND, f"layer {layer}: {error.max():.1e} at token {int(error.argmax())}"


CANDIDATES = pytest.mark.parametrize("config", [CONFIG, FEW_CANDIDATES], ids=["all-candidates", "few-candidates"])


@CANDIDATES
@pytest.mark.parametrize("index_format", ["mxfp4", "fp8", "bf16"])
def test_one_graph_of_all_v41_layers_serves_all_decode_steps(index_format: str, config: DSV4Config) -> None:
    """Against eager calls, bit for bit: full, reindex and reuse layers, across entries and blocks."""
    options = {"index_format": index_format, "kv_format": "bf16", "dtype": torch.bfloat16, "max_blocks_per_seq": 4}
    blocks = make_blocks(config, DEVICE)
    replayed, eager = (make_caches(config, device=DEVICE, **options) for _ in range(2))

    def begin(caches, counts: list[int], static: bool) -> None:
        for cache in caches:
            cache.begin_step([2, 0], counts, static=static)

    def run(caches, x: torch.Tensor) -> torch.Tensor:
        for block, cache in zip(blocks, caches, strict=True):
            x = x + block(x, cache)
        return x

    prompt = torch.randn(33, config.hidden_size).to(DEVICE).bfloat16()
    for caches in (replayed, eager):
        begin(caches, [14, 19], static=False)
        run(caches, prompt)
    x = torch.empty(2, config.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    graph, out = None, None
    for step in range(40):
        x.normal_()
        for caches in (replayed, eager):
            begin(caches, [1, 1], static=True)
        if graph is None:
            run(replayed, x)  # warms up; a step of one token per sequence may be run again
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run(replayed, x)
        out.fill_(torch.nan)
        graph.replay()
        want = run(eager, x)
        assert torch.equal(out, want), f"step {step}: worst difference {(out - want).abs().max():.1e}"


@CANDIDATES
def test_v41_layers_do_not_wait_for_the_device(config: DSV4Config) -> None:
    options = {"index_format": "mxfp4", "kv_format": "bf16", "dtype": torch.bfloat16, "device": DEVICE}
    blocks, caches = make_blocks(config, DEVICE), make_caches(config, **options)
    steps = [([0, 1], [9, 20])] + [([0, 2], [1, 1])] * 4
    xs = [torch.randn(sum(counts), config.hidden_size).to(DEVICE).bfloat16() for _, counts in steps]
    for block, cache in zip(blocks, caches, strict=True):  # the first puts constants on the device
        cache.begin_step([0], [17])
        block(xs[0][:17], cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for (seq_ids, counts), x in zip(steps, xs, strict=True):
            for block, cache in zip(blocks, caches, strict=True):
                cache.begin_step(seq_ids, counts)
                x = x + block(x, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


# --- long contexts --------------------------------------------------------------------------------------------

# Format, heads, top k, entries
LONGEST = {
    "v41-ratio-1": ("mxfp4", 32, 512, 1_048_576),
    "v41-ratio-2": ("mxfp4", 32, 512, 524_288),
    "v32": ("fp8", 64, 2048, 163_840),
    "glm": ("fp8", 32, 2048, 202_752),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LONGEST)
def test_longest_context_of_each_model(name: str, engine: str) -> None:
    """The stable sort of the engine's own scores, bit for bit, and those scores against float64 at both ends."""
    format, num_heads, top_k, length = LONGEST[name]
    view = random_keys(format, length)
    q = quantize_query(torch.randn(5, num_heads, 128, device=DEVICE), format)
    weights = torch.randn(5, num_heads, device=DEVICE)
    lens = torch.tensor([length, length - 1, length // 2 + 3, top_k, top_k - 1], dtype=torch.int32, device=DEVICE)
    arguments = {"valid_lens": lens, "seq_ids": torch.zeros(5, dtype=torch.int32, device=DEVICE)}
    check_selection(ENGINES[engine], q, weights, view, top_k, arguments)
    dense = ENGINES[engine].index_scores(q, weights, view, **arguments)
    ends = torch.cat([torch.arange(4096), torch.arange(length - 4096, length)]).to(DEVICE)
    keys = read(view, ends).double()
    want = torch.einsum("thd,sd->ths", q.dequantize().double(), keys).clamp_min(0)
    want = torch.einsum("ths,th->ts", want, weights.double())[0]
    error = ((dense[0, ends].double() - want).norm() / want.norm()).item()
    assert error < promised_error(format, format), f"{name}: relative error of a row {error:.1e}"


def check_selection(engine: Engine, q, weights, view, top_k: int, arguments: dict) -> None:
    dense = engine.index_scores(q, weights, view, **arguments)
    chosen, scores = engine.score_topk(q, weights, view, top_k=top_k, order="score", return_scores=True, **arguments)
    best = dense.sort(dim=1, descending=True, stable=True)
    want = torch.where(best.values[:, :top_k] == -torch.inf, -1, best.indices[:, :top_k]).int()
    assert_same_bits(chosen, want, "indices by score")
    assert_same_bits(scores, best.values[:, :top_k].contiguous(), "scores")
    ascending = engine.score_topk(q, weights, view, top_k=top_k, **arguments)
    as_sets = ascending.masked_fill(ascending < 0, 2**31 - 1).sort(dim=1).values
    assert_same_bits(as_sets, want.masked_fill(want < 0, 2**31 - 1).sort(dim=1).values, "indices in ascending order")


def random_keys(format: str, length: int) -> IndexerView:
    """One sequence, its blocks in an order of their own."""
    schema = CacheSchema(format, 64)
    pool = PagedPool(schema, length // 64, max_seqs=1, device=DEVICE)
    slots = pool.alloc(0, length).to(DEVICE)
    order = torch.randperm(length // 64).int().to(DEVICE)
    view = IndexerView(pool.storage, schema, order.unsqueeze(0))
    for part in slots.split(65_536):
        append_entries(torch.randn(len(part), 128, device=DEVICE), view, part)
    return view


def read(view: IndexerView, entries: torch.Tensor) -> torch.Tensor:
    """fp32 [n, D]: some entries of sequence 0, dequantised."""
    seq_ids = torch.zeros(1, dtype=torch.int32, device=entries.device)
    slots = view.slots(seq_ids, entries.unsqueeze(0))[0]
    block, row = slots // view.schema.entries_per_block, slots % view.schema.entries_per_block
    return dequantize(view.data_rows[block, row], view.scale_rows[block, row], view.schema.format)


@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rope_of_the_first_channels_has_the_bits_of_the_cpu(pairs: str, dtype: torch.dtype) -> None:
    x, positions = torch.randn(50, 8, 128).to(dtype), torch.arange(50) * 3_331
    frequencies = rope_frequencies(64, 10_000.0, yarn_factor=40.0, original_max_position=4096)
    options = {"channels": "first", "pairs": pairs}
    want = apply_rope(x, positions, frequencies, **options)
    got = apply_rope(x.to(DEVICE), positions.to(DEVICE), frequencies.to(DEVICE), **options)
    assert torch.equal(got.cpu(), want), f"worst difference {(got.cpu() - want).abs().max():.1e}"
