"""What `score_topk` promises, on a GPU, for the engine that a call gets and for the portable one.

Hostile memory is the default, as in `test_score_topk.py`, whose cases these are: unused bytes stand for NaN, blocks lie
in random order, and table entries behind the needed ones are INT_MAX and -1.

Compiling dominates the time with an empty kernel cache: some seconds for each combination of key format, arithmetic,
padded number of heads, head dim and entries per block, times the classes of `top_k` and of queries per sequence. This
file uses about 65 kernels of each engine on Hopper: take one of EACH_FORMAT for a new test.
"""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import (
    ADVERSARIAL_KINDS,
    LOW_CODES,
    POISON,
    TOPK_CASES,
    Problem,
    adversarial_row,
    assert_same_bits,
    check_scores,
    check_topk,
    make_cache,
    make_problem,
    make_query,
    problem_with_scores,
    with_low_codes,
)
from engines import ENGINES, Engine, fp8_tensor_cores, promised_error, rows_in_long_parts, workspace_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_indexer import QuantizedQuery, index_scores, score_topk, score_topk_workspace_bytes
from lightning_indexer.cuda import score_topk as cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = "cuda"
GIB, MIB = 2**30, 2**20

# The model's own shape, and one small shape for each other format
EACH_FORMAT = {
    "mxfp4": {"format": "mxfp4", "num_heads": 64, "head_dim": 128},
    "nvfp4": {"format": "nvfp4", "num_heads": 8, "head_dim": 128, "entries_per_block": 16},
    "fp8": {"format": "fp8", "num_heads": 16, "head_dim": 128},
    "bf16": {"format": "bf16", "num_heads": 8, "head_dim": 64},
}
MXFP4 = EACH_FORMAT["mxfp4"]
QUERY_FORMATS = ["mxfp4", "nvfp4", "fp8", "bf16", "fp32"]


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]


AUTO = ENGINES["auto"]


def assert_same_selection(got: tuple, want: tuple, what: str) -> None:
    for name, g, w in zip(("indices", "kept scores"), got, want, strict=True):
        assert_same_bits(g, w, f"{name}, {what}")


def assert_same_results(engine: Engine, got: Problem, want: Problem, what: str) -> None:
    """Dense scores, and selection with its scores, bit for bit."""
    assert_same_bits(engine.dense(got), engine.dense(want), f"scores, {what}")
    assert_same_selection(engine.selected(got), engine.selected(want), what)


def tensors_of(problem: Problem) -> list[torch.Tensor]:
    """All that a call reads."""
    q, view = problem.q, problem.cache.view
    q = [q.data, q.scale] if isinstance(q, QuantizedQuery) else [q]
    return [*q, problem.weights, problem.valid_lens, problem.seq_ids, view.storage, view.block_table]


def outputs(problem: Problem, top_k: int) -> dict[str, torch.Tensor]:
    """New `out`, `scores_out` and `workspace`, filled with nonsense."""
    shape = (len(problem.weights), top_k)
    return {
        "out": torch.full(shape, -77, dtype=torch.int32, device=DEVICE),
        "scores_out": torch.full(shape, torch.nan, device=DEVICE),
        "workspace": torch.full((workspace_bytes(problem, top_k),), POISON, dtype=torch.uint8, device=DEVICE),
    }


def ints(values: object) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


# --- promise 1: scores ----------------------------------------------------------------------------------------


def scale_is_any_float(seq: int, data: np.ndarray, scale: np.ndarray) -> None:
    """fp8 writers that store amax / 448, not a power of two."""
    scale.view(np.float32)[:] *= np.random.default_rng(seq).uniform(1, 2, (len(scale), 1))


@functools.cache
def scored(format: str, query_format: str, num_heads: int, head_dim: int, entries_per_block: int = 64) -> Problem:
    scale = {"nvfp4": {"global_scale": 0.037}, "fp8": {"edit": scale_is_any_float}}.get(format, {})
    return make_problem(
        [90, 200],
        format=format,
        query_format=query_format,
        num_heads=num_heads,
        head_dim=head_dim,
        entries_per_block=entries_per_block,
        valid_lens=[200, 65, 1, 0, 64, 200, 199],
        seq_ids=[1, 0, 0, 1, 1, 1, 1],
        seed=num_heads + head_dim,
        **scale,
    )


@pytest.mark.parametrize("query_format", QUERY_FORMATS)
@pytest.mark.parametrize("format", EACH_FORMAT)
def test_scores_against_float64(engine: Engine, format: str, query_format: str) -> None:
    problem = scored(format, query_format, 64, 128)
    scores = engine.dense(problem.to(DEVICE))
    assert scores.shape == (7, 200)
    check_scores(scores, problem, promised_error(format, query_format))


@pytest.mark.parametrize("num_heads", [8, 16, 32])
@pytest.mark.parametrize(("format", "query_format"), [("fp8", "fp8"), ("fp8", "mxfp4"), ("mxfp4", "fp8")])
def test_scores_of_few_heads(engine: Engine, format: str, query_format: str, num_heads: int) -> None:
    """Whose errors do not cancel; of so many scores that rare ones occur."""
    rows = {"seq_ids": [0] * 130, "valid_lens": [600 - 3 * t for t in range(130)]}
    shape = {"num_heads": num_heads, "head_dim": 128, "format": format, "query_format": query_format}
    problem = make_problem([600], **shape, **rows)
    check_scores(engine.dense(problem.to(DEVICE)), problem, promised_error(format, query_format))


@pytest.mark.parametrize(
    ("name", "format", "num_heads", "head_dim", "entries_per_block"),
    [
        ("auto", "mxfp4", 8, 64, 48),
        ("auto", "mxfp4", 24, 128, 64),
        ("auto", "mxfp4", 56, 128, 64),
        ("auto", "mxfp4", 128, 128, 64),
        ("auto", "mxfp4", 64, 64, 256),
        ("auto", "nvfp4", 8, 128, 16),
        ("auto", "fp8", 16, 128, 64),
        ("auto", "fp8", 120, 64, 64),
        ("auto", "bf16", 8, 64, 64),
        ("auto", "bf16", 40, 64, 16),
        ("auto", "bf16", 128, 128, 64),
        ("portable", "mxfp4", 24, 128, 64),
        ("portable", "mxfp4", 128, 128, 64),
        ("portable", "nvfp4", 8, 128, 16),
        ("portable", "bf16", 8, 64, 64),
        ("portable", "bf16", 128, 128, 64),
    ],
)
def test_scores_for_other_heads_dims_and_blocks(
    name: str, format: str, num_heads: int, head_dim: int, entries_per_block: int
) -> None:
    engine, problem = ENGINES[name], scored(format, format, num_heads, head_dim, entries_per_block)
    scores = engine.dense(problem.to(DEVICE))
    check_scores(scores, problem, promised_error(format, format))
    if num_heads >= 120:
        engine.check(problem.to(DEVICE), 40, dense=scores)


@pytest.mark.parametrize("format", EACH_FORMAT)
def test_scores_of_a_long_sequence(engine: Engine, format: str) -> None:
    problem = make_problem([5000], **EACH_FORMAT[format], valid_lens=[5000, 4999], seq_ids=[0, 0])
    check_scores(engine.dense(problem.to(DEVICE)), problem, promised_error(format, format))


@pytest.mark.parametrize("binades", range(11, 21))
def test_groups_far_below_the_largest(engine: Engine, binades: int) -> None:
    """Groups of one key 2^-11 to 2^-20 apart; the second query sees the small groups alone."""
    rng = np.random.default_rng(binades)
    keys = rng.normal(size=(200, 128)).astype(np.float32)
    keys[::2, 32:] *= 2.0**-binades
    keys[1::2, :96] *= 2.0**-binades
    q = rng.normal(size=(2, 64, 128)).astype(np.float32)
    q[1, :, :32] = 0
    problem = make_problem([200], **MXFP4, valid_lens=[200, 199], seq_ids=[0, 0])
    q, q_values = make_query(q, "mxfp4")
    problem = replace(problem, q=q, q_values=q_values, cache=make_cache([keys], "mxfp4"))
    scores = engine.dense(problem.to(DEVICE))
    check_scores(scores, problem, None)
    check_scores(scores[:1], problem.take([0]), 5e-4)


