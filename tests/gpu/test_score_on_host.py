"""The CUDA kernels of score_topk and index_scores, compiled by a host compiler and run there thread by thread.

Selections are held against the dense scores of the same kernels, and those against float64: the layouts of keys,
queries and products, the division of work among blocks, feeding, selection and merging. Warps are scheduled at random
and copies land late (host_cuda.h), so a barrier that is missing shows as a wrong result or a deadlock, with some luck.
It needs a C++ compiler and glibc, nothing of CUDA.
"""

import ctypes
import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import (
    LOW_CODES,
    Problem,
    adversarial_row,
    check_scores,
    check_topk,
    make_lists,
    make_problem,
    problem_with_scores,
    with_low_codes,
)
from engines import call_of
from on_host import COMPILER, HERE, OPTIONS, HostKernel, needs_compiler
from torch import Tensor

from lightning_indexer import reference
from lightning_indexer.cuda import score_topk as cuda
from lightning_indexer.cuda.compiler import KERNEL_FOLDER, Specialisation
from lightning_indexer.ops import select_candidates

BLOCKS = 3  # multiprocessors of the imaginary GPU
pytestmark = needs_compiler


@dataclass(frozen=True)
class Case:
    """Queries of `valid_lens` entries each on one sequence (or `seq_ids`), for one architecture."""

    format: str
    query_format: str
    arch: str
    valid_lens: tuple[int, ...]
    seq_ids: tuple[int, ...] = ()
    num_heads: int = 8
    head_dim: int = 64
    entries_per_block: int = 64
    top_k: int = 100
    blocks: int = BLOCKS
    num_candidates: int = 0
    candidate_entries: int = 8

    def problem(self, seed: int = 0) -> Problem:
        seq_ids = self.seq_ids or (0,) * len(self.valid_lens)
        lens = [
            max(n for n, s in zip(self.valid_lens, seq_ids, strict=True) if s == seq) for seq in range(max(seq_ids) + 1)
        ]
        return make_problem(
            lens,
            format=self.format,
            query_format=self.query_format,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            entries_per_block=self.entries_per_block,
            valid_lens=self.valid_lens,
            seq_ids=seq_ids,
            seed=seed,
        )

    def __str__(self) -> str:
        shape = f"h{self.num_heads}-d{self.head_dim}-block{self.entries_per_block}-k{self.top_k}"
        listed = f"-from{self.num_candidates}x{self.candidate_entries}" if self.num_candidates else ""
        lens = f"{len(self.valid_lens)}x{max(self.valid_lens)}"
        return f"{self.format}-{self.query_format}-{self.arch}-{lens}-{shape}{listed}"


