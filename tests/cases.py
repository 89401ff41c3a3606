"""What several test files share: independent codecs, caches in awkward memory, oracles and checks.

The codecs here are written with numpy and `ml_dtypes` after the format descriptions and call nothing of
`lightning_indexer.formats` or `lightning_indexer.cache.schema`, so that two authors must agree on every byte.
Checks take the function under test as an argument: the real tests pass the real one, and
`test_wrong_implementations.py` passes wrong ones, which some check must reject.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import torch

from lightning_indexer import CacheSchema, IndexerView, KVView, QuantizedQuery

E2M1, E4M3, E8M0, BF16 = (
    ml_dtypes.float4_e2m1fn,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e8m0fnu,
    ml_dtypes.bfloat16,
)
E2M1_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
POISON = 0xFF  # NaN as E4M3, UE8M0, bf16 and fp32; -6 twice as E2M1
INT_MAX = 2**31 - 1

# (format, dims) -> bytes of an entry's data row and scale row
ROW_BYTES = {
    ("mxfp4", 64): (32, 4),
    ("mxfp4", 128): (64, 4),
    ("nvfp4", 64): (32, 4),
    ("nvfp4", 128): (64, 8),
    ("fp8", 64): (64, 4),
    ("fp8", 128): (128, 4),
    ("bf16", 64): (128, 0),
    ("bf16", 128): (256, 0),
    ("bf16", 512): (1024, 0),
    ("fp32", 64): (256, 0),
    ("fp32", 128): (512, 0),
    ("fp8_ds_mla", 512): (576, 8),
}


# --- codecs ---------------------------------------------------------------------------------------------------


def ue8m0_ceil(scale: np.ndarray) -> np.ndarray:
    """Exponent byte of the smallest power of two >= scale (float64, normal range); 255 where not finite."""
    mantissa, exponent = np.frexp(scale)
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    return np.where(np.isfinite(scale), exponent + 127, 255).astype(np.uint8)


def e2m1_codes(x: np.ndarray, rounding: str = "nearest_even") -> np.ndarray:
    """4-bit codes of fp32 x: `ml_dtypes` for nearest-even; the nearest smaller magnitude, never -0, for toward-zero."""
    if rounding == "nearest_even":
        return x.astype(E2M1).view(np.uint8)
    distance = np.abs(np.minimum(np.abs(x.astype(np.float64)), 6)[..., None] - E2M1_MAGNITUDES)
    code = distance.argmin(-1).astype(np.uint8)  # the first of two equal distances is the smaller magnitude
    return np.where((x < 0) & (code > 0), code | 8, code)


def encode_rows(
    x: np.ndarray, format: str, *, rounding: str = "nearest_even", global_scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 data rows and scale rows of fp32 entries x [..., D]."""
    x = np.asarray(x, np.float32)
    if format in ("bf16", "fp32"):
        return _bytes(x.astype(BF16 if format == "bf16" else np.float32)), np.zeros((*x.shape[:-1], 0), np.uint8)
    if format == "fp8":
        codes, byte = _encode_fp8(x, x.shape[-1])
        return codes, _bytes(byte.view(E8M0).astype(np.float32))
    if format == "fp8_ds_mla":
        codes, byte = _encode_fp8(x[..., :448], 64)
        pad = np.zeros((*byte.shape[:-1], 1), np.uint8)
        return np.concatenate([codes, _bytes(x[..., 448:].astype(BF16))], -1), np.concatenate([byte, pad], -1)
    groups = _grouped(x, 32 if format == "mxfp4" else 16)
    amax = np.abs(groups).max(-1)
    if format == "mxfp4":
        floor = 6 * 2.0**-126 if rounding == "nearest_even" else 1e-4
        scale = ue8m0_ceil(np.maximum(amax, np.float32(floor)).astype(np.float64) / 6)
        unit = scale.view(E8M0).astype(np.float32)
        scale = np.concatenate([scale, np.full((*scale.shape[:-1], 4 - scale.shape[-1]), 127, np.uint8)], -1)
    else:
        amax = np.clip(amax / np.float32(global_scale), np.float32(6 * 2.0**-9), np.float32(6 * 448))
        scale = (amax / np.float32(6)).astype(E4M3)
        unit = scale.astype(np.float32) * np.float32(global_scale)
    codes = e2m1_codes(groups / unit[..., None], rounding).reshape(x.shape)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale.view(np.uint8)


