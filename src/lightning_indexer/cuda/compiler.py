"""From a kernel file and template arguments to a binary: NVRTC through `cuda.core`, kept in a `Store`.

The kernels are ordinary files in `kernels/`. What is compiled is one line that includes such a file and one that
instantiates a template of it; choosing the template arguments is the business of the Python file beside the kernel.
No GPU is needed, nor nvcc, nor any header but those in `kernels/`.
"""

import functools
import importlib.metadata
import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lightning_indexer.cuda.environment import Environment
from lightning_indexer.cuda.store import Store, content_key

KERNEL_FOLDER = Path(__file__).parent / "kernels"
OLDEST_ARCH = 80  # bf16 arithmetic and cp.async begin there
_INSTALL = "pip install 'lightning-indexer[cuda13]' (or [cuda12])"

# Results must not depend on what a compiler contracts or flushes: a kernel that wants a*b+c in one rounding says fmaf.
_OPTIONS = {"std": "c++17", "fma": False, "ftz": False, "prec_div": True, "prec_sqrt": True, "ptxas_options": ["-v"]}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]', re.MULTILINE)


@dataclass(frozen=True)
class Specialisation:
    """One instantiation of a kernel template, for one architecture.

    Args:
        source: file in `kernels/`, "append.cu".
        kernel: the template in it, in namespace lightning_indexer.
        arguments: template arguments as C++ text, in order.
        arch: "sm_80", "sm_90a" and so on.
    """

    source: str
    kernel: str
    arguments: tuple[str, ...]
    arch: str

    def __post_init__(self) -> None:
        check_arch(self.arch)

    @property
    def expression(self) -> str:
        """append_entries<Mxfp4<128, ...>, ...>"""
        return f"{self.kernel}<{', '.join(self.arguments)}>"

    @property
    def unit(self) -> str:
        """The text to compile."""
        return (
            f'#include "{self.source}"\n'
            "namespace lightning_indexer {\n"
            f"template __global__ decltype({self.expression}) {self.expression};\n"
            "}\n"
            "using namespace lightning_indexer;\n"  # the compiler looks the name up from outside
        )

    def __str__(self) -> str:
        return f"{self.expression} for {self.arch}"


@dataclass(frozen=True)
class Binary:
    """A compiled specialisation, and what the compiler said about it.

    Args:
        code: cubin.
        symbol: mangled name of the kernel in it.
        registers, stack_bytes, spill_bytes: per thread. Kernels here have neither stack nor spills; a test sees to it.
        shared_bytes: static shared memory per block.
    """

    code: bytes
    symbol: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


class CompileError(RuntimeError):
    """A kernel does not compile; the message holds the specialisation and the compiler's log."""


def build(specialisation: Specialisation, store: Store | None = None) -> Binary:
    """The binary of a specialisation, from the store if it is there; otherwise compile it and put it there.

    Args:
        store: default: the folder that LIGHTNING_INDEXER_CACHE names, see `Environment`.
    """
    store = store or Store(Environment.read().cache_folder)
    key = cache_key(specialisation)
    found = store.read(key)
    if found is not None:
        code, facts = found
        wanted = {field.name for field in fields(Binary)} - {"code"}
        return Binary(code, **{name: facts[name] for name in wanted})
    binary = compile_kernel(specialisation)
    facts = {name: value for name, value in asdict(binary).items() if name != "code"}
    store.write(key, binary.code, {**facts, "specialisation": str(specialisation), "compiler": compiler_version()})
    return binary


