"""Steps whose shapes the host knows: a decode step asks the device for nothing, and the next one may take its place.

There need be no GPU for this. The layer lies on "meta", whose tensors hold nothing: whatever asks for a number, or for
a shape that depends on one, fails there, and what comes from the host is elsewhere. Kernels are not launched.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_layer import CSA, HCA, INDEX_FORMATS, SWA, make_block, make_cache, nvfp4_weights, tiny_config
from test_layer_v41 import CONFIG as V41_CONFIG
from test_layer_v41 import FEW as V41_FEW_CANDIDATES
from test_layer_v41 import make_blocks as make_v41_blocks
from test_layer_v41 import make_caches as make_v41_caches
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_indexer import (
    AttentionSubBlock,
    DSV4Config,
    Fp8BlockLinear,
    LayerCacheHandle,
    Nvfp4Linear,
    OutOfBlocks,
)
from lightning_indexer.cache.step import Step
from lightning_indexer.nn.linear import Linear

KINDS = pytest.mark.parametrize("layer", [SWA, CSA, HCA], ids=["SWA", "CSA", "HCA"])
META = torch.device("meta")
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
CONFIG = tiny_config()

# --- the layer asks for nothing -------------------------------------------------------------------------------


class Host(AssertionError):
    """An operation would wait for the device, or bring something to it from the host."""


class Numbers(TorchFunctionMode):
    """Refuse tensors made from lists, which do not show below the functions of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        makes = func in (torch.tensor, torch.as_tensor, torch.asarray)
        indexes = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        parts = args[1] if indexes and isinstance(args[1], tuple) else args[1:2]
        if makes or (indexes and any(isinstance(part, list) for part in parts)):
            raise Host(f"{func} brings numbers from the host")
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Write down every operation with its numbers and shapes; refuse what meets the host."""

    def __init__(self) -> None:
        super().__init__()
        self.program: list[str] = []
        self._numbers = Numbers()

    def __enter__(self):
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        indices = args[1] if func.overloadpacket in INDEXING else ()
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise Host(f"{func} with a mask has as many rows as that has ones")
        if any(tensor.device != META for tensor in tensors) or kwargs.get("device", META) != META:
            raise Host(f"{func} on {[str(tensor.device) for tensor in tensors]} {kwargs}")
        self.note(str(func), *args, *kwargs.items())
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            raise Host(f"{func}: {error}") from error

    def note(self, *what: object) -> None:
        leaves = torch.utils._pytree.tree_leaves(what)
        self.program.append(" ".join(str(list(x.shape) if isinstance(x, torch.Tensor) else x) for x in leaves))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Makes "meta" a device that the kernels serve."""
    mode = Recorder()
    for op in ("append", "compress", "gather_kv", "score_topk", "select_candidates", "attention"):
        monkeypatch.setattr(f"lightning_indexer.ops.{op}.choose_impl", lambda *_args, **_options: "cuda")
    monkeypatch.setattr("lightning_indexer.ops.indexer_query.choose_impl", lambda *_args, **_options: "reference")
    kernels = ("append.append_entries", "compress.compress_entries", "gather.gather_kv")
    for kernel in (*kernels, "score_topk.score_topk", "score_topk.index_scores"):
        monkeypatch.setattr(f"lightning_indexer.cuda.{kernel}", lambda *args, **options: mode.note(args, options))
    yield mode


def on_meta(layer: int, **options: object) -> tuple[AttentionSubBlock, LayerCacheHandle]:
    block = make_block(CONFIG, layer).to(META)
    cache = make_cache(CONFIG, layer, device=META, dtype=torch.bfloat16, **options)
    return block, cache


def run_step(block: AttentionSubBlock, cache: LayerCacheHandle) -> torch.Tensor:
    x = torch.empty(cache.require_step().num_tokens, CONFIG.hidden_size, dtype=torch.bfloat16, device=META)
    return block(x, cache)


CARELESS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "read a mask": lambda x: x[x > 0],
    "write a mask": lambda x: x.__setitem__(x > 0, x[:1]),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "a list": lambda x: torch.tensor([1.0, 2.0], device=META),
    "to the device": lambda x: x + torch.ones(3, device="cpu").to(META),
    "into the device": lambda x: x.copy_(torch.ones(3, device="cpu")),
    "from the device": lambda x: x.cpu(),
    "list of indices": lambda x: x[[0, 1]],
    "host indices": lambda x: x[torch.tensor([1], device="cpu")],
}


