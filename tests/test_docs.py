"""The documentation: links that lead somewhere, public names and their docstrings, tables made from measurements."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links, crossover = load("links"), load("crossover")

# --- links ------------------------------------------------------------------------------------------------------


def test_links_and_named_files_are_there():
    dead, _ = links.check()
    assert not dead, "\n".join(dead)


def write_pages(root: Path, **pages: str) -> None:
    (root / "docs").mkdir()
    for name, text in pages.items():
        (root / f"{name.replace('__', '/')}.md").write_text(text)


@pytest.mark.parametrize(
    ("line", "dead"),
    [
        ("[a](docs/guide.md)", False),
        ("[a](docs/guide.md#in-two-words)", False),
        ("[a](docs/guide.md#twice-1)", False),
        ("[a](docs/guide.md#topk-of-all)", False),
        ("[a](#page)", False),
        ("`docs/guide.md`, `docs/`, `docs and so on`", False),
        ("```\n[a](docs/none.md) `docs/none.py`\n```", False),
        ("[a](docs/none.md)", True),
        ("[a](docs/guide.md#in-three-words)", True),
        ("[a](docs/guide.md#twice-2)", True),
        ("[a](#guide)", True),
        ("![a](docs/none.png)", True),
        ("[a][b]\n\n[b]: docs/none.md", True),
        ("| a |\n|---|\n| [a](docs/none.md) |", True),
        ("[a](../outside.md)", True),
        ("`docs/none.py`", True),
    ],
)
def test_what_leads_nowhere_is_found(line, dead, tmp_path):
    (tmp_path / "outside.md").touch()
    root = tmp_path / "repository"
    root.mkdir()
    write_pages(
        root, README=f"# Page\n{line}\n", docs__guide="# In, two *words*\n## Twice\n## Twice\n## `topk` of all\n"
    )
    found, elsewhere = links.check(root)
    assert (len(found) == 1 and "README.md" in found[0] if dead else not found) and not elsewhere, found


def test_links_to_elsewhere_are_listed(tmp_path):
    write_pages(tmp_path, docs__guide="<https://example.org/a> and [mail](mailto:a@example.org)")
    assert links.check(tmp_path) == (
        [],
        [f"docs/guide.md: {to}" for to in ("https://example.org/a", "mailto:a@example.org")],
    )


# --- the API ----------------------------------------------------------------------------------------------------


def public_names() -> list[tuple[str, str]]:
    """(module, name), by the rule of the extension that makes references of them."""
    pytest.importorskip("sphinx", reason="needs the extra docs")
    docstrings = load("docstrings")
    return [(module, name) for module in docstrings.MODULES for name in docstrings.names_of(module)]


def test_every_public_name_is_documented_once():
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/api").glob("*.md")))
    listed, module = [], ""
    for directive, name in re.findall(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)$", pages, re.MULTILINE):
        if directive == "currentmodule":
            module = name
        elif "." not in name:
            listed.append((module, name))
    assert sorted(listed) == sorted(public_names())


def test_every_public_name_and_member_has_a_docstring():
    bare = []
    for module, name in public_names():
        found = getattr(importlib.import_module(module), name)
        parts = {name: found} | (
            {f"{name}.{n}": v for n, v in own_members(found).items()} if inspect.isclass(found) else {}
        )
        bare += [part for part, value in parts.items() if not (value.__doc__ or "").strip()]
    assert not bare, f"without a docstring: {bare}"


def own_members(cls: type) -> dict[str, object]:
    """Public methods and properties that a class defines itself."""
    kinds = (property, classmethod, staticmethod)
    own = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
    return {name: value for name, value in own.items() if isinstance(value, kinds) or inspect.isfunction(value)}


def test_code_that_starts_with_a_public_name_is_a_reference():
    pytest.importorskip("sphinx", reason="needs the extra docs")
    docstrings = load("docstrings")
    names = docstrings.public_names()
    cases = {
        "score_topk": "lightning_indexer.score_topk",
        "lightning_indexer.score_topk": "lightning_indexer.score_topk",
        "LayerCacheHandle.begin_step(static=True)": "lightning_indexer.LayerCacheHandle.begin_step",
        "LayerCacheHandle.no_such_name": "lightning_indexer.LayerCacheHandle.no_such_name",
        "DSV4Config.indexer_hadamard": "lightning_indexer.DSV4Config",  # a field: where its class lists it
        "LayerCacheHandle.window": "lightning_indexer.LayerCacheHandle",
        "accelerate": "lightning_indexer.integrations.transformers.accelerate",
        "top_k": None,
        "score_topk or not": None,
        "torch.topk": None,
    }
    assert {code: docstrings.target(code, names) for code in cases} == cases


DOCSTRING = """One line.

    a formula * of two ** factors

Args:
    x: what it is,
        and more.
Returns:
    first: one
        and its rest.
    second: two
"""


def test_docstrings_become_restructured_text():
    pytest.importorskip("sphinx", reason="needs the extra docs")
    lines = DOCSTRING.splitlines()
    load("docstrings").rewrite(None, "function", "", None, None, lines)
    text = "\n".join(lines)
    assert "::\n\n    a formula * of two ** factors\n" in text
    assert "\n    x: what it is,\n        and more.\n" in text
    assert ":returns:\n    \n    * **first**: one\n          and its rest.\n    * **second**: two" in text


def test_a_colon_in_a_property_is_not_a_type():
    pytest.importorskip("sphinx", reason="needs the extra docs")
    from sphinx.ext.napoleon import Config, GoogleDocstring

    lines = ["Whether layers share entries: yes or no."]
    load("docstrings").rewrite(None, "property", "", None, None, lines)
    assert "share entries: yes" in str(GoogleDocstring(lines, Config(), what="property", name="shares"))


NOWHERE = """# Page

`LayerCacheHandle.begin_stepp`

[a](none.md), [b](#nowhere)

```{eval-rst}
.. autofunction:: lightning_indexer.no_such_name
.. py:function:: other(x: no.such.Type)
```
"""


def test_the_site_is_not_built_with_references_to_nothing(tmp_path):
    pytest.importorskip("myst_parser", reason="needs the extra docs")
    (tmp_path / "index.md").write_text(NOWHERE)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-b", "dummy"]
    done = subprocess.run([*command, str(tmp_path), str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "WARNING" in line]
    for name in ("LayerCacheHandle.begin_stepp", "none.md", "nowhere", "no_such_name", "no.such.Type"):
        assert any(name in line for line in lines), f"{name} was not missed:\n{done.stderr}"


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", crossover.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_measurements(page):
    assert page.read_text(encoding="utf-8") == crossover.filled(page), "run python docs/crossover.py"


@pytest.mark.parametrize(
    ("ours", "theirs", "cell"),
    [
        (2.0, 1.0, "**peer, 2.0 x**"),
        (1.0, 2.0, "`score_topk`, 2.0 x"),
        (1.0, 1.09, "**equal**"),
        (1.09, 1.0, "**equal**"),
        (1.0, 1.1, "`score_topk`, 1.1 x"),
        (1.1, 1.0, "**peer, 1.1 x**"),
    ],
)
def test_the_quicker_is_named(ours, theirs, cell):
    assert crossover.winner(ours, theirs, "peer") == cell


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (14.4, "14.4 s"),
        (0.0982, "98.2 ms"),
        (1.2345, "1.23 s"),
        (23.1e-6, "23.1 us"),
        (0.9996, "1 s"),
        (9.6e-7, "0.96 us"),
    ],
)
def test_times_have_three_digits(seconds, words):
    assert crossover.time(seconds) == words
