"""Cases that the append and gather kernels are run on, on a GPU and on the host, and what must come out.

What must come out is what the CPU implementation writes (other tests hold that against independent codecs).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer import CacheSchema, IndexerView, KVView, append_entries, gather_kv
from lightning_indexer.cache.view import PagedView

POISON = 0xA5
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 1e-4, 448.0, 6.0, 3.4e38, -3.4e38, torch.inf, -torch.inf]
_FP4_MIDPOINTS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]


@dataclass(frozen=True)
class Layout:
    """A cache layout. padding: bytes between blocks beyond the multiple of 16."""

    format: str
    dim: int
    entries_per_block: int = 64
    padding: int = 0
    global_scale: float = 1.0

    @property
    def schema(self) -> CacheSchema:
        plain = CacheSchema(self.format, self.entries_per_block, head_dim=self.dim)
        stride = -(-plain.payload_bytes // 16) * 16 + self.padding
        return CacheSchema(self.format, self.entries_per_block, stride, self.dim)

    @property
    def roundings(self) -> tuple[str, ...]:
        return ("nearest_even", "toward_zero") if self.format in ("mxfp4", "nvfp4") else ("nearest_even",)

    def view(self, num_blocks: int, device: str = "cpu", block_table: Tensor | None = None) -> PagedView:
        """A view of poisoned storage with as many poisoned bytes in front and behind."""
        schema = self.schema
        guard = 4096
        memory = torch.full((num_blocks * schema.stride + 2 * guard,), POISON, dtype=torch.uint8, device=device)
        storage = memory[guard:-guard].view(num_blocks, schema.stride)
        table = torch.zeros(1, 1, dtype=torch.int32, device=device) if block_table is None else block_table
        is_index = self.dim in (64, 128) and self.entries_per_block % 16 == 0
        return (IndexerView if is_index else KVView)(storage, schema, table, self.global_scale)

    def __str__(self) -> str:
        scale = f"-global{self.global_scale}" if self.global_scale != 1.0 else ""
        return f"{self.format}-d{self.dim}-block{self.entries_per_block}-pad{self.padding}{scale}"


INDEX_LAYOUTS = [
    Layout("mxfp4", 128),
    Layout("mxfp4", 128, 48, 256),
    Layout("mxfp4", 64, 16, 16),
    Layout("nvfp4", 128, global_scale=0.7),
    Layout("nvfp4", 128, 256, global_scale=3e-30),
    Layout("nvfp4", 64, global_scale=2e25),
    Layout("nvfp4", 64, 32, 16),
    Layout("nvfp4", 128, global_scale=2.0**-12),
    Layout("fp8", 128),
    Layout("fp8", 64, 16, 16),
    Layout("bf16", 128),
    Layout("bf16", 64, 16),
    Layout("fp32", 128),
    Layout("fp32", 64, 16, 16),
]
KV_LAYOUTS = [
    Layout("fp8_ds_mla", 512),
    Layout("fp8_ds_mla", 512, 2, 560),
    Layout("fp8_ds_mla", 512, 53),
    Layout("bf16", 512),
    Layout("bf16", 512, 7, 16),
    Layout("bf16", 24, 5),
    Layout("bf16", 2048, 2),
    Layout("fp32", 512, 3),
]
LAYOUTS = INDEX_LAYOUTS + KV_LAYOUTS


def hostile_entries(count: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[count, dim]: every kind of row that has its own way of going wrong, mixed."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng)

    normal = torch.randn(count, dim, generator=rng)
    smooth = normal * torch.exp2(uniform(-20, 15, count, 1).float())
    spread = normal * torch.exp2(uniform(-60, 60, count, dim).float())
    bits = _BITS[dtype]
    limits = torch.iinfo(bits)
    patterns = uniform(limits.min, limits.max + 1, count, dim).to(bits).view(dtype).float()
    tame = torch.where(patterns.isfinite(), patterns, 1.0)
    ties = torch.tensor(_FP4_MIDPOINTS)[uniform(0, len(_FP4_MIDPOINTS), count, dim)]
    ties = torch.where(uniform(0, 2, count, dim) == 0, ties, -ties)
    near = ties.view(torch.int32) + uniform(-1, 2, count, dim).to(
        torch.int32
    )  # the float below, itself, the float above
    near = near.view(torch.float32) * torch.exp2(uniform(-14, 12, count, 1).float())
    fine = uniform(-496, 497, count, dim).float() / 2 * torch.exp2(uniform(-12, 6, count, 1).float())  # E4M3 midpoints
    special = torch.tensor(_SPECIAL)[uniform(0, len(_SPECIAL), count, dim)]
    rare = torch.where(uniform(0, 40, count, dim) == 0, special, smooth)
    nan = torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)[uniform(0, 2, count, dim)]
    holes = torch.where(uniform(0, 60, count, dim) == 0, nan, smooth)
    zeros = torch.where(uniform(0, 2, count, dim) == 0, 0.0, -0.0)
    kinds = torch.stack([smooth, spread, patterns, tame, near, fine, rare, holes, zeros])
    rows = kinds[uniform(0, len(kinds), count), torch.arange(count)]
    return rows.to(dtype)


def fp4_quotients(step: int = 1) -> Tensor:
    """bf16 [entries, 128]: groups of 16 whose first value is the largest, with every bf16 significand, and which
    together hold every value from it down to a 128th, both signs. The largest ones reach all kinds of scales of "nvfp4"
    with a global scale of 1: subnormal, normal, at the floor and saturated.

    step: take every step-th of the largest values.
    """
    significands, exponents = torch.arange(128), torch.tensor([-14, -9, -8, -7, -6, -5, -1, 0, 5, 11, 12])
    largest = ((exponents.unsqueeze(1) + 127 << 7) + significands).flatten()[::step]
    below = torch.arange(7 * 128 // 15 * 15).view(-1, 15)  # in units of the last place
    values = largest.view(-1, 1, 1) - below
    groups = torch.cat([largest.view(-1, 1, 1).expand(-1, len(below), 1), values], dim=2)
    signs = torch.arange(groups.numel()).view_as(groups) % 3 == 1
    patterns = torch.where(signs, groups - 2**15, groups).to(torch.int16).flatten()
    return patterns[: len(patterns) // 128 * 128].view(torch.bfloat16).view(-1, 128)


def hostile_slots(count: int, num_slots: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Distinct slots in random order, some of them -1 and some outside."""
    rng = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_slots, generator=rng)[:count].to(dtype)
    slots[::7] = -1
    slots[3::31] = num_slots
    slots[5::31] = -9
    if dtype == torch.int64:
        slots[6::31] = 2**40
    return slots