def decode_rows(data: np.ndarray, scale: np.ndarray, format: str, *, global_scale: float = 1.0) -> np.ndarray:
    """float64 [..., D]: exactly what the bytes stand for."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return _decode_rows(data, scale, format, global_scale)


def _decode_rows(data: np.ndarray, scale: np.ndarray, format: str, global_scale: float) -> np.ndarray:
    if format in ("bf16", "fp32"):
        return data.view(BF16 if format == "bf16" else np.float32).astype(np.float64)
    if format == "fp8":
        return data.view(E4M3).astype(np.float64) * scale.view(np.float32)
    if format == "fp8_ds_mla":
        codes = data[..., :448].copy().view(E4M3).astype(np.float64)
        nope = codes * scale[..., :7].copy().view(E8M0).astype(np.float64).repeat(64, -1)
        return np.concatenate([nope, data[..., 448:].copy().view(BF16).astype(np.float64)], -1)
    codes = np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], 2 * data.shape[-1])
    codes = codes.view(E2M1).astype(np.float64)
    if format == "mxfp4":
        groups = scale[..., : codes.shape[-1] // 32].copy()
        return codes * groups.view(E8M0).astype(np.float64).repeat(32, -1)
    return codes * scale.view(E4M3).astype(np.float64).repeat(16, -1) * global_scale


def write_row(block_bytes: np.ndarray, row: int, entries_per_block: int, data: np.ndarray, scale: np.ndarray) -> None:
    """Put one entry into a block: all data rows first, then all scale rows."""
    block_bytes[row * len(data) :][: len(data)] = data
    block_bytes[entries_per_block * len(data) + row * len(scale) :][: len(scale)] = scale


def _encode_fp8(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    groups = _grouped(x, group)
    amax = np.maximum(np.abs(groups).max(-1), np.float32(1e-4))
    byte = ue8m0_ceil(amax.astype(np.float64) / 448)
    codes = np.clip(groups / byte.view(E8M0).astype(np.float32)[..., None], -448, 448).astype(E4M3)
    return codes.view(np.uint8).reshape(x.shape), byte


def _grouped(x: np.ndarray, size: int) -> np.ndarray:
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


# --- caches, queries, problems --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """A view over poisoned, permuted blocks. values: float64 [n, D] of each row of the block table."""

    view: IndexerView | KVView
    values: list[np.ndarray]


def make_cache(
    entries: Sequence[np.ndarray],
    format: str,
    *,
    entries_per_block: int = 64,
    padding: int = 0,
    rows: Sequence[int] | None = None,
    global_scale: float = 1.0,
    edit: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    kind: type = IndexerView,
    seed: int = 0,
) -> Cache:
    """Write sequences of entries [n, D] into blocks in random order; every byte that means nothing is POISON.

    Args:
        padding: extra bytes between blocks.
        rows: which sequence each row of the block table shows (rows may share); default one row each.
        edit: called with (sequence, data rows, scale rows) before they are written, to plant codes by hand.
    """
    dim = entries[0].shape[1]
    data_bytes, scale_bytes = ROW_BYTES[format, dim]
    payload = entries_per_block * (data_bytes + scale_bytes)
    stride = -(-payload // 16) * 16 + padding
    blocks = [-(-len(e) // entries_per_block) for e in entries]
    order = np.random.default_rng(seed).permutation(sum(blocks) + 3)
    storage = np.full((len(order), stride), POISON, np.uint8)
    tables, values, first = [], [], 0
    for seq, (x, count) in enumerate(zip(entries, blocks, strict=True)):
        data, scale = encode_rows(x, format, global_scale=global_scale)
        if edit is not None:
            edit(seq, data, scale)
        tables.append(order[first : first + count])
        first += count
        for i in range(len(x)):
            block, row = divmod(i, entries_per_block)
            write_row(storage[tables[-1][block]], row, entries_per_block, data[i], scale[i])
        values.append(decode_rows(data, scale, format, global_scale=global_scale))
    rows = range(len(entries)) if rows is None else rows
    block_table = np.full((len(rows), max(blocks, default=0) + 2), INT_MAX, np.int32)
    block_table[:, 1::2] = -1
    for row, seq in enumerate(rows):
        block_table[row, : blocks[seq]] = tables[seq]
    schema = CacheSchema(format, entries_per_block, block_stride=stride, head_dim=dim)
    view = kind(torch.from_numpy(storage), schema, torch.from_numpy(block_table), global_scale)
    return Cache(view, [values[seq] for seq in rows])


def make_query(q: np.ndarray, format: str) -> tuple[QuantizedQuery | torch.Tensor, np.ndarray]:
    """fp32 q [T, H, D] in `format` ("fp32" and "bf16" are plain tensors), and its float64 values."""
    data, scale = encode_rows(q, format)
    values = decode_rows(data, scale, format)
    data, scale = torch.from_numpy(data), torch.from_numpy(scale)
    if format in ("fp32", "bf16"):
        return data.view(torch.float32 if format == "fp32" else torch.bfloat16), values
    if format == "fp8":
        return QuantizedQuery(format, data.view(torch.float8_e4m3fn), scale.view(torch.float32).squeeze(-1)), values
    return QuantizedQuery(format, data, scale), values


@dataclass(frozen=True)
class Problem:
    """Arguments of `score_topk`, and q in float64."""

    q: QuantizedQuery | torch.Tensor
    q_values: np.ndarray
    weights: torch.Tensor
    cache: Cache
    valid_lens: torch.Tensor
    seq_ids: torch.Tensor

    def call(self, function: Callable, **options: object) -> object:
        return function(
            self.q, self.weights, self.cache.view, valid_lens=self.valid_lens, seq_ids=self.seq_ids, **options
        )

    def take(self, rows: Sequence[int]) -> "Problem":
        """The same queries in another order, or some of them."""
        q, rows = self.q, list(rows)
        if isinstance(q, QuantizedQuery):
            q = replace(q, data=q.data[rows], scale=None if q.scale is None else q.scale[rows])
        else:
            q = q[rows]
        parts = (self.q_values[rows], self.weights[rows], self.cache, self.valid_lens[rows], self.seq_ids[rows])
        return Problem(q, *parts)

    def to(self, device: str) -> "Problem":
        """A copy on a device: each tensor with its strides and the bytes between its rows."""
        q, view = self.q, self.cache.view
        if isinstance(q, QuantizedQuery):
            scale = None if q.scale is None else copy_strided(q.scale, device)
            q = replace(q, data=copy_strided(q.data, device), scale=scale)
        else:
            q = copy_strided(q, device)
        storage, block_table = copy_strided(view.storage, device), copy_strided(view.block_table, device)
        cache = replace(self.cache, view=replace(view, storage=storage, block_table=block_table))
        rows = (copy_strided(x, device) for x in (self.valid_lens, self.seq_ids))
        return Problem(q, self.q_values, copy_strided(self.weights, device), cache, *rows)

    def keys(self, t: int) -> np.ndarray:
        """float64 [n, D]: the entries that query t sees."""
        return self.cache.values[int(self.seq_ids[t])][: int(self.valid_lens[t])]

    def exact_row(self, t: int) -> np.ndarray:
        """float64 scores of query t."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self.weights[t].double().cpu().numpy() @ np.maximum(self.q_values[t] @ self.keys(t).T, 0)


