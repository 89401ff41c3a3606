"""transformers' DeepSeek-V4 with this library's index cache and selection.

    from lightning_indexer.integrations.transformers import accelerate, restore

    accelerate(model)               # a DeepseekV4ForCausalLM; for a while: `with accelerate(model):`
    model.generate(...)             # as before
    restore(model)

What changes: in each CSA layer the index keys lie in a `PagedPool`, in the format asked for, and nowhere else; and
`score_topk` selects. transformers' own indexer keeps them in the model's dtype and makes scores
[batch, tokens, heads, entries] in fp32; here nothing grows with tokens x entries.

What does not: every weight and projection, RoPE, both compressors, the window and the compressed KV entries, HCA and
SWA layers, attention itself, which transformers computes densely under a mask of [batch, 1, tokens, entries], and all
of `generate()`. There is no KV format to choose, since the model attends to its own entries. A model whose index keys
are stored without loss gives the same outputs, bit for bit, wherever the same entries are selected; only a tie within
the rounding of a score can be decided otherwise.

It is done with torch's module hooks; no code is replaced. The hook before the indexer makes the layer's cache a paged
one, to which transformers' own code then hands the new keys. Its scorer, left with no keys, scores nothing; the hook
after it takes the queries and selects, and the hook after the indexer returns what was selected.
"""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4CSACache,
    DeepseekV4Indexer,
    DeepseekV4IndexerScorer,
)

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.checks import IMPLS, check_choice, check_tensor
from lightning_indexer.config import CSA_RATIO, DSV4Config
from lightning_indexer.formats import INDEX_FORMATS
from lightning_indexer.integrations.transformers_cache import IndexOptions, PagedCSACache

_HANDLES = "_lightning_indexer_hooks"  # attribute of an accelerated model


