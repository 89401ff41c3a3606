"""score_topk and index_scores on a GPU: one kernel scores and selects, a second joins split sequences.

`kernels/score.cu` says how; here is the policy: which product serves which operands, and how a block of threads is
shaped. Nothing is read back from the device and nothing depends on what tensors hold, so a call can be captured in a
CUDA graph and follows its inputs when replayed.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.cuda.compiler import Specialisation
from lightning_indexer.cuda.launcher import FLOAT32, INT32, INT64, POINTER, Kernel, device_arch, load_kernel
from lightning_indexer.cuda.operands import ALIGNMENT, block_type, check_storage
from lightning_indexer.query import QuantizedQuery

SCORE_PARAMETERS = {
    "query_data": POINTER,
    "query_scale": POINTER,
    "query_format": INT32,
    "query_global_scale": FLOAT32,
    "weights": POINTER,
    "num_tokens": INT32,
    "num_heads": INT32,
    "storage": POINTER,
    "block_stride": INT32,
    "num_blocks": INT32,
    "global_scale": FLOAT32,
    "block_table": POINTER,
    "table_row_stride": INT64,
    "table_column_stride": INT32,
    "num_seqs": INT64,
    "max_entries": INT64,
    "valid_lens": POINTER,
    "seq_ids": POINTER,
    "seq_ids_are_int64": INT32,
    "top_k": INT32,
    "by_score": INT32,
    "as_slots": INT32,
    "out": POINTER,
    "out_row_stride": INT64,
    "out_column_stride": INT64,
    "scores_out": POINTER,
    "scores_row_stride": INT64,
    "scores_column_stride": INT64,
    "candidates": POINTER,
    "num_candidates": INT32,
    "candidate_shift": INT32,
    "workspace": POINTER,
}
MERGE_PARAMETERS = {
    "queries": INT32,
    "capacity": INT32,
    "top_k": INT32,
    "by_score": INT32,
    "as_slots": INT32,
    "num_blocks": INT32,
    "block_table": POINTER,
    "table_row_stride": INT64,
    "table_column_stride": INT32,
    "num_seqs": INT64,
    "seq_ids": POINTER,
    "seq_ids_are_int64": INT32,
    "out": POINTER,
    "out_row_stride": INT64,
    "out_column_stride": INT64,
    "scores_out": POINTER,
    "scores_row_stride": INT64,
    "scores_column_stride": INT64,
    "candidates": POINTER,
    "num_candidates": INT32,
    "candidate_shift": INT32,
    "early_blocks": INT32,
    "workspace": POINTER,
}
ENGINES = ("auto", "portable")
INDEX_FORMATS = ("mxfp4", "nvfp4", "fp8", "bf16")
MAX_WORKSPACE_BYTES = 64 * 2**20
MAX_STRIDE = 2**31 - 1  # bytes from block to block

# In the order of QueryFormat in kernels/query.cuh
_QUERY_FORMATS = ("mxfp4", "nvfp4", "fp8", "bf16", "fp16", "fp32")
_PLAIN_QUERIES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FP8_FORMATS = ("mxfp4", "fp8")  # exact in E4M3, up to a power of two per row
_FIRST_OVERLAP_ARCH = 90  # a kernel may start before the last one has ended
# In calls of no more tiles some multiprocessors are left to the merge, which starts early there and makes itself ready.
_SHORT_CALL_TILES, _BLOCKS_PER_EARLY_ONE = 20_000, 32
# Hopper adds products of E4M3 with about 14 bits. Where a factor fills E4M3 a few heads may be off by more than a score
# may be (where both do, a single head in 3 of 10,000 scores); the errors of many heads cancel. Products of E2M1 have
# fewer bits.
_FEWEST_FP8_HEADS = 64
_TWO_TERMS = ("fp16", "fp32")  # queries that take two bf16 to hold

_FIRST_TEAMS = 8  # queries per block from which each warpgroup cuts back one of them at a time
_HALF_ENTRIES = 64  # a tile has one such half or two

_PADDED_HEADS = (8, 16, 32, 64, 128)
_MAX_COLUMNS = 128  # of one product
_MAX_QUERIES_PER_PRODUCT = 4
_MERGE_THREADS = 512
_MERGE_SCRATCH_BYTES = 8448  # `MergeShared` of kernels/merge.cu without the keys
_MAX_BLOCKS = 256  # kMaxParts there

# (largest top_k, candidates per list, the same where lists may be long, the same for one query per block, candidates
# that a merge holds, most queries per block): lists are at least twice top_k, and those of all blocks fit the
# workspace. Long ones run full less. `Front` in kernels/work.cuh knows what a merge holds, too.
_LISTS = ((512, 2048, 2048, 4096, 4096, 16), (2048, 4096, 5632, 8192, 8192, 8), (4096, 8192, 8192, 8192, 7168, 4))
# A lone query of at most `_MOST_HELD_TOP_K` may have its list in shared memory: a part of 4,096 entries fits, and what
# five warpgroups have under way. Lists in the workspace are quicker where parts have no more than `_UNCUT_ENTRIES`, as
# they hardly run full then.
_MOST_HELD_TOP_K, _UNDER_WAY = 512, 5 * 128
_HELD_CANDIDATES, _UNCUT_ENTRIES = 4096 + _UNDER_WAY, _LISTS[0][3] - _UNDER_WAY
_MOST_CANDIDATES = 5632  # that the registers of four warpgroups leave room for where a product has more than 64 columns
_WANTED, _MOST_WANTED = (1, 1, 2, 4, 4), 16  # queries per block that suit so many queries of a sequence
_FEW_QUERIES = 1  # `Workspace` of kernels/work.cuh has the same

_RUN_ENTRIES = 8  # `Lists` of kernels/work.cuh has the same
_MOST_LISTED_GROUPS = (4, 3)  # warpgroups, up to 64 heads and beyond: what their registers leave room for
_LISTED_RINGS = ((1, 4), (1, 2))  # halves of a tile, which a list has one of, and tiles that there is room for


@dataclass(frozen=True)
class Shape:
    """How a block of threads of `kernels/score.cu` works; see there."""

    heads: int
    queries: int
    per_product: int
    groups: int
    capacity: int
    stages: int
    halves: int
    max_top_k: int
    is_listed: bool = False
    holds_list: bool = False

    @property
    def threads(self) -> int:
        return 128 * self.groups

    @property
    def teams(self) -> int:
        """Queries whose candidates are cut back at the same time, as far as registers hold their candidates."""
        if self.queries < _FIRST_TEAMS or self.capacity > 2048 and self.groups % 2:
            return 1
        return self.groups if self.capacity <= 2048 else self.groups // 2

    @property
    def offset(self) -> int:
        """Bytes of `Shared` in kernels/score.cu, which checks that they suffice."""
        weights = 4 * ((self.heads // 4 + 3) // 4 * 4 + 4) * 4
        held = 8 * (self.capacity + self.threads) + 1056 if self.holds_list else 0  # the list, and `Raiser`
        return -(-(self.queries * (self.heads * 8 + weights + 32) + self.teams * 2080 + held + 512) // 1024) * 1024

    def __str__(self) -> str:
        numbers = (
            self.heads,
            self.queries,
            self.per_product,
            self.groups,
            self.capacity,
            self.teams,
            self.stages,
            self.offset,
            self.halves,
            self.max_top_k,
        )
        kind = ", true" if self.is_listed else ", false, true" if self.holds_list else ""
        return f"Shape<{', '.join(str(number) for number in numbers)}{kind}>"


@dataclass(frozen=True)
class Product:
    """Which matrix product serves a pair of operands."""

    keys: str  # policy in kernels/keys.cuh
    element: str  # "E4M3" or "BF16"
    terms: int
    is_wgmma: bool

    @property
    def has_fp4_keys(self) -> bool:
        return self.keys.startswith(("Mxfp4", "Nvfp4"))

    def operand_bytes(self, heads: int, dim: int) -> int:
        """Shared memory of one query."""
        row = dim * (1 if self.element == "E4M3" else 2)
        return heads * self.terms * (max(row, 128) if self.is_wgmma else row)

    def type(self, shape: Shape, dim: int) -> str:
        name = "Wgmma" if self.is_wgmma else "MmaSync"
        steps = dim // (32 if self.element == "E4M3" else 16)
        return f"{name}<{self.element}, {shape.heads * shape.per_product}, {steps}, {self.terms}>"


def score_topk(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    *,
    by_score: bool,
    as_slots: bool,
    out: Tensor,
    scores_out: Tensor | None,
    workspace: Tensor,
    candidates: Tensor | None = None,
    candidate_entries: int = _RUN_ENTRIES,
    engine: str = "auto",
) -> None:
    """Fill `out` [T, k] (and `scores_out`) with the best entries of each row.

    The arguments are those of `ops.score_topk.score_topk` and have been checked there; seq_ids None means that query t
    uses row t of the block table. Runs on the current stream without waiting. What lies out of range is clamped.

    Args:
        candidates: int32 [T, NB] blocks of `candidate_entries` entries that each query chooses from, None: from all.
        candidate_entries: 8 times a power of two that divides the entries of a page.
        engine: "auto", or "portable" for the kernel of other architectures on Hopper (to compare the two).
    Raises:
        NotImplementedError: the GPU or the format of the keys is not served.
        ValueError: the storage does not start at a multiple of 16 bytes.
    """
    num_tokens, top_k = out.shape
    call = _Call("score_topk", q, weights, view, valid_lens, seq_ids, candidates)
    if num_tokens == 0:
        return
    max_entries = view.max_entries
    num_candidates = 0 if candidates is None else candidates.shape[1]
    if max_entries == 0 or candidates is not None and num_candidates == 0:
        _fill_with_nothing(out, scores_out)
        return
    plan = call.plan(top_k, engine)
    tiles = call.most_tiles(max_entries if candidates is None else min(num_candidates * candidate_entries, max_entries))
    early_blocks = plan.blocks // _BLOCKS_PER_EARLY_ONE if plan.merge.overlaps and tiles <= _SHORT_CALL_TILES else 0
    blocks = min(plan.blocks - early_blocks, tiles)
    scores = (0, 0, 0) if scores_out is None else (scores_out.data_ptr(), *scores_out.stride())
    outputs = (out.data_ptr(), *out.stride(), *scores)
    address = workspace.data_ptr()
    lists = (0, 0, 0)
    if call.candidates is not None:
        lists = (call.candidates.data_ptr(), num_candidates, (candidate_entries // _RUN_ENTRIES).bit_length() - 1)
    plan.score.launch((blocks, 1, 1), *call.operands(max_entries), top_k, by_score, as_slots, *outputs, *lists, address)
    if blocks > 1:
        plan.merge.launch(
            (blocks, plan.shape.queries, 1),
            plan.shape.queries,
            plan.shape.capacity,
            top_k,
            by_score,
            as_slots,
            view.num_blocks,
            *call.table_arguments,
            *call.seq_ids_arguments,
            *outputs,
            *lists,
            early_blocks,
            address,
        )


@torch.no_grad()
def index_scores(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    valid_lens: Tensor,
    seq_ids: Tensor | None,
    out: Tensor,
    engine: str = "auto",
) -> None:
    """Fill `out` [T, max_len] with dense scores, -inf beyond each row's length; entries beyond max_len are left out."""
    call = _Call("index_scores", q, weights, view, valid_lens, seq_ids)
    out.fill_(-torch.inf)
    width = min(view.max_entries, out.shape[1])
    if call.num_tokens == 0 or width == 0:
        return
    plan = call.plan(0, engine)
    blocks = min(plan.blocks, call.most_tiles(width))
    plan.score.launch(
        (blocks, 1, 1), *call.operands(width), 1, 0, 0, 0, 0, 0, out.data_ptr(), *out.stride(), 0, 0, 0, 0
    )


