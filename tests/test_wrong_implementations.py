"""Tests of the tests: implementations that are wrong in a known way must each be rejected by some check.

The checks and their cases are those of `test_score_topk.py` and `test_append_gather.py`, which pass the real functions.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import APPEND_CASES, TOPK_CASES, VISIBLE, check_append, check_topk, check_visible, rejections

from lightning_indexer import append_entries, index_scores, score_topk, visible_entries
from lightning_indexer.cache.view import PagedView
from lightning_indexer.cpu import operands

EACH_FORMAT_ONCE = list({case[:2]: case for case in APPEND_CASES}.values())


def topk_checks(function: Callable) -> Iterator[Callable]:
    for make, top_k, order, output in TOPK_CASES.values():
        yield lambda make=make, k=top_k, o=order, p=output: check_topk(function, make(), k, order=o, output=p)


def append_checks(function: Callable) -> Iterator[Callable]:
    yield from (lambda case=case: check_append(function, case) for case in EACH_FORMAT_ONCE)


def visible_checks(function: Callable) -> Iterator[Callable]:
    yield from (lambda ratio=ratio: check_visible(function, ratio) for ratio in sorted({r for r, _ in VISIBLE}))


# --- scoring --------------------------------------------------------------------------------------------------


def sorted_scores(scores: torch.Tensor) -> torch.Tensor:
    """The right order of preference, each row's entries best first."""
    best = scores.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best = best.argsort(dim=1, descending=True, stable=True)
    return best.gather(1, scores.gather(1, best).isnan().int().argsort(dim=1, stable=True))


def by_sorting(rank: Callable[[torch.Tensor], torch.Tensor], *, always_by_score: bool = False) -> Callable:
    """A dense selection whose order of preference is `rank(scores)`: int64 [T, n], best first."""

    def implementation(q, weights, view, *, top_k, valid_lens, seq_ids, order, output, **_):
        scores = index_scores(q, weights, view, valid_lens=valid_lens, seq_ids=seq_ids)
        best = torch.nn.functional.pad(rank(scores), (0, top_k), value=2**31)
        best = best.masked_fill(best >= valid_lens.unsqueeze(1), 2**31)
        best = best.gather(1, (best == 2**31).int().argsort(dim=1, stable=True))[:, :top_k]
        if order == "index" and not always_by_score:
            best = best.sort(dim=1).values
        best = best.masked_fill(best == 2**31, -1)
        kept = torch.nn.functional.pad(scores, (0, 1)).gather(1, best.clamp_min(0))
        kept = torch.where(kept.isnan() | (best < 0), -torch.inf, kept)
        return (view.slots(seq_ids, best) if output == "slot" else best).int(), kept

    return implementation


def larger_index_first(scores: torch.Tensor) -> torch.Tensor:
    return scores.shape[1] - 1 - sorted_scores(scores.flip(1))


def nan_first(scores: torch.Tensor) -> torch.Tensor:
    return scores.argsort(dim=1, descending=True, stable=True)


def smallest_first(scores: torch.Tensor) -> torch.Tensor:
    return sorted_scores(torch.where(scores == -torch.inf, scores, -scores))


def magnitude(scores: torch.Tensor) -> torch.Tensor:
    return sorted_scores(torch.where(scores == -torch.inf, scores, scores.abs()))


def zeros_are_no_candidates(scores: torch.Tensor) -> torch.Tensor:
    return sorted_scores(scores.masked_fill(scores == 0, -torch.inf))


def unpadded_tail(*args, **options):
    indices, scores = score_topk(*args, **options)
    return indices.clamp_min(0), scores


def keeps_k_minus_1(*args, **options):
    indices, scores = score_topk(*args, **options)
    indices[:, -1], scores[:, -1] = -1, -torch.inf
    return indices, scores


