"""The layer's parts on their own: linear formats, streaming compressor, indexer, cache handle, missing weights."""

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_indexer import (
    AttentionSubBlock,
    Compressor,
    CSAIndexer,
    DSV4Config,
    Fp8BlockLinear,
    LayerCacheHandle,
    Nvfp4Linear,
    OutOfBlocks,
    QuantizedQuery,
    reference,
)
from lightning_indexer.checkpoint import expected_shapes
from lightning_indexer.nn.linear import Linear, WeightsNotLoaded
from lightning_indexer.nn.rope import layer_frequencies

SWA, CSA, HCA = 0, 1, 2
INDEX_FORMATS = ("mxfp4", "nvfp4", "fp8", "bf16", "fp32")


def tiny_config(**changes) -> DSV4Config:
    fields = {
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "num_heads": 4,
        "head_dim": 512,
        "rope_head_dim": 64,
        "query_compression_dim": 32,
        "o_groups": 2,
        "o_lora_rank": 8,
        "indexer_num_heads": 8,
        "indexer_head_dim": 128,
        "csa_top_k": 16,
        "sliding_window": 128,
        "compress_ratios": (0, 4, 128, 4, 128),
        "yarn_factor": 16.0,
    }
    return DSV4Config(**{**fields, **changes})


def random_weights(config: DSV4Config, layer: int, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config, layer).items():
        weights[name] = torch.randn(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5) + ("norm" in name)
    return weights


def make_block(config: DSV4Config, layer: int, seed: int = 0) -> AttentionSubBlock:
    block = AttentionSubBlock(config, layer)
    block.load_weights(random_weights(config, layer, seed))
    return block


def make_cache(config: DSV4Config, layer: int, max_seqs: int = 4, **options) -> LayerCacheHandle:
    options = {"num_blocks": 64, "entries_per_block": 16, "dtype": torch.float32, **options}
    cache = LayerCacheHandle(config, layer, max_seqs=max_seqs, **options)
    for seq_id in range(max_seqs):
        cache.alloc(seq_id)
    return cache


def exact(config: DSV4Config, layer: int, **options) -> LayerCacheHandle:
    return make_cache(config, layer, index_format="fp32", kv_format="fp32", **options)


# --- several layers -------------------------------------------------------------------------------------------


def run_model(blocks, caches, x, steps):
    """Residual blocks over one sequence, `steps` tokens at a time."""
    outputs = []
    for part in x.split(steps):
        for block, cache in zip(blocks, caches, strict=True):
            cache.begin_step([0], [len(part)])
            part = part + block(F.rms_norm(part, part.shape[-1:]), cache)
        outputs.append(part)
    return torch.cat(outputs)


def test_five_layers_token_by_token_equal_one_prefill():
    config = tiny_config(head_dim=64, rope_head_dim=32, indexer_head_dim=64)
    blocks = [make_block(config, layer, seed=layer) for layer in range(5)]
    x = torch.randn(150, config.hidden_size)
    prefill = run_model(blocks, [exact(config, layer) for layer in range(5)], x, len(x))
    decoded = run_model(blocks, [exact(config, layer) for layer in range(5)], x, 1)
    error = (prefill - decoded).norm(dim=-1) / prefill.norm(dim=-1)
    assert error.max() < 1e-5, f"relative error {error.max():.1e} at token {int(error.argmax())}"


