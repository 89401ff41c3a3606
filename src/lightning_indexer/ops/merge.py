"""Merge the selections of several shards of one sequence (context parallel)."""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_indexer.checks import check_tensor
from lightning_indexer.selection import EMPTY, candidate_keys, key_indices, key_scores


@torch.no_grad()
def merge_topk(
    indices: Tensor, scores: Tensor, *, top_k: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The `top_k` best of all candidates, by the rules of `score_topk`: ties to the smaller index.

    Every global winner is a winner on its own shard, so merging the shards' top-k is exact and equals the selection on
    the unsharded sequence bit for bit. (One case is lost: `score_topk` reports NaN scores as -inf, so where a sequence
    has both, their order among each other is by index alone.)

    Args:
        indices: int32 [T, C] global entry indices, -1 for none. Without a group, C may hold several shards' candidates
            side by side. With a group, C is the same on all ranks.
        scores: fp32 [T, C], as `score_topk(..., return_scores=True)` gives them.
        top_k: at least 1; may exceed the number of candidates.
        group: a `torch.distributed` process group; each rank passes its own candidates and gets the same result.
            8 bytes are exchanged per candidate.
    Returns:
        indices: int32 [T, top_k], ordered by score (descending, ties by index), -1 where there are fewer.
        scores: fp32 [T, top_k], -inf there.
    """
    op = "merge_topk"
    check_tensor(op, "indices", indices, dtype=torch.int32, shape=("T", "C"))
    check_tensor(op, "scores", scores, dtype=torch.float32, shape=tuple(indices.shape), device=indices.device)
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"{op}: top_k must be an int of at least 1, got {top_k!r}")
    keys = torch.where(indices < 0, EMPTY, candidate_keys(scores, indices.long()))
    if group is not None:
        ranks, (num_tokens, width) = dist.get_world_size(group), keys.shape
        gathered = keys.new_empty(ranks * num_tokens, width)
        dist.all_gather_into_tensor(gathered, keys.contiguous(), group=group)
        keys = gathered.view(ranks, num_tokens, width).transpose(0, 1).flatten(1)  # [T, ranks * C]
    if keys.shape[1] < top_k:
        keys = torch.nn.functional.pad(keys, (0, top_k - keys.shape[1]), value=EMPTY)
    best = keys.topk(top_k, dim=1).values
    return key_indices(best), key_scores(best)
