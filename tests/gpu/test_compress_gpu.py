"""compress_entries on a GPU against the torch path on the CPU, byte for byte, and a layer that uses it."""

from types import SimpleNamespace

import kernel_cases
import pytest
import torch
from compress_cases import BATCHES, CASES, Batch, CompressCase, Problem, expected
from test_layer import CSA, HCA, random_weights, tiny_config
from torch import Tensor

from lightning_indexer import Compressor, LayerCacheHandle
from lightning_indexer.ops.compress import compress_entries

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


def run(problem: Problem, impl: str = "cuda") -> Problem:
    compress_entries(*problem.arguments, **problem.options, impl=impl)
    return problem


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bytes_are_those_of_the_cpu(case: CompressCase) -> None:
    for batch in BATCHES[case.ratio]:
        for seed in range(3):
            run(case.problem(batch, seed, "cuda")).check(expected(case, batch, seed), f"{batch.name}, seed {seed}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_torch_path_on_a_gpu_gives_the_same(case: CompressCase) -> None:
    for batch in BATCHES[case.ratio]:
        run(case.problem(batch, device="cuda"), "reference").check(expected(case, batch), batch.name)


@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[8], CASES[11]], ids=str)
def test_many_entries(case: CompressCase) -> None:
    """More blocks than fit on a GPU at a time, and twenty repeats."""
    tokens = 5_000 if case.ratio == 4 else 25_000
    batch = Batch("long", ((4, 0, tokens), (2, 3, tokens // 5)))
    want = expected(case, batch)
    for repeat in range(20):
        run(case.problem(batch, device="cuda")).check(want, f"repeat {repeat}")


def test_inputs_of_any_strides_are_taken() -> None:
    case, batch = CASES[0], BATCHES[4][2]
    want, plain = expected(case, batch), case.problem(batch, device="cuda")
    both = torch.cat([plain.values, plain.gates], dim=1)
    odd = torch.zeros(both.numel() + 1, device="cuda")[1:].view(both.shape).copy_(both)
    halves = [whole.split(case.channels, dim=1) for whole in (both, odd, both.t().contiguous().t())]
    for name, (values, gates) in zip(("halves", "odd", "columns"), halves, strict=True):
        problem = case.problem(batch, device="cuda")
        problem.values, problem.gates, problem.slots = values, gates, problem.slots.to(torch.int32)
        problem.options = {
            key: torch.stack([x, x], dim=-1)[..., 0] if isinstance(x, Tensor) else x
            for key, x in problem.options.items()
        }
        run(problem).check(want, name)


def test_nothing_to_do() -> None:
    case = CASES[0]
    for batch in (Batch("empty", ((2, 5, 0),)), Batch("no-entry", ((2, 5, 1),))):
        problem = run(case.problem(batch, device="cuda"))
        problem.check(expected(case, batch), batch.name)
        assert (kernel_cases.whole_memory(problem.view) == kernel_cases.POISON).all(), batch.name


@pytest.mark.parametrize("case", [CASES[0], CASES[11]], ids=str)
def test_a_graph_follows_its_inputs_and_nothing_waits(case: CompressCase) -> None:
    """Steps of the same counts, whose sequences stand elsewhere: other entries come about, or none."""
    first, size = BATCHES[case.ratio][0], len(BATCHES[case.ratio][0].sequences)
    problem = run(case.problem(first, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(problem)
    for seed in range(1, 5):
        moved = Batch("moved", tuple((i, case.ratio * (i + seed) - 1 - (i + seed) % 2, 1) for i in range(size)))
        other = case.problem(moved, seed, "cuda")
        for mine, given in ((problem.values, other.values), (problem.gates, other.gates), (problem.slots, other.slots)):
            mine.copy_(given)
        copy_step(problem.step, other.step)
        problem.ring.rows.copy_(other.ring.rows)
        problem.view.storage.fill_(kernel_cases.POISON)
        graph.replay()
        problem.check(expected(case, moved, seed), f"replay {seed}")


def copy_step(mine: SimpleNamespace, given: SimpleNamespace) -> None:
    for name, value in vars(given).items():
        if isinstance(value, Tensor):
            getattr(mine, name).copy_(value)


@pytest.mark.parametrize("layer", [CSA, HCA], ids=["ratio4", "ratio128"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_compressor_writes_what_it_returns(layer: int, dtype: torch.dtype) -> None:
    """`write` (the kernels) and `forward` (torch) on the same GPU share their projections: the same bytes."""
    config = tiny_config()
    weights = {n.removeprefix("compressor."): w for n, w in random_weights(config, layer).items() if "compressor." in n}
    compressor = Compressor(config, layer, dim=config.head_dim)
    compressor.load_weights({name: w for name, w in weights.items() if not name.startswith("indexer.")})
    compressor.to("cuda")
    options = {"num_blocks": 64, "entries_per_block": 16, "kv_format": "fp8_ds_mla", "dtype": dtype, "device": "cuda"}
    caches = [LayerCacheHandle(config, layer, max_seqs=3, **options) for _ in range(2)]
    for cache in caches:
        for seq_id in range(3):
            cache.alloc(seq_id)
    for seq_ids, counts in (([0, 2], [300, 37]), ([2, 1, 0], [1, 1, 1]), ([1, 0], [2, 211]), ([0], [3])):
        x = torch.randn(sum(counts), config.hidden_size).to("cuda", dtype)
        for cache in caches:
            step = cache.begin_step(seq_ids, counts)
            if cache is caches[0]:
                compressor.write(x, cache, "kv")
            else:
                cache.append(compressor(x, step, cache.compressor_state), "kv")
        assert torch.equal(caches[0].kv_pool.storage, caches[1].kv_pool.storage), counts
        assert torch.equal(caches[0].compressor_state.rows, caches[1].compressor_state.rows), counts
