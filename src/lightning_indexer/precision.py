"""Scores in full fp32, whatever the caller has set."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Keep a reduced-precision matmul setting, or autocast, of the caller from reaching the body."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time by torch
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
