"""The layer, the demo and the doctor on a GPU: in CUDA graphs, without waiting, whatever the caller has set."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_keep_dense import stored_weights
from test_layer import CSA, HCA, SWA, random_weights, tiny_config
from typer.testing import CliRunner

from lightning_indexer import AttentionSubBlock, LayerCacheHandle, sparse_attention
from lightning_indexer.cli import app

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
STEPS = (([0, 2], [140, 37]), ([2], [1]), ([1, 0], [0, 5]))  # ragged; a decode step; one sequence without tokens


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def run_block(layer: int, device: str, index_format: str) -> torch.Tensor:
    config = tiny_config(csa_top_k=1024)  # all entries are chosen: a near-tie in a choice of few may fall either way
    block = AttentionSubBlock(config, layer)
    block.load_weights(random_weights(config, layer))
    block.to(device)
    options = {"index_format": index_format, "kv_format": "fp32", "dtype": torch.float32}
    cache = LayerCacheHandle(config, layer, max_seqs=4, num_blocks=64, entries_per_block=16, device=device, **options)
    for seq_id in range(3):
        cache.alloc(seq_id)
    torch.manual_seed(3)
    outputs = []
    for seq_ids, counts in STEPS:
        cache.begin_step(seq_ids, counts)
        outputs.append(block(torch.randn(sum(counts), config.hidden_size).to(device), cache))
    cache.fork(0, 3)
    cache.begin_step([3], [7])
    return torch.cat([*outputs, block(torch.randn(7, config.hidden_size).to(device), cache)])


@pytest.mark.parametrize("index_format", ["mxfp4", "bf16"])
@pytest.mark.parametrize("layer", [SWA, CSA, HCA], ids=["SWA", "CSA", "HCA"])
def test_a_block_gives_what_it_gives_on_the_cpu(layer: int, index_format: str) -> None:
    got, want = run_block(layer, "cuda", index_format), run_block(layer, "cpu", index_format)
    assert got.is_cuda
    error = (got.cpu() - want).norm(dim=-1) / want.norm(dim=-1)
    # fp32 sums in another order, and sines of angles up to 150 rad; the other layer tests allow as much
    assert error.max() < 1e-5, f"relative error {error.max():.1e} at token {int(error.argmax())}"


def attend() -> torch.Tensor:
    torch.manual_seed(0)
    q, kv, window = (torch.randn(3, n, 512).cuda() for n in (64, 200, 128))
    valid = torch.rand(3, 328).cuda() < 0.7
    out, lse = sparse_attention(q, kv, window, valid=valid, sink=None, softmax_scale=512**-0.5)
    return torch.cat([out.flatten(), lse.flatten()])


@pytest.mark.usefixtures("tf32")
def test_tf32_and_autocast_do_not_reach_attention() -> None:
    with torch.autocast("cuda"):
        got = attend()
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(got, attend())


def test_attention_does_not_wait_for_the_device() -> None:
    q, kv = torch.randn(3, 8, 64, device="cuda"), torch.randn(3, 20, 64, device="cuda")
    valid = torch.ones(3, 20, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_attention(q, kv, kv[:, :0], valid=valid, sink=None, softmax_scale=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- decoding -------------------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("layer", [SWA, CSA, HCA], ids=["SWA", "CSA", "HCA"])
FORMATS = pytest.mark.parametrize("index_format", ["mxfp4", "fp8", "bf16"])
CONFIG = tiny_config(csa_top_k=16)
BATCHES = ([2, 0, 1], [1], [0, 2])  # each with a graph of its own


def make_decoder(layer: int, index_format: str) -> tuple[AttentionSubBlock, LayerCacheHandle, LayerCacheHandle]:
    """A layer, and twice the same caches of three sequences just before an entry, a block and the end of a window."""
    block = AttentionSubBlock(CONFIG, layer)
    block.load_weights({name: weight.cuda() for name, weight in random_weights(CONFIG, layer).items()})
    counts = [1, 62, 125]
    x = torch.randn(sum(counts), CONFIG.hidden_size).cuda().bfloat16()
    caches = []
    for _ in range(2):
        cache = LayerCacheHandle(
            CONFIG,
            layer,
            max_seqs=4,
            num_blocks=24,
            entries_per_block=16,
            index_format=index_format,
            max_blocks_per_seq=6,
            device="cuda",
        )
        for seq_id in range(3):
            cache.alloc(seq_id)
        cache.begin_step([0, 1, 2], counts)
        block(x, cache)
        caches.append(cache)
    return block, caches[0], caches[1]


def everything(cache: LayerCacheHandle) -> dict[str, torch.Tensor]:
    """All that a layer writes."""
    rings = {name: getattr(cache, name) for name in ("window", "compressor_state", "indexer_state")}
    pools = {name: getattr(cache, name) for name in ("kv_pool", "index_pool")}
    return {
        **{name: ring.rows for name, ring in rings.items() if ring is not None},
        **{name: pool.storage for name, pool in pools.items() if pool is not None},
        **{f"{name} table": pool.block_table for name, pool in pools.items() if pool is not None},
    }


@KINDS
@FORMATS
def test_one_graph_serves_all_decode_steps(layer: int, index_format: str) -> None:
    """Against eager calls, bit for bit: across entries and blocks, with graphs of three batches in turns."""
    block, replayed, eager = make_decoder(layer, index_format)
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
    for i in range(120):
        batch = BATCHES[i % len(BATCHES)]
        fresh = torch.randn(len(batch), CONFIG.hidden_size).cuda().bfloat16()
        for cache in (replayed, eager):
            cache.begin_step(batch, [1] * len(batch), static=True)
        if len(batch) not in graphs:
            x = fresh.clone()
            block(x, replayed)  # warms up; a step of one token per sequence may be run again
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = block(x, replayed)
            graphs[len(batch)] = graph, x, out
        graph, x, out = graphs[len(batch)]
        x.copy_(fresh)
        out.fill_(torch.nan)
        graph.replay()
        want = block(fresh, eager)
        assert torch.equal(out, want), f"step {i}: worst difference {(out - want).abs().max():.1e}"
    wanted = everything(eager)
    different = [name for name, tensor in everything(replayed).items() if not torch.equal(tensor, wanted[name])]
    assert not different
    assert replayed.num_tokens(2) == 125 + 80, "two batches have it"


@KINDS
def test_a_graph_follows_sequences_that_come_and_go(layer: int) -> None:
    block, replayed, eager = make_decoder(layer, "mxfp4")
    x = torch.randn(2, CONFIG.hidden_size).cuda().bfloat16()
    replayed.begin_step([0, 1], [1, 1], static=True)
    block(x, replayed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(x, replayed)
    eager.begin_step([0, 1], [1, 1], static=True)
    block(x, eager)
    for cache in (replayed, eager):
        cache.fork(2, 3)
        cache.free(1)
        cache.alloc(1)
    for batch in ([3, 2], [1, 3], [3, 1], [2, 1]):
        for cache in (replayed, eager):
            cache.begin_step(batch, [1, 1], static=True)
        x.normal_()
        graph.replay()
        assert torch.equal(out, block(x, eager)), f"batch {batch}"


@KINDS
@FORMATS
@pytest.mark.parametrize("static", [False, True], ids=["any step", "static"])
def test_the_layer_does_not_wait_for_the_device(layer: int, index_format: str, static: bool) -> None:
    """Nor does `begin_step`: decoding, ragged steps, one longer than every ring, blocks that are new."""
    block, cache, _ = make_decoder(layer, index_format)
    steps = [([0, 1, 2], [1, 1, 1])] * 10 + [([1], [1]), ([2, 0], [3, 170]), ([0, 1], [0, 2]), ([], [])]
    xs = [torch.randn(sum(counts), CONFIG.hidden_size).cuda().bfloat16() for _, counts in steps]
    outputs = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for (seq_ids, counts), x in zip(steps, xs, strict=True):
            cache.begin_step(seq_ids, counts, static=static)
            outputs.append(block(x, cache))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(outputs).isfinite().all()


def test_the_host_may_run_ahead_of_the_device() -> None:
    """Steps are sent through memory that is used again: not before the device has read it."""
    block, replayed, eager = make_decoder(CSA, "mxfp4")
    xs = torch.randn(40, 3, CONFIG.hidden_size).cuda().bfloat16()
    replayed.begin_step([0, 1, 2], [1, 1, 1], static=True)
    x, got = xs[0].clone(), torch.empty_like(xs)
    block(x, replayed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(x, replayed)
    torch.cuda._sleep(200_000_000)  # about 0.1 s: all that follows is begun by then
    for i in range(40):
        if i:
            replayed.begin_step([0, 1, 2], [1, 1, 1], static=True)
        x.copy_(xs[i])
        graph.replay()
        got[i] = out
    for i in range(40):
        eager.begin_step([0, 1, 2], [1, 1, 1], static=True)
        want = block(xs[i], eager)
        torch.cuda.synchronize()
        assert torch.equal(got[i], want), f"step {i}"


def test_a_step_that_is_not_static_is_not_captured() -> None:
    block, cache, _ = make_decoder(CSA, "mxfp4")
    x = torch.randn(1, CONFIG.hidden_size).cuda().bfloat16()
    cache.begin_step([0], [1])
    with (
        pytest.raises(RuntimeError, match="a CUDA graph needs a static step"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        block(x, cache)
    assert block(x, cache).isfinite().all()


@KINDS
def test_a_dense_layer_gives_the_same_bits_as_one_of_fp8_weights(layer: int) -> None:
    block, stored, dense = make_decoder(layer, "mxfp4")
    block.load_weights({name: weight.cuda() for name, weight in stored_weights(CONFIG, layer).items()})
    xs, outputs = torch.randn(5, 3, CONFIG.hidden_size).cuda().bfloat16(), []
    for cache in (stored, dense):
        if cache is dense:
            block.keep_dense()
        for x in xs:
            cache.begin_step([2, 0, 1], [1, 1, 1], static=True)
            outputs.append(block(x, cache))
    got, want = torch.stack(outputs[len(xs) :]), torch.stack(outputs[: len(xs)])
    assert torch.equal(got, want), f"worst difference {(got - want).abs().max():.1e}"
    wanted = everything(stored)
    different = [name for name, tensor in everything(dense).items() if not torch.equal(tensor, wanted[name])]
    assert not different


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8", "bf16"])
def test_the_demo_uses_the_gpu_and_says_so(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", "--tokens", "8192", "--format", format, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["device"], report["device_name"]) == ("cuda", torch.cuda.get_device_name())
    assert report["agreement"]["fraction"] == 1.0, report["agreement"]
    assert all(item["rank"] <= 5 for item in report["planted"]), report["planted"]
    assert 0 < report["memory"]["select_rise"] < 100e6 and 0.5 < report["attention_share"] <= 1


def test_the_doctor_checks_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "GPU check          ok: 256 of 256 choices" in result.stdout
    assert torch.cuda.get_device_name() in result.stdout and "driver for CUDA" in result.stdout