@pytest.mark.parametrize("layer", [SWA, CSA, HCA], ids=["SWA", "CSA", "HCA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_default_formats_stay_near_the_exact_route(layer, dtype):
    config = tiny_config(csa_top_k=128)  # all entries chosen: what is left is the rounding of the KV cache
    block = make_block(config, layer)
    x = torch.randn(300, config.hidden_size)
    outputs = []
    for options in ({"index_format": "fp32", "kv_format": "fp32"}, {"dtype": dtype}):
        cache = make_cache(config, layer, **options)
        cache.begin_step([2], [len(x)])
        outputs.append(block(x.to(options.get("dtype", torch.float32)), cache).float())
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 1e-4 < error < 0.05, f"relative difference {error:.3f}: E4M3 has steps of 1/16, bf16 of 1/256"


@pytest.mark.parametrize("index_format", INDEX_FORMATS)
@pytest.mark.parametrize("kv_format", ["fp8_ds_mla", "bf16", "fp32"])
def test_chunks_do_not_matter_in_any_format(index_format, kv_format):
    """Prefill, chunks that align with nothing, and single tokens (most of which complete no entry)."""
    config = tiny_config(csa_top_k=1024)  # a near-tie in a choice of few may fall either way by a rounding
    block, x = make_block(config, CSA), torch.randn(23, 64)
    outputs = []
    for sizes in ([23], [5, 1, 9, 2, 6], [1] * 23):
        cache = make_cache(config, CSA, index_format=index_format, kv_format=kv_format)
        parts = []
        for part in x.split(sizes):
            cache.begin_step([0], [len(part)])
            parts.append(block(part, cache))
        outputs.append(torch.cat(parts))
    for other in outputs[1:]:
        error = (other - outputs[0]).norm() / outputs[0].norm()
        assert error < 1e-3, f"relative difference {error:.1e}: a code of the KV cache may fall either way"


def test_a_cache_of_another_model_is_refused():
    config = tiny_config()
    block, x = make_block(config, CSA), torch.randn(2, 64)
    other = exact(tiny_config(csa_top_k=8), CSA)
    other.begin_step([0], [2])
    with pytest.raises(ValueError, match="cache must have this layer's config"):
        block(x, other)
    cache = exact(config, CSA)
    cache.begin_step([0], [2])
    with pytest.raises(TypeError, match="x must have the cache's dtype torch.float32, got torch.bfloat16"):
        block(x.bfloat16(), cache)


# --- compressor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [CSA, HCA], ids=["ratio4", "ratio128"])
@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "hadamard"])
@pytest.mark.parametrize("chunk", [1, 7, 130, 1000])
def test_compressor_equals_the_stateless_definition(layer, rotate, chunk):
    config = tiny_config()
    torch.manual_seed(1)
    names = {"wkv.weight", "wgate.weight", "ape", "norm.weight"}
    weights = {n: random_weights(config, layer)[f"compressor.{n}"] for n in names}
    compressor = Compressor(config, layer, dim=config.head_dim, rotate=rotate)
    compressor.load_weights(weights)
    cache = exact(config, layer)
    lengths = {0: 401, 3: 262, 1: 2}
    xs = {s: torch.randn(n, config.hidden_size) for s, n in lengths.items()}
    entries = {s: [] for s in xs}
    for start in range(0, 401, chunk):
        members = [s for s, x in xs.items() if start < len(x)]
        parts = [xs[s][start : start + chunk] for s in members]
        step = cache.begin_step(members, [len(part) for part in parts])
        out = compressor(torch.cat(parts), step, cache.compressor_state)
        for row, s in enumerate(members):
            entries[s].append(out[step.entry_rows == row])
    for s, x in xs.items():
        expected = reference.compress(
            x,
            wkv=weights["wkv.weight"],
            wgate=weights["wgate.weight"],
            ape=weights["ape"],
            norm=weights["norm.weight"],
            compress_ratio=config.compress_ratios[layer],
            frequencies=layer_frequencies(config, layer),
            eps=config.rms_norm_eps,
            rotate=rotate,
            dtype=torch.float64,
        )
        got = torch.cat(entries[s])
        assert got.shape == expected.shape, f"sequence {s}: {len(got)} entries, want {len(expected)}"
        # angles reach 0.4 M rad x 2^-24 in fp32; entries are of norm sqrt(512)
        worst = (got - expected).abs().max() if len(got) else torch.zeros(())
        assert worst < 2e-4, f"sequence {s}: worst difference {worst:.1e}"


# --- indexer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", INDEX_FORMATS)
@pytest.mark.parametrize("hadamard", [True, False], ids=["hadamard", "plain"])
def test_indexer_selects_what_its_own_scores_say(format, hadamard):
    config = tiny_config(indexer_hadamard=hadamard)
    block = make_block(config, CSA)
    assert block.indexer is not None
    cache = make_cache(config, CSA, index_format=format)
    x, c_Q = torch.randn(150, config.hidden_size), torch.randn(150, config.query_compression_dim)
    step = cache.begin_step([1, 3], [100, 50])
    indices = block.indexer(c_Q, x, cache)
    q, weights = block.indexer.query(c_Q, x, step.positions, format)
    scores = reference.index_scores(
        q, weights, cache.read_indexer_view(), valid_lens=step.valid_lens, seq_ids=step.seq_ids, max_len=25
    )
    for t in range(150):
        expected = reference.select(scores[t], int(step.valid_lens[t]), config.csa_top_k)
        assert sorted(indices[t].tolist()) == sorted(expected.tolist()), f"token {t}"
    assert int(step.valid_lens[99]) == 25 > config.csa_top_k, "the last token has to choose"


