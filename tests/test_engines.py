"""The tensors of vLLM, SGLang and DeepGEMM go in as they are, and what FlashMLA wants comes out."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import POISON, assert_same_bits
from engine_tensors import (
    CASES,
    TOKENS,
    Case,
    Held,
    as_tensor,
    check_logits,
    check_selection,
    entries_of,
    hold,
    in_four_bytes,
    in_int32,
    packed,
    read_slot,
    values,
    write_pages,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_indexer import QuantizedQuery, score_topk, score_topk_workspace_bytes
from lightning_indexer.integrations import engines
from lightning_indexer.integrations.engines import paged_mqa_logits, paged_mqa_topk, view_pages

MXFP4, FP8 = Case("mxfp4", "mxfp4", 2, num_heads=8), Case("fp8", "fp8", 2, num_heads=8)
LONGEST = entries_of(max(TOKENS))


# --- the same sets as an independent reader's -----------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_selection_in_every_layout(case, impl):
    held = hold(CASES[case])
    for top_k, output, order in ((48, "slot", "index"), (48, "entry", "score"), (512, "slot", "index")):
        check_selection(paged_mqa_topk, held, top_k, output=output, order=order, impl=impl)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_every_layout(case, impl):
    held = hold(CASES[case])
    for width in (LONGEST, LONGEST + 43):
        check_logits(paged_mqa_logits, held, width, impl=impl)


@pytest.mark.parametrize("case", CASES)
def test_slots_hold_the_selected_entries(case):
    """The bytes at a slot, read by hand, are those of the entry that `output="entry"` names."""
    held = hold(CASES[case])
    slots, _ = held.call(paged_mqa_topk, 48)
    entries, _ = held.call(paged_mqa_topk, 48, output="entry")
    assert_same_bits(slots < 0, entries < 0, "where the indices end")
    for b, j, rank in np.argwhere(slots.numpy() >= 0).tolist():
        entry, slot = int(entries[b, j, rank]), int(slots[b, j, rank])
        assert_same_bits(read_slot(held, slot), held.entries[b][entry], f"slot {slot}, entry {entry} of request {b}")


@settings(max_examples=25)
@given(
    tokens=st.lists(st.integers(0, 600), min_size=1, max_size=5),
    next_n=st.integers(1, 4),
    keys=st.sampled_from(["mxfp4", "fp8"]),
    memory=st.sampled_from(["whole", "padded", "slab", "layers-first"]),
    top_k=st.integers(1, 160),
    output=st.sampled_from(["slot", "entry"]),
)
def test_any_lengths(tokens, next_n, keys, memory, top_k, output):
    case = Case(keys, keys, next_n, memory, num_heads=8)
    check_selection(paged_mqa_topk, hold(case, tokens=tuple(tokens)), top_k, output=output)


def test_key_scales_that_are_not_powers_of_two(impl):
    """Writers of amax / 448. Scores lie 2 % apart, a hundred times the bound, in the order of their scales."""
    rng, count = np.random.default_rng(1), 100
    codes = np.full((count, 128), 1.5).astype(ml_dtypes.float8_e4m3fn)
    scales = np.float32(0.0137 * 1.02 ** rng.permutation(count))[:, None]
    kv_cache, table, page_bytes = write_pages(rng, [(codes, scales)], FP8)
    q_values = np.full((1, 1, 8, 128), 1.25)
    q = as_tensor(q_values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), torch.float8_e4m3fn)
    tensors = (kv_cache, torch.ones(1, 8), torch.tensor([[count]], dtype=torch.int32), as_tensor(table))
    held = Held(q, *tensors, q_values, [values(codes, scales)], page_bytes)
    for top_k in (1, 17, 64, 99):
        check_selection(paged_mqa_topk, held, top_k, order="score", impl=impl)


def test_packed_and_unpacked_query_scales_give_the_same(impl):
    """int32 [B, next_n, H] here, uint8 [T, H, 4] there."""
    held = hold(CASES["mxfp4-next3-slab"])
    codes, scales = held.q
    bytes_of_scales = scales.flatten(0, 1).unsqueeze(-1).view(torch.uint8)
    unpacked = QuantizedQuery("mxfp4", codes.flatten(0, 1).view(torch.uint8), bytes_of_scales)
    rows = torch.arange(len(TOKENS)).repeat_interleave(3)
    arguments = {"valid_lens": held.context_lens.flatten(), "seq_ids": rows, "output": "slot", "impl": impl}
    want = score_topk(unpacked, held.weights, view_pages(held.kv_cache, held.block_table), top_k=48, **arguments)
    got, _ = held.call(paged_mqa_topk, 48, impl=impl)
    assert_same_bits(got.flatten(0, 1), want, "slots")


def test_the_writer_packs_as_described():
    assert in_int32(np.uint8([[1, 2, 3, 255]])).tolist() == [1 | 2 << 8 | 3 << 16 | (255 - 256) << 24]
    assert in_four_bytes(np.uint8([[9, 8]])).tolist() == [[9, 8, 127, 127]]
    assert packed(np.uint8([[1, 2, 15, 8]])).tolist() == [[0x21, 0x8F]]


# --- in place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mxfp4-next3-slab", "fp8-next2-padded", "fp8-next1-whole"])
def test_the_op_gets_the_callers_memory(case, monkeypatch):
    """Each tensor that `score_topk` is called with lies where the caller's does, and nothing has been converted."""
    held, seen = hold(CASES[case]), {}
    workspace = torch.empty(score_topk_workspace_bytes(num_heads=64, head_dim=128, top_k=48), dtype=torch.uint8)
    out = torch.empty(*held.context_lens.shape, 48, dtype=torch.int32)

    def spy(q, weights, view, **options):
        given = [q.data, q.scale, view.storage, weights, options["valid_lens"], view.block_table, options["out"]]
        seen["addresses"] = [x.data_ptr() for x in given if x is not None]
        seen["workspace"] = options["workspace"]
        return score_topk(q, weights, view, **options)

    monkeypatch.setattr(engines, "score_topk", spy)
    held.call(paged_mqa_topk, 48, out=out, workspace=workspace)
    assert seen["addresses"] == [x.data_ptr() for x in (*held.tensors(), out)]
    assert seen["workspace"] is workspace


