"""Context parallel: who holds what, and selections over real processes that equal the selection without shards.

Processes talk over gloo. One group of each size runs every case; each rank must end with the bits of the whole.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from cases import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from ranks import TOP_KS, run_ranks
from sharded import CASES, LAYOUTS, torchrun
from torch import Tensor

from lightning_indexer import (
    ContiguousShard,
    IndexerView,
    InterleavedShard,
    merge_topk,
    score_topk,
)
from lightning_indexer.ops.shard import INT32_MAX, Shard

ROOT = Path(__file__).parent.parent


def ints(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- who holds what ---------------------------------------------------------------------------------------------


def check_shards(shards: list[Shard], owners: list[int]) -> None:
    """Entry s lies on rank owners[s] alone, and every rank numbers what it holds in the order of the sequence."""
    count = len(owners)
    for rank, shard in enumerate(shards):
        held = [s for s in range(count) if owners[s] == rank]
        lens = shard.local_valid_lens(torch.arange(count + 1, dtype=torch.int32))
        assert lens.tolist() == [sum(s < n for s in held) for n in range(count + 1)], f"lengths on rank {rank}"
        local = shard.local_indices(torch.arange(-1, count, dtype=torch.int32).unsqueeze(0))
        want = [-1] + [held.index(s) if owners[s] == rank else -1 for s in range(count)]
        assert local.tolist() == [want], f"local indices on rank {rank}"
        numbers = torch.arange(-1, len(held), dtype=torch.int32).unsqueeze(0)
        assert shard.global_indices(numbers).tolist() == [[-1, *held]], f"global indices on rank {rank}"
        assert lens.dtype == local.dtype == shard.global_indices(numbers).dtype == torch.int32


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 120))
def test_interleaved_shards_deal_out_runs_in_turn(ranks: int, interleave: int, count: int) -> None:
    turns = [rank for _ in range(count) for rank in range(ranks) for _ in range(interleave)][:count]
    check_shards([InterleavedShard(rank, ranks, interleave) for rank in range(ranks)], turns)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9))
def test_contiguous_shards_may_have_any_size(sizes: list[int]) -> None:
    bounds = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    owners = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    check_shards([ContiguousShard(*bounds[rank : rank + 2]) for rank in range(len(sizes))], owners)


def test_contiguous_bounds_per_query() -> None:
    shard = ContiguousShard(ints(0, 10, 5), ints(4, 10, INT32_MAX))
    assert shard.local_valid_lens(ints(9, 9, 9)).tolist() == [4, 0, 4]
    assert shard.global_indices(ints([0, -1], [-1, -1], [3, 0])).tolist() == [[0, -1], [-1, -1], [8, 5]]
    assert shard.local_indices(ints([3, 4], [9, 10], [4, 5])).tolist() == [[3, -1], [-1, -1], [-1, 0]]
    growing = ContiguousShard(ints(4, 6), INT32_MAX)
    assert growing.local_valid_lens(ints(3, 8)).tolist() == [0, 2]


@pytest.mark.parametrize("shard", [InterleavedShard(1, 2, 2**30 - 1), ContiguousShard(2**30, INT32_MAX)], ids=str)
def test_the_largest_numbers(shard: Shard) -> None:
    last = 2**31 - 4  # of the entries that both hold
    local = shard.local_indices(ints([last]))
    assert local.item() == last - (2**30 - 1 if isinstance(shard, InterleavedShard) else 2**30)
    assert shard.global_indices(local).item() == last
    assert shard.local_valid_lens(ints(last + 1)).item() == local.item() + 1


def test_nothing_to_number() -> None:
    for shard in (InterleavedShard(1, 3, 2), ContiguousShard(4, 4), ContiguousShard(ints(), ints())):
        assert shard.local_valid_lens(ints()).shape == (0,)
        empty = torch.empty(0, 5, dtype=torch.int32)
        assert shard.global_indices(empty).shape == shard.local_indices(empty).shape == (0, 5)


SHARD = InterleavedShard(0, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: InterleavedShard(2, 2), ValueError, ["InterleavedShard", "rank", "0..1", "2"]),
        (lambda: InterleavedShard(0, 0), ValueError, ["num_ranks", "0"]),
        (lambda: InterleavedShard(0, 2, 0), ValueError, ["interleave", "0"]),
        (lambda: InterleavedShard(0, 2, 2**30), ValueError, ["num_ranks * interleave", str(2**31)]),
        (lambda: ContiguousShard(5, 4), ValueError, ["ContiguousShard", "start", "5", "4"]),
        (lambda: ContiguousShard(-1, 4), ValueError, ["start", "-1"]),
        (lambda: ContiguousShard(0, 4.0), ValueError, ["stop", "int", "4.0"]),
        (lambda: ContiguousShard(ints(0, 3), ints(1, 2)), ValueError, ["start", "stop", "3", "2"]),
        (lambda: ContiguousShard(ints(0, 3), ints(1)), ValueError, ["start", "stop", "[2]", "[1]"]),
        (lambda: ContiguousShard(ints(0).long(), 3), TypeError, ["start", "int32", "int64"]),
        (lambda: SHARD.local_valid_lens(ints(1).long()), TypeError, ["local_valid_lens", "int32", "int64"]),
        (lambda: SHARD.local_valid_lens(ints(3, -2)), ValueError, ["valid_lens", "-2"]),
        (lambda: SHARD.global_indices(ints(1)), ValueError, ["global_indices", "[T, n]", "[1]"]),
        (lambda: SHARD.local_indices(ints([-2])), ValueError, ["local_indices", "indices", "-2"]),
        (lambda: ContiguousShard(ints(0), 9).global_indices(ints([1], [2])), ValueError, ["start", "[2]", "[1]"]),
    ],
)
def test_shard_errors(call, error, words) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- without processes ------------------------------------------------------------------------------------------


@functools.cache
def whole(case: str, top_k: int) -> tuple[Tensor, Tensor]:
    return CASES[case].whole(top_k)


def assert_whole(got: tuple[Tensor, Tensor], case: str, top_k: int, what: str) -> None:
    for name, g, w in zip(("indices", "scores"), got, whole(case, top_k), strict=True):
        assert_same_bits(g, w, f"{name}, {case}, k = {top_k}, {what}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_three_shards_merged_here(case: str, layout: str) -> None:
    for top_k in TOP_KS:
        assert_whole(CASES[case].merged_here(LAYOUTS[layout], 3, top_k), case, top_k, layout)


def test_plateaus_lie_across_shards() -> None:
    """Or ties would not be tested: the k-th and the (k+1)-th best of the longest row have equal scores."""
    for case in ("fp8-plateaus", "mxfp4-plateaus", "bf16-all-equal"):
        scores = whole(case, 300)[1][0]
        assert scores[15] == scores[16], scores[:20]
        assert whole(case, 300)[0][0, 15] // 16 != whole(case, 300)[0][0, 16 + 20] // 16, "and lie in several blocks"


def test_a_rank_without_blocks() -> None:
    """Storage of 0 blocks, and a block table without columns."""
    sequences = CASES["mxfp4"]
    view = sequences.view(LAYOUTS["round-robin"], 0, 1)
    nothing = IndexerView(view.storage[:0], view.schema, view.block_table[:, :0])
    seq_ids, valid_lens, _ = sequences.rows()
    lens = ContiguousShard(0, 0).local_valid_lens(valid_lens)
    options = {"top_k": 16, "valid_lens": lens, "seq_ids": seq_ids, "return_scores": True}
    empty = score_topk(*sequences.query(), nothing, **options)
    everything = sequences.candidates(LAYOUTS["round-robin"], 0, 1, 16)
    got = merge_topk(*(torch.cat(pair, dim=1) for pair in zip(empty, everything, strict=True)), top_k=16)
    assert_whole(got, "mxfp4", 16, "beside a rank without blocks")


def test_merge_into_given_memory() -> None:
    indices, scores = CASES["mxfp4"].candidates(LAYOUTS["round-robin"], 0, 1, 16)
    out, scores_out = torch.full((7, 32), -9, dtype=torch.int32), torch.full((7, 32), 9.0)
    got = merge_topk(indices, scores, top_k=16, out=out[:, ::2], scores_out=scores_out[:, :16])
    assert got[0].data_ptr() == out.data_ptr() and got[1].data_ptr() == scores_out.data_ptr()
    assert_whole((out[:, ::2], scores_out[:, :16]), "mxfp4", 16, "into given memory")
    assert (out[:, 1::2] == -9).all() and (scores_out[:, 16:] == 9).all(), "memory beside it was written"
    assert_whole(merge_topk(indices, scores, top_k=16, impl="reference"), "mxfp4", 16, "by the reference")
    again = merge_topk(indices, scores, top_k=16, out=indices, scores_out=scores)
    assert_whole(again, "mxfp4", 16, "into its own input")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"out": torch.zeros(1, 3, dtype=torch.int32)}, ValueError, ["out", "[1, 2]", "[1, 3]"]),
        ({"out": torch.zeros(1, 2)}, TypeError, ["out", "int32", "float32"]),
        ({"scores_out": torch.zeros(2, 2)}, ValueError, ["scores_out", "[1, 2]", "[2, 2]"]),
        ({"impl": "cuda"}, NotImplementedError, ["impl='cuda'", "cpu", "reference"]),
    ],
)
def test_merge_errors(options, error, words) -> None:
    with pytest.raises(error) as caught:
        merge_topk(ints([3, 4, 5]), torch.zeros(1, 3), top_k=2, **options)
    assert all(word in str(caught.value) for word in ["merge_topk", *words]), str(caught.value)


# --- with processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_gets_the_selection_of_the_whole(ranks: int, tmp_path: Path) -> None:
    for rank, results in enumerate(run_ranks(ranks, tmp_path, "cpu")):
        for (case, layout, top_k), got in results.items():
            assert_whole(got, case, top_k, f"{layout}, rank {rank} of {ranks}")


# --- the benchmark -----------------------------------------------------------------------------------------------


def test_benchmark_checks_and_times(tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    arguments = ("--quick", "--device", "cpu", "--repeats", "2", "--output", str(output))
    printed = torchrun(ROOT / "benchmarks/context_parallel.py", *arguments)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    layouts = {record["layout"]: record["local_entries"] for record in records if record["num_seqs"] == 1}
    assert layouts == {
        "contiguous": [3000, 3000],
        "contiguous-uneven": [2000, 4000],
        "contiguous-first-empty": [0, 6000],
        "round-robin": [3000, 3000],
        "interleaved-64": [3008, 2992],
    }
    assert len(records) == 10 and all(f"{record['case']} {record['layout']}" in printed for record in records)
    for record in records:
        assert (record["world_size"], record["backend"], record["device"] != "") == (2, "gloo", True)
        assert list(record["eager_us"]) == ["whole", "local", "exchange", "merge", "together"]
        assert all(spread["median"] > 0 and spread["repeats"] == 2 for spread in record["eager_us"].values())
