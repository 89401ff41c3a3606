"""`lightning-indexer compile`: what it compiles, that it does so once, and how trouble is told. No GPU is needed."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lightning_indexer import CacheSchema
from lightning_indexer.cli import app
from lightning_indexer.cuda import append, candidates, compiler, compress, gather, indexer_query, score_topk, warmup
from lightning_indexer.cuda.compiler import Specialisation
from lightning_indexer.cuda.store import Store

SCHEMA = CacheSchema("bf16", 64, head_dim=512)
TWO = [append.specialisation(SCHEMA, torch.bfloat16, "nearest_even", "sm_80"), gather.specialisation(SCHEMA, "sm_80")]


@pytest.fixture
def cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="compiling needs cuda-core and NVRTC (the extra cuda13)")
    pytest.importorskip("cuda.bindings.nvrtc", reason="compiling needs cuda-core and NVRTC (the extra cuda13)")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_INDEXER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compile", *arguments])


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("jobs", [1, 2])
def test_the_second_run_finds_everything(jobs: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "kernels", lambda *_args: TWO)
    first = run("--arch", "sm_80", "--jobs", str(jobs))
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("2 kernels compiled, 0 were there, ") and first.stdout.endswith(f" s, in {cache}\n")
    assert all(Store(cache).read(compiler.cache_key(kernel)) for kernel in TWO) and Store(cache).usage()[0] == 2
    second = run("--arch", "sm_80", "--jobs", str(jobs))
    assert second.stdout.startswith("0 kernels compiled, 2 were there, "), second.output


@pytest.mark.usefixtures("cuda_wheels")
def test_only_what_is_missing_is_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.build(TWO[0], Store(cache))
    done: list[Specialisation] = []
    monkeypatch.setattr(warmup, "build", lambda kernel, _store: done.append(kernel))
    steps: list[int] = []
    filled = warmup.fill(TWO, Store(cache), jobs=1, advance=steps.append)
    assert done == [TWO[1]] and (filled.compiled, filled.found, steps) == (1, 1, [1, 1])


@pytest.mark.usefixtures("cuda_wheels")
def test_what_is_compiled_follows_the_options() -> None:
    everything = warmup.kernels(["sm_80", "sm_90a"])
    assert len(set(everything)) == len(everything) > 20
    assert {kernel.arch for kernel in everything} == {"sm_80", "sm_90a"}
    index, kv = CacheSchema("mxfp4", 32, head_dim=64), CacheSchema("fp8_ds_mla", 32)
    rings = {compress.keep_specialisation(dim, ratio, "sm_90a") for dim, ratio in ((64, 4), (512, 4), (512, 128))}
    queries = indexer_query.specialisations(index, "sm_90a")
    blockless = {*candidates.specialisations("sm_90a"), *queries, *rings}
    wanted = {
        *append.specialisations(index, "sm_90a"),
        *score_topk.specialisations(index, "sm_90a"),
        *blockless,
        *compress.index_specialisations(index, "sm_90a"),
        *append.specialisations(kv, "sm_90a"),
        *gather.specialisations(kv, "sm_90a"),
        *compress.kv_specialisations(kv, "sm_90a"),
    }
    assert set(warmup.kernels(["sm_90a"], ["mxfp4"], ["fp8_ds_mla"], [32], 64)) == wanted
    both = set(warmup.kernels(["sm_90a"], ["mxfp4"], ["fp8_ds_mla"], [32, 64], 64))
    assert wanted < both and len(both) == 2 * len(wanted) - len(blockless)
    for schema in (CacheSchema("mxfp4"), CacheSchema("nvfp4"), CacheSchema("fp8"), CacheSchema("bf16")):
        assert set(score_topk.specialisations(schema, "sm_80")) <= set(everything), schema


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_75"], "arch must be sm_80 or newer (sm_90a, sm_100a, ...), got 'sm_75'"),
        (["--arch", "hopper"], "arch must be sm_80 or newer (sm_90a, sm_100a, ...), got 'hopper'"),
        (["--arch", "sm_999"], "arch 'sm_999' is not one that nvrtc"),
        (["--arch", "sm_80", "--format", "int4"], "--format must be one of mxfp4, nvfp4, fp8, bf16, got 'int4'"),
        (["--arch", "sm_80", "--kv-format", "fp8"], "--kv-format must be one of fp8_ds_mla, bf16, got 'fp8'"),
        (["--arch", "sm_80", "--head-dim", "32"], "CacheSchema: 'mxfp4' stores 64 or 128 dims, got head_dim=32"),
        (["--arch", "sm_80", "--entries-per-block", "17"], "CacheSchema: entries_per_block of index keys must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_told_in_one_line(arguments: list[str], message: str, cache: Path) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "") and result.stderr.count("\n") == 1, result.output
    assert result.stderr.startswith(f"error: {message}"), result.stderr
    assert not cache.exists()


@pytest.mark.usefixtures("cuda_wheels")
def test_without_an_arch_the_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run()
    assert result.exit_code == 2 and result.stderr.startswith("error: there is no CUDA GPU to take"), result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(warmup, "device_arch", lambda _index: "sm_90a")
    assert {kernel.arch for kernel in warmup.kernels(formats=["bf16"])} == {"sm_90a"}


def test_missing_wheels_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.compiler_version.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    result = run("--arch", "sm_80")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert "needs cuda-core and NVRTC: pip install 'lightning-indexer[cuda13]'" in result.stderr


@pytest.mark.usefixtures("cuda_wheels")
def test_a_folder_that_cannot_be_written_is_told_before_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(warmup, "kernels", lambda *_args: TWO)
    monkeypatch.setattr(warmup, "build", lambda *_args: pytest.fail("compiled all the same"))
    monkeypatch.setenv("LIGHTNING_INDEXER_CACHE", str(tmp_path / "file" / "below"))
    result = run("--arch", "sm_80")
    assert (result.exit_code, result.stdout) == (2, "") and "file" in result.stderr, result.output


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of cuda-core, after its own error
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_kernel_that_does_not_compile_is_shown_with_its_log(jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [replace(TWO[0], arguments=(*TWO[0].arguments[:2], f"Block<1, 2, 3, {i}>", "3")) for i in range(jobs)]
    monkeypatch.setattr(warmup, "kernels", lambda *_args: wrong)
    result = run("--arch", "sm_80", "--jobs", str(jobs))
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    for words in ("error: append_entries<", "Block<1, 2, 3, ", "does not compile with nvrtc", "Row and Block agree"):
        assert words in result.stderr, result.stderr
