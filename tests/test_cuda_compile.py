"""Compiling the CUDA kernels, keeping them on disk, and launching them, as far as this can be tried without a GPU.

The store, the launcher's bookkeeping and the choice of a scorer are tested everywhere; what compiles needs the CUDA
wheels. Scorers are many: a sample of them is compiled here, all of them by `make check-kernels`.
"""

import ctypes
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_indexer import CacheSchema
from lightning_indexer.cuda import (
    append,
    candidates,
    compiler,
    compress,
    gather,
    indexer_query,
    launcher,
    score_topk,
)
from lightning_indexer.cuda.compiler import KERNEL_FOLDER, Binary, CompileError, Specialisation
from lightning_indexer.cuda.environment import Environment
from lightning_indexer.cuda.store import Store, content_key

ARCHS = ("sm_80", "sm_90a", "sm_100a")
INDEX_SCHEMAS = [
    CacheSchema(format, entries_per_block, head_dim=dim)
    for format, entries_per_block, dim in (
        *((format, 64, dim) for format in ("mxfp4", "nvfp4", "fp8", "bf16", "fp32") for dim in (64, 128)),
        ("mxfp4", 48, 128),
        ("mxfp4", 256, 64),
    )
]
KV_SCHEMAS = [
    CacheSchema(format, entries_per_block, head_dim=dim)
    for format, entries_per_block, dim in (
        *(("fp8_ds_mla", entries_per_block, 512) for entries_per_block in (1, 2, 53, 64)),
        ("bf16", 64, 512),
        ("fp32", 64, 512),
        ("bf16", 7, 24),
    )
]
SMALL = append.specialisation(CacheSchema("bf16", 64), torch.bfloat16, "nearest_even", "sm_90a")


@pytest.fixture
def cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="compiling needs cuda-core and NVRTC (the extra cuda13)")
    pytest.importorskip("cuda.bindings.nvrtc", reason="compiling needs cuda-core and NVRTC (the extra cuda13)")


def name_of(schema: CacheSchema) -> str:
    return f"{schema.format}-d{schema.dim}-block{schema.entries_per_block}"


def compile_all(wanted: Iterable[Specialisation]) -> list[tuple[Specialisation, Binary]]:
    """On every core: the compiler does not hold Python's lock."""
    wanted = list(dict.fromkeys(wanted))
    compiler.compiler_version()  # imports cuda.core, which two threads must not do at once
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(zip(wanted, pool.map(compiler.compile_kernel, wanted), strict=True))


# --- every specialisation, but for the scorers ----------------------------------------------------------------


def specialisations(schema: CacheSchema, arch: str) -> Iterator[Specialisation]:
    yield from append.specialisations(schema, arch)
    if schema in KV_SCHEMAS:
        yield from gather.specialisations(schema, arch)
    else:
        yield from indexer_query.specialisations(schema, arch)


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schema", INDEX_SCHEMAS + KV_SCHEMAS, ids=name_of)
def test_compiles_without_spills(schema: CacheSchema, arch: str) -> None:
    for specialisation, binary in compile_all(specialisations(schema, arch)):
        assert binary.code[:4] == b"\x7fELF" and specialisation.kernel in binary.symbol, binary.symbol
        assert (binary.spill_bytes, binary.stack_bytes) == (0, 0), (
            f"{specialisation}: {binary.spill_bytes} bytes spilled, {binary.stack_bytes} bytes of stack"
        )


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_compiles_for_other_architectures(arch: str) -> None:
    for schema in (CacheSchema("mxfp4"), CacheSchema("fp8_ds_mla")):
        for specialisation, binary in compile_all(specialisations(schema, arch)):
            assert binary.spill_bytes == 0, specialisation


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("arch", [*ARCHS, "sm_89", "sm_120"])
def test_candidate_kernels_compile_without_spills(arch: str) -> None:
    for specialisation, binary in compile_all(candidates.specialisations(arch)):
        assert (binary.spill_bytes, binary.stack_bytes) == (0, 0), f"{specialisation}: {binary}"


