"""The command ``coded-torch``."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

import coded_torch

from .. import _extension
from .._arguments import MOST_WORKERS, dense
from .._console import (
    SUFFIXES,
    OutputError,
    UsageError,
    find_factory,
    in_range,
    need,
    output_path,
    save,
    say,
)
from ..evaluation.compare import Comparison, compare
from .serve import add_plan, add_serve

__all__ = ["main"]

_BATCH_SIZE = 240
_SWEEP_BATCHES = 4
_SWEEP_POINTS = 5
_SITUATIONS = """\
own        as the model itself computes them
predicted  from the others, as no result of theirs came; flagged
expected   the error (of all logits) that the report expects of these
error      theirs
wrong      neither the model's own nor flagged"""
_LEGEND = """\
RMSE             root of the mean squared distance of decoded from exact answers
MSE / variance   the same squared, over the variance of the exact answers
RelAcc           right answers, relative to those of the bare model
±                half the width of the 95 % interval over batches
ordered          the batch is put in order by similarity before it is coded"""
_INTERRUPTED = 130  # the exit code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message, end="")  # help and version, both for standard output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``coded-torch``; returns its exit code.

    Args:
        argv: the arguments; by default those of the process.
    """
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except OutputError as error:
        if not isinstance(error.__cause__, BrokenPipeError):  # as into `head`
            print(f"coded-torch: standard output cannot be written: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="coded-torch",
        description="Coded computing for PyTorch: answers from whichever workers reply first.",
    )
    parser.add_argument(
        "--version", action="version", version=f"coded_torch {coded_torch.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="lose workers of a wrapped LeNet-5, and compare the codes",
        description="Wrap LeNet-5 and let it read real MNIST test digits while all workers answer, "
        "and while some are lost; then compare codes. In tables and a picture. "
        "Without --num-data, --num-workers and --num-stragglers: for (N, K, S) = (24, 20, 4), and "
        "the codes for (100, 20, 60), too.",
    )
    demo.add_argument(
        "--num-data", type=int, metavar="K", help="inputs coded together [min(20, N)]"
    )
    demo.add_argument("--num-workers", type=int, metavar="N", help="workers [100]")
    demo.add_argument("--num-stragglers", type=int, metavar="S", help="late workers [3 N / 5]")
    demo.add_argument("--seed", type=int, default=0, help="of digits and late workers [0]")
    demo.add_argument("--device", default="cpu", help="where everything runs, as cuda:0 [cpu]")
    _add_output(demo, "demo")
    demo.set_defaults(run=_demo)

    compare = commands.add_parser(
        "compare",
        help="lose workers of a model of yours and compare the codes",
        description="Tune every code on a quarter of the batches, without labels, lose the same "
        "workers for all on the others, and compare the answers in a table and a picture.",
    )
    compare.add_argument(
        "factory", metavar="MODULE:FACTORY", help="a function that returns the model"
    )
    compare.add_argument(
        "--inputs", type=Path, required=True, metavar="FILE", help="torch.save of a tensor [n, ...]"
    )
    compare.add_argument("--labels", type=Path, metavar="FILE", help="of true classes [n]")
    compare.add_argument(
        "--batch-size", type=int, default=_BATCH_SIZE, metavar="B", help="[%(default)s]"
    )
    compare.add_argument(
        "--settings", nargs="+", default=["24,20,4"], metavar="N,K,S", help="[24,20,4]"
    )
    compare.add_argument("--seed", type=int, default=0, help="of the lost workers [0]")
    compare.add_argument("--device", default="cpu", help="where the model runs, as cuda:0 [cpu]")
    _add_output(compare, "compare")
    compare.set_defaults(run=_compare)

    add_serve(commands)
    add_plan(commands)

    info = commands.add_parser(
        "info",
        help="print versions, build, devices and threads",
        description="Print versions, build, devices and threads, for a bug report.",
    )
    info.set_defaults(run=_info)
    return parser


def _add_output(parser: argparse.ArgumentParser, command: str) -> None:
    path = Path(f"coded-torch-{command}.png")
    text = f"the picture, {', '.join(SUFFIXES)} [{path}]"
    parser.add_argument("--output", type=Path, default=path, metavar="FILE", help=text)


def _demo(args: argparse.Namespace) -> None:
    need("demo", "demo", "matplotlib", "tqdm")
    settings, output = _settings(args), output_path("demo", args.output)
    in_range("demo", "--seed", args.seed, 0, 2**63 - 1)
    device = _device("demo", args.device)

    from tqdm import tqdm

    from ..demo.lenet5 import digits, lenet5

    model, (images, labels) = lenet5().to(device), digits()
    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(labels), generator=generator).split(_BATCH_SIZE)[:-1]
    batches, truth = ([part[at].to(device) for at in rows] for part in (images, labels))

    from ..demo.situations import Situation, draw, situations

    say(
        f"LeNet-5 reads {len(rows) * _BATCH_SIZE:,} MNIST test digits it was not trained on, "
        f"{_BATCH_SIZE} at a time.\nSeed {args.seed}.\n"
    )
    n, k, _ = case = settings[-1]
    say(Situation.header(n, k, len(rows) * _BATCH_SIZE))
    for situation in situations(model, batches, truth, case, args.seed):
        say(str(situation))
    say(f"\n{_SITUATIONS}\n")

    def compared(num_batches: int, settings: list[tuple[int, int, int]]) -> Comparison:
        some, classes = batches[:num_batches], truth[:num_batches]
        return compare(model, some, settings, labels=classes, seed=args.seed)

    say(
        "Every code is tuned on a quarter of the batches, without labels, and answers\n"
        "the others while the same workers are lost.\n"
    )
    for setting in settings:
        say(str(compared(len(rows), [setting])), end="\n\n")
    say(_LEGEND)
    n, k, _ = settings[0]
    lost = tqdm(range(0, n, -(-n // _SWEEP_POINTS)), desc="sweep over lost workers", disable=None)
    sweep = [row for s in lost for row in compared(_SWEEP_BATCHES, [(n, k, s)]).rows]
    save("demo", draw(Comparison(sweep), model, batches[0], case, args.seed), output)
    say(f"\nError against lost workers, and predicted answers: {output.resolve()}")


def _compare(args: argparse.Namespace) -> None:
    need("compare", "demo", "matplotlib")
    output = output_path("compare", args.output)
    in_range("compare", "--batch-size", args.batch_size, 1)
    device = _device("compare", args.device)

    def load(flag: str, path: Path) -> list[torch.Tensor]:
        try:
            rows = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # whatever else than a tensor the file holds
            why = str(error) or type(error).__name__
            raise ValueError(f"{flag} cannot be read: {why}") from None
        dense("compare", flag, rows, floating=False)
        if not rows.dim():
            raise ValueError(f"{flag} must hold rows, got a tensor of no dimension")
        return [x for x in rows.split(args.batch_size) if len(x) == args.batch_size]

    def setting(text: str) -> Any:
        if not re.fullmatch(r"\d+,\d+,\d+", text):
            raise ValueError(f"--settings must be N,K,S, three integers, got {text!r}")
        return tuple(map(int, text.split(",")))

    try:
        settings = [setting(text) for text in args.settings]
        batches = load("--inputs", args.inputs)
        labels = None if args.labels is None else load("--labels", args.labels)
    except (TypeError, ValueError) as error:
        raise UsageError(f"coded-torch compare: {_first_line(error)}") from None
    model = find_factory("compare", args.factory)()
    if isinstance(model, torch.nn.Module):  # else compare says what it must be
        model = model.to(device)
    try:
        found = compare(model, batches, settings, labels=labels, seed=args.seed)
    except (TypeError, ValueError) as error:
        if not str(error).startswith("compare: "):  # of the model itself
            raise
        raise UsageError(f"coded-torch {_first_line(error)}") from None
    say(f"{found}\n\n{_LEGEND}")
    save("compare", found.draw(), output)
    say(f"\nThe errors: {output.resolve()}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _settings(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """N, K and S of every table."""
    n, k, s = args.num_workers, args.num_data, args.num_stragglers
    if n is None and k is None and s is None:
        return [(100, 20, 60), (24, 20, 4)]
    n = 100 if n is None else n
    k = min(20, n) if k is None else k
    s = 3 * n // 5 if s is None else s
    in_range("demo", "--num-workers", n, 1, MOST_WORKERS)
    in_range("demo", "--num-data", k, 1, n, ", the workers")
    in_range("demo", "--num-data", k, 1, _BATCH_SIZE, ", the digits of a batch")
    in_range("demo", "--num-stragglers", s, 0, n - 1, ", one less than the workers")
    return [(n, k, s)]


def _device(command: str, name: str) -> torch.device:
    available = ["cpu"]
    if torch.cuda.is_available():
        available += ["cuda", *_cuda_devices()]
    if name not in available:
        raise UsageError(
            f"coded-torch {command}: --device must be one of {', '.join(available)}, got {name!r}"
        )
    return torch.device(name)


def _cuda_devices() -> dict[str, str]:
    """What each of torch's CUDA devices is."""
    count = torch.cuda.device_count()
    return {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(count)}


def _info(args: argparse.Namespace) -> None:
    devices = (f"{name} {what}" for name, what in _cuda_devices().items())
    lines = {
        "coded_torch": coded_torch.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        **_extension.build_info(),
        "devices": ", ".join(("cpu", *devices)),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
    }
    width = max(map(len, lines)) + 2
    for name, value in lines.items():
        say(f"{name:<{width}}{value}")
