"""Which entries of a sequence a rank holds, and under which numbers (context parallel).

A rank numbers the entries that it holds 0, 1, ... in the order of the sequence. Entries, not tokens, are dealt out: an
entry covers `compress_ratio` tokens, so a unit of n tokens is one of n / compress_ratio entries.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer.checks import check_range, check_tensor

INT32_MAX = torch.iinfo(torch.int32).max


class Shard(ABC):
    """One rank's part of every sequence: `InterleavedShard` or `ContiguousShard`.

    Every method takes and returns int32 on any device, reads nothing back from it and can be captured in a CUDA graph.
    """

    def local_valid_lens(self, valid_lens: Tensor) -> Tensor:
        """How many of the entries that each query may see lie here: int32 [T] to int32 [T], 0 where none do."""
        op = self._name("local_valid_lens")
        self._check(op, "valid_lens", valid_lens, ("T",), low=0)
        return self._count_held(valid_lens.clamp_min(0))

    def global_indices(self, indices: Tensor) -> Tensor:
        """The sequence's numbers of entries that this rank numbers `indices`: int32 [T, n] to int32 [T, n].

        -1 (no entry) stays -1, so what `score_topk` found on this rank can go straight to `merge_topk`.
        """
        op = self._name("global_indices")
        self._check(op, "indices", indices, ("T", "n"), low=-1)
        return self._to_global(indices).masked_fill_(indices < 0, -1)

    def local_indices(self, indices: Tensor) -> Tensor:
        """This rank's numbers of the sequence's entries `indices`: int32 [T, n] to int32 [T, n], -1 if held elsewhere.

        `view.slots` keeps the -1 and `append_entries` skips it, so all ranks can be given the same new entries.
        """
        op = self._name("local_indices")
        self._check(op, "indices", indices, ("T", "n"), low=-1)
        return self._to_local(indices)

    @abstractmethod
    def _count_held(self, valid_lens: Tensor) -> Tensor:
        """Of the first `valid_lens` (not negative) entries."""

    @abstractmethod
    def _to_global(self, indices: Tensor) -> Tensor:
        """A new tensor; anything for negative indices."""

    @abstractmethod
    def _to_local(self, indices: Tensor) -> Tensor:
        """-1 for -1 too."""

    def _name(self, method: str) -> str:
        return f"{type(self).__name__}.{method}"

    def _check(self, op: str, name: str, tensor: Tensor, shape: tuple[str, ...], *, low: int) -> None:
        check_tensor(op, name, tensor, dtype=torch.int32, shape=shape)
        if tensor.device.type == "cpu":
            check_range(op, name, tensor, low, INT32_MAX)


@dataclass(frozen=True)
class InterleavedShard(Shard):
    """Runs of `interleave` entries are dealt out to the ranks in turn, from rank 0 on.

    Entry s lies on rank s // interleave % num_ranks, which numbers it
    s // (num_ranks * interleave) * interleave + s % interleave.

    Args:
        rank: 0 .. num_ranks - 1.
        num_ranks: how many ranks share each sequence.
        interleave: entries of a run. 1 deals out single entries; `entries_per_block` deals out whole blocks.
    """

    rank: int
    num_ranks: int
    interleave: int = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check_int(name, "num_ranks", self.num_ranks, 1, INT32_MAX)
        _check_int(name, "rank", self.rank, 0, self.num_ranks - 1)
        _check_int(name, "interleave", self.interleave, 1, INT32_MAX)
        if self._round > INT32_MAX:
            raise ValueError(f"{name}: num_ranks * interleave must be at most {INT32_MAX}, got {self._round}")

    @property
    def _round(self) -> int:
        """Entries that are dealt out before it is rank 0's turn again."""
        return self.num_ranks * self.interleave

    def _count_held(self, valid_lens: Tensor) -> Tensor:
        whole_rounds = valid_lens // self._round
        last_round = (valid_lens % self._round - self.rank * self.interleave).clamp_(0, self.interleave)
        return whole_rounds * self.interleave + last_round

    def _to_global(self, indices: Tensor) -> Tensor:
        runs = indices // self.interleave
        between = self._round - self.interleave  # entries of the other ranks between two runs
        return torch.add(indices, runs, alpha=between).add_(self.rank * self.interleave)

    def _to_local(self, indices: Tensor) -> Tensor:
        held = indices // self.interleave % self.num_ranks == self.rank
        local = indices // self._round * self.interleave + indices % self.interleave
        return torch.where(held, local, -1)  # of -1 either is -1


@dataclass(frozen=True, eq=False)
class ContiguousShard(Shard):
    """Entries `start` .. `stop` - 1 of each sequence lie here; shards may be of any size, or empty.

    Args:
        start, stop: 0 <= start <= stop, each an int for all queries or int32 [T], one per query (of the calls' T), on
            the calls' device. `stop` may lie beyond the sequence's end, as for the rank that new entries go to.
    """

    start: int | Tensor
    stop: int | Tensor

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("start", "stop"):
            bound = getattr(self, field)
            if isinstance(bound, Tensor):
                check_tensor(name, field, bound, dtype=torch.int32, shape=("T",))
                if bound.device.type == "cpu":
                    check_range(name, field, bound, 0, INT32_MAX)
            else:
                _check_int(name, field, bound, 0, INT32_MAX)
        self._check_order(name)

    def _check_order(self, name: str) -> None:
        tensors = [bound for bound in (self.start, self.stop) if isinstance(bound, Tensor)]
        if any(bound.device.type != "cpu" for bound in tensors):
            return  # looking would wait for the device
        if len(tensors) == 2 and tensors[0].shape != tensors[1].shape:
            shapes = " and ".join(str(list(bound.shape)) for bound in tensors)
            raise ValueError(f"{name}: start and stop must have the same shape [T], got {shapes}")
        if not torch.all(torch.as_tensor(self.start) <= torch.as_tensor(self.stop)):
            raise ValueError(f"{name}: start must not exceed stop, got {self.start} and {self.stop}")

    def _check(self, op: str, name: str, tensor: Tensor, shape: tuple[str, ...], *, low: int) -> None:
        super()._check(op, name, tensor, shape, low=low)
        for field in ("start", "stop"):
            bound = getattr(self, field)
            if isinstance(bound, Tensor):
                check_tensor(op, field, bound, dtype=torch.int32, shape=(len(tensor),), device=tensor.device)

    def _count_held(self, valid_lens: Tensor) -> Tensor:
        return (valid_lens.clamp(max=self.stop) - self.start).clamp_min_(0)

    def _to_global(self, indices: Tensor) -> Tensor:
        return indices + _column(self.start)

    def _to_local(self, indices: Tensor) -> Tensor:
        start, stop = _column(self.start), _column(self.stop)
        return torch.where((indices >= start) & (indices < stop), indices - start, -1)


def _column(bound: int | Tensor) -> int | Tensor:
    """To go with [T, n]."""
    return bound.unsqueeze(1) if isinstance(bound, Tensor) else bound


def _check_int(name: str, field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}: {field} must be an int in {low}..{high}, got {value!r}")
