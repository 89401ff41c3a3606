"""What a user of vLLM, SGLang or DeepGEMM holds, written byte by byte, and what must be selected from it.

Pages are filled here with numpy and `ml_dtypes` alone, after the layouts' descriptions: codes and scales are drawn, not
quantised, so that nothing of `lightning_indexer` has a part in them. All numbers are small multiples of powers of two:
scores are exact in fp32 whatever the order of sums, and as entries repeat there are many ties.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import ml_dtypes
import numpy as np
import torch
from cases import assert_same_bits, copy_strided

POISON = 0xFF  # NaN as E4M3, UE8M0 and fp32
SMALL_CODES = np.uint8([0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13])  # E2M1 of magnitude up to 3
TOKENS = (521, 1030, 6, 0, 259, 3)  # of each request, the tokens of this step included
COMPRESS_RATIO = 4


@dataclass(frozen=True)
class Case:
    """Shapes and formats of a call."""

    keys: str
    queries: str
    next_n: int
    memory: str = "whole"
    head_dim: int = 128
    num_heads: int = 64
    block_size: int = 64


CASES = {
    f"{format}-next{next_n}-{memory}": Case(format, format, next_n, memory)
    for format in ("mxfp4", "fp8")
    for next_n, memory in ((1, "whole"), (2, "padded"), (3, "slab"), (4, "layers-first"))
}
CASES |= {
    "mxfp4-64-dims": Case("mxfp4", "mxfp4", 2, head_dim=64, num_heads=8),
    "fp8-64-dims-in-68-bytes": Case("fp8", "fp8", 2, head_dim=64, num_heads=8),
    "fp8-queries-on-mxfp4-keys": Case("mxfp4", "fp8", 1, "padded"),
    "mxfp4-queries-on-fp8-keys": Case("fp8", "mxfp4", 1, "padded"),
    "pages-of-32": Case("mxfp4", "mxfp4", 2, block_size=32),
    "pages-of-128": Case("fp8", "fp8", 2, "slab", num_heads=16, block_size=128),
}


@dataclass(frozen=True)
class Held:
    """The arguments, under the names of DeepGEMM's call, and what they stand for."""

    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    kv_cache: torch.Tensor
    weights: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor
    q_values: np.ndarray  # float64 [B, next_n, H, D]
    entries: list[np.ndarray]  # float64 [n, D] of each request
    page_bytes: int

    def call(self, function: Callable, *args: object, **options: object) -> object:
        return function(self.q, self.kv_cache, self.weights, self.context_lens, self.block_table, *args, **options)

    def to(self, device: str) -> "Held":
        """A copy on a device, strides kept."""
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]
        moved = {name: copy_strided(getattr(self, name), device) for name in names}
        if isinstance(self.q, tuple):
            moved["q"] = tuple(copy_strided(part, device) for part in self.q)
        return replace(self, **moved)

    def tensors(self) -> list[torch.Tensor]:
        """All that a call reads."""
        q = self.q if isinstance(self.q, tuple) else (self.q,)
        return [*q, self.kv_cache, self.weights, self.context_lens, self.block_table]

    def scores(self, b: int, j: int) -> np.ndarray:
        """float64 scores of the entries that token j of request b sees."""
        batch, next_n = self.context_lens.shape
        keys = self.entries[b][: int(self.context_lens[b, j])]
        return self.weights[b * next_n + j].double().cpu().numpy() @ np.maximum(self.q_values[b, j] @ keys.T, 0)

    def slot(self, b: int, entry: int) -> int:
        block_size = self.kv_cache.shape[1]
        return int(self.block_table[b, entry // block_size]) * block_size + entry % block_size

    def expected(self, top_k: int, output: str, order: str = "index") -> tuple[np.ndarray, np.ndarray]:
        """int32 [B, next_n, top_k] and [B, next_n]: a stable sort of each row, cut at k."""
        batch, next_n = self.context_lens.shape
        indices, lengths = np.full((batch, next_n, top_k), -1, np.int32), np.zeros((batch, next_n), np.int32)
        for b, j in np.ndindex(batch, next_n):
            best = np.argsort(-self.scores(b, j), kind="stable")[:top_k]
            best = np.sort(best) if order == "index" else best
            indices[b, j, : len(best)] = [self.slot(b, int(i)) for i in best] if output == "slot" else best
            lengths[b, j] = len(best)
        return indices, lengths


def hold(case: Case, *, tokens: tuple[int, ...] = TOKENS, seed: int = 0) -> Held:
    rng = np.random.default_rng(seed)
    batch, next_n, dim = len(tokens), case.next_n, case.head_dim
    codes, scales = draw(rng, case.queries, (batch, next_n, case.num_heads, dim))
    weights = rng.integers(-8, 9, (batch * next_n, case.num_heads)).astype(np.float32) / 4
    if case.queries == "mxfp4":
        q, q_values = (as_tensor(packed(codes), torch.int8), as_tensor(in_int32(scales))), values(codes, scales)
    else:  # the scale of an FP8 query lives in the weights
        q, q_values = as_tensor(codes.view(np.uint8), torch.float8_e4m3fn), codes.astype(np.float64)
        weights *= scales.reshape(weights.shape)
    keys = [draw_repeating(rng, case.keys, entries_of(n), dim) for n in tokens]
    kv_cache, table, page_bytes = write_pages(rng, keys, case)
    lens = np.array([[max(n - next_n + j + 1, 0) // COMPRESS_RATIO for j in range(next_n)] for n in tokens], np.int32)
    tensors = (kv_cache, as_tensor(weights), as_tensor(lens.reshape(batch, next_n)), as_tensor(table))
    held = Held(q, *tensors, q_values, [values(*rows) for rows in keys], page_bytes)
    for b, j in np.ndindex(batch, next_n):
        terms = np.abs(weights[b * next_n + j]) @ np.maximum(q_values[b, j] @ held.entries[b].T, 0)
        assert terms.max(initial=0) * 64 < 2**24, "the terms are multiples of 1/64 and must sum exactly"
    return held


def entries_of(tokens: int) -> int:
    """How many entries that many tokens make."""
    return tokens // COMPRESS_RATIO


# --- numbers --------------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, format: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Codes [..., D] and scales: of E2M1 and UE8M0 [..., D/32], or of E4M3 and fp32 [..., 1]."""
    codes = rng.choice(SMALL_CODES, shape)
    exponent = rng.integers(-1, 2, (*shape[:-1], 1))
    if format == "fp8":
        return codes.view(ml_dtypes.float4_e2m1fn).astype(ml_dtypes.float8_e4m3fn), np.float32(2.0**exponent)
    groups = 127 + exponent + rng.integers(0, 2, (*shape[:-1], shape[-1] // 32))
    return codes.view(ml_dtypes.float4_e2m1fn), groups.astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)


def draw_repeating(rng: np.random.Generator, format: str, count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = draw(rng, format, (60, dim))
    which = rng.integers(0, 60, count)
    return codes[which], scales[which]


def values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64: each scale covers its share of the codes."""
    scales = scales.astype(np.float64)
    return codes.astype(np.float64) * scales.repeat(codes.shape[-1] // scales.shape[-1], -1)


# --- bytes ----------------------------------------------------------------------------------------------------


def packed(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., D/2] of E2M1 codes: byte b holds dim 2b in its low half and dim 2b + 1 in its high half."""
    codes = codes.view(np.uint8)
    return codes[..., 0::2] + 16 * codes[..., 1::2]


def unpacked(data: np.ndarray) -> np.ndarray:
    """E2M1 codes [..., D] of bytes [..., D/2]."""
    codes = np.empty((*data.shape[:-1], 2 * data.shape[-1]), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = data % 16, data // 16
    return codes.view(ml_dtypes.float4_e2m1fn)


def in_four_bytes(scales: np.ndarray) -> np.ndarray:
    """uint8 [..., 4] of UE8M0 scales [..., 2 or 4]; what is left over holds 1.0."""
    rows = np.full((*scales.shape[:-1], 4), 127, np.uint8)
    rows[..., : scales.shape[-1]] = scales.view(np.uint8)
    return rows


def in_int32(scales: np.ndarray) -> np.ndarray:
    """int32 [...]: s0 | s1 << 8 | s2 << 16 | s3 << 24."""
    s = in_four_bytes(scales).astype(np.uint32)
    return (s[..., 0] + s[..., 1] * 256 + s[..., 2] * 65536 + s[..., 3] * 16777216).view(np.int32)


def write_pages(
    rng: np.random.Generator, keys: list[tuple[np.ndarray, np.ndarray]], case: Case
) -> tuple[torch.Tensor, np.ndarray, int]:
    """kv_cache [blocks, block_size, 1, record] in memory of the case's kind, the block table, and bytes of a page.

    Blocks lie in random order. What means nothing is POISON; behind the blocks that a request needs its table has
    other requests' blocks, then INT_MAX and -1.
    """
    block_size, is_fp4 = case.block_size, case.keys == "mxfp4"
    data_bytes = case.head_dim // 2 if is_fp4 else case.head_dim
    page_bytes = block_size * (data_bytes + 4)
    counts = [-(-len(codes) // block_size) for codes, _ in keys]
    order = rng.permutation(sum(counts) + 3).astype(np.int32)
    kv_cache = page_memory(len(order), block_size, data_bytes + 4, case.memory)
    pages = kv_cache.as_strided((len(order), page_bytes), (kv_cache.stride(0), 1)).numpy()
    table = np.full((len(keys), max(counts) + 3), 2**31 - 1, np.int32)
    table[:, -1] = -1
    table[:, :-2] = rng.choice(order, (len(keys), max(counts) + 1))
    for b, (codes, scales) in enumerate(keys):
        table[b, : counts[b]], order = order[: counts[b]], order[counts[b] :]
        data = packed(codes) if is_fp4 else codes.view(np.uint8)
        scale = in_four_bytes(scales) if is_fp4 else scales.view(np.uint8)
        for i in range(len(codes)):
            page, row = pages[table[b, i // block_size]], i % block_size
            page[row * data_bytes : (row + 1) * data_bytes] = data[i]
            page[block_size * data_bytes + 4 * row : block_size * data_bytes + 4 * row + 4] = scale[i]
    return kv_cache, table, page_bytes


def page_memory(num_blocks: int, block_size: int, record: int, memory: str) -> torch.Tensor:
    """uint8 [num_blocks, block_size, 1, record] full of POISON: a tensor of its own or part of a larger one."""
    page = block_size * record
    padded = -(-page // 576) * 576 if memory in ("padded", "slab") else page
    shape = {"whole": (num_blocks, page), "layers-first": (3, num_blocks, page)}
    shape |= {"padded": (num_blocks, padded), "slab": (num_blocks, 3, padded)}
    whole = torch.full(shape[memory], POISON, dtype=torch.uint8)
    pages = {"slab": lambda: whole[:, 1], "layers-first": lambda: whole[1]}.get(memory, lambda: whole)()
    return pages[:, :page].unflatten(1, (block_size, 1, record))


def read_slot(held: Held, slot: int) -> np.ndarray:
    """float64 [D]: what the bytes at a slot of `kv_cache` stand for."""
    num_blocks, block_size, _, record = held.kv_cache.shape
    pages = held.kv_cache.as_strided((num_blocks, held.page_bytes), (held.kv_cache.stride(0), 1)).numpy()
    page, row, data_bytes = pages[slot // block_size], slot % block_size, record - 4
    data = page[row * data_bytes : (row + 1) * data_bytes].copy()
    scale = page[block_size * data_bytes + 4 * row :][:4].copy()
    dim = held.q_values.shape[-1]
    if data_bytes == dim:
        return values(data.view(ml_dtypes.float8_e4m3fn), scale.view(np.float32))
    return values(unpacked(data), scale[: dim // 32].view(ml_dtypes.float8_e8m0fnu))


def as_tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if dtype is None else tensor.view(dtype)


# --- checks ---------------------------------------------------------------------------------------------------


def check_selection(function: Callable, held: Held, top_k: int, *, want: Held | None = None, **options: str) -> None:
    """The function's indices and lengths are those of `want` (on a CPU), default `held` itself, in every place."""
    indices, lengths = held.call(function, top_k, **options)
    shown = {"output": options.get("output", "slot"), "order": options.get("order", "index")}
    want_indices, want_lengths = (want or held).expected(top_k, **shown)
    assert_same_bits(indices, want_indices, f"indices [request, token, rank], k {top_k}, {shown}")
    assert_same_bits(lengths, want_lengths, f"lengths [request, token], k {top_k}")


def check_logits(function: Callable, held: Held, width: int, *, want: Held | None = None, **options: object) -> None:
    """Dense scores bit for bit, -inf beyond each length."""
    want = want or held
    batch, next_n = want.context_lens.shape
    expected = np.full((batch * next_n, width), -np.inf, np.float32)
    for b, j in np.ndindex(batch, next_n):
        scores = want.scores(b, j)
        expected[b * next_n + j, : len(scores)] = scores + 0.0
    assert_same_bits(held.call(function, width, **options), expected, "logits [row, entry]")