# One query over a sequence that all blocks share; a long chunk in groups of sixteen, whose lists run full; drafts; rows
# of several sequences, one of them empty; two bf16 terms; many parts; many sequences after one another in a block; the
# portable engine in both arithmetics; a k of which the merge holds little more than two; lists in the workspace that
# run full in a short call.
CASES = [
    Case("mxfp4", "mxfp4", "sm_90a", (12_000,)),
    Case("mxfp4", "fp8", "sm_90a", tuple(range(2400, 2420)), num_heads=16, blocks=2, top_k=300),
    Case("nvfp4", "nvfp4", "sm_90a", (500, 501, 130, 131), (1, 1, 0, 0), num_heads=24, entries_per_block=16),
    Case("fp8", "fp8", "sm_90a", (300, 0, 65), (0, 1, 2), head_dim=128, entries_per_block=256),
    Case("bf16", "fp32", "sm_90a", (4000, 3999, 3990) * 2, (0, 0, 0, 1, 1, 1), top_k=300, blocks=7),
    Case("mxfp4", "mxfp4", "sm_80", (700, 64, 0), (0, 1, 1), entries_per_block=48),
    Case("mxfp4", "mxfp4", "sm_90a", (9000,), num_heads=12, blocks=40),
    Case("mxfp4", "mxfp4", "sm_90a", (700, 900, 640, 800) * 4, tuple(range(16)), blocks=2),
    Case("mxfp4", "mxfp4", "sm_89", (9000,), blocks=7),
    Case("mxfp4", "mxfp4", "sm_86", (14_000, 13_000), top_k=3000),
    Case("mxfp4", "mxfp4", "sm_90a", (5000, 5000), (0, 1)),
]
IN_E4M3, IN_BF16 = CASES[0], CASES[5]  # what mxfp4 keys are turned into
# Lists of blocks: one long one that all blocks of threads share; drafts of two sequences; pages of 48 entries, whose
# blocks of sixteen begin at any of three places; more room than there are blocks; one block; lists that run full.
LISTED = [
    Case("mxfp4", "mxfp4", "sm_90a", (12_000,), num_candidates=700),
    Case("nvfp4", "nvfp4", "sm_90a", (500, 501, 130, 131, 0), (1, 1, 0, 0, 1), num_heads=24, num_candidates=9),
    Case("fp8", "fp8", "sm_90a", (300, 0, 65), (0, 1, 2), head_dim=128, num_candidates=40),
    Case("bf16", "fp32", "sm_90a", (4001, 3999) * 2, (0, 0, 1, 1), top_k=300, num_candidates=300, blocks=7),
    Case("mxfp4", "mxfp4", "sm_80", (700, 641, 0), (0, 1, 1), 8, 64, 48, num_candidates=30, candidate_entries=16),
    Case("mxfp4", "mxfp4", "sm_80", (700, 641, 0), (0, 1, 1), entries_per_block=48, num_candidates=1),
    Case("mxfp4", "mxfp4", "sm_89", (9000, 8999), num_candidates=1100, blocks=7),
    Case("mxfp4", "mxfp4", "sm_90a", (17_000,), top_k=512, num_candidates=2048, blocks=1),
]
# A query of each sequence; several of one, which share a block; the same, split among blocks.
WIDE = [
    dataclasses.replace(IN_E4M3, valid_lens=valid_lens, seq_ids=seq_ids)
    for valid_lens in ((50, 64, 0), (9000, 64, 7000))
    for seq_ids in ((0, 1, 2), (0, 0, 0))
]
ADVERSARIAL = Case("bf16", "bf16", "sm_90a", (5000, 64, 1), (0, 1, 2), blocks=2)
HELD = dataclasses.replace(IN_E4M3, valid_lens=(12_000, 64, 1), seq_ids=(0, 1, 2), blocks=2)  # lists in shared memory
LISTED_ADVERSARIAL = dataclasses.replace(ADVERSARIAL, num_candidates=500)


class ScoringKernel(HostKernel):
    """One whose grid may have rows, and which may overlap the one before it."""

    overlaps = True

    def launch(self, grid: tuple[int, int, int], *arguments: float) -> None:
        x, y, z = grid
        assert x >= 1 and y >= 1 and z == 1, f"an empty or unexpected grid {grid}"
        self.run(x, y, arguments)


