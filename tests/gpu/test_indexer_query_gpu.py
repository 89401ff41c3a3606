"""indexer_query on a GPU against the torch path on the CPU, byte for byte, and against the torch path on the GPU."""

from collections.abc import Iterator

import pytest
import torch
from query_cases import CASES, QueryCase, assert_same_query
from torch import Tensor

from lightning_indexer import QuantizedQuery
from lightning_indexer.cuda import indexer_query as cuda
from lightning_indexer.ops.indexer_query import indexer_query
from lightning_indexer.rotary import apply_rope, rope_frequencies

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
MODEL = CASES[0]


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """torch raises where an operator waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.cuda() for x in inputs]


def bytes_of(result: tuple[Tensor | QuantizedQuery, Tensor]) -> list[Tensor]:
    query, weights = result
    parts = [query.data, query.scale] if isinstance(query, QuantizedQuery) else [query]
    return [part.contiguous().view(torch.uint8).clone() for part in (*parts, weights)]


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bytes_are_those_of_the_cpu(case: QueryCase, num_tokens: int) -> None:
    inputs = case.inputs(num_tokens)
    got = indexer_query(*on_gpu(inputs), **case.options)
    assert got[1].is_cuda
    assert_same_query(got, case.expected(*inputs), f"{num_tokens} tokens")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_torch_path_on_a_gpu_gives_the_same(case: QueryCase) -> None:
    inputs = case.inputs(17)
    got = indexer_query(*on_gpu(inputs), **case.options, impl="reference")
    assert_same_query(got, case.expected(*inputs), "reference")


def test_sines_are_the_same_everywhere() -> None:
    """Of every position of the longest context: vectors of one 1 show cosine and sine themselves.

    fp64's own last bit may differ and decide a rounding to fp32: of one value in some 2^28.
    """
    frequencies = rope_frequencies(64, 160_000.0, yarn_factor=16.0)
    positions = torch.arange(2**20)
    ones = torch.tensor([1.0, 0.0]).repeat(2**20, 1, 32)
    options = {"format": None, "rotate": False, "weight_scale": 1.0}
    weights = torch.zeros(2**20, 1, device="cuda")
    different = 0
    for start in range(0, 2**20, 2**17):
        part = slice(start, start + 2**17)
        rows = torch.cat([torch.zeros(2**17, 1, 64), ones[part]], dim=-1)
        got, _ = indexer_query(rows.cuda(), weights[part], positions[part].cuda(), frequencies.cuda(), **options)
        want = apply_rope(ones[part], positions[part], frequencies)
        different += int((got[..., 64:].cpu() != want).sum())
        torch_path = apply_rope(ones[part].cuda(), positions[part].cuda(), frequencies.cuda())
        different += int((torch_path.cpu() != want).sum())
    assert different <= 4, f"{different} of {2 * 2**26} values differ"


def test_inputs_of_any_strides_are_taken() -> None:
    q, weights, positions, frequencies = MODEL.inputs(5)
    want = MODEL.expected(q, weights, positions, frequencies)
    q = q.cuda()
    wide = torch.zeros(5, 128, 192, dtype=q.dtype, device="cuda")[:, ::2, 64:].copy_(q)
    columns = q.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.zeros(q.numel() + 1, dtype=q.dtype, device="cuda")[1:].view(q.shape).copy_(q)
    others = [torch.stack([x, x], dim=-1).cuda()[..., 0] for x in (weights, positions, frequencies)]
    for name, given in (("apart", wide), ("columns", columns), ("odd", odd)):
        assert_same_query(indexer_query(given, *others, **MODEL.options), want, name)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8", None])
def test_no_tokens(format: str | None) -> None:
    q, weights, positions, frequencies = on_gpu(MODEL.inputs(1))
    options = {**MODEL.options, "format": format}
    query, scaled = indexer_query(q[:0], weights[:0], positions[:0], frequencies, **options)
    assert query.shape == (0, 64, 128) and scaled.shape == (0, 64)


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_twenty_repeats_and_other_batches_are_bitwise_equal(case: QueryCase) -> None:
    inputs = on_gpu(case.inputs(100))
    first = bytes_of(indexer_query(*inputs, **case.options))
    for _ in range(20):
        for mine, theirs in zip(bytes_of(indexer_query(*inputs, **case.options)), first, strict=True):
            assert torch.equal(mine, theirs)
    alone = bytes_of(indexer_query(*(x[40:41] for x in inputs[:3]), inputs[3], **case.options))
    for mine, theirs in zip(alone, first, strict=True):
        assert torch.equal(mine, theirs[40:41]), "token 40 depends on its batch"


def test_more_rows_than_2_gib() -> None:
    """64-bit offsets: the last tokens of 2.5 GiB of queries."""
    num_tokens = 5 * 2**29 // (64 * 128 * 2)
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    q, weights, positions, frequencies = MODEL.inputs(8)
    repeats = num_tokens // 8
    given = [x.cuda().repeat(repeats, *[1] * (x.ndim - 1)) for x in (q, weights, positions)]
    query, scaled = indexer_query(*given, frequencies.cuda(), format=None, rotate=True, weight_scale=2.0)
    want, want_scaled = indexer_query(q, weights, positions, frequencies, format=None, rotate=True, weight_scale=2.0)
    assert_same_query((query[-8:], scaled[-8:]), (want, want_scaled), "the last tokens")


@pytest.mark.usefixtures("no_waiting")
def test_a_graph_follows_its_inputs_and_nothing_waits() -> None:
    torch.cuda.set_sync_debug_mode("default")
    inputs = on_gpu(MODEL.inputs(16))
    indexer_query(*inputs, **MODEL.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = indexer_query(*inputs, **MODEL.options)
    for seed in range(1, 4):
        others = MODEL.inputs(16, seed)
        for mine, given in zip(inputs, others, strict=True):
            mine.copy_(given)
        graph.replay()
        assert_same_query(got, MODEL.expected(*others), f"replay {seed}")
    torch.cuda.set_sync_debug_mode("error")
    indexer_query(*inputs, **MODEL.options)


def test_a_head_dim_that_the_kernel_lacks_is_refused() -> None:
    q, weights = torch.zeros(1, 8, 32, device="cuda"), torch.zeros(1, 8, device="cuda")
    frequencies, options = rope_frequencies(16, 1e4, device="cuda"), {"rotate": True, "weight_scale": 1.0}
    with pytest.raises(NotImplementedError, match=r"on a GPU head_dim must be one of \(64, 128\), got 32"):
        cuda.indexer_query(q, weights, torch.zeros(1, device="cuda").long(), frequencies, format=None, **options)
