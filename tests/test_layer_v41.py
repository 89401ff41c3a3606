"""DeepSeek-V4.1's layers: ratios 1 and 2, shared entries, keys and selections, against a stateless definition.

The definition below is in float64 on whole sequences, without cache, state or step, and with complex numbers for RoPE.
Wrong layers, each wrong in one known way, must differ from it.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_layer import CSA, exact, make_block, random_weights, tiny_config
from torch import Tensor

from lightning_indexer import (
    AttentionSubBlock,
    Compressor,
    CSAIndexer,
    DSV4Config,
    LayerCacheHandle,
    index_scores,
    reference,
    select_candidates,
)
from lightning_indexer.checkpoint import expected_shapes
from lightning_indexer.nn import compressor, csa_indexer
from lightning_indexer.nn.linear import WeightsNotLoaded
from lightning_indexer.nn.rope import layer_frequencies
from lightning_indexer.rotary import apply_rope

# Layer:   0    1       2      3        4       5      6        7
# Role:    SWA  full    reuse  reindex  full    reuse  reindex  reuse
RATIOS = (0, 2, 2, 2, 1, 1, 1, 1)
FULL, FULL_1, REINDEX, REUSE = 1, 4, 6, 7
TOKENS = 61


def v41_config(**changes) -> DSV4Config:
    fields = {
        "num_hidden_layers": 8,
        "head_dim": 64,
        "rope_head_dim": 32,
        "indexer_head_dim": 64,
        "csa_top_k": 6,
        "sliding_window": 8,
        "compress_ratios": (*RATIOS, 0),
        "rms_norm_eps": 1e-20,
        "indexer_hadamard": False,
        "kv_source_layer_ids": (1, 4),
        "index_source_layer_ids": (1, 3, 4, 6),
        "candidate_source_layer_id": 4,
        "candidate_topk_blocks": 16,
        "candidate_block_size": 8,
    }
    return tiny_config(**{**fields, **changes})


CONFIG = v41_config()


def make_caches(config: DSV4Config = CONFIG, **options) -> list[LayerCacheHandle]:
    options = {"max_seqs": 3, "num_blocks": 32, "entries_per_block": 16, "dtype": torch.float32, **options}
    options = {"index_format": "fp32", "kv_format": "fp32", **options}
    caches: list[LayerCacheHandle] = []
    for layer in range(config.num_hidden_layers):
        source = config.layer_source(layer)
        handle = LayerCacheHandle(config, layer, source=None if source is None else caches[source], **options)
        caches.append(handle)
        for seq_id in range(options["max_seqs"]):
            caches[-1].alloc(seq_id)
    return caches


def make_blocks(config: DSV4Config = CONFIG) -> list[AttentionSubBlock]:
    return [make_block(config, layer, seed=layer) for layer in range(config.num_hidden_layers)]


def run(blocks, caches, x: Tensor, sizes: list[int], seq_id: int = 0) -> list[Tensor]:
    """Each layer's output for a sequence, with residuals in between."""
    outputs: list[list[Tensor]] = [[] for _ in blocks]
    for part in x.split(sizes):
        for block, cache, kept in zip(blocks, caches, outputs, strict=True):
            cache.begin_step([seq_id], [len(part)])
            kept.append(block(part, cache))
            part = part + kept[-1]
    return [torch.cat(parts) for parts in outputs]


# --- the definition -------------------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, sign: int = 1) -> Tensor:
    """The last channels of x [T, ..., D], as complex numbers."""
    width = 2 * len(frequencies)
    angles = (positions.float()[:, None] * frequencies).double()  # products are fp32, as the model has them
    turns = torch.polar(torch.ones_like(angles), sign * angles)
    turns = turns.view(len(x), *[1] * (x.dim() - 2), len(frequencies))
    numbers = torch.view_as_complex(x[..., -width:].contiguous().unflatten(-1, (-1, 2)))
    return torch.cat([x[..., :-width], torch.view_as_real(numbers * turns).flatten(-2)], dim=-1)


def latents_of(x: Tensor, w: dict[str, Tensor], ratio: int) -> Tensor:
    """[L // ratio, head_dim]."""
    values = x @ w["compressor.wkv.weight"].T
    if ratio == 1:
        return rms(values, w["compressor.norm.weight"])
    gates = x @ w["compressor.wgate.weight"].T
    rows = []
    for i in range(0, len(x) - 1, 2):
        share = torch.sigmoid(gates[i] - gates[i + 1])  # the softmax over two
        rows.append(share * values[i] + (1 - share) * values[i + 1])
    return rms(torch.stack(rows) if rows else values[:0], w["compressor.norm.weight"])


