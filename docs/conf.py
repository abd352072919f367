"""Settings of the documentation's builder, Sphinx; see `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

project = "flash_sparse_attn"
author = "The flash_sparse_attn authors"
copyright = "The flash_sparse_attn authors"
release = re.search(r'"(.+)"', (ROOT / "src/flash_sparse_attn/_version.py").read_text())[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"flash_sparse_attn {release}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Names in single backticks are links where they name something that is documented.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, which types do not
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
