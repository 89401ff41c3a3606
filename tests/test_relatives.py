"""Models with the same score and other keys: the recipe of docs/relatives.md, and the page's steps (see guides.py).

Oracles for keys of single tokens: plain torch in float64 on the bytes that the recipe wrote, and transformers' indexers
of DeepSeek-V3.2 and GLM.
"""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import decode_rows
from guides import ROOT, fences, steps_of
from safetensors.torch import save_file
from test_config import V41_HUGGING_FACE
from test_layer import make_block, random_weights, tiny_config
from test_layer_v41 import CONFIG as V41_CONFIG
from test_layer_v41 import make_blocks, make_caches, run
from torch import Tensor
from transformers import DeepseekV32Config, GlmMoeDsaConfig
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer, DeepseekV32RotaryEmbedding
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer

from lightning_indexer import (
    CacheSchema,
    IndexerView,
    LayerCacheHandle,
    PagedPool,
    append_entries,
    index_scores,
    quantize_query,
    score_topk,
)

PAGE, SINGLE_TOKENS = "docs/relatives.md", "Keys of single tokens: DeepSeek-V3.2 and GLM"
(RECIPE,) = [code for heading, _, code in fences((ROOT / PAGE).read_text(encoding="utf-8")) if heading == SINGLE_TOKENS]
TOKENS, TOP_K, HEADS, LAST = 2200, 2048, 8, 8


# --- keys of single tokens ------------------------------------------------------------------------------------

MODELS = {"v32": (DeepseekV32Config, DeepseekV32Indexer), "glm": (GlmMoeDsaConfig, GlmMoeDsaIndexer)}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
YARN |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}


def make_indexer(model: str) -> torch.nn.Module:
    config_class, indexer_class = MODELS[model]
    sizes = {"hidden_size": 64, "q_lora_rank": 32, "index_n_heads": HEADS, "index_head_dim": 128, "index_topk": TOP_K}
    config = config_class(**sizes, num_hidden_layers=1, qk_rope_head_dim=64, rope_parameters=YARN)
    torch.manual_seed(4)
    indexer = indexer_class(config, 0)
    for parameter in indexer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return indexer.requires_grad_(False)


def recipe(model: str, *changes: tuple[str, str]) -> dict:
    """The names after the recipe has run."""
    text = RECIPE
    for old, new in (*changes, *([('"pairs": "halves"', '"pairs": "interleaved"')] if model == "glm" else [])):
        assert text.count(old) == 1, f"{old} stands {text.count(old)} times in the recipe"
        text = text.replace(old, new)
    names = given(model)
    exec(compile(text, PAGE, "exec"), names)
    return names


def given(model: str) -> dict:
    """The names that the recipe needs."""
    torch.manual_seed(5)
    names = {"indexer": make_indexer(model)}
    return names | {"hidden_states": torch.randn(TOKENS, 64), "q_latent": torch.randn(TOKENS, 32)}


@steps_of(PAGE, SINGLE_TOKENS)
def single_tokens() -> Iterator[dict]:
    names = given("v32")
    yield names
    test_keys_are_those_of_the_model_in_132_bytes(("v32", names))
    test_selection_is_the_top_k_of_the_float64_scores(("v32", names))


def in_float64(names: dict, model: str) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [L, 128], queries [LAST, H, 128] and weights [LAST, H] by the model's formulas."""
    indexer, positions = names["indexer"], torch.arange(TOKENS)
    x, latent = names["hidden_states"].double(), names["q_latent"].double()[-LAST:]
    k = x @ indexer.wk.weight.double().T
    k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    k = k * indexer.k_norm.weight.double() + indexer.k_norm.bias.double()
    q = (latent @ indexer.wq_b.weight.double().T).view(LAST, HEADS, 128)
    weights = x[-LAST:] @ indexer.weights_proj.weight.double().T / (128 * HEADS) ** 0.5
    frequencies = names["frequencies"].double()

    def turn(v: Tensor, at: Tensor) -> Tensor:
        angles = (at.double()[:, None] * frequencies).view(len(at), *[1] * (v.dim() - 2), 32)
        a, b = (v[..., 0:64:2], v[..., 1:64:2]) if model == "glm" else (v[..., :32], v[..., 32:64])
        product = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
        parts = (product.real, product.imag)
        first = torch.stack(parts, -1).flatten(-2) if model == "glm" else torch.cat(parts, -1)
        return torch.cat([first, v[..., 64:]], dim=-1)

    return turn(k, positions), turn(q, positions[-LAST:]), weights


@pytest.fixture(scope="module", params=MODELS)
def ran(request: pytest.FixtureRequest) -> tuple[str, dict]:
    return request.param, recipe(request.param)


