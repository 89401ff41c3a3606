"""One small call of every kernel, for compute-sanitizer; the results are checked too.

    compute-sanitizer --report-api-errors no --tool memcheck python tests/gpu/sanitize.py
    compute-sanitizer --report-api-errors no --tool racecheck python tests/gpu/sanitize.py --case portable-mxfp4-prefill

Tools: memcheck, initcheck, synccheck, and racecheck for all kernels but those of scoring. (API errors are left out:
cuda.bindings looks for functions that a driver may lack.) Set PYTORCH_NO_CUDA_MEMORY_CACHING=1 with memcheck and
initcheck: torch's caching allocator hides most reads and writes beyond a tensor. Build the kernels first, by a run
without the sanitizer.

racecheck does not follow a barrier of part of a block while the rest of it waits at another: it then reports races
between accesses that a later barrier of all threads separates. `--case partial-barrier` is a kernel of a few lines that
shows it; teams that select (score.cu) meet at such barriers.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

sys.path.insert(0, str(Path(__file__).parents[1]))  # E402 below: imports that need it

import compress_cases  # noqa: E402
import kernel_cases  # noqa: E402
import query_cases  # noqa: E402
from cases import POISON, Problem, check_scores, make_lists, make_problem  # noqa: E402
from engines import ENGINES, Engine, promised_error, rows_in_long_parts, workspace_bytes  # noqa: E402

from lightning_indexer import merge_topk  # noqa: E402
from lightning_indexer.cuda import append, gather, indexer_query  # noqa: E402
from lightning_indexer.ops.compress import compress_entries  # noqa: E402

DEVICE = "cuda"
FORMATS = {
    "mxfp4": {"format": "mxfp4", "num_heads": 64, "head_dim": 128},
    "nvfp4": {"format": "nvfp4", "num_heads": 8, "head_dim": 128, "entries_per_block": 16},
    "fp8": {"format": "fp8", "num_heads": 16, "head_dim": 128},
    "bf16": {"format": "bf16", "num_heads": 8, "head_dim": 64},
}
# name -> sequences, each query's sequence and length, k
SHAPES: dict[str, tuple[list[int], list[int], list[int], int]] = {
    "decode-split": ([5000], [0], [4999], 512),  # one query: its keys are split over the GPU
    "decode": ([700, 64, 0, 1300], [0, 1, 2, 3], [700, 63, 0, 1300], 65),
    "drafts": ([900, 70], [0, 0, 0, 1, 1], [898, 899, 900, 69, 70], 512),
    "prefill": ([600], [0] * 130, [600 - 3 * t for t in range(130)], 40),
    "prefill-beside-decode": ([300, 800, 5], [1, *[0] * 70, 2], [800, *range(70), 5], 300),
    "k-4096": ([4200], [0, 0], [4200, 100], 4096),
    "k-1": ([200], [0, 0, 0], [200, 1, 0], 1),
}
OTHER_OPERANDS = {
    "mxfp4-h128": {"format": "mxfp4", "num_heads": 128, "head_dim": 128},
    "mxfp4-h24-block48": {"format": "mxfp4", "num_heads": 24, "head_dim": 64, "entries_per_block": 48},
    "mxfp4-bf16-query": {**FORMATS["mxfp4"], "query_format": "bf16"},
    "mxfp4-fp32-query": {**FORMATS["mxfp4"], "query_format": "fp32"},
    "fp8-mxfp4-query": {**FORMATS["fp8"], "query_format": "mxfp4"},
    "bf16-h128-block256": {"format": "bf16", "num_heads": 128, "head_dim": 128, "entries_per_block": 256},
}


def append_case(layout: kernel_cases.Layout) -> None:
    entries, slots = kernel_cases.hostile_entries(300, layout.dim, torch.bfloat16), torch.randperm(400)[:300]
    num_blocks = -(-400 // layout.entries_per_block)
    want = kernel_cases.appended(layout.view(num_blocks), entries, slots, "nearest_even")
    view = layout.view(num_blocks, DEVICE)
    append.append_entries(entries.to(DEVICE), view, slots.to(DEVICE), "nearest_even")
    got = kernel_cases.settle_nans(kernel_cases.whole_memory(view), layout)
    kernel_cases.assert_same_memory(got, kernel_cases.settle_nans(want, layout), layout, "append")


def gather_case(layout: kernel_cases.Layout) -> None:
    case = kernel_cases.gather_case(layout, 7, 33, torch.int32)
    view = replace(case.view, storage=storage_on_gpu(case), block_table=case.view.block_table.to(DEVICE))
    out = torch.empty(7, 33, layout.dim, dtype=case.out_dtype, device=DEVICE)
    gather.gather_kv(view, case.seq_ids.to(DEVICE), case.indices.to(DEVICE), out)
    kernel_cases.assert_same_rows(out, case.expected(), "gather")


def merge_case(width: int, top_k: int) -> None:
    """Of three shards' candidates, some missing, with ties."""
    indices = torch.stack([torch.randperm(3 * width) for _ in range(3)]).int()
    indices[torch.rand(indices.shape) < 0.1] = -1
    scores = torch.randint(-9, 9, indices.shape).float()
    got = merge_topk(indices.to(DEVICE), scores.to(DEVICE), top_k=top_k)
    for g, w in zip(got, merge_topk(indices, scores, top_k=top_k), strict=True):
        assert torch.equal(g.cpu(), w), f"merge of 3 x {width}, k = {top_k}"