class NewMemory(TorchDispatchMode):
    """Names of the operators whose result does not lie in the memory of an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.makers.append(str(function))
        return result


@pytest.mark.parametrize("case", ["mxfp4-next3-slab", "fp8-next2-padded"])
def test_nothing_is_made_on_the_way_to_the_op(case, monkeypatch):
    """With everything given, the shim's own operators are views and a clamp into the caller's tensor."""
    held = hold(CASES[case])
    out = torch.empty(*held.context_lens.shape, 48, dtype=torch.int32)
    lengths_out = torch.empty_like(held.context_lens)
    rows = torch.arange(len(TOKENS), dtype=torch.int32).repeat_interleave(held.context_lens.shape[1])
    monkeypatch.setattr(engines, "score_topk", lambda *args, out, **options: out)
    with NewMemory() as seen:
        held.call(paged_mqa_topk, 48, out=out, lengths_out=lengths_out, seq_ids=rows, validate=False)
    assert seen.makers == []
    with NewMemory() as seen:
        held.call(paged_mqa_topk, 48, out=out, validate=False)
    assert seen.makers == ["aten.arange.default", "aten.clamp.default"], "seq_ids and lengths"


def test_outputs_of_the_caller():
    """Part of a wider list of indices, such as [window | compressed], and its neighbours stay as they are."""
    held = hold(MXFP4)
    wide = torch.full((len(TOKENS), 2, 100), -77, dtype=torch.int32)
    lengths = torch.full((len(TOKENS), 4), -77, dtype=torch.int32)
    out, lengths_out = wide[..., 20:68], lengths[:, 1:3]
    got = held.call(paged_mqa_topk, 48, out=out, lengths_out=lengths_out)
    assert got[0] is out and got[1] is lengths_out
    for mine, want in zip(got, held.expected(48, "slot"), strict=True):
        assert_same_bits(mine, want, "result in the caller's memory")
    assert (wide[..., :20] == -77).all() and (wide[..., 68:] == -77).all(), "indices around out"
    assert (lengths[:, [0, 3]] == -77).all(), "lengths around lengths_out"
    dense = torch.full((2 * len(TOKENS), LONGEST), torch.nan)
    assert held.call(paged_mqa_logits, LONGEST, out=dense) is dense
    assert_same_bits(dense, held.call(paged_mqa_logits, LONGEST), "logits in the caller's memory")


# --- rows of the block table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_tokens_one_by_one_with_seq_ids(dtype):
    """A ragged batch flattened to one token per row, as in a prefill: the block table keeps a row per request."""
    held = hold(replace(MXFP4, next_n=3))
    rows = torch.arange(len(TOKENS), dtype=dtype).repeat_interleave(3)
    order = torch.randperm(len(rows))
    codes, scales = (part.flatten(0, 1)[order].unsqueeze(1) for part in held.q)
    weights, lens = held.weights[order], held.context_lens.flatten()[order].unsqueeze(1)
    arguments = (held.kv_cache, weights, lens, held.block_table)
    indices, lengths = paged_mqa_topk((codes, scales), *arguments, 48, seq_ids=rows[order])
    for got, want in zip((indices, lengths), held.expected(48, "slot"), strict=True):
        assert_same_bits(got, want.reshape(18, 1, *want.shape[2:])[order.numpy()], "of single tokens")
    dense = paged_mqa_logits((codes, scales), *arguments, LONGEST, seq_ids=rows[order])
    assert_same_bits(dense, held.call(paged_mqa_logits, LONGEST)[order], "logits of single tokens")


def test_a_table_row_for_every_token_needs_no_seq_ids():
    """As engines expand it for kernels that take one token per row: repeated rows, also of stride 0."""
    held = hold(replace(FP8, next_n=1))
    first = held.block_table[:1].expand(2, -1)
    lens = torch.tensor([[130], [7]], dtype=torch.int32)
    indices, _ = paged_mqa_topk(held.q[:2], held.kv_cache, held.weights[:2], lens, first, 48)
    want = paged_mqa_topk(held.q[:2], held.kv_cache, held.weights[:2], lens, first.contiguous(), 48)[0]
    assert_same_bits(indices, want, "slots")
    assert (indices[1, 0, :7] >= 0).all() and (indices[1, 0, 7:] == -1).all()


# --- the edges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("pages", [0, 1])
def test_nothing_to_see(batch, pages):
    q = (torch.zeros(batch, 2, 8, 64, dtype=torch.int8), torch.zeros(batch, 2, 8, dtype=torch.int32))
    kv_cache = torch.full((pages, 64, 1, 68), POISON, dtype=torch.uint8)
    lens = torch.zeros(batch, 2, dtype=torch.int32)
    arguments = (q, kv_cache, torch.ones(2 * batch, 8), lens, torch.zeros(batch, 3, dtype=torch.int32))
    indices, lengths = paged_mqa_topk(*arguments, 5)
    assert indices.shape == (batch, 2, 5) and (indices == -1).all()
    assert lengths.shape == (batch, 2) and (lengths == 0).all()
    dense = paged_mqa_logits(*arguments, 7)
    assert dense.shape == (2 * batch, 7) and (dense == -torch.inf).all()


def test_a_pair_with_none_is_an_fp8_query():
    held = hold(FP8)
    assert_same_bits(
        replace(held, q=(held.q, None)).call(paged_mqa_topk, 48)[0], held.call(paged_mqa_topk, 48)[0], "slots"
    )


def test_without_validation_lengths_are_clamped():
    """Lengths beyond what a table row can address, and below 0, count as the nearest possible one."""
    held = hold(FP8)
    widest = held.block_table.shape[1] * 64
    held.block_table[1] = int(held.block_table[1, 0])
    held.context_lens[1] = torch.tensor([2**31 - 1, -7])
    indices, lengths = held.call(paged_mqa_topk, 4096, validate=False)
    assert lengths[1].tolist() == [widest, 0]
    assert ((indices >= 0).sum(-1) == lengths).all()


def test_lengths_need_no_order_within_a_request():
    held = hold(replace(MXFP4, next_n=3))
    held.context_lens.copy_(held.context_lens.flip(1))
    check_selection(paged_mqa_topk, held, 48)


def test_pages_as_a_view_for_the_librarys_own_ops():
    """Scores beside the indices, as merging across ranks needs them."""
    held = hold(CASES["mxfp4-next1-whole"])
    codes, scales = held.q
    query = QuantizedQuery("mxfp4", codes.squeeze(1), scales.squeeze(1))
    view = view_pages(held.kv_cache, held.block_table)
    lens = held.context_lens.squeeze(1)
    entries, kept = score_topk(query, held.weights, view, top_k=48, valid_lens=lens, return_scores=True)
    assert view.storage.data_ptr() == held.kv_cache.data_ptr()
    for b, (row, count) in enumerate(zip(entries, lens.clamp_max(48).tolist(), strict=True)):
        want = held.scores(b, 0)[row[:count].numpy()]
        assert_same_bits(kept[b, :count], (want + 0.0).astype(np.float32), f"scores of request {b}")


# --- errors ---------------------------------------------------------------------------------------------------


def wider(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, not contiguous."""
    return torch.stack([x, x], -1)[..., 0]


