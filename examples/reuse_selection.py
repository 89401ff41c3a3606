"""Let several CSA layers attend to what one of them chose, and see what that saves and what it changes.

    python examples/reuse_selection.py          # seconds on a CPU; nothing is downloaded

A layer's letter in PATTERN says whether it chooses (F, "full") or attends to what the last F layer chose (S, "shared").
Shared layers still write their index keys: any later step may follow another pattern.

The weights here are random; those that a choice depends on are near one another, to imitate layers that look for much
the same. What the overlap is in a trained model, and what a lower one costs there, only that model can tell.
"""

import torch
import torch.nn.functional as F

from lightning_indexer import AttentionSubBlock, DSV4Config, LayerCacheHandle
from lightning_indexer.checkpoint import expected_shapes

PATTERN = "FSSFSS"
TOKENS = 300
HOW_FAR_APART = 0.2  # the weights of two layers' choices, in units of what they have in common

CONFIG = DSV4Config(
    hidden_size=128,
    num_hidden_layers=len(PATTERN),
    num_heads=4,
    head_dim=64,
    rope_head_dim=32,
    query_compression_dim=64,
    o_groups=2,
    o_lora_rank=16,
    indexer_num_heads=8,
    indexer_head_dim=64,
    csa_top_k=16,
    sliding_window=16,
    compress_ratios=(4,) * len(PATTERN),
)


def main() -> None:
    torch.set_num_threads(1)  # tensors here are small
    blocks, x = make_blocks(), torch.randn(TOKENS, CONFIG.hidden_size)
    everywhere, anew = make_caches(), "F" * len(PATTERN)
    alone = run(blocks, everywhere, x, anew)
    chosen = [cache.selected for cache in everywhere]
    caches = make_caches()
    shared = run(blocks, caches, x, PATTERN)

    saved = PATTERN.count("S")
    print(f"{len(PATTERN)} CSA layers, {TOKENS} tokens, {CONFIG.csa_top_k} entries each, pattern {PATTERN}")
    print(f"selections: {len(PATTERN) - saved} instead of {len(PATTERN)} per step, {saved} saved\n")
    visible = (torch.arange(TOKENS) + 1) // CONFIG.layer_compress_ratio(0)
    has_choice = visible > CONFIG.csa_top_k
    chance = (CONFIG.csa_top_k / visible[has_choice]).mean()
    print(f"of what a layer would choose, on the same input, it gets (by chance: {chance:.0%}):")
    for layer, source in enumerate(sources(PATTERN)):
        if source != layer:
            share = overlap(chosen[layer], chosen[source])[has_choice].mean()
            print(f"  layer {layer} from layer {source}: {share:.0%}")
    print(f"output after {len(PATTERN)} layers, relative difference: {(shared - alone).norm() / alone.norm():.1%}\n")

    run(blocks, caches, torch.randn(1, CONFIG.hidden_size), anew)
    counts = {(cache.selected >= 0).sum().item() for cache in caches}
    assert counts == {CONFIG.csa_top_k}, "shared layers have written their keys"
    print(f"next token: all {len(PATTERN)} layers choose anew, among the keys that they have written all along")


def run(blocks: list[AttentionSubBlock], caches: list[LayerCacheHandle], x: torch.Tensor, pattern: str) -> torch.Tensor:
    """One step of all layers, with residuals in between; layer i attends to what layer `sources(pattern)[i]` chose."""
    for layer, source in enumerate(sources(pattern)):
        caches[layer].begin_step([0], [len(x)])
        given = None if source == layer else caches[source].selected
        x = x + blocks[layer](F.rms_norm(x, x.shape[-1:]), caches[layer], indices=given)
    return x


def sources(pattern: str) -> list[int]:
    """For each layer the last one up to it that chooses."""
    assert pattern[0] == "F", "the first layer has nothing to reuse"
    return [pattern.rindex("F", 0, layer + 1) for layer in range(len(pattern))]


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """For each token the share of the entries of `a` [T, k] that are in `b` too; -1 is none."""
    is_shared = (a.unsqueeze(2) == b.unsqueeze(1)).any(2) & (a >= 0)
    return is_shared.sum(1) / (a >= 0).sum(1).clamp_min(1)


def make_blocks() -> list[AttentionSubBlock]:
    common, blocks = random_weights(0), []
    for layer in range(len(PATTERN)):
        weights = random_weights(layer + 1)
        for name in weights:
            if name.startswith(("indexer.", "wq_a", "q_norm")):
                weights[name] = common[name] + HOW_FAR_APART * weights[name]
        blocks.append(AttentionSubBlock(CONFIG, layer))
        blocks[-1].load_weights(weights)
    return blocks


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = expected_shapes(CONFIG, 0)
    return {name: torch.randn(shape) * shape[-1] ** -0.5 + ("norm" in name) for name, shape in shapes.items()}


def make_caches() -> list[LayerCacheHandle]:
    options = {"max_seqs": 1, "num_blocks": 16, "kv_format": "bf16", "dtype": torch.float32, "keep_selection": True}
    caches = [LayerCacheHandle(CONFIG, layer, **options) for layer in range(len(PATTERN))]
    for cache in caches:
        cache.alloc(0)
    return caches


if __name__ == "__main__":
    main()
