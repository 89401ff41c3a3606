"""What is timed on a GPU, and what is aimed at. A case is data; `operands.py` makes its tensors.

The scoring shapes are those of H=64, D=128 and one block size for which times of other implementations are known;
queries are the last tokens of their sequences, so that causal lengths end at `entries`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.ops.valid_lens import visible_entries

COMPRESS_RATIO = 4
_INPUT_BYTES = 2  # entries are appended from bf16, and gathered to bf16
_SLOT_BYTES, _INDEX_BYTES = 8, 4


@dataclass(frozen=True)
class Target:
    """`floor` must be met, `goal` is what is aimed at: upper bounds of a time, lower bounds of a percentage."""

    floor: float
    goal: float

    def verdict(self, value: float, *, smaller_is_better: bool) -> str:
        """ "goal", "floor" or "missed"."""

        def met(limit: float) -> bool:
            return value <= limit if smaller_is_better else value >= limit

        return "goal" if met(self.goal) else "floor" if met(self.floor) else "missed"


@dataclass(frozen=True)
class Relative:
    """At most `factor` times the time of another case, which is timed before it."""

    case: str
    factor: float


@dataclass(frozen=True)
class ScoringCase:
    """`num_seqs` sequences of `entries` entries, whose last `tokens` tokens ask.

    Args:
        format, query_format: of keys and queries; "bf16" queries are a plain tensor.
        engine: "auto", or "portable" for the kernel that runs on every architecture.
        target_us: of one call, by CUDA-graph replay with a cold L2 cache.
    """

    kind: str
    tokens: int
    num_seqs: int
    entries: int
    format: str = "mxfp4"
    query_format: str = "mxfp4"
    top_k: int = 512
    engine: str = "auto"
    target_us: Target | None = None
    at_most: Relative | None = None
    num_heads: int = 64
    head_dim: int = 128

    @property
    def name(self) -> str:
        shape = f"{self.num_seqs}x{self.tokens}-entries{self.entries}-k{self.top_k}-{self.format}"
        query = "" if self.query_format == self.format else f"-q{self.query_format}"
        return f"{self.kind}-{shape}{query}" + ("" if self.engine == "auto" else f"-{self.engine}")

    @property
    def schema(self) -> CacheSchema:
        return CacheSchema(self.format, head_dim=self.head_dim)

    @property
    def num_queries(self) -> int:
        return self.tokens * self.num_seqs

    def lens(self) -> Tensor:
        """int32 [tokens]: what each query of a sequence sees."""
        end = self.entries * COMPRESS_RATIO
        return visible_entries(torch.arange(end - self.tokens, end), COMPRESS_RATIO)

    @property
    def pairs(self) -> int:
        """(query, entry) pairs to score."""
        return self.num_seqs * int(self.lens().sum())

    @property
    def flop(self) -> int:
        """Multiplications and additions of the dot products."""
        return 2 * self.num_heads * self.head_dim * self.pairs

    @property
    def key_bytes(self) -> int:
        """Every key once: what must be read at least."""
        return self.num_seqs * self.entries * self.schema.bytes_per_entry

    @property
    def dense_bytes(self) -> int:
        """A float32 score per query and entry: what an implementation that writes its scores out holds at least."""
        return 4 * self.num_queries * self.entries


@dataclass(frozen=True)
class GatherCase:
    """`tokens` queries fetch `top_k` random entries each, every query from its own sequence of `entries` entries."""

    tokens: int
    format: str
    top_k: int = 512
    entries: int = 8_192  # the pool is far beyond an L2 cache
    target_percent: Target | None = Target(80, 92)  # of the copy ceiling
    kind: str = "gather"

    @property
    def name(self) -> str:
        return f"gather-{self.tokens}x{self.top_k}-{self.format}"

    @property
    def schema(self) -> CacheSchema:
        return CacheSchema(self.format, head_dim=512)

    @property
    def moved_bytes(self) -> int:
        """Read and written."""
        per_row = self.schema.bytes_per_entry + _INDEX_BYTES + self.schema.dim * _INPUT_BYTES
        return self.tokens * self.top_k * per_row


@dataclass(frozen=True)
class AppendCase:
    """`count` bf16 entries are quantised and written: in order into random blocks, or into random slots.

    Blocks are filled in order by a prefill. Random slots are the worst case: a scale is then stored by
    itself, as 4 or 8 bytes of a sector of 32.

    Args:
        pool_entries: slots that there are.
    """

    format: str
    in_order: bool
    head_dim: int = 128
    count: int = 65_536
    pool_entries: int = 1_048_576  # beyond an L2 cache
    target_percent: Target | None = Target(70, 70)  # of the copy ceiling, by calls in a row
    kind: str = "append"

    @property
    def name(self) -> str:
        return f"append-{self.count}-{self.format}-{'in-order' if self.in_order else 'random'}"

    @property
    def schema(self) -> CacheSchema:
        return CacheSchema(self.format, head_dim=self.head_dim)

    @property
    def moved_bytes(self) -> int:
        """Read and written."""
        return self.count * (self.head_dim * _INPUT_BYTES + _SLOT_BYTES + self.schema.bytes_per_entry)


Case = ScoringCase | GatherCase | AppendCase


def _decode(tokens: int, num_seqs: int, entries: int, floor: float = 0, goal: float = 0) -> ScoringCase:
    return ScoringCase("decode", tokens, num_seqs, entries, target_us=Target(floor, goal) if floor else None)


def _prefill(tokens: int, entries: int, target_us: Target | None = None) -> ScoringCase:
    return ScoringCase("prefill", tokens, 1, entries, target_us=target_us)


def _formats(case: ScoringCase, targets: dict[tuple[str, str], Target | None]) -> tuple[ScoringCase, ...]:
    return tuple(
        replace(case, format=format, query_format=query_format, target_us=target)
        for (format, query_format), target in targets.items()
    )


def _wider(case: ScoringCase) -> tuple[ScoringCase, ...]:
    at_most = Relative(case.name, 1.15)
    return tuple(replace(case, top_k=top_k, target_us=None, at_most=at_most) for top_k in (1_024, 2_048))


def _portable(case: ScoringCase) -> ScoringCase:
    return replace(case, engine="portable", target_us=None, at_most=Relative(case.name, 2.5))


# Targets are for one H100 (80 GB, HBM3).
_DECODE_64K = _decode(1, 64, 65_536)
_DECODE_256K = _decode(1, 64, 262_144, 560, 430)
_PREFILL_TARGET, _PREFILL_16_BIT_TARGET = Target(10_200, 7_600), Target(16_000, 16_000)
_PREFILL_64K = _prefill(8_192, 65_536, _PREFILL_TARGET)

DECODE = (
    _decode(1, 1, 8_192),
    _decode(1, 1, 32_768, 20, 9),
    _decode(1, 1, 262_144, 34, 17),
    _decode(1, 4, 65_536),
    _decode(1, 16, 8_192),
    _decode(1, 16, 65_536, 60, 34),
    _decode(1, 64, 8_192, 36, 22),
    _DECODE_64K,
    _DECODE_256K,
    _decode(1, 128, 65_536, 290, 220),
    _decode(2, 1, 262_144),
    _decode(2, 64, 65_536),
    _decode(2, 64, 262_144, 800, 480),
)
PREFILL = (_prefill(2_048, 65_536), _prefill(8_192, 32_768), _PREFILL_64K, _prefill(8_192, 262_144))
WIDER = (*_wider(_DECODE_64K), *_wider(_DECODE_256K), *_wider(_PREFILL_64K))
FORMATS = (
    *_formats(
        _DECODE_256K,
        {
            ("mxfp4", "fp8"): _DECODE_256K.target_us,
            ("fp8", "fp8"): Target(950, 790),
            ("nvfp4", "nvfp4"): Target(750, 480),
            ("bf16", "bf16"): None,  # reading the keys alone takes longer than the target of nvfp4
        },
    ),
    *_formats(
        _PREFILL_64K,
        {
            ("mxfp4", "fp8"): _PREFILL_TARGET,
            ("fp8", "fp8"): _PREFILL_TARGET,
            ("nvfp4", "nvfp4"): _PREFILL_16_BIT_TARGET,
            ("bf16", "bf16"): _PREFILL_16_BIT_TARGET,
        },
    ),
)
PORTABLE = (_portable(_DECODE_64K), _portable(_DECODE_256K), _portable(_PREFILL_64K))
GATHER = tuple(GatherCase(tokens, format) for tokens in (64, 256) for format in ("fp8_ds_mla", "bf16"))
APPEND = tuple(
    AppendCase(format, in_order, head_dim)
    for format, head_dim in (("mxfp4", 128), ("nvfp4", 128), ("fp8", 128), ("bf16", 128), ("fp8_ds_mla", 512))
    for in_order in (True, False)
)

GRID: tuple[Case, ...] = (*DECODE, *PREFILL, *WIDER, *FORMATS, *PORTABLE, *GATHER, *APPEND)
QUICK_GRID: tuple[Case, ...] = (
    _decode(1, 1, 32_768, 20, 9),
    _decode(1, 64, 8_192, 36, 22),
    _DECODE_64K,
    _prefill(2_048, 65_536),
    _portable(_DECODE_64K),
    GATHER[0],
    APPEND[1],
)