PAGES = torch.zeros(4, 64, 1, 68, dtype=torch.uint8)
# name -> (arguments to replace in a good call, error, words of the message)
ERRORS = {
    "q-of-bf16": ({"q": torch.zeros(2, 2, 8, 128).bfloat16()}, TypeError, "q must be float8_e4m3fn .*got bfloat16"),
    "q-codes-alone": ({"q": torch.zeros(2, 2, 8, 64, dtype=torch.int8)}, TypeError, "q must .*got int8 alone"),
    "q-is-a-list": ({"q": [1, 2]}, TypeError, "q must be float8_e4m3fn .*got list$"),
    "q-of-three-dims": ({"q": torch.zeros(2, 8, 128).to(torch.float8_e4m3fn)}, ValueError, r"q must have shape \[B, n"),
    "q-of-96-dims": ({"q": torch.zeros(2, 2, 8, 96).to(torch.float8_e4m3fn)}, ValueError, "head dim D must be .*96"),
    "q-strided": ({"q": wider(torch.zeros(2, 2, 8, 128).to(torch.float8_e4m3fn))}, ValueError, "q must be contiguous"),
    "q-fp8-with-scale": (
        {"q0": torch.zeros(2, 2, 8, 64).to(torch.float8_e4m3fn)},
        TypeError,
        r"q\[0\] must be int8 or",
    ),
    "q-scale-unpacked": ({"q1": torch.zeros(2, 2, 8, 4, dtype=torch.uint8)}, TypeError, r"q\[1\] must be int32"),
    "q-scale-flat": ({"q1": torch.zeros(4, 8, dtype=torch.int32)}, ValueError, r"q\[1\] must have shape \[2, 2, 8\]"),
    "q-scale-strided": ({"q1": wider(torch.zeros(2, 2, 8, dtype=torch.int32))}, ValueError, r"q\[1\] must be contig"),
    "kv-flat-pages": ({"kv_cache": PAGES.flatten(1)}, ValueError, r"kv_cache must have shape .*unflatten\(1, "),
    "kv-without-head": ({"kv_cache": PAGES.squeeze(2)}, ValueError, r"kv_cache must have .*unsqueeze\(2\)"),
    "kv-of-int32": ({"kv_cache": PAGES.int()}, TypeError, "kv_cache must be uint8.*got int32"),
    "kv-is-no-tensor": ({"kv_cache": None}, TypeError, "kv_cache must be a torch.Tensor"),
    "kv-of-two-heads": ({"kv_cache": PAGES.expand(4, 64, 2, 68)}, ValueError, r"kv_cache must have shape .*64, 2, 68"),
    "kv-record": ({"kv_cache": PAGES[..., :66]}, ValueError, r"kv_cache must have records of 68 .* or 132 .*got 66"),
    "kv-rows-apart": ({"kv_cache": wider(PAGES)}, ValueError, "kv_cache must have pages of contiguous bytes"),
    "kv-block-size": (
        {"kv_cache": PAGES[:, :8].clone()},
        ValueError,
        r"kv_cache .*cannot be read .*multiple of 16 in 16",
    ),
    "kv-stride": (
        {"kv_cache": torch.zeros(4 * 4356, dtype=torch.uint8).as_strided((4, 64, 1, 68), (4356, 68, 68, 1))},
        ValueError,
        r"kv_cache \[4, 64, 1, 68\] with strides \(4356, .*multiple of 16 and at least 4352 bytes",
    ),
    "kv-overlapping": ({"kv_cache": PAGES[:1].expand(4, 64, 1, 68)}, ValueError, "kv_cache .*at least 4352.*got 0"),
    "weights-of-bf16": ({"weights": torch.ones(4, 8).bfloat16()}, TypeError, "weights must be float32, got bfloat16"),
    "weights-by-request": ({"weights": torch.ones(2, 2, 8)}, ValueError, r"weights must have shape \[4, 8\]"),
    "weights-strided": ({"weights": torch.ones(8, 4).T}, ValueError, "weights must be contiguous"),
    "lens-of-one-dim": (
        {"context_lens": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        r"context_lens must have shape \[2, 2\], a length for each query token, got \[2\]$",
    ),
    "lens-of-int64": ({"context_lens": torch.zeros(2, 2).long()}, TypeError, "context_lens must be int32"),
    "lens-strided": (
        {"context_lens": torch.zeros(2, 2, dtype=torch.int32).T},
        ValueError,
        "context_lens must be conti",
    ),
    "lens-too-long": (
        {"context_lens": torch.tensor([[0, 3], [193, 1]]).int()},
        ValueError,
        r"context_lens .*193 at \[1",
    ),
    "lens-negative": ({"context_lens": torch.tensor([[0, -3], [9, 1]]).int()}, ValueError, r"context_lens .*-3 at \[0"),
    "table-of-int64": ({"block_table": torch.zeros(2, 3).long()}, TypeError, "block_table must be int32"),
    "table-of-one-row": ({"block_table": torch.zeros(1, 3).int()}, ValueError, "block_table must have a row for"),
    "table-of-more-rows": ({"block_table": torch.zeros(3, 3).int()}, ValueError, "block_table must have a row for"),
    "table-beyond-pages": ({"block_table": torch.full((2, 3), 4).int()}, ValueError, r"block_table\[0\] must lie in 0"),
    "seq-ids-shape": ({"seq_ids": torch.zeros(2, 2).int()}, ValueError, r"seq_ids must have shape \[4\]"),
    "seq-ids-range": ({"seq_ids": torch.tensor([0, 1, 2, 0])}, ValueError, r"seq_ids must lie in 0..1, got 2 at \[2\]"),
    "seq-ids-strided": ({"seq_ids": torch.zeros(8).int()[::2]}, ValueError, "seq_ids must be contiguous"),
}
TOPK_ERRORS = {
    "out-shape": ({"out": torch.zeros(4, 5).int()}, ValueError, r"out must have shape \[2, 2, 5\]"),
    "out-dtype": ({"out": torch.zeros(2, 2, 5).long()}, TypeError, "out must be int32"),
    "out-strides": ({"out": torch.zeros(2, 3, 5).int()[:, :2]}, ValueError, r"out must view as \[4, 5\], got strides"),
    "lengths-shape": ({"lengths_out": torch.zeros(4).int()}, ValueError, r"lengths_out must have shape \[2, 2\]"),
    "output": ({"output": "token"}, ValueError, "output must be one of"),
    "order": ({"order": "none"}, ValueError, "order must be one of"),
    "workspace": ({"workspace": torch.zeros(4, dtype=torch.uint8)}, ValueError, "workspace must have at least"),
    "impl": ({"impl": "cuda"}, NotImplementedError, "impl='cuda' does not serve"),
    "top-k": ({"top_k": 0}, ValueError, "top_k must be an int in 1..4096, got 0"),
}
LOGITS_ERRORS = {
    "width": ({"max_context_len": -1}, ValueError, "max_context_len must be an int of at least 0, got -1"),
    "narrow": ({"max_context_len": 69}, ValueError, r"context_lens must lie in 0..69, got 70 at \[0, 0\]"),
    "out-shape": ({"out": torch.zeros(2, 2, 192)}, ValueError, r"out must have shape \[4, 192\]"),
}


def good_call() -> dict:
    return {
        "q0": torch.zeros(2, 2, 8, 64, dtype=torch.int8),
        "q1": torch.zeros(2, 2, 8, dtype=torch.int32),
        "kv_cache": PAGES.clone(),
        "weights": torch.ones(4, 8),
        "context_lens": torch.tensor([[70, 3], [9, 0]], dtype=torch.int32),
        "block_table": torch.tensor([[3, 1, 99], [0, -1, -1]], dtype=torch.int32),
    }


def call_with(function, changes: dict, **defaults):
    arguments = good_call() | defaults | changes
    q = (arguments.pop("q0"), arguments.pop("q1"))
    return function(**({"q": q} | arguments))


@pytest.mark.parametrize("name", [*ERRORS, *(f"topk-{name}" for name in TOPK_ERRORS)])
def test_topk_errors_name_the_tensor_and_leave_out_alone(name):
    changes, error, words = ERRORS.get(name) or TOPK_ERRORS[name.removeprefix("topk-")]
    out, lengths = torch.full((2, 2, 5), -77, dtype=torch.int32), torch.full((2, 2), -77, dtype=torch.int32)
    given = {"top_k": 5, "out": out, "lengths_out": lengths}
    if "top_k" in changes:
        given.pop("out")
    with pytest.raises(error, match=words) as caught:
        call_with(paged_mqa_topk, changes, **given)
    assert "\n" not in str(caught.value)
    assert (out == -77).all() and (lengths == -77).all()


@pytest.mark.parametrize("name", [*ERRORS, *(f"logits-{name}" for name in LOGITS_ERRORS)])
def test_logits_errors_name_the_tensor_and_leave_out_alone(name):
    changes, error, words = ERRORS.get(name) or LOGITS_ERRORS[name.removeprefix("logits-")]
    given = {"max_context_len": 192} | ({} if "max_context_len" in changes else {"out": torch.full((4, 192), 7.0)})
    with pytest.raises(error, match=words) as caught:
        call_with(paged_mqa_logits, changes, **given)
    assert "\n" not in str(caught.value)
    assert (given.get("out", torch.full((1,), 7.0)) == 7).all()


def test_the_good_call_is_good():
    indices, lengths = call_with(paged_mqa_topk, {}, top_k=5)
    assert lengths.tolist() == [[5, 3], [5, 0]] and indices[1, 0].tolist() == [0, 1, 2, 3, 4]


def test_lengths_of_one_dim_get_a_remedy_where_there_is_one():
    held = hold(replace(MXFP4, next_n=1))
    flat = replace(held, context_lens=held.context_lens.squeeze(1))
    with pytest.raises(ValueError, match=r"use context_lens.unsqueeze\(1\)"):
        flat.call(paged_mqa_topk, 5)


def test_view_pages_checks_what_it_is_given():
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="view_pages: kv_cache must have records of 36 .* or 68 .*got 132"):
        view_pages(torch.zeros(1, 64, 1, 132, dtype=torch.uint8), table, head_dim=64)
    with pytest.raises(TypeError, match="view_pages: block_table must be int32"):
        view_pages(PAGES, table.long())
