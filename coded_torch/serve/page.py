"""The page at ``/`` of a server: its workers, latencies and answers, and faults on demand.

A page of another site can post to a loopback address. So the page acts only if faults are allowed.
It needs a random token of the page, its own origin and a loopback name.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.resources
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..workers import FaultyWorkers
from .application import Service
from .protocol import RequestError

__all__ = ["LOOPBACK", "Chaos", "add_page"]

#: The names of hosts that only this computer reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MINUTE, _STEP = 60.0, 5.0  # the seconds that the charts show, and of one of their points
_MOST = 20_000  # requests of the last minute that are remembered; a bound, not tuned
_QUANTILES = (0.5, 0.99, 0.999)
# Seconds of a fault: long enough to watch, short enough to wait for. Not tuned.
_FAULT_SECONDS = 10.0
# A delayed worker runs for a tenth of the time, in turns of so many seconds. Not tuned.
_TURN_SECONDS = 0.1
_LARGEST = 1000  # bytes of a request for a fault, at most


class Chaos:
    """Kills, pauses, delays and corrupts single workers of a pool of local processes.

    All but a kill last ten seconds, or until the pool replaces the process.

    Args:
        pool: a pool around ProcessWorkers, with an attack that no worker carries out yet.
    """

    ACTIONS = ("kill", "pause", "delay", "corrupt")

    def __init__(self, pool: FaultyWorkers) -> None:
        self.pool = pool
        self.token = secrets.token_urlsafe(24)
        self.faults: dict[int, str] = {}  # the running faults, by place

    def inject(self, place: int, action: str) -> None:
        """Begin a fault of the worker at a place.

        Raises:
            ValueError: the worker is down, or has a fault.
        """
        pid = self.pool.states.get(place, ("down", 0))[1]
        if not pid:
            raise ValueError(f"worker {place} is down")
        if action == "kill":
            os.kill(pid, signal.SIGKILL)
            return
        if place in self.faults:
            raise ValueError(f"worker {place} has a fault already: {self.faults[place]}")
        self.faults[place] = action
        hold = {"pause": self._stop, "delay": self._stop, "corrupt": self._corrupt}[action]
        threading.Thread(target=self._run, args=(hold, place, pid), daemon=True).start()

    def _run(self, hold: Callable[[int, int], None], place: int, pid: int) -> None:
        try:
            hold(place, pid)
        except ProcessLookupError:
            pass  # the pool has replaced the process
        finally:
            del self.faults[place]

    def _stop(self, place: int, pid: int) -> None:
        """Stop a process, but for a tenth of the time if it is delayed."""
        end = time.monotonic() + _FAULT_SECONDS
        with _continued(pid):
            while time.monotonic() < end:
                self._signal(place, pid, signal.SIGSTOP)
                time.sleep(0.9 * _TURN_SECONDS)
                if self.faults[place] == "delay":
                    self._signal(place, pid, signal.SIGCONT)
                    time.sleep(0.1 * _TURN_SECONDS)
            self._signal(place, pid, signal.SIGCONT)

    def _signal(self, place: int, pid: int, number: int) -> None:
        if self.pool.states[place][1] != pid:  # the number may be another process's by now
            raise ProcessLookupError
        os.kill(pid, number)

    def _corrupt(self, place: int, pid: int) -> None:
        self.pool.adversaries = (*self.pool.adversaries, place)
        time.sleep(_FAULT_SECONDS)
        self.pool.adversaries = tuple(x for x in self.pool.adversaries if x != place)


@contextlib.contextmanager
def _continued(pid: int) -> Iterator[None]:
    """Let a stopped process go on even if this process is killed: it then ends by itself."""
    script = f"sleep {_FAULT_SECONDS:g}; kill -CONT {pid}"
    null = subprocess.DEVNULL
    guard = subprocess.Popen(
        ["sh", "-c", script], stdin=null, stdout=null, stderr=null, start_new_session=True
    )
    try:
        yield
    finally:
        guard.kill()
        guard.wait()


class _Page:
    """The handlers of the page of one service."""

    def __init__(self, service: Service, chaos: Chaos | None, is_local: bool) -> None:
        self.service, self.chaos, self.is_local = service, chaos, is_local
        # The time, the seconds, and the numbers of rows and of predicted rows of each answer.
        self.answers: deque[tuple[float, float, int, int]] = deque(maxlen=_MOST)
        service.on_answer = self.note
        text = (importlib.resources.files("coded_torch.serve") / "page.html").read_text()
        sources = {
            tag: " ".join(
                f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
                for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
            )
            for tag in ("script", "style")
        }
        token = chaos.token if chaos else ""
        self.text = text.replace('name="token" content=""', f'name="token" content="{token}"')
        self.headers = {
            "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
            f"frame-ancestors 'none'; script-src {sources['script']}; style-src {sources['style']}",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    def note(self, seconds: float, rows: int, predicted: int) -> None:
        """Note an answered request."""
        self.answers.append((time.monotonic(), seconds, rows, predicted))

    def check(self, request: Request) -> None:
        """Refuse a request under a name that another site may have given a loopback address."""
        if self.is_local and _host(request) not in LOOPBACK:
            raise RequestError(403, "invalid", f"the page must be asked under one of {LOOPBACK}")

    async def page(self, request: Request) -> Response:
        """Return the page."""
        self.check(request)
        return Response(self.text, headers=self.headers, media_type="text/html")

    async def status(self, request: Request) -> Response:
        """Return the state of the workers, and the last minute."""
        self.check(request)
        service, now = self.service, time.monotonic()
        states = getattr(service.pool, "states", {}) if service.ready else {}
        faults = dict(self.chaos.faults) if self.chaos else {}
        recent = np.array([x for x in self.answers if x[0] > now - _MINUTE]).reshape(-1, 4)
        ages = ((now - recent[:, 0]) // _STEP).astype(int)
        content = {
            "name": service.name,
            "ready": service.ready,
            "deadline": service.deadline,
            "inputs": [spec.metadata() for spec in service.inputs],
            "outputs": [spec.name for spec in service.outputs],
            "chaos": list(Chaos.ACTIONS) if self.chaos else [],
            "restarts": service.pool.num_restarts,
            "workers": [
                {"place": place, "state": state, "pid": pid, "fault": faults.get(place, "")}
                for place, (state, pid) in states.items()
            ],
            "minute": _summary(recent),
            "history": [_summary(recent[ages == n]) for n in reversed(range(int(_MINUTE / _STEP)))],
        }
        return _json(content)

    async def act(self, request: Request) -> Response:
        """Begin a fault."""
        self.check(request)
        chaos, host = self.chaos, request.headers.get("host", "")
        given = request.headers.get("x-page-token", "").encode()
        if chaos is None or request.headers.get("origin") != f"http://{host}":
            raise RequestError(403, "invalid", "faults need --chaos, and the page's own origin")
        if not secrets.compare_digest(given, chaos.token.encode()):
            raise RequestError(403, "invalid", "faults need the token of the page")
        if int(request.headers.get("content-length", _LARGEST + 1)) > _LARGEST:
            raise RequestError(413, "too_large", f"a fault must have at most {_LARGEST} bytes")
        try:
            wanted = orjson.loads(await request.body())
            place, action = wanted["worker"], wanted["action"]
        except (ValueError, KeyError, TypeError):
            place, action = None, None
        if type(place) is not int or action not in Chaos.ACTIONS:
            must = f"a worker, and an action of {', '.join(Chaos.ACTIONS)}"
            raise RequestError(400, "invalid", f"the request must name {must}")
        try:
            chaos.inject(place, action)
        except (ValueError, ProcessLookupError) as error:
            raise RequestError(409, "invalid", str(error)) from None
        return _json({})


def add_page(built: Starlette, *, chaos: Chaos | None, is_local: bool) -> None:
    """Add the page to an application.

    Args:
        built: the application.
        chaos: the faults that the page may cause. None if it only shows.
        is_local: whether the server listens on a loopback address only.
    """
    page = _Page(built.state.service, chaos, is_local)
    built.router.routes += [
        Route("/", page.page),
        Route("/favicon.ico", lambda _: Response(status_code=204)),
        Route("/page/status", page.status),
        Route("/page/fault", page.act, methods=["POST"]),
    ]


def _host(request: Request) -> str | None:
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def _summary(answers: np.ndarray) -> dict[str, float]:
    """Return the numbers of requests and rows, the predicted share, and quantiles of latencies."""
    requests, rows = len(answers), float(answers[:, 2].sum())
    quantiles = np.quantile(answers[:, 1], _QUANTILES).tolist() if requests else [0.0] * 3
    share = float(answers[:, 3].sum()) / rows if rows else 0.0
    names = ("p50", "p99", "p999")
    return {
        "requests": requests,
        "rows": rows,
        "predicted": share,
        **dict(zip(names, quantiles, strict=True)),
    }


def _json(content: object) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(orjson.dumps(content), headers=headers, media_type="application/json")