# Of mxfp4 groups in which no code is above 0.5 (0x99) or 1.5 (0xBB): what is left of each byte, and a row's scales
LOW_CODES = [(mask, scales) for mask in (0x99, 0xBB) for scales in ((127, 110), (110, 127), (0, 0), (230, 230), (3, 0))]


def with_low_codes(problem: Problem, mask: int, scales: tuple[int, int]) -> Problem:
    """The problem with other mxfp4 keys, whose largest values lie far below what their scales allow.

    A quantiser would give such a group a smaller scale, if there is one.
    """

    def plant(_seq: int, data: np.ndarray, scale: np.ndarray) -> None:
        data &= mask
        scale[:, ::2], scale[:, 1::2] = scales

    view = problem.cache.view
    rng = np.random.default_rng(0)
    keys = [rng.normal(size=values.shape).astype(np.float32) for values in problem.cache.values]
    cache = make_cache(keys, "mxfp4", entries_per_block=view.schema.entries_per_block, edit=plant)
    return replace(problem, cache=cache)


def copy_strided(x: torch.Tensor, device: str) -> torch.Tensor:
    """A copy of `x` and of all memory that it lies in; `Tensor.to` would squeeze out what is between the rows."""
    memory = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    return memory.to(device, copy=True).view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def make_problem(
    lens: Sequence[int],
    *,
    format: str = "mxfp4",
    query_format: str | None = None,
    num_heads: int = 8,
    head_dim: int = 64,
    valid_lens: Sequence[int] | None = None,
    seq_ids: Sequence[int] | None = None,
    exact: bool = False,
    seed: int = 0,
    **cache_options: object,
) -> Problem:
    """Random keys in sequences of `lens` entries and one query per `valid_lens`.

    exact: draw numbers that every format holds and whose scores need no rounding in fp32, so that every
    implementation must give the bits of the float64 score. There are many ties.
    """
    rng = np.random.default_rng(seed)
    draw = _exact_numbers if exact else _spread_numbers
    valid_lens = list(lens) if valid_lens is None else list(valid_lens)
    seq_ids = range(len(valid_lens)) if seq_ids is None else seq_ids
    cache = make_cache([draw(rng, (n, head_dim)) for n in lens], format, seed=seed, **cache_options)
    q, q_values = make_query(draw(rng, (len(valid_lens), num_heads, head_dim)), query_format or format)
    weights = rng.integers(-8, 9, (len(valid_lens), num_heads)) / 4 if exact else rng.normal(size=q_values.shape[:2])
    problem = Problem(
        q,
        q_values,
        torch.from_numpy(weights.astype(np.float32)),
        cache,
        torch.tensor(valid_lens, dtype=torch.int32),
        torch.tensor(list(seq_ids), dtype=torch.int32),
    )
    if exact:
        for t in range(len(valid_lens)):
            assert _largest_sum(problem, t) * 64 < 2**24, "the numbers are multiples of 1/64 and must sum exactly"
    return problem


