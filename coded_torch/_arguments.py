"""Arguments of calls, and messages to the caller: errors of arguments, warnings, and loggers.

Each error names the owner (a function's name, or the object that is given the argument), the
argument, the requirement and the value. The wrong type is a TypeError, a wrong value a ValueError.
"""

import contextlib
import inspect
import logging
import math
import numbers
import operator
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.masked import MaskedTensor
from torch.utils._pytree import GetAttrKey, MappingKey, SequenceKey, tree_flatten_with_path

from ._untuned import CAUSE_CHARACTERS, LOG_SECONDS, MOST_CAUSES

#: The largest N: more than the workers of any cluster, and few enough for the memory of every plan.
MOST_WORKERS = 65_536

# The folders of the files that calls of modules pass through on their way to this package.
_INSIDE = str(Path(__file__).parent), str(Path(str(torch.__file__)).parent), contextlib.__file__

_KEYS = {MappingKey: "key", GetAttrKey: "name", SequenceKey: "idx"}

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def signature_of(module: Any) -> inspect.Signature:
    """Return the signature of a module's ``forward``; one of any arguments if it does not tell."""
    with contextlib.suppress(ValueError):  # TorchScript may have none; compiled modules hide it
        return inspect.signature(getattr(module, "_orig_mod", module).forward)
    return inspect.signature(lambda *input, **kwargs: None)


