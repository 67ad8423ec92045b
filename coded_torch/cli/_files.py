"""Files of rows, which commands read, and the files of a job's batches."""

import bisect
import functools
import glob
import hashlib
import io
import itertools
import math
import operator
import os
import pickle
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import BoundArguments
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .._arguments import instance, named
from .._torch import is_texts
from ..nn import Report
from . import need, usage
from ._untuned import HOLES, LARGE_FILE, MOST_NAMES, MOST_OPEN

UNNAMED = "rows"  #: the column of a file of one tensor
# Rows that a byte of a file may stand for: in a Parquet file, equal rows are written once.
_ROWS_PER_BYTE = {".parquet": 2**16}
_look = operator.attrgetter("st_ino", "st_size", "st_mtime_ns")


class Rows:
    """The rows of files with the same columns, one file after the other.

    Args:
        sources: paths, or patterns of :func:`glob.glob`, whose files are sorted by name.
        whole: true if Parquet files are to be read whole, so that rows can be read in any order.

    Attributes:
        paths: the files.
        names: the columns.
        total: the number of rows.
    """

    def __init__(self, sources: Iterable[str], whole: bool = False) -> None:
        self.paths = [path for source in sources for path in _paths(source)]
        self._opened = functools.lru_cache(MOST_OPEN)(functools.partial(_open, whole=whole))
        for path in self.paths:
            _check_regular(path, path.stat())
        self._before = {path: _look(path.stat()) for path in self.paths}
        lengths = list[int]()
        self.names = [*self._opened(self.paths[0]).columns]
        for path in self.paths:
            table = self._opened(path)
            if {*table.columns} != {*self.names}:
                requirement = f"all files must have the columns {self.names}"
                raise ValueError(f"{requirement}, got {[*table.columns]} in {path}")
            size = path.stat().st_size
            if table.rows > size * _ROWS_PER_BYTE.get(path.suffix, 1):
                raise ValueError(
                    f"{path} must hold the numbers of each row, got {table.rows} rows in {size} "
                    "bytes"
                )
            lengths.append(table.rows)
        self._ends = [*itertools.accumulate(lengths)]
        total = self._ends[-1]
        if not total:
            raise ValueError(f"{self} must hold rows, got none")
        self.total = total

    def __str__(self) -> str:
        more = ""
        if len(self.paths) > 1:
            more = f" and {len(self.paths) - 1} more"
        return f"{self.paths[0]}{more}"

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file of a row, and its number there."""
        number = bisect.bisect_right(self._ends, row)
        return self.paths[number], row - (self._ends[number - 1] if number else 0)

    def digest(self) -> str:
        """Return a digest of the content of all files."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            digest.update(np.memmap(path, mode="r").data)
        return digest.hexdigest()

    def read(self, names: Iterable[str], start: int, size: int) -> dict[str, list[Any]]:
        """Return columns of some rows, each as arrays or tensors, one per file."""
        columns: dict[str, list[Any]] = {name: [] for name in names}
        stop = min(start + size, self.total)
        while start < stop:
            path, first = self.place(start)
            table = self._opened(path)
            rows = min(stop - start, table.rows - first)
            found = table.read([*columns], first, first + rows)
            if _look(path.stat()) != self._before[path]:
                raise ValueError(f"{path} has changed since the job began")
            for name, pieces in columns.items():
                pieces.append(found[name])
            start += rows
        return columns

    def batches(
        self, columns: BoundArguments, size: int, starts: Iterable[int], *, keys: Any = (),
        kept: Any = None,
    ) -> Iterator[BoundArguments]:  # fmt: skip
        """Yield the batches that begin at ``starts``, with columns in the places of their names.

        The key columns of each batch are appended to ``kept``.
        """
        places = columns.args, columns.kwargs
        names = tree_leaves(places)
        for start in starts:
            with usage("--inputs cannot be read", errors=Exception):
                found = self.read(dict.fromkeys([*names, *keys]), start, size)
                args, kwargs = tree_map(lambda name, of=found: _column(name, of[name]), places)
            if kept is not None:
                kept.append({name: found[name] for name in keys})
            yield columns.signature.bind(*args, **kwargs)

    def tensor(self) -> Tensor:
        """Return all rows of the only column."""
        if len(self.names) > 1:
            raise ValueError(f"it must hold one tensor, got {self.names}")
        (name,) = self.names
        column = _column(name, self.read([name], 0, self.total)[name])
        if not isinstance(column, Tensor):
            raise TypeError(f"the column {name!r} must hold numbers, got strings")
        return column