@functools.cache
def workspace_bytes(top_k: int, device_index: int) -> int:
    """Bytes that a call with this `top_k` may use on a device, whatever its other operands."""
    multiprocessors = _multiprocessors(device_index)
    return max(
        _workspace_bytes(_blocks(queries, capacity, top_k, multiprocessors), queries, capacity, top_k)
        for queries in (1, 2, 4, 8, 16)
        if queries <= _lists(top_k)[-1]
        for capacity in _capacities(top_k, queries)
    )


def specialisations(schema: CacheSchema, arch: str) -> Iterator[Specialisation]:
    """All that blocks of `schema` may need for 64 heads, and one for each other number of heads."""
    if schema.format not in INDEX_FORMATS:
        return
    seen: set[Specialisation] = set()
    for engine in ENGINES if arch == "sm_90a" else ENGINES[:1]:
        for query_format in _QUERY_FORMATS:
            for heads in _PADDED_HEADS:
                for wanted in _queries_wanted(heads):
                    for top_k in (0, *(row[0] for row in _LISTS)) if heads == 64 else (512,):
                        product = _product(schema, query_format, heads, arch, engine)
                        shape = _shape(product, schema, heads, wanted, top_k, arch)
                        seen.add(_score_specialisation(schema, product, shape, top_k == 0, arch))
                        if top_k > 0:
                            listed = _shape(product, schema, heads, 1, top_k, arch, is_listed=True)
                            short = _shape(product, schema, heads, 1, top_k, arch, is_short=True)
                            for lone in (listed, short):
                                seen.add(_score_specialisation(schema, product, lone, False, arch))
    yield from sorted(seen, key=str)
    for top_k, *_ in _LISTS:
        for is_lone in (True, False):
            yield _merge_specialisation(schema, top_k, is_lone, arch)


