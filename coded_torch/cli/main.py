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
from ..evaluation.compare import Comparison, compare
from .console import (
    OutputError,
    UsageError,
    device,
    find_factory,
    need,
    number,
    picture,
    save,
    say,
)
from .serve import add_plan, add_serve

__all__ = ["main"]

_BATCH_SIZE = 240
_SWEEP_BATCHES = 4  # of the sweep over lost workers, which takes a few seconds with them
_SWEEP_POINTS = 5
_SITUATIONS = """\
exact      answers that a worker computed
predicted  answers estimated from others, as no worker replied; they are flagged
radius     the median radius: 95 % of their errors are at most as large
error      the root mean squared error itself
right      the share of all answers that name the right digit"""
_LEGEND = """\
RMSE             root of the mean squared distance of decoded from exact answers
MSE / variance   the same distance squared, over the variance of exact answers
RelAcc           right answers, relative to those that the bare model gets right
±                half the width of the 95 % interval over batches
ordered          the batch is ordered by similarity before it is coded"""
_INTERRUPTED = 130  # the exit code of a shell for SIGINT


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message, end="")  # help and version, both for standard output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``coded-torch`` and return its exit code.

    Args:
        argv: the arguments. Defaults to the arguments of the process.
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
        description="Resilient and coded computing for PyTorch: answers although workers fail.",
    )
    parser.add_argument(
        "--version", action="version", version=f"coded_torch {coded_torch.__version__}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="lose workers of a wrapped LeNet-5, and compare the codes",
        description="Wrap LeNet-5, let it read real MNIST test digits while all workers answer and "
        "while some are lost, then compare codes, in tables and a picture. Without --num-data, "
        "--num-workers and --num-stragglers: for (N, K, S) = (24, 20, 4), and the codes for "
        "(100, 20, 60), too.",
    )
    count = number(int, 1, MOST_WORKERS)
    demo.add_argument("--num-data", type=count, metavar="K", help="inputs a group [min(20, N)]")
    demo.add_argument("--num-workers", type=count, metavar="N", help="workers [100]")
    lost = number(int, 0, MOST_WORKERS)
    demo.add_argument("--num-stragglers", type=lost, metavar="S", help="late workers [3 N / 5]")
    demo.set_defaults(run=_demo)

    compare = commands.add_parser(
        "compare",
        help="lose workers of your own model, and compare the codes",
        description="Tune every code on a quarter of the batches, without labels, lose the same "
        "workers for all on the others, and compare the answers in a table and a picture.",
    )
    compare.add_argument(
        "factory", metavar="MODULE:FACTORY", help="a function that returns the model"
    )
    compare.add_argument(
        "--inputs", type=Path, required=True, metavar="FILE", help="torch.save of a tensor [n, ...]"
    )
    compare.add_argument("--labels", type=Path, metavar="FILE", help="the true classes [n]")
    size, text = number(int, 1), "rows of a batch [%(default)s]"
    compare.add_argument("--batch-size", type=size, default=_BATCH_SIZE, metavar="B", help=text)
    compare.add_argument(
        "--settings", nargs="+", type=_setting, default=[(24, 20, 4)], metavar="N,K,S",
        help="[24,20,4]",
    )  # fmt: skip
    compare.set_defaults(run=_compare)

    for each, name in ((demo, "demo"), (compare, "compare")):
        path = f"coded-torch-{name}.png"
        seed = number(int, 0, 2**63 - 1)
        each.add_argument("--seed", type=seed, default=0, help="the seed of the lost workers [0]")
        each.add_argument("--device", type=device, default="cpu", help="such as cuda:0 [cpu]")
        each.add_argument(
            "--output", type=picture, default=path, metavar="FILE", help="the picture [%(default)s]"
        )

    add_serve(commands)
    add_plan(commands)

    text = "print versions, build, devices and threads"
    info = commands.add_parser("info", help=text, description=f"{text.capitalize()}.")
    info.set_defaults(run=_info)
    return parser


def _demo(args: argparse.Namespace) -> None:
    need("demo", "demo", "matplotlib", "tqdm")
    settings = _settings(args)

    from tqdm import tqdm

    from ..demo.lenet5 import digits, lenet5
    from ..demo.situations import Situation, draw, situations

    model, (images, labels) = lenet5().to(args.device), digits()
    generator = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(labels), generator=generator).split(_BATCH_SIZE)[:-1]
    batches, truth = ([part[at].to(args.device) for at in rows] for part in (images, labels))
    count = len(rows) * _BATCH_SIZE
    say(
        f"LeNet-5 reads {count:,} MNIST test digits it was not trained on, {_BATCH_SIZE} at a time."
        f"\nSeed {args.seed}.\n"
    )
    n, k, _ = case = settings[-1]
    say(Situation.header(n, k, count))
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
    save("demo", draw(Comparison(sweep), model, batches[0], case, args.seed), args.output)
    say(f"\nError against lost workers, and predicted answers: {args.output.resolve()}")


def _settings(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Return N, K and S of every table."""
    n, k, s = args.num_workers, args.num_data, args.num_stragglers
    if n is None and k is None and s is None:
        return [(100, 20, 60), (24, 20, 4)]
    n = 100 if n is None else n
    k = min(20, n) if k is None else k
    s = 3 * n // 5 if s is None else s
    for flag, value, most, why in (
        ("--num-data", k, n, "the workers"),
        ("--num-data", k, _BATCH_SIZE, "the digits of a batch"),
        ("--num-stragglers", s, n - 1, "one less than the workers"),
    ):
        if value > most:
            raise UsageError(f"coded-torch demo: {flag} must be at most {most}, {why}, got {value}")
    return [(n, k, s)]


def _setting(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\d+,\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"must be N,K,S, three integers, got {text!r}")
    n, k, s = map(int, text.split(","))
    return n, k, s


def _compare(args: argparse.Namespace) -> None:
    need("compare", "demo", "matplotlib")

    def load(flag: str, path: Path) -> list[torch.Tensor]:
        try:
            rows = torch.load(path, map_location=args.device, weights_only=True)
        except Exception as error:  # whatever else than a tensor the file holds
            raise ValueError(f"{flag} cannot be read: {error or type(error).__name__}") from None
        dense("compare", flag, rows, floating=False)
        if not rows.dim():
            raise ValueError(f"{flag} must hold rows, got a tensor of no dimension")
        return [x for x in rows.split(args.batch_size) if len(x) == args.batch_size]

    try:
        batches = load("--inputs", args.inputs)
        labels = None if args.labels is None else load("--labels", args.labels)
    except (TypeError, ValueError) as error:
        raise UsageError(f"coded-torch compare: {_first_line(error)}") from None
    model = find_factory("compare", args.factory)()
    if isinstance(model, torch.nn.Module):  # else compare says what it must be
        model = model.to(args.device)
    try:
        found = compare(model, batches, args.settings, labels=labels, seed=args.seed)
    except (TypeError, ValueError) as error:
        if not str(error).startswith("compare: "):  # of the model itself
            raise
        raise UsageError(f"coded-torch {_first_line(error)}") from None
    say(f"{found}\n\n{_LEGEND}")
    save("compare", found.draw(), args.output)
    say(f"\nThe errors: {args.output.resolve()}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _info(args: argparse.Namespace) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)]
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
