"""Byte layout of blocks, allocation of blocks, and views over an engine's own tensors."""

from collections import Counter

import numpy as np
import pytest
import torch
from cases import ROW_BYTES, assert_same_bits, encode_rows, write_row
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from lightning_indexer import CacheSchema, IndexerView, KVView, OutOfBlocks, PagedPool, append_entries
from lightning_indexer.reference import read_entries

# --- schema ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "head_dim", "entries", "bytes_per_entry", "payload", "stride"),
    [
        ("mxfp4", None, 64, 68, 4352, 4352),
        ("mxfp4", None, 128, 68, 8704, 8704),
        ("mxfp4", 64, 16, 36, 576, 576),
        ("nvfp4", None, 64, 72, 4608, 4608),
        ("nvfp4", 64, 64, 36, 2304, 2304),
        ("fp8", None, 64, 132, 8448, 8448),
        ("fp8", 64, 256, 68, 17408, 17408),
        ("bf16", None, 64, 256, 16384, 16384),
        ("bf16", 512, 64, 1024, 65536, 65536),
        ("bf16", 512, 3, 1024, 3072, 3072),
        ("fp32", None, 64, 512, 32768, 32768),
        ("fp8_ds_mla", None, 2, 584, 1168, 1728),
        ("fp8_ds_mla", None, 32, 584, 18688, 19008),
        ("fp8_ds_mla", None, 64, 584, 37376, 37440),
        ("fp8_ds_mla", None, 256, 584, 149504, 149760),
    ],
)
def test_golden_sizes(format, head_dim, entries, bytes_per_entry, payload, stride):
    schema = CacheSchema(format, entries, head_dim=head_dim)
    assert (schema.bytes_per_entry, schema.payload_bytes, schema.stride) == (bytes_per_entry, payload, stride)
    assert schema.block_stride == stride
    data_bytes, scale_bytes = ROW_BYTES[format, schema.dim]
    assert (schema.data_bytes, schema.scale_bytes) == (data_bytes, scale_bytes)
    assert schema.scale_offset == entries * data_bytes


@pytest.mark.parametrize(
    ("format", "data_at", "scale_at"), [("mxfp4", 320, 4096 + 20), ("fp8", 640, 8192 + 20), ("fp8_ds_mla", 2880, 36904)]
)
def test_golden_offsets_of_entry_5(format, data_at, scale_at):
    schema = CacheSchema(format, 64)
    assert (5 * schema.data_bytes, schema.scale_offset + 5 * schema.scale_bytes) == (data_at, scale_at)
    view = (KVView if format == "fp8_ds_mla" else IndexerView)(
        torch.zeros(2, schema.stride, dtype=torch.uint8), schema, torch.zeros(1, 1, dtype=torch.int32)
    )
    view.data_rows[1, 5, 0], view.scale_rows[1, 5, 0] = 1, 2
    flat = view.storage.as_strided((2 * schema.stride,), (1,))
    assert flat.nonzero().flatten().tolist() == [schema.stride + data_at, schema.stride + scale_at]


def test_rope_half_of_a_kv_row_begins_at_byte_448():
    view = KVView(
        torch.zeros(1, 37440, dtype=torch.uint8), CacheSchema("fp8_ds_mla", 64), torch.zeros(1, 1, dtype=torch.int32)
    )
    entry = torch.zeros(1, 512)
    entry[0, 448] = -2.0
    append_entries(entry, view, torch.tensor([5]))
    assert view.storage[0, 2880 + 448 : 2880 + 450].tolist() == [0x00, 0xC0]  # bf16 -2, little-endian


@pytest.mark.parametrize("block_stride", [37376, 37440, 38016])
def test_strides_of_other_engines_are_accepted(block_stride):
    assert CacheSchema("fp8_ds_mla", 64, block_stride=block_stride).stride == block_stride


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fp4", 64), ["format", "mxfp4", "'fp4'"]),
        (("mxfp4", 40), ["entries_per_block", "multiple of 16", "40"]),
        (("mxfp4", 0), ["entries_per_block", "16..256", "0"]),
        (("fp8", 272), ["entries_per_block", "16..256", "272"]),
        (("fp8_ds_mla", 0), ["entries_per_block", "at least 1", "0"]),
        (("mxfp4", 64, 4353), ["block_stride", "multiple of 16", "4352", "4353"]),
        (("mxfp4", 64, 4336), ["block_stride", "at least 4352", "4336"]),
        (("mxfp4", 64, None, 96), ["mxfp4", "64 or 128", "96"]),
        (("fp8_ds_mla", 64, None, 128), ["512", "128"]),
        (("bf16", 64, None, 12), ["head_dim", "multiple of 8", "12"]),
    ],
    ids=str,
)
def test_schema_errors(arguments, words):
    format, entries, *rest = arguments
    with pytest.raises(ValueError) as caught:
        CacheSchema(format, entries, *rest[:1], **({"head_dim": rest[1]} if len(rest) > 1 else {}))
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- pool -----------------------------------------------------------------------------------------------------