def appended(view: PagedView, entries: Tensor, slots: Tensor, rounding: str) -> Tensor:
    """uint8: the memory around `view` as the CPU implementation would leave it; the view itself stays as it is."""
    memory = whole_memory(view).clone()
    storage = memory[4096:-4096].view(view.num_blocks, view.schema.stride)
    copy = type(view)(storage, view.schema, view.block_table.cpu(), view.global_scale)
    append_entries(entries, copy, slots, rounding=rounding, validate=False, impl="cpu")
    return memory


def whole_memory(view: PagedView) -> Tensor:
    """uint8 [bytes] on the CPU: the storage with its guards and padding."""
    untyped = view.storage.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=view.device).set_(untyped).cpu()


def settle_nans(memory: Tensor, layout: Layout) -> Tensor:
    """Give every NaN in bf16 one bit pattern: which one is written depends on the CPU's vector instructions."""
    memory, schema = memory.clone(), layout.schema
    if layout.format not in ("bf16", "fp8_ds_mla"):
        return memory
    blocks = memory[4096:-4096].view(-1, schema.stride)[:, : schema.scale_offset]
    rows = blocks.view(len(blocks), schema.entries_per_block, schema.data_bytes)
    halves = rows[..., 448 if layout.format == "fp8_ds_mla" else 0 :].view(torch.int16)
    halves.masked_fill_(halves.view(torch.bfloat16).isnan(), 0x7FFF)
    return memory


def assert_same_memory(got: Tensor, want: Tensor, layout: Layout, what: str) -> None:
    """Equal in every byte, or AssertionError naming the first block, entry and byte where not."""
    different = (got != want).nonzero()
    if not len(different):
        return
    place = int(different[0]) - 4096
    schema = layout.schema
    block, offset = divmod(place, schema.stride)
    row_bytes = schema.data_bytes if offset < schema.scale_offset else schema.scale_bytes
    start = 0 if offset < schema.scale_offset else schema.scale_offset
    part = "data" if start == 0 else "scale"
    entry, byte = divmod(offset - start, max(row_bytes, 1))
    raise AssertionError(
        f"{what}: {len(different)} bytes differ, first in block {block}, {part} row {entry}, byte {byte}: "
        f"{int(got[place + 4096]):#04x}, expected {int(want[place + 4096]):#04x}"
    )


@dataclass(frozen=True)
class GatherCase:
    """A filled cache on the CPU and what to read from it, some of it out of range."""

    layout: Layout
    view: PagedView
    seq_ids: Tensor
    indices: Tensor

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32 if self.layout.format == "fp32" else torch.bfloat16

    def expected(self) -> Tensor:
        return gather_kv(self.view, self.indices, seq_ids=self.seq_ids, validate=False, impl="cpu")


def gather_case(
    layout: Layout, num_tokens: int, top_k: int, index_dtype: torch.dtype, seed: int = 0, num_seqs: int = 5
) -> GatherCase:
    """Random bytes for data, so that every code occurs; scales of all kinds; ids and indices out of range."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng)

    num_blocks, columns = 11, 9
    table = uniform(0, num_blocks, num_seqs, 2 * columns).to(torch.int32)
    table[:, 4] = 2**31 - 1
    table[:, 6] = -5
    view = layout.view(num_blocks, block_table=table[:, ::2])  # strided both ways
    view.data_rows.copy_(uniform(0, 256, *view.data_rows.shape))
    scales = uniform(0, 256, *view.scale_rows.shape)
    view.scale_rows.copy_(torch.where(scales % 3 == 0, scales, 100 + scales % 50))
    entries = columns * layout.entries_per_block
    indices = uniform(0, entries, num_tokens, top_k)
    indices[:, ::5] = -1
    indices[:, 3::11] = entries + 7
    indices[:, 4::11] = -(2**31)
    seq_ids = uniform(-1, num_seqs + 1, num_tokens)
    return GatherCase(layout, view, seq_ids.to(index_dtype), indices.to(index_dtype))


def assert_same_rows(got: Tensor, want: Tensor, what: str) -> None:
    """Bitwise equal but for the payloads of NaNs; or AssertionError naming the first place where not."""
    bits = torch.int32 if want.dtype == torch.float32 else torch.int16
    got, want = got.cpu(), want.cpu()
    same = (got.contiguous().view(bits) == want.contiguous().view(bits)) | (got.isnan() & want.isnan())
    bad = (~same).nonzero()
    assert not len(bad), (
        f"{what}: {len(bad)} values differ, first at {bad[0].tolist()}: {got[tuple(bad[0])]}, "
        f"expected {want[tuple(bad[0])]}"
    )
