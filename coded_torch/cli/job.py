"""The command ``coded-torch job``: all rows of a file through a model, batch by batch."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._arguments import count
from ..nn import CodedWrapper, Waiting
from ..workers import ProcessWorkers
from . import find_factory, need, say, usage

__all__ = ["job"]


def job(args: argparse.Namespace) -> None:
    """Compute the answers to all rows, and write the batches in order."""
    with usage("job: --inputs cannot be read", errors=Exception):
        rows, read = _open(args.inputs)
        next(read(1, [0]))
    made = find_factory("job", args.factory)()
    coded = made[0] if isinstance(made, tuple) and made else made  # `serve` needs examples, too
    with contextlib.ExitStack() as held:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        held.callback(signal.signal, signal.SIGTERM, before)
        with usage("job"):
            if not isinstance(coded, CodedWrapper):
                how = {"predict": args.deadline is not None or args.on_error == "predict"}
                waiting = Waiting(args.deadline, float("inf"), on_error=args.on_error, **how)
                workers = ProcessWorkers(args.num_workers)
                coded = CodedWrapper(coded, workers=workers, waiting=waiting)
            size = count("job", "batch_size", args.batch_size)
            args.output.mkdir(parents=True, exist_ok=True)
            # No other process can lock the file before it is closed, or this process ends.
            lock = held.enter_context((args.output / "job.lock").open("w"))
            with usage(f"job: --output {args.output} must not be in use by another job"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _claim(args, coded.module, rows)
            starts = range(0, rows, size)
            paths = {start: args.output / f"batch-{start:012}.pt" for start in starts}
            missing = [start for start, path in paths.items() if not zipfile.is_zipfile(path)]
            found = coded.eval().map(read(size, missing), in_flight=args.in_flight)
        held.enter_context(coded.workers)
        held.enter_context(torch.no_grad())
        counts: Counter[str] = Counter()
        begin, end = time.monotonic(), ""
        progress: Iterable[int] = missing
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            progress = tqdm(missing, desc="batches", disable=None)  # if there is a terminal
        try:
            for start, (answers, report) in zip(progress, found, strict=True):
                # A zip file for ``torch.load``: outputs, a dict or a list, and their errors.
                outputs = dict(answers) if isinstance(answers, Mapping) else tree_leaves(answers)
                content = {"outputs": outputs, "predicted": report.predicted, "radii": report.radii}
                with usage("job: --output cannot be written", errors=OSError):
                    _replace(paths[start], functools.partial(torch.save, content))
                flags = [] if report.predicted is None else report.predicted.tolist()
                counts.update("predicted" if flag else "exact" for flag in flags)
                counts.update(batches=1, hedges=len(report.hedges))
        except Exception as error:
            if "batch" in (facts := vars(error)):  # numbered by `map`, from the first missing one
                first = missing[facts["batch"]]
                rows_of_file = [first + row for row in facts.get("rows", ())]
                end = f"\nBatch {first // size}, from row {first} of {args.inputs}, failed. "
                end += f"The first failing rows of the file: {rows_of_file[:16] or 'none'}."
                facts |= {"batch": first // size, "rows": rows_of_file}
                facts["__notes__"][-1] = end.strip()
            raise
        finally:
            total = counts["exact"] + counts["predicted"]
            speed = total / max(time.monotonic() - begin, 1e-9)
            there = len(paths) - len(missing) + counts["batches"]
            end += "" if there == len(paths) else "\nGo on with --resume."
            say(
                f"{there} of {len(paths)} batches are in {args.output}. This run: "
                f"{counts['exact']:,} exact rows, {counts['predicted']:,} predicted rows, "
                f"{counts['hedges']:,} hedges, {coded.workers.num_restarts} workers lost, "
                f"{speed:,.0f} rows per second.{end}"
            )


def _open(path: Path) -> tuple[int, Callable[[int, list[int]], Iterator[tuple[Tensor, ...]]]]:
    """Return the number of rows, and a function that yields the batches of a size by their starts.

    A batch has a tensor for each input.
    """
    if path.suffix == ".parquet":
        need("job", "job", "pyarrow")
        from pyarrow import parquet

        file = parquet.ParquetFile(path)
        lengths = [file.metadata.num_rows]
    elif path.suffix == ".safetensors":
        need("job", "job", "safetensors")
        from safetensors import safe_open

        opened: Any = safe_open(path, "pt")
        inputs = [opened.get_slice(name) for name in sorted(opened.keys())]
        lengths = [[*x.get_shape(), 0][0] for x in inputs]
    elif path.suffix == ".npy":
        inputs = [np.atleast_1d(np.load(path, mmap_mode="r"))]  # pages are read on demand
        lengths = [len(inputs[0])]
    else:
        raise ValueError(f"it must be a .npy, .safetensors or .parquet file, got {path}")
    rows = lengths[0] if len(set(lengths)) == 1 else 0
    if not rows:
        raise ValueError(f"it must hold rows, as many of each tensor, got {lengths}")

    def slices(size: int, starts: list[int]) -> Iterator[tuple[Tensor, ...]]:
        for i in starts:
            parts = (x[i : min(i + size, rows)] for x in inputs)
            yield tuple(x if isinstance(x, Tensor) else torch.tensor(x) for x in parts)

    def columns(size: int, starts: list[int]) -> Iterator[tuple[Tensor, ...]]:
        at, wanted = 0, set(starts)
        for batch in file.iter_batches(size) if wanted else ():
            if batch.num_rows != min(size, rows - at):
                raise RuntimeError("this version of pyarrow ends batches at row groups")
            if at in wanted:
                yield tuple(_column(name, batch[name]) for name in sorted(batch.schema.names))
            at += size

    return rows, columns if path.suffix == ".parquet" else slices


def _column(name: str, column: Any) -> Tensor:
    """Return a column of numbers, or of lists of numbers."""
    values = column
    while hasattr(values.type, "value_field") and not values.null_count:  # a list
        values = values.flatten()
    if values.null_count:
        raise ValueError(f"--inputs must have no nulls, got some in the column {name!r}")
    kind = getattr(values.type, "value_type", values.type)  # a dictionary has one, too
    return torch.from_numpy(np.array(column.to_pylist(), kind.to_pandas_dtype()))


def _claim(args: argparse.Namespace, module: nn.Module, rows: int) -> None:
    """Begin a job in its folder, or check that the folder holds the same job.

    The digests are of the inputs' bytes, of the module's ``repr`` without addresses, which differ
    in every process, and of every byte of its state.
    """
    content = hashlib.blake2b(np.memmap(args.inputs, mode="r").data, digest_size=16)
    digest = hashlib.blake2b(_shown(module), digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(_shown(value))
    now = {
        "inputs": f"of {rows} rows, digest {content.hexdigest()}",
        "model": f"{args.factory}, digest {digest.hexdigest()}",
        "batch-size": args.batch_size,
        "deadline": args.deadline,
    }
    path = args.output / "job.json"
    if not path.exists():
        ours = ("job.lock", "job.part")  # a job that was cut short leaves them
        if any(each.name not in ours for each in args.output.iterdir()):
            raise ValueError(f"--output must be an empty folder, got {args.output}")
        _replace(path, lambda file: file.write(json.dumps(now).encode()))
        return
    if not args.resume:
        raise ValueError(f"--output {args.output} holds a job; --resume goes on with it")
    before = json.loads(path.read_text())
    if different := [key for key, value in now.items() if before.get(key) != value]:
        must = "; ".join(f"{key} {before.get(key)}, got {now[key]}" for key in different)
        raise ValueError(f"--resume must repeat the job in {args.output}: {must}")


def _shown(value: object) -> bytes:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file whole or not at all, even if the process or the host ends meanwhile."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