@pytest.mark.usefixtures("cuda_wheels")
def test_spills_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that must spill is reported as spilling: otherwise the tests above say nothing."""
    body = " ".join(f"float v{i} = p[{i} * n];" for i in range(80)) + " __syncthreads(); p[0] = 0"
    body += "".join(f" + v{i} * v{(i * 7) % 80}" for i in range(80)) + ";"
    text = (
        "namespace lightning_indexer { template <int kN> __global__ void __launch_bounds__(1024, 2) "
        f"greedy(volatile float* p, int n) {{ __shared__ int s[kN]; s[threadIdx.x % kN] = n; {body} p[1] = s[n]; }} }}"
    )
    (tmp_path / "greedy.cu").write_text(text)
    monkeypatch.setattr(compiler, "KERNEL_FOLDER", tmp_path)
    binary = compiler.compile_kernel(Specialisation("greedy.cu", "greedy", ("100",), "sm_90a"))
    assert binary.spill_bytes > 0 and (binary.registers, binary.shared_bytes) == (32, 400), binary


def test_usage_is_read_from_the_log() -> None:
    log = (
        "ptxas info    : Function properties for _Z1f\n"
        "ptxas         .     16 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 1 barriers, 400 bytes smem, 364 bytes cmem[0]\n"
    )
    assert compiler.read_usage(log) == {"registers": 32, "stack_bytes": 16, "spill_bytes": 52, "shared_bytes": 400}
    with pytest.raises(CompileError, match="did not report registers"):
        compiler.read_usage("something else")


# --- scorers: which one, and does it compile ------------------------------------------------------------------


@dataclass(frozen=True)
class Scorer:
    """What decides which kernel scores a call.

    Args:
        keys, queries: formats.
        wanted: queries per block that would suit the call.
        top_k: 0 for dense scores.
        is_listed: the call has candidates.
        is_short: hardly any list will run full.
    """

    arch: str
    keys: str
    queries: str
    wanted: int
    top_k: int
    engine: str = "auto"
    heads: int = 64
    dim: int = 128
    entries_per_block: int = 64
    is_listed: bool = False
    is_short: bool = False

    @property
    def schema(self) -> CacheSchema:
        return _schema(self.keys, self.entries_per_block, self.dim)

    @property
    def product(self) -> score_topk.Product:
        return score_topk._product(self.schema, self.queries, self.heads, self.arch, self.engine)

    @property
    def shape(self) -> score_topk.Shape:
        operands = (self.product, self.schema, self.heads, self.wanted, self.top_k, self.arch)
        return score_topk._shape(*operands, self.is_listed, self.is_short)

    @property
    def specialisation(self) -> Specialisation:
        return score_topk._score_specialisation(self.schema, self.product, self.shape, self.top_k == 0, self.arch)


@functools.cache
def _schema(format: str, entries_per_block: int, dim: int) -> CacheSchema:
    return CacheSchema(format, entries_per_block, head_dim=dim)


NATURAL = [(format, format) for format in score_topk.INDEX_FORMATS]
MODEL = [*NATURAL, ("mxfp4", "bf16"), ("mxfp4", "fp32")]


def scorers(
    arch: str, formats: list[tuple[str, str]], wanted: tuple[int, ...], top_k: tuple[int, ...], **others: object
) -> list[Scorer]:
    return [Scorer(arch, *pair, *rest, **others) for pair, *rest in itertools.product(formats, wanted, top_k)]


def odd_scorers(arch: str) -> list[Scorer]:
    """The fewest heads in short rows and blocks that a tile does not fill; the most heads."""
    return [
        *scorers(arch, [("mxfp4", "mxfp4"), ("bf16", "fp32")], (16,), (512,), heads=8, dim=64, entries_per_block=48),
        *scorers(arch, [("mxfp4", "mxfp4"), ("bf16", "fp32")], (1,), (512,), heads=128),
        *scorers(arch, [("mxfp4", "mxfp4")], (16,), (4096,), heads=128),
    ]


def listed_scorers(arch: str, **others: object) -> list[Scorer]:
    """The model's 32 heads, and what takes the most registers."""
    return [
        *scorers(arch, NATURAL, (1,), (512,), is_listed=True, heads=32, **others),
        *scorers(arch, [("mxfp4", "fp32")], (1,), (512,), is_listed=True, heads=128, **others),
        *scorers(arch, [("bf16", "fp32")], (1,), (4096,), is_listed=True, heads=128, **others),
    ]


