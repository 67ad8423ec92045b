"""The model that is served: inputs and outputs, found by calls on examples, and its versions.

The outputs that the server adds, such as error bounds, are ``ADDED`` of ``open_inference``. Their
values are columns of ``Report.rows``.
"""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import inspect
import ipaddress
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import open_inference as wire
from .._arguments import arguments, bound, instance, named, shown, signature_of, sparing_logger
from .._changes import state_of
from .._torch import flatten, in_training, is_texts, sample
from ..nn import CodedWrapper
from ..open_inference import TensorSpec
from ..surrogates import Memory
from ..workers._live import in_thread
from ._batcher import compute
from ._protocol import RequestError

logger = sparing_logger("coded_torch.serve")

_SECONDS = 120.0  # in which a worker loads a version; a bound, not tuned
_LOAD_SECONDS = 900.0  # in which a load ends; a bound, not tuned
# For which a load that ends is cancelled, and between two attempts. Not tuned: it begins in
# milliseconds.
_CANCEL_SECONDS = 1.0
_AGAIN_SECONDS = 0.05
# Headers of browsers and of proxies, and how more of them begin.
_OTHERS = {"origin", "forwarded", "via", "x-request-id", "cf-connecting-ip", "true-client-ip"}
_OTHERS |= {"x-client-ip", "x-cluster-client-ip"}
_BEGINS = "x-forwarded-", "x-real-", "x-envoy-", "x-haproxy-"  # the last is of Ray Serve, too
Place = tuple[Any, int]  # a tensor, by its number or name, and one of its dimensions
Run = Callable[[Sequence[Any]], dict[str, Any]]


def bind(owner: object, module: nn.Module, examples: Any) -> inspect.BoundArguments:
    """Return examples as arguments of a module's ``forward``; a TypeError if they do not fit."""
    is_several = isinstance(examples, list) and not is_texts(examples)
    given = tuple(examples) if is_several else examples
    args, kwargs = arguments(given, module)
    signature = signature_of(module)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        if not isinstance(owner, str):
            owner = type(owner).__name__
        requirement = f"examples must fit forward{signature}"
        raise TypeError(f"{owner}: {requirement}, got {type(examples).__name__}: {error}") from None


def in_order(inputs: Sequence[TensorSpec], call: inspect.BoundArguments) -> Sequence[TensorSpec]:
    """Return specs in the order of the call's leaves, if the names of both are the same.

    Otherwise return them in their own order.
    """
    names = _inputs_of(call)
    by_name = {spec.name: spec for spec in inputs}
    if names.keys() == by_name.keys():
        return [by_name[name] for name in names]
    return inputs


def _inputs_of(call: inspect.BoundArguments) -> dict[str, Any]:
    """Return the leaves by their names, in the order of ``forward``'s parameters."""
    inputs: dict[str, Any] = {}
    for parameter, value in call.arguments.items():
        inputs |= named("specs", value, parameter, is_texts)
    return inputs


