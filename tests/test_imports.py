"""Who may import whom. The tree is the architecture: an edge that is not listed here is a mistake or a decision."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_indexer

ROOT = Path(lightning_indexer.__file__).parent
PACKAGE = "lightning_indexer"

# A module, or a folder ending in ".", and what it may import from the package; the most specific line counts.
ALLOWED = {
    "config": (),
    "formats": (),
    "rotary": (),
    "selection": (),
    "checks": (),
    "precision": (),
    "cache": (),
    "cache.schema": (),
    "cache.pool": ("cache.schema", "cache.transfer"),
    "cache.ring": ("cache.step",),
    "cache.step": ("cache.transfer",),
    "cache.transfer": (),
    "cache.view": ("cache.schema", "checks"),
    "query": ("checks", "formats"),
    "reference": ("cache.view", "formats", "query", "rotary"),
    "tracing": ("cache.schema", "cache.view", "query"),
    "score_arguments": ("cache.view", "checks", "query"),
    "ops.": (
        "cache.ring",
        "cache.step",
        "cache.view",
        "checks",
        "formats",
        "precision",
        "query",
        "reference",
        "rotary",
        "score_arguments",
        "selection",
        "tracing",
    ),
    "torch_library": ("cache.view", "ops.", "tracing"),
    "cpu.": ("cache.view", "cpu.", "formats", "precision", "query", "selection"),
    "cuda.": ("cache.schema", "cache.step", "cache.view", "cuda.", "formats", "query"),
    "cache.handle": ("cache.", "checks", "config", "ops.append"),
    "nn.": ("cache.", "checks", "config", "formats", "nn.", "ops.", "precision", "query", "rotary"),
    "checkpoint": ("config", "formats"),
    "integrations": (),
    "integrations.": ("cache.", "checks", "config", "formats", "integrations.", "ops.", "query", "rotary"),
}
ALLOWED_LAZILY = {"ops.": ("cpu.", "cuda.")}  # inside a function: an implementation is loaded when it is used
APPLICATIONS = ("__main__", "cli", "doctor", "demo.", "bench.", "__init__", "")  # may use everything
THIRD_PARTY = {"torch", "safetensors"}  # all that the library itself may need to be imported
THIRD_PARTY_LAZILY = {"cuda.": {"cuda", "platformdirs"}}
THIRD_PARTY_OF = {"integrations.": {"transformers"}}  # nothing else imports these modules


def modules() -> list[str]:
    names = (str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in ROOT.rglob("*.py"))
    return sorted(name.removesuffix("__init__").rstrip(".") or "__init__" for name in names)


def matches(name: str, pattern: str) -> bool:
    return name == pattern or (pattern.endswith(".") and (name + ".").startswith(pattern))


def rule(name: str, rules: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    fitting = [pattern for pattern in rules if matches(name, pattern)]
    return rules[max(fitting, key=len)] if fitting else None


def library_modules() -> list[str]:
    return [name for name in modules() if not any(matches(name, app) for app in APPLICATIONS)]


def imports(name: str) -> list[tuple[str, bool]]:
    """(imported module, whether inside a function) of every import statement in a module."""
    path = ROOT / (name.replace(".", "/") + ".py")
    tree = ast.parse((path if path.exists() else ROOT / name.replace(".", "/") / "__init__.py").read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: imports are absolute"
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                is_module = target.removeprefix(PACKAGE + ".") in modules()
                found.append((target if is_module else node.module, id(node) in inside))
    return found


@pytest.mark.parametrize("name", library_modules())
def test_imports_only_what_the_architecture_allows(name):
    allowed = rule(name, ALLOWED)
    assert allowed is not None, f"{name} is a new module: say in ALLOWED what it may import"
    lazily = rule(name, ALLOWED_LAZILY) or ()
    for target, is_lazy in imports(name):
        top = target.split(".")[0]
        if top == PACKAGE:
            inner = target.removeprefix(PACKAGE).lstrip(".")
            ok = any(matches(inner, pattern) for pattern in allowed + (lazily if is_lazy else ()))
            assert ok, f"{name} must not import {inner}"
        else:
            lazy = next((found for pattern, found in THIRD_PARTY_LAZILY.items() if matches(name, pattern)), set())
            own = next((found for pattern, found in THIRD_PARTY_OF.items() if matches(name, pattern)), set())
            ok = top in THIRD_PARTY | own or top in sys.stdlib_module_names or (is_lazy and top in lazy)
            assert ok, f"{name} must not import {top}"


def test_ops_do_not_import_one_another():
    for name in library_modules():
        if name.startswith("ops."):
            others = [target for target, _ in imports(name) if target.startswith(f"{PACKAGE}.ops.")]
            assert not others, f"{name} imports {others}"


def test_package_imports_without_anything_optional():
    blocked = "cuda, cupy, triton, transformers, matplotlib, ml_dtypes, typer, rich"
    code = (
        "import sys\n"
        f"for name in '{blocked}'.split(', '): sys.modules[name] = None\n"
        "import lightning_indexer, lightning_indexer.integrations\n"
        "assert lightning_indexer.score_topk\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    missing = [name for name in lightning_indexer.__all__ if not hasattr(lightning_indexer, name)]
    assert not missing, f"in __all__ but not in the package: {missing}"
