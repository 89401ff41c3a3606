"""No tensor is made where torch happens to make tensors by default: everything follows the caller's tensors.

The default device is set to "meta", whose tensors hold nothing, while all that the caller passes lies on the CPU. A
tensor made without saying where lands on "meta", and the first thing that meets it fails. So whatever passes here puts
its tensors beside the caller's on a GPU too, and runs under `torch.set_default_device("cuda")`.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from test_layer import CSA, HCA, INDEX_FORMATS, SWA, make_block, nvfp4_weights, random_weights, tiny_config

from lightning_indexer import (
    AttentionSubBlock,
    CacheSchema,
    Compressor,
    CSAIndexer,
    Fp8BlockLinear,
    IndexerView,
    KVView,
    LayerCacheHandle,
    Nvfp4Linear,
    PagedPool,
    append_entries,
    gather_kv,
    index_scores,
    merge_topk,
    quantize_query,
    score_topk,
    select_candidates,
    sparse_attention,
    visible_entries,
)
from lightning_indexer.demo.layer import Layer
from lightning_indexer.demo.model import HIDDEN_SIZE
from lightning_indexer.demo.options import Options
from lightning_indexer.nn.linear import Linear, strip

CPU = torch.device("cpu")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cpu")


def same_twice(run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `run` gives, and the same with "meta" as the default device."""
    torch.manual_seed(1)
    expected = run()
    torch.manual_seed(1)
    with torch.device("meta"):
        got = run()
    assert got.device == expected.device == CPU
    assert torch.equal(got, expected)
    return got


def test_the_trick_sees_a_tensor_made_without_a_device() -> None:
    def careless() -> torch.Tensor:
        return torch.zeros(3, device="cpu") + torch.arange(3)

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        same_twice(careless)


