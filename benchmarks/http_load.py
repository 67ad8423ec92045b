"""Requests that arrive on their own at an HTTP server in a process of its own.

A request's latency counts from when it was due, whether or not the generator was late. The server
writes down when each request reached it and when it answered, which no lag of the generator spoils.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

__all__ = ["Reply", "Server", "drive", "record_times", "request", "serving"]

START = 120.0  # seconds that a server may take to come up
_TIMES = "/times"


@dataclasses.dataclass(frozen=True)
class Reply:
    """The reply to one request.

    Attributes:
        number: the number of the request.
        status: the answer's status; 0 if there was none.
        seconds: from when the request was due.
        head_length: the length of the JSON in front of the body.
        body: the answer's body.
    """

    number: int
    status: int
    seconds: float
    head_length: int = 0
    body: bytes = b""


def request(path: str, body: bytes, head_length: int) -> bytes:
    """Return a request with binary tensors behind so many bytes of JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Inference-Header-Content-Length: {head_length}\r\n\r\n"
    )
    return head.encode() + body


def drive(port: int, requests: Sequence[bytes], rate: float, seed: int) -> list[Reply]:
    """Send requests when they are due, independently of each other and of answers (Poisson)."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(requests))
    return asyncio.run(_drive(port, requests, np.cumsum(gaps).tolist()))


async def _drive(port: int, requests: Sequence[bytes], due: Sequence[float]) -> list[Reply]:
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    begin = time.perf_counter() + 0.1

    async def send(number: int) -> Reply:
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(requests[number])
            status, headers, body = await _answer(reader)
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return Reply(number, 0, time.perf_counter() - begin - due[number])
        seconds = time.perf_counter() - begin - due[number]
        if headers.get("connection") == "close":
            writer.close()
        else:
            idle.append((reader, writer))
        length = int(headers.get("inference-header-content-length", 0))
        return Reply(number, status, seconds, length, body)

    tasks = []
    for number, at in enumerate(due):
        if (left := begin + at - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        tasks.append(asyncio.create_task(send(number)))
    replies = await asyncio.gather(*tasks)
    for _, writer in idle:
        writer.close()
    return list(replies)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    parts = (line.partition(":") for line in head[1:])
    headers = {name.lower(): value.strip() for name, _, value in parts}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(head[0].split()[1]), headers, body


def record_times(application: Any) -> Any:
    """Return an ASGI application that also writes down status and seconds of each POST request.

    They are taken from the first byte of a request to the last of its answer, and are served, once,
    under ``/times``.
    """
    times: list[tuple[int, float]] = []

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == _TIMES:
            body = json.dumps(times).encode()
            times.clear()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
            return
        start, status = time.perf_counter(), 0

        async def noted(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await application(scope, receive, noted)
        if scope.get("method") == "POST":
            times.append((status, time.perf_counter() - start))

    return recording


@dataclasses.dataclass(frozen=True)
class Server:
    """A server in a process."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> bytes:
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return bytes(answer.read())

    def times(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return status and seconds ``[n, 2]`` of the requests since the last look."""
        return np.array(json.loads(self.get(_TIMES)), dtype=np.float64).reshape(-1, 2)

    def killed(self) -> int:
        """Return how many processes of its pool were killed so far."""
        return len(set(re.findall(r"process (\d+) was killed by SIGKILL", self.log.read_text())))

    def resident(self) -> int:
        """Return the KiB of memory of the process alone."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0])


@contextlib.contextmanager
def serving(*command: str) -> Iterator[Server]:
    """Run a Python command that serves at the port that it is given last."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    with tempfile.NamedTemporaryFile() as log:
        line = [sys.executable, *command, str(port)]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=log)
        try:
            server = Server(port, process, Path(log.name))
            _wait_until_ready(server)
            yield server
        finally:
            process.kill()
            process.wait(30)


def _wait_until_ready(server: Server) -> None:
    until = time.monotonic() + START
    while True:
        try:
            server.get("/v2/health/ready")
            return
        except OSError:
            if server.process.poll() is not None or time.monotonic() > until:
                text = server.log.read_text()
                raise RuntimeError(f"the server did not come up: {text}") from None
            time.sleep(0.05)
