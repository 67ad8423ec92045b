"""The page at ``/`` of a server: its workers, its latencies, the kind of each row, and faults.

A page of another site can post to a loopback address. So every action needs a random token of this
page, the page's own origin and a loopback name.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import secrets
import signal
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch.utils import _pytree as pytree

from . import open_inference as wire
from .serve import app
from .serve.protocol import RequestError, read_body

__all__ = ["LOOPBACK", "Chaos", "Page"]

#: The names of hosts that only this computer reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MINUTE, _STEP = 60.0, 5.0  # the seconds that the charts show, and of one of their points
_QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
# Seconds of a fault: long enough to watch, short enough to wait for. Not tuned.
_FAULT_SECONDS = 10.0
# A delayed worker runs for a tenth of the time, in turns of so many seconds. Not tuned.
_TURN_SECONDS = 0.1
_LARGEST = 1000  # bytes of a request for an action, at most
_ROWS = 63  # rows of a request of the page beside the drawing: 8 x 8 tiles
# Numbers of the examples or of their outputs, at most: about 1 MB of JSON. Not tuned.
_MOST_NUMBERS = 100_000


class Chaos:
    """Kills, pauses, delays and corrupts single workers of a pool, and restarts excluded ones.

    Faults need a pool of local processes. A fault but a kill lasts ten seconds, or until the pool
    replaces the process. Workers are corrupt only while others find that: the server ``verifies``
    rows, and fewer than half of the workers are corrupt.
    """

    ACTIONS = ("kill", "pause", "delay", "corrupt")

    def __init__(self, pool: Any, *, faults: bool, verifies: bool) -> None:
        self.pool, self.verifies = pool, verifies
        self.actions = self.ACTIONS if faults else ()
        self.token = secrets.token_urlsafe(24)
        self.faults: dict[int, str] = {}  # the running faults, by place
        self.corrupt: set[int] = set()  # the pool reads it with each result
        if faults:
            pool.adversaries = self.corrupt

    def offered(self, place: int) -> dict[str, str]:
        """Return the actions on a worker, each with why it cannot be now, or ""."""
        states = getattr(self.pool, "states", {})
        state, pid = states.get(place, ("down", 0))
        if state == "excluded":
            return {"restart": ""}
        down = "" if pid else f"worker {place} is down, or none of {len(states)}"
        fault = self.faults.get(place)
        why = down or (f"worker {place} has a fault already: {fault}" if fault else "")
        members = {each for each, (state, _) in states.items() if state != "excluded"}
        wrong = ""
        if not self.verifies:
            wrong = "wrong results are found with --verify only"
        elif 2 * len(self.corrupt & members) + 2 >= len(members):
            wrong = f"fewer than half of {len(members)} workers may be corrupt"
        reasons = {"kill": down, "corrupt": wrong or why}
        return {action: reasons.get(action, why) for action in self.actions}

    def act(self, place: int, action: str) -> None:
        """Act on the worker at a place; a ValueError if that cannot be now."""
        offered = self.offered(place)
        if why := offered.get(action, f"the action must be one of {', '.join(offered) or 'none'}"):
            raise ValueError(why)
        pid = self.pool.states[place][1]
        if action == "restart":
            self.pool.restart(place)
        elif action == "kill":
            os.kill(pid, signal.SIGKILL)
        else:
            self.faults[place] = action
            self.corrupt |= {place} if action == "corrupt" else set()
            threading.Thread(target=self._run, args=(place, pid, action), daemon=True).start()

    def _run(self, place: int, pid: int, action: str) -> None:
        # The signal 0 only asks whether the process is there.
        stop, go = (0, 0) if action == "corrupt" else (signal.SIGSTOP, signal.SIGCONT)
        turn = [(stop, 0.9), (go if action == "delay" else stop, 0.1)]
        with contextlib.suppress(ProcessLookupError):  # the process has ended
            for number, share in [*turn * round(_FAULT_SECONDS / _TURN_SECONDS), (go, 0.0)]:
                if self.pool.states.get(place, ("", 0))[1] != pid:
                    break  # the pool has replaced the process: another one may have its number
                os.kill(pid, number)
                time.sleep(share * _TURN_SECONDS)
        self.corrupt.discard(place)
        del self.faults[place]


class Page:
    """The page of an application, which it adds.

    With ``is_local``, the server listens on a loopback address only, and the page restarts excluded
    workers. With ``faults``, the page causes faults, too.
    """

    def __init__(self, built: app, *, faults: bool = False, is_local: bool) -> None:
        self.built, self.is_local = built, is_local
        verifies = bool(built.coded.verify)
        self.chaos = Chaos(built.pool, faults=faults, verifies=verifies) if is_local else None
        text = (importlib.resources.files("coded_torch") / "page.html").read_text("utf-8")
        self.text = text.replace("TOKEN", self.chaos.token if self.chaos else "")
        self.text = self.text.replace("EXAMPLES", _examples(built).replace("<", r"\u003c"))
        built.router.routes += [
            Route("/", self.page),
            Route("/favicon.ico", lambda _: Response(status_code=204)),
            Route("/page/status", self.status),
            Route("/page/action", self.act, methods=["POST"]),
        ]

    def check(self, request: Request) -> None:
        """Refuse a request under a name that another site may have given a loopback address."""
        host = None
        with contextlib.suppress(ValueError):
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        if self.is_local and host not in LOOPBACK:
            raise RequestError(403, "invalid", f"the page must be asked under one of {LOOPBACK}")

    async def page(self, request: Request) -> Response:
        self.check(request)
        nonce = secrets.token_urlsafe(24)  # only the script and the style of this response may run
        policy = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        policy += "".join(f"; {tag}-src 'nonce-{nonce}'" for tag in ("script", "style"))
        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        text = self.text.replace("NONCE", nonce)
        return Response(text, headers=headers, media_type="text/html")

    async def status(self, request: Request) -> Response:
        """Return the state of the workers, and the last minute."""
        self.check(request)
        built, chaos, now = self.built, self.chaos, time.monotonic()
        names, states = (built.of_places(what) for what in ("names", "states"))
        recent = np.array([x for x in built.answers if x[0] > now - _MINUTE]).reshape(-1, 4)
        ages = ((now - recent[:, 0]) // _STEP).astype(int)
        content = {
            "name": built.name,
            "ready": built.ready,
            "deadline": built.deadline,
            "verify": built.coded.verify or 0.0,
            "inputs": [spec.metadata() for spec in built.inputs],
            "outputs": [spec.name for spec in built.outputs],
            "restarts": built.pool.num_restarts,
            "workers": [
                {"place": place, "name": names.get(place, f"Worker {place}"), "state": state}
                | {"pid": pid, "fault": chaos.faults.get(place, "") if chaos else ""}
                | {"actions": chaos.offered(place) if chaos else {}}
                for place, (state, pid) in (states.items() if built.ready else ())
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
            raise RequestError(
                403, "invalid", "actions need a loopback address and the page's origin"
            )
        if not secrets.compare_digest(given, chaos.token.encode()):
            raise RequestError(403, "invalid", "actions need the token of the page")
        try:
            wanted = orjson.loads(await read_body(request, _LARGEST))
            chaos.act(int(wanted["worker"]), wanted["action"])
        except (LookupError, OSError, TypeError, ValueError) as error:
            raise RequestError(409, "invalid", str(error)) from None
        return JSONResponse({})


def _examples(built: app) -> str:
    """Return some examples as a request, and the model's own first output of them, as JSON.

    There are none if they are too large, and no output if the model does not repeat it.
    """
    inputs, module = built.examples or [], built.coded.module
    fit = [_MOST_NUMBERS // max(1, x[0].numel()) for x in inputs]
    rows = min(_ROWS, built.max_rows - 1, *fit, *map(len, inputs)) if inputs else 0
    if rows < 1:
        return "{}"
    some = [x[:rows] for x in inputs]
    with torch.no_grad():
        first, again = (pytree.tree_leaves(module(*some))[0] for _ in range(2))
    rows = _MOST_NUMBERS // max(1, first[0].numel())
    model = wire.Model("", tuple(built.inputs), (), False)
    request, _ = wire.request(model, [x[:rows] for x in some])
    known = [(built.outputs[0], first[:rows], False)] if torch.equal(first, again) else []
    answer, _ = wire.written({}, "outputs", known)
    return f'{{"request":{request.decode()},"answer":{answer.decode()}}}'


def _summary(answers: np.ndarray) -> dict[str, float]:
    """Return the numbers of requests and rows, the estimated share, and quantiles of latencies."""
    _, seconds, rows, estimated = answers.T
    found = {"requests": len(answers), "rows": float(rows.sum())}
    found["estimated"] = float(estimated.sum()) / (found["rows"] or 1.0)
    latencies = seconds if len(answers) else np.zeros(1)
    return found | {name: float(np.quantile(latencies, q)) for name, q in _QUANTILES.items()}
