"""A Sphinx extension: docstrings and code spans of this project, as they are written.

* Code in one pair of backticks, in docstrings and in Markdown, is code, as GitHub and editors show it. Where it starts
  with a public name it is also a reference: `score_topk`, `LayerCacheHandle.begin_step(static=True)`. A class that has
  no such member is then a reference to nothing, which fails.
* An indented paragraph is a formula or an example, not a quotation.
* `Returns:` may name several results, as `Args:` names arguments.
"""

import inspect
import re
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

MODULES = ("lightning_indexer", "lightning_indexer.integrations.engines", "lightning_indexer.integrations.transformers")
REFERENCE = re.compile(r"([A-Za-z_][\w.]*)(\(.*\))?", re.DOTALL)
SECTION = re.compile(r"[A-Z][a-z]+:$")
RESULT = re.compile(r"(\w+): ")


def public_names() -> dict[str, str]:
    """Public name -> its full name, as the API pages document it."""
    return {name: f"{module}.{name}" for module in MODULES for name in names_of(module)}


def names_of(module: str) -> list[str]:
    """`__all__`, or the functions and classes that a module without one defines and does not hide."""
    found = import_module(module)
    own = [n for n, v in vars(found).items() if getattr(v, "__module__", "") == module and not n.startswith("_")]
    return list(getattr(found, "__all__", own))


def target(code: str, names: dict[str, str]) -> str | None:
    """The full name that a piece of code refers to, if it starts with a public name."""
    match = REFERENCE.fullmatch(code)
    if match is None:
        return None
    first, _, member = match[1].removeprefix("lightning_indexer.").partition(".")
    if first not in names:
        return None
    return names[first] if not member or is_field(names[first], member) else f"{names[first]}.{member}"


def is_field(full_name: str, member: str) -> bool:
    """Whether it is data of a class, which the class's own docstring tells of, and which has no entry of its own."""
    module, _, name = full_name.rpartition(".")
    found = getattr(import_module(module), name)
    if member in getattr(found, "__dataclass_fields__", {}):
        return True
    return inspect.isclass(found) and f"self.{member} = " in inspect.getsource(found)


class CodeSpans(SphinxTransform):
    """Turn code spans into literals, and those that start with a public name into references."""

    default_priority = 5  # before references are resolved

    def apply(self, **_options: Any) -> None:
        names = public_names()
        for node in list(self.document.findall(lambda n: isinstance(n, nodes.title_reference | nodes.literal))):
            if isinstance(node.parent, addnodes.pending_xref | nodes.reference):
                continue
            code = node.astext()
            literal, full = nodes.literal(code, code), target(code, names)
            if full is not None:
                where = {"refdomain": "py", "reftype": "obj", "reftarget": full, "refdoc": self.env.docname}
                reference = addnodes.pending_xref(code, literal, **where)
                reference.source, reference.line = node.source, node.line
                literal = reference
            node.replace_self(literal)


def rewrite(_app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """A docstring as reStructuredText, up to the sections that napoleon reads."""
    lines[:] = named_results(literal_blocks(lines))
    if what == "property":
        lines[:0] = ["..", ""]  # a comment: napoleon takes what is before a colon in the first line for a type


def literal_blocks(lines: list[str]) -> list[str]:
    """Mark indented paragraphs outside sections as literal."""
    out: list[str] = []
    in_section = in_block = False
    for i, line in enumerate(lines):
        is_indented = line.startswith("    ")
        if line and not is_indented:
            in_section, in_block = bool(SECTION.match(line)), False
        if is_indented and not in_section and not in_block and not lines[i - 1]:
            out += ["::", ""]
            in_block = True
        out.append(line)
    return out


def named_results(lines: list[str]) -> list[str]:
    """`Returns:` as a field: of one text, or a list of named results where there are several."""
    if "Returns:" not in lines:
        return lines
    start = lines.index("Returns:")
    end = next((i for i in range(start + 1, len(lines)) if lines[i] and lines[i][0] != " "), len(lines))
    body = [line[4:] for line in lines[start + 1 : end]]
    if len([line for line in body if RESULT.match(line)]) > 1:
        body = ["", *(RESULT.sub(r"* **\1**: ", line) if RESULT.match(line) else "  " + line for line in body)]
    return [*lines[:start], ":returns:", *("    " + line for line in body), "", *lines[end:]]


def setup(app: Any) -> dict[str, Any]:
    app.add_transform(CodeSpans)
    app.connect("autodoc-process-docstring", rewrite, priority=400)  # napoleon comes at 500
    return {"parallel_read_safe": True}
