"""The two levels of candidate selection on a GPU, for the engine that a call gets and for the portable one.

The cases of both levels are those of `test_candidate_selection.py`; scores are those of the same engine's
`index_scores`, which selection from lists must follow bit for bit.
"""

from dataclasses import replace

import pytest
import torch
from cases import (
    ADVERSARIAL_KINDS,
    Problem,
    adversarial_row,
    assert_same_bits,
    make_lists,
    make_problem,
    problem_with_scores,
)
from engines import ENGINES, Engine, workspace_bytes
from test_candidate_selection import BAD_LISTS, check_blocks

from lightning_indexer import index_scores, score_topk, select_candidates

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE, MIB = "cuda", 2**20

# The model's own shape, and one small shape for each other format
EACH_FORMAT = {
    "mxfp4": {"format": "mxfp4", "num_heads": 32, "head_dim": 128},
    "nvfp4": {"format": "nvfp4", "num_heads": 8, "head_dim": 128, "entries_per_block": 16},
    "fp8": {"format": "fp8", "num_heads": 128, "head_dim": 128},
    "bf16": {"format": "bf16", "query_format": "fp32", "num_heads": 8, "head_dim": 64},
}
MODEL = EACH_FORMAT["mxfp4"]


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


def decode_and_prefill(format: str) -> Problem:
    lens, ids = [20_001, 3000, 0, 7, *range(2900, 2940)], [0, 1, 2, 1, *[1] * 40]
    return make_problem([20_001, 3000, 1], **EACH_FORMAT[format], valid_lens=lens, seq_ids=ids).to(DEVICE)


# --- from lists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", EACH_FORMAT)
def test_selection_from_lists_is_the_stable_sort_of_what_they_name(engine: Engine, format: str) -> None:
    problem = decode_and_prefill(format)
    dense = engine.dense(problem)
    for room, block_entries, top_k, order, output in (
        (2048, 8, 512, "index", "entry"),
        (300, 16, 100, "score", "slot"),
        (1, 8, 100, "index", "entry"),
        (1500, 8, 2048, "score", "entry"),
        (2048, 8, 4096, "index", "slot"),
    ):
        lists = make_lists(problem, room, block_entries=block_entries)
        options = {"candidates": lists, "candidate_entries": block_entries}
        engine.check(problem, top_k, dense=dense, order=order, output=output, **options)


@pytest.mark.parametrize("kind", ADVERSARIAL_KINDS)
def test_adversarial_rows_from_lists(engine: Engine, kind: str) -> None:
    problem = problem_with_scores([adversarial_row(kind, n) for n in (30_000, 64, 1)], "bf16").to(DEVICE)
    dense, lists = engine.dense(problem), make_lists(problem, 2048)
    for top_k in (1, 512, 2048):
        engine.check(problem, top_k, dense=dense, order="score", candidates=lists)


def test_one_long_sequence(engine: Engine) -> None:
    """Lists that all multiprocessors share, over a million entries."""
    problem = make_problem([2**20 - 3], **MODEL).to(DEVICE)
    for most in (2048, 100):
        engine.check(problem, 512, candidates=make_lists(problem, 2048, most=most))


def test_a_row_does_not_depend_on_its_batch(engine: Engine) -> None:
    problem = decode_and_prefill("mxfp4")
    lists = make_lists(problem, 500)
    whole = engine.selected(problem, 100, candidates=lists)
    for rows in ([0], [3, 1], list(range(10, 44)), list(range(43, -1, -1))):
        got = engine.selected(problem.take(rows), 100, candidates=lists[rows])
        for name, a, b in zip(("indices", "scores"), got, whole, strict=True):
            assert_same_bits(a, b[rows], f"{name} of rows {rows}")


def test_twenty_runs_are_bitwise_equal(engine: Engine) -> None:
    problem = decode_and_prefill("mxfp4")
    lists = make_lists(problem, 2048)
    want = engine.selected(problem, 512, candidates=lists)
    for _ in range(20):
        got = engine.selected(problem, 512, candidates=lists)
        for name, a, b in zip(("indices", "scores"), got, want, strict=True):
            assert_same_bits(a, b, name)


def test_what_is_not_a_list(engine: Engine) -> None:
    """Ids out of range are ignored; where ids repeat entries do: all places are written, and it comes to an end."""
    problem, outside = decode_and_prefill("mxfp4"), torch.iinfo(torch.int32)
    row = [0, 5, -1, outside.max, 9, outside.min, 13, 2**29, -2]
    lists = torch.tensor([row] * 44, dtype=torch.int32, device=DEVICE)
    engine.check(problem, 50, candidates=lists)
    lists = torch.full((44, 2048), 3, dtype=torch.int32, device=DEVICE)
    for order in ("index", "score"):
        out = torch.full((44, 512), -7, dtype=torch.int32, device=DEVICE)
        engine.selected(problem, 512, candidates=lists, order=order, out=out)
        assert set(out.unique().tolist()) <= {-1, *range(24, 32)}


