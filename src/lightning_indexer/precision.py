"""Results in full fp32, whatever the caller has set."""

import contextlib
import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

# torch.backends.<backend>.matmul.fp32_precision, read at a fifth of the cost; torch's own modules do just this
_get, _set = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
_BACKENDS = ("mkldnn", "cuda")  # whose fp32 matmul the library's torch code may run on
_FULL = ("none", "ieee")  # settings that round nothing

_lock = threading.Lock()
_inside = 0  # how many bodies run now, over all threads: the settings are the process's
_restore: Callable[[], None] | None = None  # puts back what the first of them changed


class full_float32:  # in lower case like torch.no_grad, which it stands beside
    """Keep a reduced-precision matmul setting (TF32, bf16), or autocast, of the caller from reaching the body.

    A context manager and a decorator, for CPU and CUDA alike. Where nothing is set it costs a few microseconds.
    """

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def in_full_float32(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with full_float32():
                return function(*args, **kwargs)

        return in_full_float32

    def __enter__(self) -> None:
        global _inside, _restore
        with _lock:
            if _inside == 0:
                _restore = _forbid_rounding()
            _inside += 1
        # autocast is the thread's own; torch.autocast would do this too, at ten times the cost where none is on
        self._autocast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        for device in self._autocast:
            torch.set_autocast_enabled(device, False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _inside, _restore
        for device in self._autocast:
            torch.set_autocast_enabled(device, True)
        with _lock:
            _inside -= 1
            if _inside == 0 and _restore is not None:
                _restore()
                _restore = None


def _forbid_rounding() -> Callable[[], None] | None:
    """Set fp32 matmuls to full precision; returns what undoes it, None where there was nothing to do."""
    before = [_get(backend, "matmul") for backend in _BACKENDS]
    if all(precision in _FULL for precision in before):
        return None
    older = _older_setting()
    if older != "highest":  # kept apart by torch, which raises where it reads that the two disagree
        torch.set_float32_matmul_precision("highest")
    for backend in _BACKENDS:
        _set(backend, "matmul", "ieee")

    def restore() -> None:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(_BACKENDS, before, strict=True):
            if older == "highest":
                _set(backend, "matmul", "none")  # as the setting for all of torch has it, perhaps
            if _get(backend, "matmul") != precision:
                _set(backend, "matmul", precision)

    return restore


def _older_setting() -> str:
    """What `torch.set_float32_matmul_precision` was given; "highest" where the caller uses the newer settings.

    torch refuses to say where the newer settings differ from it; for CUDA alone it may still tell.
    """
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        return "high" if torch.backends.cuda.matmul.allow_tf32 else "highest"
    return "highest"
