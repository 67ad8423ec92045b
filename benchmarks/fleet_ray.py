"""Ray Serve as the fleet of the benchmark ``fleet``: replicas of its model, and their faults."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .fleet_server import LENGTH, answer, corrupted, delays

CHECK = 1.0  # seconds between health checks, and that a replica may take to answer one


class RayFleet:
    """Six replicas in a cluster of their own, at one address.

    A replica answers up to eight requests at a time, and is replaced if it does not answer a health
    check.
    """

    patience = 0.25  # seconds after which tenacity tries again: answers take longer than elsewhere

    def __init__(self, numbers: tuple[float, float, float, float], replicas: int = 6) -> None:
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.urls = [f"http://127.0.0.1:{self.port}"]
        self.numbers, self.replicas = numbers, replicas
        self.kept = tempfile.TemporaryDirectory()  # a file for each process, by its number

    def __enter__(self) -> RayFleet:
        import ray
        from ray import serve
        from starlette.responses import Response

        numbers, folder = self.numbers, self.kept.name

        @serve.deployment(
            num_replicas=self.replicas,
            max_ongoing_requests=8,
            health_check_period_s=CHECK,
            health_check_timeout_s=CHECK,
            ray_actor_options={"num_cpus": 0.1},
        )
        class Replica:
            def __init__(self) -> None:
                self.draw, self.fault = delays(*numbers), ""
                Path(folder, str(os.getpid())).touch()

            async def __call__(self, request: Any) -> Any:
                body, path = await request.body(), request.url.path
                if path == "/fault":
                    self.fault = body.decode()
                    return Response(str(os.getpid()))
                head, data = answer(path, request.headers.get(LENGTH, ""), body)
                await asyncio.sleep(self.draw() if data else 0.0)
                whole = corrupted(head + data, head) if data and self.fault else head + data
                return Response(whole, headers={LENGTH: str(len(head))})

        ray.init(address="local", num_cpus=self.replicas, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})
        serve.run(Replica.bind(), route_prefix="/")
        return self

    def __exit__(self, *exception: object) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self.kept.cleanup()

    def processes(self) -> set[int]:
        """Return the numbers of the replicas' processes that live."""
        found = {int(each.name) for each in Path(self.kept.name).iterdir()}
        return {number for number in found if Path(f"/proc/{number}").exists()}

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Let one replica hang, another answer corrupt bytes, and kill a third every 5 s."""
        with urllib.request.urlopen(f"{self.urls[0]}/fault", b"corrupted", 30) as reply:
            corrupt = int(reply.read())
        hung, done = min(self.processes() - {corrupt}), threading.Event()
        os.kill(hung, signal.SIGSTOP)
        killer = threading.Thread(target=self._kill, args=(done, {corrupt, hung}))
        killer.start()
        try:
            yield
        finally:
            done.set()
            killer.join()
            with contextlib.suppress(ProcessLookupError):
                os.kill(hung, signal.SIGCONT)

    def _kill(self, done: threading.Event, others: set[int]) -> None:
        source = random.Random(0)
        while not done.wait(5.0):
            if living := sorted(self.processes() - others):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(source.choice(living), signal.SIGKILL)
