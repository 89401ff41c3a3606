"""What this machine has, which implementations serve it, and whether a small selection comes out right."""

import importlib.metadata
import platform
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import lightning_indexer
from lightning_indexer.bench.agreement import Agreement, compare
from lightning_indexer.cache.pool import PagedPool
from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cache.view import IndexerView
from lightning_indexer.checks import IMPLS
from lightning_indexer.cpu.operands import has_exact_int8_matmul
from lightning_indexer.cuda.available import obstacle
from lightning_indexer.cuda.compiler import compiler_version, known_archs
from lightning_indexer.cuda.environment import Environment
from lightning_indexer.cuda.launcher import device_arch
from lightning_indexer.cuda.store import Store
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


@dataclass(frozen=True)
class Check:
    """A verdict on one device: the agreement, or in words why there is none."""

    device: str
    agreement: Agreement | None
    reason: str = ""
    is_failure: bool = False


def run_doctor(console: Console) -> bool:
    """Print what was found; returns whether every small selection that could be made agrees with float64."""
    checks = [check_cpu(), check_gpu()]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, text in describe_machine():
        table.add_row(name, Text(text))
    for check in checks:
        table.add_row(f"{check.device} check", _verdict(check))
    console.print(table)
    return not any(check.is_failure for check in checks)


def describe_machine() -> list[tuple[str, str]]:
    """Names and values, in the order to print them."""
    return [
        ("lightning-indexer", lightning_indexer.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("CPU", _describe_cpu()),
        ("GPU", _describe_gpu()),
        ("CUDA", _describe_cuda()),
        ("compiler", _describe_compiler()),
        ("kernel cache", _describe_cache()),
        (
            "implementations",
            ", ".join(impl for impl in IMPLS if impl != "auto") + " (auto takes the one that fits the tensors)",
        ),
        ("pictures", _describe_matplotlib()),
    ]


def check_cpu() -> Check:
    """A small selection on the CPU."""
    return _judge("CPU", check_selection(torch.device("cpu")))


def check_gpu() -> Check:
    """The same on the GPU, if the kernels can run there. Whatever goes wrong is the verdict, not a crash."""
    reason = obstacle()
    if reason is not None:
        return Check("GPU", None, f"not run: {reason}")
    try:
        return _judge("GPU", check_selection(torch.device("cuda", torch.cuda.current_device())))
    except Exception as error:
        return Check("GPU", None, f"{type(error).__name__}: {error}", is_failure=True)


@torch.no_grad()
def check_selection(device: torch.device) -> Agreement:
    """Score a small mxfp4 cache with `score_topk` and compare with the reference in float64."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(device)

    pool = PagedPool(CacheSchema("mxfp4", head_dim=_HEAD_DIM), num_blocks=-(-_ENTRIES // 64), max_seqs=1, device=device)
    slots = pool.alloc(0, _ENTRIES)
    view = IndexerView(pool.storage, pool.schema, pool.block_table)
    append_entries(random(_ENTRIES, _HEAD_DIM), view, slots)
    q = quantize_query(random(_QUERIES, _HEADS, _HEAD_DIM), "mxfp4")
    weights = random(_QUERIES, _HEADS)
    lens = torch.full((_QUERIES,), _ENTRIES, dtype=torch.int32, device=device)
    seq_ids = torch.zeros(_QUERIES, dtype=torch.int32, device=device)
    indices = score_topk(q, weights, view, top_k=_TOP_K, valid_lens=lens, seq_ids=seq_ids)
    return compare(q, weights, view, indices, num_entries=_ENTRIES)


def _describe_cpu() -> str:
    # torch keeps these private and adds to them; one that is missing is a feature that it cannot use
    names = [name for name, check in _CPU_FEATURES.items() if getattr(torch.cpu, check, lambda: False)()]
    product = "int8 products (exact and fast)" if has_exact_int8_matmul() else "fp32 products"
    return f"{platform.machine()}, {', '.join(names) or 'no special features'}; FP4 scores use {product}"


def _describe_gpu() -> str:
    if not torch.cuda.is_available():
        return "none that this torch can use"
    index = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(index)
    found = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    try:
        return f"{found}; kernels are compiled for {device_arch(index)}"
    except NotImplementedError as error:
        return f"{found}; {error}"


def _describe_cuda() -> str:
    torch_has = "this torch has no CUDA" if torch.version.cuda is None else f"torch has CUDA {torch.version.cuda}"
    wheels = [f"{name} {version}" for name in ("cuda-bindings", "cuda-core") if (version := _wheel_version(name))]
    return ", ".join([_describe_driver(), torch_has, *wheels])


def _describe_driver() -> str:
    """The newest CUDA that the driver runs, as cuda-bindings see it."""
    try:
        from cuda.bindings import driver

        status, version = driver.cuDriverGetVersion()
    except (ImportError, RuntimeError, OSError):  # no wheel; no driver
        status, version = 1, 0
    return "no driver found" if status else f"driver for CUDA {version // 1000}.{version % 1000 // 10}"


def _describe_compiler() -> str:
    try:
        return f"{compiler_version()}, for {', '.join(known_archs())}"
    except ImportError as error:
        return f"none: {error}"


def _describe_cache() -> str:
    try:
        folder = Environment.read().cache_folder
        entries, num_bytes = Store(folder).usage()
    except (ValueError, OSError) as error:
        return str(error)
    return f"{folder}: {entries} kernels, {num_bytes / 1e6:.1f} MB"


def _wheel_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_matplotlib() -> str:
    if find_spec("matplotlib") is None:
        return "matplotlib is missing (pip install 'lightning-indexer[plots]')"
    return "matplotlib is installed"


def _judge(device: str, agreement: Agreement) -> Check:
    return Check(device, agreement, is_failure=not agreement.complete)


def _verdict(check: Check) -> Text:
    if check.agreement is None:
        return Text(check.reason, style="bold red" if check.is_failure else "")
    counts = f"{check.agreement.agreeing} of {check.agreement.choices} choices of score_topk agree with float64"
    if check.is_failure:
        return Text.assemble(("wrong", "bold red"), f": only {counts}")
    return Text.assemble(("ok", "green"), f": {counts}")
