"""The commands ``coded-torch serve`` and ``coded-torch plan``."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._arguments import MOST_WORKERS
from ..nn import CodedWrapper
from ..stragglers import Bernoulli
from ..surrogates import Memory
from ..workers import FaultyWorkers, ProcessWorkers, Workers
from .console import UsageError, find_factory, need, number, picture, save, say

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["add_plan", "add_serve"]

_LENET5 = "coded_torch.demo.lenet5:lenet5_and_digits"
_KEEP_ALIVE = 75  # seconds, nginx's default: clients keep connections longer than uvicorn's 5
# Deadlines of one part after which a worker counts as hung, but at least a second. A kill costs a
# restart, so it waits for ten times as long as any client; it was not tuned.
_GRACE = 10
_SEED = number(int, 0, 2**63 - 1)


def _add_numbers(parser: argparse.ArgumentParser, *options: tuple[str, Any, float, str]) -> None:
    for flag, kind, default, text in options:
        parser.add_argument(f"--{flag}", type=kind, default=default, help=f"{text} [{default}]")


def add_serve(commands: Any) -> None:
    """Add ``serve`` to the commands."""
    serve = commands.add_parser(
        "serve",
        help="answer HTTP requests within a deadline, on workers that fail",
        description="Serve a model by the Open Inference Protocol (KServe v2) on processes of this "
        "machine. Without MODULE:FACTORY: the embedded LeNet-5, named lenet5.",
    )
    serve.add_argument(
        "factory",
        nargs="?",
        default=_LENET5,
        metavar="MODULE:FACTORY",
        help="a function that returns the model and examples of its inputs, a tensor or several",
    )
    _add_numbers(
        serve,
        ("parts", number(int, 1, MOST_WORKERS), 4, "parts of a batch"),
        ("num-workers", number(int, 1, MOST_WORKERS), 6, "worker processes"),
        ("deadline", number(float, 1e-3, 3600), 0.2, "seconds from the arrival of a request"),
        ("port", number(int, 0, 65535), 8000, "the port to listen on; 0: any"),
        ("max-batch-size", number(int, 1, 65536), 64, "rows of a batch"),
        ("max-queued-requests", number(int, 1, 65536), 256, "requests that may wait"),
        ("max-ongoing-batches", number(int, 1, 64), 1, "batches that may run at once"),
        ("seed", _SEED, 0, "the seed of --chaos"),
    )
    serve.add_argument("--host", default="127.0.0.1", help="the address [%(default)s]")
    serve.add_argument("--name", help="the model's name in URLs [lenet5, or FACTORY]")
    text = "names of the outputs [the keys of a dict, or output0, output1, ...]"
    serve.add_argument("--output-names", metavar="NAME,NAME,...", help=text)
    text = "predict from inputs and answers of earlier requests, of any client"
    serve.add_argument("--memory", action="store_true", help=text)
    text = "delay 3 %% of the calls by 50 ms, and kill a worker every 5 s"
    serve.add_argument("--chaos", action="store_true", help=text)
    text = "print a request with one example, and end"
    serve.add_argument("--example", type=number(int, 0), metavar="ROW", help=text)
    serve.set_defaults(run=_serve)


def add_plan(commands: Any) -> None:
    """Add ``plan`` to the commands."""
    plan = commands.add_parser(
        "plan",
        help="find the redundancy that meets a deadline and an accuracy at least work",
        description="Simulate policies without redundancy, with hedging, with copies and with "
        "predictions on workers whose latencies were measured, or follow a law, and say which "
        "meets the objective at least work, and whether predicting or coding is worth it.",
    )
    source = plan.add_mutually_exclusive_group()
    source.add_argument(
        "--latencies", type=Path, metavar="FILE", help="CSV: seconds of one part, a line each"
    )
    laws = ("calm", "straggling", "slow", "dead", "bursts", "mix")
    source.add_argument("--law", choices=laws, default="mix", help="built in [%(default)s]")
    _add_numbers(
        plan,
        ("deadline", float, 0.2, "seconds within which 99.9 %% of the requests are answered"),
        ("accuracy", float, 0.99, "the share of rows answered as rightly as by the model"),
        ("num-workers", int, 6, "workers"),
        ("parts", int, 4, "parts of a request, whose latencies are known"),
        ("median", float, 0.01, "seconds that a part takes, under a law"),
        ("load", float, 0.3, "the share of the workers' time that requests take"),
        ("known", int, 1024, "remembered answers to predict from"),
        ("verify", float, 0.0, "the share of rows that a second worker computes, such as 0.02"),
        ("num-requests", number(int, 1000), 5000, "requests under each policy"),
        ("seed", _SEED, 0, "the seed of everything"),
    )
    path = "coded-torch-plan.png"
    plan.add_argument(
        "--output", type=picture, default=path, metavar="FILE", help="the picture [%(default)s]"
    )
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    need("plan", "demo", "matplotlib")

    from ..evaluation import planner

    try:
        names = planner.Goal.__dataclass_fields__
        goal = planner.Goal(**{name: getattr(args, name) for name in names})
        law: Any = planner.LAWS[args.law]
        if args.latencies is not None:
            law = planner.read_latencies(args.latencies)
        options = {"median": args.median, "num_requests": args.num_requests, "seed": args.seed}
        found = list(planner.plan(goal, law, **options))
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"coded-torch plan: {error}") from None
    say(planner.format_options(goal, found))
    save("plan", planner.draw(goal, found), args.output)
    say(f"\nThe share of slower requests against latency: {args.output.resolve()}")


def _serve(args: argparse.Namespace) -> None:
    need("serve", "serve", "starlette", "uvicorn", "orjson", "prometheus_client")

    import orjson

    from ..serve import app, specs
    from ..serve.protocol import example_request

    module, examples = _load(args.factory)
    names = args.output_names and args.output_names.split(",")
    try:
        inputs, outputs = specs(module, examples, names)
    except (TypeError, ValueError) as error:
        raise UsageError(f"coded-torch serve: {error}") from None
    if args.example is not None:
        if args.example >= (rows := len(examples[0])):
            raise UsageError(
                f"coded-torch serve: --example must be at most {rows - 1}, got {args.example}"
            )
        request = example_request(inputs, examples, args.example)
        say(orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY).decode())
        return

    name = args.name or ("lenet5" if args.factory == _LENET5 else args.factory.partition(":")[2])
    workers: Workers = ProcessWorkers(args.num_workers, grace=max(1.0, _GRACE * args.deadline))
    if args.chaos:
        law = Bernoulli(0.03, latency=0.05, seed=args.seed)
        workers = FaultyWorkers(workers, delays=law, seed=args.seed, crash_every=5.0)
    memory = [Memory()] if args.memory else []
    options = ("deadline", "max_batch_size", "max_queued_requests", "max_ongoing_batches")
    try:
        coded = CodedWrapper(module, workers=workers, parts=args.parts, surrogate=memory)
        built = app(
            coded,
            name=name,
            inputs=inputs,
            outputs=outputs,
            examples=examples,
            **{option: getattr(args, option) for option in options},
        )
    except ValueError as error:
        raise UsageError(f"coded-torch serve: {error} (see coded-torch serve --help)") from None
    torch.set_num_threads(1)  # the processors are the workers'
    if memory:
        say(
            "Privacy: an answer that is not computed in time is predicted from the inputs and "
            "answers of earlier requests, of any client."
        )
    say(f"Loading {name} on {args.num_workers} processes; requests wait for that.")
    _listen(built, args.host, args.port, name)


def _load(factory: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Call a factory, and check that it returns a module and examples of its inputs."""
    made = find_factory("serve", factory)()
    model, examples = made if isinstance(made, tuple) and len(made) == 2 else (None, None)
    if isinstance(examples, Tensor):
        examples = (examples,)
    tensors = isinstance(examples, tuple) and all(isinstance(x, Tensor) for x in examples)
    if not (isinstance(model, nn.Module) and examples and tensors):
        raise UsageError(
            f"coded-torch serve: {factory} must return a module and examples of its inputs, a "
            f"tensor or a tuple of some, got {type(made).__name__}"
        )
    if any(x.dim() < 1 or not len(x) for x in examples):
        raise UsageError(f"coded-torch serve: the examples of {factory} must have rows, got none")
    return model.eval(), examples


def _listen(built: Starlette, host: str, port: int, name: str) -> None:
    import uvicorn

    logging.basicConfig(stream=sys.stderr, level="WARNING", format="%(name)s: %(message)s")
    logging.getLogger("coded_torch.serve").setLevel("INFO")  # says when the model is loaded
    # The protocol is named: if it is 0, asyncio leaves Nagle's algorithm on, which adds 40 ms to
    # every request of a kept connection.
    with socket.socket(proto=socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(2048)  # uvicorn's own backlog
        except OSError as error:
            raise UsageError(f"coded-torch serve: --port must be free, got {error}") from None
        port = listening.getsockname()[1]
        say(f"Serving {name} at http://{host}:{port}/v2/models/{name}/infer")
        config = uvicorn.Config(
            built, log_level="warning", access_log=False, timeout_keep_alive=_KEEP_ALIVE
        )
        uvicorn.Server(config).run(sockets=[listening])