SMALL = CacheSchema("bf16", 3, head_dim=8)  # blocks of three entries, 16 bytes each


def snapshot(pool: PagedPool) -> tuple:
    lens = {seq: pool.num_entries(seq) for seq in range(len(pool.block_table)) if _knows(pool, seq)}
    return pool.block_table.tolist(), pool.num_free_blocks, lens, pool.storage.tolist()


def _knows(pool: PagedPool, seq_id: int) -> bool:
    try:
        pool.num_entries(seq_id)
    except ValueError:
        return False
    return True


def slots_in_table(pool: PagedPool, seq_id: int) -> list[int]:
    per_block = pool.schema.entries_per_block
    table = pool.block_table[seq_id].tolist()
    return [table[i // per_block] * per_block + i % per_block for i in range(pool.num_entries(seq_id))]


def test_slots_follow_the_block_table():
    pool = PagedPool(SMALL, 6, max_seqs=3)
    first = pool.alloc(1, 4)
    second = pool.alloc(0, 1)
    more = pool.extend([1, 0], [3, 0])
    assert first.dtype == torch.int64 and more.shape == (3,)
    assert slots_in_table(pool, 1) == first.tolist() + more.tolist()
    assert slots_in_table(pool, 0) == second.tolist()
    assert pool.num_free_blocks == 6 - 3 - 1
    assert pool.block_table.dtype == torch.int32


def test_fork_shares_full_blocks_and_copies_the_partial_one():
    pool = PagedPool(SMALL, 6, max_seqs=3)
    pool.storage[:] = torch.arange(6, dtype=torch.uint8).unsqueeze(1)
    pool.alloc(0, 5)
    pool.fork(0, 2)
    src, dst = pool.block_table[0, :2].tolist(), pool.block_table[2, :2].tolist()
    assert src[0] == dst[0] and src[1] != dst[1], (src, dst)
    assert torch.equal(pool.storage[dst[1]], pool.storage[src[1]])
    assert pool.num_free_blocks == 3
    pool.free(0)
    assert pool.num_free_blocks == 4, "the shared block still has an owner"
    assert pool.block_table[0].tolist() == [0] * 6, "a freed row names no block"
    pool.free(2)
    assert pool.num_free_blocks == 6


@pytest.mark.parametrize(("count", "new_blocks"), [(0, 0), (2, 1), (3, 0), (4, 1)])
def test_fork_of_a_prefix(count, new_blocks):
    pool = PagedPool(SMALL, 6, max_seqs=2)
    pool.alloc(0, 5)
    pool.fork(0, 1, count)
    assert pool.num_entries(1) == count and pool.num_free_blocks == 4 - new_blocks


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: p.alloc(1, 4), OutOfBlocks, ["2 more blocks of 3", "1 of 3 are free"]),
        (lambda p: p.extend([0, 2], [1, 4]), OutOfBlocks, ["2 more blocks", "1 of 3"]),
        (lambda p: p.extend([2, 0], [7, 0]), OutOfBlocks, ["sequence 2", "3 blocks", "has 2 per sequence"]),
        (lambda p: p.extend([0, 0], [1, 1]), ValueError, ["distinct seq_ids", "[0, 0]"]),
        (lambda p: p.extend([0, 2], [1]), ValueError, ["one count each", "[1]"]),
        (lambda p: p.extend([0, 1], [1, 1]), ValueError, ["sequence 1 is not allocated", "[0, 2]"]),
        (lambda p: p.extend([2, 0], [1, -1]), ValueError, ["sequence 0", "not be negative", "-1"]),
        (lambda p: p.alloc(1, -1), ValueError, ["sequence 1", "not be negative", "-1"]),
        (lambda p: p.alloc(0), ValueError, ["sequence 0 is already allocated"]),
        (lambda p: p.alloc(3), ValueError, ["seq_id must lie in 0..2", "3"]),
        (lambda p: p.alloc(-1), ValueError, ["seq_id must lie in 0..2", "-1"]),
        (lambda p: p.free(1), ValueError, ["sequence 1 is not allocated"]),
        (lambda p: p.fork(1, 2), ValueError, ["sequence 1 is not allocated"]),
        (lambda p: p.fork(0, 2), ValueError, ["sequence 2 is already allocated"]),
        (lambda p: p.fork(0, 1, 5), ValueError, ["num_entries", "0..4", "5"]),
        (lambda p: p.grow(2), ValueError, ["num_blocks must be at least 3", "got 2"]),
        (lambda p: p.grow(5, max_blocks_per_seq=1), ValueError, ["max_blocks_per_seq must be at least 2", "got 1"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_a_refused_call_changes_nothing(call, error, words):
    pool = PagedPool(SMALL, 3, max_seqs=3, max_blocks_per_seq=2)
    pool.storage[:] = 7
    pool.alloc(0, 4)
    pool.alloc(2)
    before = snapshot(pool)
    with pytest.raises(error) as caught:
        call(pool)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert snapshot(pool) == before


def test_fork_without_a_block_for_the_copy_changes_nothing():
    pool = PagedPool(SMALL, 2, max_seqs=2)
    pool.alloc(0, 4)
    before = snapshot(pool)
    with pytest.raises(OutOfBlocks, match="1 more blocks of 3 entries needed, 0 of 2 are free"):
        pool.fork(0, 1)
    assert snapshot(pool) == before
    pool.fork(0, 1, 3)
    assert pool.block_table[1, 0] == pool.block_table[0, 0], "full blocks need no copy"


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a dict from sequence to its entries; each entry writes a number into its slot.

    A block that is released too early, shared while it is written, or copied wrongly shows as a wrong number.
    """

    seqs = Bundle("seqs")

    @initialize(num_blocks=st.integers(0, 12), columns=st.integers(1, 6))
    def start(self, num_blocks, columns):
        self.pool = PagedPool(SMALL, num_blocks, max_seqs=5, max_blocks_per_seq=columns)
        self.model: dict[int, list[int]] = {}
        self.written = 0

    @property
    def rows(self) -> torch.Tensor:
        """Slot -> its first 8 bytes, in place."""
        return self.pool.storage.view(torch.int64).view(self.pool.num_blocks * 3, 2)[:, 0]

    def fits(self, growth: dict[int, int]) -> bool:
        blocks = {s: -(-(len(self.model.get(s, [])) + n) // 3) for s, n in growth.items()}
        needed = sum(blocks.values()) - sum(-(-len(self.model.get(s, [])) // 3) for s in growth)
        return needed <= self.pool.num_free_blocks and all(b <= self.pool.block_table.shape[1] for b in blocks.values())

    def attempt(self, fits: bool, call) -> torch.Tensor | None:
        if fits:
            return call()
        before = snapshot(self.pool)
        with pytest.raises(OutOfBlocks):
            call()
        assert snapshot(self.pool) == before
        return None

    def write(self, growth: dict[int, int], slots: torch.Tensor) -> None:
        assert len(slots) == sum(growth.values())
        self.rows[slots] = torch.arange(self.written, self.written + len(slots))
        for seq, count in growth.items():
            self.model[seq] = self.model.get(seq, []) + list(range(self.written, self.written + count))
            self.written += count

    @rule(target=seqs, seq=st.integers(0, 4), count=st.integers(0, 10))
    def alloc(self, seq, count):
        if seq in self.model:
            with pytest.raises(ValueError, match="already allocated"):
                self.pool.alloc(seq, count)
            return seq
        slots = self.attempt(self.fits({seq: count}), lambda: self.pool.alloc(seq, count))
        if slots is not None:
            self.write({seq: count}, slots)
        return seq

    @rule(growth=st.dictionaries(seqs, st.integers(0, 7), max_size=4))
    def extend(self, growth):
        growth = {seq: count for seq, count in growth.items() if seq in self.model}
        call = lambda: self.pool.extend(list(growth), list(growth.values()))  # noqa: E731
        slots = self.attempt(self.fits(growth), call)
        if slots is not None:
            self.write(growth, slots)

    @rule(target=seqs, src=seqs, dst=st.integers(0, 4), share=st.floats(0, 1))
    def fork(self, src, dst, share):
        if src in self.model and dst not in self.model:
            count = round(share * len(self.model[src]))
            fits = count % 3 == 0 or self.pool.num_free_blocks > 0
            self.attempt(fits, lambda: self.pool.fork(src, dst, count))
            if fits:
                self.model[dst] = self.model[src][:count]
        return dst

    @rule(blocks=st.integers(0, 4), columns=st.integers(0, 2))
    def grow(self, blocks, columns):
        free, shape = self.pool.num_free_blocks, self.pool.block_table.shape
        self.pool.grow(self.pool.num_blocks + blocks, max_blocks_per_seq=shape[1] + columns)
        assert self.pool.num_free_blocks == free + blocks and self.pool.block_table.shape == (5, shape[1] + columns)

    @rule(seq=consumes(seqs))
    def free(self, seq):
        if seq in self.model:
            self.pool.free(seq)
            del self.model[seq]

    @invariant()
    def every_sequence_reads_its_own_entries(self):
        for seq, entries in self.model.items():
            assert self.rows[slots_in_table(self.pool, seq)].tolist() == entries, f"sequence {seq}"

    @invariant()
    def no_block_is_lost(self):
        used = Counter(
            block for s, e in self.model.items() for block in self.pool.block_table[s, : -(-len(e) // 3)].tolist()
        )
        assert self.pool.num_free_blocks == self.pool.num_blocks - len(used)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=20)


# --- views ----------------------------------------------------------------------------------------------------

TABLE = torch.zeros(1, 2, dtype=torch.int32)


def slab_layer(layer: int, *, blocks: int = 4, layers: int = 3, block_bytes: int = 4352) -> torch.Tensor:
    """One layer of a slab in which the layers of a block lie side by side: [blocks, 64, 1, 68]."""
    slab = torch.zeros(blocks, layers, block_bytes, dtype=torch.uint8)
    return slab[:, layer].view(blocks, 64, 1, block_bytes // 64)


def padded_pages(blocks: int, entries: int, record: int, stride: int) -> torch.Tensor:
    return torch.zeros(blocks * stride, dtype=torch.uint8).as_strided(
        (blocks, entries, 1, record), (stride, record, record, 1)
    )


# id -> (storage, schema, view class)
ENGINE_TENSORS = {
    "vllm-mxfp4": (lambda: torch.zeros(4, 64, 1, 68, dtype=torch.uint8), CacheSchema("mxfp4", 64), IndexerView),
    "vllm-mxfp4-padded": (
        lambda: padded_pages(4, 64, 68, 4608),
        CacheSchema("mxfp4", 64, block_stride=4608),
        IndexerView,
    ),
    "vllm-fp8": (lambda: torch.zeros(4, 64, 1, 132, dtype=torch.uint8), CacheSchema("fp8", 64), IndexerView),
    "flat-int8": (lambda: torch.zeros(4, 4352, dtype=torch.int8), CacheSchema("mxfp4", 64), IndexerView),
    "flashmla-uint8": (lambda: padded_pages(4, 64, 584, 37440), CacheSchema("fp8_ds_mla", 64), KVView),
    "flashmla-e4m3": (
        lambda: padded_pages(4, 64, 584, 37440).view(torch.float8_e4m3fn),
        CacheSchema("fp8_ds_mla", 64),
        KVView,
    ),
    "flashmla-c128": (lambda: padded_pages(4, 2, 584, 1728), CacheSchema("fp8_ds_mla", 2), KVView),
    "flashinfer-stride": (
        lambda: padded_pages(4, 64, 584, 37376),
        CacheSchema("fp8_ds_mla", 64, block_stride=37376),
        KVView,
    ),
    "layer-of-a-slab": (lambda: slab_layer(1), CacheSchema("mxfp4", 64, block_stride=3 * 4352), IndexerView),
    "one-block": (lambda: slab_layer(2, blocks=1), CacheSchema("mxfp4", 64), IndexerView),
}


@pytest.mark.parametrize("name", ENGINE_TENSORS)
def test_views_share_the_engines_memory(name):
    make, schema, kind = ENGINE_TENSORS[name]
    storage = make()
    view = kind(storage, schema, TABLE)
    assert view.storage.data_ptr() == storage.data_ptr() and view.num_blocks == len(storage)
    entries = torch.randn(2, schema.dim)
    block = len(storage) - 1
    row = schema.entries_per_block - 1
    append_entries(entries, view, torch.tensor([0, block * schema.entries_per_block + row]))
    data, scale = encode_rows(entries.numpy(), schema.format)
    payload = schema.entries_per_block * sum(ROW_BYTES[schema.format, schema.dim])
    want = np.zeros((len(storage), payload), np.uint8)
    write_row(want[0], 0, schema.entries_per_block, data[0], scale[0])
    write_row(want[block], row, schema.entries_per_block, data[1], scale[1])
    assert_same_bits(storage.view(torch.uint8).reshape(len(storage), -1), want, "bytes in the engine's tensor")


@pytest.mark.parametrize(
    ("storage", "schema", "kind", "error", "words"),
    [
        (torch.zeros(2, 4352), CacheSchema("mxfp4"), IndexerView, TypeError, ["storage", "uint8", "torch.float32"]),
        (np.zeros((2, 4352)), CacheSchema("mxfp4"), IndexerView, TypeError, ["storage", "uint8", "ndarray"]),
        (torch.zeros(4352).byte(), CacheSchema("mxfp4"), IndexerView, ValueError, ["[num_blocks, ...]", "[4352]"]),
        (torch.zeros(2, 64, 1, 67).byte(), CacheSchema("mxfp4"), IndexerView, ValueError, ["4352 bytes", "got 4288"]),
        (torch.zeros(2, 64, 1, 132).byte(), CacheSchema("mxfp4"), IndexerView, ValueError, ["68", "mxfp4", "8448"]),
        (torch.zeros(2, 64, 1, 68).byte(), CacheSchema("fp8"), IndexerView, ValueError, ["132", "fp8", "got 4352"]),
        (torch.zeros(2, 68, 64).byte().mT, CacheSchema("mxfp4"), IndexerView, ValueError, ["contiguous", "strides"]),
        (slab_layer(0), CacheSchema("mxfp4"), IndexerView, ValueError, ["4352 bytes apart", "got 13056", "block_str"]),
        (torch.zeros(1, 4352).byte().expand(2, -1), CacheSchema("mxfp4"), IndexerView, ValueError, ["apart", "got 0"]),
        (torch.zeros(2, 37440).byte(), CacheSchema("fp8_ds_mla"), IndexerView, ValueError, ["fp8_ds_mla", "index"]),
        (torch.zeros(2, 4352).byte(), CacheSchema("mxfp4"), KVView, ValueError, ["mxfp4", "not KV entries"]),
        (torch.zeros(2, 65536).byte(), CacheSchema("bf16", head_dim=512), IndexerView, ValueError, ["head_dim", "512"]),
        (torch.zeros(2, 2560).byte(), CacheSchema("bf16", 10), IndexerView, ValueError, ["entries_per_block", "10"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_view_errors_name_the_tensor_expected_and_got(storage, schema, kind, error, words):
    with pytest.raises(error) as caught:
        kind(storage, schema, TABLE)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("table", "error", "words"),
    [
        (TABLE.long(), TypeError, ["block_table", "int32", "int64", "block_table.to(torch.int32)"]),
        (TABLE[0], ValueError, ["block_table", "[num_seqs, max_blocks]", "[2]"]),
        (TABLE.to("meta"), ValueError, ["block_table", "on cpu", "meta"]),
        ([[0]], TypeError, ["block_table", "torch.Tensor", "list"]),
    ],
    ids=["int64", "one-dim", "meta", "list"],
)
def test_block_table_errors(table, error, words):
    with pytest.raises(error) as caught:
        IndexerView(torch.zeros(2, 4352, dtype=torch.uint8), CacheSchema("mxfp4"), table)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_reading_through_a_layer_slice_skips_the_other_layers():
    storage = slab_layer(1)
    view = IndexerView(storage, CacheSchema("mxfp4", block_stride=3 * 4352), torch.tensor([[3, 1]], dtype=torch.int32))
    x = torch.randn(70, 128)
    slots = view.slots(torch.tensor([0]), torch.arange(70).unsqueeze(0))[0]
    assert slots.tolist() == [*range(192, 256), *range(64, 70)]
    append_entries(x, view, slots)
    slab = storage.as_strided((4, 3, 4352), (3 * 4352, 4352, 1), 0)
    assert slab[:, [0, 2]].count_nonzero() == 0, "another layer's bytes were written"
    data, scale = encode_rows(x.numpy(), "mxfp4")
    assert_same_bits(view.data_rows[3], data[:64], "data rows of block 3")
    assert_same_bits(view.scale_rows[1][:6], scale[64:], "scale rows of block 1")
    assert read_entries(view, 0, 70).shape == (70, 128)