def stored_keys(names: dict) -> np.ndarray:
    """float64 [L, 128]: what the bytes stand for, read by another codec: 128 E4M3 per token, then the scales."""
    pages = names["pool"].storage.numpy()[names["pool"].block_table[0, : -(-TOKENS // 64)].numpy()]
    data = pages[:, : 64 * 128].reshape(-1, 128)[:TOKENS]
    return decode_rows(data.copy(), pages[:, 64 * 128 : 64 * 132].reshape(-1, 4)[:TOKENS].copy(), "fp8")


def test_keys_are_those_of_the_model_in_132_bytes(ran: tuple[str, dict]) -> None:
    model, names = ran
    assert names["pool"].schema.bytes_per_entry == 132
    want, got = in_float64(names, model)[0].numpy(), stored_keys(names)
    step = 2.0 ** np.ceil(np.log2(np.abs(want).max(-1, keepdims=True) / 448))  # a key's scale
    # half a step of E4M3: 1/16 of a value, or 2^-10 of the scale near zero; angles are fp32 products, up to 2^-13 off
    bound = np.abs(want) / 16 + step * 2.0**-10 + 2.0**-13 * np.abs(want).max(-1, keepdims=True)
    worst = (np.abs(got - want) / bound).max()
    assert worst <= 1, f"{model}: {worst:.2f} of the rounding of E4M3"


def test_selection_is_the_top_k_of_the_float64_scores(ran: tuple[str, dict]) -> None:
    """On the values that the bytes stand for; a choice may be another where scores differ by less than their error."""
    model, names = ran
    _, q, weights = in_float64(names, model)
    quantised = quantize_query(q.float(), "fp8")
    values = quantised.data.double() * quantised.scale.double().unsqueeze(-1)
    scores = torch.einsum("thd,sd->ths", values, torch.from_numpy(stored_keys(names))).clamp_min(0)
    scores = torch.einsum("ths,th->ts", scores, weights)
    chosen = names["tokens"]
    assert chosen.shape == (LAST, TOP_K) and (chosen.diff(dim=1) > 0).all()
    for t in range(LAST):
        visible = scores[t, : TOKENS - LAST + t + 1]
        kth, error = visible.sort(descending=True).values[TOP_K - 1], 1e-5 * visible.norm()  # promised on a CPU
        left_out = torch.ones(len(visible), dtype=torch.bool).index_fill(0, chosen[t].long(), False)
        assert visible[chosen[t].long()].min() >= kth - error and visible[left_out].max() <= kth + error, f"row {t}"


@pytest.mark.parametrize("model", MODELS)
def test_without_quantising_the_choice_is_that_of_transformers(model: str) -> None:
    exact = (('CacheSchema("fp8"', 'CacheSchema("fp32"'), ('    q = quantize_query(q, "fp8")\n', ""))
    names = recipe(model, *exact)
    indexer, x, positions = names["indexer"], names["hidden_states"][None], torch.arange(TOKENS)[None]
    rotary = DeepseekV32RotaryEmbedding(DeepseekV32Config(qk_rope_head_dim=64, rope_parameters=YARN))
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    theirs = indexer(x, names["q_latent"][None], rotary(x, positions), mask[None], positions)[0, -LAST:]
    differing = [len(set(a.tolist()) - set(b.tolist())) for a, b in zip(names["tokens"], theirs, strict=True)]
    assert differing == [0] * LAST, f"entries that transformers does not choose, by row: {differing}"


WRONG_RECIPES = {
    "last-channels": ('"channels": "first"', '"channels": "last"'),
    "other-pairs": ("**rope)\n    append", '**{**rope, "pairs": "interleaved"})\n    append'),
    "not-normalised": ("indexer.k_norm(indexer.wk(hidden_states))", "indexer.wk(hidden_states)"),
    "sees-one-key-less": ("visible_entries(positions, 1)", "visible_entries(positions - 1, 1)"),
    "compressed-visibility": ("visible_entries(positions, 1)", "visible_entries(positions, 2)"),
}


@pytest.mark.parametrize("name", WRONG_RECIPES)
def test_wrong_recipes_are_rejected(name: str) -> None:
    names = recipe("v32", WRONG_RECIPES[name])
    checks = (test_keys_are_those_of_the_model_in_132_bytes, test_selection_is_the_top_k_of_the_float64_scores)
    caught = 0
    for check in checks:
        try:
            check(("v32", names))
        except AssertionError:
            caught += 1
    assert caught, f"{name} goes unnoticed"


# --- DeepSeek-V4.1 --------------------------------------------------------------------------------------------


@steps_of(PAGE, "DeepSeek-V4.1")
def v41_layers_from_a_checkpoint() -> Iterator[dict]:
    """The layers that the page makes are those of test_layer_v41, which holds them against a definition."""
    folder = Path.cwd() / "DeepSeek-V4.1-Flash"
    folder.mkdir()
    c = V41_CONFIG
    sizes = {"hidden_size": c.hidden_size, "num_hidden_layers": 8, "num_attention_heads": c.num_heads, "head_dim": 64}
    sizes |= {"qk_rope_head_dim": 32, "q_lora_rank": 32, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 8}
    sizes |= {"index_head_dim": 64, "index_topk": 6, "sliding_window": 8, "candidate_topk_blocks": 16}
    names = ("compress_ratios", "kv_source_layer_ids", "index_source_layer_ids", "candidate_source_layer_id")
    shipped = V41_HUGGING_FACE | sizes | {name: getattr(c, name) for name in names}
    (folder / "config.json").write_text(json.dumps(shipped))
    tensors = {}
    for layer in range(8):
        for name, tensor in random_weights(c, layer, seed=layer).items():
            tensors[f"layers.{layer}.attn.{name}"] = tensor
    save_file(tensors, folder / "model.safetensors")
    x = torch.randn(30, c.hidden_size).bfloat16()
    made: dict = {"hidden_states": x}
    yield made
    assert made["config"] == c, dataclasses.asdict(made["config"])
    caches = make_caches(index_format="mxfp4", kv_format="bf16", dtype=torch.bfloat16)
    want = x
    for out in run(make_blocks(), caches, x, [30]):
        want = want + out
    assert torch.equal(made["x"], want)


# --- one selection for several layers -------------------------------------------------------------------------


@steps_of(PAGE, "One selection for several layers")
def the_pattern_on_the_page() -> Iterator[dict]:
    config = tiny_config(compress_ratios=(4, 4, 4), num_hidden_layers=3)
    blocks = [make_block(config, layer, seed=layer) for layer in range(3)]
    options = {"max_seqs": 1, "num_blocks": 8, "dtype": torch.float32, "keep_selection": True}
    caches = [LayerCacheHandle(config, layer, **options) for layer in range(3)]
    for cache in caches:
        cache.alloc(0)
    x = torch.randn(150, config.hidden_size)
    names = {"blocks": blocks, "caches": caches, "x": x}
    yield names
    assert all(torch.equal(cache.selected, caches[0].selected) for cache in caches)
    assert names["x"].shape == x.shape and (caches[0].selected[-1] >= 0).sum() == config.csa_top_k


def test_the_example_runs_and_counts() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "reuse_selection.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "pattern FSSFSS" in done.stdout and "selections: 2 instead of 6 per step, 4 saved" in done.stdout
    chance = int(re.search(r"by chance: (\d+)%", done.stdout)[1])
    shares = [int(share) for share in re.findall(r"layer \d from layer \d: (\d+)%", done.stdout)]
    assert len(shares) == 4 and all(chance + 5 < share < 100 for share in shares), done.stdout
    assert re.search(r"relative difference: [1-9]", done.stdout), "reused selections change the output"
    assert "all 6 layers choose anew" in done.stdout


# --- a million entries ----------------------------------------------------------------------------------------


def test_a_million_entries_of_ratio_1() -> None:
    """1,048,576 keys of one sequence, as V4.1's ratio-1 layers have at their longest context; few heads, to be quick.

    Most keys are copies of 4,096; what a query likes best lies at chosen places, the last one of all included.
    """
    length, few, dim = 2**20, 4096, 64
    schema = CacheSchema("mxfp4", 64, head_dim=dim)
    pool = PagedPool(schema, length // 64, max_seqs=1)
    slots = pool.alloc(0, length)
    view = IndexerView(pool.storage, schema, pool.block_table)
    append_entries(torch.randn(few, dim).clamp(-2, 2), view, slots[:few])
    pool.storage[few // 64 :] = pool.storage[: few // 64].repeat(length // few - 1, 1)
    best = torch.tensor([0, 63, 524_288, 1_048_511, 1_048_574, 1_048_575])
    append_entries(torch.full((len(best), dim), 6.0), view, slots[best])
    q, weights = torch.ones(2, 8, dim), torch.ones(2, 8)
    lens, seq_ids = torch.tensor([length, length - 1], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    options = {"top_k": 6, "valid_lens": lens, "seq_ids": seq_ids, "return_scores": True}
    chosen, scores = score_topk(quantize_query(q, "mxfp4"), weights, view, **options)
    assert chosen[0].tolist() == best.tolist() and (scores[0] == 8 * dim * 6).all()
    # one entry less: the next best is the first of all copies of the best ordinary key
    one = {"valid_lens": torch.tensor([few], dtype=torch.int32), "seq_ids": seq_ids[:1]}
    ordinary = index_scores(quantize_query(q[:1], "mxfp4"), weights[:1], view, **one)[0].index_fill(0, best[:2], 0.0)
    assert chosen[1].tolist() == sorted([*best[:5].tolist(), int(ordinary.argmax())])
