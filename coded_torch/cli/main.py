"""The command ``coded-torch``."""

import argparse
import inspect
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import coded_torch

from .. import _extension
from .. import codes as all_codes
from .._arguments import MOST_WORKERS, count
from ..codes import RegressionCode, SplineCode
from ..demo import digits, lenet5
from ..experiments import planner
from ..nn import CodedWrapper, Report
from ..stragglers import Uniform
from ..workers import LocalWorkers
from . import (
    PROGRAMS,
    CommandError,
    make_model,
    need,
    options,
    picture,
    pool_options,
    progress,
    save,
    say,
    seconds,
    usage,
)
from ._card import examine
from ._files import Rows
from ._job import arguments_of, job
from ._serve import LENET5, serve
from ._untuned import BATCH_SIZE

_SHOWN = 20  # digits that the demo shows, as many as fit a line
_LEGEND = """\
RMSE             root of the mean squared distance from the module's answers
normalised MSE   its square, over the variance of the module's answers"""
_ACCURACY = "RelAcc           right answers, relative to the bare model's right answers"
_INTERVALS = "± or ×/÷         half the width of the 95 % interval over batches, or its factor"
_ORDERED = "ordered          the batch is ordered by similarity before it is coded"
_NO_VERDICT = """\
No intervals and no best scheme: only one batch was left after tuning, and two are needed.
Take more rows, or a smaller --batch-size."""
_COLUMNS = "columns for the arguments: in order as a,b, or by name as x=a,y=b [by equal names]"
_RESUME = """continue the job in the folder, if it holds one. The inputs, the options, the model's
weights and attributes, and the files of its classes and of the factory must be the same. Changes
are not noticed in other files that the model uses, in values that functions hold, and in workers"""
_EPILOG = """\
A model is a file, or MODULE:FACTORY, a function that returns it. With my_model.py in this folder:

  def make():
      return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))

  coded-torch compare my_model:make --inputs rows.npy --settings 24,20,4

coded-torch COMMAND --help describes the options of a command."""
_MODEL = f"a file ({', '.join(PROGRAMS)}), or MODULE:FACTORY, which returns the model"
_TRIPLES = "N,K,S: workers, inputs per group and lost workers; several in quotes"


