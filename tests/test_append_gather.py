"""Around scoring: writing entries, reading them back, visibility, merging shards, and attention."""

import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import (
    APPEND_CASES,
    BF16,
    POISON,
    VISIBLE,
    Cache,
    Problem,
    assert_same_bits,
    check_append,
    check_visible,
    make_cache,
    make_problem,
    problem_with_scores,
)

from lightning_indexer import (
    CacheSchema,
    IndexerView,
    KVView,
    append_entries,
    compute_valid_lens,
    gather_kv,
    merge_topk,
    score_topk,
    sparse_attention,
    visible_entries,
)

# --- append_entries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", APPEND_CASES, ids=lambda c: f"{c[0]}-d{c[1]}-block{c[2]}-pad{c[3]}")
def test_append_writes_the_intended_bytes_and_no_other(case, impl):
    check_append(append_entries, case, impl=impl)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_append_toward_zero(format, impl):
    check_append(append_entries, (format, 128, 64, 0), impl=impl, rounding="toward_zero")


def index_view(format: str = "mxfp4", num_blocks: int = 2) -> IndexerView:
    schema = CacheSchema(format, 16)
    storage = torch.full((num_blocks, schema.stride), POISON, dtype=torch.uint8)
    return IndexerView(storage, schema, torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_append_takes_other_dtypes_strides_and_int32_slots(dtype, impl):
    x = torch.randn(128, 5).to(dtype).t()
    slots = torch.tensor([3, -1, 31, 0, 16])
    got, want = index_view(), index_view()
    append_entries(x, got, slots.int(), impl=impl)
    append_entries(x.float().contiguous(), want, slots, impl=impl)
    assert_same_bits(got.storage, want.storage, f"bytes written from {dtype}")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_append_in_any_grad_mode(mode, impl):
    x, view, want = torch.randn(3, 128, requires_grad=True), index_view(), index_view()
    append_entries(x.detach(), want, torch.arange(3), impl=impl)
    with mode():
        append_entries(x, view, torch.arange(3), impl=impl)
    assert_same_bits(view.storage, want.storage, "bytes")


def test_append_nothing(impl):
    view = index_view()
    append_entries(torch.zeros(0, 128), view, torch.zeros(0, dtype=torch.int64), impl=impl)
    append_entries(torch.zeros(2, 128), view, torch.tensor([-1, -1]), impl=impl)
    append_entries(torch.zeros(2, 128), index_view(num_blocks=0), torch.tensor([-1, -1]), impl=impl)
    assert (view.storage == POISON).all()


def test_append_without_validation_skips_slots_outside(impl):
    got, want = index_view(), index_view()
    x = torch.randn(4, 128)
    append_entries(x, got, torch.tensor([32, 5, -9, 2**40]), validate=False, impl=impl)
    append_entries(x[1:2], want, torch.tensor([5]), impl=impl)
    assert_same_bits(got.storage, want.storage, "bytes")


X, SLOTS = torch.zeros(2, 128), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("entries", "slots", "options", "error", "words"),
    [
        (X, torch.tensor([0, 32]), {}, ValueError, ["slots", "-1..31", "32 at [1]"]),
        (X, torch.tensor([-2, 0]), {}, ValueError, ["slots", "-1..31", "-2 at [0]"]),
        (X, torch.tensor([0.0, 1.0]), {}, TypeError, ["slots", "int64 or int32", "float32"]),
        (X, torch.tensor([0]), {}, ValueError, ["slots", "[2]", "[1]"]),
        (X, SLOTS.to("meta"), {}, ValueError, ["slots", "on cpu", "meta"]),
        (X[:, :64], SLOTS, {}, ValueError, ["entries", "[N, 128]", "[2, 64]"]),
        (X.double(), SLOTS, {}, TypeError, ["entries", "bfloat16 or float32 or float16", "float64"]),
        (X.to("meta"), SLOTS, {}, ValueError, ["entries", "on cpu", "meta"]),
        (X, SLOTS, {"rounding": "up"}, ValueError, ["rounding", "nearest_even", "'up'"]),
        (X, SLOTS, {"impl": "cuda12"}, ValueError, ["impl", "reference", "'cuda12'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_append_errors_come_before_any_write(entries, slots, options, error, words):
    view = index_view()
    with pytest.raises(error) as caught:
        append_entries(entries, view, slots, **options)
    assert all(word in str(caught.value) for word in ["append_entries", *words]), str(caught.value)
    assert (view.storage == POISON).all(), "bytes were written before the error"


def test_append_needs_a_view():
    with pytest.raises(TypeError, match="append_entries: view must be an IndexerView or a KVView, got Tensor"):
        append_entries(X, torch.zeros(2, 1088, dtype=torch.uint8), SLOTS)


# --- gather_kv ------------------------------------------------------------------------------------------------

KV_CASES = [("fp8_ds_mla", 64), ("fp8_ds_mla", 2), ("fp8_ds_mla", 53), ("bf16", 64), ("bf16", 7)]


def kv_cache(format: str = "fp8_ds_mla", entries_per_block: int = 64, **options: object) -> Cache:
    rng = np.random.default_rng(3)
    entries = [(rng.normal(size=(n, 512)) * 2.0 ** rng.integers(-9, 9, (n, 1))).astype(np.float32) for n in (130, 5)]
    return make_cache(entries, format, entries_per_block=entries_per_block, kind=KVView, padding=16, **options)


@pytest.mark.parametrize(("format", "entries_per_block"), KV_CASES)
def test_gather_is_exact(format, entries_per_block, impl):
    """Permuted blocks, POISON in every unused slot and behind every table, -1 rows zero, rows shared by two tables."""
    cache = kv_cache(format, entries_per_block, rows=[0, 1, 0])
    seq_ids = torch.tensor([2, 0, 1, 0], dtype=torch.int32)
    indices = torch.randint(0, 130, (4, 40), dtype=torch.int32)
    indices[2] %= 5
    indices[:, ::5] = -1
    indices[0, 1], indices[0, 2] = 129, 0
    out = torch.full((4, 50, 512), torch.nan, dtype=torch.bfloat16)
    got = gather_kv(cache.view, indices, seq_ids=seq_ids, out=out[:, 5:45], impl=impl)
    assert got.data_ptr() == out[:, 5:45].data_ptr()
    assert out[:, :5].isnan().all() and out[:, 45:].isnan().all(), "written outside `out`"
    for t in range(4):
        want = cache.values[seq_ids[t]][indices[t].clamp_min(0)] * (indices[t].numpy() >= 0)[:, None]
        assert (want.astype(BF16) == want).all(), "the stored values fit bf16"
        assert_same_bits(got[t].float() + 0.0, (want + 0.0).astype(np.float32), f"query {t}")
    assert_same_bits(gather_kv(cache.view, indices.long(), seq_ids=seq_ids, impl=impl).view(torch.int16),
                     got.contiguous().view(torch.int16), "int64 indices")  # fmt: skip


def test_gather_copies_the_rope_half(impl):
    """Every bf16 pattern, NaN payloads included, comes back bit for bit."""
    patterns = np.arange(2**16, dtype=np.uint16).reshape(-1, 64)

    def plant(seq, data, scale):
        data[:, 448:] = patterns.view(np.uint8)

    cache = make_cache([np.zeros((1024, 512), np.float32)], "fp8_ds_mla", kind=KVView, edit=plant)
    finite = torch.arange(1024)[(patterns & 0x7F80 != 0x7F80).all(1)]
    got = gather_kv(cache.view, torch.arange(1024).unsqueeze(0), impl="cpu")[0, :, 448:]
    assert_same_bits(got[finite].view(torch.int16), patterns[finite].view(np.int16), "RoPE half")
    nan = (patterns & 0x7FFF) > 0x7F80
    assert_same_bits(got.isnan(), nan, "where the RoPE half is NaN")


def test_gather_defaults_and_empty_inputs(impl):
    cache = kv_cache()
    got = gather_kv(cache.view, torch.tensor([[7], [3]]), impl=impl)
    assert_same_bits(got.float(), np.stack([cache.values[0][7:8], cache.values[1][3:4]]).astype(np.float32), "rows")
    assert gather_kv(cache.view, torch.zeros(0, 4, dtype=torch.int32), impl=impl).shape == (0, 4, 512)
    assert gather_kv(cache.view, torch.zeros(2, 0, dtype=torch.int32), impl=impl).shape == (2, 0, 512)


@pytest.mark.parametrize("validate", [None, False])
@pytest.mark.parametrize(("num_blocks", "columns"), [(0, 0), (0, 1), (1, 0)])
def test_gather_of_nothing_from_an_empty_cache(num_blocks, columns, validate, impl):
    storage = torch.zeros(num_blocks, 37440, dtype=torch.uint8)
    view = KVView(storage, CacheSchema("fp8_ds_mla", 64), torch.zeros(2, columns, dtype=torch.int32))
    got = gather_kv(view, torch.full((2, 3), -1, dtype=torch.int32), validate=validate, impl=impl)
    assert got.shape == (2, 3, 512) and (got == 0).all()


I32 = torch.tensor([[0, 1]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("indices", "options", "error", "words"),
    [
        (I32 + 5 * 64, {}, ValueError, ["indices", "..319", "321 at [0, 1]"]),
        (I32 + 3 * 64, {}, ValueError, ["block_table", "0..6", "at [0, 0]"]),
        (I32, {"seq_ids": torch.tensor([2])}, ValueError, ["seq_ids", "0..1", "2 at [0]"]),
        (I32, {"seq_ids": torch.tensor([0, 1])}, ValueError, ["seq_ids", "[1]", "[2]"]),
        (I32.float(), {}, TypeError, ["indices", "int32 or int64", "float32"]),
        (I32[0], {}, ValueError, ["indices", "[T, k]", "[2]"]),
        (I32.repeat(3, 1), {}, ValueError, ["block_table", "2 rows", "3 queries", "pass seq_ids"]),
        (I32, {"out": torch.zeros(1, 2, 512)}, TypeError, ["out", "bfloat16", "float32"]),
        (I32, {"out": torch.zeros(1, 3, 512).bfloat16()}, ValueError, ["out", "[1, 2, 512]", "[1, 3, 512]"]),
        (I32, {"impl": "gpu"}, ValueError, ["impl", "'gpu'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_gather_errors_leave_out_alone(indices, options, error, words):
    out = options.setdefault("out", torch.full((*indices.shape, 512), 7.0, dtype=torch.bfloat16))
    before = out.clone()
    with pytest.raises(error) as caught:
        gather_kv(kv_cache().view, indices, **options)
    assert all(word in str(caught.value) for word in ["gather_kv", *words]), str(caught.value)
    assert torch.equal(out, before)


def test_gather_without_validation_clamps(impl):
    cache = kv_cache()
    indices = torch.tensor([[3, 10_000, 200, -7]], dtype=torch.int32)  # 200: behind the table's needed part
    got = gather_kv(cache.view, indices, seq_ids=torch.tensor([-5]), validate=False, impl=impl)
    assert_same_bits(got[0, 0].float(), cache.values[0][3].astype(np.float32), "the one good row")
    assert (got[0, 3] == 0).all()


def test_gather_needs_a_kv_view():
    with pytest.raises(TypeError, match="gather_kv: view must be a KVView, got IndexerView"):
        gather_kv(index_view(), I32)


# --- valid lens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", sorted({ratio for ratio, _ in VISIBLE}))
def test_visible_entries(ratio):
    check_visible(visible_entries, ratio)
    assert visible_entries(torch.zeros(2, 3, dtype=torch.int32), ratio).shape == (2, 3)


def test_compute_valid_lens():
    got = compute_valid_lens(torch.tensor([0, 1, 3, 2**16]), 64)
    assert got.dtype == torch.int32 and got.tolist() == [0, 64, 192, 2**22]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: visible_entries(torch.tensor([1.0]), 4), TypeError, ["positions", "int32 or int64", "float32"]),
        (lambda: visible_entries([3], 4), TypeError, ["positions", "torch.Tensor", "list"]),
        (lambda: visible_entries(torch.tensor([3]), 0), ValueError, ["compress_ratio", "at least 1", "0"]),
        (lambda: compute_valid_lens(torch.tensor([-1]), 64), ValueError, ["block_lens", "-1 at [0]"]),
        (lambda: compute_valid_lens(torch.tensor([2**25]), 64), ValueError, ["block_lens", "33554432 at [0]"]),
        (lambda: compute_valid_lens(torch.tensor([1]), 0), ValueError, ["entries_per_block", "at least 1", "0"]),
    ],
)
def test_valid_lens_errors(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- merge_topk -----------------------------------------------------------------------------------------------


def shard(problem: Problem, rank: int, ranks: int, layout: str, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One rank's candidates: its blocks of the same storage, selected there, with global entry indices."""
    view, per_block = problem.cache.view, problem.cache.view.schema.entries_per_block
    owned = torch.arange(view.block_table.shape[1])
    owned = owned[rank::ranks] if layout == "interleaved" else owned.tensor_split(ranks)[rank]
    local = IndexerView(view.storage, view.schema, view.block_table[:, owned].contiguous())
    lens = (problem.valid_lens.unsqueeze(1) - owned * per_block).clamp(0, per_block).sum(1).int()
    options = {"top_k": top_k, "valid_lens": lens, "seq_ids": problem.seq_ids, "return_scores": True}
    indices, scores = score_topk(problem.q, problem.weights, local, **options)
    found = indices.clamp_min(0)
    return torch.where(indices < 0, -1, owned[found // per_block] * per_block + found % per_block).int(), scores


MERGE_CASES = {
    "random": lambda: make_problem([300], valid_lens=[300, 299, 17, 0], seq_ids=[0] * 4, entries_per_block=16),
    "fp8": lambda: make_problem([300], format="fp8", valid_lens=[300, 64], seq_ids=[0] * 2, entries_per_block=16),
    "all-equal": lambda: problem_with_scores([np.ones(300)], entries_per_block=16),
    "plateaus": lambda: problem_with_scores([np.arange(300) % 3 - 1.0], entries_per_block=16),
    "nan-and-inf": lambda: problem_with_scores([[np.nan, np.inf, 1, -2, np.nan, 0] * 40], entries_per_block=16),
}


@pytest.mark.parametrize("top_k", [1, 33, 300, 500])
@pytest.mark.parametrize(("layout", "ranks"), [("contiguous", 3), ("interleaved", 4), ("contiguous", 1)])
@pytest.mark.parametrize("case", MERGE_CASES)
def test_merged_shards_equal_the_whole(case, layout, ranks, top_k):
    problem = MERGE_CASES[case]()
    parts = [shard(problem, rank, ranks, layout, top_k) for rank in range(ranks)]
    got = merge_topk(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)), top_k=top_k)
    want = problem.call(score_topk, top_k=top_k, order="score", return_scores=True)
    for name, g, w in zip(("indices", "scores"), got, want, strict=True):
        assert_same_bits(g, w, f"{name} merged from {ranks} {layout} shards")


def test_merge_of_nothing():
    indices, scores = merge_topk(torch.zeros(2, 0, dtype=torch.int32), torch.zeros(2, 0), top_k=3)
    assert indices.tolist() == [[-1] * 3] * 2 and (scores == -torch.inf).all()
    indices, scores = merge_topk(torch.tensor([[-1, 4, -1]], dtype=torch.int32), torch.ones(1, 3), top_k=2)
    assert indices.tolist() == [[4, -1]] and scores.tolist() == [[1.0, -torch.inf]]
    assert merge_topk(torch.zeros(0, 5, dtype=torch.int32), torch.zeros(0, 5), top_k=3)[0].shape == (0, 3)


def test_merge_ties_go_to_the_smaller_index():
    """Whatever the sign of zero or of NaN, and in whatever order the candidates come."""
    nan = torch.tensor([0x7FC00000, -1], dtype=torch.int32).view(torch.float32)  # the second one is negative
    scores = torch.cat([torch.tensor([0.0, -0.0, 0.0, -torch.inf]), nan]).unsqueeze(0)
    indices = torch.tensor([[9, 4, 6, 5, 3, 2]], dtype=torch.int32)
    got, kept = merge_topk(indices, scores, top_k=7)
    assert got.tolist() == [[4, 6, 9, 5, 2, 3, -1]], got
    assert_same_bits(kept, torch.tensor([[0.0] * 3 + [-torch.inf] * 4]), "scores")


@pytest.mark.parametrize(
    ("indices", "scores", "top_k", "error", "words"),
    [
        (I32.long(), torch.zeros(1, 2), 1, TypeError, ["indices", "int32", "int64"]),
        (I32, torch.zeros(1, 2).double(), 1, TypeError, ["scores", "float32", "float64"]),
        (I32, torch.zeros(1, 3), 1, ValueError, ["scores", "[1, 2]", "[1, 3]"]),
        (I32, torch.zeros(1, 2), 0, ValueError, ["top_k", "at least 1", "0"]),
    ],
)
def test_merge_errors(indices, scores, top_k, error, words):
    with pytest.raises(error) as caught:
        merge_topk(indices, scores, top_k=top_k)
    assert all(word in str(caught.value) for word in ["merge_topk", *words]), str(caught.value)


def _merge_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4, timeout=limit)
    pair = dist.new_group([1, 3], timeout=limit)
    results = {}
    for case, make in MERGE_CASES.items():
        problem = make()
        results[f"{case}-4"] = merge_topk(*shard(problem, rank, 4, "interleaved", 33), top_k=33, group=dist.group.WORLD)
        if rank in (1, 3):
            results[f"{case}-2"] = merge_topk(*shard(problem, rank // 2, 2, "contiguous", 33), top_k=33, group=pair)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_merge_over_2_and_4_processes(tmp_path: Path):
    context = mp.spawn(_merge_on_rank, args=(str(tmp_path),), nprocs=4, join=False)
    try:
        for _ in range(4):
            context.join(timeout=30)
        assert not any(process.is_alive() for process in context.processes), "ranks did not finish in two minutes"
    finally:
        for process in context.processes:
            process.kill()
    for rank in range(4):
        for name, got in torch.load(tmp_path / f"{rank}.pt").items():
            problem = MERGE_CASES[name[:-2]]()
            want = problem.call(score_topk, top_k=33, order="score", return_scores=True)
            for g, w in zip(got, want, strict=True):
                assert_same_bits(g, w, f"{name} processes, rank {rank}")


# --- sparse_attention -----------------------------------------------------------------------------------------


def attention_float64(q, kv, valid, sink, scale) -> tuple[np.ndarray, np.ndarray]:
    """The formula of the docstring, query by query and head by head."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for t, h in np.ndindex(*q.shape[:2]):
        rows = kv[t][valid[t]]
        if len(rows):
            logits = scale * rows @ q[t, h]
            top = logits.max()
            mass = np.exp(logits - top)
            lse[t, h] = top + np.log(mass.sum())
            out[t, h] = mass @ rows / (mass.sum() + np.exp(sink[h] - top))
    return out, lse


@pytest.mark.parametrize(("selected", "window"), [(9, 4), (0, 4), (9, 0), (0, 0)])
@pytest.mark.parametrize("sink", [None, 0.7, torch.inf, -torch.inf])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_attention_against_float64(selected, window, sink, dtype, tolerance, impl):
    q = torch.randn(4, 3, 32).to(dtype)
    kv = torch.randn(4, selected + window, 32).to(dtype)
    valid = torch.rand(4, selected + window) < 0.7
    valid[1] = False
    hidden = torch.where(valid.unsqueeze(-1), kv, torch.nan)
    sinks = None if sink is None else torch.tensor([sink, 0.0, sink])
    parts = hidden.split([selected, window], dim=1)
    out, lse = sparse_attention(q, *parts, valid=valid, sink=sinks, softmax_scale=0.3, impl=impl)
    with np.errstate(over="ignore"):
        strength = [-np.inf] * 3 if sinks is None else sinks.double().numpy()
        want_out, want_lse = attention_float64(q.double().numpy(), kv.double().numpy(), valid.numpy(), strength, 0.3)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), torch.from_numpy(want_out), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), torch.from_numpy(want_lse), atol=2e-6, rtol=2e-6)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    if sink == torch.inf:
        assert (out[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("where", ["q", "kv"])
def test_attention_keeps_nan_visible(where, impl):
    q, kv = torch.ones(1, 2, 8), torch.ones(1, 3, 8)
    {"q": q, "kv": kv}[where][0, 0, 0] = torch.nan
    valid = torch.ones(1, 3, dtype=torch.bool)
    out, lse = sparse_attention(q, kv, kv[:, :0], valid=valid, sink=None, softmax_scale=1.0, impl=impl)
    assert out[0, 0].isnan().any() and lse[0, 0].isnan(), f"NaN in {where} became {out[0, 0].tolist()}"


def test_attention_without_queries(impl):
    q, kv = torch.zeros(0, 2, 8), torch.zeros(0, 3, 8)
    valid = torch.zeros(0, 5, dtype=torch.bool)
    out, lse = sparse_attention(q, kv, kv[:, :2], valid=valid, sink=torch.zeros(2), softmax_scale=1.0, impl=impl)
    assert out.shape == (0, 2, 8) and lse.shape == (0, 2)


Q, KV, VALID = torch.zeros(1, 2, 8), torch.zeros(1, 3, 8), torch.ones(1, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((Q.double(), KV, KV), {}, TypeError, ["q", "float32", "float64"]),
        ((Q, KV[..., :4], KV), {}, ValueError, ["kv_selected", "[1, K, 8]", "[1, 3, 4]"]),
        ((Q, KV, KV.repeat(2, 1, 1)), {}, ValueError, ["kv_window", "[1, W, 8]", "[2, 3, 8]"]),
        ((Q, KV, KV), {"valid": VALID[:, 1:]}, ValueError, ["valid", "[1, 6]", "[1, 5]"]),
        ((Q, KV, KV), {"valid": VALID.int()}, TypeError, ["valid", "bool", "int32"]),
        ((Q, KV, KV), {"sink": torch.zeros(3)}, ValueError, ["sink", "[2]", "[3]"]),
        ((Q, KV, KV.to("meta")), {}, ValueError, ["kv_window", "on cpu", "meta"]),
    ],
)
def test_attention_errors(arguments, options, error, words):
    with pytest.raises(error) as caught:
        sparse_attention(*arguments, **{"valid": VALID, "sink": None, "softmax_scale": 1.0, **options})
    assert all(word in str(caught.value) for word in ["sparse_attention", *words]), str(caught.value)
