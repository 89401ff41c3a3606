"""The command line: `lightning-indexer demo | bench | doctor`."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_indexer.demo.options import FORMATS, DemoError, Options

app = typer.Typer(
    help="DeepSeek-V4's lightning indexer on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_WRONG_RESULT, _WRONG_USE = 1, 2


@app.command()
def demo(
    text_file: Annotated[
        Path | None, typer.Argument(help="UTF-8 text. Default: the reference text that CPython ships.")
    ] = None,
    format: Annotated[str, typer.Option(help=f"Index keys: {', '.join(FORMATS)}.")] = "mxfp4",
    tokens: Annotated[int, typer.Option(help="Length of the context.")] = 131_072,
    top_k: Annotated[int, typer.Option(help="Entries that each query chooses.")] = 512,
    device: Annotated[str, typer.Option(help="auto or cpu (scoring has no CUDA kernel yet).")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout, and nothing else.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo-output"),
) -> None:
    """Write a real text into a paged cache, select from it, check the selection, report and draw it."""
    with _one_line_errors():
        options = Options(text_file, format, tokens, top_k, device, seed)
        _demo(options, output, as_json=json)


@app.command()
def bench(
    peer: Annotated[
        list[str] | None, typer.Option(help="Time this implementation too, on the same operands: transformers.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two small cases.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each case.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder for cpu.jsonl and cpu.png.")] = Path("bench-output"),
) -> None:
    """Check, then time score_topk over a grid of shapes; write JSON lines and a plot."""
    from lightning_indexer.bench.peers import PEERS

    unknown = [name for name in peer or () if name not in PEERS]
    with _one_line_errors():
        if unknown:
            raise DemoError(f"--peer must be one of {', '.join(PEERS)}, got {unknown[0]}")
        _bench(peer or [], quick, repeats, output)


@app.command()
def doctor() -> None:
    """Say what serves this machine, and check one small selection against float64."""
    from lightning_indexer.doctor import run_doctor

    if not run_doctor(Console()):
        raise typer.Exit(_WRONG_RESULT)


def _demo(options: Options, output: Path, *, as_json: bool) -> None:
    from lightning_indexer.demo import picture, screen
    from lightning_indexer.demo.run import run_demo

    drawing = picture.has_matplotlib()
    if drawing:  # before the work, so that a folder that cannot be made is told at once
        output.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        report, rows = run_demo(options, progress)
    if drawing:
        path = output / picture.FILE_NAME
        picture.draw(report, rows, path)
        report = dataclasses.replace(report, picture=str(path))
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        screen.show(report, Console())
    if not report.agreement.complete:
        raise typer.Exit(_WRONG_RESULT)


def _bench(peers: list[str], quick: bool, repeats: int, output: Path) -> None:
    from lightning_indexer.bench import screen
    from lightning_indexer.bench.cases import GRID, QUICK_GRID
    from lightning_indexer.bench.run import run_grid, write_lines

    output.mkdir(parents=True, exist_ok=True)
    console, records = Console(), []
    for record in run_grid(QUICK_GRID if quick else GRID, peers=peers, repeats=repeats):
        records.append(record)
        write_lines(output / "cpu.jsonl", records)  # after each case, so that a run cut short keeps what it has
        console.print(screen.line(record), soft_wrap=True)
    try:
        from lightning_indexer.bench.plot import plot

        plot(records, output / "cpu.png")
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error.name} is missing (pip install 'lightning-indexer[plots]')")
    console.print(screen.table(records))
    console.print(f"written to {output}", soft_wrap=True)


def _progress() -> Progress:
    """Bars on stderr, so that stdout holds the report alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what the user can put right into one line on stderr."""
    try:
        yield
    except DemoError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    else:
        return
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(_WRONG_USE)
