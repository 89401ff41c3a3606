"""Storage for the blocks of one cache, and which sequence owns which block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.transfer import write_from_host


class OutOfBlocks(RuntimeError):
    """The pool has too few free blocks. Nothing was allocated."""


class PagedPool:
    """uint8 storage [num_blocks, block_stride] and block allocation per sequence.

    Sequences are the rows 0..max_seqs-1 of `block_table` (int32 [max_seqs, max_blocks_per_seq]). A block may belong
    to several sequences after `fork`; such a block is full, so nobody writes to it again, and it is released by its
    last owner. Every call either does the whole of its work or raises and changes nothing; none waits for a GPU.
    """

    def __init__(
        self,
        schema: CacheSchema,
        num_blocks: int,
        *,
        max_seqs: int,
        max_blocks_per_seq: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_blocks", num_blocks), ("max_seqs", max_seqs)):
            if value < 0:
                raise ValueError(f"PagedPool: {name} must not be negative, got {value}")
        self.schema = schema
        self.storage = torch.zeros(num_blocks, schema.stride, dtype=torch.uint8, device=device)
        columns = num_blocks if max_blocks_per_seq is None else max_blocks_per_seq
        self.block_table = torch.zeros(max_seqs, columns, dtype=torch.int32, device=device)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._blocks: dict[int, list[int]] = {}
        self._lens: dict[int, int] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks of the storage, free or not."""
        return self.storage.shape[0]

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def num_entries(self, seq_id: int) -> int:
        """Entries that sequence `seq_id` holds."""
        self._check_known(seq_id)
        return self._lens[seq_id]

    def alloc(self, seq_id: int, num_entries: int = 0) -> Tensor:
        """Start sequence `seq_id` with room for `num_entries` entries.

        Returns:
            int64 [num_entries] slots of the new entries, in order.
        """
        self._check_new(seq_id)
        self._blocks[seq_id], self._lens[seq_id] = [], 0
        try:
            return self.extend([seq_id], [num_entries])
        except Exception:
            del self._blocks[seq_id], self._lens[seq_id]
            raise

    def extend(self, seq_ids: Sequence[int], num_entries: Sequence[int]) -> Tensor:
        """Make room for `num_entries[i]` more entries in sequence `seq_ids[i]`, for all of them or for none.

        Returns:
            int64 [sum(num_entries)] slots of the new entries, sequence by sequence.
        Raises:
            OutOfBlocks: the pool, or a row of the block table, is too small.
        """
        slots = self.reserve(seq_ids, num_entries)
        on_device = torch.empty_like(slots, device=self.storage.device)
        write_from_host(on_device, slots)
        return on_device

    def reserve(self, seq_ids: Sequence[int], num_entries: Sequence[int]) -> Tensor:
        """`extend`, for a caller who wants the slots on the host."""
        self.check_extend(seq_ids, num_entries)
        slots: list[int] = []
        for seq_id, count in zip(seq_ids, num_entries, strict=True):
            if count:
                slots += self._extend_one(seq_id, count)
        return torch.tensor(slots, dtype=torch.int64, device="cpu")

    def check_extend(self, seq_ids: Sequence[int], num_entries: Sequence[int]) -> None:
        """Raise what `extend` would raise, and change nothing."""
        if len(set(seq_ids)) != len(seq_ids) or len(seq_ids) != len(num_entries):
            raise ValueError(f"PagedPool: want distinct seq_ids with one count each, got {seq_ids} and {num_entries}")
        needed = 0
        for seq_id, count in zip(seq_ids, num_entries, strict=True):
            self._check_known(seq_id)
            if count < 0:
                raise ValueError(f"PagedPool: num_entries of sequence {seq_id} must not be negative, got {count}")
            total = self._blocks_for(self._lens[seq_id] + count)
            if total > self.block_table.shape[1]:
                raise OutOfBlocks(
                    f"PagedPool: sequence {seq_id} would need {total} blocks, "
                    f"the block table has {self.block_table.shape[1]} per sequence"
                )
            needed += total - len(self._blocks[seq_id])
        self._check_free(needed)

    def grow(self, num_blocks: int, *, max_blocks_per_seq: int | None = None) -> None:
        """Enlarge the storage to `num_blocks` blocks, and the block table; slots keep their numbers and their bytes.

        A new storage and a new table take the place of the old ones: make views anew.

        Args:
            max_blocks_per_seq: columns of the block table. Default: `num_blocks`.
        """
        columns = num_blocks if max_blocks_per_seq is None else max_blocks_per_seq
        for name, value, least in (
            ("num_blocks", num_blocks, self.num_blocks),
            ("max_blocks_per_seq", columns, self.block_table.shape[1]),
        ):
            if value < least:
                raise ValueError(f"PagedPool: {name} must be at least {least}, what it is now, got {value}")
        added = num_blocks - self.num_blocks
        storage = torch.cat([self.storage, self.storage.new_zeros(added, self.schema.stride)])
        table = torch.nn.functional.pad(self.block_table, (0, columns - self.block_table.shape[1]))
        self.storage, self.block_table = storage, table
        self._free = [*range(num_blocks - 1, num_blocks - added - 1, -1), *self._free]  # the old ones are taken first
        self._references += [0] * added

    def free(self, seq_id: int) -> None:
        """Forget sequence `seq_id` and release the blocks that nobody else owns."""
        self._check_known(seq_id)
        for block in reversed(self._blocks.pop(seq_id)):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        del self._lens[seq_id]
        self.block_table[seq_id].zero_()

    def fork(self, src: int, dst: int, num_entries: int | None = None) -> None:
        """Start sequence `dst` with the first `num_entries` entries of `src` (default: all of them).

        Full blocks are shared by reference count; a partly filled last block is copied, so that both may grow.
        """
        self._check_known(src)
        self._check_new(dst)
        count = self._lens[src] if num_entries is None else num_entries
        if not 0 <= count <= self._lens[src]:
            raise ValueError(f"PagedPool: num_entries must lie in 0..{self._lens[src]} (sequence {src}), got {count}")
        full, partial = divmod(count, self.schema.entries_per_block)
        self._check_free(1 if partial else 0)
        blocks = self._blocks[src][:full]
        for block in blocks:
            self._references[block] += 1
        if partial:
            copy = self._take_block()
            self.storage[copy] = self.storage[self._blocks[src][full]]
            blocks = [*blocks, copy]
        self._blocks[dst], self._lens[dst] = list(blocks), count
        self._write_table(dst, 0)

    def _extend_one(self, seq_id: int, count: int) -> list[int]:
        blocks, start, per_block = self._blocks[seq_id], self._lens[seq_id], self.schema.entries_per_block
        known = len(blocks)
        blocks += [self._take_block() for _ in range(self._blocks_for(start + count) - known)]
        self._lens[seq_id] = start + count
        self._write_table(seq_id, known)
        slots: list[int] = []
        first = start // per_block * per_block  # of the first block that is written, its first entry
        for block, entry in zip(blocks[first // per_block :], range(first, start + count, per_block), strict=True):
            offset = (block * per_block) - entry
            slots += range(offset + max(entry, start), offset + min(entry + per_block, start + count))
        return slots

    def _take_block(self) -> int:
        block = self._free.pop()
        self._references[block] = 1
        return block

    def _write_table(self, seq_id: int, first: int) -> None:
        new = self._blocks[seq_id][first:]
        if new:
            row = self.block_table[seq_id, first : first + len(new)]
            write_from_host(row, torch.tensor(new, dtype=torch.int32, device="cpu"))

    def _blocks_for(self, num_entries: int) -> int:
        return -(-num_entries // self.schema.entries_per_block)

    def _check_free(self, needed: int) -> None:
        if needed > len(self._free):
            raise OutOfBlocks(
                f"PagedPool: {needed} more blocks of {self.schema.entries_per_block} entries needed, "
                f"{len(self._free)} of {self.num_blocks} are free (free a sequence, or make the pool larger)"
            )

    def _check_known(self, seq_id: int) -> None:
        if seq_id not in self._blocks:
            raise ValueError(f"PagedPool: sequence {seq_id} is not allocated, have {sorted(self._blocks)}")

    def _check_new(self, seq_id: int) -> None:
        if not 0 <= seq_id < self.block_table.shape[0]:
            raise ValueError(f"PagedPool: seq_id must lie in 0..{self.block_table.shape[0] - 1}, got {seq_id}")
        if seq_id in self._blocks:
            raise ValueError(f"PagedPool: sequence {seq_id} is already allocated (free it first)")
