"""The versions of a model: one answers, and the next is loaded meanwhile."""

import asyncio
import copy
import ipaddress
import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from inspect import signature
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor, nn

from .._arguments import bound, instance, sparing_logger
from .._changes import version_of
from .._torch import sample
from ..nn import CodedWrapper
from ..open_inference.description import specs
from ..surrogates import Memory
from .protocol import RequestError

logger = sparing_logger("coded_torch.serve")

_SECONDS = 120.0  # in which a worker loads a version; a bound, not tuned
# Headers of browsers and of proxies, and how more of them begin.
_OTHERS = {"origin", "forwarded", "via", "x-request-id"}
_BEGINS = "x-forwarded-", "x-real-", "x-envoy-", "x-haproxy-"  # the last is of Ray Serve, too


class Versions:
    """The present version of an application's model, and what makes the next one."""

    def __init__(
        self, app: Any, coded: CodedWrapper, make: Callable[[], nn.Module] | None, token: str | None
    ) -> None:
        self.present = coded, "1"  # one attribute, so that a batch reads both of one version
        self._app, self._make, self._token = app, make, token
        self._loading = threading.Lock()

    def renew(self) -> str:
        """Do as :meth:`app.renew`."""
        if not self._loading.acquire(blocking=False):
            raise RuntimeError("app: no version can be loaded now, as one is being loaded")
        (coded, version), name = self.present, self._app.name
        try:
            module = self._load(coded)
            how = {name: getattr(coded, name) for name in signature(CodedWrapper).parameters}
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
            self._loading.release()
        logger.info("version %s of %s answers", self.present[1], name)
        return self.present[1]

    def _load(self, coded: CodedWrapper) -> nn.Module:
        """Return a new module, which every worker has called on two rows of the examples."""
        app = self._app
        if self._make is None or not app.ready:
            why = "it has no make" if self._make is None else "it is not ready"
            raise RuntimeError(f"app: no version can be loaded, as {why}")
        weights = [*coded.module.parameters()]
        before = _states(weights)
        try:
            module = self._make()
        finally:
            if has_changed := _states(coded.module.parameters()) != before:
                self.present = coded, str(int(self.present[1]) + 1)
        instance("app", "the result of make", module, nn.Module)
        if has_changed or module is coded.module:
            got = "the present one with other weights" if has_changed else "the present one"
            raise ValueError(f"app: make must return another module, got {got}")
        if not coded.module.training:
            module.eval()
        example = bound(*app.call(app.max_rows))
        is_fixed = all(-1 not in spec.shape for spec in app.inputs)
        own, new = (specs(x, example, fixed_shapes=is_fixed) for x in (coded.module, module))
        if own != new:
            raise ValueError(f"app: make must return a module with {own}, got {new}")
        pool = coded.workers
        try:
            pool.start(module, sample(example), timeout=_SECONDS * len(pool.places or "1"))
        except Exception:
            _forget(pool, module)
            raise
        return module

    async def load(self, request: Request) -> Response:
        """Load the next version for a client, as Triton loads a model again."""
        headers, client = request.headers, request.client
        if self._token is None:
            may = client is not None and _is_loopback(client.host) and _OTHERS.isdisjoint(headers)
            may = may and not any(name.startswith(_BEGINS) for name in headers)
        else:
            given, wanted = headers.get("authorization", ""), f"Bearer {self._token}"
            may = secrets.compare_digest(given.encode(), wanted.encode())
        if not may:
            must = "a load needs the server's token or, if it has none, a program on its own host"
            raise RequestError(403, "invalid", must)
        done = Future[str]()
        done.set_running_or_notify_cancel()  # from now on, nobody can cancel it

        def work() -> None:
            try:
                done.set_result(self.renew())
            except BaseException as error:  # SystemExit, too, which would end the server
                what = RuntimeError(f"{type(error).__name__}: {error}")
                done.set_exception(error if isinstance(error, Exception) else what)

        # Nothing waits for this thread when the server ends: `make` may take any time.
        threading.Thread(target=work, daemon=True).start()
        try:
            await asyncio.wrap_future(done)
        except Exception as error:  # of any kind, and as Triton answers
            why = f"version {self.present[1]} stays: {type(error).__name__}: {error}"
            raise RequestError(400, "failed", why) from None
        return JSONResponse({})


def _forget(pool: Any, module: nn.Module) -> None:
    """Have the workers forget a module, which a cycle of references may keep."""
    if (forget := getattr(pool, "forget", None)) is not None:
        forget(module)


def _states(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return what changes if weights are replaced, or changed in place."""
    return [(id(x), version_of(x)) for x in weights]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or what a proxy says
        return False