def _queries_wanted(heads: int) -> tuple[int, ...]:
    return (1, 2, 4, 16) if heads == 64 else (1, 16)


@dataclass(frozen=True)
class _Plan:
    """What a call launches."""

    score: Kernel
    merge: Kernel
    shape: Shape
    blocks: int


@functools.cache
def _plan(
    schema: CacheSchema,
    query_format: str,
    num_heads: int,
    wanted: int,
    top_k: int,
    engine: str,
    device_index: int,
    is_listed: bool = False,
    is_short: bool = False,
) -> _Plan:
    """What to launch.

    Args:
        wanted: queries per block that would suit the call.
        top_k: 0 for dense scores.
        is_listed: see `Lists` in work.cuh.
        is_short: hardly any list will run full, by an average over all blocks.
    """
    arch = device_arch(device_index)
    heads = next(padded for padded in _PADDED_HEADS if padded >= num_heads)
    product = _product(schema, query_format, heads, arch, engine)
    shape = _shape(product, schema, heads, wanted, top_k, arch, is_listed, is_short)
    score = load_kernel(
        _score_specialisation(schema, product, shape, top_k == 0, arch),
        device_index,
        SCORE_PARAMETERS,
        threads=shape.threads + (_producer_threads(shape) if _is_copied(product, shape) else 0),
        shared_bytes=_shared_bytes(product, shape, schema),
    )
    is_lone = shape.queries <= _FEW_QUERIES
    merge = load_kernel(
        _merge_specialisation(schema, top_k, is_lone, arch),
        device_index,
        MERGE_PARAMETERS,
        threads=_MERGE_THREADS,
        shared_bytes=_merge_shared_bytes(top_k, is_lone, arch),
        overlaps=_arch_number(arch) >= _FIRST_OVERLAP_ARCH,
    )
    multiprocessors = _multiprocessors(device_index)
    return _Plan(score, merge, shape, _blocks(shape.queries, shape.capacity, top_k, multiprocessors))