def problem_with_scores(
    scores: Sequence[np.ndarray], format: str = "fp32", *, unit: float = 1.0, **cache_options: object
) -> Problem:
    """One query per row whose scores are (for finite normal numbers: exactly) the given ones, in `unit`.

    Key s is (score, 0, ...) and half of the heads see it as it is, half negated: ReLU cannot hide a sign. "bf16" keys
    hold the score as a sum of three parts, for bf16 queries to add up. The unit, a power of two, is in the weights.
    """
    parts = [_bf16_parts(row) if format == "bf16" else np.asarray(row, np.float32)[:, None] for row in scores]
    width = parts[0].shape[1]
    keys = [np.zeros((len(row), 64), np.float32) for row in scores]
    for key, part in zip(keys, parts, strict=True):
        key[:, :width] = part
    q = np.zeros((len(scores), 8, 64), np.float32)
    q[:, :4, :width], q[:, 4:, :width] = 1, -1
    weights = torch.tensor([unit / 4] * 4 + [-unit / 4] * 4).repeat(len(scores), 1)
    lens = torch.tensor([len(row) for row in scores], dtype=torch.int32)
    seq_ids = torch.arange(len(scores), dtype=torch.int32)
    return Problem(*make_query(q, format), weights, make_cache(keys, format, **cache_options), lens, seq_ids)