def specialisations(case: Case) -> list[Specialisation]:
    """What a case launches, dense scores included."""
    wanted: list[Specialisation] = []

    def load(specialisation: Specialisation, *_: object, **__: object) -> None:
        wanted.append(specialisation)

    problem = case.problem()
    lists = make_lists(problem, case.num_candidates) if case.num_candidates else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "load_kernel", load)
        patch.setattr(cuda, "device_arch", lambda _index: case.arch)
        patch.setattr(cuda, "_multiprocessors", lambda _index: case.blocks)
        cuda._plan.cache_clear()
        call_of(problem).plan(0, "auto")
        call_of(problem, lists).plan(case.top_k, "auto")
    cuda._plan.cache_clear()
    return wanted


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes._CFuncPtr]:
    """Every specialisation of the cases, by its expression; each a library of its own, compiled side by side."""
    folder = tmp_path_factory.mktemp("host")
    for path in KERNEL_FOLDER.iterdir():
        shutil.copy(path, folder)
    shutil.copy(HERE / "host_ptx.cuh", folder / "ptx.cuh")
    shutil.copy(HERE / "host_wgmma.cuh", folder / "wgmma.cuh")
    wanted = {
        s.expression: s.source
        for case in [*CASES, *LISTED, *WIDE, ADVERSARIAL, HELD, LISTED_ADVERSARIAL]
        for s in specialisations(case)
    }
    assert COMPILER is not None
    started = []
    for i, (expression, source) in enumerate(wanted.items()):
        (folder / f"{i}.cpp").write_text(
            '#include "host_cuda.h"\n'
            f'#include "{source}"\n'
            "using namespace lightning_indexer;\n"
            'extern "C" void launch_kernel(unsigned x, unsigned y, unsigned threads, void** arguments) '
            f"{{ host_cuda::launch({expression}, x, y, threads, arguments); }}\n"
        )
        command = [COMPILER, *OPTIONS, f"{i}.cpp", "-o", f"{i}.so"]
        started.append(subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True))
    for process in started:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-4000:]
    return {name: ctypes.CDLL(str(folder / f"{i}.so")).launch_kernel for i, name in enumerate(wanted)}


@pytest.fixture
def on_host(library: dict[str, ctypes._CFuncPtr], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the wrappers find the host's kernels."""

    def load(
        specialisation: Specialisation, _index: object, parameters: dict[str, str], **options: int
    ) -> ScoringKernel:
        return ScoringKernel(library[specialisation.expression], parameters, options["threads"])

    monkeypatch.setattr(cuda, "load_kernel", load)
    yield
    cuda._plan.cache_clear()


def run_dense(problem: Problem) -> Tensor:
    out = torch.full((len(problem.weights), int(problem.valid_lens.max())), torch.nan)
    cuda.index_scores(problem.q, problem.weights, problem.cache.view, problem.valid_lens, problem.seq_ids, out)
    return out


def run_topk(
    q: object,
    weights: Tensor,
    view: object,
    *,
    top_k: int,
    valid_lens: Tensor,
    seq_ids: Tensor,
    order: str,
    output: str,
    return_scores: bool,
    **lists: object,
) -> tuple[Tensor, Tensor]:
    indices, scores = torch.full((len(weights), top_k), -7, dtype=torch.int32), torch.full((len(weights), top_k), 7.0)
    workspace = torch.full((cuda.workspace_bytes.__wrapped__(top_k, None),), 255, dtype=torch.uint8)
    options = {"by_score": order == "score", "as_slots": output == "slot", **lists}
    cuda.score_topk(
        q, weights, view, valid_lens, seq_ids, **options, out=indices, scores_out=scores, workspace=workspace
    )
    return indices, scores


@pytest.fixture
def imagine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], None]:
    """Make the wrappers see the case's GPU."""

    def see(case: Case) -> None:
        monkeypatch.setattr(cuda, "device_arch", lambda _index: case.arch)
        monkeypatch.setattr(cuda, "_multiprocessors", lambda _index: case.blocks)
        cuda._plan.cache_clear()

    return see


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_is_the_stable_sort_of_dense_scores(case: Case, imagine: Callable[[Case], None]) -> None:
    imagine(case)
    problem = case.problem()
    dense = run_dense(problem)
    check_scores(dense, problem, 1e-5)
    for order, output in (("index", "entry"), ("score", "slot")):
        check_topk(run_topk, problem, case.top_k, order=order, output=output, dense=dense)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("case", LISTED, ids=str)
