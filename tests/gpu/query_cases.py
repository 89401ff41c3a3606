"""Cases that indexer_query's kernel is run on, on a GPU and on the host, and what must come out: the CPU's bytes."""

from dataclasses import dataclass, replace

import torch
from kernel_cases import DTYPES, assert_same_rows, hostile_entries
from torch import Tensor

from lightning_indexer import QuantizedQuery
from lightning_indexer.ops.indexer_query import indexer_query
from lightning_indexer.rotary import rope_frequencies

POSITIONS = (0, 1, 2, 127, 4095, 65_535, 105_616, 1_048_575, 16_777_215, 2**31 - 1)


@dataclass(frozen=True)
class QueryCase:
    """`rope_dims` of `head_dim` channels are rotated; the weights come as `weights_dtype`."""

    format: str | None
    dtype: torch.dtype = torch.bfloat16
    rotate: bool = True
    num_heads: int = 64
    head_dim: int = 128
    rope_dims: int = 64
    weights_dtype: torch.dtype = torch.bfloat16
    positions_dtype: torch.dtype = torch.int64

    def inputs(self, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, weights, positions and frequencies on the CPU."""
        rng = torch.Generator().manual_seed(seed)
        rows = hostile_entries(num_tokens * self.num_heads, self.head_dim, self.dtype, seed)
        tame = torch.randn(rows.shape, generator=rng).to(self.dtype)  # half of the rows: most hostile ones end as NaN
        rows[::2] = tame[::2]
        weights = torch.randn(num_tokens, self.num_heads, generator=rng).to(self.weights_dtype)
        drawn = torch.randint(0, 2**20, (num_tokens,), generator=rng)
        drawn[: len(POSITIONS)] = torch.tensor(POSITIONS)[:num_tokens]
        frequencies = rope_frequencies(self.rope_dims, 160_000.0, yarn_factor=16.0)
        shape = (num_tokens, self.num_heads, self.head_dim)
        return rows.view(shape), weights, drawn.to(self.positions_dtype), frequencies

    @property
    def options(self) -> dict[str, object]:
        scale = self.head_dim**-0.5 * self.num_heads**-0.5
        return {"format": self.format, "rotate": self.rotate, "weight_scale": scale}

    def expected(self, *inputs: Tensor) -> tuple[Tensor | QuantizedQuery, Tensor]:
        return indexer_query(*inputs, **self.options, impl="cpu")

    def __str__(self) -> str:
        shape = f"h{self.num_heads}-d{self.head_dim}-rope{self.rope_dims}"
        rotated = "-hadamard" if self.rotate else ""
        return f"{self.format}-{str(self.dtype).removeprefix('torch.')}-{shape}{rotated}"


_MODEL = QueryCase("mxfp4")
CASES = [
    *(replace(_MODEL, format=format, dtype=dtype) for format in ("mxfp4", "nvfp4", "fp8", None) for dtype in DTYPES),
    *(replace(_MODEL, format=format, rotate=False) for format in ("mxfp4", "nvfp4", "fp8", None)),
    *(
        QueryCase(format, dtype, rotate, 24, 64, 16, dtype, torch.int32)
        for format, dtype, rotate in (
            ("mxfp4", torch.float32, True),
            ("nvfp4", torch.bfloat16, True),
            ("fp8", torch.float16, False),
            (None, torch.float16, True),
        )
    ),
    QueryCase("mxfp4", num_heads=1, rope_dims=128, weights_dtype=torch.float32),
    QueryCase("fp8", num_heads=33, rope_dims=2, weights_dtype=torch.float16),
]


def assert_same_query(
    got: tuple[Tensor | QuantizedQuery, Tensor], want: tuple[Tensor | QuantizedQuery, Tensor], what: str
) -> None:
    """Equal in every byte, but for the codes of rows that are not finite, where NaN must lie at the same places."""
    assert_same_rows(got[1], want[1], f"{what}: weights")
    query, wanted = got[0], want[0]
    if isinstance(wanted, Tensor):
        assert isinstance(query, Tensor) and query.dtype == wanted.dtype, f"{what}: {query}"
        assert_same_rows(query, wanted, f"{what}: query")
        return
    assert isinstance(query, QuantizedQuery) and query.format == wanted.format, f"{what}: {query}"
    assert query.scale is not None and wanted.scale is not None
    values = wanted.dequantize()
    assert_same_rows(query.dequantize(), values, f"{what}: values")
    finite = values.isfinite().all(-1, keepdim=True)
    assert finite.float().mean() > 0.4, f"{what}: hardly a row is finite"
    for name, mine, theirs in (("codes", query.data, wanted.data), ("scales", query.scale, wanted.scale)):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), f"{what}: {name} {mine.dtype} {mine.shape}"
        mine, theirs = mine.cpu().view(torch.uint8), theirs.view(torch.uint8)
        different = (mine != theirs) & (finite if mine.ndim == 3 else finite.squeeze(-1).repeat_interleave(4, -1))
        bad = different.nonzero()
        assert not len(bad), f"{what}: {len(bad)} bytes of {name} differ, first at {bad[0].tolist()}"
