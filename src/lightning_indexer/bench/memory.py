"""Peak memory of the process."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")
_RESET_PEAK = "5"  # what clear_refs takes for "forget VmHWM"


@dataclass
class MemoryUse:
    """Resident bytes of a piece of work; None where the system does not tell.

    rise: how far the peak lay above what was resident before. peak: the highest since the process began.
    """

    rise: int | None = None
    peak: int | None = None


@contextlib.contextmanager
def watch() -> Iterator[MemoryUse]:
    """Measure the body; read the result afterwards."""
    use = MemoryUse()
    earlier = peak_bytes()
    _return_free_memory()
    resettable = _reset_peak()
    before = _status("VmRSS") if resettable else earlier
    yield use
    after = peak_bytes()
    if before is not None and after is not None and earlier is not None:
        use.rise = max(after - before, 0)
        use.peak = max(earlier, after)


def peak_bytes() -> int | None:
    """The highest resident size so far (on Linux: since the last `watch` began)."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _return_free_memory() -> None:
    """Give freed heap back to the system (glibc): the body would be served from it without a rise to see."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        (_PROC / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return _status("VmRSS") is not None


def _status(name: str) -> int | None:
    """A size from /proc/self/status in bytes."""
    try:
        lines = (_PROC / "status").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")]
    return sizes[0] if sizes else None
