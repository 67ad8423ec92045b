"""Run the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .runs import ERRORS, RESULTS, TIMES, keep

INTERRUPTED = 130  # the exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 1 if a benchmark failed; 130 if they were interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run benchmarks, each a question, and keep their numbers in benchmarks/results;"
        f" those that are there are not measured again. In this order: {', '.join(ERRORS + TIMES)}."
        " Compiled kernels have a command of their own: python -m benchmarks.kernels.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which of these [all]")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small and rough, without data packages; keeps nothing unless --output says where",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="how many to run at once, of those that measure no times [%(default)s]",
    )
    one = parser.add_argument_group("with one NAME")
    one.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only what has these in its name"
    )
    one.add_argument("--output", type=Path, metavar="FILE", help="instead of results/NAME.json")
    args = parser.parse_args(argv)
    names = args.names or [*ERRORS, *TIMES]
    for name in names:
        if name not in ERRORS + TIMES:
            parser.error(f"NAME must be one of {', '.join(ERRORS + TIMES)}, got {name!r}")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if len(names) > 1 and (args.only, args.output) != ([], None):
        parser.error(f"--only and --output need one NAME, got {len(names)}")
    try:
        return run(args) if len(names) == 1 else run_all(names, args.quick, args.jobs)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, and a second run goes on from there")
        return INTERRUPTED


def run(args: argparse.Namespace) -> int:
    """Run one benchmark, in this process."""
    import torch

    (name,) = args.names
    benchmark = importlib.import_module(f".{name}", __package__)
    torch.set_num_threads(1)
    path = args.output or (None if args.quick else RESULTS / f"{name}.json")
    keep(name, benchmark, quick=args.quick, only=args.only, path=path)
    return 0


def run_all(names: Sequence[str], quick: bool, jobs: int) -> int:
    """Run several, each in a process of its own; none begins after one has failed."""
    stopped = threading.Event()

    def start(name: str) -> int:
        if stopped.is_set():
            return 0
        command = [sys.executable, "-m", __package__, name, *(["--quick"] if quick else [])]
        code = subprocess.run(command).returncode
        if code:
            stopped.set()
            if code != INTERRUPTED:
                print(f"{name} failed with exit code {code}", file=sys.stderr)
        return code

    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(start, [name for name in names if name in ERRORS]))
    codes += [start(name) for name in names if name in TIMES]
    if INTERRUPTED in codes:
        raise KeyboardInterrupt
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