def accelerate(
    model: nn.Module,
    *,
    index_format: str = "mxfp4",
    entries_per_block: int = 64,
    max_tokens: int | None = None,
    impl: str = "auto",
) -> AbstractContextManager[object]:
    """Make `model` keep its index keys in paged blocks and select with `score_topk`, until `restore(model)`.

    Works with `generate()` (greedy, sampling, beams, chunked prefill, caches that are passed on or copied) and with
    `forward()`, with or without a cache. Prompts of a batch must have one length, or be padded on the right in a
    `forward()`: the model itself pools padding on the left into its entries, which is refused here.

    Args:
        model: a `DeepseekV4ForCausalLM` of any dtype, on any device that `score_topk` serves.
        index_format: "mxfp4", "nvfp4" or "fp8" quantise keys and queries, both rotated by a Hadamard matrix first as
            the official model does; "bf16" and "fp32" store keys as they are in a model of that dtype, without loss.
        entries_per_block: of the index cache, a multiple of 16 from 16 to 256.
        max_tokens: of one sequence, prompt included: the cache gets this room at once and refuses more. Default: it
            grows by doubling.
        impl: of `score_topk` and `append_entries`. "fp32" on a GPU needs "reference".
    Returns:
        A context that restores the model when it is left; it need not be used.
    Raises:
        TypeError: not a `DeepseekV4ForCausalLM`.
        ValueError: accelerated already, or sizes that the library does not serve. The model was not changed.
    """
    if not isinstance(model, DeepseekV4ForCausalLM):
        raise TypeError(f"accelerate: model must be a DeepseekV4ForCausalLM, got {type(model).__name__}")
    if hasattr(model, _HANDLES):
        raise ValueError("accelerate: model must not be accelerated already, got one that is (call restore first)")
    check_choice("accelerate", "index_format", index_format, INDEX_FORMATS)
    check_choice("accelerate", "impl", impl, IMPLS)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"accelerate: max_tokens must be positive, got {max_tokens}")
    config = DSV4Config.from_json(model.config.to_dict())
    indexers = _indexers(model)
    if not indexers:
        raise ValueError(f"accelerate: model must have a CSA layer, got ratios {config.compress_ratios}")
    schema = CacheSchema(index_format, entries_per_block, head_dim=config.indexer_head_dim)
    schema.check_index()
    options = IndexOptions(schema, None if max_tokens is None else max_tokens // CSA_RATIO, impl)
    handles = [model.model.register_forward_pre_hook(_refuse_left_padding, with_kwargs=True)]
    for indexer in indexers.values():
        handles += _IndexerHooks(model.config, options).register(indexer)
    setattr(model, _HANDLES, handles)
    undo = ExitStack()
    undo.callback(restore, model)
    return undo


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the model is what it was before. Caches that it has filled meanwhile serve it no more."""
    handles: list[RemovableHandle] | None = getattr(model, _HANDLES, None)
    if handles is None:
        raise ValueError("restore: model must be accelerated, got one that is not")
    for handle in handles:
        handle.remove()
    delattr(model, _HANDLES)


@dataclass(frozen=True)
class Agreement:
    """What an accelerated model selects and predicts, against the model alone, over the same tokens.

    Args:
        entries: by CSA layer, the share of the model's entries that are selected here too: mean over the queries that
            see more than `index_topk` entries and have to leave some out, nan if there are none. From the second CSA
            layer on it includes what earlier layers changed.
        tokens: share of positions at which the most likely next token is the same.
    """

    entries: dict[int, float]
    tokens: float


@torch.no_grad()
def agreement(model: nn.Module, input_ids: Tensor, **options: Any) -> Agreement:
    """Run `model` alone and accelerated over given tokens and compare.

    Args:
        model: a `DeepseekV4ForCausalLM`, not accelerated; it is not when this returns either.
        input_ids: int64 [batch, tokens], for example prompts with the answers that the model alone generated.
        options: for `accelerate`.
    """
    check_tensor("agreement", "input_ids", input_ids, dtype=torch.int64, shape=("batch", "tokens"))
    with accelerate(model, **options):  # first, so that its errors come before any work
        selected, predicted = _choices(model, input_ids)
    expected_sets, expected = _choices(model, input_ids)
    entries = {layer: _shared(selected[layer], own) for layer, own in expected_sets.items()}
    return Agreement(entries, float((predicted == expected).float().mean()))


class _IndexerHooks:
    """The hooks of one indexer, and what they hand one another within a forward pass."""

    def __init__(self, config: Any, options: IndexOptions) -> None:
        self.config, self.options = config, options
        self.cache: PagedCSACache | None = None
        self.chosen: Tensor | None = None

    def register(self, indexer: DeepseekV4Indexer) -> list[RemovableHandle]:
        return [
            indexer.register_forward_pre_hook(self.page_keys),
            indexer.scorer.register_forward_hook(self.select),
            indexer.register_forward_hook(self.hand_over),
        ]

    def page_keys(self, _indexer: DeepseekV4Indexer, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, q_residual, position_ids, past_key_values, layer_idx = args
        if past_key_values is None:  # one that lives as long as this pass
            past_key_values = SimpleNamespace(layers={layer_idx: DeepseekV4CSACache(self.config)})
        self.cache = PagedCSACache.adopt(past_key_values.layers[layer_idx], self.options)
        self.cache.position_ids = position_ids
        return hidden_states, q_residual, position_ids, past_key_values, layer_idx

    def select(self, scorer: DeepseekV4IndexerScorer, args: tuple[Tensor, ...], _scores: Tensor) -> None:
        q, _, hidden_states = args
        assert self.cache is not None, "the indexer, which runs the scorer, was hooked"
        # projected a second time, because the scorer keeps its own to itself
        weights = scorer.weights_proj(hidden_states).float() * (scorer.softmax_scale * scorer.weights_scaling)
        self.chosen = self.cache.select(q, weights, self.config.index_topk)

    def hand_over(self, _indexer: DeepseekV4Indexer, _args: tuple[Any, ...], _indices: Tensor) -> Tensor:
        assert self.cache is not None and self.chosen is not None, "set by the hooks before"
        chosen = self.chosen
        self.cache.position_ids = self.cache = self.chosen = None
        return chosen


def _indexers(model: Any) -> dict[int, DeepseekV4Indexer]:
    layers = enumerate(model.model.layers)
    return {i: m.self_attn.compressor.indexer for i, m in layers if hasattr(m.self_attn.compressor, "indexer")}


def _refuse_left_padding(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    padded = (mask[:, 1:] > mask[:, :-1]).any(1)
    if padded.any():
        raise ValueError(
            f"accelerate: attention_mask must not hide tokens to the left of others, got such rows "
            f"{padded.nonzero().flatten().tolist()} (the model itself pools left padding into its compressed entries; "
            "batch prompts of one length)"
        )


def _choices(model: Any, input_ids: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """By CSA layer the selected indices [B, S, k], and the most likely next tokens [B, S]."""
    chosen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _module, _args, indices: chosen.__setitem__(layer, indices)

    handles = [indexer.register_forward_hook(keep(layer)) for layer, indexer in _indexers(model).items()]
    try:
        logits = model(input_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return chosen, logits.argmax(-1)


def _shared(selected: Tensor, own: Tensor) -> float:
    """Mean share of `own` [B, S, k] in `selected`, over the queries that see more than k entries.

    All their places are taken, and `selected` is ascending.
    """
    top_k = own.shape[-1]
    rows = (torch.arange(own.shape[1], device=own.device) + 1) // CSA_RATIO > top_k
    own, selected = own[:, rows], selected[:, rows]
    places = torch.searchsorted(selected, own).clamp_max(top_k - 1)
    return float((selected.gather(-1, places) == own).float().mean())
