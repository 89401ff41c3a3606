"""Kernels compiled by a host compiler (host_cuda.h), in the place of those that the launcher loads."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from lightning_indexer.cuda import launcher
from lightning_indexer.cuda.compiler import KERNEL_FOLDER, Specialisation

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
OPTIONS = ("-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w", f"-I{HERE}")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="needs g++ and glibc's ucontext"
)


@dataclass(frozen=True)
class Library:
    """What was compiled: launchers by their kernel's expression, and whatever else is in it."""

    loaded: ctypes.CDLL
    launchers: dict[str, ctypes._CFuncPtr]


class HostKernel:
    """Stands in for `launcher.Kernel`."""

    def __init__(self, function: ctypes._CFuncPtr, parameters: dict[str, str], threads: int) -> None:
        self.function, self.threads = function, threads
        self.arguments = launcher._ArgumentBuffer("".join(parameters.values()))

    def launch(self, grid: tuple[int, int, int], *arguments: float) -> None:
        assert grid[0] >= 1 and grid[1:] == (1, 1), f"an empty or unexpected grid {grid}"
        self.run(grid[0], 1, arguments)

    def run(self, x: int, y: int, arguments: tuple[float, ...]) -> None:
        """All blocks of a grid."""
        pack_into, memory, address = self.arguments.place
        pack_into(memory, 0, *arguments)
        self.function(x, y, self.threads, ctypes.c_void_p(address))


def compile_library(folder: Path, specialisations: Iterable[Specialisation], extra: str = "") -> Library:
    """Every specialisation by its expression, from one run of the compiler.

    Args:
        extra: C++ behind the kernels, for what is not a kernel.
    """
    wanted = {s.expression: s.source for s in specialisations}
    for path in KERNEL_FOLDER.iterdir():
        shutil.copy(path, folder)
    shutil.copy(HERE / "host_ptx.cuh", folder / "ptx.cuh")
    launchers = [
        f'extern "C" void launch_{i}(unsigned x, unsigned y, unsigned threads, void** arguments) '
        f"{{ host_cuda::launch({expression}, x, y, threads, arguments); }}"
        for i, expression in enumerate(wanted)
    ]
    includes = ['#include "host_cuda.h"', *(f'#include "{source}"' for source in sorted(set(wanted.values())))]
    (folder / "all.cpp").write_text("\n".join([*includes, "using namespace lightning_indexer;", *launchers, extra]))
    assert COMPILER is not None
    done = subprocess.run(
        [COMPILER, *OPTIONS, "all.cpp", "-o", "all.so"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    loaded = ctypes.CDLL(str(folder / "all.so"))
    return Library(loaded, {expression: getattr(loaded, f"launch_{i}") for i, expression in enumerate(wanted)})


def take_host_kernels(monkeypatch: pytest.MonkeyPatch, library: Library, *modules: ModuleType) -> None:
    """Let the wrappers find the host's kernels."""

    def load(
        specialisation: Specialisation, _index: object, parameters: dict[str, str], *, threads: int, **_: object
    ) -> HostKernel:
        return HostKernel(library.launchers[specialisation.expression], parameters, threads)

    for module in modules:
        monkeypatch.setattr(module, "load_kernel", load)
        monkeypatch.setattr(module, "device_arch", lambda _index: "sm_80")
        module._kernel.cache_clear()
