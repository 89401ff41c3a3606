"""Context parallel on GPUs: shards on one device, and NCCL eagerly and in a CUDA graph.

What a process does with NCCL by itself runs everywhere; where there are two GPUs, so does one rank for each GPU.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import assert_same_bits
from ranks import TOP_KS, run_ranks
from sharded import CASES, LAYOUTS, Sequences, torchrun
from torch import Tensor

from lightning_indexer import ContiguousShard, InterleavedShard, merge_topk, score_topk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
several_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """This process alone, over NCCL."""
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], what: str) -> None:
    for name, g, w in zip(("indices", "scores"), got, want, strict=True):
        assert_same_bits(g, w, f"{name}, {what}")


@pytest.mark.parametrize("shard", [InterleavedShard(1, 3, 5), ContiguousShard(40, 90)], ids=str)
def test_shards_number_as_on_a_cpu(shard: InterleavedShard | ContiguousShard) -> None:
    numbers = torch.arange(-1, 200, dtype=torch.int32)
    device_numbers = numbers.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = (
            shard.local_valid_lens(device_numbers[1:]),
            shard.global_indices(device_numbers.unsqueeze(0)),
            shard.local_indices(device_numbers.unsqueeze(0)),
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows = numbers.unsqueeze(0)
    want = (shard.local_valid_lens(numbers[1:]), shard.global_indices(rows), shard.local_indices(rows))
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w, str(shard))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_shards_of_two_ranks_merged_on_one_device(case: str, layout: str) -> None:
    for top_k in TOP_KS:
        got = CASES[case].merged_here(LAYOUTS[layout], 2, top_k, "cuda")
        assert_same(got, CASES[case].whole(top_k, "cuda"), f"{case}, {layout}, k = {top_k}")


@pytest.mark.parametrize(
    ("width", "top_k"),
    [(0, 3), (1, 1), (40, 300), (512, 512), (4096, 512), (8192, 1024), (16_384, 2048), (20_000, 4096)],
)
def test_the_kernels_merge_as_torch_does(width: int, top_k: int) -> None:
    """Candidates of three shards side by side, in strided memory: ties, NaN, infinities, and some that are missing."""
    values = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.5, 1.5 + 2**-23], device="cuda")
    for draw in (torch.randn(5, width, device="cuda"), values[torch.randint(0, 7, (5, width), device="cuda")]):
        indices = torch.stack([torch.randperm(width, device="cuda") for _ in range(5)]).int()
        indices[torch.rand(5, width, device="cuda") < 0.2] = -1
        out = torch.full((5, 2 * top_k), -7, dtype=torch.int32, device="cuda")
        scores_out = torch.full((5, top_k + 1), 7.0, device="cuda")
        by_column = [x.t().contiguous().t() for x in (indices, draw)]
        merge_topk(*by_column, top_k=top_k, out=out[:, ::2], scores_out=scores_out[:, :top_k])
        want = merge_topk(indices, draw, top_k=top_k, impl="reference")
        assert_same((out[:, ::2], scores_out[:, :top_k]), want, f"{width} candidates, k = {top_k}")
        assert_same(merge_topk(indices.cpu(), draw.cpu(), top_k=top_k), want, "on a CPU")
        assert (out[:, 1::2] == -7).all() and (scores_out[:, top_k] == 7).all(), "written beside the outputs"


def test_more_than_the_kernel_keeps() -> None:
    indices, scores = (
        torch.arange(5000, dtype=torch.int32, device="cuda").unsqueeze(0),
        torch.ones(1, 5000, device="cuda"),
    )
    with pytest.raises(NotImplementedError, match="merge_topk: on a GPU top_k must be at most 4096, got 5000"):
        merge_topk(indices, scores, top_k=5000)
    assert torch.equal(merge_topk(indices, scores, top_k=5000, impl="reference")[0], indices)


@pytest.mark.parametrize("top_k", TOP_KS)
@pytest.mark.parametrize("case", CASES)
def test_nccl(case: str, top_k: int, group: dist.ProcessGroup) -> None:
    indices, scores = CASES[case].candidates(LAYOUTS["round-robin"], 0, 1, top_k, "cuda")
    by_column = [x.t().contiguous().t() for x in (indices, scores)]
    want = CASES[case].whole(top_k, "cuda")
    for candidates in ((indices, scores), by_column):
        assert_same(merge_topk(*candidates, top_k=top_k, group=group), want, f"{case}, k = {top_k}")


def test_nccl_without_queries(group: dist.ProcessGroup) -> None:
    nothing = torch.empty(0, 5, dtype=torch.int32, device="cuda"), torch.empty(0, 5, device="cuda")
    assert [x.shape for x in merge_topk(*nothing, top_k=3, group=group)] == [(0, 3)] * 2


def test_merging_does_not_wait_for_the_device(group: dist.ProcessGroup) -> None:
    candidates = CASES["mxfp4"].candidates(LAYOUTS["round-robin"], 0, 1, 16, "cuda")
    merge_topk(*candidates, top_k=16, group=group)  # the first call makes the communicator
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge_topk(*candidates, top_k=16, group=group)
        merge_topk(*candidates, top_k=16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_graph_follows_its_inputs(ranks: int, group: dist.ProcessGroup) -> None:
    """Selection on two shards, or on one with an exchange, and the merge; then other lengths in the same memory."""
    sequences, top_k = CASES["mxfp4-plateaus"], 16
    layout = LAYOUTS["interleaved-5"]
    query, (seq_ids, valid_lens, lens) = sequences.query("cuda"), sequences.rows("cuda")
    views = [sequences.view(layout, rank, ranks, "cuda") for rank in range(ranks)]
    out = torch.full((len(seq_ids), top_k), -9, dtype=torch.int32, device="cuda")
    scores_out = torch.full_like(out, 9, dtype=torch.float32)

    def step() -> None:
        parts = []
        for rank, view in enumerate(views):
            shard = layout(rank, ranks, lens)
            indices, scores = score_topk(
                *query,
                view,
                top_k=top_k,
                valid_lens=shard.local_valid_lens(valid_lens),
                seq_ids=seq_ids,
                return_scores=True,
            )
            parts.append((shard.global_indices(indices), scores))
        candidates = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        merge_topk(*candidates, top_k=top_k, group=group if ranks == 1 else None, out=out, scores_out=scores_out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    for shorter in (0, 3, 500):
        queries = tuple((seq_id, max(length - shorter, 0)) for seq_id, length in sequences.queries)
        other = Sequences(sequences.format, distinct_keys=sequences.distinct_keys, queries=queries)
        valid_lens.copy_(other.rows("cuda")[1])
        out.fill_(-9)
        graph.replay()
        assert_same((out, scores_out), other.whole(top_k, "cuda"), f"{shorter} entries shorter")


# --- a GPU for each rank -------------------------------------------------------------------------------------------


@several_gpus
def test_every_rank_gets_the_selection_of_the_whole(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count()
    for rank, results in enumerate(run_ranks(ranks, tmp_path, "cuda")):
        for (case, layout, top_k), got in results.items():
            want = [x.cpu() for x in CASES[case].whole(top_k, "cuda")]
            assert_same(got, want, f"{case}, {layout}, k = {top_k}, rank {rank} of {ranks}")


@several_gpus
def test_benchmark_checks_and_times(tmp_path: Path) -> None:
    """It times all steps, the exchange included, from CUDA graphs too."""
    output = tmp_path / "lines.jsonl"
    torchrun(ROOT / "benchmarks/context_parallel.py", "--quick", "--repeats", "2", "--output", str(output))
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 10
    for record in records:
        assert (record["world_size"], record["backend"]) == (2, "nccl")
        for mode in ("graph_us", "eager_us"):
            assert list(record[mode]) == ["whole", "local", "exchange", "merge", "together"]
            assert all(spread["median"] > 0 and spread["repeats"] == 2 for spread in record[mode].values())
