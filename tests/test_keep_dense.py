"""Weights that are multiplied out once: the same bits as at every call, and what a dense module refuses."""

from collections.abc import Callable

import pytest
import torch
from test_layer import CSA, HCA, SWA, exact, make_cache, nvfp4_weights, random_weights, tiny_config
from test_layer_v41 import CONFIG as V41
from test_layer_v41 import make_caches
from torch import Tensor, nn

from lightning_indexer import AttentionSubBlock, Compressor, CSAIndexer, DSV4Config, Fp8BlockLinear, Nvfp4Linear
from lightning_indexer.checkpoint import FP8_LINEARS, block_scale_shape
from lightning_indexer.formats import FP8_BLOCK, V41_FP8_BLOCK
from lightning_indexer.nn.linear import Linear, WeightsNotLoaded, strip

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
ROWS, COLUMNS = 256, 96


def fp8_weights(rows: int, columns: int, block: int = FP8_BLOCK, seed: int = 3) -> dict[str, Tensor]:
    """Values of scale 1 / sqrt(columns); block scales that are no powers of two, so that bf16 and fp16 round."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(rows, columns, generator=generator) * 64
    scale = (torch.rand(block_scale_shape((rows, columns), block), generator=generator) + 0.5) / 64 * columns**-0.5
    return {"weight": codes.to(torch.float8_e4m3fn), "scale": scale}


def dense_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)).to(dtype)}


# name -> a layer without weights, its weights, and bytes of a weight as stored
LINEARS: dict[str, tuple[Callable[[], Linear], dict[str, Tensor], float]] = {
    "fp32": (lambda: Linear(COLUMNS, ROWS), dense_weights(torch.float32), 4),
    "bf16": (lambda: Linear(COLUMNS, ROWS), dense_weights(torch.bfloat16), 2),
    "fp8": (lambda: Fp8BlockLinear(COLUMNS, ROWS), fp8_weights(ROWS, COLUMNS), 1),
    "fp8-blocks-of-32": (lambda: Fp8BlockLinear(COLUMNS, ROWS), fp8_weights(ROWS, COLUMNS, V41_FP8_BLOCK), 1),
    "nvfp4": (lambda: Nvfp4Linear(COLUMNS, ROWS), nvfp4_weights(ROWS, COLUMNS), 0.5625),
    "nvfp4-to-mxfp4": (lambda: Nvfp4Linear(COLUMNS, ROWS, output_format="mxfp4"), nvfp4_weights(ROWS, COLUMNS), 0.5625),
}


def make_linear(kind: str) -> Linear:
    make, weights, _ = LINEARS[kind]
    linear = make()
    linear.load_weights(weights)
    return linear


def stored_bytes(module: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())


def bits(output: object) -> list[Tensor]:
    """Of a tensor, or of a quantised query."""
    return [output] if isinstance(output, Tensor) else [output.data, output.scale]


def assert_same(got: object, want: object) -> None:
    for one, other in zip(bits(got), bits(want), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), f"{int((one != other).sum())} values differ"


# --- linear layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", LINEARS)
def test_a_dense_linear_gives_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    linear, x = make_linear(kind), torch.randn(5, COLUMNS).to(dtype)
    want, weight = linear(x), linear.dense_weight(dtype)
    linear.keep_dense(dtype)
    assert_same(linear(x), want)
    assert_same(linear.dense_weight(dtype), weight)


@pytest.mark.parametrize("kind", LINEARS)
def test_what_was_stored_is_dropped(kind: str) -> None:
    linear, per_weight = make_linear(kind), LINEARS[kind][2]
    assert stored_bytes(linear) == pytest.approx(per_weight * ROWS * COLUMNS, rel=0.01)
    linear.keep_dense()
    assert list(linear.state_dict()) == ["kept"] and stored_bytes(linear) == 2 * ROWS * COLUMNS
    kept = linear.get("kept")
    linear.keep_dense()
    assert linear.get("kept") is kept, "nothing is left to do the second time"


@pytest.mark.parametrize("kind", LINEARS)
def test_a_dense_linear_refuses_other_dtypes(kind: str) -> None:
    linear = make_linear(kind)
    linear.keep_dense()
    message = f"^{type(linear).__name__}: weight is kept dense in torch.bfloat16 and .* got torch.float32 .*again"
    with pytest.raises(TypeError, match=message):
        linear(torch.randn(5, COLUMNS))
    with pytest.raises(TypeError, match=message):
        linear.keep_dense(torch.float32)


@pytest.mark.parametrize("kind", LINEARS)
def test_loading_replaces_what_is_kept(kind: str) -> None:
    linear, x = make_linear(kind), torch.randn(5, COLUMNS)
    want = linear(x)
    linear.load_weights({name: torch.zeros_like(weight) for name, weight in LINEARS[kind][1].items()})
    linear.keep_dense()
    linear.load_weights(LINEARS[kind][1])
    assert set(linear.state_dict()) == set(LINEARS[kind][1])
    assert_same(linear(x), want)


@pytest.mark.parametrize("kind", LINEARS)
def test_what_is_kept_moves_and_is_saved_with_the_module(kind: str) -> None:
    linear, other, x = make_linear(kind), make_linear(kind), torch.randn(5, COLUMNS).bfloat16()
    linear.keep_dense()
    other.load_weights({name: torch.zeros_like(weight) for name, weight in LINEARS[kind][1].items()})
    other.keep_dense()
    other.load_state_dict(linear.state_dict())
    assert_same(other(x), linear(x))
    assert linear.to("meta").dense_weight(torch.bfloat16).device.type == "meta"


# --- the compressor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("config", "layer"),
    [(tiny_config(), CSA), (tiny_config(), HCA), (V41, 1), (V41, 4)],
    ids=["ratio4", "ratio128", "ratio2", "ratio1"],
)
def test_a_compressor_keeps_its_projections_in_fp32(config: DSV4Config, layer: int, dtype: torch.dtype) -> None:
    weights = strip(random_weights(config, layer), "compressor.")
    projections = [name.removesuffix(".weight") for name in weights if name.startswith(("wkv", "wgate"))]
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    x, entries = torch.randn(150, config.hidden_size).to(dtype), []
    for is_dense in (False, True):
        compressor = Compressor(config, layer, dim=config.head_dim)
        compressor.load_weights(weights)
        before = compressor.state_dict()
        if is_dense:
            compressor.keep_dense()
            compressor.keep_dense(torch.float16)
        cache = exact(config, layer)
        entries.append(compressor(x, cache.begin_step([0], [len(x)]), cache.compressor_state))
    assert_same(*entries)
    changed = {name for name, tensor in compressor.state_dict().items() if tensor.dtype != torch.bfloat16}
    assert changed == set(projections) and compressor.get("wkv").dtype == torch.float32
    assert list(compressor.state_dict()) == list(before), "names stay"
    compressor.load_weights(weights)
    assert compressor.get("wkv").dtype == torch.bfloat16


# --- whole layers ---------------------------------------------------------------------------------------------

STEPS = (([0, 2], [140, 37]), ([2], [1]), ([1, 0], [5, 1]))


def stored_weights(config: DSV4Config, layer: int, *, index_query: str = "fp8") -> dict[str, Tensor]:
    """As checkpoints store them: FP8 in blocks, the rest bf16; the indexer's queries from FP8 or NVFP4."""
    stored, block = {}, V41_FP8_BLOCK if config.is_v41 else FP8_BLOCK
    for name, value in random_weights(config, layer, seed=layer).items():
        module = name.removesuffix(".weight")
        if module == "indexer.wq_b" and index_query == "nvfp4":
            tensors = nvfp4_weights(*value.shape)
        elif module in FP8_LINEARS:
            tensors = fp8_weights(*value.shape, block, seed=sum(map(ord, name)))
        else:
            stored[name] = value.bfloat16()
            continue
        stored |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
    return stored


