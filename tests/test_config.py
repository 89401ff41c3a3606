"""DSV4Config: presets, the two config.json formats, refusals and validation."""

import dataclasses
import json
from collections import Counter
from typing import Any

import pytest
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.config import DSV4Config

FLASH_RATIOS = [0, 0, *[4, 128] * 20, 4, 0]
PRO_RATIOS = [128, 128, *[4, 128] * 29, 4, 0]
KIND_OF_RATIO = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}

# What the shipped files say, fields that concern attention only.
FLASH_OFFICIAL: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 43,
    "n_heads": 64,
    "q_lora_rank": 1024,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "window_size": 128,
    "original_seq_len": 65536,
    "rope_theta": 10000,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "dtype": "fp8",
    "compress_rope_theta": 160000,
    "compress_ratios": FLASH_RATIOS,
}
FLASH_HUGGING_FACE: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "head_dim": 512,
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "num_attention_heads": 64,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "sliding_window": 128,
    "compress_rope_theta": 160000,
    "compress_ratios": FLASH_RATIOS,
}
V41_RATIOS = [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0]
V41_SHARING: dict[str, Any] = {
    "kv_source_layer_ids": [2, 8, 14, 20],
    "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
    "candidate_source_layer_id": 20,
    "candidate_topk_blocks": 2048,
    "candidate_block_size": 8,
}
V41_HUGGING_FACE = FLASH_HUGGING_FACE | {
    "architectures": ["DeepseekV41ForCausalLM"],
    "model_type": "deepseek_v41",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "q_lora_rank": 1280,
    "index_n_heads": 32,
    "rms_norm_eps": 1e-20,
    "compress_ratios": V41_RATIOS,
    **V41_SHARING,
}
V41_OFFICIAL = FLASH_OFFICIAL | {
    "dim": 5120,
    "n_layers": 40,
    "q_lora_rank": 1280,
    "index_n_heads": 32,
    "norm_eps": 1e-20,
    "compress_ratios": V41_RATIOS,
    **V41_SHARING,
}
PRO_HUGGING_FACE = FLASH_HUGGING_FACE | {
    "hidden_size": 7168,
    "index_topk": 1024,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "compress_ratios": PRO_RATIOS,
}
YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}


def without(data: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in names} | changes


# Other spellings of the same V4-Flash. With layer_types the MTP layer is not listed.
HUGGING_FACE_SPELLINGS = {
    "layer-types-and-rates": without(
        FLASH_HUGGING_FACE,
        "compress_ratios",
        layer_types=[KIND_OF_RATIO[ratio] for ratio in FLASH_RATIOS[:43]],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    ),
    "both-lists": without(FLASH_HUGGING_FACE, layer_types=[KIND_OF_RATIO[ratio] for ratio in FLASH_RATIOS[:43]]),
    "legacy-rates": without(FLASH_HUGGING_FACE, compress_rate_csa=4, compress_rate_hca=128),
    "partial-rotary-factor": without(FLASH_HUGGING_FACE, "qk_rope_head_dim", partial_rotary_factor=0.125),
    "flat-rope-parameters": without(FLASH_HUGGING_FACE, "rope_scaling", rope_parameters=YARN),
    "flat-rope-parameters-with-theta": without(
        FLASH_HUGGING_FACE, "rope_scaling", "rope_theta", rope_parameters=YARN | {"rope_theta": 10000.0}
    ),
    "nested-rope-parameters": without(
        FLASH_HUGGING_FACE,
        *("rope_scaling", "rope_theta", "compress_rope_theta", "qk_rope_head_dim"),
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125},
            "compress": YARN | {"rope_theta": 160000.0, "partial_rotary_factor": 0.125, "attention_factor": 1.0},
        },
    ),
    "no-betas": without(
        FLASH_HUGGING_FACE, rope_scaling=without(FLASH_HUGGING_FACE["rope_scaling"], "beta_fast", "beta_slow")
    ),
    "no-model-type": without(FLASH_HUGGING_FACE, "model_type", "architectures"),
}

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_heads": 4,
    "head_dim": 32,
    "rope_head_dim": 16,
    "query_compression_dim": 48,
    "o_groups": 2,
    "o_lora_rank": 16,
    "indexer_num_heads": 8,
    "indexer_head_dim": 64,
    "csa_top_k": 8,
    "sliding_window": 16,
    "compress_ratios": (0, 128, 4, 0, 0),
}
V41_TINY: dict[str, Any] = TINY | {
    "compress_ratios": (0, 2, 2, 1),
    "indexer_hadamard": False,
    "kv_source_layer_ids": (1, 3),
    "index_source_layer_ids": (1, 3),
}


