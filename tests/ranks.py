"""Processes of one group that run the cases of context parallel, each on its shard: gloo on CPUs, NCCL on GPUs."""

import datetime
import itertools
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sharded import CASES, LAYOUTS, SECONDS
from torch import Tensor

from lightning_indexer import merge_topk

TOP_KS = [1, 16, 300]  # 300 is more than any sequence has
PROCESS_CASES = ["mxfp4", "fp8-plateaus"]


def run_ranks(ranks: int, folder: Path, device: str) -> list[dict[Any, Any]]:
    """What each rank ended with, by (case, layout, k)."""
    # eight imports of torch would take longer than the cases
    multiprocessing.set_forkserver_preload(["lightning_indexer"])
    arguments = (ranks, str(folder), device)
    context = mp.start_processes(_run_rank, arguments, nprocs=ranks, join=False, start_method="forkserver")
    try:
        until = time.monotonic() + SECONDS
        while not context.join(timeout=1):  # true when all have ended, and raises what a rank raised
            assert time.monotonic() < until, f"ranks did not finish in {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()
    results = [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(ranks)]
    for of_rank in results:
        assert [x.shape for x in of_rank.pop("no queries")] == [(0, 16)] * 2
        more = 2 if device == "cuda" else 1  # into given memory; from a graph
        assert len(of_rank) == len(PROCESS_CASES) * len(LAYOUTS) * len(TOP_KS) + more
    return results


def _run_rank(rank: int, ranks: int, folder: str, device: str) -> None:
    """Run every case on one rank and leave the results in a file."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    limit = datetime.timedelta(seconds=SECONDS)
    store = f"file://{folder}/store"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=ranks, timeout=limit)
    results = {}
    for case, layout, top_k in itertools.product(PROCESS_CASES, LAYOUTS, TOP_KS):
        candidates = CASES[case].candidates(LAYOUTS[layout], rank, ranks, top_k, device)
        results[case, layout, top_k] = merge_topk(*candidates, top_k=top_k, group=dist.group.WORLD)
    candidates = CASES["mxfp4"].candidates(LAYOUTS["round-robin"], rank, ranks, 16, device, order="index")
    out, scores_out = (torch.empty(7, 16, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32))
    for _ in range(3):
        out.fill_(-9), scores_out.fill_(9)
        columns = [x.t().contiguous().t() for x in candidates]  # laid out by column
        merge_topk(*columns, top_k=16, group=dist.group.WORLD, out=out, scores_out=scores_out)
        results["mxfp4", "repeatedly into given memory", 16] = (out.clone(), scores_out.clone())
    if device == "cuda":
        results["mxfp4", "from a graph", 16] = _from_a_graph(candidates, out, scores_out)
    nothing = [x[:0] for x in candidates]
    results["no queries"] = merge_topk(*nothing, top_k=16, group=dist.group.WORLD)
    others = dist.new_group([0])
    if rank:
        with pytest.raises(ValueError, match="merge_topk: group must contain this process"):
            merge_topk(*candidates, top_k=16, group=others)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _from_a_graph(candidates: tuple[Tensor, Tensor], out: Tensor, scores_out: Tensor) -> tuple[Tensor, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        merge_topk(*candidates, top_k=16, group=dist.group.WORLD, out=out, scores_out=scores_out)
    out.fill_(-9), scores_out.fill_(9)
    graph.replay()
    return out.clone(), scores_out.clone()