@pytest.mark.parametrize(("mask", "scales"), LOW_CODES)
@pytest.mark.parametrize("query_format", ["mxfp4", "bf16"])
def test_groups_of_low_codes(engine: Engine, query_format: str, mask: int, scales: tuple[int, int]) -> None:
    problem = with_low_codes(make_problem([200], **MXFP4, query_format=query_format), mask, scales)
    check_scores(engine.dense(problem.to(DEVICE)), problem, promised_error("mxfp4", query_format))


@pytest.mark.parametrize("zero_group_byte", [1, 200, 254])
@pytest.mark.parametrize("query_format", ["mxfp4", "bf16"])
def test_a_zero_group_may_have_any_scale(engine: Engine, query_format: str, zero_group_byte: int) -> None:
    """Only foreign writers give zeros a large exponent; the other groups must not drown in it."""

    def plant(seq: int, data: np.ndarray, scale: np.ndarray) -> None:
        data[:, :16], scale[:, 0] = 0, zero_group_byte

    keys = np.random.default_rng(0).normal(size=(200, 128)).astype(np.float32) * 2.0**-30
    problem = make_problem([200], **MXFP4, query_format=query_format)
    problem = replace(problem, cache=make_cache([keys], "mxfp4", edit=plant))
    check_scores(engine.dense(problem.to(DEVICE)), problem, promised_error("mxfp4", query_format))


@pytest.mark.parametrize(
    ("head_scales", "weights", "key_scale"),
    [((100, *[-60] * 63), (0.0, *[1.0] * 63), 0), ((0,) * 64, (1e36,) * 64, -30), ((-110,) * 64, (1.0,) * 64, 100)],
    ids=["a-huge-head-of-no-weight", "huge-weights", "tiny-queries-and-huge-keys"],
)
def test_scales_leave_the_range_of_fp32_only_where_the_score_does(
    engine: Engine, head_scales: tuple, weights: tuple, key_scale: int
) -> None:
    rng = np.random.default_rng(3)
    factors = np.exp2(np.array(head_scales, np.float32))[:, None]
    q, q_values = make_query((rng.normal(size=(1, 64, 128)) * factors).astype(np.float32), "mxfp4")
    cache = make_cache([(rng.normal(size=(100, 128)) * 2.0**key_scale).astype(np.float32)], "mxfp4")
    problem = replace(make_problem([100], **MXFP4), q=q, q_values=q_values, cache=cache)
    problem = replace(problem, weights=torch.tensor([weights]))
    scores = engine.dense(problem.to(DEVICE))[0].double().cpu().numpy()
    exact = problem.exact_row(0)
    error = np.linalg.norm(scores - exact) / np.linalg.norm(exact)
    assert error <= 5e-4, f"relative error {error}: {scores[:3]} for {exact[:3]}"


def test_underflow_is_plus_zero(engine: Engine) -> None:
    """A negative score too small for fp32 is +0 and ties with every other zero."""

    def shrink(seq: int, data: np.ndarray, scale: np.ndarray) -> None:
        scale.view(np.float32)[::2] = 1e-38

    problem = make_problem([70], **EACH_FORMAT["fp8"], edit=shrink)
    problem = replace(problem, weights=torch.full((1, 16), -1e-30)).to(DEVICE)
    scores = engine.dense(problem)
    assert_same_bits(scores[:, ::2], torch.zeros(1, 35), "scores of the shrunken entries")
    engine.check(problem, 40, order="score", dense=scores)


def test_infinite_scores_of_finite_operands(engine: Engine) -> None:
    """Scores beyond fp32 are infinite, and the positive ones are chosen first."""
    rng = np.random.default_rng(0)
    row = rng.choice([-2.0, -1.0, 0.0, 1.0, 2.0], 3000).astype(np.float32)
    row[rng.integers(0, 3000, 60)] = 2.0**100
    row[rng.integers(0, 3000, 60)] = -(2.0**100)
    problem = problem_with_scores([row], "bf16", unit=2.0**60)
    with np.errstate(over="ignore"):
        want = problem.exact_row(0).astype(np.float32)
    scores = engine.dense(problem.to(DEVICE))
    assert_same_bits(scores[0], want, "scores")
    for top_k in (1, 40, 2048):
        engine.check(problem.to(DEVICE), top_k, order="score", dense=scores)


# --- how operands lie in memory -------------------------------------------------------------------------------


def test_fp8_query_without_a_scale_is_taken_as_it_is(engine: Engine) -> None:
    problem = make_problem([70], **MXFP4, query_format="fp8").to(DEVICE)
    folded = replace(problem, q=replace(problem.q, scale=None), weights=problem.weights * problem.q.scale)
    torch.testing.assert_close(engine.dense(folded), engine.dense(problem), rtol=1e-5, atol=1e-5)
    engine.check(folded, 40)


def test_query_layouts_of_engines_give_the_same_bits(engine: Engine) -> None:
    problem = make_problem([100], **MXFP4, valid_lens=[100, 50], seq_ids=[0, 0]).to(DEVICE)
    q = problem.q
    packed = QuantizedQuery("mxfp4", q.data.view(torch.int8), q.scale.view(torch.int32).squeeze(-1))
    e8m0 = QuantizedQuery("mxfp4", q.data, q.scale.view(torch.float8_e8m0fnu))
    assert_same_results(engine, replace(problem, q=packed), problem, "int8 codes and int32 scales")
    assert_same_results(engine, replace(problem, q=e8m0), problem, "float8_e8m0fnu scales")
    nvfp4 = make_problem([100], **EACH_FORMAT["nvfp4"]).to(DEVICE)
    as_float = replace(nvfp4.q, scale=nvfp4.q.scale.view(torch.float8_e4m3fn))
    assert_same_results(engine, replace(nvfp4, q=as_float), nvfp4, "nvfp4 scales as float8")
    halved = engine.dense(replace(nvfp4, q=replace(nvfp4.q, global_scale=0.5)))
    assert_same_bits(halved, engine.dense(nvfp4) / 2, "query global_scale")


def test_fp16_queries(engine: Engine) -> None:
    problem = make_problem([100], **MXFP4, query_format="fp32", valid_lens=[100, 50, 99, 7], seq_ids=[0] * 4)
    half = problem.q.half()
    problem = replace(problem, q=half, q_values=half.double().numpy())
    check_scores(engine.dense(problem.to(DEVICE)), problem, 1e-4)
    in_fp32 = replace(problem, q=half.float())
    assert_same_results(engine, problem.to(DEVICE), in_fp32.to(DEVICE), "fp16 and the same numbers in fp32")


