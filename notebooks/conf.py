"""The documentation as pages, from what is read in the checkout, too.

``sphinx-build -W --keep-going -c notebooks . build/docs``, with the extra ``docs``.
"""

import inspect
from typing import Any

import coded_torch

project = "coded_torch"
release = coded_torch.__version__
html_title = f"coded_torch {release}"
html_theme = "furo"
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
_INSIDE = r"scheduling\.(policy|latency_history)|input_space\.\w+|workers\.(dispatch|live|faults)"
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!coded_torch\.).*"),
    ("py:.*", rf"coded_torch\.({_INSIDE})\..*"),
]


def setup(app: Any) -> None:
    """Called by Sphinx."""
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