def _product(schema: CacheSchema, query_format: str, heads: int, arch: str, engine: str) -> Product:
    is_wgmma = arch == "sm_90a" and engine == "auto"
    is_fp8 = schema.format in _FP8_FORMATS and query_format in _FP8_FORMATS and (is_wgmma or _has_fp8_mma_sync(arch))
    if is_wgmma and "fp8" in (schema.format, query_format) and heads < _FEWEST_FP8_HEADS:
        is_fp8 = False
    keys = {
        "mxfp4": "Mxfp4AsE4M3" if is_fp8 else "Mxfp4AsBf16",
        "nvfp4": "Nvfp4AsBf16",
        "fp8": "Fp8AsE4M3" if is_fp8 else "Fp8AsBf16",
        "bf16": "Bf16Keys",
    }[schema.format]
    terms = 2 if query_format in _TWO_TERMS else 1
    return Product(f"{keys}<{schema.dim}>", "E4M3" if is_fp8 else "BF16", terms, is_wgmma)


def _shape(
    product: Product,
    schema: CacheSchema,
    heads: int,
    wanted: int,
    top_k: int,
    arch: str,
    is_listed: bool = False,
    is_short: bool = False,
) -> Shape:
    """The most queries per block up to `wanted`, then the most tiles, that fit shared memory."""
    max_top_k, *_, most = _lists(top_k)
    # On Hopper's 132 multiprocessors the workspace has room, and so have the registers, unless they hold fp8 keys.
    is_long = product.is_wgmma and (product.has_fp4_keys or product.element == "BF16")
    for fewer_groups in (False, True):
        for queries in (16, 8, 4, 2, 1):
            capacity = _capacity(top_k, queries, is_long)
            per_product = _queries_per_product(product, queries, heads, top_k)
            groups = 1 if fewer_groups else _groups(product, queries, heads * per_product, capacity)
            rings = _rings(product, queries == per_product and heads * per_product <= 64)
            holds_list = groups > 4 and _may_hold_list(top_k, queries) and not (is_listed or is_short)
            if holds_list:
                capacity = _HELD_CANDIDATES
            if is_listed:
                groups, rings = min(groups, _MOST_LISTED_GROUPS[heads > 64]), _LISTED_RINGS
            for halves, stages in (*rings, (1, 1)) if fewer_groups else rings:
                sizes = heads, queries, per_product, groups, capacity, stages, halves, max_top_k
                shape = Shape(*sizes, is_listed, holds_list)
                fits = _shared_bytes(product, shape, schema) <= _shared_limit(arch)
                if queries <= min(wanted, most) and fits:
                    return shape
    raise AssertionError(f"no shape fits {schema} with {heads} heads on {arch}")


