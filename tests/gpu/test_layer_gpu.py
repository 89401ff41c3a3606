"""The layer, the demo and the doctor on a GPU, and that the caller's settings do not reach fp32 results there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
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