def storage_on_gpu(case: kernel_cases.GatherCase) -> torch.Tensor:
    """The storage of a case on the GPU, blocks as far apart."""
    storage, stride = case.view.storage, case.layout.schema.stride
    return torch.zeros(len(storage), stride, dtype=torch.uint8, device=DEVICE)[:, : storage.shape[1]].copy_(storage)


def query_case(case: query_cases.QueryCase) -> None:
    inputs = case.inputs(7)
    got = indexer_query.indexer_query(*(x.to(DEVICE) for x in inputs), **case.options)
    query_cases.assert_same_query(got, case.expected(*inputs), "query")


def compress_case(case: compress_cases.CompressCase, batch: compress_cases.Batch) -> None:
    problem = case.problem(batch, device=DEVICE)
    compress_entries(*problem.arguments, **problem.options)
    problem.check(compress_cases.expected(case, batch), "compress")


def scoring_case(engine: Engine, operands: dict, shape: str) -> None:
    """Dense scores against float64; selection in both orders, into memory of the caller's, against the dense scores."""
    lens, seq_ids, valid_lens, top_k = SHAPES[shape]
    problem: Problem = make_problem(lens, **operands, seq_ids=seq_ids, valid_lens=valid_lens)
    on_gpu = problem.to(DEVICE)
    scores = engine.dense(on_gpu)
    format = operands["format"]
    check_scores(scores, problem, promised_error(format, operands.get("query_format", format)))
    workspace = torch.full((workspace_bytes(on_gpu, top_k),), POISON, dtype=torch.uint8, device=DEVICE)
    engine.check(on_gpu, top_k, dense=scores, workspace=workspace)
    engine.check(on_gpu, top_k, dense=scores, workspace=workspace, order="score", output="slot")


def listed_case(engine: Engine, operands: dict, shape: str) -> None:
    """Selection from lists of blocks of eight entries."""
    lens, seq_ids, valid_lens, top_k = SHAPES[shape]
    problem = make_problem(lens, **operands, seq_ids=seq_ids, valid_lens=valid_lens).to(DEVICE)
    engine.check(problem, top_k, candidates=make_lists(problem, 300))


def long_parts(engine: Engine) -> None:
    """Lists that run full, and thresholds that rise meanwhile."""
    problem = rows_in_long_parts("sorted-up")
    engine.check(problem, 100, dense=engine.dense(problem))


