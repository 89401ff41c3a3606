"""The CUDA kernels of compress_entries, compiled by a host compiler and run there thread by thread, against torch."""

import ctypes
from collections.abc import Iterator

import kernel_cases as cases
import pytest
import torch
from compress_cases import BATCHES, CASES, Batch, CompressCase, expected
from on_host import Library, compile_library, needs_compiler, take_host_kernels

from lightning_indexer.cuda import compress as cuda
from lightning_indexer.cuda.compiler import Specialisation

pytestmark = needs_compiler
NUMBERS = """
extern "C" void exponentials(const float* x, long count, float* y) {
  for (long i = 0; i < count; ++i) y[i] = exponential(x[i]);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return compile_library(tmp_path_factory.mktemp("host"), sorted(set(_specialisations()), key=str), NUMBERS)


def _specialisations() -> Iterator[Specialisation]:
    for case in CASES:
        yield cuda.specialisation(case.layout.schema, case.dtype, case.ratio, case.rotate, "sm_80")
        yield cuda.keep_specialisation(case.layout.dim, case.ratio, "sm_80")


@pytest.fixture(autouse=True)
def on_host(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    take_host_kernels(monkeypatch, library, cuda)
    cuda._keep_kernel.cache_clear()


def run(case: CompressCase, batch: Batch, seed: int = 0):
    problem = case.problem(batch, seed)
    values, gates, step, ring, view, slots = problem.arguments
    cuda.compress_entries(values, gates, step, ring.rows, view, slots, **problem.options)
    return problem


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bytes_are_those_of_the_torch_path(case: CompressCase) -> None:
    for batch in BATCHES[case.ratio]:
        run(case, batch).check(expected(case, batch), batch.name)


def test_inputs_of_any_strides_are_taken() -> None:
    """Values and gates from one product, tokens at odd addresses, channels apart, everything else strided."""
    case, batch = CASES[0], BATCHES[4][2]
    want, plain = expected(case, batch), case.problem(batch)
    both = torch.cat([plain.values, plain.gates], dim=1)
    odd = torch.zeros(both.numel() + 1)[1:].view(both.shape).copy_(both)
    halves = [whole.split(case.channels, dim=1) for whole in (both, odd, both.t().contiguous().t())]
    for name, (values, gates) in zip(("halves", "odd", "columns"), halves, strict=True):
        problem = case.problem(batch)
        options = {
            key: torch.stack([x, x], dim=-1)[..., 0] if isinstance(x, torch.Tensor) else x
            for key, x in problem.options.items()
        }
        slots = torch.stack([problem.slots, problem.slots], dim=-1).to(torch.int32)[:, 0]
        cuda.compress_entries(values, gates, problem.step, problem.ring.rows, problem.view, slots, **options)
        problem.check(want, name)


def test_nothing_to_do() -> None:
    case = CASES[0]
    for batch, what in ((Batch("empty", ((2, 5, 0),)), "no tokens"), (Batch("none", ((2, 5, 1),)), "no entry")):
        problem = run(case, batch)
        problem.check(expected(case, batch), what)
        assert (cases.whole_memory(problem.view) == cases.POISON).all(), what
    problem = case.problem(BATCHES[4][0])
    view = case.layout.view(0)
    before = problem.ring.rows.clone()
    slots = torch.full_like(problem.slots, -1)
    cuda.compress_entries(
        problem.values, problem.gates, problem.step, problem.ring.rows, view, slots, **problem.options
    )
    assert not torch.equal(problem.ring.rows, before), "tokens are kept where nothing is written"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (CompressCase(cases.Layout("bf16", 256)), r"entries must have \(64, 128, 512\) dims, got 256"),
        (
            CompressCase(cases.Layout("bf16", 512), rotate=True),
            r"entries with the Hadamard rotation must have \(64, 128\) dims",
        ),
        (CompressCase(cases.Layout("bf16", 512), ratio=16), r"ape must be \[4, 1024\] or \[128, 512\] .* \[16, 512\]"),
    ],
    ids=["256-dims", "hadamard-512", "ratio-16"],
)
def test_what_the_kernels_lack_is_refused(case: CompressCase, words: str) -> None:
    problem = case.problem(Batch("one", ((2, 15, 1),)))
    values, gates, step, ring, view, slots = problem.arguments
    with pytest.raises(NotImplementedError, match=f"compress_entries: on a GPU {words}"):
        cuda.compress_entries(values, gates, step, ring.rows, view, slots, **problem.options)


def test_exponentials_are_fp64_rounded(library: Library) -> None:
    wide = -torch.exp2(torch.rand(300_000) * 40 - 32)
    usual = -torch.rand(300_000) * 30
    bits = torch.randint(-(2**31), 0, (300_000,)).to(torch.int32).view(torch.float32)
    x = torch.cat([wide, usual, bits, torch.tensor([0.0, -0.0, -1e-45, -103.97, -104.0, -3.4e38, -torch.inf])])
    got = torch.empty_like(x)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, got))
    first, last = pointers
    library.loaded.exponentials(first, ctypes.c_long(len(x)), last)
    want = x.double().exp().float()
    bad = ((got.view(torch.int32) != want.view(torch.int32)) & ~(got.isnan() & want.isnan())).nonzero()
    assert not len(bad), f"{len(bad)} of {len(x)}, first of {x[bad[0]].item()!r}: {got[bad[0]].item()!r}"