# The model's calls where it matters most, and some of each kind elsewhere.
SAMPLE = {
    "sm_80": [*scorers("sm_80", MODEL, (16,), (512,)), *scorers("sm_80", NATURAL[:1], (1,), (0, 2048))],
    "sm_89": scorers("sm_89", [("mxfp4", "mxfp4"), ("bf16", "bf16")], (16,), (512,)),
    "sm_90a": [
        *scorers("sm_90a", MODEL, (1, 2, 16), (0, 512, 2048)),
        *scorers("sm_90a", [("mxfp4", "mxfp4"), ("fp8", "fp8")], (4,), (0, 512, 2048)),
        *scorers("sm_90a", NATURAL, (1,), (512,), is_short=True),
    ],
    "sm_90a-portable": [
        *scorers("sm_90a", MODEL, (1, 16), (512,), engine="portable"),
        *scorers("sm_90a", NATURAL[:1], (2, 16), (0, 2048), engine="portable"),
    ],
    "sm_100a": [*scorers("sm_100a", MODEL, (16,), (512,)), *scorers("sm_100a", NATURAL[:1], (1, 16), (0, 2048))],
    "sm_120a": [
        *scorers("sm_120a", [("mxfp4", "mxfp4")], (16,), (512,)),
        *scorers("sm_120a", [("bf16", "fp32")], (1,), (512, 4096), heads=128),  # one warpgroup is all that fits
    ],
    **{f"{arch}-odd": odd_scorers(arch) for arch in ARCHS},
    **{f"{arch}-listed": listed_scorers(arch) for arch in ARCHS},
    "sm_90a-portable-listed": listed_scorers("sm_90a", engine="portable"),
}


def shape_of(specialisation: Specialisation) -> score_topk.Shape:
    (text,) = (argument for argument in specialisation.arguments if argument.startswith("Shape<"))
    heads, queries, per_product, groups, capacity, _, stages, _, halves, top_k = map(int, re.findall(r"\d+", text))
    sizes = (heads, queries, per_product, groups, capacity, stages, halves, top_k)
    kind = {"is_listed": text.endswith(f" {top_k}, true>"), "holds_list": text.endswith("false, true>")}
    shape = score_topk.Shape(*sizes, **kind)
    assert str(shape) == text
    return shape


