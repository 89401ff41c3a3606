"""Check that what the Markdown files here point to is there; list links to elsewhere, which are not fetched.

    python docs/links.py

Checked are links to files and headings, as GitHub and the site resolve both, and files named in code spans, such as
`tests/test_imports.py`.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
MARKDOWN = MarkdownIt("commonmark").enable("table")
NAMED_FILE = re.compile(r"(?:docs|tests|benchmarks|examples|src)/[\w./-]*")


def pages(root: Path = ROOT) -> list[Path]:
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def check(root: Path = ROOT) -> tuple[list[str], list[str]]:
    """What is dead, and what lies elsewhere; each a line that names its page."""
    dead, elsewhere = [], []
    for page in pages(root):
        name = page.relative_to(root)
        for kind, target in targets(page):
            if kind == "link" and re.match(r"[a-z]+:", target):
                elsewhere.append(f"{name}: {target}")
            elif kind == "link" and not link_leads_somewhere(page, target, root):
                dead.append(f"{name}: link to {target} leads nowhere")
            elif kind == "code" and NAMED_FILE.fullmatch(target) and not (root / target).exists():
                dead.append(f"{name}: there is no {target}")
    return dead, elsewhere


def link_leads_somewhere(page: Path, target: str, root: Path) -> bool:
    path, _, anchor = target.partition("#")
    file = (page.parent / unquote(path)).resolve() if path else page
    if not file.exists() or not file.is_relative_to(root.resolve()):
        return False
    return not anchor or (file.suffix == ".md" and anchor in anchors(file))


def targets(page: Path) -> Iterator[tuple[str, str]]:
    """("link", target) and ("code", text) of a page."""
    for token in inline_tokens(page):
        if token.type in ("link_open", "image"):
            yield "link", str(token.attrs["href" if token.type == "link_open" else "src"])
        elif token.type == "code_inline":
            yield "code", token.content


def inline_tokens(page: Path) -> Iterator[Token]:
    for block in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        yield from block.children or []


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them: the second of one name gets "-1", and so on."""
    tokens, found = MARKDOWN.parse(page.read_text(encoding="utf-8")), {}
    for opening, title in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(child.content for child in title.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
    return {slug + (f"-{i}" if i else "") for slug, count in found.items() for i in range(count + 1)}


if __name__ == "__main__":
    dead, elsewhere = check()
    print(f"{len(pages())} pages, {len(elsewhere)} links to elsewhere, not fetched", *elsewhere, sep="\n  ")
    sys.exit("\n".join(dead) or 0)