def _paths(source: str) -> list[Path]:
    found = [source] if Path(source).exists() else sorted(glob.glob(source, recursive=True))
    if not found:
        raise FileNotFoundError(f"no file matches {source!r}")
    return [Path(each) for each in found]


class _Table:
    """An open file, whose columns can be sliced."""

    def __init__(self, columns: Mapping[str, Any], lengths: set[int]) -> None:
        if len(lengths) != 1:
            raise ValueError(f"tensors must have equally many rows, got {sorted(lengths)}")
        self.columns = columns
        (self.rows,) = lengths

    def read(self, names: list[str], start: int, stop: int) -> dict[str, Any]:
        return {name: self.columns[name][start:stop] for name in names}


class _Stream(_Table):
    """A Parquet file that is read from front to back, so that little of it is in memory."""

    _names: Any = None
    _table: Any = None  # the rows that were read, from the row ``_at`` on
    _at = 0

    def __init__(self, file: Any) -> None:
        about = file.metadata
        super().__init__(dict.fromkeys(file.schema_arrow.names), {about.num_rows})
        self._file = file
        groups = range(about.num_row_groups)
        ends = itertools.accumulate(about.row_group(i).num_rows for i in groups)
        self._firsts = [0, *ends][: len(groups)]

    def read(self, names: list[str], start: int, stop: int) -> dict[str, Any]:
        """Return the rows from ``start`` to ``stop``, for which batches are read on."""
        import pyarrow

        group = bisect.bisect_right(self._firsts, start) - 1
        first = self._firsts[group]
        goes_on = names == self._names and start >= self._at
        if not goes_on or first > self._at + self._table.num_rows:
            groups = range(group, len(self._firsts))
            self._names = names
            self._at = first
            self._tables = self._file.iter_batches(stop - start, groups, names)
            self._table = pyarrow.Table.from_batches([next(self._tables)])
        while (end := self._at + self._table.num_rows) < stop:
            self._table = self._table.slice(start - self._at)  # may be beyond its end
            self._at = min(start, end)
            more = pyarrow.Table.from_batches([next(self._tables)])
            self._table = pyarrow.concat_tables([self._table, more])
        return {name: self._table[name].slice(start - self._at, stop - start) for name in names}


def _open(path: Path, whole: bool) -> _Table:
    """Open a file by its suffix; read it on demand, but Parquet files whole if ``whole``."""
    columns: dict[str, Any]
    if path.suffix == ".parquet":
        need("job", "pyarrow")
        from pyarrow import parquet

        file = parquet.ParquetFile(path)
        if not whole:
            return _Stream(file)
        table = file.read()
        return _Table(dict(zip(table.column_names, table.columns, strict=True)), {len(table)})
    if path.suffix == ".safetensors":
        need("job", "safetensors")
        from safetensors import safe_open

        opened: Any = safe_open(path, "pt")
        columns = {name: opened.get_slice(name) for name in sorted(opened.keys())}
        return _Table(columns, {[*x.get_shape(), 0][0] for x in columns.values()})
    if path.suffix == ".npy":
        columns = {UNNAMED: _mapped(path)}
    elif path.suffix in (".pt", ".pth"):
        found = load_tensors(path, map_location="cpu", mmap=True)
        columns = dict(found) if isinstance(found, Mapping) else {UNNAMED: found}
        wrong = [type(x).__name__ for x in columns.values() if not isinstance(x, Tensor)]
        if wrong:
            raise TypeError(f"it must hold a tensor, or a dict of tensors, got {wrong[0]}")
        for name, column in columns.items():
            check_whole(name, column)
        columns = {name: torch.atleast_1d(x) for name, x in columns.items()}
    else:
        raise ValueError(f"it must be a .npy, .safetensors, .parquet or .pt file, got {path}")
    return _Table(columns, {len(x) for x in columns.values()})


