"""Clients of a fleet that others made, for the benchmark ``fleet``: all of them use httpx.

hedge-python 0.3.0 has its defaults, and knows the rate of requests, as its documentation advises.
It hedges GET only: its transport sees GET, and the one below it, which deals requests to the
servers in turn, in a random order each time, sends POST. Replies are checked as ours are.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Sequence
from typing import Any

import httpx
import tenacity
import torch
from hedge import HedgeConfig
from hedge.transport import HedgedHttpxTransport
from torch import Tensor

from coded_torch.codes import NotEnoughResults
from coded_torch.nn import Report
from coded_torch.open_inference import EndpointError, outputs_of, request
from coded_torch.workers import RemoteModule

from .fleet_server import LENGTH, NAME

ERRORS = (httpx.HTTPError, tenacity.RetryError, EndpointError, ValueError)


class Peer:
    """A client on httpx; ``sent`` counts the requests that went to servers.

    Tenacity tries again after ``patience``, in seconds.
    """

    def __init__(
        self, kind: str, urls: Sequence[str], parts: int, rate: float, patience: float
    ) -> None:
        self.parts, self.sent, self.loop = parts, 0, asyncio.new_event_loop()
        # hedge-python does not look at the exception of a request that another one has beaten.
        self.loop.set_exception_handler(lambda *_: None)
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.model = RemoteModule(urls[-1], NAME, outputs=["output"]).metadata
        inner = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None))
        source = random.Random(0)  # in turns alone, parts of a request go to the same servers
        turns = itertools.chain.from_iterable(source.sample(urls, len(urls)) for _ in iter(int, 1))

        async def deal(asked: httpx.Request) -> httpx.Response:
            self.sent += 1
            url, headers = next(turns) + asked.url.path, {LENGTH: asked.headers[LENGTH]}
            post = httpx.Request(
                "POST", url, headers=headers, content=asked.content, extensions=asked.extensions
            )
            return await inner.handle_async_request(post)

        transport: Any = httpx.MockTransport(deal)
        if kind == "hedge-python":
            config = HedgeConfig(estimated_rps=parts * rate)
            transport = HedgedHttpxTransport(inner=transport, config=config)
        patience = patience if kind == "tenacity" else 5.0  # the default of httpx
        self.client = httpx.AsyncClient(transport=transport, timeout=patience)
        if kind == "tenacity":
            ten = tenacity.stop_after_attempt(10)
            again = tenacity.retry_if_exception_type(ERRORS)
            self.ask = tenacity.retry(stop=ten, retry=again)(self.ask)  # type: ignore[method-assign]

    async def ask(self, rows: Tensor) -> Tensor:
        """Return the outputs of a part."""
        body, length = request(self.model, [rows], binary=True)
        url, headers = f"http://fleet{self.model.path}/infer", {LENGTH: str(length)}
        reply = await self.client.request("GET", url, content=body, headers=headers)
        reply.raise_for_status()
        (found,), _ = outputs_of(self.model, reply.content, reply.headers.get(LENGTH), len(rows))
        if not found.isfinite().all():
            raise ValueError("not finite")
        return found

    async def all(self, batch: Tensor) -> Tensor:
        return torch.cat(await asyncio.gather(*map(self.ask, batch.chunk(self.parts))))

    def __call__(self, batch: Tensor) -> tuple[Tensor, Report]:
        try:
            found = asyncio.run_coroutine_threadsafe(self.all(batch), self.loop).result()
        except ERRORS as error:
            raise NotEnoughResults((), 1, self.parts) from error
        return found, Report(source=torch.zeros(len(batch)))

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.client.aclose(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