def over_strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, each row among as many POISON bytes and each element of the last dim beside another."""
    bits = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    filler = -1 if bits.dtype.is_signed else POISON
    wide = torch.full((*(2 * n for n in bits.shape[:-1]), 2 * bits.shape[-1]), filler, dtype=bits.dtype)
    inner = wide[tuple(slice(None, None, 2) for _ in bits.shape)]
    inner.copy_(bits)
    return inner.view(x.dtype)


def test_over_strided_rows(engine: Engine) -> None:
    """Weights, lengths, sequence ids (int64 too) and block table; the storage as a layer in a slab of two."""
    problem = make_problem([100, 300], **MXFP4, valid_lens=[300, 100, 50], seq_ids=[1, 0, 0])
    want = problem.to(DEVICE)
    view = problem.cache.view
    slab = torch.full((view.num_blocks, 2, view.schema.stride), POISON, dtype=torch.uint8)
    slab[:, 1, : view.schema.payload_bytes] = view.storage
    schema = replace(view.schema, block_stride=2 * view.schema.stride)
    view = replace(view, storage=slab[:, 1], schema=schema, block_table=over_strided(view.block_table))
    spaced = {name: over_strided(getattr(problem, name)) for name in ("weights", "valid_lens", "seq_ids")}
    problem = replace(problem, cache=replace(problem.cache, view=view), **spaced)
    moved = problem.to(DEVICE)
    assert [x.stride() for x in tensors_of(moved)] == [x.stride() for x in tensors_of(problem)]
    assert_same_results(engine, moved, want, "strided")
    long = replace(problem, seq_ids=over_strided(problem.seq_ids.long())).to(DEVICE)
    assert_same_results(engine, long, want, "strided, with int64 sequence ids")


@pytest.mark.parametrize("query_format", ["mxfp4", "fp8", "bf16", "fp32"])
def test_over_strided_queries(query_format: str) -> None:
    lens = {"valid_lens": [100, 50, 99, 7], "seq_ids": [0] * 4}
    problem = make_problem([100], **MXFP4, query_format=query_format, **lens)
    q = problem.q
    if isinstance(q, QuantizedQuery):
        strided = replace(q, data=over_strided(q.data), scale=over_strided(q.scale))
    else:
        strided = over_strided(q)
    moved = replace(problem, q=strided).to(DEVICE)
    assert_same_results(AUTO, moved, problem.to(DEVICE), "strided queries")


def test_explicit_impl_and_default_seq_ids() -> None:
    problem = make_problem([100, 40, 7], **MXFP4).to(DEVICE)
    want = AUTO.selected(problem)
    assert_same_selection(AUTO.selected(problem, impl="cuda"), want, "impl='cuda'")
    assert_same_bits(AUTO.dense(problem, impl="cuda"), AUTO.dense(problem), "scores, impl='cuda'")
    assert_same_selection(AUTO.selected(replace(problem, seq_ids=None)), want, "without seq_ids")
    alone = problem.call(score_topk, top_k=50)
    assert_same_bits(alone, want[0], "without return_scores")


def test_fp32_keys_are_refused() -> None:
    problem = make_problem([10], format="fp32").to(DEVICE)
    for call in (AUTO.dense, AUTO.selected):
        with pytest.raises(NotImplementedError) as caught:
            call(problem)
        for word in ("fp32", "mxfp4", "nvfp4", "fp8", "bf16", "impl='reference'"):
            assert word in str(caught.value), str(caught.value)


# --- promises 2 to 5: selection -------------------------------------------------------------------------------


def check_case(engine: Engine, name: str) -> None:
    make, top_k, order, output = TOPK_CASES[name]
    problem = make("bf16")
    on_gpu = problem.to(DEVICE)
    scores = engine.dense(on_gpu)
    engine.check(on_gpu, top_k, order=order, output=output, dense=scores)
    if name == "nan-last":  # its -inf operand may give NaN
        return
    format = problem.cache.view.schema.format
    if fp8_tensor_cores(format, format):
        check_scores(scores, problem, 5e-4)
    else:  # bf16 products of these numbers are exact
        check_topk(engine.score_topk, on_gpu, top_k, order=order, output=output)


@pytest.mark.parametrize("name", TOPK_CASES)
def test_exact_cases(engine: Engine, name: str) -> None:
    check_case(engine, name)


# (format, query format, heads of one padded number, dim, entries per block)
DRAWN = [
    ("mxfp4", "mxfp4", (40, 56, 64), 128, 64),
    ("mxfp4", "fp8", (40, 64), 128, 64),
    ("mxfp4", "bf16", (64,), 128, 64),
    ("mxfp4", "mxfp4", (8,), 64, 48),
    ("nvfp4", "nvfp4", (8,), 128, 16),
    ("nvfp4", "mxfp4", (8,), 128, 16),
    ("fp8", "fp8", (16,), 128, 64),
    ("fp8", "mxfp4", (16,), 128, 64),
    ("bf16", "bf16", (8,), 64, 64),
]


@st.composite
def problems(draw: Callable) -> tuple[Problem, dict]:
    lens = draw(st.lists(st.one_of(st.integers(0, 300), st.sampled_from([1000, 2500])), min_size=1, max_size=3))
    rows = draw(st.lists(st.integers(0, len(lens) - 1), min_size=1, max_size=5))
    seq_ids = draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
    if draw(st.booleans()):
        seq_ids = sorted(seq_ids)  # groups
    format, query_format, heads, head_dim, entries_per_block = draw(st.sampled_from(DRAWN))
    problem = make_problem(
        lens,
        format=format,
        query_format=query_format,
        num_heads=draw(st.sampled_from(heads)),
        head_dim=head_dim,
        entries_per_block=entries_per_block,
        rows=rows,
        seq_ids=seq_ids,
        valid_lens=[draw(st.integers(0, lens[rows[s]])) for s in seq_ids],
        padding=16 * draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**16)),
    )
    options = {
        "top_k": draw(st.one_of(st.integers(1, 320), st.sampled_from([1, 512, 2048, 4096]))),
        "order": draw(st.sampled_from(["index", "score"])),
        "output": draw(st.sampled_from(["entry", "slot"])),
    }
    return problem, options


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=30)
@given(drawn=problems())
def test_selection_is_the_stable_sort_of_index_scores(name: str, drawn: tuple[Problem, dict]) -> None:
    problem, options = drawn
    engine, on_gpu = ENGINES[name], problem.to(DEVICE)
    scores = engine.dense(on_gpu)
    check_scores(scores, problem, None)
    engine.check(on_gpu, dense=scores, **options)
    without = on_gpu.call(engine.score_topk, **options)
    assert_same_bits(without, on_gpu.call(engine.score_topk, return_scores=True, **options)[0], "without return_scores")


def adversarial_problem(kind: str, lens: tuple[int, ...]) -> Problem:
    rows = [adversarial_row(kind, n) for n in lens]
    if kind == "denormal":  # the denormals are in the weights: bf16 keys have none so small
        return problem_with_scores([row / np.float32(2.0**-149) for row in rows], "bf16", unit=2.0**-147)
    return problem_with_scores(rows, "bf16")


@pytest.mark.parametrize("kind", ADVERSARIAL_KINDS)
def test_adversarial_rows(engine: Engine, kind: str) -> None:
    problem = adversarial_problem(kind, (5000, 64, 1))
    scores = engine.dense(problem.to(DEVICE))
    got, want = scores[0].cpu().numpy(), adversarial_row(kind, 5000) * (4 if kind == "denormal" else 1)
    finite = np.isfinite(want)  # an infinite operand may give NaN
    np.testing.assert_allclose(got[finite], want[finite], rtol=1e-6, atol=1e-44)
    assert not np.isfinite(got[~finite]).any(), "a number where an operand is NaN or infinite"
    assert not (torch.signbit(scores) & (scores == 0)).any(), "-0 among the scores"
    for top_k, order in ((1, "index"), (63, "score"), (64, "index"), (65, "score"), (2500, "index"), (4096, "score")):
        engine.check(problem.to(DEVICE), top_k, order=order, dense=scores)


@pytest.mark.parametrize(
    "kind", ["all-equal", "zero-plateau", "few-values", "sorted-up", "sorted-down", "last-bit", "nan"]
)
def test_adversarial_rows_of_70_000(engine: Engine, kind: str) -> None:
    """One sequence over all multiprocessors; more than 4096 ties."""
    problem = adversarial_problem(kind, (70_000,)).to(DEVICE)
    scores = engine.dense(problem)
    for top_k, order in ((1, "score"), (512, "index"), (2048, "score"), (4096, "index")):
        engine.check(problem, top_k, order=order, dense=scores)


@pytest.mark.parametrize("kind", ["all-equal", "zero-plateau", "last-bit", "sorted-up", "nan", "all-negative"])
def test_adversarial_rows_in_long_parts(engine: Engine, kind: str) -> None:
    """More entries for each multiprocessor than a lone query's list holds, in shared memory too (on Hopper)."""
    problem = rows_in_long_parts(kind)
    scores = engine.dense(problem)
    for top_k, order in ((1, "index"), (100, "score"), (512, "index")):
        engine.check(problem, top_k, order=order, dense=scores)


