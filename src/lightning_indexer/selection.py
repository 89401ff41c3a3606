"""The order in which entries are chosen, as one integer per candidate.

A candidate's 64-bit key is (order-preserving score bits, 2^32 - 1 - index): a larger key is a better candidate, equal
scores go to the smaller index, and no two keys are equal, so any exact top-k over keys gives the same answer.
From best to worst: +inf, numbers (+0 equals -0), -inf, NaN, EMPTY.
"""

import torch
from torch import Tensor

EMPTY = torch.iinfo(torch.int64).min
_INDEX_MASK = 0xFFFFFFFF
_POSITIVE_INF = 0x7F800000
_NEGATIVE_INF = -0x7F800001  # order-preserving image of the bits 0xFF800000
_NAN = _NEGATIVE_INF - 1
_FORCED = _POSITIVE_INF + 1


def candidate_keys(scores: Tensor, indices: Tensor) -> Tensor:
    """int64 keys of fp32 `scores` and the entries' `indices` (0 .. 2^32 - 1), both [..., n]."""
    scores = scores + 0.0  # -0 + 0 is +0
    keys = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
    return fill_keys(scores.view(torch.int32), indices, torch.empty_like(scores, dtype=torch.int32), keys)


def fill_keys(bits: Tensor, indices: Tensor, rank: Tensor, keys: Tensor) -> Tensor:
    """`candidate_keys` into int64 `keys`, from the bits of scores without -0, with an int32 buffer for the ranks."""
    torch.bitwise_right_shift(bits, 31, out=rank)
    rank.bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # as `_flip_negative`
    rank.clamp_min_(_NAN).masked_fill_(rank > _POSITIVE_INF, _NAN)
    return keys.copy_(rank).bitwise_left_shift_(32).add_(_INDEX_MASK - indices)


def block_keys(scores: Tensor, lens: Tensor, first: int, block_entries: int) -> Tensor:
    """int64 [Q, n] keys of blocks of entries by their largest score; EMPTY where that is -inf (as NaN counts).

    The block of a row's last entry goes before all others.

    Args:
        scores: fp32 [Q, n * block_entries] from entry `first` on, overwritten.
        lens: [Q, 1] entries of each row; what `scores` holds behind them is ignored.
    """
    width = scores.shape[1]
    entries = torch.arange(first, first + width, device=scores.device)
    scores.masked_fill_(entries >= lens, -torch.inf).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    maxima = scores.unflatten(1, (-1, block_entries)).amax(-1)
    ids = torch.arange(first // block_entries, (first + width) // block_entries, device=scores.device)
    keys = candidate_keys(maxima, ids).masked_fill_(maxima == -torch.inf, EMPTY)
    return torch.where(ids == (lens - 1) // block_entries, (_FORCED << 32) + _INDEX_MASK - ids, keys)


def key_indices(keys: Tensor) -> Tensor:
    """int32 entry indices of keys, -1 for EMPTY."""
    return torch.where(keys == EMPTY, -1, _INDEX_MASK - (keys & _INDEX_MASK)).to(torch.int32)


def key_scores(keys: Tensor) -> Tensor:
    """fp32 scores of keys, -inf for EMPTY and for NaN."""
    rank = (keys >> 32).clamp_min_(_NEGATIVE_INF).to(torch.int32)
    return _flip_negative(rank).view(torch.float32)


def order_by_index(keys: Tensor) -> Tensor:
    """Sort keys [T, k] by ascending entry index, EMPTY last."""
    return keys.gather(1, (keys & _INDEX_MASK).argsort(dim=1, descending=True))  # EMPTY's index bits are all zero


def _flip_negative(bits: Tensor) -> Tensor:
    """Map fp32 bits (int32) to integers of the same order, or back: negative numbers flip all bits but the sign."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
