"""Filling the kernel cache ahead of time: for an image or a cluster whose GPUs should not wait for a compiler.

No GPU is needed. One compilation uses one core, so several processes share the work.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_indexer.cache.schema import CacheSchema
from lightning_indexer.cuda import append, candidates, compress, gather, indexer_query, score_topk
from lightning_indexer.cuda.compiler import CompileError, Specialisation, build, cache_key, check_compiler_knows
from lightning_indexer.cuda.launcher import device_arch
from lightning_indexer.cuda.score_topk import INDEX_FORMATS
from lightning_indexer.cuda.store import Store

KV_FORMATS = ("fp8_ds_mla", "bf16")
KV_HEAD_DIM = 512


@dataclass(frozen=True)
class Filled:
    """What came of it: kernels compiled now, kernels that were there, wall time, and where they lie."""

    compiled: int
    found: int
    seconds: float
    folder: Path


def kernels(
    archs: Sequence[str] = (),
    formats: Sequence[str] = INDEX_FORMATS,
    kv_formats: Sequence[str] = KV_FORMATS,
    entries_per_block: Sequence[int] = (64,),
    head_dim: int = 128,
) -> list[Specialisation]:
    """All that caches of these layouts may need, every format with every block size, each kernel once.

    Args:
        archs: "sm_80", "sm_90a" and so on; none means that of this machine's GPU.
        formats, head_dim: of index keys.
        kv_formats: of KV entries, which have 512 dims.
        entries_per_block: of both.
    Raises:
        ImportError: no compiler is installed.
        ValueError: a format, size or architecture is not served, or there is no GPU to take it from.
    """
    for option, asked, known in (("--format", formats, INDEX_FORMATS), ("--kv-format", kv_formats, KV_FORMATS)):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"{option} must be one of {', '.join(known)}, got {unknown[0]!r}")
    archs = archs or [_arch_of_this_gpu()]
    for arch in archs:
        check_compiler_knows(arch)
    index = [CacheSchema(format, size, head_dim=head_dim) for format in formats for size in entries_per_block]
    kv = [CacheSchema(format, size, head_dim=KV_HEAD_DIM) for format in kv_formats for size in entries_per_block]
    return list(dict.fromkeys(kernel for arch in archs for kernel in _kernels(index, kv, arch)))


def fill(wanted: Sequence[Specialisation], store: Store, *, jobs: int, advance: Callable[[int], None]) -> Filled:
    """Compile what the store lacks.

    Args:
        jobs: how many compile at a time.
        advance: called with 1 for each kernel that is there.
    Raises:
        OSError: the store cannot be written.
        CompileError: a kernel does not compile; what was compiled before is kept.
    """
    start = time.perf_counter()
    store.check_writable()
    missing = []
    for specialisation in wanted:
        if store.read(cache_key(specialisation)) is None:
            missing.append(specialisation)
        else:
            advance(1)
    _build_all(missing, store, min(jobs, len(missing)), advance)
    return Filled(len(missing), len(wanted) - len(missing), time.perf_counter() - start, store.folder)


def _kernels(index: list[CacheSchema], kv: list[CacheSchema], arch: str) -> Iterator[Specialisation]:
    yield from candidates.specialisations(arch)
    for schema in index:
        schema.check_index()
        yield from append.specialisations(schema, arch)
        yield from score_topk.specialisations(schema, arch)
        yield from indexer_query.specialisations(schema, arch)
        yield from compress.index_specialisations(schema, arch)
    for schema in kv:
        schema.check_kv()
        yield from append.specialisations(schema, arch)
        yield from gather.specialisations(schema, arch)
        yield from compress.kv_specialisations(schema, arch)


def _arch_of_this_gpu() -> str:
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU to take the architecture from (say --arch sm_90a, for example)")
    return device_arch(torch.cuda.current_device())


def _build_all(missing: list[Specialisation], store: Store, jobs: int, advance: Callable[[int], None]) -> None:
    if jobs <= 1:  # nothing to share: spare the time that a new process takes to import torch
        for specialisation in missing:
            build(specialisation, store)
            advance(1)
        return
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        try:
            for done in as_completed([pool.submit(_try_build, specialisation, store) for specialisation in missing]):
                if (trouble := done.result()) is not None:
                    raise CompileError(trouble)
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _try_build(specialisation: Specialisation, store: Store) -> str | None:
    """What the compiler said against it, or None. As text: an exception would keep the compiler's objects alive until
    the process ends, where they complain on stderr."""
    try:
        build(specialisation, store)
    except CompileError as error:
        return str(error)
    return None
