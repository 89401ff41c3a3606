"""What the command line asks of the demo."""

from dataclasses import dataclass
from pathlib import Path

from lightning_indexer.ops.score_topk import MAX_TOP_K

FORMATS = ("mxfp4", "nvfp4", "fp8", "bf16")
DEVICES = ("auto", "cpu", "cuda")
MIN_TOKENS, MAX_TOKENS = 1024, 1_048_576
MAX_SEED = 2**32 - 1


class DemoError(ValueError):
    """Something about the options or the text that the user can put right, in one line."""


@dataclass(frozen=True)
class Options:
    """The options of `lightning-indexer demo`, checked on construction.

    Args:
        text_file: UTF-8 text; None is the reference text that CPython ships.
        format: of the index keys and queries.
        tokens: length of the context.
        top_k: entries that each query chooses.
        device: "auto" (a GPU where the kernels run on it, otherwise the CPU), "cpu" or "cuda".
        seed: of the order of repeated paragraphs, the planted places, the projections and the passages.
    Raises:
        DemoError: a value is out of range.
    """

    text_file: Path | None = None
    format: str = "mxfp4"
    tokens: int = 131_072
    top_k: int = 512
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise DemoError(f"--format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        _check_range("--tokens", self.tokens, MIN_TOKENS, MAX_TOKENS)
        _check_range("--top-k", self.top_k, 1, MAX_TOP_K)
        _check_range("--seed", self.seed, 0, MAX_SEED)
        if self.device not in DEVICES:
            raise DemoError(f"--device must be one of {', '.join(DEVICES)}, got {self.device!r}")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise DemoError(f"{name} must lie in {low}..{high}, got {value}")
