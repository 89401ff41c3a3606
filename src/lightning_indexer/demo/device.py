"""The device that the demo runs on, and what differs there: waiting for it, and measuring its memory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lightning_indexer.bench import memory
from lightning_indexer.bench.memory import MemoryUse
from lightning_indexer.cuda.available import obstacle
from lightning_indexer.demo.options import DemoError


@dataclass(frozen=True)
class Device:
    """Where the demo's tensors lie.

    place: for torch. name: for people. note: why it is not the GPU that is there, or None.
    """

    place: torch.device
    name: str
    note: str | None = None

    @property
    def is_gpu(self) -> bool:
        return self.place.type == "cuda"

    def wait(self) -> None:
        """Return when all that was enqueued is done."""
        if self.is_gpu:
            torch.cuda.synchronize(self.place)

    @contextlib.contextmanager
    def watch_memory(self) -> Iterator[MemoryUse]:
        """Measure the body: the process's resident bytes, or on a GPU the bytes that torch has allocated there."""
        if not self.is_gpu:
            with memory.watch() as use:
                yield use
            return
        use = MemoryUse()
        before, earlier = torch.cuda.memory_allocated(self.place), torch.cuda.max_memory_allocated(self.place)
        torch.cuda.reset_peak_memory_stats(self.place)
        yield use
        after = torch.cuda.max_memory_allocated(self.place)
        use.rise, use.peak = after - before, max(earlier, after)


def choose_device(option: str) -> Device:
    """What "auto", "cpu" or "cuda" means here: "auto" is the GPU where the kernels run on it, otherwise the CPU.

    Raises:
        DemoError: "cuda", and the kernels do not run here.
    """
    cpu = Device(torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads")
    if option == "cpu" or (option == "auto" and not torch.cuda.is_available()):
        return cpu
    reason = obstacle()
    if option == "cuda" and reason is not None:
        raise DemoError(f"--device cuda: {reason}")
    index = torch.cuda.current_device()
    name = torch.cuda.get_device_name(index)
    if reason is not None:
        return Device(cpu.place, cpu.name, f"the {name} is not used: {reason}")
    return Device(torch.device("cuda", index), name)
