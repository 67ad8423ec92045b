"""The documentation as pages, from what is read in the checkout, too.

``sphinx-build -W --keep-going -c notebooks . build/docs``, with the extra ``docs``.
"""

import argparse
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from docutils import nodes
from docutils.statemachine import StringList
from latex2mathml.converter import convert
from sphinx.util.docutils import SphinxDirective

import coded_torch
from coded_torch.cli.main import main

project = "coded_torch"
release = coded_torch.__version__
html_title = f"coded_torch {release}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = ["tables.js", "versions.js"]
html_theme_options = {"top_of_page_buttons": []}
html_math_renderer = "mathml"  # browsers know it: no script from elsewhere is needed
html_extra_path = ["index.html"]  # leads to the first page

root_doc = "notebooks/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "csrc/README.md",
    "notebooks/**",
]
exclude_patterns = [".*", "build", "coded_torch", "tests"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nb_execution_mode = "off"  # a test holds the stored outputs to what the cells print
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as GitHub names them, which the pages link to

autodoc_default_options = {"no-value": True, "special-members": "__call__"}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Figure": "matplotlib.figure.Figure"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    ("Calling raises", "params_style"),
    ("Opening raises", "params_style"),
    ("Starting raises", "params_style"),
    ("Raises in the replica", "params_style"),
    ("Reference", "References"),
]

# A reference to a name of this package must lead somewhere; insides have no page.
_INSIDE = r"_layout|_table|scheduling\.(policy|_latency_history)|input_space\.\w+"
_INSIDE += r"|workers\._(base|dispatch|live)"
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!coded_torch\.).*"),
    ("py:.*", rf"coded_torch\.({_INSIDE})\..*"),
]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_directive("commands", Commands)
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("build-finished", _finish)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-signature", _signature)


def _skip(app: Any, kind: str, name: str, value: Any, skip: bool, options: Any) -> bool:
    """Leave out the fields of named tuples, whose only text is their number."""
    return skip or (getattr(value, "__doc__", "") or "").startswith("Alias for field number")


def _signature(
    app: Any, kind: str, name: str, value: Any, options: Any, signature: str, returns: str
) -> tuple[str, str]:
    """Of codes, the arguments of ``__init__``: their ``__new__`` takes any, and keeps them."""
    if getattr(value, "_is_protocol", False):
        return "", returns
    if kind == "class" and signature == "(*args, **kwargs)":
        parameters = list(inspect.signature(value.__init__).parameters.values())[1:]
        plain = [one.replace(annotation=inspect.Parameter.empty) for one in parameters]
        signature = str(inspect.Signature(plain))
    return signature, returns


#: What the theme lacks for readers of screens, by axe's rules.
_MENDED = {
    'class="caption" role="heading">': 'class="caption" role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="All pages">',
    '<aside class="toc-drawer': '<aside aria-label="On this page" class="toc-drawer',
    '<div class="visually-hidden">': '<div class="visually-hidden" aria-hidden="true">',
}


def _finish(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        for page in Path(app.outdir).rglob("*.html"):
            text = page.read_text()
            for before, after in _MENDED.items():
                text = text.replace(before, after)
            # Arguments on lines of their own are no list of definitions.
            text = re.sub(r"<dl>\n(<dd>.*?</dd>)\n</dl>", _lines, text, flags=re.DOTALL)
            # The corner of a table is not a heading.
            page.write_text(re.sub(r'<th class="head[^"]*">(<p></p>)?</th>', "<td></td>", text))


def _lines(match: re.Match[str]) -> str:
    lines = match[1].replace("<dd>", '<span class="sig-line">').replace("</dd>", "</span>")
    return f"<span>{lines}</span>"


class _FoundError(Exception):
    """Holds the parser of the command."""


def commands() -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Yield the name, the description and the options of each command of ``coded-torch``."""
    with mock.patch.object(argparse.ArgumentParser, "parse_args", _hold):
        try:
            main(["info"])  # any command
        except _FoundError as found:
            (parser,) = found.args
    (several,) = (x for x in parser._actions if isinstance(x, argparse._SubParsersAction))
    for name, of in several.choices.items():
        formatter = of._get_formatter()
        every = []
        for action in of._actions:
            how = formatter._format_action_invocation(action)
            every.append((how, formatter._expand_help(action)))
        yield name, of.description or "", every


def _hold(parser: argparse.ArgumentParser, *_: Any) -> None:
    raise _FoundError(parser)


class Commands(SphinxDirective):
    """All commands and options, as argparse knows them."""

    def run(self) -> list[nodes.Node]:
        lines = []
        for name, what, options in commands():
            title = f"coded-torch {name}"
            lines += [title, "-" * len(title), "", what, ""]
            for how, text in options:
                lines += [f"``{how}``", f"   {text}", ""]
        return self.parse_text_to_nodes(StringList(lines, "argparse"), allow_section_headings=True)


def _formula(writer: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers draw."""
    how = "block" if isinstance(node, nodes.math_block) else "inline"
    writer.body.append(convert(node.astext(), display=how))
    raise nodes.SkipNode