def troubles_of(wanted: Iterable[Specialisation]) -> Iterator[str]:
    """Spills, stack, and scorers with a copying feed that would wait for ever.

    Those take registers over from their producers, up to what the block could have been launched with (`BulkFeed` in
    kernels/feed.cuh). The compiler must have given the kernel that many.
    """
    for specialisation, binary in compile_all(wanted):
        if binary.spill_bytes or binary.stack_bytes:
            yield f"{binary.spill_bytes} bytes spilled, {binary.stack_bytes} bytes of stack: {specialisation}"
        if any(argument.startswith("BulkFeed<") for argument in specialisation.arguments):
            shape = shape_of(specialisation)
            most = 65536 // (shape.threads + score_topk._producer_threads(shape)) // 8 * 8
            if binary.registers != most:
                yield f"{binary.registers} registers, not {most}: {specialisation}"


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("name", SAMPLE)
def test_scorers_compile_without_spills(name: str) -> None:
    troubles = list(troubles_of(scorer.specialisation for scorer in SAMPLE[name]))
    assert not troubles, "\n".join(troubles)


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("arch", ARCHS)
def test_merging_compiles_without_spills(arch: str) -> None:
    troubles = list(
        troubles_of(
            score_topk._merge_specialisation(CacheSchema("mxfp4"), k, is_lone, arch)
            for k in (512, 2048, 4096)
            for is_lone in (True, False)
        )
    )
    assert not troubles, "\n".join(troubles)


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("arch", ARCHS)
def test_compressing_compiles_without_spills(arch: str) -> None:
    """The model's calls, and what takes the most registers; the rest is for `make check-kernels`."""
    index, kv, dtype = CacheSchema("mxfp4"), CacheSchema("fp8_ds_mla"), torch.bfloat16
    wanted = [
        compress.specialisation(index, dtype, 4, True, arch),
        *(compress.specialisation(kv, dtype, ratio, False, arch) for ratio in (4, 128)),
        compress.specialisation(kv, torch.float16, 128, False, arch),
        *(compress.keep_specialisation(dim, ratio, arch) for dim, ratio in ((128, 4), (512, 4), (512, 128))),
    ]
    troubles = list(troubles_of(wanted))
    assert not troubles, "\n".join(troubles)


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schema", INDEX_SCHEMAS + KV_SCHEMAS, ids=name_of)
def test_every_way_of_compressing_compiles_without_spills(schema: CacheSchema, arch: str) -> None:
    find = compress.kv_specialisations if schema in KV_SCHEMAS else compress.index_specialisations
    troubles = list(troubles_of(find(schema, arch)))
    assert not troubles, "\n".join(troubles)


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("schema", INDEX_SCHEMAS, ids=name_of)
def test_every_scorer_compiles_without_spills(schema: CacheSchema, arch: str) -> None:
    troubles = list(troubles_of(score_topk.specialisations(schema, arch)))
    assert not troubles, "\n".join(troubles)


TOP_K = (0, 1, 512, 513, 2048, 2049, 4096)  # 0 and both ends of each class