def make_stored_block(config: DSV4Config, layer: int, **options: str) -> AttentionSubBlock:
    block = AttentionSubBlock(config, layer)
    block.load_weights(stored_weights(config, layer, **options))
    return block


def cache_bytes(cache: object) -> list[Tensor]:
    pools = (cache.kv_pool, cache.index_pool)
    rings = (cache.window, cache.compressor_state, cache.indexer_state)
    return [pool.storage for pool in pools if pool is not None] + [ring.rows for ring in rings if ring is not None]


def run(blocks: list[AttentionSubBlock], caches: list, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of all blocks, in residual order, in all steps, and what lies in the caches then."""
    torch.manual_seed(8)
    outputs = []
    for seq_ids, counts in STEPS:
        x = torch.randn(sum(counts), blocks[0].config.hidden_size).to(dtype)
        for block, cache in zip(blocks, caches, strict=True):
            cache.begin_step(seq_ids, counts)
            outputs.append(block(x, cache))
            x = x + outputs[-1]
    return [*outputs, *(tensor for cache in caches for tensor in cache_bytes(cache))]


def assert_all_same(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)
    assert got[0].isfinite().all() and got[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("layer", "index_query"),
    [(SWA, "fp8"), (CSA, "fp8"), (CSA, "nvfp4"), (HCA, "fp8")],
    ids=["SWA", "CSA", "CSA-nvfp4", "HCA"],
)
def test_a_dense_layer_gives_the_same_bits(layer: int, index_query: str, dtype: torch.dtype) -> None:
    config = tiny_config()
    block = make_stored_block(config, layer, index_query=index_query)
    want = run([block], [make_cache(config, layer, dtype=dtype)], dtype)
    block.keep_dense(dtype)
    assert_all_same(run([block], [make_cache(config, layer, dtype=dtype)], dtype), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_dense_layers_of_v41_give_the_same_bits(dtype: torch.dtype) -> None:
    blocks = [make_stored_block(V41, layer) for layer in range(V41.num_hidden_layers)]
    want = run(blocks, make_caches(dtype=dtype), dtype)
    for block in blocks:
        block.keep_dense(dtype)
    assert_all_same(run(blocks, make_caches(dtype=dtype), dtype), want)


@pytest.mark.parametrize(("config", "layer"), [(tiny_config(), CSA), (V41, 1)], ids=["V4", "V4.1"])
def test_a_layer_keeps_all_its_parts(config: DSV4Config, layer: int) -> None:
    """Twice the bytes of what checkpoints store, all linear layers and projections."""
    block = make_stored_block(config, layer)
    linears = [part for part in block.modules() if isinstance(part, Linear)]
    block.keep_dense()
    assert len(linears) == (7 if config is not V41 else 8), "V4.1 has wk too"
    assert all(list(linear.state_dict()) == ["kept"] for linear in linears)
    compressors = [part for part in block.modules() if isinstance(part, Compressor)]
    assert all(part.get("wkv").dtype == torch.float32 for part in compressors)
    assert len(compressors) == (2 if config is not V41 else 1)
    assert {buffer.device.type for buffer in block.to("meta").buffers()} == {"meta"}


def test_loading_a_layer_replaces_what_is_kept() -> None:
    config = tiny_config()
    block = make_stored_block(config, CSA)
    names, want = list(block.state_dict()), run([block], [make_cache(config, CSA)], torch.float32)
    block.keep_dense()
    block.load_weights(stored_weights(config, CSA))
    assert list(block.state_dict()) == names
    assert_all_same(run([block], [make_cache(config, CSA)], torch.float32), want)


def test_a_dense_layer_refuses_a_step_of_another_dtype_and_writes_nothing() -> None:
    config = tiny_config()
    block, cache = make_stored_block(config, CSA), make_cache(config, CSA)
    block.keep_dense()
    cache.begin_step([0], [9])
    before = [tensor.clone() for tensor in cache_bytes(cache)]
    with pytest.raises(TypeError, match="weight is kept dense in torch.bfloat16 .* got torch.float32"):
        block(torch.randn(9, config.hidden_size), cache)
    for tensor, old in zip(cache_bytes(cache), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), old.view(torch.uint8))


def test_a_part_that_is_kept_in_another_dtype_stops_all() -> None:
    block = make_stored_block(tiny_config(), CSA)
    block.indexer.weights_proj.keep_dense(torch.float32)
    before = {name: tensor.data_ptr() for name, tensor in block.named_buffers()}
    with pytest.raises(TypeError, match="^Linear: weight is kept dense in torch.float32 .* got torch.bfloat16"):
        block.keep_dense()
    assert before == {name: tensor.data_ptr() for name, tensor in block.named_buffers()}, "nothing was changed"
    block.keep_dense(torch.float32)


EMPTY = [
    Linear(16, 8),
    Fp8BlockLinear(16, 8),
    Nvfp4Linear(16, 8),
    Compressor(tiny_config(), CSA, dim=512),
    CSAIndexer(tiny_config()),
    AttentionSubBlock(tiny_config(), SWA),
    AttentionSubBlock(tiny_config(), CSA),
]


@pytest.mark.parametrize("module", EMPTY, ids=lambda m: m._get_name())
def test_there_must_be_something_to_keep(module: nn.Module) -> None:
    with pytest.raises(WeightsNotLoaded, match=f"^{module._get_name()}: .* not loaded"):
        module.keep_dense()
    message = rf"{module._get_name()}: dtype must be one of .*torch.float16\), got torch.float64"
    with pytest.raises(ValueError, match=message):
        module.keep_dense(torch.float64)
