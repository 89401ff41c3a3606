"""The two levels of DeepSeek-V4.1's selection: `select_candidates`, and `score_topk` from the blocks it chose.

What must come out is computed here from dense scores by plain sorting, in numpy: a block's largest score, ties to the
smaller id, the newest block always. Wrong implementations of both levels must each be noticed by a case.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    ADVERSARIAL_KINDS,
    Problem,
    adversarial_row,
    assert_same_bits,
    check_topk,
    copy_strided,
    make_lists,
    make_problem,
    problem_with_scores,
    rejections,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_indexer import IndexerView, index_scores, score_topk, select_candidates
from lightning_indexer.cpu import score_topk as cpu

CHUNK, PASS = cpu.ENTRIES_PER_CHUNK, cpu.QUERIES_PER_PASS
INT_MAX = 2**31 - 1


def expected_blocks(scores: np.ndarray, num_blocks: int, block_entries: int) -> np.ndarray:
    """int32 [num_blocks] for one row of visible scores."""
    blocks = -(-len(scores) // block_entries)
    padded = np.full(blocks * block_entries, -np.inf, scores.dtype)
    padded[: len(scores)] = np.where(np.isnan(scores), -np.inf, scores) + 0
    largest = padded.reshape(blocks, block_entries).max(1)
    is_older = np.arange(blocks) < blocks - 1
    best = np.lexsort((-largest, is_older))  # stable: ties to the smaller id
    chosen = np.sort([b for b in best[:num_blocks] if largest[b] > -np.inf or not is_older[b]])
    return np.pad(chosen, (0, num_blocks - len(chosen)), constant_values=-1).astype(np.int32)


def check_blocks(
    select: Callable, problem: Problem, num_blocks: int, block_entries: int = 8, dense: torch.Tensor | None = None
) -> None:
    """`select` chooses by each row of `dense`; without it by float64 scores, so the problem must be exact in fp32."""
    got = problem.call(select, num_blocks=num_blocks, block_entries=block_entries)
    assert got.shape == (len(problem.weights), num_blocks) and got.dtype == torch.int32
    for t, length in enumerate(problem.valid_lens.tolist()):
        row = problem.exact_row(t).astype(np.float32) if dense is None else dense[t, :length].numpy()
        want = expected_blocks(row, num_blocks, block_entries)
        assert_same_bits(got[t], want, f"blocks of query {t}, {num_blocks} x {block_entries} of {length}")


def with_impl(function: Callable, impl: str) -> Callable:
    return lambda *args, **options: function(*args, impl=impl, **options)


def visible(problem: Problem, lens: list[int]) -> Problem:
    return replace(problem, valid_lens=torch.tensor(lens, dtype=torch.int32))


# name -> (problem, num_blocks, block_entries), exact in fp32
BLOCK_CASES: dict[str, tuple[Callable[[], Problem], int, int]] = {
    name: (lambda rows=rows: problem_with_scores([np.asarray(row, np.float32) for row in rows]), count, size)
    for name, rows, count, size in (
        ("all-equal", [np.ones(100), np.ones(17)], 4, 8),
        ("all-zero", [np.zeros(100)], 4, 16),
        ("a-tie-at-the-boundary", [np.repeat([3, 5, 2, 5, 3, 3, 1], 8)], 4, 8),
        ("the-newest-is-the-worst", [np.r_[np.arange(64.0), -100]], 3, 8),
        ("room-for-one", [np.r_[np.full(64, np.inf), -5], [1.0, 2.0]], 1, 8),
        ("infinite-scores-do-not-displace-the-newest", [np.r_[np.full(64, np.inf), np.zeros(3)]], 2, 8),
        ("the-newest-is-minus-infinity", [np.r_[np.zeros(16), np.full(9, -np.inf)]], 5, 8),
        ("a-block-of-minus-infinity", [np.r_[np.zeros(8), np.full(8, -np.inf), np.zeros(9)]], 5, 8),
        ("the-largest-counts-not-the-sum", [np.r_[np.full(8, 3.0), [9.0] + [-50.0] * 7, np.zeros(9)]], 2, 8),
        ("nan-beside-a-number", [np.r_[np.zeros(8), [np.nan, 4.0] * 4, np.full(8, np.nan), 1]], 3, 8),
        ("fewer-blocks-than-room", [np.arange(30.0), np.zeros(0), [7.0]], 9, 8),
        ("signed-zeros", [np.r_[np.full(8, -0.0), np.full(8, 0.0), np.full(8, -0.0), 0]], 2, 8),
    )
}
BLOCK_CASES["the-best-lies-behind-the-length"] = (
    lambda: visible(problem_with_scores([np.r_[np.arange(64.0), np.full(16, 99.0)]] * 1), [66]),
    3,
    8,
)
for _size, _page in ((8, 16), (8, 48), (16, 64), (16, 16)):
    BLOCK_CASES[f"exact-{_size}-in-pages-of-{_page}"] = (
        lambda page=_page: make_problem(
            [150, 97],
            entries_per_block=page,
            valid_lens=[97, 150, 3, 64, 65, 0],
            seq_ids=[1, 0, 0, 0, 1, 0],
            exact=True,
            padding=48,
        ),
        5,
        _size,
    )


@pytest.mark.parametrize("case", BLOCK_CASES)
def test_blocks(case, impl):
    make, num_blocks, block_entries = BLOCK_CASES[case]
    check_blocks(with_impl(select_candidates, impl), make(), num_blocks, block_entries)


@pytest.mark.parametrize("kind", ADVERSARIAL_KINDS)
def test_adversarial_blocks(kind, impl):
    problem = problem_with_scores([adversarial_row(kind, n) for n in (300, 64, 65, 1)])
    scores = problem.call(index_scores, impl=impl)
    for num_blocks in (1, 7, 40):
        check_blocks(with_impl(select_candidates, impl), problem, num_blocks, dense=scores)


@st.composite
def problems(draw) -> Problem:
    lens = draw(st.lists(st.integers(0, 300), min_size=1, max_size=3))
    rows = draw(st.lists(st.integers(0, len(lens) - 1), max_size=5))
    return make_problem(
        lens,
        format=draw(st.sampled_from(["mxfp4", "nvfp4", "fp8", "bf16", "fp32"])),
        entries_per_block=draw(st.sampled_from([16, 48, 64])),
        valid_lens=[draw(st.integers(0, lens[row])) for row in rows],
        seq_ids=rows,
        exact=True,
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=40)
@given(problems(), st.integers(1, 45), st.sampled_from([8, 16]))
def test_any_blocks(problem, num_blocks, block_entries):
    for impl in ("cpu", "reference"):
        check_blocks(with_impl(select_candidates, impl), problem, num_blocks, block_entries)


@settings(max_examples=40)
@given(problems(), st.integers(0, 45), st.sampled_from([8, 16]), st.integers(1, 60), st.data())
def test_any_selection_from_lists(problem, room, block_entries, top_k, data):
    most, seed = data.draw(st.integers(0, 45)), data.draw(st.integers(0, 99))
    lists = make_lists(problem, room, block_entries=block_entries, most=most, seed=seed)
    options = {"candidates": lists, "candidate_entries": block_entries}
    options |= {"order": data.draw(st.sampled_from(["index", "score"]))}
    options |= {"output": data.draw(st.sampled_from(["entry", "slot"]))}
    for impl in ("cpu", "reference"):
        check_topk(score_topk, problem, top_k, impl=impl, **options)


@pytest.mark.parametrize("kind", ADVERSARIAL_KINDS)
def test_adversarial_rows_from_lists(kind, impl):
    problem = problem_with_scores([adversarial_row(kind, n) for n in (300, 64, 1)])
    scores, lists = problem.call(index_scores, impl=impl), make_lists(problem, 20)
    for top_k in (1, 50, 200):
        check_topk(score_topk, problem, top_k, order="score", dense=scores, candidates=lists, impl=impl)


# --- across the two levels ----------------------------------------------------------------------------------------


def test_both_levels_across_chunks_and_passes(impl):
    """More than a chunk of entries, more than a pass of queries, scores that need rounding."""
    lens = [CHUNK + 1, CHUNK, CHUNK - 1, CHUNK + 8, CHUNK + 7, 2 * CHUNK + 13]
    many = PASS + 1 if impl == "cpu" else 0
    problem = make_problem([max(lens)], valid_lens=lens + [40] * many, seq_ids=[0] * (len(lens) + many))
    scores = problem.call(index_scores, impl=impl)
    check_blocks(with_impl(select_candidates, impl), problem, 300, dense=scores)
    lists = problem.call(select_candidates, num_blocks=300, impl=impl)
    check_topk(score_topk, problem, 100, dense=scores, candidates=lists, impl=impl)


def test_ones_own_candidates_leave_the_selection_as_it_is(impl):
    """Each of the k best entries lies in one of k blocks, and the newest block may take one more place."""
    rows = [
        adversarial_row(kind, 400) for kind in ("zero-plateau", "last-bit", "few-values", "sorted-down", "all-zero")
    ]
    problem, top_k = problem_with_scores(rows), 20
    lists = problem.call(select_candidates, num_blocks=top_k + 1, impl=impl)
    want = problem.call(score_topk, top_k=top_k, impl=impl)
    assert_same_bits(problem.call(score_topk, top_k=top_k, candidates=lists, impl=impl), want, "restricted")


def test_all_blocks_are_no_restriction(impl):
    problem = make_problem([201, 90], valid_lens=[201, 90, 7, 0], seq_ids=[0, 1, 1, 0])
    lists = problem.call(select_candidates, impl=impl)
    assert lists.shape == (4, 2048) and lists[0, :27].tolist() == [*range(26), -1]
    for output in ("entry", "slot"):
        options = {"top_k": 30, "return_scores": True, "output": output, "impl": impl}
        want, got = problem.call(score_topk, **options), problem.call(score_topk, candidates=lists, **options)
        for name, a, b in zip(("indices", "scores"), got, want, strict=True):
            assert_same_bits(a, b, f"{name}, {output}")


def test_rows_without_candidates(impl):
    problem = make_problem([50])
    for lists in (torch.full((1, 3), -1, dtype=torch.int32), torch.empty(1, 0, dtype=torch.int32)):
        indices, scores = problem.call(score_topk, top_k=4, candidates=lists, return_scores=True, impl=impl)
        assert (indices == -1).all() and (scores == -torch.inf).all()


def test_no_queries_and_nothing_to_see(impl):
    problem = make_problem([50]).take([])
    lists = problem.call(select_candidates, num_blocks=3, impl=impl)
    assert lists.shape == (0, 3)
    assert problem.call(score_topk, top_k=4, candidates=lists, impl=impl).shape == (0, 4)
    view = make_problem([50]).cache.view
    empty = replace(make_problem([50]), valid_lens=torch.zeros(1, dtype=torch.int32))
    empty = replace(empty, cache=replace(empty.cache, view=replace(view, block_table=view.block_table[:, :0])))
    assert empty.call(select_candidates, num_blocks=3, impl=impl).tolist() == [[-1] * 3]


def test_strides_and_given_memory_change_nothing(impl):
    problem = make_problem([201, 90], valid_lens=[201, 90, 7], seq_ids=[0, 1, 1])
    want = problem.call(select_candidates, num_blocks=6, impl=impl)
    memory = torch.full((3, 14), -7, dtype=torch.int32)
    assert problem.call(select_candidates, num_blocks=6, out=memory[:, 1:13:2], impl=impl).data_ptr() > 0
    assert_same_bits(memory[:, 1:13:2], want, "blocks in the caller's memory")
    assert (memory[:, ::2] == -7).all() and (memory[:, 13] == -7).all()
    got = problem.call(score_topk, top_k=9, candidates=copy_strided(memory[:, 1:13:2], "cpu"), impl=impl)
    assert_same_bits(got, problem.call(score_topk, top_k=9, candidates=want, impl=impl), "strided lists")


def test_a_row_does_not_depend_on_its_batch():
    lens = [150, 33, 200, 64, 0, 200, 9]
    problem = make_problem([200, 64], valid_lens=lens, seq_ids=[0, 1, 0, 1, 1, 0, 0])
    whole = problem.call(select_candidates, num_blocks=6)
    for rows in ([4, 2, 0, 1, 6, 5, 3], [3], [2, 5]):
        assert_same_bits(problem.take(rows).call(select_candidates, num_blocks=6), whole[rows], f"rows {rows}")


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operator returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple | list) else (result,):
            if isinstance(out, torch.Tensor):
                self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return result


def test_memory_does_not_grow_with_context():
    def peak(length: int) -> int:
        view = make_problem([10]).cache.view
        table = torch.arange(length // 64, dtype=torch.int32).unsqueeze(0) % 2
        view = IndexerView(torch.zeros(2, view.schema.stride, dtype=torch.uint8), view.schema, table)
        lens, seq_ids = torch.full((PASS,), length, dtype=torch.int32), torch.zeros(PASS, dtype=torch.int32)
        with LargestTensor() as largest:
            options = {"valid_lens": lens, "seq_ids": seq_ids}
            lists = select_candidates(torch.zeros(PASS, 8, 64), torch.zeros(PASS, 8), view, num_blocks=64, **options)
            score_topk(torch.zeros(PASS, 8, 64), torch.zeros(PASS, 8), view, top_k=9, candidates=lists, **options)
        return largest.nbytes

    assert peak(2 * CHUNK) == peak(8 * CHUNK)  # dense scores of the second would be 16 MiB


# --- wrong implementations ----------------------------------------------------------------------------------------


def by_sorting(change: Callable[[np.ndarray, int], np.ndarray]) -> Callable:
    """A dense choice of blocks: `change(right ids of a row, blocks that the row has)`."""

    def implementation(q, weights, view, *, valid_lens, seq_ids, num_blocks, block_entries):
        options = {"valid_lens": valid_lens, "seq_ids": seq_ids}
        lists = select_candidates(q, weights, view, num_blocks=num_blocks, block_entries=block_entries, **options)
        rows = [
            change(row[row >= 0], -(-length // block_entries))
            for row, length in zip(lists.numpy(), valid_lens.tolist(), strict=True)
        ]
        pad = [np.pad(row, (0, num_blocks - len(row)), constant_values=-1) for row in rows]
        return torch.from_numpy(np.stack(pad).astype(np.int32))

    return implementation


def forgets_the_newest(q, weights, view, *, valid_lens, **options):
    """As if the newest block had to earn its place."""
    last = select_candidates(q, weights, view, valid_lens=valid_lens + 8, validate=False, **options)
    return torch.where(last * options["block_entries"] >= valid_lens.unsqueeze(1), -1, last)


def sees_one_block_too_many(q, weights, view, *, valid_lens, **options):
    lens = valid_lens + options["block_entries"]
    return select_candidates(q, weights, view, valid_lens=lens, validate=False, **options)


def sees_whole_blocks_only(q, weights, view, *, valid_lens, **options):
    size = options["block_entries"]
    return select_candidates(q, weights, view, valid_lens=valid_lens // size * size, **options)


WRONG_BLOCKS = {
    "forgets-the-newest": forgets_the_newest,
    "sees-one-block-too-many": sees_one_block_too_many,
    "sees-whole-blocks-only": sees_whole_blocks_only,
    "off-by-one-block": by_sorting(lambda ids, blocks: np.unique(np.minimum(ids + 1, blocks - 1))),
    "drops-one": by_sorting(lambda ids, blocks: ids[:-1]),
    "best-first-not-ascending": by_sorting(lambda ids, blocks: np.roll(ids, 1)),
    "other-size": lambda *args, block_entries, **o: select_candidates(*args, block_entries=24 - block_entries, **o),
}
LIST_CASES = {name: make for name, (make, _, size) in BLOCK_CASES.items() if size == 8}


def list_options(problem: Problem) -> dict[str, object]:
    return {"candidates": make_lists(problem, 6, most=4, seed=1)}


def changed(lists: Callable[[torch.Tensor], torch.Tensor] = lambda x: x, lens: Callable = lambda x: x) -> Callable:
    """`score_topk` of changed candidates or lengths."""

    def implementation(q, weights, view, *, valid_lens, candidates, **options):
        return score_topk(
            q, weights, view, valid_lens=lens(valid_lens), candidates=lists(candidates), validate=False, **options
        )

    return implementation


WRONG_SELECTIONS = {
    "ignores-the-candidates": changed(lists=lambda x: None),
    "off-by-one-block": changed(lists=lambda x: torch.where(x >= 0, x + 1, -1)),
    "off-by-one-list": changed(lists=lambda x: x.roll(1, 0)),
    "forgets-the-last-block": changed(lists=lambda x: torch.where(x == x.amax(1, keepdim=True), -1, x)),
    "takes-minus-one-for-block-0": changed(lists=lambda x: torch.where(x >= 0, x, 0)),
    "ignores-the-length": changed(lens=lambda x: -(-x // 8) * 8),
    "blocks-of-sixteen": lambda *args, **o: score_topk(*args, candidate_entries=16, validate=False, **o),
}


@pytest.mark.parametrize("name", WRONG_BLOCKS)
def test_a_wrong_choice_of_blocks_is_rejected(name):
    cases = BLOCK_CASES.values()
    checks = [lambda c=case: check_blocks(WRONG_BLOCKS[name], c[0](), *c[1:]) for case in cases]
    assert rejections(checks) > 0, f"no case notices {name}"


@pytest.mark.parametrize("name", WRONG_SELECTIONS)
def test_a_wrong_selection_from_lists_is_rejected(name):
    def check(make: Callable[[], Problem], function: Callable) -> None:
        problem = make()
        for top_k in (15, 40):
            check_topk(function, problem, top_k, **list_options(problem))

    right = [lambda m=make: check(m, score_topk) for make in LIST_CASES.values()]
    assert rejections(right) == 0
    wrong = [lambda m=make: check(m, WRONG_SELECTIONS[name]) for make in LIST_CASES.values()]
    assert rejections(wrong) > 0, f"no case notices {name}"


# --- bad input ----------------------------------------------------------------------------------------------------

BAD_LISTS = {
    "int64": (
        lambda x: x.long(),
        TypeError,
        r"candidates must be int32, got int64 \(use candidates.to\(torch.int32\)\)",
    ),
    "one-row": (lambda x: x[:1], ValueError, r"candidates must have shape \[2, NB\], got \[1, 3\]"),
    "flat": (lambda x: x[0], ValueError, r"candidates must have shape \[2, NB\], got \[3\]"),
    "no-tensor": (lambda x: x.tolist(), TypeError, "candidates must be a torch.Tensor, got list"),
    "descending": (
        lambda x: x.flip(1),
        ValueError,
        r"candidates must ascend in each row, .* got -1, 4 from \[0, 0\] on",
    ),
    "repeated": (lambda x: x.clamp_max(1), ValueError, r"got 1, 1 from \[0, 0\] on"),
    "hole": (lambda x: torch.tensor([[0, 1, 2], [3, -1, 4]]).int(), ValueError, r"got -1, 4 from \[1, 1\] on"),
    "too-large": (
        lambda x: torch.where(x == 4, 32, x),
        ValueError,
        r"candidates must lie in -1..31, got 32 at \[0, 1\]",
    ),
    "negative": (
        lambda x: torch.where(x == -1, -2, x),
        ValueError,
        r"candidates must lie in -1..31, got -2 at \[0, 2\]",
    ),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_errors_name_the_candidates_and_leave_out_alone(name, impl):
    change, error, words = BAD_LISTS[name]
    problem = make_problem([100], valid_lens=[100, 99], seq_ids=[0, 0])  # a table of four pages of 64 entries
    lists = torch.tensor([[1, 4, -1], [2, 3, 5]], dtype=torch.int32)
    out = torch.full((2, 5), -7, dtype=torch.int32)
    problem.call(score_topk, top_k=5, candidates=lists, impl=impl)
    with pytest.raises(error, match=f"^score_topk: .*{words}"):
        problem.call(score_topk, top_k=5, candidates=change(lists), out=out, impl=impl)
    assert (out == -7).all()


BAD_OPTIONS = {
    "num_blocks": ({"num_blocks": 0}, ValueError, "num_blocks must be an int of at least 1, got 0"),
    "bool": ({"num_blocks": True}, ValueError, "num_blocks must be an int of at least 1, got True"),
    "size": ({"block_entries": 12}, ValueError, r"block_entries must be one of \(8, 16\), got 12"),
    "out": ({"out": torch.zeros(1, 3).int()}, ValueError, r"out must have shape \[2, 2048\], got \[1, 3\]"),
    "dtype": ({"out": torch.zeros(2, 2048).long()}, TypeError, "out must be int32, got int64"),
    "impl": ({"impl": "cuda"}, NotImplementedError, "impl='cuda' does not serve tensors on cpu"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_errors_of_select_candidates(name):
    options, error, words = BAD_OPTIONS[name]
    problem = make_problem([100], valid_lens=[100, 99], seq_ids=[0, 0])
    with pytest.raises(error, match=f"^select_candidates: {words}"):
        problem.call(select_candidates, **options)
    with pytest.raises(ValueError, match="^select_candidates: valid_lens must lie in 0..256, got 257"):
        visible(problem, [257, 1]).call(select_candidates)
    with pytest.raises(ValueError, match=r"^score_topk: candidate_entries must be one of \(8, 16\), got 32"):
        problem.call(score_topk, top_k=1, candidates=torch.zeros(2, 1).int(), candidate_entries=32)


def test_without_validation_bad_candidates_are_ignored(impl):
    problem = make_problem([100], valid_lens=[100, 0], seq_ids=[0, 0])
    scores = problem.call(index_scores, impl=impl)
    lists = torch.tensor([[1, -1, INT_MAX, 5, -INT_MAX, 13, 2**28]] * 2, dtype=torch.int32)
    check_topk(score_topk, problem, 40, dense=scores, candidates=lists, validate=False, impl=impl)
    clamped = visible(problem, [INT_MAX, -3]).call(select_candidates, num_blocks=40, validate=False, impl=impl)
    assert clamped[0].max() == 31 and set(range(13)) < set(clamped[0].tolist()) and (clamped[1] == -1).all()
