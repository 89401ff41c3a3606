"""What this machine has, which implementations serve it, and whether a small selection comes out right."""

import platform
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table

import lightning_indexer
from lightning_indexer.bench.agreement import Agreement, compare
from lightning_indexer.cache.pool import PagedPool
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.checks import IMPLS
from lightning_indexer.cpu.operands import has_exact_int8_matmul
from lightning_indexer.ops.append import append_entries
from lightning_indexer.ops.score_topk import score_topk
from lightning_indexer.query import quantize_query

_HEADS, _HEAD_DIM, _ENTRIES, _QUERIES, _TOP_K = 64, 128, 1000, 4, 64
_CPU_FEATURES = {
    "AVX2": "_is_avx2_supported",
    "AVX-512": "_is_avx512_supported",
    "AVX-512 VNNI": "_is_vnni_supported",
    "AVX-512 BF16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
}


def run_doctor(console: Console) -> bool:
    """Print what was found; returns whether the small selection agrees with float64."""
    agreement = check_selection()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, text in describe_machine():
        table.add_row(name, text)
    table.add_row("self-check", _verdict(agreement))
    console.print(table)
    return agreement.complete


def describe_machine() -> list[tuple[str, str]]:
    """Names and values, in the order to print them."""
    return [
        ("lightning-indexer", lightning_indexer.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("CPU", _describe_cpu()),
        (
            "implementations",
            ", ".join(impl for impl in IMPLS if impl != "auto") + " (auto takes the one that fits the tensors)",
        ),
        ("GPU", _describe_gpu()),
        ("pictures", _describe_matplotlib()),
    ]


@torch.no_grad()
def check_selection() -> Agreement:
    """Score a small mxfp4 cache with `score_topk` and compare with the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    pool = PagedPool(CacheSchema("mxfp4", head_dim=_HEAD_DIM), num_blocks=-(-_ENTRIES // 64), max_seqs=1)
    slots = pool.alloc(0, _ENTRIES)
    view = IndexerView(pool.storage, pool.schema, pool.block_table)
    append_entries(torch.randn(_ENTRIES, _HEAD_DIM, generator=generator), view, slots)
    q = quantize_query(torch.randn(_QUERIES, _HEADS, _HEAD_DIM, generator=generator), "mxfp4")
    weights = torch.randn(_QUERIES, _HEADS, generator=generator)
    lens = torch.full((_QUERIES,), _ENTRIES, dtype=torch.int32)
    seq_ids = torch.zeros(_QUERIES, dtype=torch.int32)
    indices = score_topk(q, weights, view, top_k=_TOP_K, valid_lens=lens, seq_ids=seq_ids)
    return compare(q, weights, view, indices, num_entries=_ENTRIES)


def _describe_cpu() -> str:
    # torch keeps these private and adds to them; one that is missing is a feature that it cannot use
    names = [name for name, check in _CPU_FEATURES.items() if getattr(torch.cpu, check, lambda: False)()]
    product = "int8 products (exact and fast)" if has_exact_int8_matmul() else "fp32 products"
    return f"{platform.machine()}, {', '.join(names) or 'no special features'}; FP4 scores use {product}"


def _describe_gpu() -> str:
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that this torch can use"
    return f"{found}; scoring has no CUDA kernel yet"


def _describe_matplotlib() -> str:
    if find_spec("matplotlib") is None:
        return "matplotlib is missing (pip install 'lightning-indexer[plots]')"
    return "matplotlib is installed"


def _verdict(agreement: Agreement) -> str:
    counts = f"{agreement.agreeing} of {agreement.choices} choices of score_topk agree with float64"
    return f"[green]ok[/green]: {counts}" if agreement.complete else f"[bold red]wrong[/bold red]: only {counts}"