def ignores_the_last_partial_block(q, weights, view, *, valid_lens, **options):
    per_block = view.schema.entries_per_block
    return score_topk(q, weights, view, valid_lens=valid_lens // per_block * per_block, **options)


def sees_one_entry_too_many(q, weights, view, *, valid_lens, **options):
    return score_topk(q, weights, view, valid_lens=valid_lens + (valid_lens > 0), **options)


def sees_one_entry_too_few(q, weights, view, *, valid_lens, **options):
    return score_topk(q, weights, view, valid_lens=(valid_lens - 1).clamp_min(0), **options)


def reads_every_query_from_row_0(q, weights, view, *, seq_ids, valid_lens, **options):
    return score_topk(q, weights, view, seq_ids=seq_ids * 0, valid_lens=valid_lens.clamp(max=97), **options)


def forgets_the_weights(q, weights, view, **options):
    return score_topk(q, torch.ones_like(weights), view, **options)


def empty(q, weights, view, *, top_k, **_):
    shape = (len(weights), top_k)
    return torch.full(shape, -1, dtype=torch.int32), torch.full(shape, -torch.inf)


WRONG_SELECTIONS = {
    "ties-to-the-larger-index": by_sorting(larger_index_first),
    "nan-first": by_sorting(nan_first),
    "smallest-first": by_sorting(smallest_first),
    "by-magnitude": by_sorting(magnitude),
    "zeros-are-no-candidates": by_sorting(zeros_are_no_candidates),
    "order-is-always-by-score": by_sorting(sorted_scores, always_by_score=True),
    "unpadded-tail": unpadded_tail,
    "keeps-k-minus-1": keeps_k_minus_1,
    "ignores-the-last-partial-block": ignores_the_last_partial_block,
    "sees-one-entry-too-many": sees_one_entry_too_many,
    "sees-one-entry-too-few": sees_one_entry_too_few,
    "reads-every-query-from-row-0": reads_every_query_from_row_0,
    "forgets-the-weights": forgets_the_weights,
    "empty": empty,
}


@pytest.mark.parametrize("name", WRONG_SELECTIONS)
def test_wrong_selection_is_rejected(name):
    assert rejections(topk_checks(WRONG_SELECTIONS[name])) > 0, f"no case notices {name}"


def _rows_shifted(name: str, shift: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    right = getattr(PagedView, name).fget
    return lambda patch: patch.setattr(PagedView, name, property(lambda view: shift(right(view))))


def _without_shift(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(operands, "_INT_SHIFT", 0)


def _swapped_pairs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(operands, "_PAIR_TABLE", operands._PAIR_TABLE.view(torch.int8).view(256, 2).flip(1).view(torch.int16))
    right = operands.query_operand

    def query_only(q):  # the same swap on both sides would cancel
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(operands, "_PAIR_TABLE", operands._pair_table())
            return right(q)

    patch.setattr("lightning_indexer.cpu.score_topk.query_operand", query_only)


def _constant_scale_offset(patch: pytest.MonkeyPatch) -> None:
    right = PagedView._rows

    def rows(view: PagedView, offset: int, row_bytes: int) -> torch.Tensor:
        return right(view, offset and min(offset, 48 * view.schema.data_bytes), row_bytes)

    patch.setattr(PagedView, "_rows", rows)


WRONG_READERS = {
    "scale-of-the-next-row": _rows_shifted("scale_rows", lambda rows: rows.roll(-1, dims=1)),
    "scale-groups-reversed": _rows_shifted("scale_rows", lambda rows: rows.flip(-1)),
    "scales-of-another-block-size": _constant_scale_offset,
    "data-of-the-next-block": _rows_shifted("data_rows", lambda rows: rows.roll(1, dims=0)),
    "nibbles-swapped": _swapped_pairs,
    "group-shift-lost": _without_shift,
}


@pytest.mark.parametrize("name", WRONG_READERS)
def test_wrong_reader_is_rejected(name, monkeypatch):
    WRONG_READERS[name](monkeypatch)
    assert rejections(topk_checks(score_topk)) > 0, f"no case notices {name}"


# --- writing --------------------------------------------------------------------------------------------------


def nibbles_swapped(entries, view, slots):
    append_entries(entries, view, slots)
    if view.schema.format in ("mxfp4", "nvfp4"):
        block, row = _places(view, slots)
        packed = view.data_rows[block, row]
        view.data_rows[block, row] = packed >> 4 | packed << 4


def scale_in_the_next_row(entries, view, slots):
    block, row = _places(view, slots)
    before = view.scale_rows.clone()
    append_entries(entries, view, slots)
    written = view.scale_rows[block, row]
    view.scale_rows.copy_(before)
    view.scale_rows[block, (row + 1) % view.schema.entries_per_block] = written


def skip_slot_writes_the_last_row(entries, view, slots):
    append_entries(entries, view, slots % (view.num_blocks * view.schema.entries_per_block))


def one_row_late(entries, view, slots):
    last = view.num_blocks * view.schema.entries_per_block - 1
    append_entries(entries, view, torch.where(slots < 0, -1, (slots + 1).clamp(max=last)))


def record_by_record(entries, view, slots):
    """Each entry's scale right behind its data, as the engines' view of a page seems to say."""
    before = view.storage.clone()
    append_entries(entries, view, slots)
    block, row = _places(view, slots)
    records = torch.cat([view.data_rows[block, row], view.scale_rows[block, row]], dim=-1)
    view.storage.copy_(before)
    view.storage.unflatten(1, (view.schema.entries_per_block, -1))[block, row] = records


def clears_the_rest_of_the_block(entries, view, slots):
    view.storage[_places(view, slots)[0]] = 0
    append_entries(entries, view, slots)


def ties_toward_zero(entries, view, slots):
    append_entries(entries, view, slots, rounding="toward_zero")


def writes_nothing(entries, view, slots):
    pass


def _places(view: PagedView, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    slots = slots[slots >= 0]
    return slots // view.schema.entries_per_block, slots % view.schema.entries_per_block


WRONG_WRITERS = [
    nibbles_swapped,
    scale_in_the_next_row,
    skip_slot_writes_the_last_row,
    one_row_late,
    record_by_record,
    clears_the_rest_of_the_block,
    ties_toward_zero,
    writes_nothing,
]


@pytest.mark.parametrize("wrong", WRONG_WRITERS, ids=lambda f: f.__name__)
def test_wrong_writer_is_rejected(wrong):
    assert rejections(append_checks(wrong)) > 0


# --- visibility -----------------------------------------------------------------------------------------------

WRONG_VISIBILITY = {
    "position//m": lambda t, m: (t // m).int(),
    "(position+2)//m": lambda t, m: ((t + 2) // m).int(),
    "ceil": lambda t, m: (-(-(t + 1) // m)).int(),
    "one-more": lambda t, m: ((t + 1) // m + 1).int(),
    "always-ratio-4": lambda t, m: ((t + 1) // 4).int(),
    "toward-zero-of-negative": lambda t, m: (t // m + 1).int(),
    "int64": lambda t, m: (t + 1) // m,
}


@pytest.mark.parametrize("name", WRONG_VISIBILITY)
def test_wrong_visibility_is_rejected(name):
    assert rejections(visible_checks(WRONG_VISIBILITY[name])) > 0


# --- and the right ones pass ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "right"),
    [
        (topk_checks, score_topk),
        (topk_checks, by_sorting(sorted_scores)),
        (append_checks, append_entries),
        (visible_checks, visible_entries),
    ],
    ids=["score_topk", "dense-sort", "append_entries", "visible_entries"],
)
def test_right_implementations_pass_every_check(checks, right):
    for check in checks(right):
        check()
