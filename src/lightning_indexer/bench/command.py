"""`lightning-indexer bench`: choose the device and the cases, run them, write lines and a picture, print a table."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from lightning_indexer.bench import cases, peers, plot, run, screen
from lightning_indexer.bench.cuda import cases as cuda_cases
from lightning_indexer.bench.cuda import gpu as cuda_gpu
from lightning_indexer.bench.cuda import layer as cuda_layer
from lightning_indexer.bench.cuda import peers as cuda_peers
from lightning_indexer.bench.cuda import plot as cuda_plot
from lightning_indexer.bench.cuda import run as cuda_run
from lightning_indexer.bench.cuda import screen as cuda_screen
from lightning_indexer.cuda.available import obstacle
from lightning_indexer.demo.options import DEVICES, DemoError

PEERS = (*peers.PEERS, *cuda_peers.PEERS)

_CPU_REPEATS = 5

Record = dict[str, Any]


class Named(Protocol):
    """A case."""

    @property
    def name(self) -> str: ...


AnyCase = TypeVar("AnyCase", bound=Named)


def run_bench(
    device: str,
    peer_names: Sequence[str],
    only: Sequence[str],
    *,
    quick: bool,
    repeats: int | None,
    output: Path,
    console: Console,
) -> None:
    """Run a grid and write <output>/cpu.jsonl and cpu.png, or cuda.jsonl and cuda.png.

    Raises:
        DemoError: the options cannot be meant.
        AssertionError: a case computes something wrong.
    """
    unknown = [name for name in peer_names if name not in PEERS]
    if unknown:
        raise DemoError(f"--peer must be one of {', '.join(PEERS)}, got {unknown[0]}")
    if choose_device(device, console) == "cuda":
        chosen = select_cases(cuda_cases.QUICK_GRID if quick else cuda_cases.GRID, only)
        records = cuda_run.run_grid(chosen, cuda_gpu.Gpu(repeats), peer_names=peer_names)
        _report("cuda", records, output, console, cuda_screen.line, cuda_plot.plot, cuda_screen.table)
        return
    for name in peer_names:
        if name in cuda_peers.PEERS:
            console.print(f"{name} skipped: runs on a GPU only (--device cuda)")
    served = [name for name in peer_names if name in peers.PEERS]
    small = select_cases(cases.QUICK_GRID if quick else cases.GRID, only)
    records = run.run_grid(small, peers=served, repeats=repeats or _CPU_REPEATS)
    _report("cpu", records, output, console, screen.line, plot.plot, screen.table)


def run_layer_bench(
    device: str, only: Sequence[str], *, quick: bool, repeats: int | None, output: Path, console: Console
) -> None:
    """Time one decode step of a CSA layer and its stages on a GPU; write <output>/layer.jsonl.

    Raises:
        DemoError: the options cannot be meant, or the kernels do not run here.
        AssertionError: a step gives something wrong.
    """
    if choose_device(device, console) != "cuda":
        raise DemoError("--layer times a decode step at V4-Flash size on a GPU, and none is used here (--device cuda)")
    chosen = select_cases(cuda_layer.QUICK_GRID if quick else cuda_layer.GRID, only)
    records = _write("layer", cuda_layer.run_grid(chosen, cuda_gpu.Gpu(repeats)), output, console, cuda_layer.line)
    for table in cuda_layer.tables(records):
        console.print(table)
    console.print(f"written to {output}", soft_wrap=True)


def choose_device(device: str, console: Console) -> str:
    """ "cpu" or "cuda"; "auto" is the GPU where the kernels run on it, and says why not where there is one.

    Raises:
        DemoError: it is none of these, or "cuda" and the kernels do not run here.
    """
    if device not in DEVICES:
        raise DemoError(f"--device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    reason = obstacle()
    if reason is None:
        return "cuda"
    if device == "cuda":
        raise DemoError(f"--device cuda: {reason}")
    console.print(f"the GPU is not used: {reason}", soft_wrap=True)
    return "cpu"


def select_cases(grid: Sequence[AnyCase], substrings: Sequence[str]) -> list[AnyCase]:
    """The cases whose names contain one of the substrings; all of them if there are none.

    Raises:
        DemoError: a substring is in no name.
    """
    for part in substrings:
        if not any(part in case.name for case in grid):
            raise DemoError(f"--only {part}: no case has that in its name, such as {grid[0].name}")
    return [case for case in grid if not substrings or any(part in case.name for part in substrings)]


def _report(
    stem: str,
    records: Iterable[Record],
    output: Path,
    console: Console,
    line: Callable[[Record], str],
    draw: Callable[[Sequence[Record], Path], None],
    table: Callable[[Sequence[Record]], Table],
) -> None:
    """Write the records; then the picture and the table."""
    done = _write(stem, records, output, console, line)
    try:
        draw(done, output / f"{stem}.png")
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error.name} is missing (pip install 'lightning-indexer[plots]')")
    console.print(table(done))
    console.print(f"written to {output}", soft_wrap=True)


def _write(
    stem: str, records: Iterable[Record], output: Path, console: Console, line: Callable[[Record], str]
) -> list[Record]:
    """Write each record as it comes, so that a run cut short keeps what it has."""
    output.mkdir(parents=True, exist_ok=True)
    done: list[Record] = []
    for record in records:
        done.append(record)
        run.write_lines(output / f"{stem}.jsonl", done)
        console.print(line(record), soft_wrap=True)
    return done