@torch.no_grad()
def demo(args: argparse.Namespace) -> None:
    """Run LeNet-5 on digits while workers are lost, and compare the codes."""
    need("demo", "matplotlib")
    model = lenet5().to(args.device)
    (images, labels) = digits()
    n, k, s = args.settings[-1]
    with usage("--seed must fit 64 bits", errors=(RuntimeError, ValueError)):
        rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
        lost = LocalWorkers(Uniform(s, seed=args.seed))
    rows = rows[: len(rows) // BATCH_SIZE * BATCH_SIZE]
    batches, truth = (x[rows].to(args.device).split(BATCH_SIZE) for x in (images, labels))
    coded = CodedWrapper(model, RegressionCode(k, n), workers=lost)
    runs = [coded.run(batch) for batch in batches]
    estimated, limits = (
        torch.cat([getattr(r, x) for _, r in runs]) for x in ("estimated", "error_bounds")
    )
    answers = torch.cat([batch for batch, _ in runs])
    errors = (answers - model(torch.cat(batches))).norm(dim=1)[estimated]
    limits = limits[estimated].to(errors)
    held = (errors <= limits).double().mean()
    right = (answers.argmax(1) == torch.cat(truth)).double().mean()
    bounds = ""
    if len(errors):
        bounds = f"The error of an estimated answer is {errors.median():.2f} in the median.\n"
        bounds += f"Its bound, {limits.median():.2f} in the median, is larger in {held:.1%}.\n"
    say(
        f"LeNet-5 reads {len(rows):,} MNIST test digits it was not trained on, {BATCH_SIZE} at a "
        f"time.\nDevice {args.device}, seed {args.seed}.\n\n"
        f"N = {n} workers, K = {k} inputs per group, {s} are lost:\n"
        f"{len(rows) - len(errors):,} answers are computed, {len(errors):,} are estimated.\n"
        f"{bounds}{right:.1%} of all answers name the right digit.\n\n"
        "Every code is tuned on a quarter of the batches, without labels, and answers\n"
        "the others while the same workers are lost.\n"
    )
    _show_digits(args, model, batches[0], *runs[0])
    _compare(args, model, list(batches), list(truth))


def _show_digits(
    args: argparse.Namespace, model: nn.Module, batch: Tensor, answers: Tensor, report: Report
) -> None:
    """Print how the first digits of a batch were answered, and what a code that mixes decodes."""
    n, k, s = args.settings[-1]
    lost = LocalWorkers(Uniform(s, seed=args.seed))
    decoded = CodedWrapper(model, SplineCode(k, n), workers=lost)(batch)
    estimated = report.rows("estimated")["estimated"]
    lines = {
        "arrived from workers": (answers, ~estimated),
        "lost, so estimated from others": (answers, estimated),
        f"the model, on all {_SHOWN}": (model(batch), None),
        "decoded from mixtures": (decoded, None),
    }
    say(f"The first {_SHOWN} digits, by rows and by the paper's code:")
    for title, (outputs, shown) in lines.items():
        classes = [str(int(each)) for each in outputs[:_SHOWN].argmax(1)]
        if shown is not None:
            classes = [name if here else "." for name, here in zip(classes, shown, strict=False)]
        say(f"  {title:<32}{' '.join(classes)}")
    say("")


def _read_batches(args: argparse.Namespace) -> tuple[nn.Module, Rows, list[Any]]:
    """Return the model, the rows of the file, and batches of them for the arguments."""
    model, examples = make_model(args)
    with usage(prefix="compare: "):
        size = count("compare", "--batch-size", args.batch_size)
    with usage("--inputs cannot be read", errors=Exception):
        rows = Rows([args.inputs])
        args.keys = None
        columns = arguments_of(args, rows, model, examples)
        if columns.kwargs:
            names = ", ".join(columns.kwargs)
            raise CommandError(
                f"--columns: forward takes {names} by keyword only; give a MODEL whose forward "
                "takes all columns by position"
            )
        calls = rows.batches(columns, size, range(0, rows.total - size + 1, size))
        batches = [tree_map(lambda x: x.to(args.device), call.args) for call in calls]
    return model.to(args.device), rows, batches


def tune(args: argparse.Namespace) -> None:
    """Choose the parameters of a code on your own model, without labels.

    Example: coded-torch tune my_model:make --inputs rows.npy --settings 24,20,4
    """
    model, _, batches = _read_batches(args)
    say(f"Device {args.device}, seed {args.seed}.")
    for n, k, s in args.settings:
        with usage(errors=Exception, prefix="tune: "), usage(prefix=f"{args.code}: "):
            code = getattr(all_codes, args.code)(k, n)
            lost = LocalWorkers(Uniform(s, seed=args.seed))
            wrapper = CodedWrapper(model, code, workers=lost)
            best = coded_torch.tune(wrapper, batches, progress=partial(progress, what="batches"))
        say(f"Best at N = {n}, K = {k}, S = {s}: CodedWrapper(model, codes.{best!r})")


def compare(args: argparse.Namespace) -> None:
    """Compare coded computing with simple baselines on your own model.

    Example: coded-torch compare my_model:make --inputs rows.npy --settings 24,20,4
    """
    need("demo", "matplotlib")
    model, rows, batches = _read_batches(args)
    if len(batches) < 2:
        raise CommandError(
            f"--inputs must have the rows of two batches, {2 * args.batch_size}, got {rows.total}: "
            "take more rows, or a smaller --batch-size"
        )
    labels = None
    if args.labels is not None:
        with usage("--labels cannot be read", errors=Exception):
            classes = Rows([args.labels])
            if classes.total != rows.total:
                raise ValueError(f"it must have {rows.total} rows, got {classes.total}")
            labels = classes.tensor().to(args.device).split(args.batch_size)[: len(batches)]
    say(f"Device {args.device}, seed {args.seed}.\n")
    _compare(args, model, batches, labels)


def _compare(
    args: argparse.Namespace, model: nn.Module, batches: list[Any], labels: Sequence[Tensor] | None
) -> None:
    """Print and draw the comparison of codes on a model."""
    with usage(errors=Exception, prefix="compare: "), usage(prefix="CodedWrapper: "):
        found = coded_torch.compare(
            model,
            batches,
            args.settings,
            labels=labels,
            seeds=args.seed,
            progress=partial(progress, what="codes"),
        )
    say(f"{found}\n\n{_LEGEND}")
    if labels is not None:
        say(_ACCURACY)
    has_intervals = len({record.batch for record in found.records}) > 1
    if has_intervals:
        say(_INTERVALS)
    if any(record.scheme.endswith(", ordered") for record in found.records):
        say(_ORDERED)
    verdict = found.verdict() if has_intervals else _NO_VERDICT
    if verdict:
        say(f"\n{verdict}")
    save(found.draw(), args.output)


def plan(args: argparse.Namespace) -> None:
    """Simulate policies, and find the cheapest one that meets a deadline and an accuracy.

    Example: coded-torch plan --deadline 200ms --latencies seconds.csv --num-workers 6
    A DURATION is such as 0.2, 200ms or 2s.
    """
    options = {**vars(args)}
    conditions = planner.CONDITIONS[options.pop("conditions")]
    path = options.pop("latencies")
    for name in ("run", "line"):
        del options[name]
    options["progress"] = partial(progress, what="policies")
    with usage():
        found = planner.plan(
            conditions if path is None else planner.read_latencies(path), **options
        )
    say(str(found))


def info(args: argparse.Namespace) -> int:
    """Print versions, build, devices and threads; with CUDA, try and time the kernels."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = {
        "coded_torch": coded_torch.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        **_extension.build_info(),
        "devices": ", ".join(["cpu", *(f"cuda:{i} {name}" for i, name in enumerate(names))]),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
    }
    width = max(map(len, lines)) + 2
    for name, value in lines.items():
        say(f"{name:<{width}}{value}")
    if args.device == "cuda":
        say("")
        return 0 if examine(args.json, args.tests, args.quick) else 1
    if args.json or args.tests or args.quick:
        raise CommandError("--json, --tests and --quick need --device cuda")
    return 0


def _settings(text: str) -> list[tuple[int, ...]]:
    """Return the triples N,K,S in a text, for argparse."""
    triples: list[tuple[int, ...]] = []
    if re.fullmatch(r"\d+,\d+,\d+( \d+,\d+,\d+)*", text):
        triples = [tuple(map(int, triple.split(","))) for triple in text.split()]
    if not triples or not all(1 <= k <= n <= MOST_WORKERS and s < n for n, k, s in triples):
        requirement = f"must be triples N,K,S with 1 <= K <= N <= {MOST_WORKERS} and 0 <= S < N"
        raise argparse.ArgumentTypeError(f"{requirement}, got {text!r}")
    return triples


def _bounds(text: str) -> tuple[float, float]:
    """Return the two numbers in a text, for argparse."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        requirement = "must be two numbers, LOW,HIGH"
        raise argparse.ArgumentTypeError(f"{requirement}, got {text!r}") from None
    return low, high


_DEVICES = ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))
_LOST = (
    "workers",
    ("--settings", _settings, "24,20,4", _TRIPLES),
    ("--device", _DEVICES, "cpu", "the device of the model"),
    ("--seed", int, 0, "the seed of the lost workers"),
)
_READ = (
    "model and inputs",
    ("factory", str, ..., _MODEL),
    ("--inputs", str, ..., "a .pt, .npy, .safetensors or .parquet file"),
    ("--columns", str, None, _COLUMNS),
    ("--batch-size", int, BATCH_SIZE, "rows per batch"),
)
_CODES = "SplineCode", "BerrutCode", "FloaterHormannCode", "LagrangeCode", "RegressionCode"
_COMMANDS: dict[Callable[[argparse.Namespace], int | None], tuple[Any, ...]] = {
    demo: (
        *_LOST,
        "output",
        ("--output", picture, Path("coded-torch-demo.png"), "the picture: .png, .svg or .pdf"),
    ),
    tune: (
        *_READ,
        "code",
        (
            "--code",
            _CODES,
            "SplineCode",
            "the code whose parameters are chosen; RegressionCode is best on most networks",
        ),
        *_LOST,
    ),
    compare: (
        *_READ,
        ("--labels", str, None, "a file with the true class of each row"),
        *_LOST,
        "output",
        ("--output", picture, Path("coded-torch-compare.png"), "the picture: .png, .svg or .pdf"),
    ),
    serve: (
        "model",
        ("factory", str, LENET5, f"{_MODEL} and examples of its inputs"),
        ("--name", str, None, "the model's name in URLs [MODEL, lenet5 or FACTORY]"),
        ("--fixed-shapes", bool, False, "refuse rows of other sizes than those of the examples"),
        "workers",
        *pool_options("10 deadlines, at least 1s"),
        ("--parts", int, 4, "parts per batch"),
        ("--verify", float, 0.0, "the share of rows that a second worker computes, too"),
        ("--chaos", bool, False, "for a trial, delay 3 %% of calls and kill a worker every 5 s"),
        ("--seed", int, 0, "with --chaos: the seed of its random choices"),
        "endpoints instead of processes",
        ("--endpoints", list, None, "servers (KServe v2) that compute instead of processes"),
        ("--model", str, None, "the model's name at the endpoints"),
        ("--header", dict, None, "headers for the endpoints, from NAME=@FILE or NAME='$VARIABLE'"),
        ("--ca-file", Path, None, "a PEM file of the authority that certifies the endpoints"),
        "requests and answers",
        (
            "--deadline",
            seconds,
            0.2,
            "the time from a request to its answer; late rows are estimated",
        ),
        ("--no-estimates", bool, False, "answer late requests with 504 instead of estimates"),
        ("--max-batch-size", int, 64, "the most rows per batch"),
        ("--max-queued-requests", int, 256, "the most requests that wait"),
        ("--memory", bool, False, "estimate missing rows from earlier requests of any client"),
        "server",
        ("--host", str, "127.0.0.1", "the address to listen on"),
        ("--port", int, 8000, "the port to listen on, or 0 for any free one"),
        ("--allowed-hosts", list, None, "host names that requests may use, beside loopback ones"),
        ("--token", str, None, "@FILE or '$VARIABLE': lets clients elsewhere load new weights"),
        ("--page", bool, False, "show the page and examples although HOST is not a loopback one"),
        ("--example", int, None, "print a request with the example row of this number, and end"),
    ),
    job: (
        "model",
        ("factory", str, None, f"{_MODEL} or a CodedWrapper, alone or with examples"),
        "input",
        ("--inputs", list, None, "files or quoted patterns: .npy, .safetensors, .parquet, .pt"),
        ("--columns", str, None, _COLUMNS),
        ("--batch-size", int, 256, "rows per batch"),
        "output",
        ("--output", Path, None, "the folder of results, one file per batch"),
        ("--format", ("torch", "parquet"), "torch", "the format of results"),
        ("--keys", str, None, "columns of the inputs that results repeat, such as a,b"),
        ("--select", str, None, "outputs that results hold, such as logits,score [all]"),
        ("--resume", bool, False, _RESUME),
        ("--trust-model", bool, False, "with --resume: let model, files and versions differ"),
        ("--check", Path, None, "a job's folder: print its missing and wrong batches, and end"),
        "workers",
        *pool_options("30s"),
        ("--in-flight", int, 4, "batches in progress at once"),
        ("--deadline", seconds, None, "the time after which missing rows are estimated"),
        ("--on-error", ("raise", "estimate"), "raise", "what to do if the model fails on a row"),
        "means",
        (
            "--mean",
            bool,
            False,
            "estimate the means over all rows, computing only the rows that are needed",
        ),
        ("--half-width", float, None, "with --mean: end when 95 %% intervals have this half width"),
        ("--bounds", _bounds, None, "with --mean: LOW,HIGH, between which all numbers lie"),
        ("--mean-function", str, None, "with --mean: MODULE:FUNCTION of outputs and row numbers"),
    ),
    plan: (
        "goals",
        ("--deadline", seconds, 0.2, "the time within which 99.9 %% of the requests are answered"),
        ("--accuracy", float, 0.99, "the least share of rows that get the class of the model"),
        "workers",
        ("--latencies", Path, None, "a CSV file of measured seconds, one part per line"),
        ("--conditions", tuple(planner.CONDITIONS), "mix", "how workers fail, without --latencies"),
        ("--median", seconds, 0.01, "the median time per part, with --conditions"),
        ("--num-workers", int, 6, "the number of workers"),
        ("--parts", int, 4, "parts per request when latencies were measured"),
        ("--load", float, 0.3, "the share of the workers' time that requests take"),
        ("--verify", float, 0.0, "the share of rows that a second worker computes, too"),
        "simulation",
        ("--num-requests", int, 5000, "simulated requests per policy"),
        ("--seed", int, 0, "the seed of all draws"),
    ),
    info: (
        (
            "--device",
            ("cpu", "cuda"),
            "cpu",
            "with cuda, try and time all kernels on a GPU",
        ),
        ("--json", Path, None, "the file of all that the GPU shows, written after each step"),
        ("--tests", Path, None, "the folder of the sources, whose tests marked cuda run, too"),
        ("--quick", bool, False, "time few and small sizes"),
    ),
}
_GROUPS = {"models and jobs": (serve, job, info), "experiments": (demo, compare, tune, plan)}


