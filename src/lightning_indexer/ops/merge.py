"""Merge the selections of several shards of one sequence (context parallel)."""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_indexer.checks import check_tensor, choose_impl
from lightning_indexer.selection import EMPTY, candidate_keys, key_indices, key_scores
from lightning_indexer.tracing import is_traced

# Newer torch has the first and warns about the second.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def merge_topk(
    indices: Tensor,
    scores: Tensor,
    *,
    top_k: int,
    group: dist.ProcessGroup | None = None,
    out: Tensor | None = None,
    scores_out: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The `top_k` best of all candidates, by the rules of `score_topk`: ties to the smaller index.

    Every global winner is a winner on its own shard, so merging the shards' top-k is exact and equals the selection on
    the unsharded sequence bit for bit. One case is lost: `score_topk` reports NaN scores as -inf, so where fewer than
    `top_k` scores of a sequence are above -inf, the NaN and -inf among the rest go by index alone.

    Nothing is read back from the device. A call can be captured in a CUDA graph with its exchange (NCCL; call it once
    before, so that the group's communicator exists).

    Args:
        indices: int32 [T, C] global entry indices, in any order, none twice, -1 for none. `InterleavedShard` and
            `ContiguousShard` make them from a rank's own. Without a group, C may hold several shards' candidates side
            by side. With a group, T and C are the same on all ranks: a rank that holds fewer entries, or none, pads
            with -1.
        scores: fp32 [T, C], as `score_topk(..., return_scores=True)` gives them.
        top_k: at least 1 (with "cuda" at most 4096); may exceed the number of candidates.
        group: a `torch.distributed` process group; each rank passes its own candidates and gets the same result.
            8 bytes are exchanged per candidate. None: no exchange (not the default group).
        out: int32 [T, top_k] and scores_out: fp32 [T, top_k], written in place; new tensors by default.
        impl: "auto", "cpu", "cuda" (two kernels and the exchange) or "reference" (torch operators, on any device).
    Returns:
        indices: int32 [T, top_k], ordered by score (descending, ties by index), -1 where there are fewer.
        scores: fp32 [T, top_k], -inf there.
    """
    op = "merge_topk"
    check_tensor(op, "indices", indices, dtype=torch.int32, shape=("T", "C"))
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"{op}: top_k must be an int of at least 1, got {top_k!r}")
    shape, device = (indices.shape[0], top_k), indices.device
    for name, tensor, dtype in (("out", out, torch.int32), ("scores_out", scores_out, torch.float32)):
        if tensor is not None:
            check_tensor(op, name, tensor, dtype=dtype, shape=shape, device=device)
    out = torch.empty(shape, dtype=torch.int32, device=device) if out is None else out
    scores_out = torch.empty(shape, dtype=torch.float32, device=device) if scores_out is None else scores_out
    if group is None and is_traced():
        torch.ops.lightning_indexer.merge_topk(indices, scores, out, scores_out, impl)
    else:
        eager_merge_topk(indices, scores, out, scores_out, impl, group)
    return out, scores_out


@torch.no_grad()
def eager_merge_topk(
    indices: Tensor,
    scores: Tensor,
    out: Tensor,
    scores_out: Tensor,
    impl: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> None:
    """`merge_topk` into given memory, unseen by torch's dispatcher."""
    op = "merge_topk"
    check_tensor(op, "indices", indices, dtype=torch.int32, shape=("T", "C"))
    check_tensor(op, "scores", scores, dtype=torch.float32, shape=tuple(indices.shape), device=indices.device)
    check_tensor(op, "out", out, dtype=torch.int32, shape=(len(indices), "top_k"), device=indices.device)
    check_tensor(op, "scores_out", scores_out, dtype=torch.float32, shape=tuple(out.shape), device=indices.device)
    impl = choose_impl(op, impl, indices.device, has_cuda=True)
    if group is not None and dist.get_world_size(group) < 1:
        raise ValueError(f"{op}: group must contain this process, got one that does not")
    if impl == "cuda":
        from lightning_indexer.cuda import candidates

        candidates.check_top_k(op, out.shape[1])
        keys = _exchange(candidates.pack_candidates(indices, scores), group)
        candidates.merge_candidates(keys, out, scores_out)
    else:
        keys = torch.where(indices < 0, EMPTY, candidate_keys(scores, indices.long()))
        _merge(_exchange(keys, group), out, scores_out)


def _exchange(keys: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' keys [T, C], one after the other: [ranks, T, C]."""
    keys = keys.contiguous()
    if group is None:
        return keys.unsqueeze(0)
    ranks, (num_tokens, width) = dist.get_world_size(group), keys.shape
    gathered = keys.new_empty(ranks * num_tokens, width)
    all_gather_single(gathered, keys, group=group)
    return gathered.view(ranks, num_tokens, width)


def _merge(keys: Tensor, out: Tensor, scores_out: Tensor) -> None:
    keys, top_k = keys.transpose(0, 1).flatten(1), out.shape[1]
    if keys.shape[1] < top_k:
        keys = torch.nn.functional.pad(keys, (0, top_k - keys.shape[1]), value=EMPTY)
    best = keys.topk(top_k, dim=1).values
    out.copy_(key_indices(best))
    scores_out.copy_(key_scores(best))
