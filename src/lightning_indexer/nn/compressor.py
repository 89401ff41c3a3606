"""Several tokens into one entry: the streaming compressor of CSA and HCA layers, and of V4.1's full layers."""

from collections.abc import Mapping
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_indexer.cache.handle import LayerCacheHandle
from lightning_indexer.cache.ring import TokenRing
from lightning_indexer.cache.step import Step
from lightning_indexer.checks import check_tensor
from lightning_indexer.config import CSA_RATIO, V41_RATIOS, DSV4Config
from lightning_indexer.nn.linear import LoadedModule
from lightning_indexer.nn.rope import LayerFrequencies
from lightning_indexer.ops.compress import compress_entries, pooled_entries, pooled_latents
from lightning_indexer.precision import full_float32
from lightning_indexer.rotary import apply_rope

_FLOATS = (torch.bfloat16, torch.float32, torch.float16)


class Options(TypedDict):
    """Arguments of `compress_entries` and `pooled_entries` that belong to a compressor."""

    ape: Tensor
    norm: Tensor
    frequencies: Tensor
    eps: float
    rotate: bool


class Compressor(LoadedModule):
    """entry[w] = RoPE(RMSNorm(sum_i softmax_i(gate_i + ape[i % ratio]) * value_i)), channel by channel.

    The sum runs over the ratio tokens of window w; with ratio 4 also over those of window w - 1, through the first half
    of the channels (absent for w = 0). RoPE is at the window's first token. Values, gates and sums are fp32; the pooled
    vector, its norm, its rotations are each rounded to the dtype of the hidden states, as the official code does.

    V4.1 has no `ape`. At ratio 2 it pools two tokens that way, at ratio 1 an entry is one token's value.

    Args:
        config, layer: geometry; the layer is CSA or HCA, in V4.1 a full one.
        dim: of an entry: `config.head_dim`, or `config.indexer_head_dim` for the indexer's own compressor.
        rotate: apply the Hadamard rotation at the end (the indexer's compressor, where the config says so).
    """

    def __init__(self, config: DSV4Config, layer: int, *, dim: int, rotate: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.dim, self.eps, self.rotate = config.hidden_size, dim, config.rms_norm_eps, rotate
        self.compress_ratio = config.layer_compress_ratio(layer)
        if self.compress_ratio == 0:
            raise ValueError(f"Compressor: layer {layer} is SWA and compresses nothing")
        if config.layer_role(layer) in ("reindex", "reuse"):
            raise ValueError(
                f"Compressor: layer {layer} reads the entries of layer {config.layer_kv_source(layer)} "
                "and compresses nothing"
            )
        self.is_v41 = self.compress_ratio in V41_RATIOS
        self.windows = 2 if self.compress_ratio == CSA_RATIO else 1
        self.frequencies = LayerFrequencies(config, layer)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take `wkv.weight`, `wgate.weight` [windows * dim, hidden], `ape` [ratio, windows * dim], `norm.weight` [dim].

        windows is 2 with ratio 4 and 1 otherwise. V4.1 has no `ape`, and at ratio 1 no `wgate.weight`.
        """
        self.check_weights(weights)
        for name in self._shapes():
            self.put(name.removesuffix(".weight"), weights[name])

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raise what `load_weights` would raise, and load nothing."""
        for name, shape in self._shapes().items():
            if name not in weights:
                raise KeyError(f"Compressor: {name} is missing, got {sorted(weights)}")
            check_tensor("Compressor", name, weights[name], dtype=_FLOATS, shape=shape)

    def _check_keepable(self, dtype: torch.dtype) -> None:
        """Raise unless the projections are loaded."""
        self.get("wkv")

    def _keep_own(self, dtype: torch.dtype) -> None:
        """Hold the projections in fp32, which they are multiplied in whatever x is."""
        for name in ("wkv", "wgate"):
            if name in self._buffers:  # V4.1 has no gate at ratio 1
                self.put(name, self.get(name).float())

    @full_float32()
    def forward(self, x: Tensor, step: Step, state: TokenRing) -> Tensor:
        """Feed the step's tokens and get the entries they complete.

        Args:
            x: [T, hidden], the attention block's input.
            step: where the tokens stand (`LayerCacheHandle.begin_step`).
            state: values and gates of earlier tokens; updated.
        Returns:
            [E, dim] in x's dtype, in the order of `step.entry_rows`; where that is -1, anything.
        """
        if self.is_v41:
            return self._rotate_latents(self.latents(x, step, state), step)
        return pooled_entries(*self._project(x), step, state, dtype=x.dtype, **self._options(x.device))

    @full_float32()
    def latents(self, x: Tensor, step: Step, state: TokenRing) -> Tensor:
        """`forward` without RoPE: what V4.1's index keys are made from, as its entries are."""
        if not self.is_v41:
            raise ValueError(f"Compressor: latents are of V4.1, got a compressor of ratio {self.compress_ratio}")
        no_ape = torch.zeros(self.compress_ratio, self.dim, device=x.device)
        norm = self.get("norm")
        return pooled_latents(*self._project(x), step, state, ape=no_ape, norm=norm, eps=self.eps, dtype=x.dtype)

    @full_float32()
    def write(self, x: Tensor, cache: LayerCacheHandle, kind: Literal["index", "kv"]) -> Tensor | None:
        """Feed the step's tokens and write the entries they complete into the index or the KV pool of their layer.

        Args:
            x: [T, hidden], the attention block's input.
            cache: with a step of T tokens in progress. The pool and the compressor's state are updated.
            kind: in V4.1 "kv"; `CSAIndexer` writes the index keys.
        Returns:
            In V4.1 the latents of the entries, for the indexer; else None.
        """
        step, (view, slots) = cache.require_step(), cache.target(kind)
        if self.is_v41:
            assert kind == "kv" and cache.compressor_state is not None, "a full layer has both pools and one state"
            latents = self.latents(x, step, cache.compressor_state)
            cache.append(self._rotate_latents(latents, step), "kv")
            return latents
        state = cache.indexer_state if kind == "index" else cache.compressor_state
        assert state is not None, "whoever has the pool has the state"
        values, gates = self._project(x)
        compress_entries(values, gates, step, state, view, slots, dtype=x.dtype, **self._options(x.device))
        return None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the checkpoint's tensors, by their names there."""
        channels = self.windows * self.dim
        shapes: dict[str, tuple[int, ...]] = {"wkv.weight": (channels, self.hidden_size)}
        if self.compress_ratio != 1:
            shapes["wgate.weight"] = (channels, self.hidden_size)
        if not self.is_v41:
            shapes["ape"] = (self.compress_ratio, channels)
        return {**shapes, "norm.weight": (self.dim,)}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gates, fp32 [T, windows * dim]."""
        values = F.linear(x.float(), self.get("wkv").float())
        if self.compress_ratio == 1:
            return values, torch.zeros_like(values)  # the softmax over one token is 1, whatever its gate
        return values, F.linear(x.float(), self.get("wgate").float())

    def _rotate_latents(self, latents: Tensor, step: Step) -> Tensor:
        return apply_rope(latents, step.entry_indices * self.compress_ratio, self.frequencies.on(latents.device))

    def _options(self, device: torch.device) -> Options:
        return {
            "ape": self.get("ape"),
            "norm": self.get("norm"),
            "frequencies": self.frequencies.on(device),
            "eps": self.eps,
            "rotate": self.rotate,
        }
