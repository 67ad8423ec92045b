"""Run the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import datetime
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .runs import QUESTIONS, RESULTS, expected_seconds, keep

INTERRUPTED = 130  # the exit code


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 1 if a benchmark failed; 130 if they were interrupted."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["kernels"]:
        from . import kernels

        return kernels.main(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run benchmarks, each a question, and keep their numbers in benchmarks/results;"
        f" those that are there are not measured again. In this order: {', '.join(QUESTIONS)}."
        " Compiled kernels have options of their own: python -m benchmarks kernels --help. This"
        " version is compared with another one by: python -m benchmarks against REVISION.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which of these, or all [all]")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small and rough, without data packages; keeps nothing unless --output says where",
    )
    one = parser.add_argument_group("with one NAME")
    one.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only what has these in its name"
    )
    one.add_argument(
        "--again", action="store_true", help="measure what --only names anew, and replace it"
    )
    one.add_argument("--output", type=Path, metavar="FILE", help="instead of results/NAME.json")
    one.add_argument(
        "--rows", type=Path, metavar="FOLDER", help="write raw rows of comparisons, a CSV file each"
    )
    args = parser.parse_args(argv)
    if args.names[:1] == ["against"]:
        if len(args.names) != 2:
            parser.error(f"against needs one REVISION, got {args.names[1:]}")
        try:
            return run_against(args)
        except (ValueError, RuntimeError) as error:
            parser.error(str(error))
    names = list(QUESTIONS) if args.names in ([], ["all"]) else args.names
    for name in names:
        if name not in QUESTIONS:
            parser.error(f"NAME must be one of {', '.join(QUESTIONS)}, got {name!r}")
    if len(names) > 1 and (args.only, args.output, args.rows) != ([], None, None):
        parser.error(f"--only, --output and --rows need one NAME, got {len(names)}")
    if args.again and not args.only:
        parser.error("--again needs --only, which names what to measure anew")
    try:
        if len(names) == 1:
            run(names[0], args)
            return 0
        return run_all(names, args)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nstopped; finished measurements are kept, and a second run takes the others")
        return INTERRUPTED


def run(name: str, args: argparse.Namespace) -> None:
    """Run one benchmark, in this process."""
    import torch

    benchmark = importlib.import_module(f".{name}", __package__)
    torch.set_num_threads(1)
    # With raw rows all is measured again, so results stay as they are.
    path = args.output or (None if args.quick or args.rows else RESULTS / f"{name}.json")
    given = {"quick": args.quick, "only": args.only, "again": args.again, "rows": args.rows}
    keep(name, benchmark, path=path, **given)


def run_against(args: argparse.Namespace) -> int:
    """Compare this version with another revision, and print the table of all measured so far."""
    from . import against

    benchmark = against.Benchmark(args.names[1])
    with tempfile.TemporaryDirectory() as scratch:
        quick = Path(scratch, "quick.json") if args.quick else benchmark.path
        path = args.output or quick
        given = {"quick": args.quick, "only": args.only, "again": args.again}
        keep(f"against {args.names[1]}", benchmark, path=path, **given)
        print(against.table(path))
    return 0


def run_all(names: Sequence[str], args: argparse.Namespace) -> int:
    """Run several in order, and print how long each took. None begins after one has failed.

    Each has a process of its own, so that none finds what another left in memory. Quick runs share
    this process, because most of them take less time than the import of torch.
    """
    ordered = [name for name in QUESTIONS if name in names]
    if not args.quick:
        print("Committed results took, in hours, minutes and seconds:")
        for name in ordered:
            print(f"  {name:<16}{_duration(expected_seconds(name))}")
        print("What is in benchmarks/results is not measured again.\n", flush=True)
    taken: dict[str, float] = {}
    for name in ordered:
        begin = time.monotonic()
        if args.quick:
            run(name, args)
        else:
            code = subprocess.run([sys.executable, "-m", __package__, name]).returncode
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            if code:
                print(f"{name} failed with exit code {code}", file=sys.stderr)
                return 1
        taken[name] = time.monotonic() - begin
        print(f"{name} took {_duration(taken[name])}", flush=True)
    print("\nIn order, with hours, minutes and seconds:")
    for name, seconds in {**taken, "all": sum(taken.values())}.items():
        print(f"  {name:<16}{_duration(seconds)}")
    return 0


def _duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    sys.exit(main())
