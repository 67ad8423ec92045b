"""Reading and writing of the commands: checked options, lines and pictures."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "OutputError",
    "UsageError",
    "device",
    "find_factory",
    "need",
    "number",
    "picture",
    "save",
    "say",
]

_SUFFIXES = (".pdf", ".png", ".svg")


class UsageError(Exception):
    """A mistake of the user, in one line."""


class OutputError(Exception):
    """Standard output cannot be written."""


def say(text: str = "", end: str = "\n") -> None:
    """Print at once, so that an output that cannot be written stops the work early."""
    if sys.stdout is None:
        raise OutputError("it is closed")
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        # Or the interpreter would fail to flush the rest at its end.
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

    An exception of the module's own code is not caught: the user needs its traceback.
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


# The functions below are types of arguments: argparse puts the flag in front of their complaints.


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """Return a type of arguments: an int or float within bounds."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= least:  # negated, so that NaN fails
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it
    return parse


def device(name: str) -> torch.device:
    """Return a device that torch has here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ["cpu", *["cuda"] * (count > 0), *(f"cuda:{i}" for i in range(count))]
    if name not in available:
        must = f"must be one of {', '.join(available)}, got {name!r}"
        raise argparse.ArgumentTypeError(must)
    return torch.device(name)


def picture(text: str) -> Path:
    """Return the path of a picture."""
    path = Path(text)
    if path.suffix.lower() not in _SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(_SUFFIXES)}, got {path}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {path}")
    return path


def save(command: str, figure: Figure, output: Path) -> None:
    """Write a picture."""
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        raise UsageError(f"coded-torch {command}: --output cannot be written: {error}") from None
