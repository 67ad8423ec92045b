"""The command ``coded-torch job``: all rows of a file through a model, batch by batch."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._arguments import count
from ..nn import CodedWrapper, Report, Waiting
from ..workers import ProcessWorkers
from .console import find_factory, need, say, usage

__all__ = ["job"]


def job(args: argparse.Namespace) -> None:
    """Compute the answers to all rows, and write each batch as soon as it is answered."""
    with usage("job"):
        read, rows = _open(args.inputs)
    coded = find_factory("job", args.factory)()
    with usage("job"):
        if not isinstance(coded, CodedWrapper):
            waiting = Waiting(deadline=args.deadline, predict=args.deadline is not None)
            coded = CodedWrapper(coded, workers=ProcessWorkers(args.num_workers), waiting=waiting)
        count("job", "batch_size", args.batch_size)
        _claim(args, coded.module, rows)
        paths = [args.output / f"batch-{start:012}.pt" for start in range(0, rows, args.batch_size)]
        missing = [(n * args.batch_size, path) for n, path in enumerate(paths) if not path.exists()]
        batches = (read(start, min(rows, start + args.batch_size)) for start, _ in missing)
        found = coded.eval().map(batches, in_flight=args.in_flight)
    counts: Counter[str] = Counter()
    begin = time.monotonic()
    try:
        with coded.workers, torch.no_grad():
            for (_, path), (answers, report) in zip(_shown(missing), found, strict=True):
                _write(path, answers, report)
                predicted = 0 if report.predicted is None else int(report.predicted.sum())
                size = 0 if report.predicted is None else len(report.predicted)
                counts.update(
                    batches=1,
                    exact=size - predicted,
                    predicted=predicted,
                    hedges=len(report.hedges),
                )
    finally:
        seconds = time.monotonic() - begin
        there = len(paths) - len(missing) + counts["batches"]
        total = counts["exact"] + counts["predicted"]
        say(
            f"{there} of {len(paths)} batches are in {args.output}. This run: "
            f"{counts['exact']:,} exact rows, {counts['predicted']:,} predicted rows, "
            f"{counts['hedges']:,} hedges, {coded.workers.num_restarts} workers lost, "
            f"{total / max(seconds, 1e-9):,.0f} rows per second."
        )


def _shown(items: Iterable[Any]) -> Iterable[Any]:
    """Return the items with a progress bar, if there is tqdm and a terminal."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        items = tqdm(items, desc="batches", disable=None)
    return items


def _open(path: Path) -> tuple[Callable[[int, int], tuple[Tensor, ...]], int]:
    """Return a function that reads some rows of each input, and the number of rows."""
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r")
        lengths = [len(np.atleast_1d(array))]

        def read(start: int, end: int) -> tuple[Tensor, ...]:
            return (torch.from_numpy(np.array(array[start:end])),)
    elif path.suffix == ".safetensors":
        need("job", "job", "safetensors")
        from safetensors import safe_open

        opened: Any = safe_open(path, "pt")
        slices = [opened.get_slice(name) for name in sorted(opened.keys())]
        lengths = [x.get_shape()[0] for x in slices]

        def read(start: int, end: int) -> tuple[Tensor, ...]:
            return tuple(x[start:end] for x in slices)
    else:
        raise ValueError(f"--inputs must be a .npy or .safetensors file, got {path}")
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"--inputs must hold tensors of as many rows each, got {lengths}")
    return read, lengths[0]


def _claim(args: argparse.Namespace, module: nn.Module, rows: int) -> None:
    """Begin a job in its folder, or check that the folder holds the same job."""
    digest = hashlib.sha256(repr(module).encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            value = flat.view(torch.uint8).numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    now = {
        "inputs": [rows, args.inputs.stat().st_size, args.inputs.stat().st_mtime_ns],
        "model": [args.factory, digest.hexdigest()],
        "batch-size": args.batch_size,
        "deadline": args.deadline,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "job.json"
    if not path.exists():
        if any(each.name != "job.part" for each in args.output.iterdir()):  # cut short
            raise ValueError(f"--output must be an empty folder, got {args.output}")
        _replace(path, lambda file: file.write(json.dumps(now).encode()))
        return
    if not args.resume:
        raise ValueError(f"--output {args.output} holds a job; --resume goes on with it")
    before = json.loads(path.read_text())
    if different := [key for key, value in now.items() if before.get(key) != value]:
        must = f"the same {' and '.join(different)} as the job in {args.output}"
        raise ValueError(f"--resume must be given {must}")


def _write(path: Path, answers: Any, report: Report) -> None:
    """Write a batch for ``torch.load``: outputs, leaf by leaf, and their errors."""
    content = {
        "outputs": pytree.tree_leaves(answers),
        "predicted": report.predicted,
        "radii": report.radii,
    }
    _replace(path, lambda file: torch.save(content, file))


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file whole or not at all, even if the process or the host ends meanwhile."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
