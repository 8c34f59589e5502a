"""Sphinx settings of the documentation site; `make docs` builds it into build/docs with warnings as errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import aem_jax

project = "aem_jax"
author = "the authors of aem_jax"
copyright = "2026, the authors of aem_jax"
version = release = aem_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "docstrings",
    "commands",
    "settings",
    "source_pages",
]

html_theme = "sphinx_book_theme"
html_title = "aem_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
html_show_sphinx = False
smartquotes = False  # `--option` stays as it is written
toc_object_entries_show_parents = "hide"

exclude_patterns = ["_ext", "_static"]
suppress_warnings = ["config.cache"]

# `$` stands in shell commands, not for mathematics: equations are preformatted text, as in the docstrings.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "mailto": None, "source": None}
copybutton_exclude = ".linenos, .gp"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# A name in single backticks is code, in docstrings as in the pages.
default_role = "code"

# Types of other packages have pages elsewhere, which a build without a network cannot look up.
_OTHERS = "ArrayLike|DTypeLike|jax|jaxlib|jnp|numpy|np|flax|nnx|optax|collections|enum|typing|pathlib"
nitpick_ignore_regex = [
    (r"py:.*", r"aem_jax\.(models|sampler|envs)(\.\w+)+\.\w+"),  # of these, the names in `__all__` have pages
    (r"py:class", r"tuple\[str"),  # autodoc's cut through `tuple[str, …]` in the signature of a dataclass
    (r"py:.*", rf"({_OTHERS})(\..*)?"),
]
