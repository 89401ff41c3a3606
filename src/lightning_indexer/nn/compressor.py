"""Several tokens into one entry: the streaming compressor of CSA and HCA layers."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_indexer.cache.handle import TokenRing
from lightning_indexer.cache.step import Step
from lightning_indexer.checks import check_tensor
from lightning_indexer.config import CSA_RATIO, DSV4Config
from lightning_indexer.nn.linear import LoadedModule
from lightning_indexer.nn.norm import rms_norm
from lightning_indexer.nn.rope import LayerFrequencies
from lightning_indexer.precision import full_float32
from lightning_indexer.rotary import apply_rope, hadamard

_FLOATS = (torch.bfloat16, torch.float32, torch.float16)


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
            [E, dim] in x's dtype, in the order of `step.entry_rows`; zeros where that is -1.
        """
        values = F.linear(x.float(), self.get("wkv").float())  # [T, windows * dim]
        gates = F.linear(x.float(), self.get("wgate").float())
        gates += self.get("ape").float()[step.positions % self.compress_ratio]
        chunk = torch.stack((values, gates), dim=1)
        pooled = self._pool(state.with_chunk(step, chunk), step, state)
        state.update(step, chunk)
        entries = rms_norm(pooled.to(x.dtype), self.get("norm"), self.eps)
        entries = apply_rope(entries, step.entry_indices * self.compress_ratio, self.frequencies.on(x.device))
        return hadamard(entries) if self.rotate else entries

    def _pool(self, tokens: Tensor, step: Step, state: TokenRing) -> Tensor:
        """fp32 [E, dim] from `tokens` [n, 2, windows * dim] (values, gates)."""
        ratio = self.compress_ratio
        offsets = torch.arange(ratio - self.windows * ratio, ratio, device=tokens.device)
        positions = step.entry_indices.unsqueeze(1) * ratio + offsets  # [E, windows * ratio]
        rows = state.find(step, step.entry_rows.clamp_min(0), positions)
        parts = []
        for window in range(self.windows):  # the window before through the first channels, its own through the last
            channels = slice(window * self.dim, (window + 1) * self.dim)
            parts.append(tokens[:, :, channels][rows[:, window * ratio : (window + 1) * ratio]])
        values, gates = torch.cat(parts, dim=1).unbind(2)  # [E, windows * ratio, dim]
        absent = (positions < 0).unsqueeze(-1)
        weights = gates.masked_fill(absent, torch.finfo(gates.dtype).min).softmax(dim=1)  # -inf alone would give NaN
        return (weights * values.masked_fill(absent, 0.0)).sum(1)