@pytest.mark.parametrize(
    ("arch", "engine"),
    [
        *((arch, "auto") for arch in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")),
        ("sm_90a", "portable"),
    ],
)
def test_every_call_has_a_shape_that_fits(arch: str, engine: str) -> None:
    calls = itertools.product(
        score_topk.INDEX_FORMATS, score_topk._QUERY_FORMATS, (1, 2, 4, 16), TOP_K, score_topk._PADDED_HEADS, (64, 128)
    )
    kinds = [{"is_listed": True}, {"is_short": True}, {}]
    for (keys, queries, wanted, top_k, heads, dim), kind in itertools.product(calls, kinds):
        if kind and wanted > 1:
            continue
        scorer = Scorer(arch, keys, queries, wanted, top_k, engine, heads, dim, **kind)
        product, shape = scorer.product, scorer.shape
        taken, limit = score_topk._shared_bytes(product, shape, scorer.schema), score_topk._shared_limit(arch)
        assert taken <= limit, f"{scorer}: {shape} takes {taken} of {limit} bytes"
        assert shape.queries <= wanted and shape.capacity >= 2 * top_k, f"{scorer}: {shape}"
        merging = score_topk._merge_shared_bytes(max(top_k, 1), shape.queries == 1, arch)
        assert merging <= limit, f"{scorer}: merging takes {merging} of {limit} bytes"


@pytest.mark.parametrize("multiprocessors", [132, 192])
def test_the_workspace_holds_every_launch(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_topk, "_multiprocessors", lambda _index: multiprocessors)
    for top_k in TOP_K[1:]:
        workspace = score_topk.workspace_bytes.__wrapped__(top_k, 0)
        assert workspace <= 64 * 2**20, f"top_k {top_k}: {workspace} bytes"
        calls = [(wanted, {}) for wanted in (1, 2, 4, 16)] + [(1, {"is_listed": True}), (1, {"is_short": True})]
        for keys, (wanted, kind) in itertools.product(score_topk.INDEX_FORMATS, calls):
            shape = Scorer("sm_90a", keys, keys, wanted, top_k, **kind).shape
            blocks = score_topk._blocks(shape.queries, shape.capacity, top_k, multiprocessors)
            taken = score_topk._workspace_bytes(blocks, shape.queries, shape.capacity, top_k)
            assert 1 <= blocks <= multiprocessors and taken <= workspace, f"top_k {top_k}, {shape}: {taken} bytes"


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cuda_wheels")
@pytest.mark.parametrize("format", ["bf16", "fp32"])
def test_the_largest_entries_can_be_appended(format: str) -> None:
    widest = CacheSchema(format, 2, head_dim=append.MAX_DIM)
    assert compiler.compile_kernel(append.specialisation(widest, torch.bfloat16, "nearest_even", "sm_80")).code


@pytest.mark.usefixtures("cuda_wheels")
def test_compile_errors_show_the_specialisation_and_the_log() -> None:
    wrong = Specialisation(
        "append.cu", "append_entries", ("Bf16<128>", "BFloat16", "Block<64, 512, 0, 32768>", "16"), "sm_80"
    )
    with pytest.raises(CompileError) as caught:
        compiler.compile_kernel(wrong)
    for words in (str(wrong), "Row and Block agree", "nvrtc", '#include "append.cu"'):
        assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("arch", ["sm_75", "sm_9", "compute_90", "sm_90x", ""])
def test_architectures_that_are_too_old_or_misspelt(arch: str) -> None:
    with pytest.raises(ValueError, match="arch must be sm_80 or newer .*, got"):
        Specialisation("append.cu", "append_entries", (), arch)


@pytest.mark.usefixtures("cuda_wheels")
def test_architectures_that_the_compiler_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"arch 'sm_999a' is not one that nvrtc .* compiles for: sm_80, "):
        compiler.compile_kernel(Specialisation(SMALL.source, SMALL.kernel, SMALL.arguments, "sm_999a"))


def test_missing_wheels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ImportError, match=r"needs cuda-core and NVRTC: pip install 'lightning-indexer\[cuda13\]'"):
        compiler.compiler_version.__wrapped__()


# --- the key --------------------------------------------------------------------------------------------------


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compiler_version", lambda: "a compiler")


def copy_of_kernels(folder: Path) -> Path:
    shutil.copytree(KERNEL_FOLDER, folder)
    return folder


@pytest.mark.usefixtures("version")
def test_the_key_follows_the_content_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = compiler.cache_key(SMALL)
    keys = {"original": original}
    for name in ("one", "other"):
        folder = copy_of_kernels(tmp_path / name)
        monkeypatch.setattr(compiler, "KERNEL_FOLDER", folder)
        monkeypatch.setattr(compiler.include_closure, "__defaults__", (folder,))
        for path in folder.iterdir():
            os.utime(path, (1, 1))
        assert compiler.cache_key(SMALL) == original, "the folder or a time is in the key"
    included = folder / "types.cuh"  # included by files that append.cu includes
    included.write_text(included.read_text() + "// changed\n")
    keys["an included file"] = compiler.cache_key(SMALL)
    (folder / "gather.cu").write_text("")
    assert compiler.cache_key(SMALL) == keys["an included file"], "a file that is not included is in the key"
    monkeypatch.setitem(compiler._OPTIONS, "fma", True)
    keys["an option"] = compiler.cache_key(SMALL)
    monkeypatch.setattr(compiler, "compiler_version", lambda: "another compiler")
    keys["the compiler"] = compiler.cache_key(SMALL)
    other = append.specialisation(CacheSchema("bf16", 64), torch.float32, "nearest_even", "sm_90a")
    keys["a template argument"] = compiler.cache_key(other)
    keys["the architecture"] = compiler.cache_key(Specialisation(SMALL.source, SMALL.kernel, SMALL.arguments, "sm_90"))
    assert len(set(keys.values())) == len(keys), keys


