"""The command line: `lightning-indexer demo | bench | doctor | compile`."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_indexer.cuda.compiler import CompileError, Specialisation
from lightning_indexer.cuda.environment import Environment
from lightning_indexer.cuda.store import Store
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
    device: Annotated[str, typer.Option(help="auto (a GPU where the kernels run on it), cpu or cuda.")] = "auto",
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
        list[str] | None,
        typer.Option(
            help="Time this implementation too, on the same operands: transformers (CPU), deep_gemm, flashinfer (GPU)."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few small cases.")] = False,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Timed runs of each case. Default: 5; on a GPU what fits a fraction of a second."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the JSON lines and the plot.")] = Path("bench-output"),
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    only: Annotated[list[str] | None, typer.Option(help="Only cases with this in their name; repeatable.")] = None,
    layer: Annotated[
        bool, typer.Option("--layer", help="Time one decode step of a CSA layer instead, stage by stage (GPU).")
    ] = False,
) -> None:
    """Check, then time score_topk (on a GPU also gather_kv and append_entries) over a grid of shapes; write JSON lines
    and a plot."""
    from lightning_indexer.bench.command import run_bench, run_layer_bench

    with _one_line_errors():
        if layer:
            if peer:
                raise DemoError("--layer has no --peer to compare with")
            run_layer_bench(device, only or [], quick=quick, repeats=repeats, output=output, console=Console())
            return
        run_bench(device, peer or [], only or [], quick=quick, repeats=repeats, output=output, console=Console())


@app.command()
def doctor() -> None:
    """Say what serves this machine, and check one small selection against float64."""
    from lightning_indexer.doctor import run_doctor

    if not run_doctor(Console()):
        raise typer.Exit(_WRONG_RESULT)


@app.command("compile")
def compile_kernels(
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90a, ...; repeatable. Default: that of this machine's GPU.")
    ] = None,
    format: Annotated[list[str] | None, typer.Option(help="Index keys; repeatable. Default: all formats.")] = None,
    kv_format: Annotated[list[str] | None, typer.Option(help="KV entries; repeatable. Default: all formats.")] = None,
    entries_per_block: Annotated[
        list[int] | None, typer.Option(help="Of index keys and KV entries; repeatable. Default: 64.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Of index keys: 64 or 128.")] = 128,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one per core.")] = None,
) -> None:
    """Fill the cache of compiled CUDA kernels ahead of time; this needs no GPU."""
    from lightning_indexer.cuda import score_topk, warmup

    with _one_line_errors((ValueError, ImportError, NotImplementedError)):
        wanted = warmup.kernels(
            arch or (),
            format or score_topk.INDEX_FORMATS,
            kv_format or warmup.KV_FORMATS,
            entries_per_block or (64,),
            head_dim,
        )
        _compile(wanted, jobs or os.cpu_count() or 1)


def _demo(options: Options, output: Path, *, as_json: bool) -> None:
    from lightning_indexer.demo import picture, screen
    from lightning_indexer.demo.device import choose_device
    from lightning_indexer.demo.run import run_demo

    device = choose_device(options.device)
    drawing = picture.has_matplotlib()
    if drawing:  # before the work, so that a folder that cannot be made is told at once
        output.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        report, rows = run_demo(options, device, progress)
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


def _compile(wanted: list[Specialisation], jobs: int) -> None:
    from lightning_indexer.cuda import warmup

    store = Store(Environment.read().cache_folder)
    try:
        with _progress() as progress:
            task = progress.add_task("Compiling kernels", total=len(wanted))
            done = warmup.fill(wanted, store, jobs=jobs, advance=lambda number: progress.advance(task, number))
    except CompileError as error:  # its message is the specialisation and the compiler's log
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(_WRONG_RESULT) from None
    typer.echo(f"{done.compiled} kernels compiled, {done.found} were there, {done.seconds:.1f} s, in {done.folder}")


def _progress() -> Progress:
    """Bars on stderr, so that stdout holds the report alone."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def _one_line_errors(kinds: tuple[type[Exception], ...] = (DemoError,)) -> Iterator[None]:
    """Turn what the user can put right, OSError among it, into one line on stderr."""
    try:
        yield
    except kinds as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    else:
        return
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(_WRONG_USE)
