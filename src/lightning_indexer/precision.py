"""Scores in full fp32, whatever the caller has set."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_inside = 0  # how many bodies run now, over all threads: the setting is the process's
_before = ""  # what the caller had set when the first of them began


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keep a reduced-precision matmul setting, or autocast, of the caller from reaching the body."""
    global _inside, _before
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time by torch
    with _lock:
        if _inside == 0:
            _before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        _inside += 1
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                matmul.fp32_precision = _before