def arguments(given: Any, module: Any = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` of an input, a tuple of positional arguments, or bound ones.

    With a module, a mapping holds keyword arguments if ``forward`` can take them; else it is an
    input itself.
    """
    if isinstance(given, inspect.BoundArguments):
        return given.args, given.kwargs
    if isinstance(given, Mapping) and module is not None:
        given = dict(given)  # an encoding of Hugging Face is not a dict
        with contextlib.suppress(TypeError):
            signature_of(module).bind(**given)
            return (), given
    return given if isinstance(given, tuple) else (given,), {}


def bound(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Return bound arguments of any function."""
    return inspect.signature(lambda *args, **kwargs: None).bind(*args, **kwargs)


def named(
    owner: object, answers: Any, root: str, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    """Return outputs by the keys of a dict or the fields of a named tuple, nested as ``scores.0``.

    A single output has the name ``root``, those of a list or a tuple ``root0``, ``root1``, ...
    Raises a ValueError if two have the same name.
    """
    found = tree_flatten_with_path(answers, is_leaf)[0]
    outputs = {}
    for path, leaf in found:
        name = ".".join(str(getattr(x, _KEYS[type(x)])) for x in path)
        if not path or isinstance(path[0], SequenceKey):
            name = root if len(found) == 1 else f"{root}{name}"
        check(owner, name not in outputs, "each tensor must have its own name", name)
        outputs[name] = leaf
    return outputs


def instance(owner: object, argument: str, value: Any, kind: Any, optional: bool = False) -> None:
    """Raise a TypeError unless ``value`` has a type, or is None and may be."""
    if not (isinstance(value, kind) or (optional and value is None)):
        requirement = f"of type {getattr(kind, '__name__', kind)}{' or None' if optional else ''}"
        raise TypeError(
            f"{_name(owner)}: {argument} must be {requirement}, got {type(value).__name__}"
        )


def count(
    owner: object, argument: str, value: Any, least: int | None = 1, most: int | None = None
) -> int:
    """Return ``value`` as an int, from ``least`` to ``most``; a bool is refused."""
    try:
        integer = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = None
    requirement = f"{_name(owner)}: {argument} must be"
    if integer is None:
        raise TypeError(f"{requirement} an integer, got {shown(value)}")
    if least is not None and integer < least:
        raise ValueError(f"{requirement} at least {least}, got {shown(integer)}")
    if most is not None and integer > most:
        raise ValueError(f"{requirement} at most {most}, got {shown(integer)}")
    return integer


def real(
    owner: object, argument: str, value: Any, requirement: str, valid: Callable[[float], bool]
) -> float:
    """Return ``value`` as a float that is ``valid``; a bool is refused."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    with contextlib.suppress(OverflowError):  # an integer or a fraction is too large
        number = float(value) if is_real else math.nan
        if is_real and valid(number):
            return number
    message = f"{_name(owner)}: {argument} must be {requirement}, got {shown(value)}"
    raise ValueError(message) if is_real else TypeError(f"{message} of type {type(value).__name__}")


def check(
    owner: object, holds: object, requirement: str, got: object, error: type[Exception] = ValueError
) -> None:
    """Raise an error unless a requirement holds, such as "name must be a part of a URL"."""
    if not holds:
        raise error(f"{_name(owner)}: {requirement}, got {shown(got)}")


def positive(owner: object, argument: str, value: Any) -> float:
    """Return ``value`` as a float that is positive and finite."""
    return real(owner, argument, value, "positive and finite", lambda x: 0 < x < math.inf)


def probability(owner: object, argument: str, value: Any) -> float:
    """Return ``value`` as a float in [0, 1]."""
    return real(owner, argument, value, "a probability in [0, 1]", lambda p: 0 <= p <= 1)


def between_0_and_1(owner: object, argument: str, value: Any) -> float:
    """Return ``value`` as a float that is larger than 0 and smaller than 1."""
    return real(owner, argument, value, "between 0 and 1", lambda x: 0 < x < 1)


def dense(owner: object, argument: Any, value: Any, floating: bool = True, or_: str = "") -> None:
    """Raise a TypeError unless ``value`` is a tensor that kernels and planners can read."""
    if not isinstance(value, Tensor):
        got = type(value).__name__
    elif value.is_nested or isinstance(value, MaskedTensor):
        got = "a nested or masked tensor"
    elif value.layout is not torch.strided:
        got = f"layout {value.layout}"
    elif value.is_meta:
        got = "a tensor on the meta device"
    elif value.is_quantized or (floating and value.dtype not in _FLOATS):
        got = str(value.dtype)
    else:
        return
    if callable(argument):  # some names take a while
        argument = argument()
    kind = "tensor"
    if floating:
        kind = f"floating-point tensor of 16 bits or more{or_}"
    raise TypeError(f"{_name(owner)}: {argument} must be a dense, strided {kind}, got {got}")


def real_array(owner: object, argument: str, numbers: Any) -> NDArray[np.float64]:
    """Return real numbers as a new float64 array."""
    if type(numbers) is np.ndarray and numbers.dtype == np.float64:
        return numbers.copy()
    if isinstance(numbers, Tensor):
        dense(owner, argument, numbers, floating=False)
        numbers = numbers.detach().cpu()
        numbers = (numbers.double() if numbers.dtype.is_floating_point else numbers).numpy()
    try:
        array = np.array(numbers)
    except (ValueError, RuntimeError):  # ragged, or tensors that numpy cannot read
        array = np.array(None)
    if array.size and array.dtype.kind not in "fiu":
        raise TypeError(f"{_name(owner)}: {argument} must be real numbers, got {shown(numbers)}")
    return array.astype(np.float64, copy=False)


def nonnegative(owner: object, argument: str, value: Any) -> float:
    """Return ``value`` as a float that is finite and at least 0."""
    return real(owner, argument, value, "finite and >= 0", lambda x: 0 <= x < math.inf)


def find_devices(
    owner: object, devices: Any, find: Callable[[torch.device | str], torch.device]
) -> tuple[torch.device, ...]:
    """Return the devices of a pool, at least one; ``find`` returns the device of a name."""
    requirement = f"{_name(owner)}: devices must"
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise TypeError(f"{requirement} be a sequence of devices, got {shown(devices)}")
    found = []
    for device in devices:
        try:
            found.append(find(device))
        except TypeError:
            raise TypeError(f"{requirement} be names of devices, got {shown(device)}") from None
        except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
            raise ValueError(f"{requirement} be available, got {str(device)!r}") from error
    check(owner, found, "devices must name at least one", devices)
    return tuple(found)


def _name(owner: object) -> str:
    if isinstance(owner, str):
        return owner
    return type(owner).__name__


def shown(value: Any) -> str:
    """Return the look of a value in at most one line; of a type, its name."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, int) and abs(value) > 10**40:  # Python does not even print very long ones
        return f"an integer of {value.bit_length()} bits"
    text = repr(value).replace("\n", " ")
    if len(text) <= 200:
        return text
    return f"{text[:200]}..."


def printable(text: str, most: int = 200) -> str:
    """Return a text of others in one line of at most ``most`` printable characters."""
    text = text[: 2 * most]
    text = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)
    if len(text) <= most:
        return text
    return f"{text[: most - 3]}..."


def warn(message: str) -> None:
    """Warn of the caller's line: the innermost that is neither in this package nor in torch."""
    frame = sys._getframe(1)
    level = 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
        level = level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


class Sparing(logging.Filter):
    """Passes one warning per minute and cause.

    The cause is the warning's text without numbers, with the record's ``cause`` if it has one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self.forget()
        # A fork may happen while another thread holds the lock.
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self._lock = threading.Lock()
        # When a cause passed last, and the number held back since; the least recent first.
        self._causes: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record passes, and say in it how many like it were held back."""
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        now = self._clock()
        named = f"{record.name} {getattr(record, 'cause', '')}"
        cause = named, re.sub(r"\d[\w.]*", "#", text)[:CAUSE_CHARACTERS]
        with self._lock:
            since, held = self._causes.pop(cause, (-math.inf, 0))
            passes = now - since >= LOG_SECONDS
            self._causes[cause] = (now, 0) if passes else (since, held + 1)
            if len(self._causes) > MOST_CAUSES:
                del self._causes[next(iter(self._causes))]
        if passes and held:
            record.msg = f"{text} ({held} more like it since the last one)"
            record.args = ()
        return passes


SPARING = Sparing()


def sparing_logger(name: str) -> logging.Logger:
    """Return a logger whose warnings stay readable: one per cause and minute."""
    logger = logging.getLogger(name)
    logger.addFilter(SPARING)
    return logger