def _help(run: Callable[..., Any]) -> tuple[str, str]:
    """Return the first line of a command's docstring, and its example, which may be empty."""
    summary, _, example = (inspect.getdoc(run) or "").partition("\n\n")
    return summary, example


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``coded-torch``, by default with the arguments of the process.

    Return its exit code.
    """
    text = "PyTorch inference that finishes although workers fail, and coded computing."
    for title, commands in _GROUPS.items():
        text += f"\n\n{title}:"
        for each in commands:
            summary, _ = _help(each)
            text += f"\n  {each.__name__:<9} {summary}"
    parser = argparse.ArgumentParser(
        prog="coded-torch",
        usage="%(prog)s [--version] COMMAND ...",
        description=text,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"coded_torch {coded_torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    added = parser.add_subparsers(
        required=True, prog="coded-torch", metavar="COMMAND", help=argparse.SUPPRESS
    )
    for run, table in _COMMANDS.items():
        summary, example = _help(run)
        command = added.add_parser(
            run.__name__,
            description=summary,
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        options(command, *table)
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    args.line = [*(sys.argv[1:] if argv is None else argv)]
    try:
        return args.run(args) or 0
    except CommandError as error:
        if str(error):
            name = args.run.__name__
            why = str(error).removeprefix(f"{name}: ")
            print(f"coded-torch {name}: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # the exit code of a shell for SIGINT
