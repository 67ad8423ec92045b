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
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..workers import FaultyWorkers
from .application import app
from .protocol import RequestError, read_body

__all__ = ["LOOPBACK", "Chaos", "Page"]

#: The names of hosts that only this computer reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MINUTE, _STEP = 60.0, 5.0  # the seconds that the charts show, and of one of their points
_QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
# Seconds of a fault: long enough to watch, short enough to wait for. Not tuned.
_FAULT_SECONDS = 10.0
# A delayed worker runs for a tenth of the time, in turns of so many seconds. Not tuned.
_TURN_SECONDS = 0.1
_LARGEST = 1000  # bytes of a request for a fault, at most


class Chaos:
    """Kills, pauses, delays and corrupts single workers of a pool of local processes.

    All but a kill last ten seconds, or until the pool replaces the process.
    """

    ACTIONS = ("kill", "pause", "delay", "corrupt")

    def __init__(self, pool: FaultyWorkers) -> None:
        self.pool = pool
        self.token = secrets.token_urlsafe(24)
        self.faults: dict[int, str] = {}  # the running faults, by place
        self._lock = threading.Lock()

    def inject(self, place: int, action: str) -> None:
        """Begin a fault of the worker at a place; a ValueError if it is down, or has a fault."""
        if action not in self.ACTIONS:
            raise ValueError(f"the action must be one of {', '.join(self.ACTIONS)}")
        pid = self.pool.states.get(place, ("down", 0))[1]
        if not pid:
            raise ValueError(f"worker {place} is down, or none of {len(self.pool.states)}")
        if action == "kill":
            os.kill(pid, signal.SIGKILL)
            return
        if place in self.faults:
            raise ValueError(f"worker {place} has a fault already: {self.faults[place]}")
        self._note(place, action)
        threading.Thread(target=self._run, args=(place, pid, action), daemon=True).start()

    def _note(self, place: int, action: str = "") -> None:
        """Note the fault of a place, or its end. The pool corrupts the results of noted places."""
        with self._lock:
            self.faults.pop(place, None)
            if action:
                self.faults[place] = action
            attack = [each for each, fault in self.faults.items() if fault == "corrupt"]
            self.pool.adversaries = tuple(attack)

    def _run(self, place: int, pid: int, action: str) -> None:
        stops = action in ("pause", "delay")
        end = time.monotonic() + _FAULT_SECONDS
        try:
            while time.monotonic() < end:
                if stops:
                    self._signal(place, pid, signal.SIGSTOP)
                time.sleep(0.9 * _TURN_SECONDS)
                if action == "delay":
                    self._signal(place, pid, signal.SIGCONT)
                    time.sleep(0.1 * _TURN_SECONDS)
            if stops:
                self._signal(place, pid, signal.SIGCONT)
        except ProcessLookupError:
            pass  # the pool has replaced the process
        finally:
            self._note(place)

    def _signal(self, place: int, pid: int, number: int) -> None:
        if self.pool.states[place][1] != pid:  # the number may be another process's by now
            raise ProcessLookupError
        os.kill(pid, number)


class Page:
    """The page of an application, which it adds. It only shows without ``chaos``.

    With ``is_local``, the server listens on a loopback address only.
    """

    def __init__(self, built: app, *, chaos: Chaos | None, is_local: bool) -> None:
        self.built, self.chaos, self.is_local = built, chaos, is_local
        built.router.routes += [
            Route("/", self.page),
            Route("/favicon.ico", lambda _: Response(status_code=204)),
            Route("/page/status", self.status),
            Route("/page/fault", self.act, methods=["POST"]),
        ]
        text = (importlib.resources.files("coded_torch.serve") / "page.html").read_text("utf-8")
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

    def check(self, request: Request) -> None:
        """Refuse a request under a name that another site may have given a loopback address."""
        host = None
        with contextlib.suppress(ValueError):
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        if self.is_local and host not in LOOPBACK:
            raise RequestError(403, "invalid", f"the page must be asked under one of {LOOPBACK}")

    async def page(self, request: Request) -> Response:
        self.check(request)
        return Response(self.text, headers=self.headers, media_type="text/html")

    async def status(self, request: Request) -> Response:
        """Return the state of the workers, and the last minute."""
        self.check(request)
        built, now = self.built, time.monotonic()
        states = built.of_places("states") if built.ready else {}
        faults, names = dict(self.chaos.faults) if self.chaos else {}, built.of_places("names")
        recent = np.array([x for x in built.answers if x[0] > now - _MINUTE]).reshape(-1, 4)
        ages = ((now - recent[:, 0]) // _STEP).astype(int)
        content = {
            "name": built.name,
            "ready": built.ready,
            "deadline": built.deadline,
            "inputs": [spec.metadata() for spec in built.inputs],
            "outputs": [spec.name for spec in built.outputs],
            "chaos": list(Chaos.ACTIONS) if self.chaos else [],
            "restarts": built.pool.num_restarts,
            "workers": [
                {"place": place, "name": names.get(place, f"Worker {place}"), "state": state}
                | {"pid": pid, "fault": faults.get(place, "")}
                for place, (state, pid) in states.items()
            ],
            "minute": _summary(recent),
            "history": [_summary(recent[ages == n]) for n in reversed(range(int(_MINUTE / _STEP)))],
        }
        return JSONResponse(content, headers={"Cache-Control": "no-store"})

    async def act(self, request: Request) -> Response:
        self.check(request)
        chaos, host = self.chaos, request.headers.get("host", "")
        given = request.headers.get("x-page-token", "").encode()
        if chaos is None or request.headers.get("origin") != f"http://{host}":
            raise RequestError(403, "invalid", "faults need --chaos, and the page's own origin")
        if not secrets.compare_digest(given, chaos.token.encode()):
            raise RequestError(403, "invalid", "faults need the token of the page")
        try:
            wanted = orjson.loads(await read_body(request, _LARGEST))
            chaos.inject(int(wanted["worker"]), wanted["action"])
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise RequestError(409, "invalid", str(error)) from None
        return JSONResponse({})


def _summary(answers: np.ndarray) -> dict[str, float]:
    """Return the numbers of requests and rows, the predicted share, and quantiles of latencies."""
    _, seconds, rows, predicted = answers.T
    found = {"requests": len(answers), "rows": float(rows.sum())}
    found["predicted"] = float(predicted.sum()) / (found["rows"] or 1.0)
    latencies = seconds if len(answers) else np.zeros(1)
    return found | {name: float(np.quantile(latencies, q)) for name, q in _QUANTILES.items()}