def compile_kernel(specialisation: Specialisation) -> Binary:
    """Compile without looking at any store. Raises CompileError with the compiler's log."""
    from cuda.core import Program, ProgramOptions

    check_compiler_knows(specialisation.arch)
    log = io.StringIO()
    options = ProgramOptions(
        arch=specialisation.arch, name="specialisation.cu", include_path=[str(KERNEL_FOLDER)], **_OPTIONS
    )
    try:
        program = Program(specialisation.unit, "c++", options)
        result = program.compile("cubin", name_expressions=(specialisation.expression,), logs=log)
    except Exception as error:  # NVRTCError, which cuda.core keeps private; its text ends with the log
        text = str(error).replace("\0", "").rstrip()
        raise CompileError(
            f"{specialisation} does not compile with {compiler_version()}\n{text}\nspecialisation.cu was\n"
            f"{specialisation.unit}"
        ) from error
    symbol = result.symbol_mapping[specialisation.expression]
    return Binary(
        code=bytes(result.code),
        symbol=symbol.decode() if isinstance(symbol, bytes) else symbol,
        **read_usage(log.getvalue()),
    )


def read_usage(log: str) -> dict[str, int]:
    """Registers, stack, spills and shared memory from the log of `ptxas -v` over one kernel."""

    def number(pattern: str) -> int | None:
        found = re.search(pattern, log)
        return int(found[1]) if found else None

    registers, stack = number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame")
    stores, loads = number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes spill loads")
    if registers is None or stack is None or stores is None or loads is None:
        raise CompileError(f"the compiler did not report registers and spills; its log was:\n{log}")
    return {
        "registers": registers,
        "stack_bytes": stack,
        "spill_bytes": stores + loads,
        "shared_bytes": number(r"(\d+) bytes smem") or 0,
    }


def cache_key(specialisation: Specialisation) -> str:
    """Everything that the binary depends on: text, included files, options, compiler, architecture."""
    sources = include_closure(specialisation.source)
    options = [f"{name}={value}" for name, value in sorted(_OPTIONS.items())]
    return content_key(
        [
            specialisation.unit,
            str(len(sources)),
            *(text for source in sources.items() for text in source),
            *options,
            compiler_version(),
            specialisation.arch,
        ]
    )


def include_closure(source: str, folder: Path = KERNEL_FOLDER) -> Mapping[str, str]:
    """Name and text of a kernel file and of every file that it includes, itself first."""
    closure: dict[str, str] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name in closure:
            continue
        closure[name] = (folder / name).read_text(encoding="utf-8")
        for bracket, included in _INCLUDE.findall(closure[name]):
            if bracket == "<":
                raise ValueError(
                    f"{name} includes <{included}>: kernels include only files beside them, because those alone are "
                    "in the cache key and on every user's machine"
                )
            waiting.append(included)
    return closure


def check_arch(arch: str) -> None:
    """Raise ValueError unless the kernels are written for this architecture."""
    found = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if not found or int(found[1]) < OLDEST_ARCH:
        raise ValueError(f"arch must be sm_{OLDEST_ARCH} or newer (sm_90a, sm_100a, ...), got {arch!r}")


def check_compiler_knows(arch: str) -> None:
    """Raise ValueError unless the compiler that is installed knows this architecture."""
    check_arch(arch)
    known = known_archs()
    if arch.rstrip("af") not in known:
        raise ValueError(f"arch {arch!r} is not one that {compiler_version()} compiles for: {', '.join(known)}")


def known_archs() -> list[str]:
    """Architectures that the compiler and the kernels serve, without the variants: "sm_80", "sm_90" and so on."""
    version = compiler_version()  # says what is missing, if something is
    from cuda.bindings import nvrtc

    status, numbers = nvrtc.nvrtcGetSupportedArchs()
    assert not status, f"{version} does not say which architectures it knows: {status}"
    return [f"sm_{number}" for number in numbers if number >= OLDEST_ARCH]


@functools.cache
def compiler_version() -> str:
    """Such as "nvrtc 13.0 (nvidia-cuda-nvrtc 13.0.88)", the second part where NVRTC comes as a wheel."""
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"the CUDA implementation needs cuda-core and NVRTC: {_INSTALL} ({error})") from error
    wheels = ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{major}")
    installed = [f" ({name} {version})" for name in wheels if (version := _wheel_version(name))]
    return f"nvrtc {major}.{minor}{''.join(installed)}"


def _wheel_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