def test_selection_from_lists_is_the_stable_sort_of_what_they_name(case: Case, imagine: Callable[[Case], None]) -> None:
    imagine(case)
    problem = case.problem()
    dense = run_dense(problem)
    for order, output, most in (("index", "entry", None), ("score", "slot", 5)):
        lists = make_lists(problem, case.num_candidates, block_entries=case.candidate_entries, most=most)
        options = {"candidates": lists, "candidate_entries": case.candidate_entries}
        check_topk(run_topk, problem, case.top_k, order=order, output=output, dense=dense, **options)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("kind", ["all-zero", "sorted-up", "inf-and-nan"])
def test_adversarial_rows_from_lists(kind: str, imagine: Callable[[Case], None]) -> None:
    imagine(LISTED_ADVERSARIAL)
    problem = problem_with_scores([adversarial_row(kind, n) for n in (5000, 64, 1)], "bf16")
    dense, lists = run_dense(problem), make_lists(problem, 500)
    for top_k, order in ((1, "index"), (64, "score"), (500, "index")):
        check_topk(run_topk, problem, top_k, order=order, dense=dense, candidates=lists)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("room", [1, 2**40], ids=["a-query-at-a-time", "all-at-once"])
def test_blocks_are_those_of_dense_scores(
    room: int, imagine: Callable[[Case], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LISTED[2]
    imagine(case)
    problem = case.problem()
    monkeypatch.setattr(select_candidates, "_DENSE_BYTES", room)
    out = torch.full((len(problem.weights), 20), -7, dtype=torch.int32)
    rows = (problem.valid_lens, problem.seq_ids)
    select_candidates._from_dense(problem.q, problem.weights, problem.cache.view, *rows, 8, out)
    for t, (scores, length) in enumerate(zip(run_dense(problem), problem.valid_lens.tolist(), strict=True)):
        want = reference.select_blocks(scores, length, 20, 8)
        assert out[t].tolist() == want.tolist(), f"query {t} of length {length}"


@pytest.mark.usefixtures("on_host")
def test_ids_out_of_range_are_ignored(imagine: Callable[[Case], None]) -> None:
    case = LISTED[4]
    imagine(case)
    problem, outside = case.problem(), torch.iinfo(torch.int32)
    lists = torch.tensor([[0, 5, -1, outside.max, 9, outside.min, 13, 44, -2, 2**28]] * 3, dtype=torch.int32)
    options = {"candidates": lists, "candidate_entries": case.candidate_entries}
    check_topk(run_topk, problem, 200, dense=run_dense(problem), **options)


@pytest.mark.usefixtures("on_host")
def test_ids_that_repeat_give_entries_that_repeat(imagine: Callable[[Case], None]) -> None:
    """Far more ties than there are places: selection must come to an end, and write every place."""
    case = LISTED[6]
    imagine(case)
    problem = case.problem()
    lists = torch.full((2, case.num_candidates), 3, dtype=torch.int32)
    lists[1, 1::2] = 2
    for order in ("index", "score"):
        indices, _ = problem.call(
            run_topk, top_k=100, order=order, output="entry", return_scores=True, candidates=lists
        )
        assert set(indices[0].tolist()) <= set(range(24, 32)) and set(indices[1].tolist()) <= set(range(16, 32))


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("kind", ["all-zero", "zero-plateau", "last-bit", "sorted-up", "nan", "inf-and-nan"])
def test_adversarial_rows(kind: str, imagine: Callable[[Case], None]) -> None:
    """Lists run full of ties, of ever better scores, of NaN."""
    imagine(ADVERSARIAL)
    problem = problem_with_scores([adversarial_row(kind, n) for n in (5000, 64, 1)], "bf16")
    dense = run_dense(problem)
    for top_k, order in ((1, "index"), (64, "score"), (500, "index")):
        check_topk(run_topk, problem, top_k, order=order, dense=dense)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize(
    "kind", ["all-equal", "zero-plateau", "last-bit", "sorted-up", "sorted-down", "nan", "inf-and-nan", "all-negative"]
)
def test_adversarial_rows_whose_threshold_is_raised_meanwhile(kind: str, imagine: Callable[[Case], None]) -> None:
    """What raises it meets lists that run full, too."""
    imagine(HELD)
    problem = problem_with_scores([adversarial_row(kind, n) for n in HELD.valid_lens], "mxfp4")
    assert call_of(problem).plan(500, "auto").shape.holds_list
    dense = run_dense(problem)
    for top_k, order in ((1, "index"), (100, "score"), (500, "index")):
        check_topk(run_topk, problem, top_k, order=order, dense=dense)


@pytest.mark.usefixtures("on_host")
def test_infinities_of_both_signs(imagine: Callable[[Case], None]) -> None:
    """Keys from one end of their range to the other."""
    imagine(ADVERSARIAL)
    row = np.arange(3000, dtype=np.float32) % 7 - 3
    row[5::50], row[8::50] = 2.0**100, -(2.0**100)
    problem = problem_with_scores([row, row[:2000], row[:1]], "bf16", unit=2.0**60)
    dense = run_dense(problem)
    assert torch.isinf(dense[0, :3000]).sum() == 120
    for top_k in (1, 40, 500):
        check_topk(run_topk, problem, top_k, order="score", dense=dense)


@pytest.mark.usefixtures("on_host")
def test_the_best_lie_in_one_part(imagine: Callable[[Case], None]) -> None:
    """What a part leaves in front is a small share of the top k; where it holds them all, the merge reads on."""
    imagine(dataclasses.replace(ADVERSARIAL, blocks=40))
    row = np.random.default_rng(0).normal(size=9000).astype(np.float32)
    tiles, streams = -(-len(row) // 64), 31
    for position in range(8, 12):  # four tiles that are visited one after the other (`Walk` in kernels/work.cuh)
        stream, step = position % streams, position // streams
        tile = stream * (tiles // streams) + min(stream, tiles % streams) + step
        row[64 * tile : 64 * tile + 64] += 100
    problem = problem_with_scores([row], "bf16")
    dense = run_dense(problem)
    for top_k in (100, 200):
        check_topk(run_topk, problem, top_k, order="score", dense=dense)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_work_that_does_not_fit_32_bits(case: Case, imagine: Callable[[Case], None]) -> None:
    """Each block plans with 64 bits where a call of these shapes might need them, however short its sequences are."""
    imagine(case)
    problem = case.problem()
    cache = problem.cache
    wide = cache.view.block_table[:, :1].expand(-1, 2**30)  # each sequence has one block
    cache = dataclasses.replace(cache, view=dataclasses.replace(cache.view, block_table=wide))
    problem = dataclasses.replace(problem, cache=cache)
    assert 2 * 3 * cache.view.max_entries // 128 >= 2**31
    check_topk(run_topk, problem, case.top_k, order="index", dense=run_dense(problem))


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize(("mask", "scales"), LOW_CODES)
@pytest.mark.parametrize("case", [IN_E4M3, IN_BF16], ids=["e4m3", "bf16"])
def test_groups_of_low_codes(case: Case, mask: int, scales: tuple[int, int], imagine: Callable[[Case], None]) -> None:
    imagine(case)
    problem = with_low_codes(case.problem(), mask, scales)
    check_scores(run_dense(problem), problem, 1e-5)


def test_queries_may_begin_anywhere() -> None:
    """The kernel reads them in pieces of 16 bytes; a slice of a buffer need not start at one."""
    problem = IN_BF16.problem()
    data = problem.q.data
    memory = torch.empty(data.numel() + 1, dtype=torch.uint8)
    memory[1:] = data.flatten().view(torch.uint8)
    q = dataclasses.replace(problem.q, data=memory[1:].view(data.dtype).view(data.shape))
    assert q.data.is_contiguous() and q.data.data_ptr() % 16
    call = call_of(dataclasses.replace(problem, q=q))
    assert call.data.data_ptr() % 16 == 0 and torch.equal(call.data, data)
