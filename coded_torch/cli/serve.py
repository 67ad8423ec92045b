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
from . import CommandError, find_factory, need, say, usage

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

    from ..serve import app
    from ..serve.page import LOOPBACK, Chaos, add_page
    from ..serve.protocol import example_request

    is_local = args.host in LOOPBACK
    if args.chaos and not is_local:
        must = f"must listen on a loopback address, one of {', '.join(LOOPBACK)}"
        raise CommandError(f"coded-torch serve: --chaos {must}, got {args.host}")
    module, inputs, outputs, examples = _fleet(args) if args.endpoints else _own(args)
    if args.example is not None and examples is not None:
        request = example_request(inputs, examples, args.example)
        say(orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY).decode())
        return
    usual = args.model or ("lenet5" if args.factory == LENET5 else args.factory.partition(":")[2])
    name = args.name or usual
    limits = ("deadline", "max_batch_size", "max_queued_requests", "max_ongoing_batches")
    memory = [Memory()] if args.memory else []
    with usage("serve"):
        workers = _workers(args)
        coded = CodedWrapper(
            module, workers=workers, parts=args.parts, surrogate=memory, verify=args.verify or None
        )
        how: dict[str, Any] = {limit: getattr(args, limit) for limit in limits}
        how |= {"name": name, "inputs": inputs, "outputs": outputs, "examples": examples}
        built = app(coded, **how)
    if is_local or args.page:
        chaos = Chaos(workers) if isinstance(workers, FaultyWorkers) else None
        add_page(built, chaos=chaos, is_local=is_local)
    torch.set_num_threads(1)  # the processors are the workers'
    if memory:
        say(_PRIVACY)
    if args.endpoints:
        say(f"Asking {len(args.endpoints)} endpoints for {args.model}.")
    else:
        say(f"Loading {name} on {args.num_workers} processes; requests wait for that.")
    _listen(built, args.host, args.port, name, is_local or args.page)


def _wrong(rows: Tensor, generator: torch.Generator) -> Tensor:
    return -rows


def _workers(args: argparse.Namespace) -> Workers:
    """Return the pool that computes."""
    if args.endpoints:
        from ..workers import EndpointWorkers

        return EndpointWorkers(args.endpoints, model=args.model)
    pool = ProcessWorkers(args.num_workers, grace=max(1.0, _GRACE * args.deadline))
    if not args.chaos:
        return pool
    law = Bernoulli(0.03, latency=0.05, seed=args.seed)
    # The page says which workers attack.
    return FaultyWorkers(pool, delays=law, seed=args.seed, crash_every=5.0, attack=_wrong)


def _fleet(args: argparse.Namespace) -> tuple[nn.Module, Any, Any, None]:
    """Return the model of the endpoints, and its specs."""
    need("serve", "endpoints", "aiohttp")
    from ..workers import RemoteModule

    with usage("serve", errors=(RuntimeError, ValueError)):
        if args.model is None:
            raise ValueError("--endpoints must come with --model, the model's name there")
        for flag in ("chaos", "example", "output_names"):
            if getattr(args, flag) is not None and getattr(args, flag) is not False:
                raise ValueError(f"--{flag.replace('_', '-')} must be left out with --endpoints")
        silent: list[str] = []
        for url in args.endpoints:
            try:
                module = RemoteModule(url, args.model)
            except (RuntimeError, ValueError) as error:
                why = str(error).removeprefix("RemoteModule: ")
                if isinstance(error, ValueError):
                    raise ValueError(f"--endpoints: {why}") from None
                silent.append(why)
            else:
                for why in silent:
                    say(f"An endpoint does not describe {args.model}: {why}")
                return module, module.metadata.inputs, module.metadata.outputs, None
        raise RuntimeError(f"no endpoint describes the model {args.model!r}; {silent[0]}")


def _own(args: argparse.Namespace) -> tuple[nn.Module, Any, Any, tuple[Tensor, ...]]:
    """Return the model of the factory, its specs and examples of its inputs."""
    from ..serve import specs

    if args.model is not None:
        raise CommandError("coded-torch serve: --model must come with --endpoints")
    module, examples = _load(args.factory)
    with usage("serve"):
        names = args.output_names and args.output_names.split(",")
        inputs, outputs = specs(module, examples, names)
        if args.example is not None and not 0 <= args.example < len(examples[0]):
            most = len(examples[0]) - 1
            raise ValueError(f"--example must be from 0 to {most}, got {args.example}")
    return module, inputs, outputs, examples


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


def _listen(built: Any, host: str, port: int, name: str, has_page: bool) -> None:
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
        if has_page:
            say(f"A page shows it: http://{host}:{port}/")
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False}
        config = uvicorn.Config(built, timeout_keep_alive=_KEEP_ALIVE, **quiet)
        uvicorn.Server(config).run(sockets=[listening])