def test_importing_the_package_makes_nothing_on_the_default_device() -> None:
    code = (
        "import torch\n"
        "torch.set_default_device('meta')\n"
        "import lightning_indexer\n"
        "from lightning_indexer.cpu import operands\n"
        "assert operands._PAIR_TABLE.device.type == 'cpu'\n"
        "assert len(operands._PAIR_TABLE.view(torch.int8).unique()) == 15, 'every E2M1 value'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- the layer ------------------------------------------------------------------------------------------------

CONFIG = tiny_config()
STEPS = (([0, 2], [140, 37]), ([2], [1]), ([1, 0], [0, 5]))  # ragged; a decode step; one sequence without tokens


def new_cache(layer: int, **options: object) -> LayerCacheHandle:
    options = {"num_blocks": 64, "entries_per_block": 16, "dtype": torch.float32, **options}
    cache = LayerCacheHandle(CONFIG, layer, max_seqs=4, device="cpu", **options)
    for seq_id in range(3):
        cache.alloc(seq_id)
    return cache


@pytest.mark.parametrize("layer", [SWA, CSA, HCA], ids=["SWA", "CSA", "HCA"])
@pytest.mark.parametrize("kv_format", ["fp8_ds_mla", "bf16"])
def test_attention_block(layer: int, kv_format: str) -> None:
    weights = random_weights(CONFIG, layer)

    def run() -> torch.Tensor:
        block, cache = AttentionSubBlock(CONFIG, layer), new_cache(layer, kv_format=kv_format)
        block.load_weights(weights)
        outputs = []
        for seq_ids, counts in STEPS:
            cache.begin_step(seq_ids, counts)
            outputs.append(block(random(sum(counts), CONFIG.hidden_size), cache))
        cache.fork(0, 3)
        cache.free(0)
        cache.begin_step([3], [7])
        return torch.cat([*outputs, block(random(7, CONFIG.hidden_size), cache)])

    assert same_twice(run).isfinite().all()


@pytest.mark.parametrize("wq_b", ["dense", "nvfp4"])
@pytest.mark.parametrize("format", INDEX_FORMATS)
def test_indexer(format: str, wq_b: str) -> None:
    weights = strip(random_weights(CONFIG, CSA), "indexer.")
    if wq_b == "nvfp4":
        packed = nvfp4_weights(CONFIG.indexer_num_heads * CONFIG.indexer_head_dim, CONFIG.query_compression_dim)
        weights = {k: v for k, v in weights.items() if not k.startswith("wq_b.")}
        weights |= {f"wq_b.{name}": tensor for name, tensor in packed.items()}

    def run() -> torch.Tensor:
        indexer, cache = CSAIndexer(CONFIG), new_cache(CSA, index_format=format)
        indexer.load_weights(weights)
        chosen = []
        for seq_ids, counts in STEPS:
            cache.begin_step(seq_ids, counts)
            c_Q, h = random(sum(counts), CONFIG.query_compression_dim), random(sum(counts), CONFIG.hidden_size)
            chosen.append(indexer(c_Q, h, cache))
        return torch.cat(chosen)

    assert (same_twice(run) >= 0).any()


@pytest.mark.parametrize("layer", [CSA, HCA], ids=["ratio4", "ratio128"])
def test_compressor(layer: int) -> None:
    weights = strip(random_weights(CONFIG, layer), "compressor.")

    def run() -> torch.Tensor:
        compressor, cache = Compressor(CONFIG, layer, dim=CONFIG.head_dim, rotate=True), new_cache(layer)
        compressor.load_weights(weights)
        entries = []
        for seq_ids, counts in STEPS:
            step = cache.begin_step(seq_ids, counts)
            entries.append(compressor(random(sum(counts), CONFIG.hidden_size), step, cache.compressor_state))
        return torch.cat(entries)

    assert len(same_twice(run)) > 0


def test_step_and_append_of_a_cache_handle() -> None:
    def run() -> torch.Tensor:
        cache = new_cache(CSA)
        seen = []
        for seq_ids, counts in STEPS:
            step = cache.begin_step(seq_ids, counts)
            tensors = [value for value in vars(step).values() if isinstance(value, torch.Tensor)]
            assert {tensor.device for tensor in tensors} == {CPU}
            seen += [tensor.double() for tensor in tensors]
            cache.append(random(len(step.entry_rows), CONFIG.indexer_head_dim), "index")
            cache.append(random(len(step.entry_rows), CONFIG.head_dim), "kv")
        bytes_written = [cache.read_indexer_view().storage, cache.read_kv_view().storage]
        return torch.cat([*seen, *(storage.flatten().double() for storage in bytes_written)])

    same_twice(run)


@pytest.mark.parametrize("linear", [Fp8BlockLinear(32, 48), Nvfp4Linear(32, 48)], ids=lambda m: m._get_name())
def test_linear_layers(linear: Linear) -> None:
    if isinstance(linear, Nvfp4Linear):
        linear.load_weights(nvfp4_weights(48, 32))
    else:
        weight = torch.randn(48, 32).to(torch.float8_e4m3fn)
        linear.load_weights({"weight": weight, "scale": torch.ones(1, 1).to(torch.float8_e8m0fnu)})
    same_twice(lambda: linear(random(5, 32)))


@pytest.mark.parametrize("name", ["x", "c_Q", "h_t"])
def test_hidden_states_on_another_device_than_the_cache_are_named(name: str) -> None:
    cache = new_cache(CSA)
    cache.begin_step([0], [5])
    places = {key: "meta" if key == name else "cpu" for key in ("x", "c_Q", "h_t")}
    x, c_Q, h = (
        torch.empty(5, size, device=places[key])
        for key, size in (("x", CONFIG.hidden_size), ("c_Q", CONFIG.query_compression_dim), ("h_t", CONFIG.hidden_size))
    )
    with pytest.raises(ValueError, match=f"{name} must be on cpu, got meta"):
        make_block(CONFIG, CSA)(x, cache) if name == "x" else make_block(CONFIG, CSA).indexer(c_Q, h, cache)


# --- the ops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("format", INDEX_FORMATS)
def test_selection(format: str, impl: str) -> None:
    def run() -> torch.Tensor:
        pool = PagedPool(CacheSchema(format, 16), num_blocks=20, max_seqs=2, device="cpu")
        for seq_id, count in ((0, 100), (1, 33)):
            slots = pool.alloc(seq_id, count)
            view = IndexerView(pool.storage, pool.schema, pool.block_table, 2.0 if format == "nvfp4" else 1.0)
            append_entries(random(count, 128), view, slots, impl=impl)
        q = random(2, 8, 128)
        queries = quantize_query(q, format) if format in ("mxfp4", "nvfp4", "fp8") else q
        weights = random(2, 8)
        lens = visible_entries(torch.tensor([399, 131], device="cpu"), 4)
        indices, scores = score_topk(
            queries, weights, view, top_k=40, valid_lens=lens, order="score", return_scores=True, impl=impl
        )
        dense = index_scores(queries, weights, view, valid_lens=lens, impl=impl)
        merged, _ = merge_topk(indices, scores, top_k=50)
        lists = select_candidates(queries, weights, view, valid_lens=lens, num_blocks=6, impl=impl)
        listed = score_topk(queries, weights, view, top_k=20, valid_lens=lens, candidates=lists, impl=impl)
        return torch.cat([indices.float(), scores, dense, merged.float(), lists.float(), listed.float()], dim=1)

    same_twice(run)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("format", ["fp8_ds_mla", "bf16", "fp32"])
def test_gather_and_attention(format: str, impl: str) -> None:
    def run() -> torch.Tensor:
        pool = PagedPool(CacheSchema(format, 16, head_dim=512), num_blocks=4, max_seqs=1, device="cpu")
        slots = pool.alloc(0, 50)
        view = KVView(pool.storage, pool.schema, pool.block_table)
        append_entries(random(50, 512), view, slots, impl=impl)
        indices = torch.tensor([[3, 49, 7, -1]], device="cpu")
        kv = gather_kv(view, indices, impl=impl)
        valid = torch.cat([indices >= 0, torch.ones(1, 2, dtype=torch.bool, device="cpu")], dim=1)
        sink = torch.zeros(4, device="cpu")
        out, lse = sparse_attention(
            random(1, 4, 512), kv, random(1, 2, 512), valid=valid, sink=sink, softmax_scale=0.1, impl=impl
        )
        return torch.cat([kv.flatten().float(), out.flatten(), lse.flatten()])

    same_twice(run)


# --- the demo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
def test_demo_layer(format: str) -> None:
    options = Options(tokens=1024, top_k=32, format=format)

    def nothing(_done: int) -> None:
        pass

    def run() -> torch.Tensor:
        layer = Layer(options, CPU)
        vectors = random(50, HIDDEN_SIZE).bfloat16()
        layer.write(vectors, torch.arange(1024, device="cpu") % 50, nothing)
        queries = layer.ask(vectors[:20])
        indices, scores = layer.select(queries)
        out, lse = layer.attend(queries, indices, nothing)
        ranked = layer.scores(queries.take([3, 5]))
        parts = (indices, scores, out, lse, layer.full_lse(queries), ranked)
        return torch.cat([part.flatten().float() for part in parts])

    same_twice(run)