def _mapped(path: Path) -> Any:
    """Return the array in a file, which is read on demand."""
    remedy = "write strings as a column of a Parquet file, as pyarrow and pandas do"
    try:
        array = np.atleast_1d(np.load(path, mmap_mode="c"))
    except ValueError as error:
        if "objects" not in str(error):
            raise
        raise TypeError(f"{path} must hold numbers, got objects; {remedy}") from error
    if array.dtype.kind in "SUT":
        raise TypeError(f"{path} must hold numbers, got strings; {remedy}")
    return array


def load_tensors(file: Any, **options: Any) -> Any:
    """Return what ``torch.save`` wrote, which must be tensors, numbers and strings.

    Other objects could run code, and packed ones could be of any size, or be read as they are.
    """
    with zipfile.ZipFile(file) as content:
        entries = content.infolist()
    is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    most = max((x.file_size for x in entries if x.filename.endswith("/data.pkl")), default=0)
    if is_packed or most > MOST_NAMES:
        raise ValueError("it must be as torch.save writes some tensors, not packed")
    if not isinstance(file, Path):
        file.seek(0)
    try:
        return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError:
        requirement = "it must hold tensors, numbers and strings only"
        raise TypeError(f"{requirement}, as other objects could run code") from None


def check_whole(name: str, tensor: Tensor) -> None:
    """Raise an error if a file holds fewer numbers than the tensor, which repeats them."""
    is_dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if tensor.is_nested or not is_dense:
        raise TypeError(f"{name} must be a dense tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{name} must hold each of its numbers, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; save a clone of it"
        )


def _column(name: str, pieces: Sequence[Any]) -> Tensor | list[str]:
    """Return a column of numbers or, in a Parquet file, of lists of numbers or of strings."""
    found = []
    texts = list[str]()
    for piece in pieces:
        if isinstance(piece, (Tensor, np.ndarray)):
            found.append(torch.as_tensor(piece).clone())
            continue
        import pyarrow.compute

        values = piece.combine_chunks()
        shape = [len(piece)]
        while hasattr(values.type, "value_field") and not values.null_count:  # lists
            lengths = pyarrow.compute.list_value_length(values).unique().to_pylist()
            if len(lengths) > 1:
                requirement = f"lists of the column {name!r} must be equally long"
                raise ValueError(f"{requirement}, got lengths {sorted(lengths)[:8]}")
            shape = [*shape, *lengths]
            values = values.flatten()
        if values.null_count:
            raise ValueError(f"its columns must not hold nulls, got some in the column {name!r}")
        if hasattr(values, "dictionary_decode"):
            values = values.dictionary_decode()
        types = pyarrow.types
        if len(shape) == 1 and (types.is_string(values.type) or types.is_large_string(values.type)):
            texts += values.to_pylist()
            continue
        numbers = np.array(values.to_numpy(zero_copy_only=False)).reshape(shape)
        if numbers.dtype == object:
            raise TypeError(f"the column {name!r} must hold numbers, got {values.type}")
        found.append(torch.from_numpy(numbers))
    if texts and not found:
        return texts
    if texts:
        raise TypeError(f"the column {name!r} must hold strings in all files, or in none")
    are_integers = {not (x.dtype.is_floating_point or x.dtype.is_complex) for x in found}
    if len(are_integers) > 1:  # large ones would be rounded
        types = sorted({str(x.dtype) for x in found})
        requirement = f"the column {name!r} must hold integers in all files, or in none"
        raise TypeError(f"{requirement}, got {types}")
    return found[0] if len(found) == 1 else torch.cat(found)


_SEVERAL = {"error_bound": "error_bounds", "radius": "radii"}