def test_block_stride_is_not_specialised_on() -> None:
    padded = CacheSchema("mxfp4", 64, block_stride=4608)
    for dtype in append.INPUT_TYPES:
        plain = append.specialisation(CacheSchema("mxfp4", 64), dtype, "nearest_even", "sm_80")
        assert append.specialisation(padded, dtype, "nearest_even", "sm_80") == plain


def test_parts_do_not_run_together() -> None:
    keys = {content_key(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"])}
    assert len(keys) == 5


def test_kernels_include_only_files_beside_them(tmp_path: Path) -> None:
    closure = compiler.include_closure("append.cu")
    assert list(closure)[0] == "append.cu" and {"formats.cuh", "types.cuh", "ptx.cuh"} <= set(closure)
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n')
    (tmp_path / "b.cuh").write_text('#include "a.cu"\n  #  include <cuda_bf16.h>\n')
    with pytest.raises(ValueError, match="b.cuh includes <cuda_bf16.h>: kernels include only files beside them"):
        compiler.include_closure("a.cu", tmp_path)


@pytest.mark.parametrize(
    ("parameters", "source", "kernel"),
    [
        (append.PARAMETERS, "append.cu", "append_entries"),
        (gather.PARAMETERS, "gather.cu", "gather_kv"),
        (score_topk.SCORE_PARAMETERS, "score.cu", "score_topk"),
        (score_topk.MERGE_PARAMETERS, "merge.cu", "merge_topk"),
        (candidates.PACK_PARAMETERS, "candidates.cu", "pack_candidates"),
        (candidates.MERGE_PARAMETERS, "candidates.cu", "merge_candidates"),
    ],
    ids=["append", "gather", "score", "merge", "pack-candidates", "merge-candidates"],
)
def test_parameters_are_those_of_the_kernel(parameters: Mapping[str, str], source: str, kernel: str) -> None:
    text = (KERNEL_FOLDER / source).read_text()
    found = re.search(rf"__global__ void [^;{{]*?\b{kernel}\(([^)]*)\)", text)
    assert found, f"{kernel} is not in {source}"
    kinds = {"int64_t": launcher.INT64, "int32_t": launcher.INT32, "float": launcher.FLOAT32}
    declared = {}
    for parameter in found[1].split(","):
        kind, name = parameter.strip().rsplit(" ", 1)
        declared[name] = launcher.POINTER if "*" in kind else kinds[kind]
    assert list(declared.items()) == list(parameters.items())


# --- the store ------------------------------------------------------------------------------------------------

FACTS = {"symbol": "f", "registers": 1, "stack_bytes": 0, "spill_bytes": 0, "shared_bytes": 0}


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, version: None) -> list[Specialisation]:
    """What was compiled, by a stand-in for the compiler."""
    done: list[Specialisation] = []

    def compile_kernel(specialisation: Specialisation) -> Binary:
        done.append(specialisation)
        return Binary(code=b"code of " + str(specialisation).encode(), **FACTS)

    monkeypatch.setattr(compiler, "compile_kernel", compile_kernel)
    return done


def test_build_compiles_once(tmp_path: Path, compilations: list[Specialisation]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = compiler.build(SMALL, Store(tmp_path / "new" / "folder"))
        second = compiler.build(SMALL, Store(tmp_path / "new" / "folder"))
    assert first == second and compilations == [SMALL]
    entries = list((tmp_path / "new/folder/kernels").iterdir())
    assert [entry.name for entry in entries] == [compiler.cache_key(SMALL)], "staging folders are left behind"
    facts = json.loads((entries[0] / "meta.json").read_text())["facts"]
    assert facts["specialisation"] == str(SMALL) and facts["compiler"] == "a compiler"


DAMAGE = {
    "binary-cut": lambda entry: (entry / "kernel.cubin").write_bytes(b"code"),
    "binary-empty": lambda entry: (entry / "kernel.cubin").write_bytes(b""),
    "binary-gone": lambda entry: (entry / "kernel.cubin").unlink(),
    "meta-cut": lambda entry: (entry / "meta.json").write_text('{"checksum": "'),
    "meta-not-text": lambda entry: (entry / "meta.json").write_bytes(b"\xff\xfe\x00"),
    "meta-gone": lambda entry: (entry / "meta.json").unlink(),
    "meta-of-another-kind": lambda entry: (entry / "meta.json").write_text("[]"),
    "facts-changed": lambda entry: (entry / "meta.json").write_text(
        (entry / "meta.json").read_text().replace('"registers": 1', '"registers": 2')
    ),
    "a-file": lambda entry: (shutil.rmtree(entry), entry.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entries_are_built_again_with_one_warning(
    damage: str, tmp_path: Path, compilations: list[Specialisation]
) -> None:
    store = Store(tmp_path)
    whole = compiler.build(SMALL, store)
    entry = tmp_path / "kernels" / compiler.cache_key(SMALL)
    DAMAGE[damage](entry)
    with pytest.warns(UserWarning, match=f"damaged kernel cache entry {re.escape(str(entry))}") as caught:
        assert compiler.build(SMALL, store) == whole
    assert len(caught) == 1 and len(compilations) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler.build(SMALL, store) == whole
    assert len(compilations) == 2 and len(list(entry.parent.iterdir())) == 1


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, compilations: list[Specialisation]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot keep compiled kernels in .*LIGHTNING_INDEXER_CACHE"):
        assert compiler.build(SMALL, Store(tmp_path / "file")).symbol == "f"
    assert compilations == [SMALL]


WRITER = """
import sys, warnings
from pathlib import Path
from lightning_indexer.cuda.store import Store
warnings.simplefilter("error", UserWarning)
store, worker = Store(Path(sys.argv[1])), int(sys.argv[2])
for turn in range(30):
    key, binary = f"{turn:064x}", bytes([turn]) * 40_000
    store.write(key, binary, {"turn": turn})
    found = store.read(key)
    assert found == (binary, {"turn": turn}), (worker, turn, found and found[1])
"""


def test_processes_that_write_the_same_entries(tmp_path: Path) -> None:
    """Each finds whole entries all the time, and nothing is left behind."""
    workers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], errors
    assert sorted(path.name for path in (tmp_path / "kernels").iterdir()) == [f"{turn:064x}" for turn in range(30)]


BUILDER = """
import os, sys
from lightning_indexer import CacheSchema
from lightning_indexer.cuda import append, compiler
import torch
schema = CacheSchema("mxfp4", 64)
made = [compiler.build(s) for s in append.specialisations(schema, "sm_90a")]
print(len(made), sum(len(binary.code) for binary in made))
"""


@pytest.mark.usefixtures("cuda_wheels")
def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "LIGHTNING_INDEXER_CACHE": str(tmp_path)}
    command = [sys.executable, "-W", "error::UserWarning:lightning_indexer", "-c", BUILDER]
    builders = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [builder.communicate(timeout=120)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0] and printed[0] == printed[1], printed
    assert len(list((tmp_path / "kernels").iterdir())) == int(printed[0].split()[0]) == 6


# --- the environment ------------------------------------------------------------------------------------------


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path) -> None:
    assert Environment.read({"LIGHTNING_INDEXER_CACHE": str(tmp_path / "new")}).cache_folder == tmp_path / "new"
    assert Environment.read({"LIGHTNING_INDEXER_CACHE": "~/kernels"}).cache_folder == Path.home() / "kernels"
    assert Environment.read({}).cache_folder.name == "lightning-indexer"


def test_a_bad_cache_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for value, words in (
        ("", "absolute path, got ''"),
        ("kernels", "absolute"),
        (str(tmp_path / "file"), "got the file"),
    ):
        with pytest.raises(ValueError, match=words):
            Environment.read({"LIGHTNING_INDEXER_CACHE": value})


# --- the launcher ---------------------------------------------------------------------------------------------


def test_arguments_lie_where_the_driver_looks() -> None:
    values = (2**63 + 5, -3, -7, 0.5, 2**40, True)
    buffer = launcher._ArgumentBuffer("PqifPi")
    pack_into, memory, address = buffer.place
    pack_into(memory, 0, *values)
    places = ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p))
    types = (ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_int32)
    assert tuple(kind.from_address(places[i]).value for i, kind in enumerate(types)) == values
    assert all(places[i] % ctypes.alignment(kind) == 0 for i, kind in enumerate(types))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> launcher.Kernel:
    """A kernel on a device that is not there; `submitted` collects what would go to the driver."""
    made = launcher.Kernel.__new__(launcher.Kernel)
    made.specialisation, made.device_index, made.threads, made.shared_bytes = SMALL, 0, 128, 1024
    made._names, made._arguments, made._function = ("entries", "count"), launcher._ArgumentBuffer("Pq"), "function"
    made.submitted, made.statuses = [], [0]
    made._submit = lambda *arguments: (made.submitted.append(arguments), (made.statuses.pop(0),))[1]
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    monkeypatch.setattr(launcher, "_error_text", lambda status: f"error {status}")
    return made