def _bf16_parts(x: np.ndarray) -> np.ndarray:
    """fp32 [n, 3]: bf16 numbers whose sum is fp32 x, but for bits below 2^-133. NaN and inf go into the first."""
    rest = np.asarray(x, np.float32).copy()
    parts = np.zeros((len(rest), 3), np.float32)
    for i in range(3):  # the upper half of an fp32 number is the bf16 number toward zero
        parts[:, i] = (rest.view(np.uint32) & 0xFFFF0000).view(np.float32)
        rest = np.where(np.isfinite(rest), rest, 0) - np.where(np.isfinite(rest), parts[:, i], 0)
    return parts


def adversarial_row(kind: str, n: int) -> np.ndarray:
    """n adversarial scores."""
    rng = np.random.default_rng(n)
    with np.errstate(over="ignore"):
        return {
            "all-equal": np.full(n, 0.3),
            "all-zero": np.zeros(n),
            "zero-plateau": np.where(rng.random(n) < 0.5, 0.0, rng.normal(size=n)),
            "last-bit": (0x3F800000 + rng.permutation(n) % 5).astype(np.int32).view(np.float32),
            "sorted-up": np.arange(n) / 7,
            "sorted-down": -np.arange(n) / 7,
            "signed-zeros": rng.choice([0.0, -0.0], n),
            "few-values": rng.choice([-1.0, 0.0, 2.0], n),
            "nan": np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n)),
            "all-nan": np.full(n, np.nan),
            "nan-of-both-signs": rng.choice(np.uint32([0xFFFFFFFF, 0x7FC00000, 0xFFC00001, 0]), n).view(np.float32),
            "inf": rng.choice([np.inf, -np.inf, 1.0, -1.0], n),
            "inf-and-nan": rng.choice([np.inf, -np.inf, np.nan, 0.0], n),
            "denormal": rng.integers(-9, 9, n) * 1.4e-45,
            "beyond-fp16": rng.normal(size=n) * 1e30,
            "all-negative": -1 - rng.random(n),
        }[kind].astype(np.float32)


ADVERSARIAL_KINDS = ["all-equal", "all-zero", "zero-plateau", "last-bit", "sorted-up", "sorted-down", "signed-zeros"]
ADVERSARIAL_KINDS += [
    "few-values",
    "nan",
    "all-nan",
    "nan-of-both-signs",
    "inf",
    "inf-and-nan",
    "denormal",
    "beyond-fp16",
]
ADVERSARIAL_KINDS += ["all-negative"]


def _exact_numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.choice([-3, -2, -1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5, 2, 3], size=shape)
    x[..., ::16] = 3  # the largest of each group makes every format's scale a power of two
    return (x * 2.0 ** rng.integers(-1, 2, (*shape[:-1], 1))).astype(np.float32)


