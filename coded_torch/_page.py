"""The page at ``/`` of a server: its workers, its latencies, the kind of each row, and faults.

A page of another site can post to a loopback address. So every action needs a random token of this
page, and the page's own origin. The application checks under which name it is asked.
"""

import asyncio
import contextlib
import importlib.resources
import os
import secrets
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

import orjson
import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from . import open_inference as wire
from ._untuned import FAULT_SECONDS, MOST_NUMBERS, TURN_SECONDS
from .serve import App
from .serve._protocol import RequestError

#: The names of hosts that only this computer reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Seconds of answers that the page shows, and that it asks for again if it asks each second.
_MINUTE = 60.0
_AGAIN = 3.0
_ROWS = 63  # examples in a request of the page, beside the drawing: 8 x 8 tiles
_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
_HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
_HEADERS |= {"X-Content-Type-Options": "nosniff"}


class Chaos:
    """Kills, pauses, delays and corrupts single workers of a pool, and restarts excluded ones.

    Faults need a pool of local processes. A fault but a kill lasts ten seconds, or until the pool
    replaces the process. Workers are corrupt only while others find that: rows are verified, and
    fewer than half of the workers are corrupt. Only a server on a loopback address has a token.
    """

    def __init__(self, built: App, *, faults: bool, is_local: bool) -> None:
        self.built = built
        self.pool = cast("Any", built.pool)
        self.token = ""
        if is_local:
            self.token = secrets.token_urlsafe(24)
        self.actions = ("kill", "pause", "delay", "corrupt") if faults else ()
        self.faults: dict[int, str] = {}  # the running faults, by place
        self.corrupt: set[int] = set()
        if faults:  # the pool reads it with each result
            self.pool.adversaries = self.corrupt

    def offered(self, place: int, states: Mapping[int, tuple[str, int]]) -> dict[str, str]:
        """Return the actions on a worker of some states, each with why it cannot be now, or ""."""
        state, pid = states.get(place, ("down", 0))
        if state == "excluded":
            return {"restart": ""} if self.token else {}
        down = "" if pid else f"worker {place} is down, or none of {len(states)}"
        has = f"worker {place} has a fault already: {self.faults.get(place)}"
        why = wrong = down or (has if place in self.faults else "")
        members = {each for each, (state, _) in states.items() if state != "excluded"}
        if not self.built.coded.verify:
            wrong = "wrong results are found with --verify only"
        elif 2 * len(self.corrupt & members) + 2 >= len(members):
            wrong = f"fewer than half of {len(members)} workers may be corrupt"
        reasons = {"kill": down, "corrupt": wrong}
        return {action: reasons.get(action, why) for action in self.actions}

    def act(self, place: int, action: str) -> None:
        """Act on the worker at a place; a ValueError if that cannot be now."""
        states = self.pool.states  # read once, as a process may end meanwhile
        offered = self.offered(place, states)
        why = offered.get(action, f"the action must be one of {', '.join(offered) or 'none'}")
        if why:
            raise ValueError(why)
        pid = states[place][1]
        if action == "restart":
            self.pool.restart(place)
        elif action == "kill":
            os.kill(pid, signal.SIGKILL)
        else:
            self.faults[place] = action
            self.corrupt.update({place} if action == "corrupt" else ())
            threading.Thread(target=self._run, args=(place, pid, action), daemon=True).start()

    def _run(self, place: int, pid: int, action: str) -> None:
        # The signal 0 only asks whether the process is there.
        stop, go = (0, 0) if action == "corrupt" else (signal.SIGSTOP, signal.SIGCONT)
        turn = [(stop, 0.9), (go if action == "delay" else stop, 0.1)]
        with contextlib.suppress(ProcessLookupError):  # the process has ended
            for number, share in [*turn * round(FAULT_SECONDS / TURN_SECONDS), (go, 0.0)]:
                if self.pool.states.get(place, ("", 0))[1] != pid:
                    break  # the pool has replaced the process: another one may have its number
                os.kill(pid, number)
                time.sleep(share * TURN_SECONDS)
        self.corrupt.discard(place)
        del self.faults[place]


