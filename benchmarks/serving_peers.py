"""Servers that others made, for the benchmark ``serving``: they serve a model that sleeps.

``python -m benchmarks.serving_peers NAME PORT`` runs one, with as many processes and batches as
large as our own server has. LitServe and Ray Serve are imported where they run.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn

from .traffic import Sleeping

try:
    from litserve import LitAPI, LitServer
except ImportError:  # the benchmark says how to get it
    LitAPI = object

PROCESSES, BATCH, FEATURES = 2, 64, 16  # BATCH is the rows of the largest batch
PATH = "/v2/models/model/infer"


def sleeping() -> nn.Module:
    """Return the model, which takes 1 ms a row."""
    torch.set_num_threads(1)
    return Sleeping(nn.Identity(), 0.0, 1e-3)


def row_of(request: Any) -> Tensor:
    return torch.tensor(request["inputs"][0]["data"])


def answer(row: Tensor) -> Any:
    return {"outputs": [{"name": "output", "data": row.tolist()}]}


class Api(LitAPI):  # type: ignore[misc]
    """The model in LitServe, which sends this class to its processes."""

    def setup(self, device: str) -> None:
        self.predict = sleeping()
        self.decode_request, self.encode_response = row_of, answer


def lit_serve(port: int) -> None:
    api = Api(max_batch_size=BATCH, api_path=PATH)
    server = LitServer(api, accelerator="cpu", workers_per_device=PROCESSES)
    server.run(port=port, host="127.0.0.1", generate_client_file=False, log_level="critical")


def ray_serve(port: int) -> None:
    import ray
    from ray import serve

    places = {"num_replicas": PROCESSES, "ray_actor_options": {"num_cpus": 0.5}}

    @serve.deployment(max_ongoing_requests=2 * BATCH, **places)
    class Replica:
        def __init__(self) -> None:
            self.model = sleeping()

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0)
        async def answers(self, rows: list[Tensor]) -> list[Any]:
            return [*map(answer, await asyncio.to_thread(self.model, torch.stack(rows)))]

        async def __call__(self, request: Any) -> Any:
            return await self.answers(row_of(await request.json()))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # ends Ray's processes
    ray.init(address="local", num_cpus=PROCESSES, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Replica.bind(), route_prefix="/")
    threading.Event().wait()


PEERS = {"LitServe": lit_serve, "Ray Serve": ray_serve}

if __name__ == "__main__":
    PEERS[sys.argv[1]](int(sys.argv[2]))