def _spread_numbers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian, each entry with its own magnitude, some entries with very unequal scale groups."""
    magnitude = 2.0 ** rng.integers(-3, 4, (*shape[:-1], 1))
    tilt = np.where(rng.random((*shape[:-1], 1)) < 0.2, 2.0 ** np.linspace(0, -12, shape[-1]), 1.0)
    return (rng.normal(size=shape) * magnitude * tilt).astype(np.float32)


def _largest_sum(problem: Problem, t: int) -> float:
    dots = np.abs(problem.weights[t].numpy()) @ np.maximum(problem.q_values[t] @ problem.keys(t).T, 0)
    return float(dots.max(initial=0))


# --- checks ---------------------------------------------------------------------------------------------------


def assert_same_bits(got: np.ndarray | torch.Tensor, want: np.ndarray | torch.Tensor, what: str) -> None:
    """Equal in dtype, shape and every bit, or AssertionError naming the first place where not."""
    got, want = (x.detach().cpu().contiguous().numpy() if isinstance(x, torch.Tensor) else x for x in (got, want))
    assert (got.dtype, got.shape) == (want.dtype, want.shape), f"{what}: {got.dtype}{got.shape}"
    integers = np.dtype(f"i{got.dtype.itemsize}")
    bad = np.argwhere(np.ascontiguousarray(got).view(integers) != np.ascontiguousarray(want).view(integers))
    if len(bad):
        place = tuple(bad[0].tolist())
        raise AssertionError(f"{what}: {len(bad)} differ, first at {place}: got {got[place]!r}, want {want[place]!r}")


def expected_topk(scores: np.ndarray, top_k: int, order: str) -> tuple[np.ndarray, np.ndarray]:
    """What `score_topk` promises for one row of fp32 scores: indices int32 [k] and scores fp32 [k]."""
    nan = np.isnan(scores)
    best = np.lexsort((-np.where(nan, 0, scores), nan))[:top_k].astype(np.int32)  # stable: ties to the smaller index
    if order == "index":
        best = np.sort(best)
    indices, kept = np.full(top_k, -1, np.int32), np.full(top_k, -np.inf, np.float32)
    indices[: len(best)] = best
    kept[: len(best)] = np.where(nan[best], -np.inf, scores[best])
    return indices, kept


def slots_of(view: IndexerView | KVView, seq_id: int, indices: np.ndarray) -> np.ndarray:
    """int32 slots of entry indices, -1 kept."""
    per_block = view.schema.entries_per_block
    table = view.block_table[seq_id].cpu().numpy()
    safe = np.maximum(indices, 0)
    return np.where(indices < 0, -1, table[safe // per_block] * per_block + safe % per_block).astype(np.int32)


def check_scores(scores: torch.Tensor, problem: Problem, relative: float | None) -> None:
    """Dense scores keep promise 1 against float64, with `relative` for the error of a row's norm, and are -inf beyond.

    Without `relative` only the bound of each score is checked: that of the norm says nothing where a row is small
    because its terms cancel or meet zeros.
    """
    scores = scores.cpu()
    for t, length in enumerate(problem.valid_lens.tolist()):
        assert (scores[t, length:] == -torch.inf).all(), f"query {t} has a score beyond its length {length}"
        if length == 0:
            continue
        want, got = problem.exact_row(t), scores[t, :length].double().numpy()
        heads, dim = problem.q_values[t].shape
        size = np.abs(problem.weights[t].cpu().numpy()) @ np.linalg.norm(problem.q_values[t], axis=-1)
        bound = 1e-3 * size * np.linalg.norm(problem.keys(t), axis=-1) / np.sqrt(dim)
        share = np.abs(got - want) / np.maximum(bound, 1e-300)
        worst = np.argmax(np.where(np.isnan(share), np.inf, share))
        margin = f"entry {worst} is off by {share[worst]:.3g} of its bound: {got[worst]}, exact {want[worst]}"
        assert share[worst] <= 1, f"query {t} of {heads} x {dim}: {margin}"
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300)
        assert relative is None or error <= relative, (
            f"query {t} of {heads} x {dim}: relative norm error {error:.2e}, promised {relative:.0e}; {margin}"
        )


def listed_entries(blocks: np.ndarray, block_entries: int, length: int) -> np.ndarray:
    """Ascending entries below `length` that lie in one of the blocks; negative ids name none."""
    named = {int(i) * block_entries + j for i in blocks if i >= 0 for j in range(block_entries)}
    return np.array(sorted(entry for entry in named if entry < length), np.int64)


def make_lists(
    problem: Problem, num_candidates: int, *, block_entries: int = 8, most: int | None = None, seed: int = 0
) -> torch.Tensor:
    """int32 [T, num_candidates] random blocks of each query's sequence: ascending, some of them not visible, -1 behind.

    Every other list has the newest block, as chosen ones do, whose last entries may not be visible.

    most: how many at most; by default as many as there is room for, or blocks.
    """
    rng, view = np.random.default_rng(seed), problem.cache.view
    lists = np.full((len(problem.weights), num_candidates), -1, np.int32)
    for t, length in enumerate(problem.valid_lens.tolist()):
        newest = (length - 1) // block_entries
        blocks = min(newest + 3, view.max_entries // block_entries)
        count = min(blocks, num_candidates, blocks if most is None else most)
        picked = rng.permutation(blocks)[:count]
        if count and newest >= 0 and t % 2 == 0 and newest not in picked:
            picked[0] = newest
        lists[t, :count] = np.sort(picked)
    return torch.from_numpy(lists).to(problem.weights.device)


def check_topk(
    score_topk: Callable,
    problem: Problem,
    top_k: int,
    *,
    order: str = "index",
    output: str = "entry",
    dense: torch.Tensor | None = None,
    **options: object,
) -> None:
    """`score_topk` gives the stable sort of each row of `dense`, cut at k, bit for bit; with `candidates` among the
    options, of the entries in them.

    Without `dense` the scores are those of float64, so the problem must be exact in fp32.
    """
    lists, block_entries = options.get("candidates"), options.get("candidate_entries", 8)
    result = problem.call(score_topk, top_k=top_k, order=order, output=output, return_scores=True, **options)
    indices, scores = (x.cpu().numpy() for x in result)
    dense = None if dense is None else dense.cpu()
    assert indices.shape == scores.shape == (len(problem.weights), top_k), indices.shape
    for t, length in enumerate(problem.valid_lens.tolist()):
        row = problem.exact_row(t).astype(np.float32) if dense is None else dense[t, :length].numpy()
        listed = np.arange(length) if lists is None else listed_entries(lists[t].tolist(), block_entries, length)
        want_indices, want_scores = expected_topk(row[listed] + np.float32(0), top_k, order)
        want_indices = np.where(want_indices < 0, -1, np.append(listed, 0)[want_indices]).astype(np.int32)
        if output == "slot":
            want_indices = slots_of(problem.cache.view, int(problem.seq_ids[t]), want_indices)
        what = f"query {t} of length {length}, k {top_k}, order {order}"
        assert_same_bits(indices[t], want_indices, f"{output} indices of {what}")
        assert_same_bits(scores[t], want_scores, f"scores of {what}")


# name -> (problem, top_k, order, output). Exact problems: float64 says what every bit must be. Each is made with the
# format that stands in for "fp32" keys where an implementation has none.
TOPK_CASES: dict[str, tuple[Callable[..., Problem], int, str, str]] = {
    f"{format}-h{heads}-d{dim}-block{block}-k{k}-{order}-{output}": (
        lambda fp32="fp32", format=format, heads=heads, dim=dim, block=block: make_problem(
            [150, 97],
            format=fp32 if format == "fp32" else format,
            num_heads=heads,
            head_dim=dim,
            entries_per_block=block,
            valid_lens=[97, 150, 3, 64, 65, 0],
            seq_ids=[1, 0, 0, 0, 1, 0],
            exact=True,
            padding=48,
        ),
        k,
        order,
        output,
    )
    for format, heads, dim, block, k, order, output in (
        ("mxfp4", 64, 128, 64, 40, "index", "entry"),
        ("mxfp4", 8, 64, 48, 40, "score", "slot"),
        ("nvfp4", 8, 128, 16, 5, "score", "entry"),
        ("fp8", 16, 128, 64, 96, "index", "slot"),
        ("bf16", 8, 64, 256, 65, "score", "entry"),
        ("fp32", 8, 64, 32, 200, "index", "entry"),
    )
}
TOPK_CASES |= {
    name: (lambda fp32="fp32", scores=scores: problem_with_scores(scores, fp32), k, order, "entry")
    for name, scores, k, order in (
        ("equal-scores", [np.ones(100)], 7, "index"),
        ("zero-plateau-around-k", [np.array([-1.0, 0, 3, 0, 0, -2, 0, 5, 0] * 9)], 30, "score"),
        ("best-entries-in-the-last-partial-block", [np.arange(70.0)], 4, "index"),
        ("negative-scores", [-np.arange(70.0)], 4, "score"),
        ("nan-last", [np.array([1, np.nan, -np.inf, 2, np.nan])], 4, "score"),
        ("fewer-entries-than-k", [np.arange(5.0), np.zeros(0)], 9, "index"),
    )
}
TOPK_CASES["next-entry-is-better"] = (
    lambda fp32="fp32": replace(
        problem_with_scores([np.arange(70.0)], fp32), valid_lens=torch.tensor([66], dtype=torch.int32)
    ),
    3,
    "index",
    "entry",
)

# (compress_ratio, position) -> entries that a query at that position sees
VISIBLE = {(4, t): n for t, n in ((0, 0), (2, 0), (3, 1), (6, 1), (7, 2), (2047, 512), (2051, 513), (4099, 1025))}
VISIBLE |= {(128, 126): 0, (128, 127): 1, (128, 254): 1, (128, 255): 2, (4, -1): 0, (4, 2**20 - 1): 2**18}


def check_visible(visible_entries: Callable, compress_ratio: int) -> None:
    """Golden visibility numbers."""
    golden = {t: n for (ratio, t), n in VISIBLE.items() if ratio == compress_ratio}
    got = visible_entries(torch.tensor(list(golden)), compress_ratio)
    want = torch.tensor(list(golden.values()), dtype=torch.int32)
    assert_same_bits(got, want, f"entries visible from {list(golden)}")


# (format, head_dim, entries_per_block, padding)
APPEND_CASES = [
    (format, dim, block, padding)
    for format, dim in (("mxfp4", 128), ("mxfp4", 64), ("nvfp4", 128), ("nvfp4", 64), ("fp8", 128), ("bf16", 128))
    for block, padding in ((16, 0), (48, 16), (64, 256), (256, 0))
] + [
    (format, 512, block, padding)
    for format in ("fp8_ds_mla", "bf16")
    for block, padding in ((2, 0), (53, 8 if format == "fp8_ds_mla" else 16), (64, 64))
]


def check_append(append_entries: Callable, case: tuple[str, int, int, int], **options: object) -> None:
    """The intended rows hold the independent writer's bytes, and no other byte changed."""
    format, dim, entries_per_block, padding = case
    rng = np.random.default_rng(0)
    num_blocks, count = 4, entries_per_block + 5
    stride = entries_per_block * sum(ROW_BYTES[format, dim]) + padding
    before = rng.integers(0, 256, (num_blocks, stride), np.uint8)
    slots = rng.permutation(num_blocks * entries_per_block)[:count]
    slots[::7] = -1
    x = _spread_numbers(rng, (len(slots), dim))
    x[::11, :40] = 0
    view = (KVView if dim == 512 else IndexerView)(
        torch.from_numpy(before.copy()),
        CacheSchema(format, entries_per_block, block_stride=stride, head_dim=dim),
        torch.zeros(1, 1, dtype=torch.int32),
        0.75 if format == "nvfp4" else 1.0,
    )
    want = before.copy()
    data, scale = encode_rows(
        x, format, rounding=options.get("rounding", "nearest_even"), global_scale=view.global_scale
    )
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            write_row(want[slot // entries_per_block], slot % entries_per_block, entries_per_block, data[i], scale[i])
    append_entries(torch.from_numpy(x), view, torch.from_numpy(slots), **options)
    whole = view.storage.as_strided((num_blocks, stride), (stride, 1), 0)
    assert_same_bits(whole, want, f"bytes [block, offset] of {case}")


def rejections(checks: Iterable[Callable]) -> int:
    """How many checks fail by assertion. Any other exception is a broken test."""
    count = 0
    for check in checks:
        try:
            check()
        except AssertionError:
            count += 1
    return count
