"""The command line: what the demo reports, that its checks can fail, and how wrong use is told."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lightning_indexer import doctor
from lightning_indexer.bench.agreement import Agreement, compare
from lightning_indexer.bench.memory import watch
from lightning_indexer.cache.pool import PagedPool
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.cli import app
from lightning_indexer.cuda import compiler, launcher
from lightning_indexer.cuda.store import Store
from lightning_indexer.demo import device, layer, picture, screen
from lightning_indexer.demo import run as run_module
from lightning_indexer.demo.passages import PLANTED
from lightning_indexer.demo.text import build_context, read_paragraphs, tokenize
from lightning_indexer.ops.append import append_entries

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SMALL = ("--tokens", "2048", "--top-k", "64")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what a GPU does is in gpu/test_layer_gpu.py


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run_json(*arguments: str) -> dict[str, Any]:
    result = run("demo", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    return report


def assert_exact(report: dict[str, Any], choices: int) -> None:
    agreement = report["agreement"]
    assert agreement["num_queries"] * agreement["per_query"] == choices
    assert agreement["agreeing"] == choices and agreement["fraction"] == 1.0, agreement
    assert 0 < agreement["band"] < 1e-4, agreement


def assert_planted_found(report: dict[str, Any], worst_rank: int) -> None:
    assert [item["sentence"] for item in report["planted"]] == [sentence for sentence, _ in PLANTED]
    for item in report["planted"]:
        assert item["in_top_k"] and item["rank"] <= worst_rank, item
        assert item["first_token"] // 4 <= item["entry"] <= item["first_token"] // 4 + 6, item


# --- the demo ---------------------------------------------------------------------------------------------------


def test_json_report_is_exact_and_finds_what_was_planted() -> None:
    report = run_json("--tokens", "4096")
    assert (report["tokens"], report["entries"], report["top_k"]) == (4096, 1024, 512)
    assert_exact(report, choices=32 * 512)
    assert_planted_found(report, worst_rank=5)
    assert report["cache"]["index_bytes"] == 1024 * 68
    assert report["memory"]["dense_scores"] == report["num_queries"] * 1024 * 4
    assert all(seconds > 0 for seconds in report["seconds"].values()), report["seconds"]
    assert 0.5 < report["attention_share"] <= 1
    assert Path(report["picture"]).read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "bf16"])
def test_other_formats_are_exact_and_find_what_was_planted(format: str) -> None:
    report = run_json(*SMALL, "--format", format)
    assert report["cache"]["index_format"] == format
    assert_exact(report, choices=32 * 64)
    assert_planted_found(report, worst_rank=5)


def test_screen_report_and_picture() -> None:
    result = run("demo", *SMALL, "--output", "pictures/today")
    assert result.exit_code == 0, result.stderr
    assert "agreement with float64: 100 % of 32 x 64 choices up to a score band of ±" in result.stdout
    assert "No trained model is loaded." in result.stdout
    assert "Question  When does the garbage collector find reference cycles?" in result.stdout
    assert "picture: pictures/today/selection.png" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()) <= 120
    assert Path("pictures/today/selection.png").read_bytes().startswith(PNG_SIGNATURE)


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "has_matplotlib", lambda: False)
    result = run("demo", *SMALL)
    assert result.exit_code == 0, result.stderr
    assert "pip install 'lightning-indexer[plots]'" in result.stdout
    assert not Path("demo-output").exists()


def test_own_text_file() -> None:
    Path("bees.txt").write_text("Bees carry nectar home; drones do not.\n\nWinter ends when the crocus opens.\n")
    report = run_json("bees.txt", *SMALL)
    assert report["source"] == "bees.txt" and report["source_tokens"] == 16
    assert_exact(report, choices=32 * 64)
    assert_planted_found(report, worst_rank=64)
    assert [example["kind"] for example in report["examples"]] == ["text"] * 3


def test_seed_decides_the_whole_selection() -> None:
    first, again, other = (run_json(*SMALL, "--seed", seed) for seed in "112")
    assert first["planted"] == again["planted"] and first["examples"] == again["examples"]
    assert [item["first_token"] for item in first["planted"]] != [item["first_token"] for item in other["planted"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "missing.txt: No such file or directory"),
        (["empty.txt"], "empty.txt: no words found, the demo needs some text"),
        (["dashes.txt"], "dashes.txt: no words found, the demo needs some text"),
        (["binary.txt"], "binary.txt: not a UTF-8 text file"),
        (["."], ".: Is a directory"),
        (["--format", "int4"], "--format must be one of mxfp4, nvfp4, fp8, bf16, got 'int4'"),
        (["--tokens", "1000"], "--tokens must lie in 1024..1048576, got 1000"),
        (["--top-k", "0"], "--top-k must lie in 1..4096, got 0"),
        (["--seed", "-1"], "--seed must lie in 0..4294967295, got -1"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--output", "empty.txt"], "empty.txt: File exists"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_told_in_one_line(arguments: list[str], message: str) -> None:
    Path("empty.txt").touch()
    Path("dashes.txt").write_text("--- !!! ---")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00words")
    result = run("demo", *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


@pytest.fixture
def gpu_without_wheels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As far as the command line looks: torch sees a GPU, but nothing can be compiled for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_index: (9, 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    for cached in (compiler.compiler_version, launcher.device_arch):
        cached.cache_clear()
    yield
    launcher.device_arch.cache_clear()


def test_asking_for_a_gpu_where_there_is_none() -> None:
    result = run("demo", "--device", "cuda")
    message = f"error: --device cuda: torch {torch.__version__} finds no CUDA GPU\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)
    assert not Path("demo-output").exists()


@pytest.mark.usefixtures("gpu_without_wheels")
def test_a_gpu_that_cannot_be_used_is_named_with_the_reason() -> None:
    hint = "the CUDA implementation needs cuda-core and NVRTC: pip install 'lightning-indexer[cuda13]'"
    result = run("demo", *SMALL, "--device", "cuda")
    assert result.exit_code == 2 and result.stderr.startswith(f"error: --device cuda: {hint}"), result.output
    assert result.stderr.count("\n") == 1
    report = run_json(*SMALL)
    assert report["device"] == "cpu" and report["device_name"].startswith("CPU, ")
    assert report["device_note"].startswith(f"the NVIDIA H100 80GB HBM3 is not used: {hint}")
    words = " ".join(run("demo", *SMALL).stdout.split())
    assert "Device CPU, 1 threads the NVIDIA H100 80GB HBM3 is not used: the CUDA implementation needs" in words


def test_a_report_from_a_gpu_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "choose_device", lambda _option: device.Device(torch.device("cpu"), "NVIDIA H200"))
    assert "Device     NVIDIA H200\n" in re.sub(" +\n", "\n", run("demo", *SMALL).stdout)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (75.24, "75.2 s"),
        (1.5, "1.50 s"),
        (0.9994, "999 ms"),
        (0.0123, "12.3 ms"),
        (3.4e-7, "0.34 us"),
        (450.4, "450 s"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert screen.duration(seconds) == text


def test_a_wrong_selection_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer.score_topk

    def one_entry_too_far(*args: Any, **kwargs: Any) -> Any:
        indices, scores = right(*args, **kwargs)
        return (indices + 1).clamp_max(511), scores

    monkeypatch.setattr(layer, "score_topk", one_entry_too_far)
    result = run("demo", *SMALL, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["agreement"]["fraction"] < 0.9


def test_a_query_for_another_sentence_ranks_it_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    right = run_module.make_passages

    def wrong_targets(*args: Any, **kwargs: Any) -> Any:
        passages = right(*args, **kwargs)
        asked = [replace(p, target=(p.target + 1) % len(PLANTED)) for p in passages if p.target is not None]
        return asked + passages[len(asked) :]

    monkeypatch.setattr(run_module, "make_passages", wrong_targets)
    ranks = [item["rank"] for item in run_json(*SMALL)["planted"]]
    assert sum(rank > 5 for rank in ranks) >= len(PLANTED) // 2, ranks


# --- the doctor -------------------------------------------------------------------------------------------------


def test_doctor_is_content() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "CPU check          ok: 256 of 256 choices" in result.stdout
    for row in ("GPU", "CUDA", "compiler", "kernel cache", "GPU check"):
        assert re.search(rf"^{row} +\S", result.stdout, re.MULTILINE), result.stdout


def test_doctor_without_a_gpu_says_what_could_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("LIGHTNING_INDEXER_CACHE", str(tmp_path / "cache"))
    Store(tmp_path / "cache").write("0" * 64, b"x" * 200_000, {})
    monkeypatch.setenv("COLUMNS", "300")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert re.search(r"^compiler +nvrtc [\d.]+.*, for sm_80, .*sm_90, ", result.stdout, re.MULTILINE), result.stdout
    assert f"{tmp_path / 'cache'}: 1 kernels, 0.2 MB" in result.stdout
    assert f"not run: torch {torch.__version__} finds no CUDA GPU" in result.stdout


@pytest.mark.usefixtures("gpu_without_wheels")
def test_doctor_without_the_wheels_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert re.search(r"^GPU +NVIDIA H100 80GB HBM3, compute capability 9.0; .* for sm_90a", result.stdout, re.MULTILINE)
    hint = r"the CUDA implementation needs cuda-core and NVRTC: pip install 'lightning-indexer\[cuda13\]'"
    for row in ("compiler +none", "GPU check +not run"):
        assert re.search(f"^{row}: {hint}", result.stdout, re.MULTILINE), result.stdout


def test_doctor_survives_a_bad_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_INDEXER_CACHE", "kernels")
    result = run("doctor")
    assert result.exit_code == 0 and "must be an absolute path, got 'kernels'" in result.stdout, result.output


def test_doctor_fails_where_the_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.check_selection

    def broken(place: torch.device) -> Agreement:
        if place.type == "cuda":
            raise RuntimeError("launch failed")
        return right(place)

    monkeypatch.setattr(doctor, "obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(doctor, "check_selection", broken)
    result = run("doctor")
    assert result.exit_code == 1
    assert (
        "CPU check          ok" in result.stdout and "GPU check          RuntimeError: launch failed" in result.stdout
    )


def test_doctor_fails_where_the_selection_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "score_topk", lambda *args, top_k, **kwargs: torch.arange(top_k).repeat(4, 1))
    result = run("doctor")
    assert result.exit_code == 1
    assert "wrong" in result.stdout


# --- the measures -----------------------------------------------------------------------------------------------


def compare_choices(scores: list[float], chosen: list[int]) -> tuple[int, int]:
    """(agreeing, identical) of one query for which entry s scores `scores[s]`."""
    keys = torch.zeros(len(scores), 64)
    keys[:, 0] = torch.tensor(scores)
    pool = PagedPool(CacheSchema("fp32", 16, head_dim=64), num_blocks=1, max_seqs=1)
    slots = pool.alloc(0, len(scores))
    view = IndexerView(pool.storage, pool.schema, pool.block_table)
    append_entries(keys, view, slots)
    q = torch.zeros(1, 8, 64)
    q[0, 0, 0] = 1.0
    result = compare(q, torch.ones(1, 8), view, torch.tensor([chosen]), num_entries=len(scores))
    assert result.choices == min(len(chosen), len(scores))
    return result.agreeing, result.identical


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        pytest.param([4, 1, 3], (3, 3), id="the-best-in-any-order"),
        pytest.param([4, 1, 2], (3, 2), id="a-near-tie-within-the-band"),
        pytest.param([4, 1, 0], (2, 2), id="one-below-the-band"),
        pytest.param([3, 2, 1], (2, 2), id="the-best-left-out"),
        pytest.param([4, 4, 1], (2, 2), id="one-chosen-twice"),
        pytest.param([4, 1, -1], (2, 2), id="too-few"),
        pytest.param([0, 0, 0], (0, 0), id="all-wrong"),
    ],
)
def test_agreement_counts(chosen: list[int], expected: tuple[int, int]) -> None:
    assert compare_choices([1.0, 3.0, 2.0 - 1e-6, 2.0, 4.0], chosen) == expected


def test_agreement_with_fewer_entries_than_choices() -> None:
    assert compare_choices([1.0, 2.0], [0, 1, -1, -1]) == (2, 2)


def test_percent_is_never_rounded_up_to_all() -> None:
    assert screen.percent(16384, 16384) == "100 %"
    assert screen.percent(10**9 - 1, 10**9) == "99.99 %"


def test_watch_sees_memory_that_comes_and_goes() -> None:
    with watch() as use:
        torch.zeros(64 << 20, dtype=torch.uint8)
    if use.rise is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert use.peak is not None and use.peak >= use.rise >= 0
    if Path("/proc/self/clear_refs").exists():
        assert use.rise >= 60 << 20, use


# --- the text ---------------------------------------------------------------------------------------------------


def test_tokenize_keeps_text_readable() -> None:
    pieces = tokenize("Say: x_1 == 'naïve'.\n  東京 tower")
    assert pieces == [" Say", ":", " x_1", " ==", " '", "naïve", "'.", " 東", "京", " tower"]


def test_context_holds_each_planted_sentence_where_it_says() -> None:
    sentences = [sentence for sentence, _ in PLANTED]
    context = build_context(read_paragraphs(None, 1024), sentences, num_tokens=1024, seed=5)
    assert len(context.tokens) == 1024
    for sentence, span in zip(sentences, context.planted, strict=True):
        assert context.text(span.start, span.stop) == " " + sentence


def test_short_text_is_repeated_in_shuffled_paragraphs() -> None:
    paragraphs = [[" a", " b"], [" c"], [" d", " e", " f"]]
    context = build_context(paragraphs, [" x"], num_tokens=61, seed=0)
    text = [piece for piece in context.text(0, 61).split() if piece != "x"]
    assert text[:6] == list("abcdef") and context.source_tokens == 6
    rounds = ["".join(text[i : i + 6]) for i in range(0, 60, 6)]
    assert len(set(rounds)) > 1 and all(sorted(order) == list("abcdef") for order in rounds)
