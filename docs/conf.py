"""How the documentation is built: `make docs`, offline, with every warning an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import lightning_indexer

project = "lightning-indexer"
author = "the lightning-indexer authors"
version = release = lightning_indexer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings"]
source_suffix = {".md": "markdown"}
exclude_patterns = []
nitpicky = True  # a reference to nothing is a warning
# What other projects document, and is not looked up, since building needs no network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|os|contextlib|collections\.abc)\..*|Tensor|EngineQuery|PathLike.*")
]

myst_heading_anchors = 3  # as GitHub makes them, so that links work in both places

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"EngineQuery": "EngineQuery"}
python_maximum_signature_line_length = 100

html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "240px", "fixed_sidebar": True}
html_show_copyright = html_show_sourcelink = html_copy_source = False
