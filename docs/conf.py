"""How `make docs` turns this folder into pages: Sphinx reads the Markdown through MyST."""

from lit_align import __version__

project = "lit_align"
author = "The lit_align developers"
version = release = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["myst.xref_missing"]  # links to files outside this folder; the tests follow every link
html_theme = "furo"