@pytest.mark.parametrize(
    ("config", "counts", "kinds"),
    [
        (DSV4Config.v4_flash(), {"SWA": 2, "CSA": 21, "HCA": 20}, {0: "SWA", 1: "SWA", 2: "CSA", 3: "HCA", 42: "CSA"}),
        (DSV4Config.v4_pro(), {"CSA": 30, "HCA": 31}, {0: "HCA", 1: "HCA", 2: "CSA", 3: "HCA", 60: "CSA"}),
        (DSV4Config.v41_flash(), {"SWA": 2, "CSA": 38}, {0: "SWA", 1: "SWA", 2: "CSA", 19: "CSA", 39: "CSA"}),
    ],
    ids=["flash", "pro", "v41-flash"],
)
def test_preset_layer_kinds(config: DSV4Config, counts: dict[str, int], kinds: dict[int, str]) -> None:
    got = Counter(config.layer_kind(layer) for layer in range(config.num_hidden_layers))
    assert got == counts, f"layer kinds {got}, expected {counts}"
    assert {layer: config.layer_kind(layer) for layer in kinds} == kinds
    rest = (0, 0, 0) if config.is_v41 else (0,)
    assert config.compress_ratios[config.num_hidden_layers :] == rest, "the MTP layers must stay in compress_ratios"


def test_rope_of_a_layer_follows_its_ratio() -> None:
    config = DSV4Config.v4_flash()
    got = [(config.layer_rope_theta(layer), config.layer_yarn_factor(layer)) for layer in (1, 2, 3)]
    expected = [(10_000.0, 1.0), (160_000.0, 16.0), (160_000.0, 16.0)]
    assert got == expected, f"(theta, YaRN factor) of layers 1 SWA, 2 CSA, 3 HCA: {got}"


@pytest.mark.parametrize("layer", [-1, 4, 5])
def test_layer_out_of_range_says_how_many_layers(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"0\.\.3 \(the model has 4 layers.*got {layer}"):
        DSV4Config(**TINY).layer_kind(layer)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (FLASH_OFFICIAL, DSV4Config.v4_flash()),
        (FLASH_HUGGING_FACE, DSV4Config.v4_flash()),
        (PRO_HUGGING_FACE, DSV4Config.v4_pro()),
        (V41_HUGGING_FACE, DSV4Config.v41_flash()),
        (V41_OFFICIAL, DSV4Config.v41_flash()),
        (without(V41_HUGGING_FACE, "model_type", "architectures"), DSV4Config.v41_flash()),
        (without(V41_HUGGING_FACE, "candidate_topk_blocks", "candidate_block_size"), DSV4Config.v41_flash()),
    ],
    ids=[
        *("flash-official", "flash-hugging-face", "pro-hugging-face"),
        *("v41-hugging-face", "v41-official", "v41-unnamed", "v41-default-candidates"),
    ],
)
def test_shipped_config_equals_preset(data: dict[str, Any], expected: DSV4Config) -> None:
    config = DSV4Config.from_json(data)
    assert config == expected, f"differs from the preset: {differences(config, expected)}"


@pytest.mark.parametrize("name", HUGGING_FACE_SPELLINGS)
def test_hugging_face_spellings_agree(name: str) -> None:
    config = DSV4Config.from_json(HUGGING_FACE_SPELLINGS[name])
    expected = DSV4Config.v4_flash()
    if name == "layer-types-and-rates":
        expected = dataclasses.replace(expected, compress_ratios=expected.compress_ratios[:43])
    assert config == expected, f"{name} differs: {differences(config, expected)}"