def encoded(
    answers: Any,
    report: Report,
    keys: Mapping[str, list[Any]],
    select: Sequence[str],
    kind: str,
    bounds: str = "error_bound",
) -> memoryview:
    """Return the content of a batch's file, of the kind "torch" or "parquet".

    A file for ``torch.load`` holds a dict: ``outputs``, a dict or a list; ``estimated`` and
    ``error_bounds``; and ``keys``, if there are some. A Parquet file has a column for each key and
    output, ``estimated`` and ``error_bound``, which ``bounds`` may name "radius".
    """
    outputs = named("job", answers, "output", is_texts)
    file = io.BytesIO()
    copied = {name: _joined(pieces) for name, pieces in keys.items()}
    unknown = [name for name in select if name not in outputs]
    if unknown:
        raise ValueError(f"--select must be names of outputs out of {[*outputs]}, got {unknown}")
    chosen: Any = {name: outputs[name] for name in select or outputs}
    floats = [x for x, y in outputs.items() if torch.is_tensor(y) and y.dtype.is_floating_point]
    known = report.rows("estimated", "error_bound")
    known[bounds] = known.pop("error_bound")
    if not floats or floats[0] not in chosen:  # it has the error bounds
        known[bounds] = torch.full_like(known[bounds], math.nan)
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        for name, column in chosen.items():
            instance("job", f"the output {name!r}", column, list if is_texts(column) else Tensor)
        lists = copied, chosen, known
        twice = sorted(
            name for name, count in Counter(itertools.chain(*lists)).items() if count > 1
        )
        if twice:
            added = ", ".join([*chosen, *known])
            raise ValueError(f"job: the columns {added}, which are added, must be new, got {twice}")
        columns = {name: _arrow(column) for name, column in (chosen | known).items()}
        parquet.write_table(pyarrow.table(copied | columns), file)
        return file.getbuffer()
    if not select:
        chosen = tree_leaves(answers, is_leaf=is_texts)
        if isinstance(answers, Mapping):
            chosen = dict(answers)
    content = {"outputs": chosen, "estimated": known["estimated"]}
    content[_SEVERAL[bounds]] = known[bounds]
    if copied:
        content["keys"] = {name: x.to_pylist() for name, x in copied.items()}
    with usage("outputs must be what torch.load can read", errors=Exception):
        torch.save(content, file)
        torch.load(io.BytesIO(file.getbuffer()), weights_only=True)
    return file.getbuffer()


def _joined(pieces: Sequence[Any]) -> Any:
    """Return a column of Arrow, whose type holds the values of all pieces."""
    import pyarrow

    tables = []
    for array in pieces:
        if isinstance(array, (Tensor, np.ndarray)):
            array = _arrow(array)
        if pyarrow.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        tables.append(pyarrow.table([array], ["rows"]))
    return pyarrow.concat_tables(tables, promote_options="permissive").column(0)


def _arrow(rows: Tensor | np.ndarray[Any, Any] | list[str]) -> Any:
    """Return rows of numbers or strings as an array of Arrow, nested lists if they have many."""
    import pyarrow

    if isinstance(rows, list):
        return pyarrow.array(rows)
    if isinstance(rows, Tensor):
        if rows.dtype is torch.bfloat16:
            rows = rows.float()
        rows = rows.numpy(force=True)
    found = pyarrow.array(rows.reshape(-1))
    for size in reversed(rows.shape[1:]):
        found = pyarrow.FixedSizeListArray.from_arrays(found, size)
    return found


def opened(path: Path, mode: str = "rb", **options: Any) -> IO[Any]:
    """Open a regular file of a job's folder, in which another user may have left anything.

    Raises a ValueError if it is not a regular file, or holds almost no data for its size. Links are
    not followed.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # to open a pipe would wait for its other end
    try:
        file = open(  # noqa: SIM115 - the caller closes it
            path, mode, opener=lambda x, how: os.open(x, how | flags, 0o666), **options
        )
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} must be a regular file: {error.strerror}") from None
    try:
        _check_regular(path, os.fstat(file.fileno()))
    except ValueError:
        file.close()
        raise
    return file


def _check_regular(path: Path, about: os.stat_result) -> None:
    is_hollow = about.st_size > max(LARGE_FILE, HOLES * 512 * about.st_blocks)
    if not stat.S_ISREG(about.st_mode) or is_hollow:
        raise ValueError(f"{path} must be a regular file with content")


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file of a job's folder; "" if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with opened(path) as file:
            while piece := file.read(2**20):
                digest.update(piece)
    except (OSError, ValueError):
        return ""
    return digest.hexdigest()


def replace(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all, even if the process or the host ends meanwhile."""
    part = path.with_name(f"_{path.name}.part")
    part.unlink(missing_ok=True)  # it may be a link, to a file that must stay as it is
    with part.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