def _rings(product: Product, is_one_narrow_product: bool) -> tuple[tuple[int, int], ...]:
    """Halves of a tile and tiles that a warpgroup has room for, from the most wanted to the least.

    Two halves share the work around their products, which counts where FP4 keys leave memory waiting. wgmma takes them
    one after the other: where keys stay for several products, registers hold those of one half only.
    """
    if not product.is_wgmma:
        return (2, 4), (2, 2), (2, 1)
    if is_one_narrow_product:
        is_light = product.has_fp4_keys and product.terms == 1
        return ((2, 4), (2, 2), (1, 4), (1, 2)) if is_light else ((1, 4), (1, 2))
    return (1, 4), (1, 2), (1, 1)


def _queries_per_product(product: Product, queries: int, heads: int, top_k: int) -> int:
    """More than one only where their columns fit the registers: the keys take few, and so does the loop around."""
    is_shared = queries >= _FIRST_TEAMS or queries == 2 and top_k > 0
    if product.element == "BF16":
        is_shared = queries >= 4
    if product.is_wgmma and is_shared:
        return min(queries, max(_MAX_COLUMNS // heads, 1), _MAX_QUERIES_PER_PRODUCT)
    return 1


def _groups(product: Product, queries: int, columns: int, capacity: int) -> int:
    """Warpgroups: as many as the registers for keys, a product's columns and a team's candidates leave room for."""
    if not product.is_wgmma or columns > 64 and (product.element == "BF16" or capacity > _MOST_CANDIDATES):
        return 3
    is_small = product.element == "E4M3" and product.has_fp4_keys and columns <= 64 and queries < _FIRST_TEAMS
    return 5 if is_small else 4


def _producer_threads(shape: Shape) -> int:
    """`kProducerThreads` of the copying feed in kernels/feed.cuh: whole warpgroups, a warp for each that scores."""
    return 128 if shape.groups <= 4 else 256


def _shared_limit(arch: str) -> int:
    """Bytes of shared memory that a block may have (CUDA programming guide, compute capabilities)."""
    number = _arch_number(arch)
    if number in (80, 87):
        return 163 * 1024
    return (227 if 90 <= number < 120 else 99) * 1024


def _arch_number(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("af"))


def _has_fp8_mma_sync(arch: str) -> bool:
    """Whether mma.sync on E4M3 is an instruction; Hopper and sm_100 convert to fp16 at every product."""
    number = _arch_number(arch)
    return number == 89 or number >= 120


@functools.cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def _lists(top_k: int) -> tuple[int, int, int, int, int, int]:
    return next(row for row in _LISTS if top_k <= row[0])


def _capacity(top_k: int, queries: int, is_long: bool) -> int:
    """Candidates in a list."""
    _, short, long, alone, *_ = _lists(top_k)
    if queries <= _FEW_QUERIES:
        return alone
    return long if is_long else short


def _may_hold_list(top_k: int, queries: int) -> bool:
    return queries <= _FEW_QUERIES and 0 < top_k <= _MOST_HELD_TOP_K


def _capacities(top_k: int, queries: int) -> set[int]:
    """All that lists of so many queries may have."""
    held = {_HELD_CANDIDATES} if _may_hold_list(top_k, queries) else set()
    return held | {_capacity(top_k, queries, is_long) for is_long in (False, True)}


def _blocks(queries: int, capacity: int, top_k: int, multiprocessors: int) -> int:
    """Blocks of threads: one per multiprocessor, unless their lists would not fit the workspace."""
    return min(multiprocessors, _MAX_BLOCKS, MAX_WORKSPACE_BYTES // _workspace_bytes(1, queries, capacity, top_k))


def _workspace_bytes(blocks: int, queries: int, capacity: int, top_k: int) -> int:
    """As `Workspace` in kernels/work.cuh lays it out."""
    is_apart = queries <= _FEW_QUERIES
    later, fronts = (capacity, 2 * top_k) if is_apart else (top_k, 0)
    return blocks * (queries * ((capacity + later + fronts) * 8 + 2 * 16) + 4 * 4)


def _shared_bytes(product: Product, shape: Shape, schema: CacheSchema) -> int:
    """`Shared` of kernels/score.cu, then operands, which later give way to sorted lists, then the rings."""
    operands = shape.queries * product.operand_bytes(shape.heads, schema.dim)
    return shape.offset + max(operands, shape.teams * shape.max_top_k * 8) + _ring_bytes(product, shape, schema)


def _is_copied(product: Product, shape: Shape) -> bool:
    """Whether the copy engine feeds the block. It copies whole tiles, and what lists name is no such thing."""
    return product.is_wgmma and not shape.is_listed


def _ring_bytes(product: Product, shape: Shape, schema: CacheSchema) -> int:
    """`kBytes` of the feed in kernels/feed.cuh."""
    slots = shape.groups * shape.stages
    if _is_copied(product, shape):
        control = 16 * slots + (4 * slots + 11) // 8 * 8 + 24
        return -(-control // 128) * 128 + slots * shape.halves * _HALF_ENTRIES * schema.bytes_per_entry
    lane_bytes = schema.data_bytes // 4 + (4 if schema.scale_bytes else 0)
    return slots * 4 * 64 * shape.halves * lane_bytes


def _score_specialisation(
    schema: CacheSchema, product: Product, shape: Shape, is_dense: bool, arch: str
) -> Specialisation:
    arguments = (
        product.keys,
        product.type(shape, schema.dim),
        f"{'BulkFeed' if _is_copied(product, shape) else 'LaneFeed'}<{product.keys}, {block_type(schema)}, "
        f"{shape.groups}, {shape.stages}, {shape.halves}{', true' if shape.is_listed else ''}>",
        block_type(schema),
        str(shape),
        str(product.terms),
        "true" if is_dense else "false",
    )
    return Specialisation("score.cu", "score_topk", arguments, arch)


def _merge_specialisation(schema: CacheSchema, top_k: int, is_lone: bool, arch: str) -> Specialisation:
    arguments = (block_type(schema), str(_merge_capacity(top_k)), "true" if is_lone else "false")
    return Specialisation("merge.cu", "merge_topk", arguments, arch)


def _merge_shared_bytes(top_k: int, is_lone: bool, arch: str) -> int:
    """`MergeShared` of kernels/merge.cu; of lone queries, more than half of what a multiprocessor has.

    There are no more of them than multiprocessors. Blocks that share one wait for each other while others are idle.
    """
    needed = 8 * (_merge_capacity(top_k) + _lists(top_k)[0]) + _MERGE_SCRATCH_BYTES
    return max(needed, _shared_limit(arch) // 2 + 1024) if is_lone else needed


def _merge_capacity(top_k: int) -> int:
    """`Front::merge_room` of kernels/work.cuh: candidates that a merging block holds."""
    return _lists(top_k)[-2]


class _Call:
    """The operands of a call as the kernel takes them: contiguous, by address."""

    def __init__(
        self,
        op: str,
        q: Tensor | QuantizedQuery,
        weights: Tensor,
        view: IndexerView,
        valid_lens: Tensor,
        seq_ids: Tensor | None,
        candidates: Tensor | None = None,
    ) -> None:
        if view.schema.format not in INDEX_FORMATS:
            raise NotImplementedError(
                f"{op}: on a GPU index keys must be one of {INDEX_FORMATS}, got {view.schema.format!r} "
                "(impl='reference' serves it)"
            )
        check_storage(op, view)
        if view.schema.stride > MAX_STRIDE:
            raise NotImplementedError(
                f"{op}: on a GPU block_stride must be at most {MAX_STRIDE} bytes, got {view.schema.stride}"
            )
        self.view = view
        self.num_tokens, self.num_heads = weights.shape
        if isinstance(q, QuantizedQuery):
            self.query_format, data, scale, self.global_scale = q.format, q.data, q.scale, q.global_scale
        else:
            self.query_format, data, scale, self.global_scale = _PLAIN_QUERIES[q.dtype], q, None, 1.0
        self.data, self.weights, self.valid_lens = _aligned(data), weights.contiguous(), valid_lens.contiguous()
        self.scale = None if scale is None else _aligned(scale)
        self.seq_ids = None if seq_ids is None else seq_ids.contiguous()  # held until it has been launched
        self.candidates = None if candidates is None else candidates.contiguous()
        table = view.block_table
        self.table_arguments = (table.data_ptr(), *table.stride(), view.num_seqs)
        self.seq_ids_arguments = (
            (0, False) if self.seq_ids is None else (self.seq_ids.data_ptr(), self.seq_ids.dtype == torch.int64)
        )

    def plan(self, top_k: int, engine: str) -> _Plan:
        """What to launch; top_k 0: dense scores."""
        view, is_listed = self.view, self.candidates is not None
        wanted = 1 if is_listed else self._queries_per_seq()
        index = view.device.index
        is_short = self.num_tokens * view.max_entries <= _multiprocessors(index) * _UNCUT_ENTRIES
        return _plan(view.schema, self.query_format, self.num_heads, wanted, top_k, engine, index, is_listed, is_short)

    def most_tiles(self, max_entries: int) -> int:
        """Tiles of entries that the call can have, by its shapes."""
        return self.num_tokens * -(-max_entries // _HALF_ENTRIES)

    def operands(self, max_entries: int) -> tuple[float, ...]:
        view = self.view
        return (
            self.data.data_ptr(),
            0 if self.scale is None else self.scale.data_ptr(),
            _QUERY_FORMATS.index(self.query_format),
            self.global_scale,
            self.weights.data_ptr(),
            self.num_tokens,
            self.num_heads,
            view.storage.data_ptr(),
            view.schema.stride,
            view.num_blocks,
            view.global_scale,
            *self.table_arguments,
            max_entries,
            self.valid_lens.data_ptr(),
            *self.seq_ids_arguments,
        )

    def _queries_per_seq(self) -> int:
        """Queries per block that suit the call, from its shapes: 1, 2, 4 or 16."""
        if self.seq_ids is None:
            return 1
        average = -(-self.num_tokens // max(self.view.num_seqs, 1))
        return _WANTED[average] if average < len(_WANTED) else _MOST_WANTED


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, from a multiple of 16 bytes on: the kernel reads several values at once."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


@torch.no_grad()
def _fill_with_nothing(out: Tensor, scores_out: Tensor | None) -> None:
    """What rows without entries get."""
    out.fill_(-1)
    if scores_out is not None:
        scores_out.fill_(-torch.inf)
