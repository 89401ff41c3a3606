"""Cases that the kernels of compress_entries are run on, on a GPU and on the host, and what must come out: the bytes of
the torch path on a CPU."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from kernel_cases import DTYPES, Layout, assert_same_memory, settle_nans, whole_memory
from torch import Tensor

from lightning_indexer.cache.ring import TokenRing
from lightning_indexer.cache.view import PagedView
from lightning_indexer.ops.compress import compress_entries
from lightning_indexer.rotary import rope_frequencies

MAX_SEQS = 9


@dataclass(frozen=True)
class Batch:
    """A step: for each sequence its id, its tokens before, its tokens now. padded: rows of no entry as -1."""

    name: str
    sequences: tuple[tuple[int, int, int], ...]
    padded: bool = True

    def step(self, ratio: int) -> SimpleNamespace:
        seqs, starts, counts = (torch.tensor(x, dtype=torch.int64) for x in zip(*self.sequences, strict=True))
        rows, ahead = [], []
        for row, (_, start, count) in enumerate(self.sequences):
            completed = (start + count) // ratio - start // ratio
            many = -(-count // ratio) if self.padded else completed
            rows += [row if j < completed else -1 for j in range(many)]
            ahead += [start // ratio + j if j < completed else -1 for j in range(many)]
        batch_rows = torch.arange(len(seqs)).repeat_interleave(counts)
        offsets = counts.cumsum(0) - counts
        positions = starts[batch_rows] + torch.arange(len(batch_rows)) - offsets[batch_rows]
        return SimpleNamespace(
            positions=positions,
            seq_ids=seqs[batch_rows].to(torch.int32),
            batch_rows=batch_rows,
            seqs=seqs,
            starts=starts,
            offsets=offsets,
            entry_rows=torch.tensor(rows, dtype=torch.int64),
            entry_indices=torch.tensor(ahead, dtype=torch.int64),
            counts=tuple(counts.tolist()),
        )


BATCHES = {
    4: [
        Batch("decode", tuple((seq, start, 1) for seq, start in enumerate((0, 3, 4, 7, 131, 1_000_003, 2, 11)))),
        Batch("drafts", ((5, 2, 3), (1, 7, 2), (8, 126, 3), (0, 0, 1))),
        Batch("prefill", ((3, 0, 37), (0, 5, 9), (7, 6, 0), (6, 3, 1), (2, 1022, 18))),
        Batch("prefill-unpadded", ((3, 0, 37), (0, 5, 9), (7, 6, 0), (6, 2, 1), (2, 1022, 18)), padded=False),
    ],
    128: [
        Batch("decode", tuple((seq, start, 1) for seq, start in enumerate((0, 127, 128, 255, 126, 1_000_063)))),
        Batch("prefill", ((3, 0, 300), (0, 100, 40), (7, 6, 0), (6, 255, 130))),
    ],
}


@dataclass(frozen=True)
class CompressCase:
    """Entries of `layout` from tokens whose hidden states have `dtype`."""

    layout: Layout
    ratio: int = 4
    dtype: torch.dtype = torch.bfloat16
    rotate: bool = False
    rope_dims: int = 64
    weights_dtype: torch.dtype = torch.float32

    @property
    def channels(self) -> int:
        return self.layout.dim * (2 if self.ratio == 4 else 1)

    @property
    def options(self) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(7)
        ape = torch.randn(self.ratio, self.channels, generator=rng)
        return {
            "ape": ape.to(self.weights_dtype),
            "norm": (1 + 0.2 * torch.randn(self.layout.dim, generator=rng)).to(self.weights_dtype),
            "frequencies": rope_frequencies(self.rope_dims, 160_000.0, yarn_factor=16.0),
            "eps": 1e-6,
            "rotate": self.rotate,
            "dtype": self.dtype,
        }

    def problem(self, batch: Batch, seed: int = 0, device: str = "cpu") -> "Problem":
        """Random tokens, a ring whose rows that were never written hold NaN, random slots of a poisoned cache."""
        rng = torch.Generator().manual_seed(seed)
        step, size = batch.step(self.ratio), self.channels // self.layout.dim * self.ratio
        tokens = len(step.positions)
        values = torch.randn(tokens, self.channels, generator=rng)
        values *= torch.exp2(torch.randint(-6, 6, (tokens, 1), generator=rng).float())
        gates = torch.randn(tokens, self.channels, generator=rng)
        gates *= torch.tensor([0.0, 1.0, 4.0, 60.0])[torch.randint(0, 4, (tokens, 1), generator=rng)]
        ring = TokenRing(MAX_SEQS, size, (2, self.channels), dtype=torch.float32, device="cpu")
        ring.rows.normal_(generator=rng)
        for seq, start, _ in batch.sequences:
            ring.rows[seq, min(start, size) :] = torch.nan
        count = len(step.entry_rows)
        num_blocks = -(-count // self.layout.entries_per_block) + 2
        slots = torch.randperm(num_blocks * self.layout.entries_per_block, generator=rng)[:count]
        slots[step.entry_rows < 0] = -1
        slots[5::11] = -1  # an entry that exists may be skipped, too
        for name, value in vars(step).items():
            if isinstance(value, Tensor):
                setattr(step, name, value.to(device))
        ring.rows = ring.rows.to(device)
        view = self.layout.view(num_blocks, device)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return Problem(self, values.to(device), gates.to(device), step, ring, view, slots.to(device), options)

    def __str__(self) -> str:
        rotated = "-hadamard" if self.rotate else ""
        return f"{self.layout}-ratio{self.ratio}-{str(self.dtype).removeprefix('torch.')}{rotated}"


@dataclass
class Problem:
    """Arguments of one call; `ring` and `view` are written."""

    case: CompressCase
    values: Tensor
    gates: Tensor
    step: SimpleNamespace
    ring: TokenRing
    view: PagedView
    slots: Tensor
    options: dict[str, Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.values, self.gates, self.step, self.ring, self.view, self.slots

    def check(self, want: "Problem", what: str) -> None:
        """Raise AssertionError unless memory and ring hold the same bytes (but for which NaN)."""
        layout = self.case.layout
        got, expected = (settle_nans(whole_memory(problem.view), layout) for problem in (self, want))
        assert_same_memory(got, expected, layout, what)
        mine, theirs = self.ring.rows.cpu(), want.ring.rows.cpu()
        bad = ((mine.view(torch.int32) != theirs.view(torch.int32)) & ~(mine.isnan() & theirs.isnan())).nonzero()
        assert not len(bad), f"{what}: {len(bad)} numbers of the ring differ, first at {bad[0].tolist()}"


def expected(case: CompressCase, batch: Batch, seed: int = 0) -> Problem:
    problem = case.problem(batch, seed)
    compress_entries(*problem.arguments, **problem.options, impl="cpu")
    return problem


_MXFP4, _MLA = Layout("mxfp4", 128), Layout("fp8_ds_mla", 512)
CASES = [
    *(CompressCase(_MXFP4, dtype=dtype, rotate=True) for dtype in DTYPES),
    CompressCase(Layout("nvfp4", 128, global_scale=0.7), rotate=True),
    CompressCase(Layout("fp8", 128), rotate=True, weights_dtype=torch.bfloat16),
    CompressCase(Layout("bf16", 128), rotate=False),
    CompressCase(Layout("fp32", 128), dtype=torch.float32, rotate=True),
    CompressCase(Layout("mxfp4", 64, 16, 16), rotate=True, rope_dims=16, weights_dtype=torch.float16),
    *(replace(CompressCase(_MLA), ratio=ratio, dtype=dtype) for ratio in (4, 128) for dtype in DTYPES),
    *(CompressCase(Layout("bf16", 512, 7, 16), ratio) for ratio in (4, 128)),
    *(CompressCase(Layout("fp32", 512, 3), ratio, torch.float32) for ratio in (4, 128)),
    CompressCase(Layout("fp32", 64), 128, torch.float32, rope_dims=16),
]
