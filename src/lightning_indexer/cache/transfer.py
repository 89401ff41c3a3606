"""From the host to where a cache lies."""

from torch import Tensor


def write_from_host(target: Tensor, values: Tensor) -> None:
    """target[...] = values, for a tensor `values` on the host; a GPU is not waited for.

    The copy reads pinned memory, which torch lends again only when copies out of it have ended.
    """
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)