def test_from_json_reads_a_file_and_a_folder(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLASH_OFFICIAL))
    for source in (tmp_path / "config.json", str(tmp_path / "config.json"), tmp_path):
        assert DSV4Config.from_json(source) == DSV4Config.v4_flash(), f"{source!r} was read as another model"
    with pytest.raises(FileNotFoundError):
        DSV4Config.from_json(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["{", "[1]"], ids=["not-json", "not-an-object"])
def test_from_json_names_a_broken_file(tmp_path: Any, text: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json: must (be a|hold a) JSON"):
        DSV4Config.from_json(tmp_path / "broken.json")


def test_official_without_yarn() -> None:
    config = DSV4Config.from_json(without(FLASH_OFFICIAL, original_seq_len=0, max_seq_len=8192, norm_eps=1e-5))
    got = (config.yarn_factor, config.layer_yarn_factor(2), config.max_position_embeddings, config.rms_norm_eps)
    assert got == (1.0, 1.0, 8192, 1e-5), f"original_seq_len 0 means no YaRN, got {got}"


def test_official_dspark_release_keeps_its_trailing_entries() -> None:
    config = DSV4Config.from_json(without(FLASH_OFFICIAL, compress_ratios=[*FLASH_RATIOS, 0, 0], dspark_block_size=5))
    assert config.compress_ratios == (*FLASH_RATIOS, 0, 0), "all 46 entries must be kept"


ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "legacy-ratios-yarn": {
        "compress_ratios": [0, 128, 4, 0, 0],
        "qk_rope_head_dim": 16,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144},
    },
    "layer-types-no-yarn": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        "partial_rotary_factor": 0.25,
        "rope_theta": 5000.0,
        "compress_rope_theta": 70000.0,
    },
    "nested-yarn": {
        "compress_ratios": [4, 4, 0, 128],
        "qk_rope_head_dim": 16,
        "rope_parameters": {
            "main": {"rope_theta": 20000.0},
            "compress": YARN | {"rope_theta": 90000.0, "attention_factor": 1.0},
        },
    },
}


@pytest.mark.parametrize("how", ["to-dict", "save-pretrained"])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip_through_transformers(name: str, how: str, tmp_path: Any) -> None:
    theirs = DeepseekV4Config(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=48,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=9,
        sliding_window=24,
        rms_norm_eps=1e-5,
        **ROUND_TRIPS[name],
    )
    theirs.save_pretrained(tmp_path)
    config = DSV4Config.from_json(theirs.to_dict() if how == "to-dict" else tmp_path)
    main, compress = (theirs.rope_parameters[part] for part in ("main", "compress"))
    expected = DSV4Config(
        **TINY
        | {
            "csa_top_k": 9,
            "sliding_window": 24,
            "rms_norm_eps": 1e-5,
            "rope_head_dim": theirs.qk_rope_head_dim,
            "compress_ratios": [{v: k for k, v in KIND_OF_RATIO.items()}[kind] for kind in theirs.layer_types],
            "rope_theta": main["rope_theta"],
            "compress_rope_theta": compress["rope_theta"],
            "yarn_factor": compress.get("factor", 1.0),
            "yarn_original_max_position": compress.get("original_max_position_embeddings", 65536),
        }
    )
    assert config == expected, f"differs from transformers' own reading: {differences(config, expected)}"


