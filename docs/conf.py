"""Build the site: ``make docs`` writes it to ``build/docs``.

The build needs no network. References to other projects go by `inventories.py`; with
``DOCS_ONLINE=1`` they go by the inventories that those projects publish.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docutils.nodes import Element, TextElement
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import inventories  # noqa: E402
from sphinx.ext.intersphinx import resolve_reference_any_inventory  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

META = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = META["name"]
author = copyright = "the wsgi_dbsession contributors"
release = version = META["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
nitpicky = True
templates_path: list[str] = []

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

intersphinx_mapping = {
    name: (url, None if os.environ.get("DOCS_ONLINE") else path)
    for name, (url, path) in inventories.write(HERE.parent / "build" / "inventories").items()
}

html_baseurl = META["urls"]["Documentation"]
html_theme = "furo"
html_theme_options = {
    "source_repository": META["urls"]["Source"],
    "source_branch": "main",
    "source_directory": "docs/",
}
html_title = "wsgi_dbsession"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def link_to_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Lead links to files outside of ``docs/`` to the repository.

    They are relative, so that they work where the repository is read.
    """
    base = f"{META['urls']['Source']}/tree/main/"
    source[0] = re.sub(r"\]\((?:\.\./)+(examples|tests)\b", rf"]({base}\1", source[0])


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: TextElement
) -> Element | None:
    """Find a name that is written as the package's modules know it.

    They import the names of annotations for type checkers only, and docstrings name public
    objects by their last part.
    """
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py":
        return None
    if target.rpartition(".")[2] in inventories.PLAIN:
        return content
    python = env.domains.python_domain
    target = inventories.OURS.get(target, target)
    for full in (f"wsgi_dbsession.{target}", target):
        if full in python.objects:
            return python.resolve_xref(
                env, node["refdoc"], app.builder, "obj", full, node, content
            )
    node["reftarget"] = inventories.SHORT_NAMES.get(target, target)
    node["reftype"] = "obj"
    return resolve_reference_any_inventory(env, False, node, content)


def setup(app: Sphinx) -> None:
    """Register the above."""
    app.connect("missing-reference", resolve)
    app.connect("source-read", link_to_source)