@pytest.mark.parametrize("name", CARELESS)
def test_the_recorder_sees(name: str, recorder: Recorder) -> None:
    x = torch.empty(3, device=META)
    with pytest.raises(Host), recorder:
        CARELESS[name](x)


STEPS = {"decode": [1, 1, 1], "draft tokens": [2, 2, 2], "ragged": [1, 0, 7], "beyond the window": [300, 1, 9]}


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("kv_format", ["fp8_ds_mla", "bf16"])
def test_a_csa_step_asks_for_nothing_in_any_format(index_format: str, kv_format: str, recorder: Recorder) -> None:
    block, cache = on_meta(CSA, index_format=index_format, kv_format=kv_format)
    check_steps(block, cache, [1, 1, 1], recorder)


IN, OUT = CONFIG.query_compression_dim, CONFIG.indexer_num_heads * CONFIG.indexer_head_dim
FP8_WEIGHTS = {"weight": torch.ones(OUT, IN).to(torch.float8_e4m3fn), "scale": torch.ones(OUT // 128, 1)}


@pytest.mark.parametrize(
    ("linear", "weights"),
    [
        (Fp8BlockLinear(IN, OUT), FP8_WEIGHTS),
        (Nvfp4Linear(IN, OUT), nvfp4_weights(OUT, IN)),
        (Nvfp4Linear(IN, OUT, output_format="mxfp4"), nvfp4_weights(OUT, IN)),
    ],
    ids=["fp8", "nvfp4", "nvfp4 to mxfp4"],
)
def test_a_step_with_quantised_weights_asks_for_nothing(linear: Linear, weights: dict, recorder: Recorder) -> None:
    block, cache = on_meta(CSA)
    assert block.indexer is not None
    linear.load_weights(weights)
    block.indexer.wq_b = linear.to(META)
    check_steps(block, cache, [1, 1, 1], recorder)


@KINDS
@pytest.mark.parametrize("counts", STEPS.values(), ids=STEPS)
def test_a_step_asks_for_nothing(layer: int, counts: list[int], recorder: Recorder) -> None:
    check_steps(*on_meta(layer), counts, recorder)


@pytest.mark.parametrize("config", [V41_CONFIG, V41_FEW_CANDIDATES], ids=["all-candidates", "few-candidates"])
def test_a_step_of_v41_layers_asks_for_nothing(config: DSV4Config, recorder: Recorder) -> None:
    """All roles, one after another, replayable as one program."""
    options = {"index_format": "mxfp4", "kv_format": "bf16", "dtype": torch.bfloat16, "max_blocks_per_seq": 4}
    blocks = [block.to(META) for block in make_v41_blocks(config)]
    caches = make_v41_caches(config, device=META, **options)
    programs = []
    for count, is_static in ((7, False), (1, True), (31, False), (0, True), (1, True)):
        for cache in caches:
            cache.begin_step([0, 2], [count, count], static=is_static)
        x = torch.empty(2 * count, config.hidden_size, dtype=torch.bfloat16, device=META)
        recorder.program.clear()
        with recorder if programs or is_static else nullcontext():  # the first puts constants on the device
            for block, cache in zip(blocks, caches, strict=True):
                x = x + block(x, cache)
        programs.append(list(recorder.program))
    assert len(programs[1]) > 100 and programs[1] == programs[4]
    chooses = ["topk" in " ".join(program) for program in programs[1:]]
    restricts = config is V41_FEW_CANDIDATES
    assert chooses == [restricts, restricts, False, restricts], "candidates, but for no tokens"


def check_steps(block: AttentionSubBlock, cache: LayerCacheHandle, counts: list[int], recorder: Recorder) -> None:
    """Static steps run one and the same program wherever they stand, and so may be replayed."""
    cache.begin_step([0, 1, 2], [3, 6, 0])
    run_step(block, cache)  # the first puts constants on the device
    programs = []
    for between in (0, 1, 2, 121, 3):
        cache.begin_step([1, 3], [between, between])
        run_step(block, cache)
        cache.begin_step([0, 3, 1], counts, static=True)
        recorder.program.clear()
        with recorder:
            run_step(block, cache)
        programs.append(list(recorder.program))
    assert len(programs[0]) > 20
    for program in programs[1:]:
        different = [pair for pair in zip(programs[0], program, strict=False) if pair[0] != pair[1]]
        assert program == programs[0], f"two programs: {different[:1]}"


@KINDS
def test_a_step_that_is_not_static_asks_for_nothing_either(layer: int, recorder: Recorder) -> None:
    block, cache = on_meta(layer)
    cache.begin_step([0, 1], [150, 9])
    run_step(block, cache)
    cache.begin_step([1, 0, 2], [1, 140, 3])
    with recorder:
        run_step(block, cache)


# --- what a step says -----------------------------------------------------------------------------------------


def plain_step(cache: LayerCacheHandle, starts: dict[int, int], growth: dict[int, int]) -> dict[str, list[int]]:
    """The same in plain Python, without rows for entries that there are not."""
    ratio = cache.compress_ratio
    want: dict[str, list[int]] = {field.name: [] for field in fields(Step)}
    for row, (seq, count) in enumerate(growth.items()):
        want["offsets"].append(len(want["positions"]))
        want["seqs"].append(seq)
        want["starts"].append(starts[seq])
        for position in range(starts[seq], starts[seq] + count):
            want["positions"].append(position)
            want["seq_ids"].append(seq)
            want["batch_rows"].append(row)
            want["valid_lens"].append((position + 1) // ratio if ratio else 0)
            if ratio and (position + 1) % ratio == 0:
                want["entry_rows"].append(row)
                want["entry_indices"].append(position // ratio)
    return want


@given(
    steps=st.lists(st.dictionaries(st.integers(0, 3), st.integers(0, 300), max_size=4), min_size=1, max_size=4),
    layer=st.sampled_from([SWA, CSA, HCA]),
    static=st.booleans(),
)
def test_a_step_says_what_plain_python_says(steps: list[dict[int, int]], layer: int, static: bool) -> None:
    cache, tokens = make_cache(CONFIG, layer, num_blocks=80), dict.fromkeys(range(4), 0)
    for growth in steps:
        want = plain_step(cache, tokens, growth)
        step = cache.begin_step(list(growth), list(growth.values()), static=static)
        exists = step.entry_rows >= 0
        for name in ("positions", "seq_ids", "batch_rows", "valid_lens", "seqs", "starts", "offsets"):
            assert getattr(step, name).tolist() == want[name], name
        assert step.entry_rows[exists].tolist() == want["entry_rows"]
        assert step.entry_indices[exists].tolist() == want["entry_indices"]
        assert (step.entry_indices[~exists] == -1).all()
        ratio = cache.compress_ratio
        assert len(exists) == (sum(-(-n // ratio) for n in growth.values()) if ratio else 0)
        assert step.max_visible >= max(want["valid_lens"], default=0)
        assert step.counts == tuple(growth.values()) and step.is_static == static
        tokens |= {seq: tokens[seq] + count for seq, count in growth.items()}


# --- static steps ---------------------------------------------------------------------------------------------


def addresses(step: Step) -> list[int]:
    return [value.data_ptr() for field in fields(step) if isinstance(value := getattr(step, field.name), torch.Tensor)]


@KINDS
def test_the_same_memory_serves_all_steps_of_a_decode(layer: int) -> None:
    """Positions 0 to 300, across entries and blocks, with four sequences at four phases, bit for bit."""
    config = tiny_config(head_dim=64, rope_head_dim=32, indexer_head_dim=64)
    block = make_block(config, layer)
    options = {"index_format": "mxfp4", "kv_format": "bf16", "num_blocks": 26, "max_blocks_per_seq": 6}
    static, fresh = (make_cache(config, layer, **options) for _ in range(2))
    xs = torch.randn(304, 4, config.hidden_size)
    for cache in (static, fresh):
        cache.begin_step([1, 2, 3], [1, 66, 79])
        block(torch.cat([xs[:1, 1], xs[:66, 2], xs[:79, 3]]), cache)
    order, first = [2, 0, 3, 1], None
    for i in range(301):
        step = static.begin_step(order, [1] * 4, static=True)
        first = first or addresses(step)
        assert addresses(step) == first
        got = block(xs[i, order], static)
        ours = fresh.begin_step(order, [1] * 4)
        assert step.max_visible >= ours.max_visible
        fresh.step = replace(ours, max_visible=step.max_visible)  # a width in common, so that sums have one order
        want = block(xs[i, order], fresh)
        assert torch.equal(got, want), f"step {i}: worst difference {(got - want).abs().max():.1e}"


@KINDS
def test_a_static_step_gives_what_any_step_gives(layer: int) -> None:
    block = make_block(CONFIG, layer)
    caches = [make_cache(CONFIG, layer, max_blocks_per_seq=8) for _ in range(2)]
    x, outputs = torch.randn(143, CONFIG.hidden_size), []
    for static, cache in enumerate(caches):
        cache.begin_step([0], [140], static=bool(static))
        parts = [block(x[:140], cache)]
        for part in x[140:].split(1):
            cache.begin_step([0], [1], static=bool(static))
            parts.append(block(part, cache))
        outputs.append(torch.cat(parts))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)  # masked rows only change the order of fp32 sums


@KINDS
def test_steps_of_one_token_may_be_run_again(layer: int) -> None:
    block = make_block(CONFIG, layer)
    once, twice = (make_cache(CONFIG, layer) for _ in range(2))
    x = torch.randn(20, 2, CONFIG.hidden_size)
    for cache in (once, twice):
        cache.begin_step([0, 1], [126, 3])
        block(torch.randn(129, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1)), cache)
    for part in x:
        for cache in (once, twice):
            cache.begin_step([0, 1], [1, 1])
        want = block(part, once)
        for _ in range(3):
            assert torch.equal(block(part, twice), want)


@pytest.mark.parametrize("layer", [CSA, HCA], ids=["CSA", "HCA"])
def test_a_step_that_completes_no_entry_writes_none(layer: int) -> None:
    block, cache = make_block(CONFIG, layer), make_cache(CONFIG, layer)
    cache.begin_step([0, 1], [128, 128])
    block(torch.randn(256, CONFIG.hidden_size), cache)
    pools = [pool for pool in (cache.kv_pool, cache.index_pool) if pool is not None]
    before = [pool.storage.clone() for pool in pools]
    cache.begin_step([1, 0], [1, 2])
    block(torch.randn(3, CONFIG.hidden_size), cache)
    assert all(torch.equal(pool.storage, old) for pool, old in zip(pools, before, strict=True))


def test_static_steps_of_other_counts_do_not_meet() -> None:
    cache = make_cache(CONFIG, CSA)
    one = cache.begin_step([0], [5], static=True)
    two = cache.begin_step([1, 0], [1, 1], static=True)
    assert one.positions.tolist() == [0, 1, 2, 3, 4] and two.positions.tolist() == [0, 5]
    assert cache.begin_step([2], [5]).positions.tolist() == [0, 1, 2, 3, 4]
    assert one.seq_ids.tolist() == [0] * 5, "only static steps are written over"
    assert cache.begin_step([1], [5], static=True).seq_ids.tolist() == [1] * 5 == one.seq_ids.tolist()


def test_a_static_step_that_does_not_fit_changes_nothing() -> None:
    cache = make_cache(CONFIG, CSA, num_blocks=2)
    step = cache.begin_step([0, 1], [64, 64], static=True)  # 16 entries each: one block each, none left
    before = [getattr(step, name).tolist() for name in ("positions", "entry_indices", "valid_lens")]
    with pytest.raises(OutOfBlocks):
        cache.begin_step([1, 0], [64, 64], static=True)
    assert [getattr(step, name).tolist() for name in ("positions", "entry_indices", "valid_lens")] == before
    assert cache.num_tokens(0) == 64 and cache.require_step() is step


def test_only_a_static_step_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(CONFIG, SWA)
    step = cache.begin_step([0], [1], static=True)
    monkeypatch.setattr(cache, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cache.require_step() is step
    cache.step = replace(step, is_static=False)
    with pytest.raises(RuntimeError, match=r"a CUDA graph needs a static step \(use begin_step\(..., static=True\)\)"):
        cache.require_step()
