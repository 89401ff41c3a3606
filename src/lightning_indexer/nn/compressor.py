"""Several tokens into one entry: the streaming compressor of CSA and HCA layers."""

from collections.abc import Mapping
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_indexer.cache.handle import LayerCacheHandle
from lightning_indexer.cache.ring import TokenRing
from lightning_indexer.cache.step import Step
from lightning_indexer.checks import check_tensor
from lightning_indexer.config import CSA_RATIO, DSV4Config
from lightning_indexer.nn.linear import LoadedModule
from lightning_indexer.nn.rope import LayerFrequencies
from lightning_indexer.ops.compress import compress_entries, pooled_entries
from lightning_indexer.precision import full_float32

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

    Args:
        config, layer: geometry; the layer is CSA or HCA.
        dim: of an entry: `config.head_dim`, or `config.indexer_head_dim` for the indexer's own compressor.
        rotate: apply the Hadamard rotation at the end (the indexer's compressor, where the config says so).
    """

    def __init__(self, config: DSV4Config, layer: int, *, dim: int, rotate: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.dim, self.eps, self.rotate = config.hidden_size, dim, config.rms_norm_eps, rotate
        self.compress_ratio = config.layer_compress_ratio(layer)
        if self.compress_ratio == 0:
            raise ValueError(f"Compressor: layer {layer} is SWA and compresses nothing")
        self.windows = 2 if self.compress_ratio == CSA_RATIO else 1
        self.frequencies = LayerFrequencies(config, layer)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take `wkv.weight`, `wgate.weight` [windows * dim, hidden], `ape` [ratio, windows * dim], `norm.weight` [dim].

        windows is 2 with ratio 4 and 1 otherwise.
        """
        self.check_weights(weights)
        for name in ("wkv", "wgate", "ape", "norm"):
            self.put(name, weights[name if name == "ape" else f"{name}.weight"])

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raise what `load_weights` would raise, and load nothing."""
        channels = self.windows * self.dim
        shapes = {
            "wkv.weight": (channels, self.hidden_size),
            "wgate.weight": (channels, self.hidden_size),
            "ape": (self.compress_ratio, channels),
            "norm.weight": (self.dim,),
        }
        for name, shape in shapes.items():
            if name not in weights:
                raise KeyError(f"Compressor: {name} is missing, got {sorted(weights)}")
            check_tensor("Compressor", name, weights[name], dtype=_FLOATS, shape=shape)

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
        return pooled_entries(*self._project(x), step, state, dtype=x.dtype, **self._options(x.device))

    @full_float32()
    def write(self, x: Tensor, cache: LayerCacheHandle, kind: Literal["index", "kv"]) -> None:
        """Feed the step's tokens and write the entries they complete into the index or the KV pool of their layer.

        Args:
            x: [T, hidden], the attention block's input.
            cache: with a step of T tokens in progress. The pool and the compressor's state are updated.
        """
        step, (view, slots) = cache.require_step(), cache.target(kind)
        state = cache.indexer_state if kind == "index" else cache.compressor_state
        assert state is not None, "whoever has the pool has the state"
        values, gates = self._project(x)
        compress_entries(values, gates, step, state, view, slots, dtype=x.dtype, **self._options(x.device))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gates, fp32 [T, windows * dim]."""
        return F.linear(x.float(), self.get("wkv").float()), F.linear(x.float(), self.get("wgate").float())

    def _options(self, device: torch.device) -> Options:
        return {
            "ape": self.get("ape"),
            "norm": self.get("norm"),
            "frequencies": self.frequencies.on(device),
            "eps": self.eps,
            "rotate": self.rotate,
        }
