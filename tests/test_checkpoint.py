"""Loading one layer's attention weights: names, shards, FP8, and every way a checkpoint can be wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4ForCausalLM

from lightning_indexer import AttentionSubBlock
from lightning_indexer.checkpoint import (
    FP8_LINEARS,
    block_scale_shape,
    expected_shapes,
    load_attention_weights,
)
from lightning_indexer.config import DSV4Config
from lightning_indexer.formats import dequantize_block_fp8

SWA, CSA, HCA, DENSE_CSA = 0, 1, 2, 3  # the layers of CONFIG
# Sizes that are no multiples of the 128 x 128 scale blocks, and more than one block each way.
CONFIG = DSV4Config(
    hidden_size=192,
    num_hidden_layers=4,
    num_heads=6,
    head_dim=32,
    rope_head_dim=16,
    query_compression_dim=144,
    o_groups=3,
    o_lora_rank=48,
    indexer_num_heads=8,
    indexer_head_dim=64,
    csa_top_k=8,
    sliding_window=16,
    compress_ratios=(0, 4, 128, 4, 0),
)
COUNTS = {SWA: 8, CSA: 18, HCA: 12}

HUGGING_FACE_NAMES = {
    "wq_a.weight": "q_a_proj.weight",
    "wq_a.scale": "q_a_proj.weight_scale_inv",
    "q_norm.weight": "q_a_norm.weight",
    "wq_b.weight": "q_b_proj.weight",
    "wq_b.scale": "q_b_proj.weight_scale_inv",
    "wkv.weight": "kv_proj.weight",
    "wkv.scale": "kv_proj.weight_scale_inv",
    "kv_norm.weight": "kv_norm.weight",
    "wo_a.weight": "o_a_proj.weight",
    "wo_a.scale": "o_a_proj.weight_scale_inv",
    "wo_b.weight": "o_b_proj.weight",
    "wo_b.scale": "o_b_proj.weight_scale_inv",
    "attn_sink": "sinks",
    "compressor.wkv.weight": "compressor.kv_proj.weight",
    "compressor.wgate.weight": "compressor.gate_proj.weight",
    "compressor.ape": "compressor.position_bias",
    "compressor.norm.weight": "compressor.kv_norm.weight",
    "indexer.wq_b.weight": "compressor.indexer.q_b_proj.weight",
    "indexer.wq_b.scale": "compressor.indexer.q_b_proj.weight_scale_inv",
    "indexer.weights_proj.weight": "compressor.indexer.scorer.weights_proj.weight",
    "indexer.compressor.wkv.weight": "compressor.indexer.kv_proj.weight",
    "indexer.compressor.wgate.weight": "compressor.indexer.gate_proj.weight",
    "indexer.compressor.ape": "compressor.indexer.position_bias",
    "indexer.compressor.norm.weight": "compressor.indexer.kv_norm.weight",
}
SCHEMES: dict[str, Callable[[int, str], str]] = {
    "official": lambda layer, name: f"layers.{layer}.attn.{name}",
    "official-model-prefix": lambda layer, name: f"model.layers.{layer}.attn.{name}",
    "hugging-face": lambda layer, name: f"model.layers.{layer}.self_attn.{HUGGING_FACE_NAMES[name]}",
    "hugging-face-no-model-prefix": lambda layer, name: f"layers.{layer}.self_attn.{HUGGING_FACE_NAMES[name]}",
}


def make_layer(
    layer: int, *, fp8: bool = True, scale_dtype: torch.dtype = torch.float8_e8m0fnu, config: DSV4Config = CONFIG
) -> dict[str, Tensor]:
    """Random tensors of a layer, stored as the released checkpoints do: FP8 linears, fp32 ape and sink, bf16 rest."""
    generator = torch.Generator().manual_seed(layer)
    tensors: dict[str, Tensor] = {}
    block = 32 if config.is_v41 else 128
    for name, shape in expected_shapes(config, layer).items():
        values = torch.randn(shape, generator=generator)
        module = name.removesuffix(".weight")
        if fp8 and module in FP8_LINEARS:
            tensors[name] = (values * 100).to(torch.float8_e4m3fn)
            codes = torch.randint(110, 124, [-(-n // block) for n in shape], generator=generator, dtype=torch.uint8)
            scale = codes.view(torch.float8_e8m0fnu)
            tensors[f"{module}.scale"] = {
                torch.uint8: codes,
                torch.float8_e8m0fnu: scale,
                torch.float32: scale.float() * 1.37,
            }[scale_dtype]
        else:
            tensors[name] = values if name.endswith(("ape", "attn_sink")) else values.bfloat16()
    return tensors


def named(tensors: dict[str, Tensor], layer: int, scheme: str = "official") -> dict[str, Tensor]:
    return {SCHEMES[scheme](layer, name): tensor for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]], *, index: bool = True) -> Path:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    if index:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layer", [SWA, CSA, HCA], ids=["swa", "csa", "hca"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "dense"])
def test_bytes_survive_under_every_naming(tmp_path: Path, layer: int, scheme: str, fp8: bool) -> None:
    tensors = make_layer(layer, fp8=fp8)
    assert sum(not name.endswith(".scale") for name in tensors) == COUNTS[layer], "tensors of such a layer"
    got = load_attention_weights(write(tmp_path, named(tensors, layer, scheme)), CONFIG, layer)
    assert list(got) == list(tensors), f"names and their order: {list(got)}"
    for name, tensor in tensors.items():
        assert_same_bytes(got[name], tensor, name)


@pytest.mark.parametrize("scheme", ["official", "hugging-face"])
@pytest.mark.parametrize("index", [True, False], ids=["index", "no-index"])
def test_shards(tmp_path: Path, scheme: str, index: bool) -> None:
    layers = {layer: named(make_layer(layer), layer, scheme) for layer in range(4)}
    both = list(layers[CSA].items())
    shards = {
        "model-00001-of-00003.safetensors": layers[SWA] | dict(both[:9]),
        "model-00002-of-00003.safetensors": dict(both[9:]) | layers[HCA],
        "model-00003-of-00003.safetensors": layers[DENSE_CSA],
    }
    write_shards(tmp_path, shards, index=index)
    for layer in range(4):
        got = load_attention_weights(tmp_path, CONFIG, layer)
        for name, tensor in make_layer(layer).items():
            assert_same_bytes(got[name], tensor, f"layer {layer} {name}")


def test_layer_1_is_not_layer_11(tmp_path: Path) -> None:
    other = {"layers.11.attn.wq_a.weight": torch.zeros(1), "mtp.1.attn.wq_a.weight": torch.zeros(1)}
    path = write(tmp_path, named(make_layer(CSA), CSA) | other)
    assert set(load_attention_weights(path, CONFIG, CSA)) == set(make_layer(CSA))


def test_only_the_shards_of_the_layer_are_opened(tmp_path: Path) -> None:
    shards = {"a.safetensors": named(make_layer(CSA), CSA), "b.safetensors": named(make_layer(HCA), HCA)}
    write_shards(tmp_path, shards)
    (tmp_path / "b.safetensors").write_bytes(b"not a safetensors file")
    got = load_attention_weights(tmp_path, CONFIG, CSA)
    assert_same_bytes(got["attn_sink"], make_layer(CSA)["attn_sink"], "attn_sink")
    with pytest.raises(ValueError, match=r"b\.safetensors: expected a safetensors file"):
        load_attention_weights(tmp_path, CONFIG, HCA)


def test_names_and_shapes_are_those_of_transformers() -> None:
    for layer in (SWA, CSA, HCA):
        theirs = {name: tuple(tensor.shape) for name, tensor in transformers_attention(layer).state_dict().items()}
        ours = {HUGGING_FACE_NAMES[name]: shape for name, shape in expected_shapes(CONFIG, layer).items()}
        assert ours == theirs, f"layer {layer}: {set(ours.items()) ^ set(theirs.items())}"


@pytest.mark.parametrize("layer", [SWA, CSA, HCA], ids=["swa", "csa", "hca"])
def test_state_dict_of_transformers_loads(tmp_path: Path, layer: int) -> None:
    state = transformers_attention(layer).state_dict()
    path = write(tmp_path, {f"model.layers.{layer}.self_attn.{name}": tensor for name, tensor in state.items()})
    got = load_attention_weights(path, CONFIG, layer)
    assert len(got) == len(state), f"{len(state)} tensors stored, {len(got)} loaded"
    for name, tensor in got.items():
        assert_same_bytes(tensor, state[HUGGING_FACE_NAMES[name]], name)


def test_save_pretrained_of_transformers_loads(tmp_path: Path) -> None:
    """It writes official names under `model.`, except for the main kv_norm, which becomes attn.norm."""
    config = transformers_config()
    model = DeepseekV4ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").is_file(), "the test wants several shards"
    ours = DSV4Config.from_json(tmp_path)
    for layer in range(config.num_hidden_layers):
        state = model.model.layers[layer].self_attn.state_dict()
        got = load_attention_weights(tmp_path, ours, layer)
        assert len(got) == len(state), f"{len(state)} tensors in layer {layer}, {len(got)} loaded"
        for name, tensor in got.items():
            assert_same_bytes(tensor, state[HUGGING_FACE_NAMES[name]], f"layer {layer} {name}")


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8, torch.float32], ids=["e8m0", "u8", "f32"])
def test_kept_scales(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    tensors = make_layer(CSA, scale_dtype=scale_dtype)
    got = load_attention_weights(write(tmp_path, named(tensors, CSA)), CONFIG, CSA)
    for module in FP8_LINEARS:
        stored = tensors[f"{module}.scale"]
        expected = stored.view(torch.float8_e8m0fnu) if scale_dtype == torch.uint8 else stored
        assert_same_bytes(got[f"{module}.scale"], expected, f"{module}.scale")


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8, torch.float32], ids=["e8m0", "u8", "f32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["to-bf16", "to-fp32"])
def test_dequantize(tmp_path: Path, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    tensors = make_layer(CSA, scale_dtype=scale_dtype)
    got = load_attention_weights(write(tmp_path, named(tensors, CSA)), CONFIG, CSA, fp8="dequantize", dtype=dtype)
    assert set(got) == set(expected_shapes(CONFIG, CSA)), "scales must be gone"
    for module in FP8_LINEARS:
        weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.scale"]
        scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
        rows, columns = (torch.arange(size) // 128 for size in weight.shape)
        expected = (weight.float() * scale[rows][:, columns]).to(dtype)
        assert_same_bytes(got[f"{module}.weight"], expected, f"{module}.weight")
    assert_same_bytes(got["compressor.ape"], tensors["compressor.ape"], "compressor.ape: dense tensors stay as stored")


def test_mixed_checkpoint_keeps_what_is_dense(tmp_path: Path) -> None:
    tensors = make_layer(CSA)
    del tensors["wo_a.scale"]
    tensors["wo_a.weight"] = torch.ones(expected_shapes(CONFIG, CSA)["wo_a.weight"], dtype=torch.float16)
    got = load_attention_weights(write(tmp_path, named(tensors, CSA)), CONFIG, CSA, fp8="dequantize")
    assert got["wo_a.weight"].dtype == torch.float16 and got["wo_b.weight"].dtype == torch.bfloat16


def test_device(tmp_path: Path) -> None:
    got = load_attention_weights(write(tmp_path, named(make_layer(SWA), SWA)), CONFIG, SWA, device="meta")
    assert {tensor.device.type for tensor in got.values()} == {"meta"}, "every tensor must be on the device asked for"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((128, 128), (1, 1)), ((129, 128), (2, 1)), ((1, 257), (1, 3)), ((8192, 1024), (64, 8)), ((8192, 1536), (64, 12))],
    ids=["one-block", "one-more-row", "one-row", "flash-indexer-wq-b", "pro-indexer-wq-b"],
)
def test_block_scale_shape(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert block_scale_shape(shape) == expected


@pytest.mark.parametrize("config", [DSV4Config.v4_flash(), DSV4Config.v4_pro()], ids=["flash", "pro"])
def test_released_shapes(config: DSV4Config) -> None:
    flash = config.hidden_size == 4096
    csa, hca = expected_shapes(config, 2), expected_shapes(config, 3)
    expected = {
        "wq_a.weight": (1024, 4096) if flash else (1536, 7168),
        "q_norm.weight": (1024,) if flash else (1536,),
        "wq_b.weight": (32768, 1024) if flash else (65536, 1536),
        "wkv.weight": (512, 4096) if flash else (512, 7168),
        "kv_norm.weight": (512,),
        "wo_a.weight": (8192, 4096) if flash else (16384, 4096),
        "wo_b.weight": (4096, 8192) if flash else (7168, 16384),
        "attn_sink": (64,) if flash else (128,),
        "compressor.wkv.weight": (1024, config.hidden_size),
        "compressor.wgate.weight": (1024, config.hidden_size),
        "compressor.ape": (4, 1024),
        "compressor.norm.weight": (512,),
        "indexer.wq_b.weight": (8192, 1024) if flash else (8192, 1536),
        "indexer.weights_proj.weight": (64, config.hidden_size),
        "indexer.compressor.wkv.weight": (256, config.hidden_size),
        "indexer.compressor.wgate.weight": (256, config.hidden_size),
        "indexer.compressor.ape": (4, 256),
        "indexer.compressor.norm.weight": (128,),
    }
    assert csa == expected, f"CSA layer: {set(csa.items()) ^ set(expected.items())}"
    hca_compressor = {name: hca[f"compressor.{name}"] for name in ("wkv.weight", "wgate.weight", "ape")}
    assert hca_compressor == {
        "wkv.weight": (512, config.hidden_size),
        "wgate.weight": (512, config.hidden_size),
        "ape": (128, 512),
    }, f"HCA compressor: {hca_compressor}"
    assert not any(name.startswith("indexer") for name in hca), "an HCA layer has no indexer"


# Each damages the tensors of the CSA layer, by full official name.
Damage = Callable[[dict[str, Tensor]], object]
PREFIX = "layers.1.attn."


def put(name: str, tensor: Tensor) -> Damage:
    return lambda tensors: tensors.__setitem__(PREFIX + name, tensor)


def drop(*names: str) -> Damage:
    return lambda tensors: [tensors.pop(PREFIX + name) for name in names]


def poke(name: str, value: float | int) -> Damage:
    """Overwrite the element [.., 1] of the last row: a byte of 8-bit tensors, a number of others."""

    def damage(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[PREFIX + name]
        bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        bits[(-1,) * (bits.dim() - 1) + (1,)] = value

    return damage


WQ_A = expected_shapes(CONFIG, CSA)["wq_a.weight"]
DAMAGED: dict[str, tuple[Damage, type[Exception], str]] = {
    "missing-one": (drop("q_norm.weight"), KeyError, r"missing layers\.1\.attn\.q_norm\.weight'?$"),
    "missing-three": (
        drop("wkv.weight", "indexer.weights_proj.weight", "compressor.ape"),
        KeyError,
        r"missing .*attn\.wkv\.weight, .*attn\.compressor\.ape, .*attn\.indexer\.weights_proj\.weight",
    ),
    "missing-scale": (drop("indexer.wq_b.scale"), KeyError, r"missing layers\.1\.attn\.indexer\.wq_b\.scale"),
    "misspelt": (
        lambda tensors: tensors.__setitem__(PREFIX + "wq_c.weight", tensors.pop(PREFIX + "wq_a.weight")),
        KeyError,
        r"missing .*wq_a\.weight; not part of such a layer: layers\.1\.attn\.wq_c\.weight",
    ),
    "unknown-name": (
        put("rotary.inv_freq", torch.ones(8)),
        ValueError,
        r"got more; .*layers\.1\.attn\.rotary\.inv_freq",
    ),
    "two-scales": (put("wq_a.weight_scale_inv", torch.ones(2, 2)), ValueError, r"not part .*wq_a\.weight_scale_inv"),
    "scale-of-a-norm": (put("q_norm.scale", torch.ones(1)), ValueError, r"not part .*attn\.q_norm\.scale"),
    "scale-of-a-dense-weight": (
        put("wq_a.weight", torch.ones(WQ_A, dtype=torch.bfloat16)),
        ValueError,
        r"attn\.wq_a\.scale must belong to an F8_E4M3 weight, got one that is BF16",
    ),
    "weight-shape": (
        put("attn_sink", torch.zeros(7)),
        ValueError,
        r"layers\.1\.attn\.attn_sink must have shape \[6\], got \[7\]",
    ),
    "weight-transposed": (
        lambda tensors: put("wq_a.weight", tensors[PREFIX + "wq_a.weight"].t().contiguous())(tensors),
        ValueError,
        r"wq_a\.weight must have shape \[144, 192\], got \[192, 144\]",
    ),
    "scale-shape": (
        put("wq_a.scale", torch.ones(5, 6)),
        ValueError,
        r"wq_a\.scale must have shape \[2, 2\], got \[5, 6\]",
    ),
    "weight-dtype": (
        put("wq_a.weight", torch.ones(WQ_A, dtype=torch.int8)),
        ValueError,
        r"wq_a\.weight must be F8_E4M3 or BF16 or F16 or F32, got I8",
    ),
    "e5m2-weight": (
        put("wkv.weight", torch.ones(32, 192).to(torch.float8_e5m2)),
        ValueError,
        r"wkv\.weight must be F8_E4M3 or BF16 or F16 or F32, got F8_E5M2",
    ),
    "fp8-compressor": (
        put("compressor.wkv.weight", torch.ones(64, 192).to(torch.float8_e4m3fn)),
        ValueError,
        r"compressor\.wkv\.weight must be BF16 or F16 or F32, got F8_E4M3",
    ),
    "scale-dtype": (
        put("wq_a.scale", torch.ones(2, 2, dtype=torch.bfloat16)),
        ValueError,
        r"wq_a\.scale must be F8_E8M0 or U8 or F32, got BF16",
    ),
    "nan-bf16": (poke("compressor.wkv.weight", float("nan")), ValueError, r"must be finite, got 1 NaN .* at \[63, 1\]"),
    "inf-fp32": (
        poke("attn_sink", float("-inf")),
        ValueError,
        r"attn_sink must be finite, got 1 NaN or Inf.* at \[1\]",
    ),
    "nan-fp8": (poke("wq_b.weight", 0x7F), ValueError, r"wq_b\.weight must be finite, got 1 NaN .* at \[191, 1\]"),
    "negative-nan-fp8": (poke("wq_b.weight", 0xFF), ValueError, r"wq_b\.weight must be finite"),
    "nan-e8m0": (poke("wq_b.scale", 0xFF), ValueError, r"wq_b\.scale must be finite, got 1 NaN .* at \[1, 1\]"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_layer_is_refused(tmp_path: Path, name: str) -> None:
    damage, error, message = DAMAGED[name]
    tensors = named(make_layer(CSA), CSA)
    damage(tensors)
    with pytest.raises(error, match=message) as caught:
        load_attention_weights(write(tmp_path, tensors), CONFIG, CSA)
    assert "layer 1 of " in str(caught.value) and "\n" not in str(caught.value), f"one line, with layer: {caught.value}"


def test_nan_in_a_uint8_scale_is_refused(tmp_path: Path) -> None:
    tensors = named(make_layer(CSA, scale_dtype=torch.uint8), CSA)
    poke("wq_a.scale", 0xFF)(tensors)
    with pytest.raises(ValueError, match=r"wq_a\.scale must be finite"):
        load_attention_weights(write(tmp_path, tensors), CONFIG, CSA)


def test_dequantised_overflow_is_refused(tmp_path: Path) -> None:
    tensors = named(make_layer(CSA), CSA)
    poke("wq_a.scale", 200)(tensors)
    path = write(tmp_path, tensors)
    load_attention_weights(path, CONFIG, CSA, fp8="dequantize", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"wq_a\.weight must be finite"):
        load_attention_weights(path, CONFIG, CSA, fp8="dequantize", dtype=torch.float16)


def test_missing_names_are_in_the_scheme_of_the_file(tmp_path: Path) -> None:
    tensors = make_layer(CSA)
    del tensors["indexer.compressor.ape"], tensors["wq_a.scale"]
    with pytest.raises(KeyError) as caught:
        load_attention_weights(write(tmp_path, named(tensors, CSA, "hugging-face")), CONFIG, CSA)
    for name in ("compressor.indexer.position_bias", "q_a_proj.weight_scale_inv"):
        assert f"model.layers.1.self_attn.{name}" in str(caught.value), f"{name} not in {caught.value}"


@pytest.mark.parametrize("stored", [CSA, HCA], ids=["indexer-in-hca", "hca-compressor-in-swa"])
def test_tensors_of_another_kind_of_layer_are_refused(tmp_path: Path, stored: int) -> None:
    layer = {CSA: HCA, HCA: SWA}[stored]
    extra = {CSA: "indexer.weights_proj.weight", HCA: "compressor.ape"}[stored]
    tensors = make_layer(layer) | {extra: make_layer(stored)[extra]}
    with pytest.raises(ValueError, match=rf"not part of such a layer: layers\.{layer}\.attn\.{extra}"):
        load_attention_weights(write(tmp_path, named(tensors, layer)), CONFIG, layer)


def test_two_schemes_in_one_file_are_refused(tmp_path: Path) -> None:
    tensors = named(make_layer(CSA), CSA) | {"model.layers.1.self_attn.sinks": torch.zeros(6)}
    with pytest.raises(ValueError, match=r"one prefix, got layers\.1\.attn\. and model\.layers\.1\.self_attn\."):
        load_attention_weights(write(tmp_path, tensors), CONFIG, CSA)


def test_absent_layer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"layer 2 .*layers\.2\.attn\.\* or .*model\.layers\.2\.self_attn\.\*, got none"):
        load_attention_weights(write(tmp_path, named(make_layer(CSA), CSA)), CONFIG, HCA)


@pytest.mark.parametrize("layer", [-1, 4])
def test_layer_out_of_range(tmp_path: Path, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"4 layers, MTP not counted\), got {layer}"):
        load_attention_weights(tmp_path, CONFIG, layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp8": "drop"}, "fp8 must be 'keep' or 'dequantize', got 'drop'"),
        ({"dtype": torch.int8}, "dtype must be one of"),
    ],
    ids=["fp8", "dtype"],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"load_attention_weights: {message}"):
        load_attention_weights(tmp_path, CONFIG, CSA, **options)


def test_path_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none: expected a \.safetensors file or a folder"):
        load_attention_weights(tmp_path / "none", CONFIG, CSA)
    with pytest.raises(FileNotFoundError, match="index.json or .safetensors files, got neither"):
        load_attention_weights(tmp_path, CONFIG, CSA)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.safetensors: expected a safetensors file"):
        load_attention_weights(tmp_path / "broken.safetensors", CONFIG, CSA)


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": named(make_layer(CSA), CSA)})
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors: expected this shard"):
        load_attention_weights(tmp_path, CONFIG, CSA)


def test_index_that_is_wrong_about_a_shard(tmp_path: Path) -> None:
    tensors = named(make_layer(CSA), CSA)
    write_shards(tmp_path, {"a.safetensors": tensors})
    save_file({name: tensor for name, tensor in tensors.items() if "attn_sink" not in name}, tmp_path / "a.safetensors")
    with pytest.raises(KeyError, match=r"expected layers\.1\.attn\.attn_sink in a\.safetensors .*got none"):
        load_attention_weights(tmp_path, CONFIG, CSA)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: expected a JSON object whose weight_map"):
        load_attention_weights(tmp_path, CONFIG, CSA)


def test_one_tensor_in_two_files_without_index(tmp_path: Path) -> None:
    tensors = named(make_layer(CSA), CSA)
    write_shards(tmp_path, {"a.safetensors": tensors, "b.safetensors": tensors}, index=False)
    with pytest.raises(ValueError, match=r"in one file, got it in a\.safetensors and b\.safetensors"):
        load_attention_weights(tmp_path, CONFIG, CSA)


def test_dequantize_rounds_once() -> None:
    weight = torch.tensor([[448.0, -1.125, 2.0**-9]]).to(torch.float8_e4m3fn)
    got = dequantize_block_fp8(weight, torch.tensor([[1.0 + 2.0**-12]]), torch.bfloat16)
    expected = (weight.float() * (1.0 + 2.0**-12)).bfloat16()
    assert_same_bytes(got, expected, "product in fp32, then one rounding")


def transformers_config() -> DeepseekV4Config:
    return DeepseekV4Config(
        vocab_size=64,
        hidden_size=CONFIG.hidden_size,
        num_hidden_layers=CONFIG.num_hidden_layers,
        num_attention_heads=CONFIG.num_heads,
        head_dim=CONFIG.head_dim,
        qk_rope_head_dim=CONFIG.rope_head_dim,
        q_lora_rank=CONFIG.query_compression_dim,
        o_groups=CONFIG.o_groups,
        o_lora_rank=CONFIG.o_lora_rank,
        index_n_heads=CONFIG.indexer_num_heads,
        index_head_dim=CONFIG.indexer_head_dim,
        index_topk=CONFIG.csa_top_k,
        sliding_window=CONFIG.sliding_window,
        compress_ratios=list(CONFIG.compress_ratios),
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )


def transformers_attention(layer: int) -> DeepseekV4Attention:
    attention = DeepseekV4Attention(transformers_config(), layer)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention


# --- DeepSeek-V4.1 --------------------------------------------------------------------------------------------

V41 = replace(
    CONFIG,
    num_hidden_layers=5,
    compress_ratios=(0, 2, 2, 1, 1, 0),
    indexer_hadamard=False,
    kv_source_layer_ids=(1, 3),
    index_source_layer_ids=(1, 3, 4),
)
FULL_2, REUSE, FULL_1, REINDEX = 1, 2, 3, 4
V41_COUNTS = {SWA: 8, FULL_2: 15, REUSE: 8, FULL_1: 14, REINDEX: 10}


@pytest.mark.parametrize("layer", V41_COUNTS, ids=["swa", "full-2", "reuse", "full-1", "reindex"])
@pytest.mark.parametrize("scheme", ["official", "official-model-prefix"])
def test_v41_layers_survive_and_multiply_out_by_blocks_of_32(tmp_path: Path, layer: int, scheme: str) -> None:
    tensors = make_layer(layer, config=V41)
    assert sum(not name.endswith(".scale") for name in tensors) == V41_COUNTS[layer], "tensors of such a layer"
    path = write(tmp_path, named(tensors, layer, scheme))
    got = load_attention_weights(path, V41, layer)
    assert list(got) == list(tensors), f"names and their order: {list(got)}"
    for name, tensor in tensors.items():
        assert_same_bytes(got[name], tensor, name)
    dense = load_attention_weights(path, V41, layer, fp8="dequantize", dtype=torch.float32)
    block = AttentionSubBlock(V41, layer)
    block.load_weights(got)
    for module in FP8_LINEARS:
        if f"{module}.weight" not in tensors:
            continue
        weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.scale"].float()
        rows, columns = (torch.arange(size) // 32 for size in weight.shape)
        want = weight.float() * scale[rows][:, columns]
        assert_same_bytes(dense[f"{module}.weight"], want, f"{module}.weight")
        linear = block.indexer.wq_b if module == "indexer.wq_b" else block.linears[module]
        assert_same_bytes(linear.dense_weight(torch.float32), want, f"{module} in the layer")


def test_v41_under_hugging_face_names_is_refused(tmp_path: Path) -> None:
    tensors = {f"model.layers.1.self_attn.{name}": tensor for name, tensor in make_layer(FULL_2, config=V41).items()}
    message = r"layer 1 of .*: expected official names \(layers\.1\.attn\.\*\), got model\.layers\.1\.self_attn"
    with pytest.raises(ValueError, match=message):
        load_attention_weights(write(tmp_path, tensors), V41, FULL_2)


V41_WRONG: dict[str, tuple[int, str, Tensor | None, type[Exception], str]] = {
    "no-k-norm": (FULL_2, "indexer.k_norm.weight", None, KeyError, r"missing layers\.1\.attn\.indexer\.k_norm\.weight"),
    "no-gate": (FULL_2, "compressor.wgate.weight", None, KeyError, "missing .*compressor.wgate.weight"),
    "gate-at-ratio-1": (FULL_1, "compressor.wgate.weight", torch.ones(32, 192), ValueError, "not part of such a layer"),
    "position-bias": (FULL_2, "compressor.ape", torch.ones(2, 32), ValueError, "not part of such a layer: .*ape"),
    "key-weights-in-a-reindex-layer": (
        REINDEX,
        "indexer.wk.weight",
        torch.ones(64, 32),
        ValueError,
        "not part of such",
    ),
    "blocks-of-128": (
        FULL_2,
        "wq_a.scale",
        torch.ones(2, 2),
        ValueError,
        r"wq_a\.scale must have shape \[5, 6\], got \[2, 2\]",
    ),
}


@pytest.mark.parametrize("name", V41_WRONG)
def test_wrong_v41_layer_is_refused(tmp_path: Path, name: str) -> None:
    layer, tensor_name, tensor, error, message = V41_WRONG[name]
    tensors = make_layer(layer, config=V41)
    tensors.pop(tensor_name, None)
    if tensor is not None:
        tensors[tensor_name] = tensor
    with pytest.raises(error, match=message):
        load_attention_weights(write(tmp_path, named(tensors, layer)), V41, layer)


def assert_same_bytes(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    same = got.contiguous().view(torch.uint8) == expected.contiguous().view(torch.uint8)
    assert same.all(), f"{what}: {int((~same).sum())} of {same.numel()} bytes differ"
