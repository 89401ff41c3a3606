"""append_entries and gather_kv on a GPU against the CPU implementation, byte for byte.

Both are called through their CUDA wrappers, so that this file tests the kernels and not the choice among them.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import kernel_cases as cases
import pytest
import torch

from lightning_indexer import CacheSchema, IndexerView, KVView, dequantize, quantize
from lightning_indexer.cuda import append, gather

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
GIB = 2**30


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """torch raises where an operator waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def to_gpu(view: KVView) -> torch.Tensor:
    """The storage with its distance between blocks, which `Tensor.cuda` would squeeze out."""
    storage = view.storage
    return torch.zeros(len(storage), view.schema.stride, dtype=torch.uint8, device="cuda")[:, : storage.shape[1]].copy_(
        storage
    )


def gather_on_gpu(case: cases.GatherCase, out: torch.Tensor) -> None:
    table = case.view.block_table
    spaced = torch.zeros(table.shape[0], 2 * table.shape[1], dtype=torch.int32, device="cuda")[:, ::2].copy_(table)
    view = KVView(to_gpu(case.view), case.layout.schema, spaced)
    gather.gather_kv(view, case.seq_ids.cuda(), case.indices.cuda(), out)


# --- bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
def test_append_writes_the_bytes_of_the_cpu(layout: cases.Layout, dtype: torch.dtype) -> None:
    """Guards, padding, unused slots and the bytes of skipped entries included."""
    count = 20_000 if layout.dim <= 128 else 5_000
    entries = cases.hostile_entries(count, layout.dim, dtype)
    for rounding in layout.roundings:
        for slot_dtype in (torch.int32, torch.int64):
            num_blocks = -(-count // layout.entries_per_block) + 2
            slots = cases.hostile_slots(count, num_blocks * layout.entries_per_block, slot_dtype)
            want = cases.appended(layout.view(num_blocks), entries, slots, rounding)
            view = layout.view(num_blocks, "cuda")
            append.append_entries(entries.cuda(), view, slots.cuda(), rounding)
            got = cases.whole_memory(view)
            if dtype != torch.bfloat16 or layout.format != "bf16":
                got, want = cases.settle_nans(got, layout), cases.settle_nans(want, layout)
            cases.assert_same_memory(got, want, layout, f"{rounding}, {slot_dtype}")


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 257])
@pytest.mark.parametrize("layout", [cases.Layout("mxfp4", 128), cases.Layout("fp8_ds_mla", 512)], ids=str)
def test_append_of_a_few_entries(layout: cases.Layout, count: int) -> None:
    entries, slots = cases.hostile_entries(count, layout.dim, torch.bfloat16), torch.randperm(6 * 64)[:count]
    want = cases.settle_nans(cases.appended(layout.view(6), entries, slots, "nearest_even"), layout)
    view = layout.view(6, "cuda")
    append.append_entries(entries.cuda(), view, slots.cuda(), "nearest_even")
    cases.assert_same_memory(cases.settle_nans(cases.whole_memory(view), layout), want, layout, f"{count} entries")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [x for x in cases.LAYOUTS if x.dim in (64, 128, 512)], ids=str)