def test_v41_sizes_are_those_of_the_shipped_file() -> None:
    c = DSV4Config.v41_flash()
    sizes = (c.hidden_size, c.num_hidden_layers, c.num_heads, c.head_dim, c.query_compression_dim)
    assert sizes == (5120, 40, 64, 512, 1280)
    assert (c.o_groups, c.o_lora_rank, c.rope_head_dim, c.sliding_window) == (8, 1024, 64, 128)
    assert (c.indexer_num_heads, c.indexer_head_dim, c.csa_top_k) == (32, 128, 512)
    assert c.indexer_head_dim**-0.5 * c.indexer_num_heads**-0.5 == pytest.approx(0.015625, rel=1e-15)
    assert (c.rms_norm_eps, c.max_position_embeddings, c.indexer_hadamard) == (1e-20, 1_048_576, False)
    assert c.candidate_topk_blocks * c.candidate_block_size == 16_384
    assert [c.layer_compress_ratio(layer) for layer in (0, 1, 2, 19, 20, 39)] == [0, 0, 2, 2, 1, 1]
    assert (c.layer_rope_theta(1), c.layer_yarn_factor(1)) == (10_000.0, 1.0)
    assert {(c.layer_rope_theta(layer), c.layer_yarn_factor(layer)) for layer in range(2, 40)} == {(160_000.0, 16.0)}


def test_v41_roles_and_whose_entries_a_layer_reads() -> None:
    c = DSV4Config.v41_flash()
    roles = [c.layer_role(layer) for layer in range(40)]
    assert Counter(roles) == {None: 2, "full": 4, "reindex": 4, "reuse": 30}
    assert [layer for layer, role in enumerate(roles) if role == "full"] == [2, 8, 14, 20]
    assert [layer for layer, role in enumerate(roles) if role == "reindex"] == [24, 28, 32, 36]
    got = {
        layer: (c.layer_kv_source(layer), c.layer_index_source(layer)) for layer in (2, 7, 8, 19, 20, 23, 24, 31, 39)
    }
    want = {2: (2, 2), 7: (2, 2), 8: (8, 8), 19: (14, 14), 20: (20, 20), 23: (20, 20), 24: (20, 24), 31: (20, 28)}
    assert got == want | {39: (20, 36)}
    assert [c.layer_source(layer) for layer in (1, 2, 3, 20, 21, 24, 25, 39)] == [None, None, 2, None, 20, 20, 24, 36]
    assert [layer for layer in range(40) if c.layer_chooses_among_candidates(layer)] == [24, 28, 32, 36]
    with pytest.raises(ValueError, match="layer 1 is SWA and attends to no compressed entries"):
        c.layer_kv_source(1)


def test_v41_index_keys_cost_170_bytes_per_token() -> None:
    """Three layers of ratio 2 and one of ratio 1 hold them; 71.3 MB in the latter at 1,048,576 tokens."""
    c, schema = DSV4Config.v41_flash(), CacheSchema("mxfp4", 64)
    per_token = [schema.bytes_per_entry / c.layer_compress_ratio(layer) for layer in c.kv_source_layer_ids]
    assert sum(per_token) == 170 and per_token[-1] == 68
    assert c.max_position_embeddings // 64 * schema.payload_bytes == 71_303_168


