"""The command ``coded-torch serve``."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import CodedWrapper
from ..stragglers import Bernoulli
from ..surrogates import Memory
from ..workers import FaultyWorkers, ProcessWorkers, Workers
from .console import CommandError, find_factory, need, say, usage

__all__ = ["LENET5", "serve"]

#: The factory of the embedded LeNet-5.
LENET5 = "coded_torch.demo.lenet5:lenet5_and_digits"
# Seconds, nginx's default: clients keep connections longer than uvicorn's default of 5.
_KEEP_ALIVE = 75
# Deadlines of one part after which a worker counts as hung, but at least a second. A kill costs a
# restart, so it waits for ten times as long as any client; it was not tuned.
_GRACE = 10
_PRIVACY = """\
Privacy: an answer that is not computed in time is predicted from the inputs and
answers of earlier requests, of any client."""


def serve(args: argparse.Namespace) -> None:
    """Serve a model over HTTP, or print a request with one example."""
    need("serve", "serve", "starlette", "uvicorn", "orjson", "prometheus_client")
    import orjson

    from ..serve import app, specs
    from ..serve.protocol import example_request

    module, examples = _load(args.factory)
    with usage("serve"):
        inputs, outputs = specs(
            module, examples, args.output_names and args.output_names.split(",")
        )
        if args.example is not None and not 0 <= args.example < len(examples[0]):
            most = len(examples[0]) - 1
            raise ValueError(f"--example must be from 0 to {most}, got {args.example}")
    if args.example is not None:
        request = example_request(inputs, examples, args.example)
        say(orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY).decode())
        return
    name = args.name or ("lenet5" if args.factory == LENET5 else args.factory.partition(":")[2])
    limits = ("deadline", "max_batch_size", "max_queued_requests", "max_ongoing_batches")
    with usage("serve"):
        grace = max(1.0, _GRACE * args.deadline)
        workers: Workers = ProcessWorkers(args.num_workers, grace=grace)
        if args.chaos:
            law = Bernoulli(0.03, latency=0.05, seed=args.seed)
            workers = FaultyWorkers(workers, delays=law, seed=args.seed, crash_every=5.0)
        memory = [Memory()] if args.memory else []
        built = app(
            CodedWrapper(module, workers=workers, parts=args.parts, surrogate=memory),
            name=name,
            inputs=inputs,
            outputs=outputs,
            examples=examples,
            **{limit: getattr(args, limit) for limit in limits},
        )
    torch.set_num_threads(1)  # the processors are the workers'
    if memory:
        say(_PRIVACY)
    say(f"Loading {name} on {args.num_workers} processes; requests wait for that.")
    _listen(built, args.host, args.port, name)


def _load(factory: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Call a factory, and check that it returns a module and examples of its inputs."""
    made = find_factory("serve", factory)()
    model, examples = made if isinstance(made, tuple) and len(made) == 2 else (None, ())
    if isinstance(examples, Tensor):
        examples = (examples,)
    whole = isinstance(examples, tuple) and all(isinstance(x, Tensor) for x in examples)
    if not (isinstance(model, nn.Module) and examples and whole):
        must = "a module and examples of its inputs, a tensor or a tuple of some"
        got = type(made).__name__
        raise CommandError(f"coded-torch serve: {factory} must return {must}, got {got}")
    if not all(x.dim() and len(x) for x in examples):
        raise CommandError(f"coded-torch serve: the examples of {factory} must have rows, got none")
    return model.eval(), examples


def _listen(built: Any, host: str, port: int, name: str) -> None:
    import uvicorn

    logging.basicConfig(stream=sys.stderr, level="WARNING", format="%(name)s: %(message)s")
    logging.getLogger("coded_torch.serve").setLevel("INFO")  # says when the model is loaded
    # Requests may come before the model is loaded, so the socket is opened here. The protocol is
    # named: if it is 0, asyncio leaves Nagle's algorithm on, which adds 40 ms to every request of a
    # kept connection.
    with socket.socket(proto=socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with usage("serve: --port must be free"):
            listening.bind((host, port))
            listening.listen(2048)  # uvicorn's own backlog
        port = listening.getsockname()[1]
        say(f"Serving {name} at http://{host}:{port}/v2/models/{name}/infer")
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False}
        config = uvicorn.Config(built, timeout_keep_alive=_KEEP_ALIVE, **quiet)
        uvicorn.Server(config).run(sockets=[listening])
