"""indexer_query's CUDA kernel, compiled by a host compiler and run there thread by thread, against the torch path."""

import ctypes

import pytest
import torch
from on_host import Library, compile_library, needs_compiler, take_host_kernels
from query_cases import CASES, QueryCase, assert_same_query
from torch import Tensor

from lightning_indexer.cuda import indexer_query as cuda
from lightning_indexer.rotary import rope_frequencies

pytestmark = needs_compiler
NUMBERS = """
extern "C" void turn(const float* angles, long count, float* cos, float* sin) {
  for (long i = 0; i < count; ++i) {
    const Turn turn = turn_by(angles[i]);
    cos[i] = turn.cos, sin[i] = turn.sin;
  }
}
extern "C" void halve(const float* x, long count, unsigned short* bits) {
  for (long i = 0; i < count; ++i) bits[i] = round_to_half(x[i]);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    wanted = {
        cuda.specialisation(cuda._format(c.dtype, c.format), c.head_dim, c.dtype, c.rotate, "sm_80") for c in CASES
    }
    return compile_library(tmp_path_factory.mktemp("host"), sorted(wanted, key=str), NUMBERS)


@pytest.fixture(autouse=True)
def on_host(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    take_host_kernels(monkeypatch, library, cuda)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bytes_are_those_of_the_torch_path(case: QueryCase) -> None:
    for num_tokens in (1, 17):
        inputs = case.inputs(num_tokens)
        got = cuda.indexer_query(*inputs, **case.options)
        assert_same_query(got, case.expected(*inputs), f"{num_tokens} tokens")


def test_sines_are_fp64_rounded(library: Library) -> None:
    """Over all positions of the longest context, for both bases; and over angles of any size."""
    positions = torch.arange(0, 2**20, 97).float()
    tables = (rope_frequencies(64, 160_000.0, yarn_factor=16.0), rope_frequencies(64, 10_000.0))
    angles = torch.cat([(positions[:, None] * table).flatten() for table in tables])
    wide = torch.exp2(torch.rand(200_000) * 60 - 30)
    near_quarters = (torch.arange(1, 100_000).double() * torch.pi / 2).float()
    angles = torch.cat([angles, wide, near_quarters, torch.tensor([0.0, 1e-45, 2.0**-29])])
    cos, sin = torch.empty_like(angles), torch.empty_like(angles)
    library.loaded.turn(pointer(angles), ctypes.c_long(len(angles)), pointer(cos), pointer(sin))
    for name, got, want in (("cos", cos, angles.double().cos()), ("sin", sin, angles.double().sin())):
        bad = (got != want.float()).nonzero()
        assert not len(bad), f"{name} of {len(bad)} of {len(angles)} angles, first of {angles[bad[0]].item()!r}"


def test_rounding_to_fp16(library: Library) -> None:
    """Every fp16 number, the midpoints between neighbours, the floats beside all of these, and any other pattern."""
    numbers = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16)
    numbers = numbers[numbers.isfinite()].float().sort().values
    midpoints = torch.cat([(numbers[1:] + numbers[:-1]) / 2, torch.tensor([65520.0, -65520.0])])
    bits = torch.cat([numbers, midpoints]).view(torch.int32)
    others = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32)
    x = torch.cat([bits - 1, bits, bits + 1, others]).view(torch.float32)
    x = torch.cat([x[~x.isnan()], torch.tensor([torch.inf, -torch.inf, torch.nan])])
    got = torch.empty(len(x), dtype=torch.int16)
    library.loaded.halve(pointer(x), ctypes.c_long(len(x)), pointer(got))
    bad = ((got != x.half().view(torch.int16)) & ~x.isnan()).nonzero()
    assert not len(bad), f"{len(bad)} of {len(x)} differ, first {x[bad[0]].item()!r}: {got[bad[0]].item():#x}"
    assert got[-1:].view(torch.float16).isnan()


def test_inputs_of_any_strides_are_taken() -> None:
    """Tokens, heads and channels apart, rows at an odd address, everything else strided."""
    case = CASES[0]
    q, weights, positions, frequencies = case.inputs(5)
    want = case.expected(q, weights, positions, frequencies)
    wide = torch.zeros(5, 2 * case.num_heads, 192, dtype=q.dtype)[:, ::2, 64:].copy_(q)
    columns = q.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    others = tuple(torch.stack([x, x], dim=-1)[..., 0] for x in (weights, positions, frequencies))
    for name, given in (("apart", wide), ("columns", columns), ("odd", odd)):
        assert_same_query(cuda.indexer_query(given, *others, **case.options), want, name)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6], CASES[9], CASES[-1]], ids=str)
def test_nothing_else_is_written(case: QueryCase, monkeypatch: pytest.MonkeyPatch) -> None:
    guards: list[Tensor] = []
    empty = torch.empty

    def guarded(*shape: object, dtype: torch.dtype, device: torch.device) -> Tensor:
        plain = empty(*shape, dtype=dtype, device=device)
        memory = torch.full((plain.nbytes + 512,), 0xA5, dtype=torch.uint8)
        guards.append(memory)
        return memory[256:-256].view(dtype).view(plain.shape)

    inputs = case.inputs(3)
    monkeypatch.setattr(torch, "empty", guarded)
    cuda.indexer_query(*inputs, **case.options)
    monkeypatch.undo()
    assert len(guards) == (2 if case.format is None else 3)
    for memory in guards:
        assert (memory[:256] == 0xA5).all() and (memory[-256:] == 0xA5).all(), f"{len(memory) - 512} bytes"


@pytest.mark.parametrize("shape", [(0, 64, 128), (3, 0, 128)], ids=["no-tokens", "no-heads"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8", None])
def test_empty_inputs_launch_nothing(format: str | None, shape: tuple[int, int, int]) -> None:
    q, weights = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape[:2])
    positions, options = torch.zeros(shape[0], dtype=torch.int64), {"rotate": True, "weight_scale": 1.0}
    got, scaled = cuda.indexer_query(q, weights, positions, rope_frequencies(64, 1e4), format=format, **options)
    assert got.shape == shape and scaled.shape == shape[:2] and scaled.dtype == torch.float32


def test_a_head_dim_that_the_kernel_lacks_is_refused() -> None:
    q, weights = torch.zeros(1, 8, 32), torch.zeros(1, 8)
    with pytest.raises(NotImplementedError, match=r"on a GPU head_dim must be one of \(64, 128\), got 32"):
        cuda.indexer_query(
            q, weights, torch.zeros(1).long(), rope_frequencies(16, 1e4), format=None, rotate=True, weight_scale=1.0
        )
