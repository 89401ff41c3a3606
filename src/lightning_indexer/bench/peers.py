"""Other implementations of the same selection, run on the same operands in the same process."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_indexer import reference
from lightning_indexer.bench.cases import Case, Operands

PEERS = ("transformers",)
_EAGER_COPIES = 3  # score, scaled and weighted tensors [T, H, entries] that Hugging Face's arithmetic holds at once


def peer(name: str, case: Case, operands: Operands) -> Callable[[], Tensor]:
    """A function that computes the selection int64 [T, k] by the peer's own code.

    Raises:
        ModuleNotFoundError: the peer is not installed.
        MemoryError: the peer's intermediate tensors would not fit into the memory that is free.
    """
    if name != "transformers":
        raise ValueError(f"bench: peer must be one of {PEERS}, got {name!r}")
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4IndexerScorer

    needed = _EAGER_COPIES * case.num_heads * case.dense_bytes
    free = _available_bytes()
    if free is not None and needed > free:
        raise MemoryError(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    heads = case.num_heads
    scorer = DeepseekV4IndexerScorer(
        DeepseekV4Config(hidden_size=heads, index_n_heads=heads, index_head_dim=case.head_dim)
    )
    scorer.weights_proj.weight = nn.Parameter(torch.eye(heads))  # the weights are given, not projected
    scale = scorer.softmax_scale * scorer.weights_scaling
    shape = (case.num_seqs, case.tokens)
    keys = torch.stack([reference.read_entries(operands.view, s, case.entries) for s in range(case.num_seqs)])
    q = operands.q.unflatten(0, shape)
    weights = operands.weights.unflatten(0, shape) / scale  # undoes the scorer's own factors
    visible = operands.valid_lens.view(*shape, 1)

    @torch.no_grad()
    def select() -> Tensor:
        scores = scorer(q, keys, weights)
        hidden = torch.arange(case.entries).view(1, 1, -1) >= visible
        scores = scores.masked_fill(hidden, -torch.inf)
        top: Tensor = scores.topk(min(case.top_k, case.entries), dim=-1).indices
        return top.flatten(0, 1)

    return select


def _available_bytes() -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    except OSError:
        return None
    return sizes.get("MemAvailable")