def hostile_numbers() -> None:
    """Lengths, sequences and blocks out of range are clamped: memcheck sees a read outside."""
    problem = make_problem([100, 100], valid_lens=[100, 100, 100, 100], seq_ids=[0, 0, 1, 1]).to(DEVICE)
    problem.valid_lens[1:3] = torch.tensor([2**31 - 1, -5], dtype=torch.int32)
    problem.seq_ids[2:] = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)
    problem.cache.view.block_table[1] = torch.tensor([10**9, -7, 2**31 - 1, -(2**31)], dtype=torch.int32)
    for output in ("entry", "slot"):
        indices, _ = ENGINES["auto"].selected(problem, 50, output=output, validate=False)
        assert (indices >= -1).all() and (indices < problem.cache.view.num_blocks * 64).all(), indices.aminmax()


PARTIAL_BARRIER = r"""
template <int id, int threads> __device__ void meet() {
  asm volatile("barrier.sync.aligned %0, %1;" :: "n"(id), "n"(threads) : "memory");
}
extern "C" __global__ void partial_barrier(int* out) {
  __shared__ int value;
  int sum = 0;
  for (int i = 1; i <= 3; ++i) {
    if (threadIdx.x < 256) meet<1, 256>(), meet<1, 256>();
    meet<2, 384>();
    if (threadIdx.x == 0) value = i;
    meet<3, 384>();
    sum += value;
  }
  out[threadIdx.x] = sum;
}
"""


def partial_barrier() -> None:
    """No kernel of this library: what racecheck makes of one."""
    device = Device(torch.cuda.current_device())
    device.set_current()
    options = ProgramOptions(arch=f"sm_{device.arch}", std="c++17")
    kernel = Program(PARTIAL_BARRIER, "c++", options).compile("cubin").get_kernel("partial_barrier")
    out = torch.zeros(384, dtype=torch.int32, device=DEVICE)
    torch.cuda.synchronize()
    stream = device.create_stream()
    launch(stream, LaunchConfig(grid=1, block=384), kernel, out.data_ptr())
    stream.sync()
    assert (out == 6).all(), out


def all_cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for layout in kernel_cases.LAYOUTS:
        found[f"append-{layout}"] = lambda layout=layout: append_case(layout)
    for layout in kernel_cases.KV_LAYOUTS:
        found[f"gather-{layout}"] = lambda layout=layout: gather_case(layout)
    for width, top_k in ((40, 100), (512, 512), (4096, 2048)):
        found[f"merge-3x{width}-k{top_k}"] = lambda width=width, top_k=top_k: merge_case(width, top_k)
    for case in query_cases.CASES:
        found[f"query-{case}"] = lambda case=case: query_case(case)
    for case in compress_cases.CASES:
        for batch in compress_cases.BATCHES[case.ratio]:
            found[f"compress-{case}-{batch.name}"] = lambda c=case, b=batch: compress_case(c, b)
    for name, engine in ENGINES.items():
        chosen = [(key, operands, shape) for key, operands in FORMATS.items() for shape in SHAPES]
        chosen += [
            (key, operands, shape) for key, operands in OTHER_OPERANDS.items() for shape in ("decode", "prefill")
        ]
        for key, operands, shape in chosen:
            found[f"{name}-{key}-{shape}"] = lambda e=engine, o=operands, s=shape: scoring_case(e, o, s)
        found[f"{name}-mxfp4-long-parts"] = lambda e=engine: long_parts(e)
        for key, operands in FORMATS.items():
            for shape in ("decode-split", "prefill"):
                found[f"{name}-{key}-{shape}-listed"] = lambda e=engine, o=operands, s=shape: listed_case(e, o, s)
    found["auto-hostile-numbers"] = hostile_numbers
    found["partial-barrier"] = partial_barrier
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Run small calls of every kernel, for compute-sanitizer.")
    parser.add_argument("--case", action="append", help="run this one (may be repeated); default: all")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options, cases = parser.parse_args(), all_cases()
    if options.list:
        print("\n".join(cases))
        return
    for name in options.case or cases:
        if name not in cases:
            parser.error(f"no case {name!r}; --list prints them")
        torch.manual_seed(0)
        cases[name]()
        torch.cuda.synchronize()
        print(f"{name}: right", flush=True)


if __name__ == "__main__":
    main()
