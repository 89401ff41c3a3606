"""The CUDA kernels of append_entries and gather_kv, compiled by a host compiler and run there thread by thread.

This holds the kernels' arithmetic and addressing, and the wrappers' choice of grid and arguments, against the CPU
implementation where there is no GPU. It needs a C++ compiler and glibc, nothing of CUDA.
"""

from collections.abc import Iterator

import kernel_cases as cases
import pytest
import torch
from on_host import Library, compile_library, needs_compiler, take_host_kernels

from lightning_indexer.cuda import append, gather
from lightning_indexer.cuda.compiler import Specialisation

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return compile_library(tmp_path_factory.mktemp("host"), _specialisations())


def _specialisations() -> Iterator[Specialisation]:
    for layout in cases.LAYOUTS:
        yield from append.specialisations(layout.schema, "sm_80")
    for layout in cases.KV_LAYOUTS:
        yield from gather.specialisations(layout.schema, "sm_80")


@pytest.fixture(autouse=True)
def on_host(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    take_host_kernels(monkeypatch, library, append, gather)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS, ids=str)
def test_append_writes_the_bytes_of_the_cpu(layout: cases.Layout, dtype: torch.dtype) -> None:
    """Guards, padding, unused slots and the bytes of skipped entries included."""
    count = 600 if layout.dim <= 128 else 150
    entries = cases.hostile_entries(count, layout.dim, dtype)
    for rounding in layout.roundings:
        for slot_dtype in (torch.int32, torch.int64):
            view = layout.view(-(-count // layout.entries_per_block) + 2)
            num_slots = view.num_blocks * layout.entries_per_block
            slots = cases.hostile_slots(count, num_slots, slot_dtype)
            want = cases.appended(view, entries, slots, rounding)
            append.append_entries(entries, view, slots, rounding)
            got = cases.whole_memory(view)
            if dtype != torch.bfloat16 or layout.format != "bf16":
                got, want = cases.settle_nans(got, layout), cases.settle_nans(want, layout)
            cases.assert_same_memory(got, want, layout, f"{rounding}, {slot_dtype}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [cases.Layout("fp32", 128), cases.Layout("bf16", 128)], ids=str)
def test_append_widens_every_16_bit_pattern(layout: cases.Layout, dtype: torch.dtype) -> None:
    entries = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype).view(-1, layout.dim)
    slots = torch.arange(len(entries))
    view = layout.view(-(-len(entries) // layout.entries_per_block))
    want = cases.appended(view, entries, slots, "nearest_even")
    append.append_entries(entries, view, slots, "nearest_even")
    got = cases.whole_memory(view)
    if (layout.format, dtype) == ("bf16", torch.float16):
        got, want = cases.settle_nans(got, layout), cases.settle_nans(want, layout)
    cases.assert_same_memory(got, want, layout, "patterns")


@pytest.mark.parametrize(
    ("format", "global_scale"),
    [("mxfp4", 1.0), ("nvfp4", 1.0), ("nvfp4", 2.0**-12), ("nvfp4", 2.0**39), ("nvfp4", 0.7)],
)
def test_append_rounds_every_quotient_as_the_cpu_does(format: str, global_scale: float) -> None:
    """On and beside every midpoint."""
    layout = cases.Layout(format, 128, global_scale=global_scale)
    entries = cases.fp4_quotients(5) * global_scale
    slots, num_blocks = torch.arange(len(entries)), -(-len(entries) // 64)
    want = cases.appended(layout.view(num_blocks), entries, slots, "nearest_even")
    view = layout.view(num_blocks)
    append.append_entries(entries, view, slots, "nearest_even")
    cases.assert_same_memory(cases.whole_memory(view), want, layout, "quotients")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("layout", cases.KV_LAYOUTS, ids=str)
def test_gather_reads_what_the_cpu_reads(layout: cases.Layout, index_dtype: torch.dtype) -> None:
    """Guards of `out` included."""
    case = cases.gather_case(layout, 7, 23, index_dtype)
    want = case.expected()
    out = torch.full((9, 29, layout.dim), 7.0, dtype=want.dtype)
    gather.gather_kv(case.view, case.seq_ids, case.indices, out[1:8, 2:25])
    cases.assert_same_rows(out[1:8, 2:25], want, "rows")
    out[1:8, 2:25] = 7.0
    assert (out == 7.0).all(), "written outside `out`"


def test_gather_copies_bits() -> None:
    """bf16 entries, fp32 entries and the RoPE half, NaN payloads included."""
    for layout, first in ((cases.Layout("bf16", 512), 0), (cases.Layout("fp8_ds_mla", 512), 448)):
        case = cases.gather_case(layout, 3, 64, torch.int64)
        indices = torch.arange(64).expand(3, 64).contiguous()
        out = torch.zeros(3, 64, 512, dtype=torch.bfloat16)
        gather.gather_kv(case.view, None, indices, out)
        table = case.view.block_table
        block = table[torch.arange(3), 0].long()
        rows = case.view.data_rows[block][:, :64]
        stored = rows[..., -2 * (512 - first) :].contiguous().view(torch.int16)
        assert torch.equal(out[..., first:].contiguous().view(torch.int16), stored), layout


def test_empty_inputs_launch_nothing() -> None:
    layout = cases.Layout("mxfp4", 128)
    view = layout.view(2)
    append.append_entries(torch.zeros(0, 128), view, torch.zeros(0, dtype=torch.int64), "nearest_even")
    append.append_entries(torch.zeros(2, 128), layout.view(0), torch.zeros(2, dtype=torch.int64), "nearest_even")
    assert (cases.whole_memory(view) == cases.POISON).all()
    kv = cases.gather_case(cases.Layout("bf16", 512), 2, 3, torch.int32)
    gather.gather_kv(kv.view, None, torch.zeros(0, 3, dtype=torch.int32), torch.zeros(0, 3, 512).bfloat16())
    gather.gather_kv(kv.view, None, torch.zeros(2, 0, dtype=torch.int32), torch.zeros(2, 0, 512).bfloat16())


@pytest.mark.parametrize(("num_blocks", "num_seqs", "columns"), [(0, 2, 3), (3, 0, 3), (3, 2, 0)])
def test_gather_from_nothing_gives_zeros(num_blocks: int, num_seqs: int, columns: int) -> None:
    layout = cases.Layout("fp8_ds_mla", 512)
    view = layout.view(num_blocks, block_table=torch.zeros(num_seqs, columns, dtype=torch.int32))
    out = torch.full((2, 3, 512), 7.0, dtype=torch.bfloat16)
    gather.gather_kv(view, None, torch.tensor([[0, 5, -1]] * 2), out)
    assert (out == 0).all()


def test_entries_of_any_strides_are_taken() -> None:
    """Rows apart, columns apart, and rows at an odd address."""
    layout = cases.Layout("fp8", 128)
    plain = cases.hostile_entries(40, 128, torch.bfloat16)
    slots = torch.arange(40)
    apart = torch.zeros(40, 256, dtype=torch.bfloat16)[:, 64:192].copy_(plain)
    columns = plain.t().contiguous().t()
    odd = torch.zeros(40 * 128 + 1, dtype=torch.bfloat16)[1:].view(40, 128).copy_(plain)
    want = cases.appended(layout.view(1), plain, slots, "nearest_even")
    for name, entries in (("apart", apart), ("columns", columns), ("odd", odd), ("plain", plain)):
        for given in (slots, torch.stack([slots, slots], 1)[:, 0]):
            view = layout.view(1)
            append.append_entries(entries, view, given, "nearest_even")
            cases.assert_same_memory(cases.whole_memory(view), want, layout, name)


def test_what_a_kernel_cannot_reach_is_refused() -> None:
    layout = cases.Layout("bf16", 512)
    case = cases.gather_case(layout, 2, 3, torch.int32)
    memory = torch.zeros(2 * 3 * 520, dtype=torch.bfloat16)
    for out in (memory[1 : 1 + 2 * 3 * 512].view(2, 3, 512), memory.view(2, 3, 520)[..., ::1][..., 4:516]):
        with pytest.raises(
            ValueError, match="gather_kv: on a GPU rows of out must be contiguous and start at multiples"
        ):
            gather.gather_kv(case.view, None, case.indices, out)
    with pytest.raises(ValueError, match="rows of out must be contiguous"):
        gather.gather_kv(case.view, None, case.indices, torch.zeros(2, 512, 3, dtype=torch.bfloat16).transpose(1, 2))
    odd = torch.zeros(2 * layout.schema.stride + 1, dtype=torch.uint8)[1:].view(2, -1)
    view = type(case.view)(odd, layout.schema, torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="append_entries: on a GPU storage must start at a multiple of 16 bytes"):
        append.append_entries(torch.zeros(1, 512), view, torch.zeros(1, dtype=torch.int64), "nearest_even")
    wide = cases.Layout("bf16", 4096, 1).view(1)
    with pytest.raises(NotImplementedError, match="head_dim must be at most 2048, got 4096"):
        append.append_entries(torch.zeros(1, 4096), wide, torch.zeros(1, dtype=torch.int64), "nearest_even")
