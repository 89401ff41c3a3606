"""The benchmark: it checks before it times, its peer computes the same selection, and it writes what it says."""

import json

import pytest
from typer.testing import CliRunner

from lightning_indexer import score_topk
from lightning_indexer.bench import run as bench_run
from lightning_indexer.bench.cases import QUICK_GRID, Case, make_operands
from lightning_indexer.bench.peers import peer
from lightning_indexer.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_bench_checks_times_and_draws(tmp_path):
    result = run("bench", "--quick", "--repeats", "1", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [record["tokens"] for record in records] == [1, 16]
    assert all(record["median_s"] > 0 and record["peak_extra_bytes"] >= 0 for record in records)
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_bench_times_the_peer_on_a_right_selection():
    case = Case("prefill", 3, 2, 300, top_k=20)
    operands = make_operands(case)
    theirs = peer("transformers", case, operands)().sort(dim=1).values
    ours = score_topk(
        operands.query,
        operands.weights,
        operands.view,
        top_k=20,
        valid_lens=operands.valid_lens,
        seq_ids=operands.seq_ids,
    )
    assert theirs.tolist() == ours.tolist()


def test_bench_times_nothing_wrong(monkeypatch):
    right = bench_run.score_topk
    monkeypatch.setattr(bench_run, "score_topk", lambda *args, **kwargs: (right(*args, **kwargs) - 1).clamp_min(0))
    with pytest.raises(AssertionError, match="choices agree with float64"):
        list(bench_run.run_grid(QUICK_GRID[:1]))


def test_bench_refuses_an_unknown_peer(tmp_path):
    result = run("bench", "--peer", "nobody", "--output", str(tmp_path))
    assert result.exit_code == 2 and "--peer must be one of transformers, got nobody" in result.output
