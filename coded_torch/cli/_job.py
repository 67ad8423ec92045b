"""The command ``coded-torch job``: all rows of a file through a model, batch by batch.

``_files.py`` reads the rows and writes the columns of the batches' files.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import platform
import re
import shlex
import signal
import sys
import time
import types
import zipfile
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from inspect import BoundArguments
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import coded_torch

from .._arguments import arguments, count, printable, signature_of
from .._torch import is_texts
from ..codes import NotEnoughResults
from ..nn import CodedWrapper, Waiting
from ..nn._mean import Looks
from ..workers import WorkerError
from . import (
    CommandError,
    find_factory,
    find_model,
    make_model,
    need,
    processes,
    progress,
    progress_bar,
    say,
    usage,
)
from ._files import UNNAMED, Rows, check_whole, digest_of, encoded, load_tensors, opened, replace
from ._untuned import MOST_CLAIM, MOST_LINES

logger = logging.getLogger("coded_torch.job")

# Files beside the batches. Readers of a folder of Parquet files skip names that begin so.
_CLAIM = "_job.json"
_LOCK = "_job.lock"
_SUMMARY = "_summary.json"
_MANIFEST = "_manifest.sha256"  # digests of batches, which `sha256sum --check` reads, too
_MOST_ROWS = 2**63 - 1
_SUFFIXES = {"torch": ".pt", "parquet": ".parquet"}


def job(args: Namespace) -> None:
    """Run a model on all rows of files, or find the mean of its outputs; jobs can be resumed.

    Example: coded-torch job my_model:make --inputs rows.npy --output answers
    A DURATION is such as 0.2, 200ms or 2s.
    """
    if args.check is not None:
        _check(args.check)
        return
    if None in (args.factory, args.inputs, args.output):
        raise CommandError("MODEL, --inputs and --output must be given")
    args.begun = False
    try:
        _begin(args)
    except BaseException as error:
        if args.begun or isinstance(error, KeyboardInterrupt):
            line = [*args.line, *(() if args.resume else ["--resume"])]
            say(f"Go on with: coded-torch {shlex.join(line)}")
        raise


def _begin(args: Namespace) -> None:
    """Check the arguments, claim the folder, and run the job."""
    with usage("--inputs cannot be read", errors=Exception):
        rows = Rows(args.inputs, args.mean)
    factory = find_model(args.factory)
    args.mean_function = None if args.mean_function is None else find_factory(args.mean_function)
    coded, examples = make_model(args, factory)
    with contextlib.ExitStack() as held:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        held.callback(signal.signal, signal.SIGTERM, before)
        with usage():
            options = args.mean_function, args.half_width, args.bounds
            if not args.mean and options != (None, None, None):
                names = "--mean-function, --half-width and --bounds"
                raise ValueError(f"{names} must be left out without --mean")
            is_made = isinstance(coded, CodedWrapper)
            if (args.deadline, args.on_error) != (None, "raise") and (args.mean or is_made):
                why = f"{args.factory} returns a CodedWrapper with its own waiting"
                if args.mean:
                    why = "a mean without some rows is biased"
                raise ValueError(f"--deadline and --on-error must be left out, as {why}")
            if not is_made:
                waiting = Waiting(args.deadline, on_error=args.on_error)
                coded = CodedWrapper(coded, workers=processes(args), waiting=waiting)
            size = count("job", "batch_size", args.batch_size)
            written = _written(args, rows)
            columns = arguments_of(args, rows, coded.module, examples)
            first = next(rows.batches(columns, 1, [0]))
            if not is_made and len(first.args) > 1 and any(map(is_texts, first.args)):
                coded.in_dims = (0,) * len(first.args)  # every column is by rows
            mapping = ", ".join(f"{name}={x}" for name, x in columns.arguments.items())
            args.output.mkdir(parents=True, exist_ok=True)
            # No other process can lock the file before it is closed, or this process ends.
            lock = held.enter_context(opened(args.output / _LOCK, "a"))
            with usage(f"--output {args.output} must not be in use by another job"):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _claim(args, factory, coded, rows, {"columns": mapping, "written": written})
        say(f"Columns of {rows}: {printable(mapping, 1000)}.")
        held.enter_context(coded.workers)
        held.enter_context(torch.no_grad())
        run = _mean if args.mean else _every_row
        run(args, coded, rows, functools.partial(rows.batches, columns, size))


def _written(args: Namespace, rows: Rows) -> str:
    """Check what batches hold beside the answers; return it in words, "" for nothing."""
    args.keys, args.select = (x.split(",") if x else [] for x in (args.keys, args.select))
    if unknown := [name for name in args.keys if name not in rows.names]:
        raise ValueError(f"--keys must be names of columns out of {rows.names}, got {unknown}")
    if args.keys or args.format == "parquet":
        need("job", "pyarrow")
    parts = {"format": args.format if args.format != "torch" else ""}
    parts |= {name: ",".join(getattr(args, name)) for name in ("keys", "select")}
    found = "; ".join(f"{name} {value}" for name, value in parts.items() if value)
    if found and args.mean:
        raise ValueError(f"--format, --keys and --select must be left out with --mean, got {found}")
    return found


def _every_row(args: Namespace, coded: CodedWrapper, rows: Rows, read: Any) -> None:
    """Compute and write the batches that are missing or wrong."""
    size = args.batch_size
    keys = deque[dict[str, Any]]()
    with contextlib.ExitStack() as held:
        with usage():
            suffix = _SUFFIXES[args.format]
            good, present = _examine(args.output, rows.total, size, suffix)
            wrong = [name for name in _names(rows.total, size, suffix) if name not in good]
            if again := [name for name in wrong if name in present]:
                logger.warning("batches whose digest does not match are computed again: %s", again)
            lines = (f"{digest}  {name}\n" for name, digest in good.items())
            replace(args.output / _MANIFEST, "".join(lines).encode())
            manifest = held.enter_context(opened(args.output / _MANIFEST, "a"))
            missing = [int(name[6:18]) for name in wrong]
            batches = read(missing, keys=args.keys, kept=keys)
            found = coded.map(batches, in_flight=args.in_flight)
        counts: Counter[str] = Counter()
        begin = time.monotonic()
        why = ""
        args.begun = True
        try:
            for first in read(missing[:1]):
                _start(coded, first)
            for name, (answers, report) in zip(progress(wrong, "batches"), found, strict=True):
                with usage(errors=Exception):
                    kept = keys.popleft()
                    data = encoded(answers, report, kept, args.select, args.format, args.bound_name)
                with usage("--output cannot be written", errors=OSError):
                    replace(args.output / name, data)
                    # Written later: a batch without its digest is computed again.
                    print(f"{hashlib.sha256(data).hexdigest()}  {name}", file=manifest, flush=True)
                    os.fsync(manifest.fileno())
                flags = [] if report.estimated is None else report.estimated.tolist()
                counts.update("estimated" if flag else "computed" for flag in flags)
                counts.update(
                    batches=1, hedges=len(report.hedges), failed=len(report.module_failed_rows)
                )
        except Exception as error:
            facts = vars(error)
            if "batch" in facts:  # numbered by `map`, from the first missing one
                first = missing[facts["batch"]]
                failing = [first + row for row in facts.get("rows", ())]
                facts |= {"batch": first // size, "rows": failing}
                counts.update(failed=len(failing))
                file, row = rows.place(first)
                why = f"Batch {first // size}, from row {row} of {file}, failed. "
                shown = [f"{row} of {file}" for file, row in map(rows.place, failing[:16])]
                if failing:
                    why += f"The first failing rows: {', '.join(shown)}. "
                facts["__notes__"][-1] = why.strip()
            is_ours = str(error).startswith("CodedWrapper: ")
            if is_ours or isinstance(error, NotEnoughResults):  # the user's own code raised nothing
                raise CommandError(f"{error}. {why.strip()}") from None
            raise
        finally:
            counts["workers_lost"] = coded.workers.num_restarts
            there = len(good) + counts["batches"]
            every = len(good) + len(wrong)
            _sum_up(args.output, counts, time.monotonic() - begin, there, every, why)


def _mean(args: Namespace, coded: CodedWrapper, rows: Rows, read: Any) -> None:
    """Print an interval after each look, and keep the numbers of the rows that are computed."""
    path = args.output / "mean.pt"
    batches = _Batches(rows.total, args.batch_size, read)
    with usage(f"{path} cannot be read", errors=Exception):
        known = _read_mean(path, rows.total) if os.path.lexists(path) else {}
    _start(coded, batches[0])
    with usage(prefix="mean: "), usage(errors=NotEnoughResults), contextlib.ExitStack() as held:
        of = args.mean_function
        looks = Looks(coded, batches, of, bounds=args.bounds, seed=known.get("seed"))
        if known:
            looks.numbers = [known["numbers"]]
            looks.shares = known["shares"]
            looks.sizes = [size for size in looks.sizes if size >= known["rows"]]
        bar = held.enter_context(
            contextlib.closing(progress_bar(looks.sizes[-1], "rows", known.get("rows", 0)))
        )
        looks.on_rows = bar.update
        for found in looks.until(args.half_width):
            bar.total = looks.expected_rows(found, args.half_width)
            known = {"numbers": torch.cat(looks.numbers), "shares": looks.shares}
            known |= vars(found) | {"seed": looks.seed}
            file = io.BytesIO()
            torch.save(known | {"digest": _digest_of_mean(known)}, file)
            replace(path, file.getbuffer())
            some = zip(found.value[:8].tolist(), found.half_width.tolist(), strict=False)
            shown = ", ".join(f"{value:.5g} ± {half:.2g}" for value, half in some)
            more = ", ..." if len(found.value) > 8 else ""
            with bar.external_write_mode():
                say(f"{found.rows:,} of {rows.total:,} rows: {shown}{more}")


def _read_mean(path: Path, total: int) -> dict[str, Any]:
    """Return the state with which a mean is resumed; raise a ValueError if it is damaged."""
    with opened(path) as file:
        known: dict[str, Any] = load_tensors(file)
    numbers = known["numbers"]
    shares = known["shares"]
    for name in ("numbers", "shares"):
        check_whole(name, known[name])
    fit = numbers.dim() == 2 and shares.shape == numbers.shape[1:]
    fit = fit and len(numbers) == known["rows"] <= total and shares.dtype is torch.bool
    if not fit or known["digest"] != _digest_of_mean(known):
        raise ValueError("it is damaged; remove it to start again")
    return known


def _digest_of_mean(known: Mapping[str, Any]) -> str:
    """Return a digest of the state with which a mean is resumed."""
    numbers = (known[name].numpy().tobytes() for name in ("numbers", "shares"))
    rest = repr((known["rows"], known["seed"])).encode()
    return hashlib.sha256(b"".join([*numbers, rest])).hexdigest()


class _Batches:
    """The batches of a file, each of which is read when it is needed."""

    def __init__(self, rows: int, size: int, read: Any) -> None:
        self._starts = range(0, rows, size)
        self._read = read

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Any:
        return next(self._read([self._starts[number]]))


def _start(coded: CodedWrapper, first: BoundArguments) -> None:
    """Start workers on a batch. If the model fails on its rows, the call says so."""
    with usage(errors=TypeError, prefix="Workers: "), contextlib.suppress(WorkerError):
        coded.workers.start_on(coded.module, first)


def _sum_up(folder: Path, counts: Counter[str], took: float, there: int, of: int, why: str) -> None:
    """Print what this run has done, and write it as JSON."""
    names = "computed", "estimated", "failed", "hedges", "workers_lost"
    facts = {"batches": there, "of": of} | {name: counts[name] for name in names}
    with usage("--output cannot be written", errors=OSError):
        replace(folder / _SUMMARY, json.dumps(facts | {"seconds": round(took, 3)}).encode())
    speed = (counts["computed"] + counts["estimated"]) / max(took, 1e-9)
    say(
        f"{there} of {of} batches are in {folder}. This run: {counts['computed']:,} rows "
        f"computed, {counts['estimated']:,} estimated, {counts['failed']:,} failed; "
        f"hedges: {counts['hedges']:,}, workers lost: {counts['workers_lost']:,}; "
        f"{took:,.1f} s, {speed:,.0f} rows per second."
    )
    if why:
        say(why.strip())


def arguments_of(args: Namespace, rows: Rows, module: nn.Module, examples: Any) -> BoundArguments:
    """Return the arguments of ``forward``, with the name of a column in the place of each value.

    By default, the names are the keys of a dict of examples, if the file has these columns.
    """
    signature = signature_of(module)
    if not args.columns and isinstance(examples, Mapping) and {*examples} <= {*rows.names}:
        places, named = arguments({name: name for name in examples}, module)
        return signature.bind(*places, **named)
    kinds = {name: x.kind.name for name, x in signature.parameters.items()}
    needed = {x.name for x in signature.parameters.values() if x.default is x.empty}
    needed -= {name for name, kind in kinds.items() if kind.startswith("VAR_")}
    names = [x for x in rows.names if kinds.get(x) in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")]
    by_name = names != [] and needed <= {*names}
    if not by_name:
        names = [name for name in rows.names if name not in (args.keys or ())] or rows.names
        by_name = set(kinds.values()) == {"VAR_KEYWORD"}
    pairs = [(name if by_name and names != [UNNAMED] else "", name) for name in names]
    if args.columns is not None:
        pairs = [each.rpartition("=")[::2] for each in args.columns.split(",")]
    by_order = [column for name, column in pairs if not name]
    requirement = f"--columns must name columns for forward{signature}, as a,b or x=a,y=b"
    with usage(requirement):
        if args.columns is None and len(by_order) > 1:
            raise ValueError(f"the file has {names}")
        if unknown := [column for _, column in pairs if column not in rows.names]:
            raise ValueError(f"{unknown} are not among {rows.names}")
        named = {name: column for name, column in pairs if name}
        if len(by_order) + len(named) < len(pairs):
            raise ValueError(f"an argument is named twice, got {args.columns}")
        return signature.bind(*by_order, **named)


def _claim(args: Any, factory: Any, coded: CodedWrapper, rows: Rows, how: dict[str, str]) -> None:
    """Describe a job in its folder, or check that the folder describes the same job."""
    path = args.output / _CLAIM
    before = dict[str, Any]()
    if os.path.lexists(path):
        if not args.resume:
            raise ValueError(f"--output {args.output} holds a job; --resume goes on with it")
        before = _read_claim(path)
    elif {*os.listdir(args.output)} - {_LOCK, f"_{_CLAIM}.part"}:  # a job that was cut short
        raise ValueError(f"--output must be an empty folder, got {args.output}")
    if coded.code is None and coded.parts is None:  # rounding may depend on the rows of a part
        coded.parts = before.get("parts") or coded.workers.num_workers
    # The name of error bounds in files. A folder of version 0.4, which did not note it, keeps its.
    bounds = before.get("bounds", "") if before else "error_bound"
    args.bound_name = bounds or "radius"
    sources = {args.factory.partition(":")[0]}  # names of modules, and code of functions
    call = {"inputs": f"of {rows.total} rows, digest {rows.digest()}", "rows": rows.total}
    call |= how | {"batch-size": args.batch_size, "parts": coded.parts}
    call |= {"waiting": str(coded.waiting), "bounds": bounds}
    for name in ("code", "estimator", "surrogate", "verify", "in_dims", "out_dims"):
        call[name] = f"digest {_digest(getattr(coded, name), sources)}"
    call["mean"] = f"digest {_digest(args.mean_function, sources)}" if args.mean else ""
    model = {"model": f"{args.factory}, digest {_digest((factory, coded.module), sources)}"}
    model["source"] = f"digest {_digest_of_files(sources)}"
    versions = f"torch {torch.__version__}, coded_torch {coded_torch.__version__}"
    model["versions"] = f"{versions}, Python {platform.python_version()}"
    compared = call if args.trust_model else call | model
    # An older version knew fewer options: those that it did not know were left out.
    differ = [key for key, value in compared.items() if before.get(key, "") != value]
    if before and differ and any(args.output.glob("[bm]*.p*")):
        requirement = "; ".join(
            f"{key} {printable(str(before.get(key)))}, got {compared[key]}" for key in differ
        )
        remedy = " (--trust-model goes on)" if model.keys() >= {*differ} else ""
        raise ValueError(f"--resume must repeat the job in {args.output}: {requirement}{remedy}")
    replace(path, json.dumps(call | model).encode())


def _digest_of_files(sources: set[str]) -> str:
    """Return a digest of the files of modules, but for those of torch, which has a version."""
    content = dict[str, bytes]()
    for name in sorted(sources):
        if name.partition(".")[0] != "torch":
            file = getattr(sys.modules.get(name), "__file__", None)
            content[name] = Path(file).read_bytes() if file else b""
    return _digest(content, set())


def _read_claim(path: Path) -> dict[str, Any]:
    """Return the description of a job in its folder, or raise a ValueError if it is damaged."""
    with opened(path) as file:
        content = file.read(MOST_CLAIM)
    with contextlib.suppress(KeyError, RecursionError, TypeError, ValueError):
        claim = dict(json.loads(content))
        kinds = {*map(type, claim.values())}
        numbers = [claim["rows"], claim["batch-size"], claim.get("parts") or 1]
        is_text = type(claim.get("written", "")) is str
        is_known = claim.get("bounds", "") in ("", "error_bound")
        are_positive = all(type(x) is int and 0 < x <= _MOST_ROWS for x in numbers)
        if kinds <= {int, str, type(None)} and is_text and is_known and are_positive:
            return claim
    raise ValueError(f"{path} must describe a job, but it is damaged or of another version")


class _Pickler(pickle.Pickler):
    """Writes equal bytes for a value in every process. Collects modules and code of functions."""

    modules: set[str]

    def persistent_id(self, value: Any) -> Any:
        """Return a key in place of a set, a script, a tensor, a class or a function; else None."""
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
            kinds = getattr(value, "__mro__", [value])
            self.modules.update(str(x.__module__) for x in kinds)
            # Another function of the same name, such as a second lambda, is at another place.
            own = [x for x in kinds if str(x.__module__).partition(".")[0] != "torch"]  # as below
            found = [value, *(x for kind in own for x in vars(kind).values())]
            for x in (x.__code__ for x in found if isinstance(x, types.FunctionType)):
                plain = [each for each in x.co_consts if not isinstance(each, types.CodeType)]
                plain = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in plain]
                place = x.co_firstlineno, x.co_linetable
                self.modules.add(str((*place, x.co_names, plain, x.co_code)))
            return value.__qualname__
        return None

    def reducer_override(self, value: Any) -> Any:
        """Return the reduction of a value or, if it has none, its ``repr`` without addresses."""
        with contextlib.suppress(Exception):
            reduced = value.__reduce_ex__(4)
            if isinstance(reduced, tuple):
                return reduced
        return str, (re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)),)  # a lock cannot be pickled


def _digest(value: Any, modules: set[str]) -> str:
    """Return a digest of any value; add the names and code of what it refers to to ``modules``."""
    file = io.BytesIO()
    pickler = _Pickler(file, 4)
    pickler.modules = modules
    pickler.dump(value)
    return hashlib.blake2b(file.getbuffer(), digest_size=16).hexdigest()


def _names(rows: int, size: int, suffix: str) -> Iterator[str]:
    """Yield the names of the files of all batches."""
    return (f"batch-{first:012}{suffix}" for first in range(0, rows, size))


def _examine(folder: Path, rows: int, size: int, suffix: str) -> tuple[dict[str, str], ...]:
    """Return the digests of good batches, and the faults of the others."""
    path = folder / _MANIFEST
    text = ""
    if os.path.lexists(path):
        with opened(path, "r", errors="replace") as file:
            text = file.read()
    known = dict(map(reversed, re.findall(r"^(\w{64})  (\S+)\n", text, re.M)))
    good = dict[str, str]()
    wrong = dict[str, str]()
    for name in sorted(x for x in os.listdir(folder) if x.startswith("batch-")):
        number = re.fullmatch(r"batch-([0-9]{12,19})\.\w+", name)
        first = int(number[1]) if number else 0
        if first >= rows or first % size or name != f"batch-{first:012}{suffix}":
            wrong[name] = "does not belong to this job"
        elif name in known and digest_of(folder / name) == known[name]:
            good[name] = known[name]
        else:
            wrong[name] = "has no matching digest"
    return good, wrong


def _check(folder: Path) -> None:
    """Print batches that are wrong, and raise a CommandError if there is one."""
    with usage("--check"):
        claim = _read_claim(folder / _CLAIM)
        size = claim["batch-size"]
        suffix = _SUFFIXES["parquet" if "format parquet" in claim.get("written", "") else "torch"]
        good, wrong = _examine(folder, claim["rows"], size, suffix)
    missing = (x for x in _names(claim["rows"], size, suffix) if x not in good and x not in wrong)
    wrong |= dict.fromkeys(itertools.islice(missing, MOST_LINES), "is missing")
    for name, why in itertools.islice(wrong.items(), MOST_LINES):
        say(f"{printable(str(folder / name))} {why}.")
    found = f"{len(good)} of {-(-claim['rows'] // size)} batches in {folder} match their digests"
    if wrong:
        raise CommandError(found)
    say(f"{found}.")