def add_page(built: App, *, faults: bool = False, is_local: bool) -> None:
    """Add the page, which restarts workers if ``is_local``, and causes ``faults``."""
    chaos = Chaos(built, faults=faults, is_local=is_local)
    text = (importlib.resources.files("coded_torch") / "page.html").read_text("utf-8")
    text = text.replace("TOKEN", chaos.token)
    shown = {built.version: _examples(built)}

    async def page(_: Request) -> Response:
        version = built.version
        if version not in shown:
            shown[version] = await asyncio.to_thread(_examples, built)
        examples = shown[version].replace("<", r"\u003c")
        nonce = secrets.token_urlsafe(24)  # the script and the style of this response may run
        policy = f"{_POLICY}script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
        headers = _HEADERS | {"Content-Security-Policy": policy}
        content = text.replace("NONCE", nonce).replace("EXAMPLES", examples)
        return Response(content, headers=headers, media_type="text/html")

    async def status(request: Request) -> Response:
        """Return the state of the workers, and the last answers: of a minute with any query."""
        now = time.monotonic()
        names = built.pool.names
        states = built.pool.states
        since = now - (_MINUTE if request.url.query else _AGAIN)
        content = {
            "name": built.name,
            "version": built.version,
            "ready": built.ready,
            "deadline": built.deadline,
            "verify": built.coded.verify or 0.0,
            "inputs": [spec.metadata() for spec in built.inputs],
            "outputs": [spec.name for spec in built.outputs],
            "restarts": built.pool.num_restarts,
            "workers": [
                {"place": place, "name": names.get(place, f"Worker {place}"), "state": state}
                | {"pid": pid, "fault": chaos.faults.get(place, "")}
                | {"actions": chaos.offered(place, states)}
                for place, (state, pid) in states.items()
                if built.ready
            ],
            "now": now,
            "answers": [answer for answer in built.answers if answer[0] > since],
        }
        return JSONResponse(content, headers=_HEADERS)

    async def act(request: Request) -> Response:
        given = request.headers.get("x-page-token", "").encode()
        headers = request.headers
        if not is_local or headers.get("origin") != f"http://{headers.get('host')}":
            raise RequestError(403, "invalid", "actions need a loopback address, and its page")
        if not secrets.compare_digest(given, chaos.token.encode()):
            raise RequestError(403, "invalid", "actions need the token of the page")
        try:
            wanted = request.query_params  # no body is read
            chaos.act(int(wanted["worker"]), wanted["action"])
        except (LookupError, OSError, ValueError) as error:
            raise RequestError(409, "invalid", str(error)) from None
        return JSONResponse({})

    built.router.routes += [
        Route("/", page),
        Route("/favicon.ico", lambda _: Response(status_code=204)),
        Route("/page/status", status),
        Route("/page/action", act, methods=["POST"]),
    ]


def _examples(built: App) -> str:
    """Return JSON: examples, unless they are too large, and the model's own first output."""
    inputs = built.examples
    module = built.coded.module
    fit = [MOST_NUMBERS // max(1, _size(x[0])) for x in inputs]
    rows = 0
    if inputs:
        rows = min(_ROWS, built.max_rows - 1, *fit, *map(len, inputs))
    if rows < 1:
        return "{}"
    examples = [x[:rows] for x in inputs]
    (args, kwargs) = built.call(rows)
    with torch.no_grad():
        first, again = (wire.flatten(module(*args, **kwargs))[0][0] for _ in range(2))
    rows = MOST_NUMBERS // max(1, _size(first[0]))
    inputs_shown = [(spec, x[:rows], False) for spec, x in zip(built.inputs, examples, strict=True)]
    is_known = isinstance(first, Tensor) and torch.equal(first, again)
    known = []
    if is_known:
        known = [(built.outputs[0], first[:rows], False)]
    request = orjson.loads(b"".join(wire.written({}, "inputs", inputs_shown)[0]))
    return b"".join(wire.written(request, "outputs", known)[0]).decode()


def _size(row: Any) -> int:
    """Return the numbers or the characters of a row."""
    if isinstance(row, Tensor):
        return row.numel()
    return len(row)