def test_indexer_queries_from_nvfp4_weights_are_quantised_after_rope():
    config = tiny_config()
    block = make_block(config, CSA)
    indexer = block.indexer
    linear = Nvfp4Linear(
        config.query_compression_dim, config.indexer_num_heads * config.indexer_head_dim, output_format="mxfp4"
    )
    linear.load_weights(nvfp4_weights(linear.out_features, linear.in_features))
    dense = Linear(linear.in_features, linear.out_features)
    dense.load_weights({"weight": linear.dense_weight(torch.float32)})
    c_Q, h, positions = torch.randn(6, 32), torch.randn(6, 64), torch.arange(6) * 1000
    queries = []
    for wq_b in (linear, dense):
        indexer.wq_b = wq_b
        queries.append(indexer.query(c_Q, h, positions, "mxfp4")[0])
    assert torch.equal(queries[0].data, queries[1].data) and torch.equal(queries[0].scale, queries[1].scale)


# --- linear layers --------------------------------------------------------------------------------------------


def nvfp4_weights(rows: int, columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(rows, columns // 16, generator=generator) + 0.5
    return {
        "weight": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator),
        "scale": scale.to(torch.float8_e4m3fn),
        "global_scale": torch.tensor(0.03),
    }


def test_nvfp4_linear_equals_ml_dtypes():
    weights = nvfp4_weights(48, 64)
    layer = Nvfp4Linear(64, 48)
    layer.load_weights(weights)
    packed = weights["weight"].numpy()
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(48, 64).view(ml_dtypes.float4_e2m1fn)
    scale = weights["scale"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    dense = codes.astype(np.float64) * scale.repeat(16, axis=1) * np.float64(np.float32(0.03))
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x).double(), x.double() @ torch.from_numpy(dense).T, rtol=1e-5, atol=1e-5)


def test_nvfp4_linear_quantises_its_output():
    layer = Nvfp4Linear(64, 256, output_format="nvfp4")
    layer.load_weights(nvfp4_weights(256, 64))
    plain = Nvfp4Linear(64, 256)
    plain.load_weights(nvfp4_weights(256, 64))
    x = torch.randn(5, 64)
    q = layer(x)
    assert isinstance(q, QuantizedQuery) and q.shape == (5, 2, 128)
    error = (q.dequantize().flatten(1) - plain(x)).norm() / plain(x).norm()
    assert 0.01 < error < 0.15, f"FP4 keeps one mantissa bit, got relative error {error:.3f}"


