"""What commands read and write: options that are checked, lines, and files."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "SUFFIXES",
    "OutputError",
    "UsageError",
    "find_factory",
    "in_range",
    "need",
    "output_path",
    "save",
    "say",
]

#: Of pictures.
SUFFIXES = (".pdf", ".png", ".svg")


class UsageError(Exception):
    """What the user must change, in one line."""


class OutputError(Exception):
    """Standard output cannot be written."""


def say(text: str = "", end: str = "\n") -> None:
    """Print at once: an output that cannot be written is found before more work is done for it."""
    if sys.stdout is None:
        raise OutputError("it is closed")
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        # Or the interpreter would fail to flush what is left at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(error) from error


def need(command: str, extra: str, *packages: str) -> None:
    """Raise a UsageError unless the packages of an extra are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"coded-torch {command} needs {' and '.join(missing)}: "
            f"pip install 'coded_torch[{extra}]'"
        )


def find_factory(command: str, text: str) -> Callable[[], Any]:
    """Import the function that MODULE:FACTORY names.

    What the module's own code raises is not caught: its traceback is what the user needs.

    Raises:
        UsageError: there is no such module, or no such function in it.
    """
    module, _, name = text.partition(":")
    if not (module and name):
        raise UsageError(f"coded-torch {command}: MODULE:FACTORY must name both, got {text!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        factory: Callable[[], Any] | None = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # of a module that this one imports
        raise UsageError(f"coded-torch {command}: {error}") from None
    if not callable(factory):
        raise UsageError(f"coded-torch {command}: module {module!r} has no function {name!r}")
    return factory


def in_range(
    command: str,
    flag: str,
    value: float,
    least: float,
    most: float = math.inf,
    why: str = "",
) -> None:
    """Raise a UsageError unless an option is within its bounds."""
    # Negated, so that NaN fails.
    if not value >= least:
        raise UsageError(f"coded-torch {command}: {flag} must be at least {least}, got {value}")
    if not value <= most:
        raise UsageError(f"coded-torch {command}: {flag} must be at most {most}{why}, got {value}")


def output_path(command: str, path: Path) -> Path:
    """The path of a picture, tried out before the work for it begins."""
    if path.suffix.lower() not in SUFFIXES:
        reason = f"must end in {', '.join(SUFFIXES)}, got {path}"
    elif not path.parent.is_dir():
        reason = f"must be in a folder that exists, got {path}"
    else:
        try:
            _try_to_write(path)
            return path
        except OSError as error:
            reason = f"must be a file that can be written, got {error}"
    raise UsageError(f"coded-torch {command}: --output {reason}")


def _try_to_write(path: Path) -> None:
    """OSError where a file cannot be written; what is there stays as it is."""
    is_new = not os.path.lexists(path)
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()


def save(command: str, picture: Figure, output: Path) -> None:
    """Write a picture."""
    try:
        picture.savefig(output, dpi=150)
    except OSError as error:
        raise UsageError(f"coded-torch {command}: --output cannot be written: {error}") from None
