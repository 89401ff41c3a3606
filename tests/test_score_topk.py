"""What `score_topk` promises, for each implementation on a CPU: scores, selection, repeatability, memory, errors.

Hostile memory is the default: caches from `cases.make_cache` hold POISON in every byte that means nothing, blocks in
random order, and table entries of INT_MAX and -1 behind the needed ones.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    ADVERSARIAL_KINDS,
    POISON,
    TOPK_CASES,
    Problem,
    adversarial_row,
    assert_same_bits,
    check_scores,
    check_topk,
    encode_rows,
    expected_topk,
    make_cache,
    make_problem,
    problem_with_scores,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_indexer import (
    CacheSchema,
    IndexerView,
    KVView,
    QuantizedQuery,
    append_entries,
    index_scores,
    quantize_query,
    reference,
    score_topk,
    score_topk_workspace_bytes,
)
from lightning_indexer.cpu import operands
from lightning_indexer.cpu import score_topk as cpu

INDEX_FORMATS = ["mxfp4", "nvfp4", "fp8", "bf16", "fp32"]
TILE, CHUNK, PASS = cpu.ENTRIES_PER_TILE, cpu.ENTRIES_PER_CHUNK, cpu.QUERIES_PER_PASS  # boundaries to stand on


def dense(problem: Problem, **options: object) -> torch.Tensor:
    return problem.call(index_scores, **options)


def selected(problem: Problem, top_k: int = 50, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return problem.call(score_topk, top_k=top_k, return_scores=True, **options)


def assert_same_results(got: Problem, want: Problem, what: str, **options: object) -> None:
    """Dense scores, and selection with its scores, bit for bit."""
    assert_same_bits(dense(got, **options), dense(want, **options), f"scores, {what}")
    for name, g, w in zip(("indices", "kept scores"), selected(got, **options), selected(want, **options), strict=True):
        assert_same_bits(g, w, f"{name}, {what}")


# --- promise 1: scores ----------------------------------------------------------------------------------------


def scale_is_any_float(seq: int, data: np.ndarray, scale: np.ndarray) -> None:
    """fp8 writers that store amax / 448, not a power of two."""
    scale.view(np.float32)[:] *= np.random.default_rng(seq).uniform(1, 2, (len(scale), 1))


@pytest.mark.parametrize("query_format", INDEX_FORMATS)
@pytest.mark.parametrize("format", INDEX_FORMATS)
def test_scores_against_float64(format, query_format, impl):
    for num_heads, head_dim, seed in ((8, 64, 0), (64, 128, 1), (24, 128, 2)):
        lens = {"valid_lens": [200, 65, 1, 0, 64], "seq_ids": [1, 0, 0, 1, 1]}
        shape = {"num_heads": num_heads, "head_dim": head_dim, "seed": seed}
        scale = {"nvfp4": {"global_scale": 0.037}, "fp8": {"edit": scale_is_any_float}}.get(format, {})
        problem = make_problem([90, 200], format=format, query_format=query_format, **shape, **lens, **scale)
        got = dense(problem, impl=impl)
        assert got.shape == (5, 200)
        check_scores(got, problem, 1e-5)


def test_fp8_query_without_a_scale_is_taken_as_it_is(impl):
    problem = make_problem([70], query_format="fp8")
    folded = replace(problem, q=replace(problem.q, scale=None), weights=problem.weights * problem.q.scale)
    torch.testing.assert_close(dense(folded, impl=impl), dense(problem, impl=impl), rtol=1e-5, atol=1e-5)


def test_query_layouts_of_engines_give_the_same_bits(impl):
    problem = make_problem([100], valid_lens=[100, 50], seq_ids=[0, 0], head_dim=128)
    q = problem.q
    packed = QuantizedQuery("mxfp4", q.data.view(torch.int8), q.scale.view(torch.int32).squeeze(-1))
    e8m0 = QuantizedQuery("mxfp4", q.data, q.scale.view(torch.float8_e8m0fnu))
    assert_same_results(replace(problem, q=packed), problem, "int8 codes and int32 scales", impl=impl)
    assert_same_results(replace(problem, q=e8m0), problem, "float8_e8m0fnu scales", impl=impl)
    nvfp4 = make_problem([100], format="nvfp4")
    as_float = replace(nvfp4.q, scale=nvfp4.q.scale.view(torch.float8_e4m3fn))
    assert_same_results(replace(nvfp4, q=as_float), nvfp4, "nvfp4 scales as float8", impl=impl)
    halved = dense(replace(nvfp4, q=replace(nvfp4.q, global_scale=0.5)), impl=impl)
    assert_same_bits(halved, dense(nvfp4, impl=impl) / 2, "query global_scale")
    plain = make_problem([100], query_format="fp32")
    half = replace(plain, q=plain.q.half())
    assert_same_results(half, replace(plain, q=half.q.float()), "fp16 queries", impl=impl)


@pytest.mark.parametrize("query_format", ["fp32", "bf16", "mxfp4", "fp8"])
def test_strides_do_not_change_a_bit(query_format, impl):
    problem = make_problem([100], query_format=query_format, valid_lens=[100, 50], seq_ids=[0, 0])

    def strided(x: torch.Tensor) -> torch.Tensor:
        return x.mT.contiguous().mT

    q = problem.q
    q = replace(q, data=strided(q.data)) if isinstance(q, QuantizedQuery) else strided(q)
    wide = torch.stack([problem.valid_lens, torch.full((2,), 99, dtype=torch.int32)], 1)
    other = replace(problem, q=q, weights=strided(problem.weights), valid_lens=wide[:, 0])
    assert_same_results(other, problem, "transposed storage", impl=impl)


@pytest.mark.parametrize("zero_group_byte", [1, 200, 254])
def test_a_zero_group_may_have_any_scale(zero_group_byte, impl):
    """Only foreign writers give zeros a large exponent; the other groups must not drown in it."""

    def plant(seq, data, scale):
        data[:, :16], scale[:, 0] = 0, zero_group_byte

    keys = np.random.default_rng(0).normal(size=(40, 128)).astype(np.float32) * 2.0**-30
    q = make_problem([40], format="bf16", head_dim=128)
    problem = replace(q, cache=make_cache([keys], "mxfp4", edit=plant))
    np.testing.assert_allclose(dense(problem, impl=impl)[0], problem.exact_row(0), rtol=1e-4)


# --- promises 2 to 5: selection -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TOPK_CASES)
def test_exact_cases(case, impl):
    make, top_k, order, output = TOPK_CASES[case]
    check_topk(score_topk, make(), top_k, order=order, output=output, impl=impl)


@st.composite
def problems(draw) -> tuple[Problem, dict]:
    lens = draw(st.lists(st.integers(0, 300), min_size=1, max_size=3))
    rows = draw(st.lists(st.integers(0, len(lens) - 1), min_size=1, max_size=5))
    seq_ids = draw(st.lists(st.integers(0, len(rows) - 1), max_size=9))
    format = draw(st.sampled_from(INDEX_FORMATS))
    problem = make_problem(
        lens,
        format=format,
        query_format=draw(st.sampled_from(INDEX_FORMATS)),
        num_heads=8 * draw(st.sampled_from([1, 2, 3, 8, 16])),
        head_dim=draw(st.sampled_from([64, 128])),
        entries_per_block=16 * draw(st.integers(1, 16)),
        rows=rows,
        seq_ids=seq_ids,
        valid_lens=[draw(st.integers(0, lens[rows[s]])) for s in seq_ids],
        padding=16 * draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**16)),
    )
    options = {
        "top_k": draw(st.one_of(st.integers(1, 320), st.sampled_from([1, 2048, 4096]))),
        "order": draw(st.sampled_from(["index", "score"])),
        "output": draw(st.sampled_from(["entry", "slot"])),
        "impl": draw(st.sampled_from(["cpu", "cpu", "reference"])),
    }
    return problem, options


@settings(max_examples=80)
@given(problems())
def test_selection_is_the_stable_sort_of_index_scores(drawn):
    problem, options = drawn
    scores = dense(problem, impl=options["impl"])
    check_topk(score_topk, problem, dense=scores, **options)
    top_k, order = options["top_k"], options["order"]
    without = problem.call(score_topk, **options)
    assert torch.equal(without, selected(problem, **options)[0]), "return_scores changes the selection"
    plain = problem.call(score_topk, top_k=top_k, order=order, impl=options["impl"])
    for t, length in enumerate(problem.valid_lens.tolist()):  # torch.topk in float64, with a band for rounding
        exact = torch.from_numpy(problem.exact_row(t))
        kept = plain[t][plain[t] >= 0].long()
        best = exact.topk(min(top_k, length)).values
        band = 1e-4 * float(exact.abs().max()) if length else 0.0
        assert len(kept) == len(best), f"query {t} kept {len(kept)} of {length}"
        assert torch.allclose(exact[kept].sort(descending=True).values, best, atol=band, rtol=0), f"query {t}"


@pytest.mark.parametrize("kind", ADVERSARIAL_KINDS)
def test_adversarial_rows(kind, impl):
    problem = problem_with_scores([adversarial_row(kind, n) for n in (5000, 64, 1)])
    scores = dense(problem, impl=impl)
    np.testing.assert_allclose(scores[0], adversarial_row(kind, 5000), rtol=1e-6, atol=1e-44)
    assert not (torch.signbit(scores) & (scores == 0)).any(), "-0 among the scores"
    for top_k, order in ((1, "index"), (63, "score"), (64, "index"), (65, "score"), (2500, "index"), (4096, "score")):
        check_topk(score_topk, problem, top_k, order=order, dense=scores, impl=impl)


def test_underflow_is_plus_zero(impl):
    """A negative score too small for fp32 is +0 and ties with every other zero."""

    def shrink(seq, data, scale):
        scale.view(np.float32)[::2] = 1e-38

    problem = make_problem([70], format="fp8", query_format="fp32", edit=shrink)
    problem = replace(problem, weights=torch.full((1, 8), -1e-30))
    scores = dense(problem, impl=impl)
    assert_same_bits(scores[:, ::2], torch.zeros(1, 35), "scores of the shrunken entries")
    check_topk(score_topk, problem, 40, order="score", dense=scores, impl=impl)


NAN_CODES = {"mxfp4": ("scale", 0xFF), "nvfp4": ("scale", 0x7F), "fp8": ("data", 0xFF), "bf16": ("data", 0xFF)}


@pytest.mark.parametrize("format", NAN_CODES)
def test_nan_codes_in_the_cache(format, impl):
    """Entries whose bytes stand for NaN score NaN, and are chosen after all numbers, by index."""
    part, code = NAN_CODES[format]
    bad = [3, 20, 21, 60]

    def plant(seq, data, scale):
        {"data": data, "scale": scale}[part][bad, :2] = code

    problem = make_problem([70], format=format, edit=plant, num_heads=16)
    scores = dense(problem, impl=impl)
    assert scores[0].isnan().nonzero().flatten().tolist() == bad
    for top_k in (65, 66, 68, 70, 71):
        check_topk(score_topk, problem, top_k, order="score", dense=scores, impl=impl)
    kept = problem.call(score_topk, top_k=68, order="score", impl=impl)[0]
    assert kept[66:].tolist() == bad[:2], kept


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["weights", "q", "scale"])
def test_non_finite_queries(where, value, impl):
    """They reach the scores as in float64, stay in their own row, and give valid indices."""
    query_format = {"weights": "mxfp4", "q": "bf16", "scale": "fp8"}[where]
    problem = make_problem([70], query_format=query_format, valid_lens=[70, 70, 9], seq_ids=[0, 0, 0], seed=4)
    clean = dense(problem, impl=impl)
    target = {"weights": problem.weights, "q": problem.q, "scale": getattr(problem.q, "scale", None)}[where]
    target[1, 3 if where != "q" else (3, 5)] = value if where != "scale" else torch.nan
    scores = dense(problem, impl=impl)
    assert_same_bits(scores[[0, 2]], clean[[0, 2]], "scores of the other queries")
    assert not scores[1].isfinite().all()
    check_topk(score_topk, problem, 66, dense=scores, impl=impl)


LENGTHS = [0, 1, 63, 64, 65, 99, 100, 101, TILE - 1, TILE, TILE + 1, CHUNK - 1, CHUNK, CHUNK + 1]


def test_lengths_around_every_boundary(impl):
    """One row per length, up and down again, k around a length; blocks of 48 do not divide tiles."""
    lens = [*LENGTHS, *LENGTHS[::-1], 70]
    seq_ids = [0] * 2 * len(LENGTHS) + [1]
    problem = make_problem([CHUNK + 1, 70], valid_lens=lens, seq_ids=seq_ids, entries_per_block=48, exact=True)
    for top_k in (1, 64, 100, TILE):
        check_topk(score_topk, problem, top_k, impl=impl)


def test_more_queries_than_one_pass(impl):
    num = 2 * PASS + 3
    problem = make_problem([40, 30], valid_lens=[t % 30 for t in range(num)], seq_ids=[t // 200 for t in range(num)])
    check_topk(score_topk, problem, 12, dense=dense(problem, impl=impl), impl=impl)


def test_no_queries(impl):
    problem = make_problem([40], valid_lens=[], seq_ids=[])
    assert dense(problem, impl=impl).shape == (0, 0)
    assert selected(problem, 7, impl=impl)[0].shape == (0, 7)


@pytest.mark.parametrize("output", ["entry", "slot"])
@pytest.mark.parametrize(("num_blocks", "columns"), [(0, 0), (0, 2), (1, 0)])
def test_nothing_to_see_in_an_empty_cache(num_blocks, columns, output, impl):
    problem = make_problem([10, 10], valid_lens=[0, 0])
    view = problem.cache.view
    empty = IndexerView(view.storage[:num_blocks], view.schema, view.block_table[:, :columns])
    problem = replace(problem, cache=replace(problem.cache, view=empty))
    for validate in (None, False):
        assert (selected(problem, 3, output=output, impl=impl, validate=validate)[0] == -1).all()


# --- promise 6: repeatable and batch-invariant ----------------------------------------------------------------


def test_twenty_runs_are_bitwise_equal(impl):
    problem = make_problem([2500], valid_lens=[2500, 2100, 7], seq_ids=[0] * 3, num_heads=16)
    first = (dense(problem, impl=impl), *selected(problem, impl=impl))
    for run in range(20):
        again = (dense(problem, impl=impl), *selected(problem, impl=impl))
        for got, want in zip(again, first, strict=True):
            assert_same_bits(got, want, f"run {run}")


@pytest.mark.parametrize("query_format", ["mxfp4", "bf16", "fp8"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8", "bf16"])
def test_a_row_does_not_depend_on_its_batch(format, query_format):
    lens = {"valid_lens": [300, 290, 17, 2100, 200, 2048], "seq_ids": [0, 0, 0, 1, 0, 1]}
    problem = make_problem([300, 2100], format=format, query_format=query_format, num_heads=16, **lens)
    whole, (indices, kept) = dense(problem), selected(problem)
    batches = [[t] for t in range(6)] + [[5, 4, 3, 2, 1, 0], [0, 3, 1, 5, 2, 4], [0, 1, 2, 4, 3, 5]]
    for rows in batches:
        part = problem.take(rows)
        got = dense(part)
        assert_same_bits(got, whole[rows, : got.shape[1]], f"scores of rows {rows}")
        for g, w in zip(selected(part), (indices, kept), strict=True):
            assert_same_bits(g, w[rows], f"selection of rows {rows}")


def test_an_entry_does_not_depend_on_its_place_or_its_neighbours():
    """The same key bytes at every place of a tile, beside plain keys and beside keys with very unequal groups."""
    rng = np.random.default_rng(0)
    key, plain = rng.normal(size=(2, 2100, 128)).astype(np.float32)
    key[:] = key[0]
    tilted = plain * 2.0 ** np.linspace(0, -20, 128)
    queries = rng.normal(size=(3, 16, 128)).astype(np.float32)
    queries[1] *= 2.0 ** np.linspace(0, -20, 128)
    for format in ("mxfp4", "fp8", "bf16"):
        results = []
        for neighbours in (key, plain, tilted.astype(np.float32)):
            keys = np.where(np.arange(2100)[:, None] % 3 == 1, neighbours, key)
            problem = make_problem([2100], format=format, num_heads=16, head_dim=128, valid_lens=[2100] * 3)
            problem = replace(problem, cache=make_cache([keys] * 3, format))
            data, scale = (torch.from_numpy(x) for x in encode_rows(queries, "mxfp4"))
            scores = dense(replace(problem, q=QuantizedQuery("mxfp4", data, scale)))
            results.append(scores[:, np.arange(2100) % 3 != 1])
        for scores in results:
            want = results[0][:, :1].expand_as(scores)
            assert_same_bits(scores, want, f"{format} scores [query, place] of one key")


@pytest.mark.parametrize("format", ["mxfp4", "fp8", "bf16"])
def test_a_score_does_not_depend_on_the_length(format):
    """Draft tokens of one sequence: the same query with other lengths, together and each alone."""
    problem = make_problem([2100], format=format, valid_lens=[2100, 2049, 65, 7, 1], seq_ids=[0] * 5, num_heads=16)
    problem = replace(problem.take([0] * 5), valid_lens=problem.valid_lens)
    together = dense(problem)
    for t, length in enumerate(problem.valid_lens.tolist()):
        assert_same_bits(together[t, :length], together[0, :length], f"scores with length {length}")
        assert_same_bits(dense(problem.take([t])), together[:1, :length], f"scores with length {length}, alone")


def test_int8_and_fp32_products_give_the_same_bits(monkeypatch):
    problem = make_problem([2100], valid_lens=[2100, 300, 64], seq_ids=[0] * 3, num_heads=64, head_dim=128)
    spread = np.ptp(problem.cache.view.scale_rows[:, :, :4].numpy().astype(int), axis=-1)
    assert (spread <= 3).any() and (spread > 3).any(), "both kinds of entries"
    want = (dense(problem), *selected(problem))
    monkeypatch.setattr(operands, "has_exact_int8_matmul", lambda: False)
    for got, w in zip((dense(problem), *selected(problem)), want, strict=True):
        assert_same_bits(got, w, "without int8 products")


@contextlib.contextmanager
def changed(set_value, value, before):
    set_value(value)
    try:
        yield
    finally:
        set_value(before)


SETTINGS = {
    "matmul-precision-medium": lambda: changed(torch.set_float32_matmul_precision, "medium", "highest"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference-mode": torch.inference_mode,
    "grad": torch.enable_grad,
    "default-dtype-bf16": lambda: changed(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default-dtype-fp64": lambda: changed(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": lambda: changed(torch.use_deterministic_algorithms, True, False),
    "three-threads": lambda: changed(torch.set_num_threads, 3, 1),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_the_callers_settings_do_not_change_a_bit(setting, format, impl):
    problem = make_problem([2100], format=format, valid_lens=[2100, 300], seq_ids=[0, 0], num_heads=16, head_dim=128)
    want = (dense(problem, impl=impl), *selected(problem, impl=impl))
    if not isinstance(problem.q, QuantizedQuery):
        problem.q.requires_grad_()
    problem.weights.requires_grad_()
    with SETTINGS[setting]():
        got = (dense(problem, impl=impl), *selected(problem, impl=impl))
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w, setting)
        assert not g.requires_grad


def test_a_matmul_precision_is_put_back():
    with SETTINGS["matmul-precision-medium"]():
        before = torch.backends.mkldnn.matmul.fp32_precision
        selected(make_problem([40]))
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        assert torch.get_float32_matmul_precision() == "medium"


# --- promises 7 and 9: memory ---------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operator returned, not counting those that it was given."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.nbytes = 0
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple | list) else (result,):
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.given:
                self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return result


def peak(length: int, num_queries: int, *, num_seqs: int = 1) -> int:
    """Largest storage that a call over zero keys makes, with the outputs and the workspace given."""
    blocks = -(-length // 64)
    view = make_problem([10], head_dim=128).cache.view
    storage = torch.zeros(4, 64 * 68, dtype=torch.uint8)  # the sequence repeats four blocks: inputs stay small
    view = IndexerView(storage, view.schema, (torch.arange(blocks, dtype=torch.int32) % 4).repeat(num_seqs, 1))
    q = torch.zeros(num_queries, 8, 128)
    lens = torch.full((num_queries,), length, dtype=torch.int32)
    options = {"valid_lens": lens, "seq_ids": torch.arange(num_queries, dtype=torch.int32) % num_seqs}
    out = torch.empty(num_queries, 16, dtype=torch.int32)
    weights, needed = torch.zeros(num_queries, 8), score_topk_workspace_bytes(num_heads=8, head_dim=128, top_k=16)
    workspace = torch.empty(needed, dtype=torch.uint8)
    tensors = (q, weights, view.storage, view.block_table, *options.values(), out, workspace)
    with LargestTensor(*tensors) as largest:
        score_topk(q, weights, view, top_k=16, out=out, workspace=workspace, **options)
    return largest.nbytes


def test_memory_does_not_grow_with_context_or_queries():
    most = 2 * 2**20  # a tile of keys in fp32 is 1 MiB; a float32 score of every query and entry would be 32 MiB
    assert peak(64 * 1024, 2 * PASS) <= most
    assert peak(8 * 1024, 2) == peak(64 * 1024, 2) <= most
    assert peak(4096, PASS) == peak(4096, 4 * PASS) <= most
    assert peak(4096, 4, num_seqs=4) <= most


def test_a_dense_score_matrix_would_be_noticed(monkeypatch):
    right = cpu.score_topk

    def wrong(q, weights, view, valid_lens, *args, **options):
        torch.zeros(len(weights), int(valid_lens.max()))
        right(q, weights, view, valid_lens, *args, **options)

    monkeypatch.setattr(cpu, "score_topk", wrong)
    with pytest.raises(AssertionError):
        test_memory_does_not_grow_with_context_or_queries()


@pytest.mark.parametrize(
    ("head_scales", "weights", "key_scale"),
    [((100, *[-60] * 7), (0.0, *[1.0] * 7), 0), ((0,) * 8, (1e36,) * 8, -30), ((-110,) * 8, (1.0,) * 8, 100)],
    ids=["a-huge-head-of-no-weight", "huge-weights", "tiny-queries-and-huge-keys"],
)
def test_scales_leave_the_range_of_fp32_only_where_the_score_does(head_scales, weights, key_scale):
    torch.manual_seed(3)
    schema = CacheSchema("mxfp4", 16)
    view = IndexerView(torch.zeros(2, schema.stride, dtype=torch.uint8), schema, torch.tensor([[1, 0]]).int())
    append_entries(torch.randn(32, 128) * 2.0**key_scale, view, torch.arange(32))
    factors = torch.tensor(head_scales, dtype=torch.float32).exp2().view(1, 8, 1)
    q = quantize_query(torch.randn(1, 8, 128) * factors, "mxfp4")
    options = {"valid_lens": torch.tensor([32], dtype=torch.int32), "seq_ids": torch.tensor([0])}
    got = index_scores(q, torch.tensor([weights]), view, **options)
    exact = reference.index_scores(q, torch.tensor([weights]), view, **options, max_len=32, dtype=torch.float64)
    error = (got.double() - exact).norm() / exact.norm()
    assert error <= 1e-5, f"relative error {error}: {got[0, :3].tolist()} for {exact[0, :3].tolist()}"


def test_threads_give_the_callers_setting_back():
    problem = make_problem([3000], valid_lens=[3000], seq_ids=[0])
    want = dense(problem)
    torch.set_float32_matmul_precision("medium")
    try:
        before = torch.backends.mkldnn.matmul.fp32_precision
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: dense(problem), range(24)))
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    finally:
        torch.set_float32_matmul_precision("highest")
    for got in results:
        assert_same_bits(got, want, "scores in a thread")


@pytest.mark.parametrize("num_heads", [8, 64, 128])
@pytest.mark.parametrize("top_k", [1, 512, 2048])
def test_workspace_is_at_most_64_mib(num_heads, top_k):
    assert 0 < score_topk_workspace_bytes(num_heads=num_heads, head_dim=128, top_k=top_k) <= 64 * 2**20


@pytest.mark.parametrize("fill", [0, POISON])
def test_outputs_and_workspace_of_the_caller(fill, impl):
    """Results live in `out`, `scores_out` and `workspace`; the bytes around them stay, and what they held is unread."""
    problem = make_problem([3000], valid_lens=[3000, 40, 7], seq_ids=[0] * 3, num_heads=16, head_dim=128)
    want = (*selected(problem), dense(problem))
    needed = score_topk_workspace_bytes(num_heads=16, head_dim=128, top_k=50)
    around = [torch.full((5, 70, 4), fill, dtype=torch.uint8).view(t).squeeze(-1) for t in (torch.int32, torch.float32)]
    around.append(torch.full((5, 3020, 4), fill, dtype=torch.uint8).view(torch.float32).squeeze(-1))
    memory = torch.full((needed + 192,), fill, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + 64
    out, scores_out, dense_out = around[0][1:4, 9:59], around[1][1:4, 9:59], around[2][1:4, 9:3009]
    given = {"out": out, "scores_out": scores_out, "workspace": memory[start : start + needed]}
    got = (*selected(problem, **given, impl=impl), dense(problem, out=dense_out, impl=impl))
    for g, w, mine, buffer in zip(got, want, (out, scores_out, dense_out), around, strict=True):
        assert g.data_ptr() == mine.data_ptr() and g.stride() == mine.stride()
        if impl == "cpu":
            assert_same_bits(g, w, "result in the caller's memory")
        mine.view(torch.int32).fill_(0)
        left = buffer.view(torch.int32)
        assert left.count_nonzero() == (left.numel() - mine.numel()) * (fill != 0), "bytes around an output changed"
    assert (memory[:start] == fill).all() and (memory[start + needed :] == fill).all(), "beyond the workspace"


def test_dense_out_may_be_wider_than_the_lengths(impl):
    problem = make_problem([100], valid_lens=[100, 40], seq_ids=[0, 0])
    out = torch.zeros(2, 130)
    dense(problem, out=out, impl=impl)
    assert_same_bits(out[:, :100], dense(problem, impl=impl), "scores")
    assert (out[:, 100:] == -torch.inf).all() and (out[1, 40:] == -torch.inf).all()


def test_without_validation_bad_numbers_are_clamped(impl):
    """Out-of-range lengths, sequences and block ids neither crash nor disturb the good row."""
    problem = make_problem([100, 100], valid_lens=[100, 100, 100, 100], seq_ids=[0, 0, 1, 1], entries_per_block=16)
    want = selected(problem, impl=impl)
    problem.valid_lens[1:3] = torch.tensor([2**31 - 1, -5])
    problem.seq_ids[2:] = torch.tensor([-(2**31), 2**31 - 1])
    problem.cache.view.block_table[1, 0] = 10**9
    problem.cache.view.block_table[1, 1] = -7
    indices, scores = selected(problem, validate=False, impl=impl)
    assert_same_bits(indices[0], want[0][0], "indices of the good row")
    assert_same_bits(scores[0], want[1][0], "scores of the good row")
    assert (indices[2] == -1).all()
    assert (indices[1:] < problem.cache.view.max_entries).all()


# --- errors ---------------------------------------------------------------------------------------------------


def _kv_view(view: IndexerView) -> KVView:
    schema = CacheSchema("fp8_ds_mla", 64)
    return KVView(torch.zeros(2, schema.stride, dtype=torch.uint8), schema, view.block_table)


def _set_block(column: int, value: int):
    def edit(view: IndexerView) -> IndexerView:
        view.block_table[0, column] = value
        return view

    return edit


FP8_QUERY = QuantizedQuery("fp8", torch.zeros(2, 8, 128).to(torch.float8_e4m3fn), None)
STRIDED = torch.zeros(2, 2, dtype=torch.uint8)[:1].expand(20 << 20, 2)[:, 0]

# name -> (changes: functions edit a field of the problem, other values are options; error; words of the message)
ERRORS = {
    "weights-dtype": ({"weights": lambda w: w.bfloat16()}, TypeError, "weights float32 bfloat16"),
    "weights-heads": ({"weights": lambda w: w[:, :4]}, ValueError, "weights multiple of 8 128 got 4"),
    "weights-shape": ({"weights": lambda w: w[0]}, ValueError, "weights [T, H] [8]"),
    "weights-device": ({"weights": lambda w: w.to("meta")}, ValueError, "weights cpu meta"),
    "q-dtype": ({"q": lambda q: q.double()}, TypeError, "q float32 bfloat16 float16 float64"),
    "q-shape": ({"q": lambda q: q[..., :32]}, ValueError, "q [2, 8, 64] [2, 8, 32]"),
    "q-device": ({"q": lambda q: q.to("meta")}, ValueError, "q cpu meta"),
    "q-type": ({"q": lambda q: q.numpy()}, TypeError, "q torch.Tensor ndarray"),
    "q-quantised": ({"q": lambda q: FP8_QUERY}, ValueError, "q [2, 8, 64] [2, 8, 128]"),
    "lens-dtype": ({"valid_lens": lambda n: n.long()}, TypeError, "valid_lens int32 int64 valid_lens.to("),
    "lens-shape": ({"valid_lens": lambda n: n[:1]}, ValueError, "valid_lens [2] [1]"),
    "lens-too-long": ({"valid_lens": lambda n: n + 999}, ValueError, "valid_lens 0..256 1069 at [0]"),
    "lens-negative": ({"valid_lens": lambda n: n - 30}, ValueError, "valid_lens 0..256 -10 at [1]"),
    "seqs-dtype": ({"seq_ids": lambda s: s.float()}, TypeError, "seq_ids int32 or int64 float32"),
    "seqs-shape": ({"seq_ids": lambda s: s[:1]}, ValueError, "seq_ids [2] [1]"),
    "seqs-too-large": ({"seq_ids": lambda s: s + 1}, ValueError, "seq_ids 0..1 2 at [1]"),
    "seqs-negative": ({"seq_ids": lambda s: s - 1}, ValueError, "seq_ids 0..1 -1 at [0]"),
    "seqs-absent": (
        {"seq_ids": lambda s: None, "view": lambda v: IndexerView(v.storage, v.schema, v.block_table[:1])},
        ValueError,
        "block_table 1 rows 2 queries pass seq_ids",
    ),
    "block-too-large": ({"view": _set_block(1, 99)}, ValueError, "block_table[0] 0..5 99 at [1]"),
    "block-negative": ({"view": _set_block(0, -1)}, ValueError, "block_table[0] 0..5 -1 at [0]"),
    "no-blocks": (
        {"view": lambda v: IndexerView(v.storage[:0], v.schema, v.block_table.clamp(0, 0))},
        ValueError,
        "valid_lens 0..0 70 at [0]",
    ),
    "kv-view": ({"view": _kv_view}, TypeError, "view IndexerView KVView"),
    "k-zero": ({"top_k": 0}, ValueError, "top_k 1..4096 0"),
    "k-negative": ({"top_k": -3}, ValueError, "top_k 1..4096 -3"),
    "k-too-large": ({"top_k": 4097}, ValueError, "top_k 1..4096 4097"),
    "k-float": ({"top_k": 8.0}, ValueError, "top_k int 8.0"),
    "order": ({"order": "descending"}, ValueError, "order index score 'descending'"),
    "output": ({"output": "page"}, ValueError, "output entry slot 'page'"),
    "impl": ({"impl": "fast"}, ValueError, "impl reference 'fast'"),
    "out-dtype": ({"out": torch.zeros(2, 50).long()}, TypeError, "out int32 int64"),
    "out-shape": ({"out": torch.zeros(2, 49).int()}, ValueError, "out [2, 50] [2, 49]"),
    "scores-out-dtype": ({"scores_out": torch.zeros(2, 50).double()}, TypeError, "scores_out float32 float64"),
    "scores-out-shape": ({"scores_out": torch.zeros(3, 50)}, ValueError, "scores_out [2, 50] [3, 50]"),
    "workspace-small": ({"workspace": torch.zeros(64).byte()}, ValueError, "workspace at least bytes got 64"),
    "workspace-dtype": ({"workspace": torch.zeros(64)}, TypeError, "workspace uint8 float32"),
    "workspace-device": ({"workspace": torch.zeros(64).byte().to("meta")}, ValueError, "workspace cpu meta"),
    "workspace-strided": ({"workspace": STRIDED}, ValueError, "workspace contiguous"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_tensor_and_leave_out_alone(name):
    changes, error, words = ERRORS[name]
    problem = make_problem([70, 20], query_format="fp32")
    options = {key: value for key, value in changes.items() if not callable(value)}
    edits = {key: edit for key, edit in changes.items() if callable(edit)}
    if "view" in edits:
        problem = replace(problem, cache=replace(problem.cache, view=edits.pop("view")(problem.cache.view)))
    problem = replace(problem, **{key: edit(getattr(problem, key)) for key, edit in edits.items()})
    out, scores_out = torch.full((2, 50), 7, dtype=torch.int32), torch.full((2, 50), 7.0)
    with pytest.raises(error) as caught:
        selected(problem, **{"top_k": 50, "out": out, "scores_out": scores_out, **options})
    assert all(word in str(caught.value) for word in ["score_topk", *words.split()]), str(caught.value)
    assert (out == 7).all() and (scores_out == 7).all()


@pytest.mark.parametrize(
    ("format", "data", "scale", "error", "words"),
    [
        ("int4", torch.zeros(1, 8, 64).byte(), None, ValueError, "format mxfp4 'int4'"),
        ("mxfp4", torch.zeros(1, 8, 64), None, TypeError, "data uint8 or int8 float32"),
        ("mxfp4", torch.zeros(1, 8, 64).byte(), None, TypeError, "scale torch.Tensor None"),
        ("mxfp4", torch.zeros(1, 8, 64).byte(), torch.zeros(1, 8, 2).byte(), ValueError, "scale [1, 8, 4] [1, 8, 2]"),
        ("mxfp4", torch.zeros(1, 8, 64).byte(), torch.zeros(1, 8), TypeError, "scale int32 float32"),
        ("nvfp4", torch.zeros(1, 8, 64).byte(), torch.zeros(1, 8, 4).byte(), ValueError, "scale [1, 8, 8] [1, 8, 4]"),
        ("fp8", torch.zeros(1, 8, 128).byte(), None, TypeError, "data float8_e4m3fn uint8"),
        ("fp8", torch.zeros(1, 8, 128).to(torch.float8_e4m3fn), torch.zeros(8), ValueError, "scale [1, 8] [8]"),
    ],
)
def test_quantised_query_errors(format, data, scale, error, words):
    with pytest.raises(error) as caught:
        QuantizedQuery(format, data, scale)
    assert all(word in str(caught.value) for word in words.split()), str(caught.value)


def test_dense_out_too_narrow():
    with pytest.raises(
        ValueError, match=r"index_scores: out must have at least max\(valid_lens\) = 70 columns, got 69"
    ):
        dense(make_problem([70]), out=torch.zeros(1, 69))


def test_the_oracle_is_torchs_stable_sort():
    scores = torch.tensor([1.0, 2, -torch.inf, 2, 0, -0.0, torch.inf])
    want = torch.sort(scores, descending=True, stable=True).indices.int()
    assert_same_bits(expected_topk(scores.numpy(), 7, "score")[0], want, "order")
    with_nan = torch.cat([torch.tensor([torch.nan]), scores, torch.tensor([torch.nan])])
    assert expected_topk(with_nan.numpy(), 9, "score")[0].tolist() == [*(want + 1).tolist(), 0, 8]