@pytest.mark.parametrize("shape", [(256, 128), (200, 300)], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.float32], ids=str)
def test_fp8_block_linear_scales_each_block(shape, scale_dtype):
    torch.manual_seed(2)
    rows, columns = shape
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-6, 6, (-(-rows // 128), -(-columns // 128))).float())
    layer = Fp8BlockLinear(columns, rows)
    layer.load_weights({"weight": weight, "scale": scale.to(scale_dtype)})
    dense = torch.stack(
        [torch.stack([weight[i, j].double() * scale[i // 128, j // 128] for j in range(columns)]) for i in range(rows)]
    )
    assert torch.equal(layer.dense_weight(torch.float64), dense)
    assert torch.equal(layer.dense_weight(torch.bfloat16).double(), dense), "exact in bf16"


# --- no weight is ever made up --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [SWA, CSA, HCA], ids=["SWA", "CSA", "HCA"])
def test_modules_without_weights_raise(layer):
    config = tiny_config()
    cache = exact(config, layer)
    step = cache.begin_step([0], [5])
    x, c_Q = torch.randn(5, 64), torch.randn(5, 32)
    with pytest.raises(WeightsNotLoaded, match="AttentionSubBlock: wq_a is not loaded"):
        AttentionSubBlock(config, layer)(x, cache)
    if layer == CSA:
        with pytest.raises(WeightsNotLoaded, match="CSAIndexer: wq_b"):
            CSAIndexer(config)(c_Q, x, cache)
    if layer != SWA:
        with pytest.raises(WeightsNotLoaded, match="Compressor: wkv is not loaded"):
            Compressor(config, layer, dim=config.head_dim)(x, step, cache.compressor_state)


@pytest.mark.parametrize(
    "linear", [Linear(8, 8), Fp8BlockLinear(8, 8), Nvfp4Linear(16, 8)], ids=lambda m: m._get_name()
)
def test_linear_without_weights_raises(linear):
    with pytest.raises(WeightsNotLoaded, match="weight is not loaded|scale is not loaded"):
        linear(torch.randn(2, linear.in_features))


@pytest.mark.parametrize("missing", ["wo_b.weight", "attn_sink", "compressor.ape", "indexer.weights_proj.weight"])
def test_loading_names_a_missing_tensor_and_loads_nothing(missing):
    config = tiny_config()
    weights = random_weights(config, CSA)
    del weights[missing]
    block = AttentionSubBlock(config, CSA)
    name = missing.removeprefix("indexer.").removeprefix("compressor.")
    with pytest.raises(KeyError, match=f"{name} is missing"):
        block.load_weights(weights)
    assert not list(block.buffers()), "nothing is loaded by a call that fails"


def test_loading_names_a_linear_of_wrong_shape():
    config = tiny_config()
    weights = {**random_weights(config, CSA), "wo_b.weight": torch.zeros(64, 3)}
    with pytest.raises(ValueError, match=r"wo_b: Linear: weight must have shape \[64, 16\], got \[64, 3\]"):
        AttentionSubBlock(config, CSA).load_weights(weights)


def test_loading_names_a_wrong_shape():
    config = tiny_config()
    weights = random_weights(config, CSA)
    weights["compressor.ape"] = weights["compressor.ape"][:3]
    with pytest.raises(ValueError, match=r"ape must have shape \[4, 1024\], got \[3, 1024\]"):
        AttentionSubBlock(config, CSA).load_weights(weights)


# --- cache handle ---------------------------------------------------------------------------------------------


def test_fork_continues_like_its_parent_and_then_goes_its_own_way():
    config = tiny_config(head_dim=64, rope_head_dim=32)
    x, other = torch.randn(200, 64), torch.randn(60, 64)
    for layer in (SWA, CSA, HCA):
        block, cache = make_block(config, layer), exact(config, layer, max_seqs=3)
        cache.free(1)
        cache.begin_step([0], [140])
        block(x[:140], cache)
        cache.fork(0, 1)
        cache.begin_step([1, 0], [60, 60])
        forked, parent = block(torch.cat([other, x[140:]]), cache).split(60)
        for tail, got in ((other, forked), (x[140:], parent)):
            cache.free(2)
            cache.alloc(2)
            cache.begin_step([2], [200])
            torch.testing.assert_close(got, block(torch.cat([x[:140], tail]), cache)[140:], rtol=1e-4, atol=1e-5)


def test_step_that_does_not_fit_changes_nothing():
    config = tiny_config()
    cache = exact(config, CSA, num_blocks=3)
    cache.begin_step([0, 1], [64, 64])  # 16 entries each: one block each, one left
    before = cache.index_pool.block_table.clone()
    with pytest.raises(OutOfBlocks, match="2 more blocks of 16 entries needed, 1 of 3 are free"):
        cache.begin_step([0, 1], [4, 4])
    assert (cache.num_tokens(0), cache.num_tokens(1)) == (64, 64)
    assert torch.equal(cache.index_pool.block_table, before) and cache.kv_pool.num_free_blocks == 1
    cache.begin_step([0], [4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.begin_step([0, 0], [1, 1]), "distinct seq_ids"),
        (lambda c: c.begin_step([9], [1]), "sequence 9 is not allocated"),
        (lambda c: c.begin_step([0], [-1]), "must not be negative, got -1"),
        (lambda c: c.alloc(0), "sequence 0 is already allocated"),
        (lambda c: c.alloc(4), "seq_id must lie in 0..3, got 4"),
        (lambda c: c.fork(0, 1), "dst must be free"),
        (lambda c: c.append(torch.randn(1, 512), "kv"), "no step in progress"),
    ],
)
def test_handle_refuses(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(exact(tiny_config(), CSA))


def test_handle_of_each_kind_has_what_it_needs():
    config = tiny_config()
    swa, csa, hca = (exact(config, layer) for layer in (SWA, CSA, HCA))
    assert csa.paged.schema.entries_per_block == 16 and csa.paged is csa.index_pool
    assert hca.paged is hca.kv_pool
    for wrong in (lambda: swa.paged, swa.read_kv_view, hca.read_indexer_view):
        with pytest.raises(ValueError, match="is SWA|is HCA"):
            wrong()
    with pytest.raises(ValueError, match="layer 1 is CSA, got a cache of kind HCA"):
        hca.begin_step([0], [1])
        make_block(config, CSA)(torch.randn(1, 64), hca)


def test_empty_step_is_valid():
    config = tiny_config()
    for layer in (SWA, CSA, HCA):
        cache = exact(config, layer)
        cache.begin_step([], [])
        assert make_block(config, layer)(torch.empty(0, 64), cache).shape == (0, 64)
        cache.begin_step([0, 1], [0, 3])
        assert make_block(config, layer)(torch.randn(3, 64), cache).isfinite().all()