def test_append_of_every_16_bit_pattern(layout: cases.Layout, dtype: torch.dtype) -> None:
    """Each pattern leads a row whose other values fix the scale."""
    patterns = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype).view(-1, 8)
    for fill in (0.0, 1.7, 448.0):
        entries = torch.full((len(patterns), layout.dim), fill, dtype=dtype)
        entries[:, :: layout.dim // 8] = patterns
        slots, num_blocks = torch.arange(len(entries)), -(-len(entries) // layout.entries_per_block)
        want = cases.appended(layout.view(num_blocks), entries, slots, "nearest_even")
        view = layout.view(num_blocks, "cuda")
        append.append_entries(entries.cuda(), view, slots.cuda(), "nearest_even")
        got = cases.whole_memory(view)
        if (layout.format, dtype) != ("bf16", torch.bfloat16):
            got, want = cases.settle_nans(got, layout), cases.settle_nans(want, layout)
        cases.assert_same_memory(got, want, layout, f"beside {fill}")


@pytest.mark.parametrize(
    ("format", "global_scale"),
    [("mxfp4", 1.0), ("nvfp4", 1.0), ("nvfp4", 2.0**-12), ("nvfp4", 2.0**39), ("nvfp4", 0.7)],
)
def test_append_rounds_every_quotient_as_the_cpu_does(format: str, global_scale: float) -> None:
    """On and beside every midpoint."""
    layout = cases.Layout(format, 128, global_scale=global_scale)
    entries = cases.fp4_quotients() * global_scale
    slots, num_blocks = torch.arange(len(entries)), -(-len(entries) // 64)
    want = cases.appended(layout.view(num_blocks), entries, slots, "nearest_even")
    view = layout.view(num_blocks, "cuda")
    append.append_entries(entries.cuda(), view, slots.cuda(), "nearest_even")
    cases.assert_same_memory(cases.whole_memory(view), want, layout, "quotients")


@pytest.mark.parametrize("shape", [(1, 1), (1, 512), (3, 5), (64, 512), (1000, 17)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("layout", cases.KV_LAYOUTS, ids=str)
def test_gather_reads_what_the_cpu_reads(
    layout: cases.Layout, index_dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Guards of `out` included."""
    num_tokens, top_k = shape
    case = cases.gather_case(layout, num_tokens, top_k, index_dtype)
    want = case.expected()
    out = torch.full((num_tokens + 2, top_k + 6, layout.dim), 7.0, dtype=want.dtype, device="cuda")
    inner = out[1:-1, 2:-4]
    gather_on_gpu(case, inner)
    cases.assert_same_rows(inner, want, "rows")
    inner.fill_(7.0)
    assert (out == 7.0).all(), "written outside `out`"


def test_gather_dequantises_every_code_with_every_scale() -> None:
    schema = CacheSchema("fp8_ds_mla", 256)
    storage = torch.zeros(1, schema.stride, dtype=torch.uint8)
    view = KVView(storage, schema, torch.zeros(1, 1, dtype=torch.int32))
    view.data_rows[0, :, :448] = torch.arange(448).to(torch.uint8)
    view.scale_rows[0, :, :7] = torch.arange(256).to(torch.uint8).unsqueeze(1)
    view.data_rows[0, :, 448:] = torch.arange(256 * 128).to(torch.int32).view(256, 128).to(torch.uint8)
    want = dequantize(view.data_rows[0], view.scale_rows[0], schema.format).to(torch.bfloat16)
    on_gpu = KVView(to_gpu(view), schema, view.block_table.cuda())
    out = torch.empty(1, 256, 512, dtype=torch.bfloat16, device="cuda")
    gather.gather_kv(on_gpu, None, torch.arange(256, device="cuda").unsqueeze(0), out)
    cases.assert_same_rows(out[0], want, "entry [scale byte, dim]")
    stored = view.data_rows[0, :, 448:].contiguous().view(torch.int16)
    assert torch.equal(out[0, :, 448:].cpu().view(torch.int16), stored), "the RoPE half is copied, NaN payloads too"


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5 * GIB], ids=["5GiB"])
def test_pools_past_4_gib(size: int) -> None:
    if torch.cuda.mem_get_info()[0] < size + 2 * GIB:
        pytest.skip(f"needs {size // GIB + 2} GiB of free GPU memory")
    for format, kind in (("mxfp4", IndexerView), ("fp8_ds_mla", KVView)):
        schema = CacheSchema(format)
        num_blocks = size // schema.stride
        table = torch.arange(num_blocks, dtype=torch.int32, device="cuda").unsqueeze(0)
        storage = torch.full((num_blocks, schema.stride), cases.POISON, dtype=torch.uint8, device="cuda")
        view = kind(storage, schema, table)
        corners = [
            0,
            2 * GIB // schema.stride,
            2 * GIB // schema.stride + 1,
            4 * GIB // schema.stride + 1,
            num_blocks - 1,
        ]
        slots = (torch.tensor(corners).unsqueeze(1) * 64 + torch.tensor([0, 1, 63])).flatten()
        entries = cases.hostile_entries(len(slots), schema.dim, torch.bfloat16).nan_to_num(1.0, 2.0, 3.0)
        data, scale = quantize(entries, format)
        append.append_entries(entries.cuda(), view, slots.cuda(), "nearest_even")
        for block in set(corners) | {block + 1 for block in corners[:-1]}:
            mine = (slots // 64 == block).nonzero().flatten()
            want_data = torch.full((64, schema.data_bytes), cases.POISON, dtype=torch.uint8)
            want_scale = torch.full((64, schema.scale_bytes), cases.POISON, dtype=torch.uint8)
            want_data[slots[mine] % 64], want_scale[slots[mine] % 64] = data[mine], scale[mine]
            assert torch.equal(view.data_rows[block].cpu(), want_data), f"{format}: data rows of block {block}"
            assert torch.equal(view.scale_rows[block].cpu(), want_scale), f"{format}: scale rows of block {block}"
        if isinstance(view, KVView):
            out = torch.empty(1, len(slots), 512, dtype=torch.bfloat16, device="cuda")
            gather.gather_kv(view, None, slots.unsqueeze(0).cuda(), out)
            cases.assert_same_rows(out[0], dequantize(data, scale, format).to(torch.bfloat16), "rows past 4 GiB")
        del storage, view


def test_outputs_past_4_gib() -> None:
    rows = 5 * GIB // 1024
    if torch.cuda.mem_get_info()[0] < 7 * GIB:
        pytest.skip("needs 7 GiB of free GPU memory")
    case = cases.gather_case(cases.Layout("fp8_ds_mla", 512), 1, 64, torch.int64)
    indices = case.indices.repeat(1, rows // 64).cuda()
    view = KVView(to_gpu(case.view), case.layout.schema, case.view.block_table.cuda())
    out = torch.empty(1, rows, 512, dtype=torch.bfloat16, device="cuda")
    gather.gather_kv(view, case.seq_ids.cuda(), indices, out)
    want = case.expected()[0]
    for start in (0, 2**21 - 64, 2**22 - 64, rows - 64):
        cases.assert_same_rows(out[0, start : start + 64], want, f"rows from {start}")


def test_storage_inside_a_slab() -> None:
    """Two layers interleaved: a block of one, then a block of the other."""
    layout = cases.Layout("mxfp4", 128)
    inner = layout.schema.stride
    schema = CacheSchema("mxfp4", 64, 2 * inner)
    slab = torch.full((8, 2, inner), cases.POISON, dtype=torch.uint8, device="cuda")
    entries, slots = cases.hostile_entries(512, 128, torch.bfloat16), torch.randperm(512)
    view = IndexerView(slab[:, 1], schema, torch.zeros(1, 1, dtype=torch.int32, device="cuda"))
    append.append_entries(entries.cuda(), view, slots.cuda(), "nearest_even")
    want = cases.appended(layout.view(8), entries, slots, "nearest_even")[4096:-4096].view(8, inner)
    assert torch.equal(slab[:, 1].cpu(), want) and (slab[:, 0] == cases.POISON).all()


def test_empty_inputs() -> None:
    layout = cases.Layout("mxfp4", 128)
    view = layout.view(2, "cuda")
    none = torch.zeros(0, dtype=torch.int64, device="cuda")
    append.append_entries(torch.zeros(0, 128, device="cuda"), view, none, "nearest_even")
    skipped = torch.full((5,), -1, device="cuda")
    append.append_entries(torch.zeros(5, 128, device="cuda"), view, skipped, "nearest_even")
    assert (cases.whole_memory(view) == cases.POISON).all()


# --- streams, graphs, threads, processes ----------------------------------------------------------------------


@pytest.mark.usefixtures("no_waiting")
def test_calls_do_not_wait() -> None:
    torch.cuda.set_sync_debug_mode("default")
    layout = cases.Layout("fp8_ds_mla", 512)
    view = layout.view(4, "cuda")
    entries, slots = torch.randn(100, 512, device="cuda"), torch.arange(100, device="cuda")
    out = torch.empty(1, 100, 512, dtype=torch.bfloat16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    append.append_entries(entries, view, slots, "nearest_even")
    gather.gather_kv(view, None, slots.unsqueeze(0) % 64, out)


def test_a_graph_follows_its_inputs() -> None:
    layout = cases.Layout("fp8_ds_mla", 512)
    table = torch.arange(8, dtype=torch.int32, device="cuda").unsqueeze(0)
    view = layout.view(8, "cuda", table)
    entries = torch.zeros(200, 512, dtype=torch.bfloat16, device="cuda")
    slots, out = torch.arange(200, device="cuda"), torch.empty(1, 200, 512, dtype=torch.bfloat16, device="cuda")
    append.append_entries(entries, view, slots, "nearest_even")
    gather.gather_kv(view, None, slots.unsqueeze(0), out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append.append_entries(entries, view, slots, "nearest_even")
        gather.gather_kv(view, None, slots.unsqueeze(0), out)
    for seed in range(3):
        given = cases.hostile_entries(200, 512, torch.bfloat16, seed)
        order = torch.randperm(512)[:200]
        entries.copy_(given)
        slots.copy_(order)
        graph.replay()
        want = dequantize(*quantize(given, "fp8_ds_mla"), "fp8_ds_mla").to(torch.bfloat16)
        cases.assert_same_rows(out[0], want, f"replay {seed}")


def test_streams_work_side_by_side() -> None:
    layout = cases.Layout("mxfp4", 128)
    work = []
    torch.cuda.synchronize()
    for seed in range(8):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            entries = cases.hostile_entries(5_000, 128, torch.float32, seed)
            view, slots = layout.view(80, "cuda"), torch.randperm(80 * 64)[:5_000]
            torch.cuda._sleep(2_000_000)  # the other streams overtake this one; a launch on the wrong stream shows
            on_gpu = entries.cuda(non_blocking=False), slots.cuda()
            for _ in range(5):
                append.append_entries(on_gpu[0], view, on_gpu[1], "nearest_even")
        work.append((view, entries, slots))
    torch.cuda.synchronize()
    for seed, (view, entries, slots) in enumerate(work):
        want = cases.appended(layout.view(80), entries, slots, "nearest_even")
        cases.assert_same_memory(cases.whole_memory(view), want, layout, f"stream {seed}")


def test_a_launch_is_ordered_on_its_stream() -> None:
    """The entries are made on a side stream after a long wait: a launch on any other stream would read zeros."""
    layout = cases.Layout("fp32", 128)
    view = layout.view(1, "cuda")
    entries, slots = torch.zeros(64, 128, device="cuda"), torch.arange(64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        entries.fill_(3.0)
        append.append_entries(entries, view, slots, "nearest_even")
        written = view.data_rows.clone()
    torch.cuda.synchronize()
    assert (written.view(torch.float32) == 3.0).all()


def test_threads_that_never_used_cuda() -> None:
    layout = cases.Layout("mxfp4", 128)
    entries, slots = cases.hostile_entries(64, 128, torch.bfloat16), torch.randperm(64)
    want = cases.appended(layout.view(1), entries, slots, "nearest_even")
    on_gpu = entries.cuda(), slots.cuda()
    views = [layout.view(1, "cuda") for _ in range(8)]
    torch.cuda.synchronize()
    arguments = [(on_gpu[0], view, on_gpu[1], "nearest_even") for view in views]
    threads = [threading.Thread(target=append.append_entries, args=given) for given in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for view in views:
        cases.assert_same_memory(cases.whole_memory(view), want, layout, "thread")


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layout = cases.Layout("mxfp4", 128)
    entries, slots = cases.hostile_entries(64, 128, torch.bfloat16), torch.randperm(64)
    want = cases.appended(layout.view(1), entries, slots, "nearest_even")
    view = layout.view(1, "cuda:1")
    append.append_entries(entries.to("cuda:1"), view, slots.to("cuda:1"), "nearest_even")
    assert torch.cuda.current_device() == 0
    cases.assert_same_memory(cases.whole_memory(view), want, layout, "cuda:1")


FRESH = """
import torch
import kernel_cases as cases
from lightning_indexer.cuda import append
layout = cases.Layout("mxfp4", 128)
entries, slots = cases.hostile_entries(64, 128, torch.bfloat16), torch.randperm(64)
view, on_gpu = layout.view(1, "cuda"), (entries.cuda(), slots.cuda())
torch.cuda.synchronize()
if {in_capture}:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append.append_entries(on_gpu[0], view, on_gpu[1], "nearest_even")
    graph.replay()
else:
    append.append_entries(on_gpu[0], view, on_gpu[1], "nearest_even")
want = cases.appended(layout.view(1), entries, slots, "nearest_even")
cases.assert_same_memory(cases.whole_memory(view), want, layout, "fresh process")
"""


@pytest.mark.parametrize("in_capture", [False, True], ids=["eager", "first-call-in-a-capture"])
def test_a_fresh_process_with_an_empty_kernel_cache(in_capture: bool, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "LIGHTNING_INDEXER_CACHE": str(tmp_path), "PYTHONPATH": paths}
    for _ in range(2):  # the second finds the kernel on disk
        done = subprocess.run(
            [sys.executable, "-c", FRESH.format(in_capture=in_capture)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    assert len(list((tmp_path / "kernels").iterdir())) == 1
