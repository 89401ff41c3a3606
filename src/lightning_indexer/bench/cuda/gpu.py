"""Time and memory on one GPU.

Graph replay is timed by events around the replay alone, behind a short wait on the device, so that the host is always
ahead and launching is not part of the time. Eager calls start on an idle device, so that the host's part is. "Cold"
means that a buffer of several times the L2 cache was read since the last call; "warm" repeats on what is cached.
"""

import gc
import importlib.metadata
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

_FLUSH_FACTOR = 4  # times the L2 cache
_ASSUMED_L2_BYTES = 64 * 2**20  # where torch does not say
_WAIT_CYCLES = 100_000  # about 60 us: more than the host needs to enqueue one replay
_WARM_UPS = 3
_FEWEST, _MOST = 10, 200
_HOST_REPEATS, _HOST_BUDGET_S = 15, 0.05
_MOST_QUEUED = 200  # calls of up to two launches; the host waits where a thousand are under way
_CEILING_BYTES = 2 * 2**30
_WHEELS = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")


@dataclass(frozen=True)
class Spread:
    """Microseconds of single repetitions."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.times)

    def record(self) -> dict[str, float]:
        ordered = sorted(self.times)
        last = len(ordered) - 1
        return {
            "median": self.median,
            "min": ordered[0],
            "p10": ordered[round(0.1 * last)],
            "p90": ordered[round(0.9 * last)],
            "max": ordered[last],
            "repeats": len(ordered),
        }


def count_repeats(budget_s: float, once_us: float, *, fewest: int = _FEWEST) -> int:
    """As many repetitions as fit in the budget, within reason."""
    return min(max(int(budget_s * 1e6 / max(once_us, 1.0)), fewest), _MOST)


class Gpu:
    """The current CUDA device.

    Args:
        repeats: timed repetitions of everything; default: as many as fit in a fraction of a second.
        meet: called before each repetition of `time`, and not timed itself. With several ranks a collective, so that
            they start together, unless a host falls behind.
    """

    def __init__(self, repeats: int | None = None, *, meet: Callable[[], object] | None = None) -> None:
        self._meet = meet
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.repeats = repeats
        l2_bytes = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or _ASSUMED_L2_BYTES
        self._flush = torch.randn(_FLUSH_FACTOR * l2_bytes // 4, device=self.device)
        self._flushed = torch.zeros((), device=self.device)

    def time(
        self, run: Callable[[], object], *, graph: bool, cold: bool, budget_s: float = 0.2, fewest: int = _FEWEST
    ) -> Spread:
        """Microseconds of one call, over many; the first calls compile and warm up and are not counted."""
        run()
        torch.cuda.synchronize()
        step = self.capture(run).replay if graph else run
        warm_ups = _WARM_UPS if self.repeats is None or self.repeats > 1 else 1
        once = median(self._series(step, warm_ups if fewest > 1 else 1, cold, idle=not graph))
        repeats = self.repeats or count_repeats(budget_s, once, fewest=fewest)
        return Spread(tuple(self._series(step, repeats, cold, idle=not graph)))

    def host(self, run: Callable[[], object], took_us: float) -> Spread:
        """Microseconds that an eager call keeps the host, from calls that are enqueued one after the other.

        Args:
            took_us: of one call on the device. Of slow calls fewer are enqueued, and never more than a queue holds.
        """
        calls = min(max(int(_HOST_BUDGET_S * 1e6 / took_us), 1), _MOST_QUEUED)
        spans = []
        for _ in range(self.repeats or _HOST_REPEATS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            spans.append((time.perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize()
        return Spread(tuple(spans))

    def capture(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """A graph of one call."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog goes on querying events
            run()
        return graph

    def peak_extra_bytes(self, run: Callable[[], object]) -> int:
        """How far torch's allocator rises above what is allocated before the call."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device)
        del result
        return max(peak - before, 0)

    def free_bytes(self) -> int:
        """What could be allocated now."""
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held

    def release(self) -> None:
        """Give back what the last case held."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def ceilings(self) -> dict[str, float]:
        """GB/s of reading a large buffer, and of copying one (bytes read plus bytes written)."""
        count = min(_CEILING_BYTES, self.free_bytes() // 4) // 4
        source = torch.randn(count, device=self.device)
        read = self.time(lambda: torch.sum(source, dim=0, out=self._flushed), graph=True, cold=False)
        return {
            "read_gb_s": 4 * count / read.median / 1e3,
            "copy_gb_s": 2 * 4 * count / self._copied_us(source, cold=False) / 1e3,
        }

    def copy_us(self, moved_bytes: int) -> float:
        """Time of a device-to-device copy that reads and writes `moved_bytes` in all, cold."""
        return self._copied_us(torch.randn(moved_bytes // 8, device=self.device), cold=True)

    def _copied_us(self, source: torch.Tensor, *, cold: bool) -> float:
        """The faster of a memcpy and a kernel that reads and writes as much.

        In a graph, a memcpy of a GiB is left to the copy engine, which on an H100 has four fifths of a kernel's rate.
        """
        target = torch.empty_like(source)
        ways = (lambda: target.copy_(source)), (lambda: torch.neg(source, out=target))
        return min(self.time(way, graph=True, cold=cold).median for way in ways)

    def describe(self) -> dict[str, Any]:
        """What a reader needs to judge a time."""
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "num_sms": properties.multi_processor_count,
            "driver": _driver_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "wheels": {name: version for name in _WHEELS if (version := _wheel_version(name)) is not None},
        }

    def _series(self, step: Callable[[], object], repeats: int, cold: bool, *, idle: bool) -> Sequence[float]:
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        for start, end in zip(starts, ends, strict=True):
            if cold:
                torch.sum(self._flush, dim=0, out=self._flushed)
            if self._meet is not None:
                self._meet()
            if idle:
                torch.cuda.synchronize()
            else:
                torch.cuda._sleep(_WAIT_CYCLES)
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True)]


def _driver_version() -> str | None:
    """Of the kernel module, such as "580.95.05"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _wheel_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