NAN_CODES = {"mxfp4": ("scale", 0xFF), "nvfp4": ("scale", 0x7F), "fp8": ("data", 0xFF), "bf16": ("data", 0xFF)}


@pytest.mark.parametrize("format", NAN_CODES)
def test_nan_codes_in_the_cache(engine: Engine, format: str) -> None:
    """Entries whose bytes stand for NaN score NaN, and are chosen after all numbers, by index."""
    part, code = NAN_CODES[format]
    bad = [3, 20, 21, 60]

    def plant(seq: int, data: np.ndarray, scale: np.ndarray) -> None:
        {"data": data, "scale": scale}[part][bad, :2] = code

    problem = make_problem([70], **EACH_FORMAT[format], edit=plant).to(DEVICE)
    scores = engine.dense(problem)
    assert scores[0].isnan().nonzero().flatten().tolist() == bad
    for top_k in (65, 66, 68, 70, 71):
        engine.check(problem, top_k, order="score", dense=scores)
    kept = problem.call(engine.score_topk, top_k=68, order="score")[0]
    assert kept[66:].tolist() == bad[:2], kept


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["weights", "q", "scale"])
def test_non_finite_queries(engine: Engine, where: str, value: float) -> None:
    """They stay in their own row, though its neighbours share the pass over the keys, and give valid indices."""
    query_format = {"weights": "mxfp4", "q": "bf16", "scale": "fp8"}[where]
    lens = {"valid_lens": [70, 70, 9], "seq_ids": [0, 0, 0]}
    problem = make_problem([70], **MXFP4, query_format=query_format, **lens, seed=4)
    clean = engine.dense(problem.to(DEVICE))
    target = {"weights": problem.weights, "q": problem.q, "scale": getattr(problem.q, "scale", None)}[where]
    target[1, 3 if where != "q" else (3, 5)] = value
    problem = problem.to(DEVICE)
    scores = engine.dense(problem)
    assert_same_bits(scores[[0, 2]], clean[[0, 2]], "scores of the other queries")
    assert not scores[1].isfinite().all()
    assert value == value or scores[1].isnan().all(), "NaN was lost"
    engine.check(problem, 66, dense=scores)


# --- shapes of batches ----------------------------------------------------------------------------------------

LENGTHS = [
    0,
    1,
    15,
    16,
    17,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
    511,
    512,
    513,
    1023,
    1024,
    1025,
    2047,
    2048,
    2049,
]
LENGTHS += [2499, 2500]


@pytest.mark.parametrize("together", [True, False], ids=["one-sequence", "many-sequences"])
@pytest.mark.parametrize("format", EACH_FORMAT)
def test_lengths_around_every_boundary(engine: Engine, format: str, together: bool) -> None:
    """Up and down again, as queries of one sequence, and as sequences that share their blocks."""
    lens = [*LENGTHS, *LENGTHS[::-1]]
    ids = [0] * len(lens) if together else range(len(lens))
    problem = make_problem([2500], **EACH_FORMAT[format], valid_lens=lens, seq_ids=ids, rows=[0] * len(lens)).to(DEVICE)
    scores = engine.dense(problem)
    for top_k, order in ((1, "index"), (63, "score"), (64, "index"), (65, "index"), (512, "score")):
        engine.check(problem, top_k, order=order, dense=scores)


@functools.cache
def long_sequence(format: str) -> Problem:
    return make_problem([70_000], **EACH_FORMAT[format], seed=5)


@pytest.mark.parametrize(
    ("format", "top_k"),
    [(format, k) for format in EACH_FORMAT for k in (1, 512)]
    + [(format, k) for format in ("mxfp4", "bf16") for k in (513, 2048, 2049, 4096)],
)
def test_one_long_sequence(engine: Engine, format: str, top_k: int) -> None:
    problem = long_sequence(format).to(DEVICE)
    scores = engine.dense(problem)
    for order, output in (("index", "entry"), ("score", "slot")):
        engine.check(problem, top_k, order=order, output=output, dense=scores)
    shorter = replace(problem, valid_lens=problem.valid_lens - 69_999 + top_k)  # k entries, all of them wanted
    engine.check(shorter, top_k, order="score")


@functools.cache
def uneven_sequences() -> Problem:
    lens = [*np.random.default_rng(0).integers(1, 20_000, 14).tolist(), 0, 1, 64, 20_000]
    return make_problem(lens, **MXFP4)


@pytest.mark.parametrize("top_k", [64, 512, 2048])
def test_sequences_of_uneven_length(engine: Engine, top_k: int) -> None:
    engine.check(uneven_sequences().to(DEVICE), top_k)


@pytest.mark.parametrize("format", EACH_FORMAT)
@pytest.mark.parametrize("drafts", [2, 3, 4])
def test_draft_tokens(engine: Engine, drafts: int, format: str) -> None:
    """Several queries of each sequence, each seeing one entry more than the one before."""
    lens = [700, 2100, 64, 5000, 3]
    rows = [(seq, max(n - drafts + 1 + i, 0)) for seq, n in enumerate(lens) for i in range(drafts)]
    seq_ids, valid_lens = zip(*rows, strict=True)
    problem = make_problem(lens, **EACH_FORMAT[format], valid_lens=valid_lens, seq_ids=seq_ids).to(DEVICE)
    scores = engine.dense(problem)
    for top_k, order in ((2, "index"), (512, "score")):
        engine.check(problem, top_k, order=order, dense=scores)


def prefill(format: str = "mxfp4", top: int = 2100, tokens: int = 300) -> Problem:
    """`tokens` queries of sequence 0 with growing lengths, between decode queries of other sequences."""
    grown = np.linspace(0, top, tokens).astype(int).tolist()
    lens, ids = [90, 1500, *grown, 700, 90, 0], [1, 2, *[0] * tokens, 3, 1, 2]
    return make_problem([top, 90, 1500, 700], **EACH_FORMAT[format], valid_lens=lens, seq_ids=ids, seed=1)


@pytest.mark.parametrize("format", EACH_FORMAT)
def test_prefill_beside_decode(engine: Engine, format: str) -> None:
    problem = prefill(format).to(DEVICE)
    scores = engine.dense(problem)
    for top_k, order in ((7, "score"), (512, "index")):
        engine.check(problem, top_k, order=order, dense=scores)


@pytest.mark.parametrize("format", ["mxfp4", "fp8", "bf16"])
def test_long_lists_that_run_full(engine: Engine, format: str) -> None:
    """A group of queries for each multiprocessor, on more entries than their lists hold."""
    tokens = 8 * torch.cuda.get_device_properties(DEVICE).multi_processor_count
    lens = [9000 - t for t in range(tokens)]
    engine.check(make_problem([9000], **EACH_FORMAT[format], valid_lens=lens, seq_ids=[0] * tokens).to(DEVICE), 2048)