def test_nothing_is_allocated_with_everything_given() -> None:
    problem = decode_and_prefill("mxfp4")
    lists = make_lists(problem, 2048)
    given = {
        "out": torch.empty(44, 512, dtype=torch.int32, device=DEVICE),
        "workspace": torch.empty(workspace_bytes(problem, 512), dtype=torch.uint8, device=DEVICE),
    }
    problem.call(score_topk, top_k=512, candidates=lists, **given)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    problem.call(score_topk, top_k=512, candidates=lists, **given)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_lists_that_are_not_contiguous(engine: Engine) -> None:
    problem = decode_and_prefill("mxfp4")
    lists = make_lists(problem, 700)
    want = engine.selected(problem, 100, candidates=lists)
    got = engine.selected(problem, 100, candidates=lists.mT.contiguous().mT)
    for name, a, b in zip(("indices", "scores"), got, want, strict=True):
        assert_same_bits(a, b, name)


def test_rows_without_candidates(engine: Engine) -> None:
    problem = decode_and_prefill("mxfp4")
    for width in (0, 3):
        lists = torch.full((44, width), -1, dtype=torch.int32, device=DEVICE)
        indices, scores = engine.selected(problem, 40, candidates=lists)
        assert (indices == -1).all() and (scores == -torch.inf).all()


@pytest.mark.parametrize("name", [name for name in BAD_LISTS if name != "no-tensor"])
def test_validation_finds_bad_candidates(name: str) -> None:
    change, error, words = BAD_LISTS[name]
    problem = make_problem([100], **MODEL, valid_lens=[100, 99], seq_ids=[0, 0]).to(DEVICE)
    lists = torch.tensor([[1, 4, -1], [2, 3, 5]], dtype=torch.int32)
    with pytest.raises(error, match=f"^score_topk: .*{words}"):
        problem.call(score_topk, top_k=5, candidates=change(lists).to(DEVICE), validate=True)
    with pytest.raises(ValueError, match="candidates must be on cuda:0, got cpu"):
        problem.call(score_topk, top_k=5, candidates=lists)


# --- choosing blocks ------------------------------------------------------------------------------------------------


def selected_on_gpu(*args: object, **options: object) -> torch.Tensor:
    return select_candidates(*args, **options).cpu()


@pytest.mark.parametrize("format", EACH_FORMAT)
def test_blocks(format: str) -> None:
    problem = decode_and_prefill(format)
    dense = problem.call(index_scores).cpu()
    for num_blocks, block_entries in ((2048, 8), (100, 16), (1, 8)):
        check_blocks(selected_on_gpu, problem, num_blocks, block_entries, dense)


@pytest.mark.parametrize("kind", ADVERSARIAL_KINDS)
def test_adversarial_blocks(kind: str) -> None:
    problem = problem_with_scores([adversarial_row(kind, n) for n in (30_000, 64, 1)], "bf16").to(DEVICE)
    dense = problem.call(index_scores).cpu()
    for num_blocks in (1, 7, 2048):
        check_blocks(selected_on_gpu, problem, num_blocks, dense=dense)


def test_choosing_takes_bounded_memory() -> None:
    """A dense score for every query and entry would be 1 GiB."""
    problem = make_problem([2**18], **MODEL, valid_lens=[2**18 - t for t in range(1024)], seq_ids=[0] * 1024).to(DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.call(select_candidates)
    assert torch.cuda.max_memory_allocated() - before <= 256 * MIB


# --- graphs ---------------------------------------------------------------------------------------------------------


def test_a_graph_of_both_levels_follows_its_inputs() -> None:
    """Queries, lengths and keys change between replays."""

    def make(seed: int) -> Problem:
        lens = [[40, 30, 7, 0], [20_000, 3000, 2999, 1], [16_384, 3000, 8, 9]][seed]
        return make_problem([20_000, 3000], **MODEL, valid_lens=lens, seq_ids=[0, 1, 1, 0], seed=seed).to(DEVICE)

    static = make(0)
    lists = torch.empty(4, 2048, dtype=torch.int32, device=DEVICE)
    out = torch.empty(4, 512, dtype=torch.int32, device=DEVICE)

    def run(problem: Problem, lists: torch.Tensor, out: torch.Tensor) -> None:
        problem.call(select_candidates, out=lists)
        weights = problem.weights.flip(0) * 2  # another layer's
        replace(problem, weights=weights).call(score_topk, top_k=512, candidates=lists, out=out)

    run(static, lists, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(static, lists, out)
    for seed in (1, 2, 0):
        problem = make(seed)
        static.q.data.copy_(problem.q.data), static.q.scale.copy_(problem.q.scale)
        static.weights.copy_(problem.weights), static.valid_lens.copy_(problem.valid_lens)
        view, other = static.cache.view, problem.cache.view
        view.storage.copy_(other.storage), view.block_table.copy_(other.block_table)
        graph.replay()
        want_lists, want = torch.empty_like(lists), torch.empty_like(out)
        run(problem, want_lists, want)
        assert_same_bits(lists, want_lists, f"blocks, seed {seed}")
        assert_same_bits(out, want, f"entries, seed {seed}")