def in_best_blocks(scores: list[float], count: int, size: int) -> list[int]:
    """The entries of the newest block and of those of the largest scores, `count` blocks in all."""
    entries = list(range(len(scores)))
    blocks = [entries[first : first + size] for first in range(0, len(scores), size)]
    older = sorted(blocks[:-1], key=lambda block: -max(scores[s] for s in block))
    return [s for block in (blocks[-1:] + older)[:count] for s in block]


def definition(x: Tensor, config: DSV4Config = CONFIG) -> tuple[list[Tensor], dict[int, list[list[int]]]]:
    """Every layer's output in float64, and what each index source chose for each token."""
    x, outputs, entries, keys, chosen, candidates = x.double(), [], {}, {}, {}, []
    positions = torch.arange(len(x))
    for layer in range(config.num_hidden_layers):
        w = {name: tensor.double() for name, tensor in random_weights(config, layer, seed=layer).items()}
        f, ratio = layer_frequencies(config, layer), config.compress_ratios[layer]
        c_Q = rms(x @ w["wq_a.weight"].T, w["q_norm.weight"])
        q = rms((c_Q @ w["wq_b.weight"].T).unflatten(-1, (config.num_heads, config.head_dim)))
        q = rotate(q, positions, f)
        window = rotate(rms(x @ w["wkv.weight"].T, w["kv_norm.weight"]), positions, f)
        if "compressor.wkv.weight" in w:
            latents = latents_of(x, w, ratio)
            first = torch.arange(len(latents)) * ratio
            entries = rotate(latents, first, f)
            keys = rotate(rms(latents @ w["indexer.wk.weight"].T, w["indexer.k_norm.weight"]), first, f)
        if "indexer.wq_b.weight" in w:
            q_I = (c_Q @ w["indexer.wq_b.weight"].T).unflatten(-1, (config.indexer_num_heads, -1))
            weights = x @ w["indexer.weights_proj.weight"].T
            dots = (rotate(q_I, positions, f) @ keys.T).clamp_min(0)  # [T, H, S]
            scores = torch.einsum("ths,th->ts", dots, weights)
            visible = [scores[t, : (t + 1) // ratio].tolist() for t in range(len(x))]
            listed = [list(range(len(row))) for row in visible]
            if config.candidate_source_layer_id is not None and layer > config.candidate_source_layer_id:
                listed = candidates
            chosen[layer] = [
                sorted(sorted(choice, key=lambda s, row=row: -row[s])[: config.csa_top_k])
                for row, choice in zip(visible, listed, strict=True)
            ]
            if layer == config.candidate_source_layer_id:
                candidates = [
                    in_best_blocks(row, config.candidate_topk_blocks, config.candidate_block_size) for row in visible
                ]
        heads = []
        for t in range(len(x)):
            rows = window[max(0, t + 1 - config.sliding_window) : t + 1]
            if ratio:
                rows = torch.cat([rows, entries[list(chosen.values())[-1][t]]])
            e = torch.exp(q[t] @ rows.T * config.head_dim**-0.5)
            heads.append(e @ rows / (e.sum(-1) + torch.exp(w["attn_sink"])).unsqueeze(-1))
        o = rotate(torch.stack(heads), positions, f, sign=-1).flatten(1).unflatten(1, (config.o_groups, -1))
        wo_a = w["wo_a.weight"].unflatten(0, (config.o_groups, -1))
        outputs.append(torch.einsum("tgi,gri->tgr", o, wo_a).flatten(1) @ w["wo_b.weight"].T)
        x = x + outputs[-1]
    return outputs, chosen


def hidden_states() -> Tensor:
    return torch.randn(TOKENS, CONFIG.hidden_size, generator=torch.Generator().manual_seed(7))


@functools.cache
def definition_of_all(config: DSV4Config = CONFIG) -> tuple[list[Tensor], dict[int, list[list[int]]]]:
    return definition(hidden_states(), config)


def worst_error(got: list[Tensor], want: list[Tensor]) -> float:
    errors = [((g - w).norm(dim=-1) / w.norm(dim=-1)).max().item() for g, w in zip(got, want, strict=True)]
    return max(errors)


# fp32 against float64 through eight layers; another choice of entries would differ by 0.1 and more
BOUND = 2e-5

SIZES = {"prefill": [TOKENS], "decode": [1] * TOKENS, "chunks": [5, 1, 1, 9, 2, 3, 40]}


@pytest.mark.parametrize("sizes", SIZES)
def test_all_layers_equal_the_stateless_definition(sizes: str) -> None:
    caches = make_caches()
    x = hidden_states()
    got, (want, chosen) = run(make_blocks(), caches, x, SIZES[sizes]), definition_of_all()
    assert worst_error(got, want) < BOUND, f"worst relative error {worst_error(got, want):.1e}"
    assert sum(len(c[-1]) == CONFIG.csa_top_k for c in chosen.values()) == 4, "the last token has to choose"
    differing = [chosen[a][-1] != chosen[b][-1] for a, b in ((1, 3), (4, 6))]
    assert all(differing), "a reindex layer chooses otherwise than its source"


def test_a_ragged_batch_and_forks_continue_as_alone() -> None:
    blocks, x = make_blocks(), hidden_states()
    other = torch.randn(9, CONFIG.hidden_size)
    caches = make_caches()
    for cache in caches:
        cache.free(1)
    run(blocks, caches, x[:20], [7, 13])
    for cache in caches:
        cache.fork(0, 1)
    part = torch.cat([other, x[20:33], other[:1]])
    for block, cache in zip(blocks, caches, strict=True):
        cache.begin_step([1, 0, 2], [9, 13, 1])
        part = part + block(part, cache)
    for rows, tokens in ((slice(0, 9), torch.cat([x[:20], other])), (slice(9, 22), x[:33]), (slice(22, 23), other[:1])):
        want = definition(tokens)[0]
        last = tokens.double() + sum(want)
        n = rows.stop - rows.start
        error = worst_error([part[rows]], [last[-n:]])
        assert error < BOUND, f"rows {rows}: relative error {error:.1e}"


def test_static_decode_steps_equal_ordinary_ones() -> None:
    blocks, x = make_blocks(), hidden_states()[:30]
    config = v41_config()
    want = run(blocks, make_caches(config), x, [20, *[1] * 10])
    caches = make_caches(config, max_blocks_per_seq=4)
    got = [[out] for out in run(blocks, caches, x[:20], [20])]
    for t in range(20, 30):
        part = x[t : t + 1]
        for block, cache, kept in zip(blocks, caches, got, strict=True):
            cache.begin_step([0], [1], static=True)
            kept.append(block(part, cache))
            part = part + kept[-1]
    assert worst_error([torch.cat(parts) for parts in got], want) < 1e-6


@pytest.mark.parametrize("index_format", ["mxfp4", "nvfp4", "fp8", "bf16"])
def test_bf16_layers_stay_near_the_definition(index_format: str) -> None:
    config = v41_config(csa_top_k=64)  # all are chosen: what is left is rounding
    caches = make_caches(config, index_format=index_format, kv_format="bf16", dtype=torch.bfloat16)
    x = hidden_states().bfloat16()
    got, (want, _) = run(make_blocks(config), caches, x, [40, 21]), definition(x, config)
    error = max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
    assert 1e-4 < error < 0.05, f"relative difference {error:.3f}: bf16 has steps of 1/256"


def test_a_row_of_zeros_is_finite_with_an_epsilon_of_1e_20() -> None:
    x = hidden_states()
    x[3:9] = 0
    assert all(out.isfinite().all() for out in run(make_blocks(), make_caches(), x, [6, 55]))


# --- wrong layers ---------------------------------------------------------------------------------------------


def last_token_positions(right: Callable) -> Callable:
    return lambda self, latents, step: right(self, latents, replace(step, entry_indices=step.entry_indices + 1))


def keys_from_rotated_latents(right: Callable) -> Callable:
    def keys(self, latents, cache):
        positions = cache.require_step().entry_indices * cache.compress_ratio
        return right(self, apply_rope(latents, positions, self.frequencies.on(latents.device)), cache)

    return keys


def without_gates(right: Callable) -> Callable:
    return lambda self, x: (right(self, x)[0], torch.zeros_like(right(self, x)[1]))


def with_position_bias(right: Callable) -> Callable:
    def pooled(*args, ape, **options):
        return right(*args, ape=ape + torch.arange(ape.numel()).view(ape.shape) / ape.numel(), **options)

    return pooled


def chosen_by_the_kv_source(right: Callable) -> Callable:
    def given(self, indices, cache):
        if cache.role == "reuse" and cache.source.source is not None:
            return cache.source.source.selected
        return right(self, indices, cache)

    return given


def same_choice_in_reindex_layers(right: Callable) -> Callable:
    def given(self, indices, cache):
        return cache.source.selected if cache.role == "reindex" else right(self, indices, cache)

    return given


# What is replaced, and by what, given the right one
WRONG: dict[str, tuple[object, str, Callable]] = {
    "entries-at-their-last-token": (Compressor, "_rotate_latents", last_token_positions),
    "entries-not-rotated": (Compressor, "_rotate_latents", lambda _: lambda self, latents, step: latents),
    "no-gates": (Compressor, "_project", without_gates),
    "position-bias": (compressor, "pooled_latents", with_position_bias),
    "keys-of-rotated-latents": (CSAIndexer, "_keys", keys_from_rotated_latents),
    "keys-without-norm": (csa_indexer, "rms_norm", lambda _: lambda x, weight, eps: x * weight),
    "choice-of-the-kv-source": (AttentionSubBlock, "_given", chosen_by_the_kv_source),
    "reindex-chooses-nothing": (AttentionSubBlock, "_given", same_choice_in_reindex_layers),
}


@pytest.mark.parametrize("sizes", ["prefill", "chunks"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_layers_are_rejected(name: str, sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, change = WRONG[name]
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    x = hidden_states()
    error = worst_error(run(make_blocks(), make_caches(), x, SIZES[sizes]), definition_of_all()[0])
    assert error > 100 * BOUND, f"{name} goes unnoticed: error {error:.1e}"


def test_a_lost_state_is_rejected() -> None:
    """A chunk that ends inside an entry: its first token comes from the ring."""
    caches, x = make_caches(), hidden_states()
    blocks = make_blocks()
    run(blocks, caches, x[:7], [7])
    caches[FULL].compressor_state.rows.zero_()
    got = run(blocks, caches, x[7:], [TOKENS - 7])
    assert worst_error(got, [want[7:] for want in definition(x)[0]]) > 100 * BOUND


# --- compressor and indexer alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [FULL, FULL_1], ids=["ratio2", "ratio1"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_compressor_equals_the_stateless_definition(layer: int, chunk: int) -> None:
    weights = random_weights(CONFIG, layer)
    own = {n.removeprefix("compressor."): w for n, w in weights.items() if n.startswith("compressor.")}
    ratio = CONFIG.compress_ratios[layer]
    names = {1: ["norm.weight", "wkv.weight"], 2: ["norm.weight", "wgate.weight", "wkv.weight"]}[ratio]
    assert sorted(own) == names, "no position bias, and a gate at ratio 2 alone"
    module = Compressor(CONFIG, layer, dim=CONFIG.head_dim)
    module.load_weights(own)
    cache = make_caches()[layer]
    xs = {0: torch.randn(41, CONFIG.hidden_size), 2: torch.randn(26, CONFIG.hidden_size), 1: torch.randn(1, 64)}
    entries: dict[int, list[Tensor]] = {s: [] for s in xs}
    for start in range(0, 41, chunk):
        members = [s for s, x in xs.items() if start < len(x)]
        parts = [xs[s][start : start + chunk] for s in members]
        step = cache.begin_step(members, [len(part) for part in parts])
        out = module(torch.cat(parts), step, cache.compressor_state)
        for row, s in enumerate(members):
            entries[s].append(out[step.entry_rows == row])
    f = layer_frequencies(CONFIG, layer)
    for s, x in xs.items():
        double = {n: w.double() for n, w in weights.items()}
        latents = latents_of(x.double(), double, ratio) if len(x) >= ratio else torch.empty(0, CONFIG.head_dim)
        want = rotate(latents, torch.arange(len(latents)) * ratio, f)
        got = torch.cat(entries[s])
        assert got.shape == want.shape, f"sequence {s}: {len(got)} entries, want {len(want)}"
        worst = (got - want).abs().max() if len(got) else torch.zeros(())
        assert worst < 1e-5, f"sequence {s}: worst difference {worst:.1e}"
        options = {"compress_ratio": ratio, "frequencies": None, "eps": CONFIG.rms_norm_eps, "dtype": torch.float64}
        gates, norm = own.get("wgate.weight"), own["norm.weight"]
        again = reference.compress(x, wkv=own["wkv.weight"], wgate=gates, ape=None, norm=norm, **options)
        torch.testing.assert_close(again, latents.double(), rtol=1e-12, atol=1e-12)


def test_index_keys_are_those_of_the_definition_in_the_pool() -> None:
    caches, x = make_caches(), hidden_states()
    run(make_blocks()[:2], caches[:2], x, [9, 52])
    want = definition(x)  # layer 1's input is layer 0's output added
    w = {n: t.double() for n, t in random_weights(CONFIG, FULL, seed=FULL).items()}
    latents = latents_of(x.double() + want[0][0], w, 2)
    keys = rms(latents @ w["indexer.wk.weight"].T, w["indexer.k_norm.weight"])
    keys = rotate(keys, 2 * torch.arange(len(latents)), layer_frequencies(CONFIG, FULL))
    got = reference.read_entries(caches[FULL].read_indexer_view(), 0, TOKENS // 2)
    torch.testing.assert_close(got.double(), keys, rtol=1e-4, atol=1e-5)


def test_indexer_weights_are_never_made_up() -> None:
    cache = make_caches()[FULL]
    indexer = CSAIndexer(CONFIG)
    assert indexer.layer == FULL and indexer.compressor is None
    weights = random_weights(CONFIG, FULL)
    own = {n.removeprefix("indexer."): w for n, w in weights.items() if n.startswith("indexer.")}
    for missing in own:
        with pytest.raises(KeyError, match=missing.replace(".", r"\.") + " is missing"):
            indexer.load_weights({n: w for n, w in own.items() if n != missing})
    cache.begin_step([0], [4])
    with pytest.raises(WeightsNotLoaded, match="CSAIndexer: wk is not loaded"):
        indexer.write_keys(torch.randn(4, 64), cache, latents=torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"k_norm\.weight must have shape \[64\], got \[63\]"):
        indexer.load_weights({**own, "k_norm.weight": torch.ones(63)})
    assert not list(indexer.buffers()), "nothing is loaded by a call that fails"


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (FULL, {"compressor.wkv", "compressor.wgate", "compressor.norm", "indexer.wk", "indexer.k_norm"}),
        (FULL_1, {"compressor.wkv", "compressor.norm", "indexer.wk", "indexer.k_norm"}),
        (REINDEX, set()),
        (REUSE, None),
    ],
    ids=["full-2", "full-1", "reindex", "reuse"],
)
def test_tensors_of_each_role(layer: int, names: set[str] | None) -> None:
    shapes = expected_shapes(DSV4Config.v41_flash(), {FULL: 2, FULL_1: 20, REINDEX: 24, REUSE: 39}[layer])
    got = {
        name.removesuffix(".weight"): shape for name, shape in shapes.items() if "indexer" in name or "compr" in name
    }
    assert set(got) == (set() if names is None else names | {"indexer.wq_b", "indexer.weights_proj"})
    sizes = {
        **dict.fromkeys(("compressor.wkv", "compressor.wgate"), (512, 5120)),
        "compressor.norm": (512,),
        "indexer.wk": (128, 512),
        "indexer.k_norm": (128,),
        "indexer.wq_b": (4096, 1280),
        "indexer.weights_proj": (32, 5120),
    }
    assert got == {name: sizes[name] for name in got}


# --- candidates -----------------------------------------------------------------------------------------------


# Configs whose candidates are few: 3 of 8 blocks of 8 entries, 2 of 4 blocks of 16, and those of a reindex layer
ALONE = {"compress_ratios": (0, *[1] * 8), "kv_source_layer_ids": (1,), "candidate_source_layer_id": 3}
RESTRICTED = {
    "blocks-of-8": v41_config(candidate_topk_blocks=3),
    "blocks-of-16": v41_config(candidate_topk_blocks=2, candidate_block_size=16),
    "of-a-reindex-layer": v41_config(candidate_topk_blocks=3, **ALONE),
}
FEW = RESTRICTED["blocks-of-8"]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", RESTRICTED)
def test_layers_choose_among_candidates_as_the_definition_does(name: str, sizes: str) -> None:
    config, x = RESTRICTED[name], hidden_states()
    got, (want, chosen) = run(make_blocks(config), make_caches(config), x, SIZES[sizes]), definition_of_all(config)
    assert worst_error(got, want) < BOUND, f"worst relative error {worst_error(got, want):.1e}"
    freely = definition_of_all(replace(config, candidate_topk_blocks=16))[1]
    restricted = [layer for layer in chosen if chosen[layer][-1] != freely[layer][-1]]
    assert restricted == {"of-a-reindex-layer": [4, 6]}.get(name, [REINDEX]), "not the source, nor layers before it"


def without_candidates(right: Callable) -> Callable:
    return lambda *args, candidates, **options: right(*args, **options)


def candidates_of_own_queries(right: Callable) -> Callable:
    def chosen(*args, candidates, candidate_entries, valid_lens, seq_ids, **options):
        rows = {"valid_lens": valid_lens, "seq_ids": seq_ids}
        if candidates is not None:
            count = candidates.shape[1]
            candidates = select_candidates(*args, num_blocks=count, block_entries=candidate_entries, **rows)
        return right(*args, candidates=candidates, candidate_entries=candidate_entries, **rows, **options)

    return chosen


def without_the_newest(right: Callable) -> Callable:
    def best(*args, num_blocks, block_entries, **rows):
        dense = index_scores(*args, **rows)
        dense = torch.nn.functional.pad(dense, (0, -dense.shape[1] % block_entries), value=-torch.inf)
        scores = dense.unflatten(1, (-1, block_entries)).amax(-1)
        top = scores.topk(min(num_blocks, scores.shape[1]), dim=1)
        none = torch.iinfo(torch.int32).max
        ids = top.indices.int().masked_fill(top.values == -torch.inf, none).sort(dim=1).values
        return ids.masked_fill(ids == none, -1)

    return best


def of_the_token_before(right: Callable) -> Callable:
    return lambda *args, **options: right(*args, **options).roll(1, 0)


WRONG_CANDIDATES: dict[str, tuple[str, Callable]] = {
    "unrestricted": ("score_topk", without_candidates),
    "of-own-queries": ("score_topk", candidates_of_own_queries),
    "without-the-newest": ("select_candidates", without_the_newest),
    "of-the-token-before": ("select_candidates", of_the_token_before),
}


@pytest.mark.parametrize("sizes", ["prefill", "chunks"])
@pytest.mark.parametrize("name", WRONG_CANDIDATES)
def test_wrong_candidates_are_rejected(name: str, sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute, change = WRONG_CANDIDATES[name]
    monkeypatch.setattr(csa_indexer, attribute, change(getattr(csa_indexer, attribute)))
    got = run(make_blocks(FEW), make_caches(FEW), hidden_states(), SIZES[sizes])
    error = worst_error(got, definition_of_all(FEW)[0])
    assert error > 100 * BOUND, f"{name} goes unnoticed: error {error:.1e}"


def test_static_steps_choose_among_candidates_from_the_first_token_on() -> None:
    """Their width may exceed the candidates at any time, and where all entries are candidates nothing changes."""
    blocks, x, caches = make_blocks(FEW), hidden_states(), make_caches(FEW, max_blocks_per_seq=4)
    got: list[list[Tensor]] = [[] for _ in blocks]
    for part in x.split(1):
        for block, cache, kept in zip(blocks, caches, got, strict=True):
            cache.begin_step([0], [1], static=True)
            kept.append(block(part, cache))
            part = part + kept[-1]
        assert caches[FULL_1].candidates.shape == (1, 3)
    assert worst_error([torch.cat(parts) for parts in got], definition_of_all(FEW)[0]) < BOUND


def test_where_all_entries_are_candidates_none_are_chosen() -> None:
    blocks, caches, x = make_blocks(FEW), make_caches(FEW), hidden_states()
    run(blocks, caches, x[:24], [19, 5])
    assert all(cache.candidates is None for cache in caches)
    run(blocks, caches, x[24:25], [1])
    held = [layer for layer, cache in enumerate(caches) if cache.candidates is not None]
    assert held == [FULL_1], "beside the index keys"
    caches[FULL_1].begin_step([0], [1])
    assert caches[FULL_1].candidates is None, "candidates belong to their step"


def test_candidates_that_are_not_there_are_missed_before_the_layer_writes() -> None:
    """Their source was given indices and chose nothing."""
    blocks, caches, x = make_blocks(FEW), make_caches(FEW), hidden_states()
    run(blocks, caches, x[:24], [24])
    for cache in caches:
        cache.begin_step([0], [1])
    blocks[FULL_1](x[24:25], caches[FULL_1], indices=torch.zeros(1, 1, dtype=torch.int32))
    before = caches[REINDEX].window.rows.clone()
    message = "layer 4, among whose candidates layer 6 chooses, must choose first in this step"
    with pytest.raises(RuntimeError, match=f"^CSAIndexer: {message}$"):
        blocks[REINDEX](x[24:25], caches[REINDEX])
    assert torch.equal(caches[REINDEX].window.rows, before) and caches[REINDEX].selected is None


# --- sharing: what goes wrong ---------------------------------------------------------------------------------


def test_only_full_layers_hold_entries_and_only_choosers_keep_a_choice() -> None:
    caches = make_caches()
    held = [layer for layer, cache in enumerate(caches) if cache.kv_pool is not None]
    assert held == [1, 4] == [layer for layer, cache in enumerate(caches) if cache.index_pool is not None]
    assert all(cache.indexer_state is None for cache in caches)
    assert [cache.keep_selection for cache in caches] == [False, True, False, True, True, False, True, False]
    assert caches[REUSE].paged is caches[FULL_1].index_pool, "through the reindex layer"
    run(make_blocks(), caches, hidden_states(), [TOKENS])
    assert [cache.selected is not None for cache in caches] == [cache.keep_selection for cache in caches]
    caches[FULL].begin_step([0], [1])
    assert caches[FULL].selected is None, "a choice belongs to its step"


def step_all(caches, count: int = 3) -> None:
    for cache in caches:
        cache.begin_step([0], [count])


def reuse_before_its_source() -> None:
    caches = make_caches()
    step_all(caches)
    make_blocks()[REUSE](torch.randn(3, 64), caches[REUSE])


def reindex_with_another_layers_cache() -> None:
    caches = make_caches()
    step_all(caches)
    make_blocks()[REINDEX](torch.randn(3, 64), caches[3])


def handle(layer: int, **options) -> LayerCacheHandle:
    return LayerCacheHandle(CONFIG, layer, max_seqs=1, num_blocks=4, **{"kv_format": "bf16", **options})


def full_layer_without_latents() -> None:
    caches = make_caches()
    step_all(caches)
    make_blocks()[FULL].indexer(torch.randn(3, 32), torch.randn(3, 64), caches[FULL])


def reindex_layer_with_latents() -> None:
    caches = make_caches()
    step_all(caches)
    indexer = make_blocks()[REINDEX].indexer
    indexer(torch.randn(3, 32), torch.randn(3, 64), caches[REINDEX], latents=torch.randn(3, 64))


def step_in_another_order() -> None:
    caches = make_caches()
    caches[FULL].begin_step([0, 1], [2, 2])
    caches[FULL + 1].begin_step([1, 0], [2, 2])


def step_twice() -> None:
    caches = make_caches()
    step_all(caches)
    caches[FULL + 1].begin_step([0], [3])


MISUSE: dict[str, tuple[Callable, type[Exception], str]] = {
    "reuse-first": (reuse_before_its_source, RuntimeError, "layer 6, whose choice layer 7 attends to, must run first"),
    "step-before-its-source": (
        lambda: make_caches()[REINDEX].begin_step([0], [3]),
        ValueError,
        r"layer 4, which layer 6 reads, must begin the same step first, \[3\] tokens of \[0\], up to \[3\]; got",
    ),
    "step-in-another-order": (
        step_in_another_order,
        ValueError,
        r"layer 1, which layer 2 reads, must begin the same step .* got \(\(0, 1\), \(2, 2\)\), up to \[2, 2\]",
    ),
    "step-twice": (
        step_twice,
        ValueError,
        r"layer 1, which layer 2 reads, must begin the same step .*, up to \[6\]; got .*, up to \[3\]",
    ),
    "other-layers-cache": (
        reindex_with_another_layers_cache,
        ValueError,
        "cache must be that of layer 6, got that of 3",
    ),
    "no-source": (lambda: handle(REUSE), ValueError, "source of layer 7 must be the handle of layer 6, got none"),
    "wrong-source": (
        lambda: handle(REINDEX, source=handle(FULL)),
        ValueError,
        "source of layer 6 must be the handle of layer 4, got one of layer 1",
    ),
    "needless-source": (
        lambda: handle(FULL_1, source=handle(FULL)),
        ValueError,
        "layer 4 reads its own entries, source must be left out",
    ),
    "v4-kv-format": (
        lambda: handle(FULL, kv_format="fp8_ds_mla"),
        ValueError,
        r"kv_format must be 'bf16' or 'fp32' for DeepSeek-V4\.1, got 'fp8_ds_mla'",
    ),
    "write-through-a-reader": (
        lambda: (step_all(c := make_caches()), c[REINDEX].append(torch.randn(3, 64), "kv")),
        ValueError,
        "layer 6 reads the entries of layer 4",
    ),
    "compressor-of-a-reader": (
        lambda: Compressor(CONFIG, REINDEX, dim=64),
        ValueError,
        "layer 6 reads the entries of layer 4 and compresses nothing",
    ),
    "indexer-of-a-reuse-layer": (
        lambda: CSAIndexer(CONFIG, REUSE),
        ValueError,
        "layer 7 attends to what layer 6 chose",
    ),
    "no-latents": (
        full_layer_without_latents,
        ValueError,
        r"latents must be given in a full layer of V4\.1 \(layer 1\)",
    ),
    "needless-latents": (reindex_layer_with_latents, ValueError, r"latents must be left out here \(layer 6\)"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_told_in_one_line(name: str) -> None:
    call, error, message = MISUSE[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- one layer's choice in another layer, in V4 ---------------------------------------------------------------


def test_given_its_own_choice_a_v4_layer_is_the_same_bit_for_bit() -> None:
    config = tiny_config()
    block, x = make_block(config, CSA), torch.randn(150, 64)
    alone, given = exact(config, CSA, keep_selection=True), exact(config, CSA)
    for part in x.split([100, 50]):
        for cache in (alone, given):
            cache.begin_step([0], [len(part)])
        want = block(part, alone)
        assert torch.equal(block(part, given, indices=alone.selected), want)
    assert torch.equal(alone.index_pool.storage, given.index_pool.storage), "index keys are written all the same"
    assert given.selected is None and alone.selected.shape == (50, config.csa_top_k)


def test_other_indices_are_what_is_attended_to_and_a_later_step_may_choose_anew() -> None:
    config = tiny_config()
    block, x = make_block(config, CSA), torch.randn(121, 64)
    alone, given = exact(config, CSA, keep_selection=True), exact(config, CSA, keep_selection=True)
    for cache in (alone, given):
        cache.begin_step([0], [120])
    none = torch.full((120, 1), -1, dtype=torch.int32)
    want, got = block(x[:120], alone), block(x[:120], given, indices=none)
    assert torch.equal(got[:3], want[:3]), "they see no entry yet"
    assert ((got - want).norm(dim=-1)[4:] > 1e-3).all(), "without entries the output is another"
    assert given.selected is none
    for cache in (alone, given):
        cache.begin_step([0], [1])
        block(x[120:], cache)
    assert torch.equal(alone.selected, given.selected)


@pytest.mark.parametrize(
    ("layer", "indices", "error", "message"),
    [
        (CSA, torch.zeros(8, 2), TypeError, "indices must be int32, got float32"),
        (CSA, torch.zeros(7, 2, dtype=torch.int32), ValueError, r"indices must have shape \[8, n\], got \[7, 2\]"),
        (
            CSA,
            torch.tensor([[-1]] * 6 + [[1], [1]], dtype=torch.int32),
            ValueError,
            "indices must lie below what a token sees, 1 for token 6, got 1",
        ),
        (2, torch.zeros(8, 1, dtype=torch.int32), ValueError, "indices must be left out in layer 2, which is HCA"),
    ],
    ids=["dtype", "shape", "future", "hca"],
)
def test_wrong_indices_are_refused_before_anything_is_written(layer, indices, error, message) -> None:
    config = tiny_config()
    block, cache = make_block(config, layer), exact(config, layer)
    cache.begin_step([0], [8])
    with pytest.raises(error, match=f"AttentionSubBlock: {message}"):
        block(torch.randn(8, 64), cache, indices=indices)
    assert not cache.window.rows.any() and not cache.kv_pool.storage.any() and not cache.compressor_state.rows.any()