def specs(
    module: nn.Module, examples: Any, *, fixed_shapes: bool = False
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the specs of a module's inputs and outputs, leaf by leaf.

    Names are those of ``forward``'s parameters, of keys or of fields, else ``output`` or
    ``output0`` and so on. The module is tried on two rows in other sizes: a dimension in which it
    takes other sizes is -1. Raises a TypeError or a ValueError if examples and module do not fit.

    Args:
        module: the module, which is called without gradients.
        examples: rows of each input: a tensor ``[B, ...]`` or strings, several in a list or tuple,
            or keyword arguments in a mapping, such as an encoding of Hugging Face.
        fixed_shapes: whether no other sizes are tried. Defaults to False.
    """
    call = bind("specs", module, examples)
    leaves, form = wire.flatten((call.args, call.kwargs))
    inputs = _checked("examples", _inputs_of(call), len(leaves))

    def run(values: Sequence[Any]) -> dict[str, Any]:
        args, kwargs = pytree.tree_unflatten(wire.listed(values), form)  # as workers do
        with torch.no_grad():
            made = module(*args, **kwargs)
        flatten(made)  # registers dataclasses
        made = named("specs", made, "output", is_texts)
        return _checked("outputs of the module", made, rows=len(values[0]))

    outputs = run(leaves)
    is_open = set[Place]()
    if not fixed_shapes:
        is_open = _open_places(run, [x[:2] for x in leaves], outputs)
    found = []
    for places, tensors in ((range(len(leaves)), inputs), (outputs, outputs)):
        found.append([TensorSpec.of(name, x) for name, x in tensors.items()])
        for i, (place, spec) in enumerate(zip(places, found[-1], strict=True)):
            sizes = (-1 if (place, d) in is_open else n for d, n in enumerate(spec.shape, 1))
            found[-1][i] = dataclasses.replace(spec, shape=tuple(sizes))
    return found[0], found[1]


def _checked(
    what: str, leaves: Mapping[str, Any], number: int = 0, rows: int = 0
) -> dict[str, Any]:
    """Return tensors, and strings as arrays; raise a TypeError or a ValueError for other leaves."""
    tensors = {name: wire.texts(x) if is_texts(x) else x for name, x in leaves.items()}
    for name, leaf in tensors.items():
        if not (isinstance(leaf, Tensor) or is_texts(leaf)):
            raise TypeError(
                f"specs: {name!r} among {what} must be strings, or a tensor with rows, got "
                f"{shown(type(leaf))}"
            )
        rows = rows or (len(leaf) if leaf.ndim else 0)
        if not (rows and leaf.shape[:1] == (rows,)):
            raise ValueError(
                f"specs: {name!r} among {what} must have {rows or 'some'} rows, got "
                f"{shown([*leaf.shape])}"
            )
    if len(tensors) < max(number, 1):
        raise TypeError(
            f"specs: {what} must be tensors with rows, each of its own name, got "
            f"{shown([*tensors])}"
        )
    return tensors


def _open_places(run: Run, leaves: Sequence[Any], outputs: Mapping[str, Any]) -> set[Place]:
    """Return the dimensions of inputs in which two other sizes work, and of outputs that follow.

    Dimensions of one size may have to be equal, such as the lengths of tokens and of their mask, so
    they are tried together first, and else one by one.
    """
    found = set[Place]()
    for size in sorted({n for x in leaves for n in x.shape[1:] if n > 1}):
        # Smaller, as a sequence may be the longest; but not 1, as torch broadcasts that size.
        others = (size - 1, (size + 1) // 2) if size > 3 else (size + 1, 2 * size)
        sizes = ((i, d, n) for i, x in enumerate(leaves) for d, n in enumerate(x.shape) if d)
        alike = [(i, d) for i, d, n in sizes if n == size]
        for places in (alike, *([place] for place in alike)):
            with contextlib.suppress(Exception):  # the module's own, of any kind
                made = [run(_resized(leaves, places, other)) for other in others]
                if all(_kinds(each) == _kinds(outputs) for each in made):
                    found |= {*places}
                    for name, x in (pair for each in made for pair in each.items()):
                        usual = outputs[name].shape
                        found |= {(name, d) for d in range(1, x.ndim) if x.shape[d] != usual[d]}
                    if places is alike:
                        break
    return found


def _resized(leaves: Sequence[Any], places: Sequence[Place], size: int) -> list[Any]:
    values = list(leaves)
    for i, d in places:
        values[i] = torch.cat([values[i]] * 2, d).narrow(d, 0, size)
    return values


def _kinds(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: (x.dtype, x.ndim) for name, x in tensors.items()}


class Versions:
    """The present version of an application's model, and what makes the next one."""

    def __init__(
        self, app: Any, coded: CodedWrapper, make: Callable[[], nn.Module] | None, token: str | None
    ) -> None:
        self.present = coded, "1"  # one attribute, so that a batch reads both of one version
        self._app = app
        self._make = make
        self._token = token
        self._loading = threading.Lock()
        self._stop: Future[None] | None = None  # of the load, which ends by it

    @property
    def is_loading(self) -> bool:
        """Whether a version is being loaded."""
        return self._stop is not None

    def renew(self) -> str:
        """Load the next version, and return it, as :meth:`App.renew` says."""
        if not self._loading.acquire(blocking=False):
            raise RuntimeError("App: no version can be loaded now, as one is being loaded")
        (coded, version) = self.present
        name = self._app.name
        stop = self._stop = Future[None]()
        try:
            made = in_thread(lambda: self._load(coded, stop), "coded_torch load")
            ends: list[Future[Any]] = [made, stop]
            wait(ends, _LOAD_SECONDS, FIRST_COMPLETED)
            if not made.done():
                self._end(TimeoutError(f"App: a load must end within {_LOAD_SECONDS:g} s"))
                self._cancel(made)
                stop.result()
            module = made.result()
            settings = inspect.signature(CodedWrapper).parameters
            how = {name: getattr(coded, name) for name in settings}
            how["surrogate"] = [  # a copy of a memory is empty
                copy.deepcopy(x) if isinstance(x, Memory) else x for x in coded.surrogate
            ]
            self.present = CodedWrapper(**how | {"module": module}), str(int(version) + 1)
            _forget(coded.workers, coded.module)
        except BaseException as error:
            what = "no version of %s was loaded, so version %s stays: %s: %s"
            logger.error(what, name, self.present[1], type(error).__name__, error)
            raise
        finally:
            self._stop = None
            self._loading.release()
        logger.info("version %s of %s answers", self.present[1], name)
        return self.present[1]

    def _cancel(self, made: Future[Any]) -> None:
        """End what makes a module, if it can be ended. It may not have begun yet."""
        cancel = getattr(self._make, "cancel", None)
        if cancel is None:
            return
        end = time.monotonic() + _CANCEL_SECONDS
        while not made.done() and time.monotonic() < end:
            cancel()
            wait([made], _AGAIN_SECONDS)

    def _end(self, error: Exception) -> None:
        """End the load, if there is one, by an error."""
        stop = self._stop
        if stop is not None:
            with contextlib.suppress(InvalidStateError):
                stop.set_exception(error)

    def _load(self, coded: CodedWrapper, stop: Future[None]) -> nn.Module:
        """Return a new module, which every worker has called on two rows of the examples."""
        app = self._app
        if self._make is None or not app.ready:
            why = "it has no make" if self._make is None else "it is not ready"
            raise RuntimeError(f"App: no version can be loaded, as {why}")
        weights = [*coded.module.parameters()]
        before = _states(weights)
        try:
            module = self._make()
        finally:
            has_changed = _states(coded.module.parameters()) != before
            if has_changed:
                self.present = coded, str(int(self.present[1]) + 1)
        instance("app", "the result of make", module, nn.Module)
        if has_changed or module is coded.module:
            got = "the present one with other weights" if has_changed else "the present one"
            raise ValueError(f"App: make must return another module, got {got}")
        if not in_training(coded.module):
            module.eval()
        pool = coded.workers
        seconds = _SECONDS * len(pool.places or "1")
        try:  # the module runs on workers only, as it may hang, or hold the interpreter's lock
            pool.start(module, sample(bound(*app.call(app.max_rows))), timeout=seconds)
            rows = [x[:2] for x in app.examples]
            new = CodedWrapper(module, workers=pool)
            if not compute(new, app.outputs, app.form, rows, seconds, None).outputs:
                raise RuntimeError("App: no worker computed the examples")
            if stop.done():
                stop.result()
        except Exception:
            _forget(pool, module)
            raise
        return module

    def _check(self, request: Request) -> None:
        """Refuse a request that may not load versions."""
        headers = request.headers
        client = request.client
        if self._token is None:
            may = client is not None and is_loopback(client.host) and not is_forwarded(headers)
            may = may and headers.get("sec-fetch-site") != "cross-site"
        else:
            given = headers.get("authorization", "")
            wanted = f"Bearer {self._token}"
            may = secrets.compare_digest(given.encode(), wanted.encode())
        if not may:
            requirement = (
                "a load needs the server's token or, if it has none, a program on its own host"
            )
            raise RequestError(403, "invalid", requirement)

    async def cancel(self, request: Request) -> Response:
        """End the load that goes on, for a client."""
        self._check(request)
        if not self.is_loading:
            raise RequestError(400, "invalid", "no version is being loaded, and the model stays")
        self._end(RuntimeError("App: the load was cancelled"))
        return JSONResponse({})

    async def load(self, request: Request) -> Response:
        """Load the next version for a client, as Triton loads a model again."""
        self._check(request)
        # Nothing waits for this thread when the server ends: `make` may take any time. SystemExit,
        # too, is raised here, which would end the server.
        try:
            await asyncio.wrap_future(in_thread(self.renew, "coded_torch renew"))
        except (Exception, SystemExit) as error:  # of any kind, and as Triton answers
            why = f"version {self.present[1]} stays: {type(error).__name__}: {error}"
            raise RequestError(400, "failed", why) from None
        return JSONResponse({})


def _forget(pool: Any, module: nn.Module) -> None:
    """Have the workers forget a module, which a cycle of references may keep."""
    forget = getattr(pool, "forget", None)
    if forget is not None:
        forget(module)


def _states(weights: Iterable[Tensor]) -> list[tuple[int, ...]]:
    """Return a key that differs once weights are replaced, or changed in place."""
    return [(id(x), *state_of(x)) for x in weights]


def is_forwarded(headers: Mapping[str, str]) -> bool:
    """Return whether a request comes from a page or by a proxy: the address is not the client's."""
    return not _OTHERS.isdisjoint(headers) or any(name.startswith(_BEGINS) for name in headers)


@functools.lru_cache(1024)
def is_loopback(host: str) -> bool:
    """Return whether a host's address is its own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or what a proxy says
        return False
