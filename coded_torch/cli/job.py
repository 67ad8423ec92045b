"""The command ``coded-torch job``: all rows of a file through a model, batch by batch."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import operator
import os
import pickle
import re
import signal
import sys
import time
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import BoundArguments
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import coded_torch

from .._arguments import count
from ..codes import NotEnoughResults
from ..nn import CodedWrapper, Waiting
from ..workers import ProcessWorkers
from . import CommandError, find_factory, need, replace, say, usage
from .mean import mean, start

logger = logging.getLogger("coded_torch.job")

_MANIFEST = "manifest.sha256"  # digests of batches, which `sha256sum --check` reads, too


def job(args: argparse.Namespace) -> None:
    """Compute the answers to all rows of a file, or their mean, and go on after an interruption."""
    if args.check is not None:
        _check(args.check)
        return
    if None in (args.factory, args.inputs, args.output):
        raise CommandError("coded-torch job: MODULE:FACTORY, --inputs and --output must be given")
    with usage("job: --inputs cannot be read", errors=Exception):
        names, rows, read = _open(args.inputs, args.mean)
    factory = find_factory("job", args.factory)
    args.of = None if args.of is None else find_factory("job", args.of)
    made = factory()
    coded = made[0] if isinstance(made, tuple) and made else made  # `serve` needs examples, too
    with contextlib.ExitStack() as held:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        held.callback(signal.signal, signal.SIGTERM, before)
        with usage("job"):
            if not args.mean and (args.of, args.half_width) != (None, None):
                raise ValueError("--of and --half-width must be left out without --mean")
            is_made = isinstance(coded, CodedWrapper)
            if (args.deadline, args.on_error) != (None, "raise") and (args.mean or is_made):
                why = f"{args.factory} returns a CodedWrapper with its own waiting"
                why = "a mean without some rows is biased" if args.mean else why
                raise ValueError(f"--deadline and --on-error must be left out, as {why}")
            if not is_made:
                waiting = Waiting(args.deadline, on_error=args.on_error)
                workers = ProcessWorkers(args.num_workers, grace=args.grace)
                coded = CodedWrapper(coded, workers=workers, waiting=waiting)
            columns = _columns(args, names, coded.eval().module)
            next(read(columns, 1, [0]))
            mapping = ", ".join(f"{name}={x}" for name, x in columns.arguments.items())
            size = count("job", "batch_size", args.batch_size)
            args.output.mkdir(parents=True, exist_ok=True)
            # No other process can lock the file before it is closed, or this process ends.
            lock = held.enter_context((args.output / "job.lock").open("w"))
            with usage(f"job: --output {args.output} must not be in use by another job"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _claim(args, factory, coded, rows, mapping)
        say(f"Columns of {args.inputs}: {mapping}.")
        held.enter_context(coded.workers)
        held.enter_context(torch.no_grad())
        run = mean if args.mean else _every_row
        run(args, coded, rows, functools.partial(read, columns, size))


def _every_row(args: argparse.Namespace, coded: CodedWrapper, rows: int, read: Any) -> None:
    """Compute and write the batches that are missing or wrong."""
    size = args.batch_size
    with contextlib.ExitStack() as held:
        with usage("job"):
            good, wrong = _examine(args.output, rows, size)
            if again := [name for name, why in wrong.items() if why != "is missing"]:
                logger.warning("batches without a fitting digest are computed again: %s", again)
            lines = (f"{digest}  {name}\n" for name, digest in good.items())
            replace(args.output / _MANIFEST, "".join(lines).encode())
            manifest = held.enter_context((args.output / _MANIFEST).open("a"))
            missing = [int(name[6:18]) for name in wrong]
            found = coded.map(read(missing), in_flight=args.in_flight)
        counts: Counter[str] = Counter()
        begin, end = time.monotonic(), ""
        progress: Iterable[str] = wrong
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            progress = tqdm(wrong, desc="batches", disable=None)  # if there is a terminal
        try:
            for first in read(missing[:1]):
                start(coded, first)
            for name, (answers, report) in zip(progress, found, strict=True):
                # A zip file for ``torch.load``: outputs, a dict or a list, and their errors.
                outputs = dict(answers) if isinstance(answers, Mapping) else tree_leaves(answers)
                content = {"outputs": outputs, "estimated": report.estimated, "radii": report.radii}
                with usage("job: outputs must be what torch.load can read", errors=Exception):
                    torch.save(content, file := io.BytesIO())
                    torch.load(io.BytesIO(data := file.getbuffer()), weights_only=True)
                with usage("job: --output cannot be written", errors=OSError):
                    replace(args.output / name, data)
                    # Written later: a batch without its digest is computed again.
                    print(f"{hashlib.sha256(data).hexdigest()}  {name}", file=manifest, flush=True)
                    os.fsync(manifest.fileno())
                flags = [] if report.estimated is None else report.estimated.tolist()
                counts.update("estimated" if flag else "computed" for flag in flags)
                counts.update(batches=1, hedges=len(report.hedges))
        except Exception as error:
            if "batch" in (facts := vars(error)):  # numbered by `map`, from the first missing one
                first = missing[facts["batch"]]
                failing = [first + row for row in facts.get("rows", ())]
                facts |= {"batch": first // size, "rows": failing}
                end = f"Batch {first // size}, from row {first} of {args.inputs}, failed. "
                end += f"The first failing rows of the file: {failing[:16]}. " if failing else ""
                facts["__notes__"][-1] = end.strip()
            if isinstance(error, NotEnoughResults):  # the user's own code raised nothing
                raise CommandError(f"coded-torch job: {error}. {end.strip()}") from None
            raise
        finally:
            total = counts["computed"] + counts["estimated"]
            speed = total / max(time.monotonic() - begin, 1e-9)
            there, every = len(good) + counts["batches"], len(good) + len(wrong)
            end = "" if there == every else f"\n{end}Go on with --resume."
            say(
                f"{there} of {every} batches are in {args.output}. This run: "
                f"{counts['computed']:,} computed rows, {counts['estimated']:,} estimated rows, "
                f"{counts['hedges']:,} hedges, {coded.workers.num_restarts} workers lost, "
                f"{speed:,.0f} rows per second.{end}"
            )


# Inputs and calls.


def _open(
    path: Path, whole: bool = False
) -> tuple[list[str], int, Callable[..., Iterator[BoundArguments]]]:
    """Return the names of the columns, the number of rows, and a function that reads batches.

    It puts tensors in the place of columns, for each batch of a size that begins at some rows. To
    read batches in any order, ``whole`` reads all of a Parquet file at once.
    """
    look = operator.attrgetter("st_ino", "st_size", "st_mtime_ns")
    before, file = look(path.stat()), None
    if path.suffix == ".parquet":
        need("job", "job", "pyarrow")
        from pyarrow import parquet

        file = parquet.ParquetFile(path)
        inputs: dict[str, Any] = dict.fromkeys(file.schema_arrow.names)
        lengths = {file.metadata.num_rows}
        if whole:
            inputs, file = {name: file.read([name])[name] for name in inputs}, None
    elif path.suffix == ".safetensors":
        need("job", "job", "safetensors")
        from safetensors import safe_open

        opened: Any = safe_open(path, "pt")
        inputs = {name: opened.get_slice(name) for name in sorted(opened.keys())}
        lengths = {[*x.get_shape(), 0][0] for x in inputs.values()}
    elif path.suffix == ".npy":
        inputs = {"rows": np.atleast_1d(np.load(path, mmap_mode="c"))}  # read on demand
        lengths = {len(inputs["rows"])}
    else:
        raise ValueError(f"it must be a .npy, .safetensors or .parquet file, got {path}")
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"it must hold rows, as many of each tensor, got {sorted(lengths)}")
    (rows,) = lengths

    def read(columns: BoundArguments, size: int, starts: list[int]) -> Iterator[BoundArguments]:
        places, wanted = (columns.args, columns.kwargs), set(starts)
        names, all_starts = tree_leaves(places), range(0, max(starts, default=-1) + 1, size)
        with usage("job: --inputs cannot be read", errors=Exception):
            tables = file.iter_batches(size, columns=names) if file else itertools.repeat(inputs)
            for start, table in zip(all_starts, tables, strict=False):
                if file and table.num_rows != min(size, rows - start):
                    raise RuntimeError("this version of pyarrow ends batches at row groups")
                if start in wanted:
                    part = slice(None) if file else slice(start, start + size)
                    tensors = {name: _tensor(name, table[name][part]) for name in names}
                    if look(path.stat()) != before:
                        raise ValueError(f"{path} has changed since the job began")
                    args, kwargs = tree_map(tensors.get, places)
                    yield columns.signature.bind(*args, **kwargs)

    return list(inputs), rows, read


def _tensor(name: str, column: Any) -> Tensor:
    """Return a column that holds numbers or, in a Parquet file, lists of numbers."""
    values = column
    if isinstance(values, (Tensor, np.ndarray)):
        return torch.as_tensor(values).clone()
    while hasattr(values.type, "value_field") and not values.null_count:  # a list
        values = values.flatten()
    if values.null_count:
        raise ValueError(f"it must have no nulls, got some in the column {name!r}")
    kind = getattr(values.type, "value_type", values.type)  # a dictionary has one, too
    return torch.from_numpy(np.array(column.to_pylist(), kind.to_pandas_dtype()))


def _columns(args: argparse.Namespace, names: list[str], module: nn.Module) -> BoundArguments:
    """Return the names of the columns in the places of the arguments of ``forward``."""
    signature = inspect.signature(lambda *args, **kwargs: None)
    with contextlib.suppress(ValueError):  # TorchScript may have none; compiled modules hide it
        signature = inspect.signature(getattr(module, "_orig_mod", module).forward)
    kinds = {name: x.kind.name for name, x in signature.parameters.items()}
    by_name = all(kinds.get(x) in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY") for x in names)
    by_name |= set(kinds.values()) == {"VAR_KEYWORD"}
    pairs = [(name if by_name and args.inputs.suffix != ".npy" else "", name) for name in names]
    if args.columns is not None:
        pairs = [each.rpartition("=")[::2] for each in args.columns.split(",")]
    by_order = [column for name, column in pairs if not name]
    with usage(f"job: --columns must name columns for forward{signature}, as a,b or x=a,y=b"):
        if args.columns is None and len(by_order) > 1:
            raise ValueError(f"the file has {names}")
        if unknown := [column for _, column in pairs if column not in names]:
            raise ValueError(f"{unknown} are not among {names}")
        named = {name: column for name, column in pairs if name}
        if len(by_order) + len(named) < len(pairs):
            raise ValueError(f"an argument is named twice, got {args.columns}")
        return signature.bind(*by_order, **named)


# The folder.


def _claim(args: Any, factory: Any, coded: CodedWrapper, rows: int, mapping: str) -> None:
    """Begin a job in its folder, or check that the folder holds the same job."""
    path, before = args.output / "job.json", dict[str, Any]()
    if path.exists():
        if not args.resume:
            raise ValueError(f"--output {args.output} holds a job; --resume goes on with it")
        before = _read_claim(path)
    elif {*os.listdir(args.output)} - {"job.lock", "job.part"}:  # a job that was cut short
        raise ValueError(f"--output must be an empty folder, got {args.output}")
    if coded.code is None and coded.parts is None:  # rounding may depend on the rows of a part
        coded.parts = before.get("parts") or coded.workers.num_workers
    sources = {args.factory.partition(":")[0]}
    inputs = hashlib.blake2b(np.memmap(args.inputs, mode="r").data, digest_size=16).hexdigest()
    now = {"inputs": f"of {rows} rows, digest {inputs}", "rows": rows, "columns": mapping}
    now |= {"batch-size": args.batch_size, "parts": coded.parts, "waiting": str(coded.waiting)}
    for name in ("code", "estimator", "surrogate", "verify", "in_dims", "out_dims"):
        now[name] = f"digest {_digest(getattr(coded, name), sources)}"
    now["mean"] = f"digest {_digest(args.of, sources)}" if args.mean else ""
    # The option --trust-model leaves these out.
    trusted = {"model": f"{args.factory}, digest {_digest((factory, coded.module), sources)}"}
    names = sorted(name for name in sources if name.partition(".")[0] != "torch")  # by its version
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    content = {name: Path(file).read_bytes() for name, file in files.items() if file}
    trusted["source"] = f"digest {_digest(content, set())}"
    trusted["versions"] = f"torch {torch.__version__}, coded_torch {coded_torch.__version__}"
    compared = now if args.trust_model else now | trusted
    # An older version knew fewer options: those that it did not know were left out.
    differ = [key for key, value in compared.items() if before.get(key, "") != value]
    if before and differ and any(args.output.glob("*.pt")):
        must = "; ".join(f"{key} {before.get(key)}, got {compared[key]}" for key in differ)
        how = " (--trust-model goes on)" if trusted.keys() >= {*differ} else ""
        raise ValueError(f"--resume must repeat the job in {args.output}: {must}{how}")
    replace(path, json.dumps(now | trusted).encode())


def _read_claim(path: Path) -> dict[str, Any]:
    with contextlib.suppress(KeyError, RecursionError, TypeError, ValueError):
        claim = json.loads(path.read_bytes())
        if type(claim["rows"]) is type(claim["batch-size"]) is int:
            return dict(claim)
    raise ValueError(f"{path} must describe a job, but it is damaged, or of an earlier version")


class _Pickler(pickle.Pickler):
    """Writes a value in the same way in every process, and collects the modules of its code."""

    modules: set[str]

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(_digest(each, self.modules) for each in value)
        if isinstance(value, torch.jit.ScriptModule):  # the order in its code differs
            with zipfile.ZipFile(io.BytesIO(value.save_to_buffer())) as file:
                names = [name for name in file.namelist() if re.search("/(data|constants)", name)]
                return str(value.inlined_graph), *map(file.read, names)
        if isinstance(value, Tensor):
            value = value.dequantize() if value.is_quantized else value.to_dense()
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return str(value.dtype), *value.shape, hashlib.blake2b(flat.numpy().data).digest()
        if isinstance(value, (type, types.FunctionType)):
            self.modules.update(str(x.__module__) for x in getattr(value, "__mro__", [value]))
            return value.__qualname__
        return None

    def reducer_override(self, value: Any) -> Any:
        with contextlib.suppress(Exception):
            if isinstance(reduced := value.__reduce_ex__(4), tuple):
                return reduced
        return str, (re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)),)  # a lock cannot be pickled


def _digest(value: Any, modules: set[str]) -> str:
    pickler = _Pickler(file := io.BytesIO(), 4)
    pickler.modules = modules
    pickler.dump(value)
    return hashlib.blake2b(file.getbuffer(), digest_size=16).hexdigest()


def _examine(folder: Path, rows: int, size: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digests of good batches, and what is wrong with the other ones, by their names."""
    path = folder / _MANIFEST
    text = path.read_text(errors="replace") if path.exists() else ""
    known = dict(map(reversed, re.findall(r"^(\w{64})  (\S+)\n", text, re.M)))
    good, wrong = dict[str, str](), dict[str, str]()
    for name in (f"batch-{first:012}.pt" for first in range(0, rows, size)):
        path, digest = folder / name, known.get(name, "")
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            good[name] = digest
        else:
            wrong[name] = "has no digest that fits" if path.exists() else "is missing"
    return good, wrong


def _check(folder: Path) -> None:
    """Print each batch that is wrong, and raise a CommandError if there is one."""
    with usage("job: --check"):
        claim = _read_claim(folder / "job.json")
        good, wrong = _examine(folder, claim["rows"], claim["batch-size"])
    found = f"{len(good)} of {len(good) + len(wrong)} batches in {folder} fit their digests"
    others = {x.name for x in folder.glob("batch-*.pt")} - good.keys()
    wrong = dict.fromkeys(sorted(others), "is not of this job") | wrong
    for name, why in wrong.items():
        say(f"{folder / name} {why}.")
    if wrong:
        raise CommandError(f"coded-torch job: {found}")
    say(f"{found}.")