def test_a_launch_goes_to_the_current_stream(kernel: launcher.Kernel) -> None:
    kernel.launch((5, 2, 1), 0x1000, 7)
    (arguments,) = kernel.submitted
    assert arguments[:9] == ("function", 5, 2, 1, 128, 1, 1, 1024, 1000) and arguments[10:] == (0,)


def test_a_failed_launch_names_kernel_grid_and_arguments(kernel: launcher.Kernel) -> None:
    kernel.statuses = [700]
    with pytest.raises(launcher.LaunchError) as caught:
        kernel.launch((5, 1, 1), 0x1000, 7)
    for words in (
        "append_entries<Bf16<128>",
        "sm_90a",
        "cuda:0",
        "(5, 1, 1)",
        "128 threads",
        "entries=4096, count=7",
        "error 700",
    ):
        assert words in str(caught.value), str(caught.value)
    for arguments in ((1,), (1, 2, 3), (1, 0.5)):
        with pytest.raises(launcher.LaunchError, match=rf"grid \(1, 1, 1\).*{len(arguments)} of 2 arguments"):
            kernel.launch((1, 1, 1), *arguments)


def test_a_thread_without_a_context_gets_one(kernel: launcher.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(launcher, "_make_context_current", given.append)
    kernel.statuses = [201, 0]
    kernel.launch((1, 1, 1), 0, 0)
    assert given == [0] and len(kernel.submitted) == 2


def test_an_overlapping_launch_says_so_to_the_driver(kernel: launcher.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    seen = []

    def launch(config: Any, *arguments: Any) -> tuple[int]:
        (attribute,) = config.attrs
        grid, block = (config.gridDimX, config.gridDimY, config.gridDimZ), (config.blockDimX, config.blockDimY)
        allowed = attribute.value.programmaticStreamSerializationAllowed
        seen.append((grid, block, config.sharedMemBytes, int(config.hStream), attribute.id.name, allowed, arguments[0]))
        return (0,)

    monkeypatch.setattr(driver, "cuLaunchKernelEx", launch)
    kernel._submit = launcher._OverlappingLaunch()
    kernel.launch((5, 2, 1), 0x1000, 7)
    name = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
    assert seen == [((5, 2, 1), (128, 1), 1024, 1000, name, 1, "function")]


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((12, 0), "sm_120a")],
)
def test_the_architecture_of_a_device(capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: capability)
    assert launcher.device_arch.__wrapped__(0) == arch


def test_a_device_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "Tesla T4")
    with pytest.raises(NotImplementedError, match=r"need sm_80 or newer, got sm_75 \(Tesla T4\); impl='reference'"):
        launcher.device_arch.__wrapped__(0)
