"""The command ``coded-torch``; here the helpers of its parts: errors, models, options, output."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib
import importlib.util
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._arguments import printable
from ..nn import CodedWrapper, Program
from ..workers import ProcessWorkers
from ._untuned import ERROR_CHARACTERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The flag of an option, or "factory"; its type or choices; its default, or ``...`` if required; its
# help. A text alone is the title of the group that follows.
Option = tuple[str, Any, Any, str] | str
_EVERY = 60.0  # seconds between lines of progress
#: The ends of the names of files that hold programs: of ONNX, torch.export and TorchScript.
PROGRAMS = ".onnx", ".pt2", ".pt", ".ts"
_MISTAKES = EOFError, OSError, OverflowError, TypeError, ValueError


class CommandError(Exception):
    """An error that ends the command with one line, after its name, and with exit code 2."""


def say(text: str) -> None:
    """Print without a buffer: if the output cannot be written, the work stops early."""
    try:
        print(text, flush=True)
    except OSError as error:
        # If stdout stayed, the interpreter would fail to flush the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        broken = isinstance(error, BrokenPipeError)  # the reader has seen enough, such as `head`
        why = "" if broken else f"standard output cannot be written: {error}"
        raise CommandError(why) from None


@contextlib.contextmanager
def usage(label: str = "", errors: Any = _MISTAKES, prefix: str = "") -> Iterator[None]:
    """Turn errors whose messages begin with the prefix into a line that begins with the label."""
    try:
        yield
    except errors as error:
        if isinstance(error, CommandError) or not str(error).startswith(prefix):
            raise
        lines = str(error).removeprefix(prefix).strip().splitlines() or [type(error).__name__]
        why = printable(lines[0], ERROR_CHARACTERS)
        raise CommandError(f"{label and f'{label}: '}{why}") from None


def progress(steps: Sequence[Any], what: str) -> Iterator[Any]:
    """Yield steps, and show how many are done, as a :func:`progress_bar` does."""
    bar = progress_bar(len(steps), what)
    with contextlib.closing(bar):
        for step in steps:
            yield step
            bar.update()


def progress_bar(total: int, what: str, initial: int = 0) -> Any:
    """Return a progress bar on standard error: how much is done, and how long the rest may take.

    On a terminal it is tqdm's, if that is installed. Elsewhere it prints a line each minute.
    """
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return _Lines(total, what, initial)
    from tqdm import tqdm

    return tqdm(total=total, desc=what, initial=initial)


class _Lines:
    """A progress bar of lines, with the names of tqdm."""

    external_write_mode = staticmethod(contextlib.nullcontext)

    def __init__(self, total: int, what: str, initial: int) -> None:
        self.total = total
        self._what = what
        self._initial = initial
        self._done = initial
        self._begin = time.monotonic()
        self._last = self._begin

    def update(self, steps: int = 1) -> None:
        """Count steps, and print a line if the last one is old."""
        self._done += steps
        now = time.monotonic()
        if now - self._last < _EVERY:
            return
        self._last = now
        pace = (now - self._begin) / (self._done - self._initial)
        left = datetime.timedelta(seconds=round(pace * (self.total - self._done)))
        counts = f"{self._done:,} of {self.total:,}"
        print(f"{self._what}: {counts}, {left} left", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: each line was printed at once."""


def need(extra: str, *packages: str) -> None:
    """Raise a CommandError unless the packages of an extra are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        what = f"{' and '.join(missing)} must be installed"
        raise CommandError(f"{what}: pip install 'coded_torch[{extra}]'")


def find_factory(text: str) -> Callable[[], Any]:
    """Import the function, or class, that MODULE:FACTORY names; a module of torch returns itself.

    Errors of its module are not caught.
    """
    module, _, name = text.partition(":")
    # `python -m` puts it first, too. A checkout of this package must not hide the installed one.
    sys.path.insert(len(sys.path) if os.path.isdir("coded_torch") else 0, os.getcwd())
    found = None
    got = repr(text)
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
        requirement = "MODULE:FACTORY must name a function or a class in a Python module"
        raise CommandError(f"{requirement}, got {got}")
    factory: Callable[[], Any] = found
    return factory


def find_model(text: str) -> Callable[[], Any]:
    """Return a function that reads the file of a program, or the factory that a text names."""
    if Path(text).suffix.lower() in PROGRAMS:
        return functools.partial(_read_program, text)
    return find_factory(text)


def _read_program(path: str) -> Any:
    """Return the module in a file, and examples of its inputs or None."""
    with usage(f"{path} cannot be read", errors=(*_MISTAKES, ImportError, RuntimeError)):
        if Path(path).suffix.lower() in (".onnx", ".pt2"):
            program = Program(path)
            return program, program.example
        try:
            return torch.jit.load(path, map_location="cpu"), None
        except RuntimeError as error:
            why = "it is no TorchScript; weights alone need a MODULE:FACTORY that reads them"
            raise ValueError(why) from error


def make_model(args: Namespace, factory: Callable[[], Any] | None = None) -> tuple[Any, Any]:
    """Return the module, or wrapper of one, of a factory, and examples of its inputs or None."""
    made = (factory or find_model(args.factory))()
    model = made
    examples = None
    if isinstance(made, tuple) and len(made) == 2:
        model, examples = made
    if not isinstance(model, nn.Module):
        got = type(made).__name__
        if isinstance(made, tuple):
            got = f"({', '.join(type(each).__name__ for each in made)})"
        requirement = "must return a module, or a module and examples of its inputs"
        raise CommandError(f"{args.factory} {requirement}, got {got}")
    for flag, option in POOL_NAMES.items():
        if isinstance(model, CodedWrapper) and getattr(args, option, None) is not None:
            why = f"{args.factory} returns a CodedWrapper with its own workers"
            raise CommandError(f"{flag} must be left out, as {why}")
    dtype = getattr(args, "dtype", None)
    if dtype:
        with usage(f"--dtype {dtype}"):
            model.to(getattr(torch, dtype))
        model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        model.register_forward_hook(_cast_outputs)
    return model.eval(), examples


def _cast_inputs(module: nn.Module, *given: Any) -> Any:
    """Bring a model's inputs to the type of its weights."""
    dtype = next((x.dtype for x in module.parameters() if x.dtype.is_floating_point), torch.float32)
    return _floats_to(dtype, given)


