"""One step of a layer: where its tokens stand and which entries they complete, as integers on the layer's device.

How long each tensor is follows from the step's counts, the tokens per sequence, alone. So a layer never asks the device
for a length, and a CUDA graph captured on one step serves all steps of the same counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer.cache.transfer import write_from_host

_WORD_BYTES = 8


@dataclass(frozen=True, eq=False)
class Step:
    """Where the T tokens of a step stand. Tokens of one sequence are adjacent and in order.

    Args:
        positions: int64 [T], absolute.
        seq_ids: int32 [T].
        batch_rows: int64 [T], which of the step's sequences.
        valid_lens: int32 [T], entries visible to each token.
        max_visible: their maximum, or what a static step's could be.
        seqs, starts, offsets: int64 [S], each sequence's id, first position in the step and first row in the batch.
        entry_rows, entry_indices: int64 [E], batch row and index of each entry completed in this step. Each sequence
            has ceil(n / compress_ratio) rows, as many entries as n tokens can complete; rows left over hold -1.
        counts: tokens of each sequence.
        is_static: the next static step of the same counts takes the place of this one.
    """

    positions: Tensor
    seq_ids: Tensor
    batch_rows: Tensor
    valid_lens: Tensor
    max_visible: int
    seqs: Tensor
    starts: Tensor
    offsets: Tensor
    entry_rows: Tensor
    entry_indices: Tensor
    counts: tuple[int, ...]
    is_static: bool

    @property
    def num_tokens(self) -> int:
        """T, over all sequences."""
        return len(self.positions)


class StepBuffer:
    """Where a step lies on its device: one piece of memory, written from the host by one copy.

    Args:
        counts, max_visible, is_static: of the step.
        compress_ratio: tokens per entry; 0 where there are no entries.
        pools: names of the pools that entries go to.
        device: where the step is read.
    """

    def __init__(
        self,
        counts: Sequence[int],
        compress_ratio: int,
        pools: Sequence[str],
        *,
        max_visible: int,
        is_static: bool,
        device: torch.device | str,
    ) -> None:
        self._compress_ratio = compress_ratio
        self._counts = torch.tensor(counts, dtype=torch.int64, device="cpu")
        self._batch_rows, self._ahead = _spread(self._counts)
        self._entry_rows, self._entry_ahead = _spread(self._entries_before(self._counts + compress_ratio - 1))
        tokens, seqs, entries = len(self._ahead), len(counts), len(self._entry_ahead)
        self._layout = {
            **dict.fromkeys(("positions", "batch_rows"), (tokens, torch.int64)),
            **dict.fromkeys(("seq_ids", "valid_lens"), (tokens, torch.int32)),
            **dict.fromkeys(("seqs", "starts", "offsets"), (seqs, torch.int64)),
            **dict.fromkeys(("entry_rows", "entry_indices", *pools), (entries, torch.int64)),
        }
        words = sum(_words(length, dtype) for length, dtype in self._layout.values())
        self._memory = torch.empty(words, dtype=torch.int64, device=device)
        fields = self._split(self._memory)
        self.slots = {name: fields.pop(name) for name in pools}  # int64 [E] of each pool, -1 where there is no entry
        self.step = Step(**fields, max_visible=max_visible, counts=tuple(counts), is_static=is_static)

    def write(self, seq_ids: Sequence[int], starts: Sequence[int], slots: Mapping[str, Tensor]) -> None:
        """Say where the step stands; a GPU is not waited for.

        Args:
            seq_ids, starts: each sequence's id, and the position of its first token.
            slots: for each pool, on the host, those of the entries that the tokens complete, in order.
        """
        memory = torch.zeros(len(self._memory), dtype=torch.int64, device="cpu")
        fields = self._split(memory)
        seqs, first = (torch.tensor(values, dtype=torch.int64, device="cpu") for values in (seq_ids, starts))
        positions = first[self._batch_rows] + self._ahead
        completed = self._entries_before(first + self._counts) - self._entries_before(first)
        exists = self._entry_ahead < completed[self._entry_rows]
        entry_indices = self._entries_before(first)[self._entry_rows] + self._entry_ahead
        values = {
            "positions": positions,
            "batch_rows": self._batch_rows,
            "seq_ids": seqs[self._batch_rows],
            "valid_lens": self._entries_before(positions + 1),
            "seqs": seqs,
            "starts": first,
            "offsets": self._counts.cumsum(0) - self._counts,
            "entry_rows": self._entry_rows.masked_fill(~exists, -1),
            "entry_indices": entry_indices.masked_fill(~exists, -1),
            **{name: torch.full_like(self._entry_rows, -1).masked_scatter_(exists, slots[name]) for name in slots},
        }
        for name, field in fields.items():
            field.copy_(values[name])
        write_from_host(self._memory, memory)

    def _split(self, memory: Tensor) -> dict[str, Tensor]:
        """The fields that lie in `memory`, sharing it."""
        fields, first = {}, 0
        for name, (length, dtype) in self._layout.items():
            end = first + _words(length, dtype)
            fields[name] = memory[first:end].view(dtype)[:length]
            first = end
        return fields

    def _entries_before(self, positions: Tensor) -> Tensor:
        return positions // self._compress_ratio if self._compress_ratio else torch.zeros_like(positions)


def _spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `counts[i]` things, i and how many of the i-th come before it."""
    rows = torch.arange(len(counts), device="cpu").repeat_interleave(counts)
    return rows, torch.arange(len(rows), device="cpu") - (counts.cumsum(0) - counts)[rows]


def _words(length: int, dtype: torch.dtype) -> int:
    return -(-length * dtype.itemsize // _WORD_BYTES)
