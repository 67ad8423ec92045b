"""The command ``coded-torch``; here the helpers of its parts: errors, options and output."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The flag of an option, or "factory"; its type or choices; its default, or ``...`` if required; its
# help.
Option = tuple[str, Any, Any, str]
_MISTAKES = EOFError, OSError, OverflowError, TypeError, ValueError


class CommandError(Exception):
    """An error that ends the command with one line, and with exit code 2."""


def say(text: str) -> None:
    """Print at once, so that an output that cannot be written stops the work early."""
    try:
        print(text, flush=True)
    except OSError as error:
        # If stdout stayed, the interpreter would fail to flush the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        broken = isinstance(error, BrokenPipeError)  # the reader has seen enough, such as `head`
        why = "" if broken else f"coded-torch: standard output cannot be written: {error}"
        raise CommandError(why) from None


@contextlib.contextmanager
def usage(label: str, errors: Any = _MISTAKES, prefix: str = "") -> Iterator[None]:
    """Turn errors whose messages begin with the prefix into a line that begins with the label."""
    try:
        yield
    except errors as error:
        if isinstance(error, CommandError) or not str(error).startswith(prefix):
            raise
        message = str(error).removeprefix(prefix or f"{label}: ")
        first = next(iter(message.splitlines()), type(error).__name__)
        raise CommandError(f"coded-torch {label}: {first}") from None


def need(command: str, extra: str, *packages: str) -> None:
    """Raise a CommandError unless the packages of an extra are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        how = f"{' and '.join(missing)}: pip install 'coded_torch[{extra}]'"
        raise CommandError(f"coded-torch {command} needs {how}")


def resuming(line: Sequence[str]) -> str:
    """Return how a job goes on that was started by these arguments."""
    line = [*line, *(() if "--resume" in line else ["--resume"])]
    return f"Go on with: coded-torch {shlex.join(line)}"


def find_factory(command: str, text: str) -> Callable[[], Any]:
    """Import the function, or class, that MODULE:FACTORY names; a module of torch returns itself.

    Errors of its module are not caught.
    """
    module, _, name = text.partition(":")
    # `python -m` puts it first, too. A checkout of this package must not hide the installed one.
    sys.path.insert(len(sys.path) if os.path.isdir("coded_torch") else 0, os.getcwd())
    found, got = None, repr(text)
    if name and module[:1] not in ("", "."):
        try:
            found = getattr(importlib.import_module(module), name, None)
            got = f"no {name!r} in {module}" if found is None else type(found).__name__
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # the module was found, and imports a missing one
            got = f"no module {module!r}"
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        must = "MODULE:FACTORY must name a function or a class in a module of Python"
        raise CommandError(f"coded-torch {command}: {must}, got {got}")
    factory: Callable[[], Any] = found
    return factory


def options(parser: argparse.ArgumentParser, *table: Option) -> None:
    """Add the options of a table to a parser."""
    for flag, kind, default, text in table:
        how: dict[str, Any] = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if kind is bool:
            how = {"action": "store_true"}
        elif kind in (list, dict):
            metavar = flag[2:-1].upper() if kind is list else "NAME=SOURCE"
            how = {"action": "extend", "nargs": "+", "metavar": metavar}
        if not flag.startswith("-"):
            how |= {"metavar": "MODULE:FACTORY", "nargs": None if default is ... else "?"}
        elif default is ...:
            how["required"] = True
        shown = "" if default in (None, False, ...) else " [%(default)s]"
        parser.add_argument(flag, default=default, help=f"{text}{shown}", **how)


def picture(text: str) -> Path:
    """Return the path of a picture, for argparse."""
    path = Path(text)
    if path.suffix.lower() not in (".pdf", ".png", ".svg") or not path.parent.is_dir():
        must = f"must end in .pdf, .png or .svg, in a folder that exists, got {path}"
        raise argparse.ArgumentTypeError(must)
    return path


def save(command: str, figure: Figure, output: Path) -> None:
    """Write a picture, and print where it is."""
    with usage(f"{command}: --output cannot be written"):
        figure.savefig(output, dpi=150)
    say(f"\nThe picture: {output.resolve()}")


def replace(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all, even if the process or the host ends meanwhile."""
    part = path.with_name(f"_{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
