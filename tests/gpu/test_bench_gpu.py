"""`lightning-indexer bench --device cuda`: the clock, the memory and a whole run."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lightning_indexer.bench.cuda import fused
from lightning_indexer.bench.cuda.gpu import Gpu
from lightning_indexer.cli import app

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


@pytest.fixture
def gpu() -> Gpu:
    return Gpu(repeats=5)


def test_a_wait_takes_its_time(gpu: Gpu) -> None:
    for graph in (True, False):
        for cold in (True, False):
            short = gpu.time(lambda: torch.cuda._sleep(200_000), graph=graph, cold=cold).median
            long = gpu.time(lambda: torch.cuda._sleep(2_000_000), graph=graph, cold=cold).median
            assert 4 < long / short < 11, f"graph={graph}, cold={cold}: {short:.1f} us and {long:.1f} us"


def test_cold_is_slower_than_warm(gpu: Gpu) -> None:
    l2_bytes = torch.cuda.get_device_properties(gpu.device).L2_cache_size
    source = torch.randn(l2_bytes // 16, device="cuda")  # source and target fill half of it
    target = torch.empty_like(source)
    cold, warm = (gpu.time(lambda: target.copy_(source), graph=True, cold=cold).median for cold in (True, False))
    assert warm < cold, f"{warm:.1f} us warm, {cold:.1f} us cold"


def test_the_host_does_not_wait_for_what_it_enqueues(gpu: Gpu) -> None:
    cycles = 2_000_000
    took = gpu.time(lambda: torch.cuda._sleep(cycles), graph=False, cold=False).median
    assert gpu.host(lambda: torch.cuda._sleep(cycles), took).median < took / 5
    assert gpu.host(torch.cuda.synchronize, 1.0).median > 0


def test_peak_sees_what_comes_and_goes(gpu: Gpu) -> None:
    assert gpu.peak_extra_bytes(lambda: torch.empty(2**24, dtype=torch.uint8, device="cuda").sum()) >= 2**24
    held = torch.empty(2**20, device="cuda")
    assert gpu.peak_extra_bytes(lambda: held.add_(1)) == 0


def test_ceilings_are_bandwidths(gpu: Gpu) -> None:
    found = gpu.ceilings()
    assert all(50 < value < 20_000 for value in found.values()), found
    assert gpu.copy_us(2**26) > 0


@pytest.mark.parametrize("name", ["decode-1x1-entries32768", "decode-64x1-entries65536", "gather-", "append-"])
def test_bench_checks_times_and_draws(name: str, tmp_path: Path) -> None:
    arguments = ["bench", "--device", "cuda", "--quick", "--repeats", "3", "--only", name, "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    records = [json.loads(line) for line in (tmp_path / "cuda.jsonl").read_text().splitlines()]
    assert records and all(name in record["case"] for record in records)
    for record in records:
        assert record["median_us"] > 0 and record["peak_given_bytes"] == 0, record
        assert record["host_us"]["median"] > 0, record
        if record["kind"] == "decode":
            assert record["peak_alone_bytes"] >= record["output_bytes"]
            assert record["agreement"]["agreeing"] == record["agreement"]["choices"]
    assert (tmp_path / "cuda.png").read_bytes().startswith(b"\x89PNG")


def test_bench_times_a_decode_step_of_a_layer(tmp_path: Path) -> None:
    arguments = ["bench", "--layer", "--device", "cuda", "--quick", "--repeats", "3", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    (record,) = (json.loads(line) for line in (tmp_path / "layer.jsonl").read_text().splitlines())
    assert record["case"] == "layer-2x1-tokens4096-bf16-dense" and record["begin_step_host_us"] > 0
    assert all(times[mode]["median"] > 0 for times in record["stages_us"].values() for mode in times)
    assert "score_topk" in result.output and "whole step" in result.output


def test_fused_operations_are_no_slower_than_torch(gpu: Gpu) -> None:
    for record in fused.compare(gpu, (1, 64)):
        assert record["fused_us"]["median"] > 0 and record["time_ratio"] > 1, record
