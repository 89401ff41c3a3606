"""The operators that torch knows, on a GPU: as `test_torch_library.py`, and streams, devices and CUDA graphs."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from test_torch_library import (
    SAMPLES,
    TOP_K,
    Step,
    addresses,
    append_and_score,
    assert_same,
    assert_same_step,
    check_nothing_is_copied,
    decode_step,
    given,
    make_step,
    samples,
)
from torch import Tensor
from torch._dynamo.utils import counters

from lightning_indexer import append_entries, compute_valid_lens, gather_kv, score_topk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@functools.cache
def samples_here() -> dict[str, tuple[Callable, tuple]]:
    return samples(DEVICE)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(*samples_here()[name])


@pytest.mark.parametrize(
    ("format", "query_format", "kv_format"),
    [
        ("mxfp4", "mxfp4", "fp8_ds_mla"),
        ("nvfp4", "nvfp4", "bf16"),
        ("fp8", "fp8", "fp8_ds_mla"),
        ("bf16", None, "bf16"),
    ],
)
def test_a_compiled_step(format: str, query_format: str | None, kv_format: str) -> None:
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, make_step(format, kv_format, device=DEVICE), query_format)


def test_a_step_compiled_by_the_default_backend() -> None:
    """A plain query: what the compiler itself computes around the operators is then exact."""
    compiled = torch.compile(decode_step, fullgraph=True)
    for tokens in (5, 2, 33):
        assert_same_step(compiled, make_step(tokens=tokens, device=DEVICE), None)


def test_the_default_backend_copies_neither_the_pool_nor_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_nothing_is_copied(make_step(device=DEVICE), monkeypatch)


def test_nothing_is_allocated_by_gathering_and_appending() -> None:
    """Queries use rows of their own, for which the kernel needs no tensor."""
    step = make_step(tokens=3, device=DEVICE)
    rows = torch.empty(3, 3, 512, dtype=torch.bfloat16, device=DEVICE)
    indices = torch.tensor([[5, -1, 0]] * 3, device=DEVICE)

    def run() -> None:
        gather_kv(step.kv, indices, out=rows)
        append_entries(step.new_keys, step.keys, step.slots)

    run()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert_same(rows, gather_kv(step.kv, indices, seq_ids=torch.arange(3, device=DEVICE)), "rows")


# --- streams and devices ------------------------------------------------------------------------------------------


def test_compiled_calls_run_on_the_current_stream() -> None:
    """Elsewhere they would overtake the copy that they have to wait for."""
    compiled, step = torch.compile(append_and_score, fullgraph=True, backend="aot_eager"), make_step(device=DEVICE)
    want = append_and_score(step.copy(), given(5, DEVICE))
    compiled(step.copy(), given(5, DEVICE))
    late, outputs = step.copy(), given(5, DEVICE)
    keys, entries = late.keys.storage.clone(), late.new_keys.clone()
    late.keys.storage.zero_()
    late.new_keys = torch.zeros_like(entries)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.keys.storage.copy_(keys)
        late.new_keys.copy_(entries)
        got = compiled(late, outputs)
    torch.cuda.synchronize()
    assert_same(got, want, "indices")


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    for run in (decode_step, compiled):
        assert_same_step(run, make_step(device="cuda:1"), None)
        assert torch.cuda.current_device() == 0


# --- CUDA graphs --------------------------------------------------------------------------------------------------


def select_and_gather(step: Step) -> tuple[Tensor, Tensor]:
    lens = compute_valid_lens(step.seq_ids, 16)
    indices = score_topk(step.q, step.weights, step.keys, top_k=TOP_K, valid_lens=lens, seq_ids=step.seq_ids)
    return indices, gather_kv(step.kv, indices, seq_ids=step.seq_ids)


def append_select_and_gather(step: Step) -> tuple[Tensor, Tensor]:
    append_entries(step.new_keys, step.keys, step.slots)
    append_entries(step.new_kv, step.kv, step.slots)
    return select_and_gather(step)


@pytest.mark.parametrize("run", [select_and_gather, append_select_and_gather], ids=lambda f: f.__name__)
def test_reduce_overhead_captures_a_graph(run: Callable) -> None:
    """Which follows its inputs. Pools have to be declared to stay where they are: torch copies other inputs."""
    step = make_step(device=DEVICE)
    for storage in (step.keys.storage, step.kv.storage):
        torch._dynamo.mark_static_address(storage)
    expected = step.copy()
    counters.clear()
    compiled = torch.compile(run, fullgraph=True, mode="reduce-overhead")
    for turn in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        got, want = [x.clone() for x in compiled(step)], run(expected)
        for name, a, b in zip(("indices", "rows"), got, want, strict=True):
            assert_same(a, b, f"{name}, turn {turn}")
        assert_same(step.keys.storage, expected.keys.storage, f"keys, turn {turn}")
        step.q.mul_(-1.5)
        step.slots.add_(3)
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_a_replay_runs_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `test_reduce_overhead_captures_a_graph` counts as a graph is one."""
    step = make_step(device=DEVICE)
    torch._dynamo.mark_static_address(step.keys.storage)
    outputs = given(5, DEVICE)
    for tensor in outputs.values():
        torch._dynamo.mark_static_address(tensor)
    compiled = torch.compile(append_and_score, fullgraph=True, mode="reduce-overhead")
    found = addresses(monkeypatch)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        compiled(step, outputs)
    calls = len(found["score"])
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        compiled(step, outputs)
    assert len(found["score"]) == calls
