"""Argument checks shared by the public ops. Every message names the op, the tensor, what was expected and what came."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

IMPLS = ("auto", "reference", "cpu", "cuda")


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    *,
    dtype: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | str],
    device: torch.device | None = None,
) -> None:
    """Raise unless `tensor` has one of the dtypes, the shape (ints must match, strings name a free size) and device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype is not dtype:  # in most calls it is; these checks are a good part of what a call costs the host
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if tensor.dtype not in dtypes:
            wanted = " or ".join(_dtype_name(d) for d in dtypes)
            remedy = f" (use {name}.to(torch.{_dtype_name(dtypes[0])}))" if len(dtypes) == 1 else ""
            raise TypeError(f"{op}: {name} must be {wanted}, got {_dtype_name(tensor.dtype)}{remedy}")
    got = tensor.shape
    if got != shape and not _fits(got, shape):
        wanted = "[" + ", ".join(str(s) for s in shape) + "]"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {list(got)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {tensor.device}")


def check_range(op: str, name: str, tensor: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless every value lies in low..high (inclusive). Reads the tensor: a sync on a GPU."""
    if tensor.numel() == 0:
        return
    smallest, largest = (int(v) for v in torch.aminmax(tensor))
    if smallest < low or largest > high:
        worst = smallest if smallest < low else largest
        where = (tensor == worst).nonzero()[0].tolist()
        raise ValueError(f"{op}: {name} must lie in {low}..{high}, got {worst} at {where}")


def check_choice(op: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {tuple(choices)}, got {value!r}")


def choose_impl(op: str, impl: str, device: torch.device, *, has_cuda: bool = False) -> str:
    """Resolve "auto" to what serves `device`, and refuse what does not; `has_cuda` says whether the op has a kernel."""
    kind = _device_type(device)
    served = ("cpu", "cuda") if has_cuda else ("cpu",)
    if kind in served and impl in ("auto", kind):
        return kind
    check_choice(op, "impl", impl, IMPLS)
    if impl == "reference":
        return impl
    names = " or ".join(f"{name!r} ({name.upper()} tensors)" for name in served)
    raise NotImplementedError(
        f"{op}: impl={impl!r} does not serve tensors on {device}; there are {names}, 'auto', which takes the one "
        "that fits, and 'reference', which is slow and runs anywhere"
    )


def _fits(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    if len(shape) != len(wanted):
        return False
    for got, want in zip(shape, wanted):  # noqa: B905, SIM110 (this runs in every call: `strict` and `all` cost more)
        if got != want and not isinstance(want, str):
            return False
    return True


@functools.cache
def _device_type(device: torch.device) -> str:
    """`device.type`, which torch makes anew each time, at three times the cost of this."""
    return device.type


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