def test_v4_layers_read_their_own_entries() -> None:
    config = DSV4Config.v4_flash()
    assert not config.is_v41
    assert [config.layer_role(layer) for layer in (1, 2, 3)] == [None, "full", None]
    assert [config.layer_kv_source(layer) for layer in (2, 3, 42)] == [2, 3, 42]
    assert not any(config.layer_source(layer) for layer in range(43))
    assert not any(config.layer_chooses_among_candidates(layer) for layer in range(43))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "v41-nested": (
        {"model_type": "deepseek_v41", "text_config": {"hidden_size": 5120}},
        r"V4\.1 has its fields in text_config: pass that object",
    ),
    "v41-nested-unnamed": ({"text_config": {"compress_ratios": [0, 2]}}, r"V4\.1 has its fields in text_config"),
    "v41-other-names": (
        without(FLASH_OFFICIAL, kv_source_layers=[2, 8, 14, 20]),
        r"V4\.1 has kv_source_layers, whose meaning is not known for certain: it must have kv_source_layer_ids",
    ),
    "v4-with-kv-sources": (
        without(FLASH_HUGGING_FACE, kv_source_layer_ids=[2, 8]),
        r"declares 'deepseek_v4', but it has kv_source_layer_ids, as DeepSeek-V4\.1 does",
    ),
    "v4-with-ratio-1": (
        without(FLASH_HUGGING_FACE, compress_ratios=[0] * 20 + [1] * 23),
        r"declares 'deepseek_v4', but compress_ratios has 1",
    ),
    "two-models": (
        without(FLASH_HUGGING_FACE, architectures=["DeepseekV41ForCausalLM"]),
        r"declares 'deepseek_v4', but it declares 'DeepseekV41ForCausalLM'",
    ),
    "v32-model-type": ({"model_type": "deepseek_v32", "index_topk": 2048}, r"V3\.2 .*single tokens"),
    "v32-architecture": ({"architectures": ["DeepseekV32ForCausalLM"]}, r"V3\.2"),
    "v32-official": ({"dim": 7168, "n_layers": 61, "kv_lora_rank": 512, "index_topk": 2048}, r"V3\.2 .*kv_lora_rank"),
    "v3-model-type": ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, r"DeepSeek-V3 .*neither an indexer"),
    "v3-official": ({"dim": 7168, "n_layers": 61, "kv_lora_rank": 512}, r"DeepSeek-V3 "),
    "glm": ({"model_type": "glm_moe_dsa", "index_topk": 2048}, r"'glm_moe_dsa'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        DSV4Config.from_json(data)
    assert "\n" not in str(caught.value), "an error is one line"


NESTED_MAIN_YARN = {"main": YARN | {"rope_theta": 10000.0}, "compress": YARN | {"rope_theta": 160000.0}}
UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "no-layer-list-hugging-face": (without(FLASH_HUGGING_FACE, "compress_ratios"), "compress_ratios.*got neither"),
    "no-layer-list-official": (without(FLASH_OFFICIAL, "compress_ratios"), "compress_ratios.*got neither"),
    "lists-disagree": (
        without(FLASH_HUGGING_FACE, layer_types=["heavily_compressed_attention"] * 43),
        r"layer_types\[0\] must be in step with compress_ratios\[0\] = 0, got 128",
    ),
    "unknown-layer-type": (
        without(FLASH_HUGGING_FACE, "compress_ratios", layer_types=["full_attention"] * 43),
        r"layer_types\[0\] must be one of .*got 'full_attention'",
    ),
    "other-rate": (
        without(FLASH_HUGGING_FACE, compress_rates={"compressed_sparse_attention": 128}),
        "compress_rates of compressed_sparse_attention must be 4, got 128",
    ),
    "other-legacy-rate": (without(FLASH_HUGGING_FACE, compress_rate_hca=8), "heavily_compressed.* must be 128, got 8"),
    "missing-fields": (without(FLASH_HUGGING_FACE, "index_topk", "o_groups"), "o_groups, index_topk must be present"),
    "missing-official-field": (without(FLASH_OFFICIAL, "index_topk"), "index_topk must be present"),
    "no-rope-head-dim": (without(FLASH_HUGGING_FACE, "qk_rope_head_dim"), "partial_rotary_factor.* must be present"),
    "two-rope-head-dims": (
        without(FLASH_HUGGING_FACE, partial_rotary_factor=0.25),
        r"qk_rope_head_dim must be one size .*got \[64, 128\]",
    ),
    "linear-rope": (without(FLASH_HUGGING_FACE, rope_scaling={"type": "linear", "factor": 2}), "'yarn', got 'linear'"),
    "yarn-on-main": (
        without(FLASH_HUGGING_FACE, "rope_scaling", rope_parameters=NESTED_MAIN_YARN),
        "main.rope_type must be 'default'",
    ),
    "attention-factor": (
        without(FLASH_HUGGING_FACE, rope_scaling=YARN | {"attention_factor": 1.277}),
        "attention_factor must be 1.0 or absent.*got 1.277",
    ),
    "yarn-without-original": (
        without(FLASH_HUGGING_FACE, rope_scaling={"type": "yarn", "factor": 16}),
        "original_max_position_embeddings must be a number, got None",
    ),
    "theta-is-text": (without(FLASH_HUGGING_FACE, rope_theta="10000"), "rope_theta must be a number, got '10000'"),
    "v41-without-sources": (without(V41_HUGGING_FACE, "kv_source_layer_ids"), "kv_source_layer_ids must be present"),
    "v41-without-eps": (without(V41_OFFICIAL, "norm_eps"), "norm_eps must be a number, got None"),
    "v41-layer-types": (
        without(V41_HUGGING_FACE, layer_types=["compressed_sparse_attention"] * 40),
        r"layer_types\[0\] must be in step with compress_ratios\[0\] = 0, got 4",
    ),
    "ratios-not-a-list": (without(FLASH_OFFICIAL, compress_ratios=4), "compress_ratios must be a sequence"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_config_names_the_field(name: str) -> None:
    data, message = UNREADABLE[name]
    with pytest.raises(ValueError, match=message) as caught:
        DSV4Config.from_json(data)
    assert "\n" not in str(caught.value), "an error is one line"


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "zero-hidden": ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    "float-layers": ({"num_hidden_layers": 4.0}, "num_hidden_layers must be a positive integer, got 4.0"),
    "bool-window": ({"sliding_window": True}, "sliding_window must be a positive integer, got True"),
    "odd-head-dim": ({"head_dim": 33}, "head_dim must be even, got 33"),
    "odd-rope": ({"rope_head_dim": 15}, "rope_head_dim must be even and at most head_dim 32"),
    "rope-over-head-dim": ({"rope_head_dim": 34}, "rope_head_dim must be even and at most head_dim 32.*got 34"),
    "rope-over-indexer-head-dim": ({"head_dim": 256, "rope_head_dim": 66}, "indexer_head_dim 64, got 66"),
    "heads-not-in-groups": ({"o_groups": 3}, "num_heads must be divisible by o_groups 3, got 4"),
    "indexer-heads-12": ({"indexer_num_heads": 12}, "indexer_num_heads must be a multiple of 8.*got 12"),
    "indexer-heads-136": ({"indexer_num_heads": 136}, "indexer_num_heads must be a multiple of 8.*got 136"),
    "indexer-dim-96": ({"indexer_head_dim": 96}, "indexer_head_dim must be 64 or 128, got 96"),
    "top-k-0": ({"csa_top_k": 0}, "csa_top_k must be a positive integer, got 0"),
    "top-k-4097": ({"csa_top_k": 4097}, r"csa_top_k must be an integer in 1\.\.4096, got 4097"),
    "ratio-8": ({"compress_ratios": (0, 8, 4, 0)}, r"compress_ratios\[1\] must be 0 \(SWA\).*got 8"),
    "ratio-float": ({"compress_ratios": (0, 4.0, 4, 0)}, r"compress_ratios\[1\] must be .*got 4\.0"),
    "few-ratios": (
        {"compress_ratios": (0, 4, 4)},
        "compress_ratios must be at least num_hidden_layers = 4.*'3 entries'",
    ),
    "ratios-text": ({"compress_ratios": "0440"}, "compress_ratios must be a sequence of integers"),
    "theta-1": ({"rope_theta": 1.0}, "rope_theta must be greater than 1, got 1.0"),
    "theta-infinite": ({"compress_rope_theta": float("inf")}, "compress_rope_theta must be a positive finite number"),
    "yarn-below-1": ({"yarn_factor": 0.5}, "yarn_factor must be at least 1.0"),
    "betas-swapped": (
        {"yarn_beta_fast": 1, "yarn_beta_slow": 32},
        "yarn_beta_fast must be greater than yarn_beta_slow",
    ),
    "eps-nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive finite number, got nan"),
    "v41-hadamard": (V41_TINY | {"indexer_hadamard": True}, r"indexer_hadamard must be False in V4\.1"),
    "v41-mixed-ratios": (
        V41_TINY | {"compress_ratios": (0, 2, 2, 4)},
        r"compress_ratios\[3\] must be 0, 1 or 2 beside ratios of V4\.1, got 4",
    ),
    "v41-without-kv-sources": (V41_TINY | {"kv_source_layer_ids": ()}, "kv_source_layer_ids must be a list of layers"),
    "v41-sources-text": (V41_TINY | {"index_source_layer_ids": "13"}, "index_source_layer_ids must be a sequence"),
    "v41-source-4": (
        V41_TINY | {"index_source_layer_ids": (1, 3, 4)},
        r"index_source_layer_ids must be layers in 0\.\.3",
    ),
    "v41-descending": (V41_TINY | {"index_source_layer_ids": (3, 1)}, "index_source_layer_ids must be .* ascending"),
    "v41-kv-source-chooses-not": (
        V41_TINY | {"index_source_layer_ids": (1,)},
        "index_source_layer_ids must be the kv_source_layer_ids and more",
    ),
    "v41-late-source": (
        V41_TINY | {"kv_source_layer_ids": (3,)},
        "kv_source_layer_ids must be a list that begins at or before layer 1",
    ),
    "v41-source-is-swa": (
        V41_TINY | {"index_source_layer_ids": (0, 1, 3)},
        "index_source_layer_ids must be layers with a ratio of 1 or 2",
    ),
    "v41-other-ratio-than-its-source": (
        V41_TINY | {"compress_ratios": (0, 2, 1, 1)},
        r"compress_ratios\[2\] must be that of its KV source, layer 1: 2, got 1",
    ),
    "v41-candidates-of-a-reuse-layer": (
        V41_TINY | {"candidate_source_layer_id": 2},
        "candidate_source_layer_id must be one of index_source_layer_ids, got 2",
    ),
    "v41-candidates-of-other-keys": (
        V41_TINY | {"candidate_source_layer_id": 1},
        "candidate_source_layer_id must be followed by index sources with the same index keys alone, got 1",
    ),
    "v41-candidate-blocks-of-4": (
        V41_TINY | {"candidate_source_layer_id": 3, "candidate_block_size": 4},
        "candidate_block_size must be 8 or 16, got 4",
    ),
    "v41-no-candidate-blocks": (V41_TINY | {"candidate_topk_blocks": 0}, "candidate_topk_blocks must be a positive"),
    "v4-with-sources": (
        {"kv_source_layer_ids": (2,)},
        r"kv_source_layer_ids must be left out without a ratio of 1 or 2",
    ),
    "v4-with-candidates": ({"candidate_source_layer_id": 0}, "candidate_source_layer_id must be left out"),
    "hadamard-int": ({"indexer_hadamard": 1}, "indexer_hadamard must be a bool, got 1"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_field_is_named(name: str) -> None:
    changes, message = INVALID[name]
    with pytest.raises(ValueError, match=f"^DSV4Config: .*{message}"):
        DSV4Config(**TINY | changes)


@pytest.mark.parametrize(
    "changes",
    [{"csa_top_k": 1}, {"csa_top_k": 4096}, {"indexer_num_heads": 128}, {"rope_head_dim": 32}, {"yarn_factor": 1}],
    ids=["top-k-1", "top-k-4096", "indexer-heads-128", "rope-all-of-head-dim", "no-yarn"],
)
def test_limits_are_allowed(changes: dict[str, Any]) -> None:
    DSV4Config(**TINY | changes)


def test_config_is_frozen_and_hashable() -> None:
    lists = {"kv_source_layer_ids": [1, 3], "index_source_layer_ids": [1, 3]}
    assert DSV4Config(**V41_TINY | lists) == DSV4Config(**V41_TINY), "lists of sources become tuples"
    config = DSV4Config(**TINY | {"compress_ratios": [0, 128, 4, 0, 0]})
    assert config == DSV4Config(**TINY) and hash(config) == hash(DSV4Config(**TINY)), "a list of ratios becomes a tuple"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.head_dim = 64  # type: ignore[misc]
    assert dataclasses.replace(config, indexer_hadamard=False).indexer_hadamard is False, "replace must work"


def differences(got: DSV4Config, expected: DSV4Config) -> dict[str, tuple[Any, Any]]:
    fields = dataclasses.asdict(expected)
    return {name: (getattr(got, name), value) for name, value in fields.items() if getattr(got, name) != value}
