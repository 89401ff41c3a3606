"""The RoPE table of a layer."""

import torch
from torch import Tensor

from lightning_indexer.config import DSV4Config
from lightning_indexer.rotary import rope_frequencies


def layer_frequencies(config: DSV4Config, layer: int) -> Tensor:
    """fp32 [rope_head_dim / 2]: one table for everything in a layer, queries, window, entries and indexer alike.

    Layers with a compressor use the compressed base and YaRN; SWA layers the plain base without.
    """
    return rope_frequencies(
        config.rope_head_dim,
        config.layer_rope_theta(layer),
        yarn_factor=config.layer_yarn_factor(layer),
        original_max_position=config.yarn_original_max_position,
        beta_fast=config.yarn_beta_fast,
        beta_slow=config.yarn_beta_slow,
    )


class LayerFrequencies:
    """`layer_frequencies` on each device that asked for them. The first time there waits for the device; none later."""

    def __init__(self, config: DSV4Config, layer: int) -> None:
        self._by_device = {torch.device("cpu"): layer_frequencies(config, layer)}

    def on(self, device: torch.device) -> Tensor:
        """fp32 [rope_head_dim / 2] on `device`."""
        if device not in self._by_device:
            self._by_device[device] = self._by_device[torch.device("cpu")].to(device)
        return self._by_device[device]