def test_many_short_queries(engine: Engine) -> None:
    num = 1031
    lens, ids = [t % 30 for t in range(num)], [t // 300 for t in range(num)]
    engine.check(make_problem([40, 30, 29, 35], **MXFP4, valid_lens=lens, seq_ids=ids).to(DEVICE), 12)


def test_no_queries() -> None:
    problem = make_problem([40], **MXFP4, valid_lens=[], seq_ids=[]).to(DEVICE)
    assert AUTO.dense(problem).shape == (0, 0)
    assert AUTO.selected(problem, 7)[0].shape == (0, 7)


@pytest.mark.parametrize("output", ["entry", "slot"])
@pytest.mark.parametrize(("num_blocks", "columns"), [(0, 0), (0, 2), (1, 0)])
def test_nothing_to_see_in_an_empty_cache(num_blocks: int, columns: int, output: str) -> None:
    problem = make_problem([10, 10], **MXFP4, valid_lens=[0, 0]).to(DEVICE)
    view = problem.cache.view
    empty = replace(view, storage=view.storage[:num_blocks], block_table=view.block_table[:, :columns])
    problem = replace(problem, cache=replace(problem.cache, view=empty))
    for validate in (None, True, False):
        indices, scores = AUTO.selected(problem, 3, output=output, validate=validate)
        assert (indices == -1).all() and (scores == -torch.inf).all()


def test_rows_without_entries(engine: Engine) -> None:
    problem = make_problem([10, 10], **MXFP4, valid_lens=[0, 0, 0], seq_ids=[0, 1, 1]).to(DEVICE)
    indices, scores = engine.selected(problem, 512)
    assert (indices == -1).all() and (scores == -torch.inf).all()


# --- promise 6: repeatable and batch-invariant ----------------------------------------------------------------


@pytest.mark.parametrize("format", EACH_FORMAT)
def test_twenty_runs_are_bitwise_equal(engine: Engine, format: str) -> None:
    problem = long_sequence(format).to(DEVICE)
    problem = replace(problem.take([0] * 3), valid_lens=ints([70_000, 21_000, 7]).to(DEVICE))
    first = (engine.dense(problem), *engine.selected(problem, 512))
    for run in range(20):
        again = (engine.dense(problem), *engine.selected(problem, 512))
        for got, want in zip(again, first, strict=True):
            assert torch.equal(got.view(torch.int32), want.view(torch.int32)), f"run {run} differs"


@pytest.mark.parametrize(("format", "query_format"), [*((format, format) for format in EACH_FORMAT), ("mxfp4", "bf16")])
def test_a_row_does_not_depend_on_its_batch(engine: Engine, format: str, query_format: str) -> None:
    lens = {"valid_lens": [300, 290, 17, 2100, 200, 2048], "seq_ids": [0, 0, 0, 1, 0, 1]}
    problem = make_problem([300, 2100], **EACH_FORMAT[format], query_format=query_format, **lens).to(DEVICE)
    whole, chosen = engine.dense(problem), engine.selected(problem)
    batches = [[t] for t in range(6)] + [[5, 4, 3, 2, 1, 0], [0, 3, 1, 5, 2, 4], [0, 1], [1, 2, 4], [4, 1, 0, 2]]
    for rows in batches:
        part = problem.take(rows)
        scores = engine.dense(part)
        assert_same_bits(scores, whole[rows, : scores.shape[1]], f"scores of rows {rows}")
        assert_same_selection(engine.selected(part), [x[rows] for x in chosen], f"rows {rows}")


@pytest.mark.parametrize("format", EACH_FORMAT)
def test_a_row_alone_and_in_a_prefill(engine: Engine, format: str) -> None:
    problem = prefill(format).to(DEVICE)
    whole, chosen = engine.dense(problem), engine.selected(problem, 512)
    for rows in (
        [0],
        [1],
        [2],
        [3],
        [150],
        [301],
        [302],
        [150, 151],
        [299, 300, 301],
        [301, 1, 150],
        [*range(100, 140)],
    ):
        part = problem.take(rows)
        scores = engine.dense(part)
        assert_same_bits(scores, whole[rows, : scores.shape[1]], f"scores of rows {rows}")
        assert_same_selection(engine.selected(part, 512), [x[rows] for x in chosen], f"rows {rows}")


@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_a_long_row_alone_and_among_many(engine: Engine, format: str) -> None:
    """Alone, a sequence is split over all multiprocessors; among many queries it is not."""
    one = long_sequence(format).to(DEVICE)
    many = replace(one.take([0] * 400), valid_lens=(70_000 - 90 * torch.arange(400)).int().to(DEVICE))
    chosen = many.call(engine.score_topk, top_k=512, return_scores=True)
    for t in (0, 1, 399):
        part = many.take([t])
        assert_same_selection(engine.selected(part, 512), [x[t : t + 1] for x in chosen], f"row {t}")
        engine.check(part, 512)


def test_an_entry_does_not_depend_on_its_place_or_its_neighbours(engine: Engine) -> None:
    """The same key bytes at every place of a tile, beside plain keys and beside keys with very unequal groups."""
    rng = np.random.default_rng(0)
    key, plain = rng.normal(size=(2, 2100, 128)).astype(np.float32)
    key[:] = key[0]
    tilted = (plain * 2.0 ** np.linspace(0, -20, 128)).astype(np.float32)
    lens = {"valid_lens": [2100] * 3, "seq_ids": [0] * 3}
    for format, query_format in (("mxfp4", "mxfp4"), ("mxfp4", "bf16"), ("fp8", "fp8"), ("bf16", "bf16")):
        shape = {"format": format, "query_format": query_format, "num_heads": 64, "head_dim": 128}
        problem = make_problem([2100], **shape, **lens)
        results = []
        for neighbours in (key, plain, tilted):
            keys = np.where(np.arange(2100)[:, None] % 3 == 1, neighbours, key)
            changed = replace(problem, cache=make_cache([keys], format)).to(DEVICE)
            results.append(engine.dense(changed)[:, torch.arange(2100) % 3 != 1])
        for scores in results:
            want = results[0][:, :1].expand_as(scores)
            assert_same_bits(scores, want, f"{format} scores [query, place] of one key")


SETTINGS = {
    "tf32": lambda on: torch.set_float32_matmul_precision("medium" if on else "highest"),
    "default-dtype-bf16": lambda on: torch.set_default_dtype(torch.bfloat16 if on else torch.float32),
    "deterministic": torch.use_deterministic_algorithms,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_settings_do_not_change_a_bit(setting: str) -> None:
    problem = make_problem([2100], **MXFP4, valid_lens=[2100, 300], seq_ids=[0, 0]).to(DEVICE)
    want = (AUTO.dense(problem), *AUTO.selected(problem))
    SETTINGS[setting](True)
    try:
        got = (AUTO.dense(problem), *AUTO.selected(problem))
    finally:
        SETTINGS[setting](False)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w, setting)


# --- promise 7: memory ----------------------------------------------------------------------------------------


def rise(function: Callable[[], object]) -> int:
    """Bytes by which torch's allocations rise at most while `function` runs, what it returns included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("seq_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("format", EACH_FORMAT)
def test_nothing_is_allocated_with_everything_given(format: str, seq_dtype: torch.dtype) -> None:
    for problem in (prefill(format), make_problem([3000], **EACH_FORMAT[format])):
        problem = replace(problem, seq_ids=problem.seq_ids.to(seq_dtype)).to(DEVICE)
        given = outputs(problem, 50)
        AUTO.selected(problem, **given)  # loads the kernels
        grown = rise(lambda problem=problem, given=given: AUTO.selected(problem, **given))
        assert grown == 0, f"{len(problem.weights)} queries: {grown} bytes"


def repeated_blocks(length: int, num_queries: int) -> Problem:
    """Random queries and keys, one sequence whose table repeats 64 blocks: inputs stay small, and ties abound."""
    problem = make_problem([64 * 64], **MXFP4).to(DEVICE)
    view = problem.cache.view
    repeated = view.block_table[:, :64].repeat(1, -(-length // (64 * 64)))
    cache = replace(problem.cache, view=replace(view, block_table=repeated))
    torch.manual_seed(0)
    data = torch.randint(0, 256, (num_queries, 64, 64), dtype=torch.uint8, device=DEVICE)
    scale = torch.randint(120, 130, (num_queries, 64, 4), dtype=torch.uint8, device=DEVICE)
    weights = torch.randn(num_queries, 64, device=DEVICE)
    lens = length - torch.arange(num_queries, dtype=torch.int32, device=DEVICE)
    q, unknown = QuantizedQuery("mxfp4", data, scale), np.broadcast_to(np.nan, (num_queries, 64, 128))
    return Problem(q, unknown, weights, cache, lens, torch.zeros_like(lens))


@pytest.mark.parametrize(("length", "num_queries"), [(262_144, 1), (4096, 4096), (262_144, 8192)], ids=str)
def test_memory_does_not_grow_with_context_or_queries(length: int, num_queries: int) -> None:
    """8192 x 262,144 scores in fp32 would be 8 GiB. What comes out is right, though every score occurs 64 times."""
    top_k, problem = 512, repeated_blocks(length, num_queries)
    given = outputs(problem, top_k)
    workspace, results = given["workspace"].nbytes, given["out"].nbytes + given["scores_out"].nbytes
    assert workspace <= 64 * MIB
    AUTO.selected(problem.take([0]), top_k)  # loads kernels
    grown = rise(lambda: AUTO.selected(problem, top_k, **given))
    assert grown == 0, f"{grown} bytes with everything given"
    grown = rise(lambda: AUTO.selected(problem, top_k))
    assert grown <= workspace + results + 4 * MIB, f"{grown} bytes, {workspace} of workspace and {results} of results"
    for t in sorted({0, num_queries // 2, num_queries - 1}):
        part = problem.take([t])
        AUTO.check(part, top_k)
        got = [given[name][t : t + 1] for name in ("out", "scores_out")]
        assert_same_selection(got, AUTO.selected(part, top_k), f"row {t}")


def test_an_allocation_would_be_noticed() -> None:
    assert rise(lambda: torch.zeros(4096, 4096, device=DEVICE)) >= 64 * MIB


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_heads", [8, 24, 64, 128])
def test_workspace_is_at_most_64_mib(num_heads: int, head_dim: int) -> None:
    for top_k in (1, 50, 512, 2048, 4096):
        needed = score_topk_workspace_bytes(num_heads=num_heads, head_dim=head_dim, top_k=top_k, device=DEVICE)
        assert 0 < needed <= 64 * MIB, f"k {top_k}: {needed} bytes"


@pytest.mark.parametrize("fill", [0, POISON])
@pytest.mark.parametrize("lens", [[3000, 40, 7], [3000] * 100, [0, 0, 0]], ids=["decode", "prefill", "nothing"])
def test_outputs_and_workspace_of_the_caller(engine: Engine, lens: list[int], fill: int) -> None:
    """Results live in `out`, `scores_out` and `workspace`; the bytes around them stay, and what they held is unread."""
    problem = make_problem([3000], **MXFP4, valid_lens=lens, seq_ids=[0] * len(lens)).to(DEVICE)
    rows, want = len(lens), (*engine.selected(problem), engine.dense(problem))
    needed, longest = workspace_bytes(problem, 50), max(lens)
    around = [
        torch.full((rows + 2, width, 4), fill, dtype=torch.uint8, device=DEVICE).view(dtype).squeeze(-1)
        for width, dtype in ((71, torch.int32), (71, torch.float32), (longest + 21, torch.float32))
    ]
    memory = torch.full((needed + 256,), fill, dtype=torch.uint8, device=DEVICE)
    start = -memory.data_ptr() % 64 + 64
    out, scores_out, dense_out = around[0][1:-1, 9:59], around[1][1:-1, 9:59], around[2][1:-1, 9 : 9 + longest]
    given = {"out": out, "scores_out": scores_out, "workspace": memory[start : start + needed]}
    got = (*engine.selected(problem, **given), engine.dense(problem, out=dense_out))
    for g, w, mine, buffer in zip(got, want, (out, scores_out, dense_out), around, strict=True):
        assert g.data_ptr() == mine.data_ptr() and g.stride() == mine.stride()
        assert_same_bits(g, w, "result in the caller's memory")
        mine.view(torch.int32).fill_(0)
        left = buffer.view(torch.int32)
        assert left.count_nonzero() == (left.numel() - mine.numel()) * (fill != 0), "bytes around an output changed"
    assert (memory[:start] == fill).all() and (memory[start + needed :] == fill).all(), "beyond the workspace"


@pytest.mark.parametrize("name", ["out", "scores_out", "workspace"])
def test_an_output_may_be_given_alone(name: str) -> None:
    problem = make_problem([3000], **MXFP4).to(DEVICE)
    given = {name: outputs(problem, 50)[name]}
    assert_same_selection(AUTO.selected(problem, **given), AUTO.selected(problem), f"with {name} alone")


def test_one_workspace_for_many_calls(engine: Engine) -> None:
    """Whatever an earlier call left in it, of another shape or format."""
    problems = [make_problem([3000], **shape).to(DEVICE) for shape in EACH_FORMAT.values()]
    problems += [prefill().to(DEVICE), uneven_sequences().to(DEVICE)]
    calls = [(problem, top_k) for problem in problems for top_k in (512, 1)]
    calls += [(problems[i], top_k) for i in (0, 3) for top_k in (4096, 2048)]
    workspace = torch.zeros(max(workspace_bytes(*call) for call in calls), dtype=torch.uint8, device=DEVICE)
    for turn, (problem, top_k) in enumerate([*calls, *calls[::-1]]):
        got = engine.selected(problem, top_k, workspace=workspace)
        assert_same_selection(got, engine.selected(problem, top_k), f"call {turn}")


def test_dense_out_may_be_wider_than_the_lengths(engine: Engine) -> None:
    problem = make_problem([100], **MXFP4, valid_lens=[100, 40], seq_ids=[0, 0]).to(DEVICE)
    for width in (100, 101, 130, 1000):
        out = torch.zeros(2, width, device=DEVICE)
        engine.dense(problem, out=out)
        assert_same_bits(out[:, :100], engine.dense(problem), "scores")
        assert (out[:, 100:] == -torch.inf).all() and (out[1, 40:] == -torch.inf).all()


# --- promise 8: no waiting, graphs ----------------------------------------------------------------------------


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """From its call on, torch raises where an operator waits for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("format", EACH_FORMAT)
def test_calls_do_not_wait(format: str, no_waiting: Callable[[], None]) -> None:
    problems = [prefill(format).to(DEVICE), make_problem([3000], **EACH_FORMAT[format]).to(DEVICE)]
    given = [outputs(problem, 50) for problem in problems]
    no_waiting()
    for problem, tensors in zip(problems, given, strict=True):
        AUTO.selected(problem, **tensors)
        AUTO.selected(problem)
        problem.call(score_topk, top_k=50, order="score", output="slot")
    replace(problems[1], seq_ids=None).call(score_topk, top_k=50)


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """`function` as a CUDA graph: call the result to replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def graph_problem(format: str, seed: int, decode: bool) -> Problem:
    """Problems of the same shapes whose every tensor differs with the seed, lengths from almost none to all."""
    rng = np.random.default_rng(seed)
    tokens, longest = (4, 40) if seed == 0 else (4, 5000)
    tokens = tokens if decode else 150
    ids = rng.integers(0, 3, tokens).tolist()
    lens = rng.integers(0, longest, tokens).tolist()
    return make_problem([5000, 5000, 5000], **EACH_FORMAT[format], valid_lens=lens, seq_ids=ids, seed=seed)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("format", EACH_FORMAT)
def test_a_graph_follows_its_inputs(engine: Engine, format: str, decode: bool) -> None:
    """Queries, weights, lengths, sequences, keys and blocks change between replays; the capture saw short rows."""
    static = graph_problem(format, 0, decode).to(DEVICE)
    given = outputs(static, 512)
    engine.selected(static, 512, **given)
    replay = captured(lambda: engine.selected(static, 512, **given))
    for seed in (1, 2, 0):
        problem = graph_problem(format, seed, decode).to(DEVICE)
        for kept, new in zip(tensors_of(static), tensors_of(problem), strict=True):
            kept.copy_(new)
        for tensor in given.values():
            tensor.fill_(77)
        for run in range(3):
            replay()
            got = (given["out"], given["scores_out"])
            assert_same_selection(got, engine.selected(problem, 512), f"problem {seed}, replay {run}")


def test_twenty_replays_are_bitwise_equal(engine: Engine) -> None:
    problem = long_sequence("mxfp4").to(DEVICE)
    given, want = outputs(problem, 2048), engine.selected(problem, 2048)
    replay = captured(lambda: engine.selected(problem, 2048, **given))
    for run in range(20):
        replay()
        assert_same_selection((given["out"], given["scores_out"]), want, f"replay {run}")


def test_a_graph_may_own_its_outputs() -> None:
    problem = make_problem([3000], **MXFP4, valid_lens=[3000, 7], seq_ids=[0, 0]).to(DEVICE)
    want, kept = AUTO.selected(problem), []
    replay = captured(lambda: kept.extend(AUTO.selected(problem)))
    replay()
    assert_same_selection(tuple(kept), want, "replay")


FRESH = """
import torch
from cases import make_problem
from lightning_indexer import score_topk
problem = make_problem([300], num_heads=64, head_dim=128, valid_lens=[300, 40], seq_ids=[0, 0])
on_gpu, kept = problem.to("cuda"), []
options = {{"top_k": 50, "return_scores": True, "order": "score"}}
torch.cuda.synchronize()
if {in_capture}:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept.extend(on_gpu.call(score_topk, **options))
    graph.replay()
else:
    kept.extend(on_gpu.call(score_topk, **options))
indices, scores = (x.cpu() for x in kept)
for t, length in enumerate((300, 40)):
    exact = torch.from_numpy(problem.exact_row(t))
    chosen = indices[t][indices[t] >= 0].long()
    assert len(chosen) == len(chosen.unique()) == min(length, 50), indices[t]
    best, band = exact.topk(len(chosen)).values, 1e-2 * exact.abs().max()
    assert torch.allclose(exact[chosen], best, atol=float(band), rtol=0), (t, exact[chosen], best)
"""


@pytest.mark.parametrize("in_capture", [False, True], ids=["eager", "first-call-in-a-capture"])
def test_a_fresh_process_with_an_empty_kernel_cache(in_capture: bool, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "LIGHTNING_INDEXER_CACHE": str(tmp_path), "PYTHONPATH": paths}
    built = []
    for _ in range(2):  # the second finds the kernels on disk
        done = subprocess.run(
            [sys.executable, "-c", FRESH.format(in_capture=in_capture)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        built.append(sorted(path.name for path in (tmp_path / "kernels").iterdir()))
    assert built[0] and built[0] == built[1], built


# --- promise 9: hostile input ---------------------------------------------------------------------------------


def test_without_validation_bad_numbers_are_clamped() -> None:
    """Out-of-range lengths, sequences and block ids neither crash nor disturb the good rows."""
    lens, ids = [100, 100, 100, 100, 2500], [0, 0, 1, 1, 2]
    problem = make_problem([100, 100, 2500], **MXFP4, valid_lens=lens, seq_ids=ids).to(DEVICE)
    want, dense = AUTO.selected(problem), AUTO.dense(problem)
    problem.valid_lens[1:3] = ints([2**31 - 1, -5])
    problem.seq_ids[2:4] = ints([-(2**31), 2**31 - 1])
    problem.cache.view.block_table[1, 0] = 10**9
    problem.cache.view.block_table[1, 1] = -7
    view = problem.cache.view
    for validate in (None, False):
        for output, limit in (("entry", view.max_entries), ("slot", view.num_blocks * 64)):
            indices, scores = AUTO.selected(problem, validate=validate, output=output)
            assert_same_bits(scores[[0, 4]], want[1][[0, 4]], "scores of the good rows")
            if output == "entry":
                assert_same_bits(indices[[0, 4]], want[0][[0, 4]], "indices of the good rows")
            assert (indices[2] == -1).all() and (scores[2] == -torch.inf).all()
            assert ((indices >= -1) & (indices < limit)).all(), f"{output}: {indices.aminmax()}"
    scores = AUTO.dense(problem, out=torch.zeros(5, view.max_entries, device=DEVICE))
    for t, length in ((0, 100), (4, 2500)):
        assert_same_bits(scores[t, :length], dense[t, :length], f"dense scores of row {t}")


def test_int64_sequence_ids_out_of_range_are_clamped() -> None:
    problem = make_problem([100, 100], **MXFP4, valid_lens=[100, 100, 50], seq_ids=[0, 0, 1]).to(DEVICE)
    want = AUTO.selected(problem)
    bad = torch.tensor([-(2**40), 0, 2**32], device=DEVICE)  # the last one is 0 in 32 bits
    assert_same_selection(AUTO.selected(replace(problem, seq_ids=bad)), want, "clamped to the first and the last")


BAD_NUMBERS = {
    "lens-too-long": (lambda p: p.valid_lens.fill_(100_000), "valid_lens 100000"),
    "lens-negative": (lambda p: p.valid_lens.fill_(-10), "valid_lens -10"),
    "seqs-too-large": (lambda p: p.seq_ids.fill_(2), "seq_ids 0..1 2"),
    "seqs-negative": (lambda p: p.seq_ids.fill_(-1), "seq_ids 0..1 -1"),
    "block-too-large": (lambda p: p.cache.view.block_table[0, :1].fill_(99), "block_table[0] 99"),
    "block-negative": (lambda p: p.cache.view.block_table[0, :1].fill_(-1), "block_table[0] -1"),
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_validation_finds_bad_numbers(name: str) -> None:
    spoil, words = BAD_NUMBERS[name]
    problem = make_problem([100, 100], **MXFP4).to(DEVICE)
    spoil(problem)
    given = outputs(problem, 50)
    with pytest.raises(ValueError) as caught:
        AUTO.selected(problem, **given, validate=True)
    assert all(word in str(caught.value) for word in ["score_topk", *words.split()]), str(caught.value)
    assert (given["out"] == -77).all() and given["scores_out"].isnan().all(), "written before the check"


def test_unused_slots_and_stale_blocks_never_show(engine: Engine) -> None:
    """Other bytes in every place that means nothing, and other stale ids in the table, change no bit."""
    rng = np.random.default_rng(0)
    for shape in EACH_FORMAT.values():
        problem = make_problem([300, 70, 2050], **shape, valid_lens=[290, 70, 2050, 17], seq_ids=[0, 1, 2, 0])
        want = (engine.dense(problem.to(DEVICE)), *engine.selected(problem.to(DEVICE)))
        view = problem.cache.view
        per_block, used = view.schema.entries_per_block, torch.zeros(view.num_blocks, 256, dtype=torch.bool)
        for seq_id, length in enumerate((290, 70, 2050)):
            for entry in range(length):
                used[view.block_table[seq_id, entry // per_block], entry % per_block] = True
            view.block_table[seq_id, -(-length // per_block) :] = int(rng.integers(0, view.num_blocks))
        unused = ~used[:, :per_block]
        for rows in (view.data_rows, view.scale_rows):
            noise = torch.from_numpy(rng.integers(0, 256, rows.shape, np.uint8))
            rows[unused] = noise[unused]
        got = (engine.dense(problem.to(DEVICE)), *engine.selected(problem.to(DEVICE)))
        for g, w in zip(got, want, strict=True):
            assert_same_bits(g, w, f"{shape['format']}, other bytes in unused places")


# --- promise 10: large pools ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_pools_past_4_gib(engine: Engine, format: str) -> None:
    """The blocks of a small pool, moved to places around 2 and 4 GiB and to the end of a large one."""
    size = 5 * GIB
    if torch.cuda.mem_get_info()[0] < size + 2 * GIB:
        pytest.skip(f"needs {size // GIB + 2} GiB of free GPU memory")
    problem = make_problem([1000, 70], **EACH_FORMAT[format], valid_lens=[1000, 990, 70], seq_ids=[0, 0, 1])
    view = problem.cache.view
    stride = view.schema.stride
    num_blocks = size // stride
    corners = [0, 2 * GIB // stride - 3, 4 * GIB // stride - 3, num_blocks - 6]
    places = torch.tensor([corner + i for i in range(6) for corner in corners])[-view.num_blocks :]
    storage = torch.full((num_blocks, stride), POISON, dtype=torch.uint8, device=DEVICE)
    storage[places, : view.schema.payload_bytes] = view.storage.to(DEVICE)
    table = view.block_table
    table = torch.where((table >= 0) & (table < view.num_blocks), places[table.clamp(0, view.num_blocks - 1)], table)
    moved = replace(view, storage=storage, block_table=table.int().to(DEVICE))
    small = problem.to(DEVICE)
    large = replace(small, cache=replace(problem.cache, view=moved))
    assert_same_results(engine, large, small, "in a pool of 5 GiB")
    engine.check(large, 300, output="slot")


def test_a_table_wider_than_the_pool(engine: Engine) -> None:
    """2^22 addressable entries, of which a row sees a few: nothing is read from the rest of the table."""
    problem = make_problem([100, 70], **MXFP4)
    view = problem.cache.view
    wide = torch.full((2, 2**16), 2**31 - 1, dtype=torch.int32)
    wide[:, : view.block_table.shape[1]] = view.block_table
    problem = replace(problem, cache=replace(problem.cache, view=replace(view, block_table=wide))).to(DEVICE)
    engine.check(problem, 64)


# --- streams, threads, devices --------------------------------------------------------------------------------


def test_streams_work_side_by_side(engine: Engine) -> None:
    """Each with its own workspace; a launch on the wrong stream would overtake the copies before it."""
    seeds = range(6)
    problems = [graph_problem("mxfp4", seed, seed % 2 == 0).to(DEVICE) for seed in seeds]
    want, given = [engine.selected(p, 512) for p in problems], [outputs(p, 512) for p in problems]
    blank = [[torch.zeros_like(x) for x in tensors_of(p)[:2]] for p in problems]
    torch.cuda.synchronize()
    for problem, tensors, zeros in zip(problems, given, blank, strict=True):
        with torch.cuda.stream(torch.cuda.Stream()):
            queries = tensors_of(problem)[:2]
            saved = [x.clone() for x in queries]
            for x, zero in zip(queries, zeros, strict=True):
                x.copy_(zero)
            torch.cuda._sleep(2_000_000)
            for x, value in zip(queries, saved, strict=True):
                x.copy_(value)
            for _ in range(5):
                engine.selected(problem, 512, **tensors)
            for x in (*saved, *zeros):
                x.record_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    for seed, tensors, expected in zip(seeds, given, want, strict=True):
        assert_same_selection((tensors["out"], tensors["scores_out"]), expected, f"stream {seed}")


def test_threads(engine: Engine) -> None:
    problems = [graph_problem("mxfp4", seed, True).to(DEVICE) for seed in range(4)]
    want, got = [engine.selected(p) for p in problems], [None] * len(problems)
    torch.cuda.synchronize()

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = engine.selected(problems[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g is not None, f"thread {i} raised"
        assert_same_selection(g, w, f"thread {i}")


def test_a_device_that_is_not_the_current_one(engine: Engine) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = make_problem([3000], **MXFP4, valid_lens=[3000, 7], seq_ids=[0, 0])
    want = engine.selected(problem.to("cuda:0"))
    got = engine.selected(problem.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_same_selection(got, want, "cuda:1")


# --- wrong implementations ------------------------------------------------------------------------------------


def last_partial_block_lost(right: Callable, q, weights, view, valid_lens, seq_ids, **options) -> None:
    per_block = view.schema.entries_per_block
    right(q, weights, view, valid_lens // per_block * per_block, seq_ids, **options)


def one_entry_too_many(right: Callable, q, weights, view, valid_lens, seq_ids, **options) -> None:
    right(q, weights, view, valid_lens + (valid_lens > 0).int(), seq_ids, **options)


def length_of_the_group(right: Callable, q, weights, view, valid_lens, seq_ids, **options) -> None:
    """Every query of a sequence sees what the longest one sees."""
    longest = torch.stack([valid_lens[seq_ids == s].max() for s in seq_ids]) if len(seq_ids) else valid_lens
    right(q, weights, view, longest, seq_ids, **options)


def weights_of_the_next_query(right: Callable, q, weights, view, valid_lens, seq_ids, **options) -> None:
    right(q, weights.roll(-1, 0), view, valid_lens, seq_ids, **options)


def last_eight_heads_lost(right: Callable, q, weights, view, valid_lens, seq_ids, **options) -> None:
    weights = weights.clone()
    weights[:, -8:] = 0
    right(q, weights, view, valid_lens, seq_ids, **options)


def one_kept_too_few(right: Callable, *args, out, scores_out, **options) -> None:
    right(*args, out=out, scores_out=scores_out, **options)
    out[:, -1] = -1
    if scores_out is not None:
        scores_out[:, -1] = -torch.inf


def tail_is_0(right: Callable, *args, out, **options) -> None:
    right(*args, out=out, **options)
    out.clamp_min_(0)


def order_is_always_by_index(right: Callable, *args, by_score, **options) -> None:
    right(*args, by_score=False, **options)


def output_is_always_the_entry(right: Callable, *args, as_slots, **options) -> None:
    right(*args, as_slots=False, **options)


def ties_to_the_larger_index(right: Callable, q, weights, view, valid_lens, seq_ids, **options) -> None:
    """Each sequence backwards, its indices turned round again: all is right but the ties."""
    scores = index_scores(q, weights, view, valid_lens=valid_lens, seq_ids=seq_ids)
    number = torch.where(scores.isnan(), -torch.inf, scores)
    best = number.flip(1).argsort(dim=1, descending=True, stable=True)
    best = torch.nn.functional.pad(scores.shape[1] - 1 - best, (0, options["out"].shape[1]), value=2**31)
    best = best.masked_fill(best >= valid_lens.unsqueeze(1), 2**31)
    best = best.gather(1, (best == 2**31).int().argsort(dim=1, stable=True))[:, : options["out"].shape[1]]
    if not options["by_score"]:
        best = best.sort(dim=1).values
    best = best.masked_fill(best == 2**31, -1)
    kept = torch.nn.functional.pad(number, (0, 1)).gather(1, best.clamp_min(0)).masked_fill(best < 0, -torch.inf)
    options["out"].copy_(view.slots(seq_ids, best) if options["as_slots"] else best)
    options["scores_out"].copy_(kept)


def nothing(right: Callable, *args, out, scores_out, **options) -> None:
    out.fill_(-1)
    if scores_out is not None:
        scores_out.fill_(-torch.inf)


WRONG = [
    last_partial_block_lost,
    one_entry_too_many,
    length_of_the_group,
    weights_of_the_next_query,
    last_eight_heads_lost,
    one_kept_too_few,
    tail_is_0,
    order_is_always_by_index,
    output_is_always_the_entry,
    ties_to_the_larger_index,
    nothing,
]


def rejected_cases(monkeypatch: pytest.MonkeyPatch, wrong: Callable) -> list[str]:
    """The cases that fail by assertion with `wrong` in place of the CUDA implementation."""
    monkeypatch.setattr(cuda, "score_topk", functools.partial(wrong, cuda.score_topk))
    rejected = []
    for name in TOPK_CASES:
        try:
            check_case(AUTO, name)
        except AssertionError:
            rejected.append(name)
    return rejected


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_wrong_selection_is_rejected(wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rejected_cases(monkeypatch, wrong), f"no case notices {wrong.__name__}"


def test_a_wrapper_that_changes_nothing_is_not_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rejected_cases(monkeypatch, lambda right, *args, **options: right(*args, **options)) == []