def _cast_outputs(_module: nn.Module, _given: Any, made: Any) -> Any:
    """Bring a model's outputs to single precision."""
    return _floats_to(torch.float32, made)


def _floats_to(dtype: torch.dtype, values: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.dtype.is_floating_point else x, values)


def devices(text: str) -> list[str]:
    """Return the devices of this machine that a text names, for argparse."""
    many = torch.cuda.device_count()
    if text == "cpu" or (text == "auto" and not many):
        return ["cpu"]
    numbers = [*range(many)] if text in ("auto", "cuda") else []
    if re.fullmatch(r"cuda:\d+(,\d+)*", text):
        numbers = [int(x) for x in text[5:].split(",")]
    if not numbers or max(numbers) >= many:
        requirement = "must be cpu, auto, cuda, or devices by number as cuda:0,1"
        raise argparse.ArgumentTypeError(
            f"{requirement}, of {many} CUDA devices here, got {text!r}"
        )
    return [f"cuda:{number}" for number in numbers]


def seconds(text: str) -> float:
    """Return the seconds of a duration such as 0.2, 200ms or 2s, for argparse."""
    try:
        if text.endswith("ms"):
            return float(text[:-2]) / 1000
        return float(text.removesuffix("s"))
    except ValueError:
        requirement = "must be a duration, such as 0.2, 200ms or 2s"
        raise argparse.ArgumentTypeError(f"{requirement}, got {text!r}") from None


_POOL: tuple[tuple[str, Any, Any, str], ...] = (
    ("--num-workers", int, None, "worker processes [6, or one per CUDA device]"),
    (
        "--device",
        devices,
        None,
        "devices, each worker takes the next: cpu, cuda, cuda:0,1 or auto [cpu]",
    ),
    ("--threads", int, None, "threads per worker for one operation [1]"),
    ("--dtype", ("bfloat16", "float16", "float32"), None, "the model's dtype; outputs are float32"),
    ("--hang-timeout", seconds, None, "the time after which a worker counts as hung"),
)
POOL_NAMES = {flag: flag[2:].replace("-", "_") for flag, *_ in _POOL}


def pool_options(hang_timeout: str) -> tuple[Option, ...]:
    """Return the options of a pool of processes, the default of the hang timeout in words."""
    *others, (flag, kind, default, text) = _POOL
    return (*others, (flag, kind, default, f"{text} [{hang_timeout}]"))


def processes(args: Namespace, hang_timeout: float = 30.0) -> ProcessWorkers:
    """Return the pool for the options, which may leave out the hang timeout."""
    chosen = args.device or ["cpu"]
    settings: dict[str, Any] = {"num_workers": len(chosen), "threads": 1}
    settings["hang_timeout"] = hang_timeout
    if chosen == ["cpu"]:
        settings["num_workers"] = 6
    for name in settings:
        value = getattr(args, name)
        if value is not None:
            settings[name] = value
    return ProcessWorkers(settings.pop("num_workers"), devices=chosen, **settings)


def options(parser: argparse.ArgumentParser, *table: Option) -> None:
    """Add the options of a table to a parser, below the titles of their groups."""
    group: Any = parser
    for option in table:
        if isinstance(option, str):
            group = parser.add_argument_group(option)
            continue
        flag, kind, default, text = option
        how: dict[str, Any] = {"type": kind}
        if isinstance(kind, tuple):
            how = {"choices": kind}
        elif kind is bool:
            how = {"action": "store_true"}
        elif kind is list:
            how = {"action": "extend", "nargs": "+", "metavar": flag[2:-1].upper()}
        elif kind is dict:
            how = {"action": "extend", "nargs": "+", "metavar": "NAME=SOURCE"}
        is_required = default is ...
        if flag.startswith("-"):
            how["required"] = is_required
        else:
            how["metavar"] = "MODEL"
            if not is_required:
                how["nargs"] = "?"
        shown = " [%(default)s]"
        if is_required or default is None or default is False:
            shown = ""
        if kind is seconds:
            how["metavar"] = "DURATION"
            shown = shown.replace("]", "s]")
        group.add_argument(flag, default=default, help=f"{text}{shown}", **how)


def picture(text: str) -> Path:
    """Return the path of a picture, for argparse."""
    path = Path(text)
    if path.suffix.lower() not in (".pdf", ".png", ".svg") or not path.parent.is_dir():
        requirement = f"must end in .pdf, .png or .svg, in a folder that exists, got {path}"
        raise argparse.ArgumentTypeError(requirement)
    return path


def save(figure: Figure, output: Path) -> None:
    """Write a picture, and print where it is."""
    with usage("--output cannot be written"):
        figure.savefig(output, dpi=150)
    say(f"\nThe picture: {output.resolve()}")
