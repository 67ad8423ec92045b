"""The commands ``coded-torch serve`` and ``coded-torch plan``."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._arguments import MOST_WORKERS
from .._console import UsageError, in_range, need, output_path, save, say
from ..codes import KernelCode
from ..nn import CodedWrapper
from ..stragglers import Bernoulli
from ..surrogates import Memory
from ..workers import FaultyWorkers, ProcessWorkers, Workers

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["add_plan", "add_serve"]

_KEEP_ALIVE = 75  # seconds, as other servers do: clients hold connections for longer than 5
_GRACE = 10  # deadlines, after which a worker hangs; but at least a second


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
        metavar="MODULE:FACTORY",
        help="a function that returns the model and examples of its inputs, a tensor or several",
    )
    for flag, kind, default, text in (
        ("num-data", int, 4, "K, into how many parts a batch is divided"),
        ("num-workers", int, 6, "processes"),
        ("deadline", float, 0.2, "seconds from the arrival of a request"),
        ("port", int, 8000, "on which to listen; 0: any"),
        ("max-batch-size", int, 64, "rows of a batch"),
        ("max-queued-requests", int, 256, "that may wait"),
        ("max-ongoing-batches", int, 1, "that may run at once"),
        ("seed", int, 0, "of --chaos"),
    ):
        serve.add_argument(f"--{flag}", type=kind, default=default, help=f"{text} [{default}]")
    serve.add_argument("--host", default="127.0.0.1", help="to listen at [%(default)s]")
    serve.add_argument("--name", help="of the model in URLs [lenet5, or that of the factory]")
    serve.add_argument(
        "--output-names",
        metavar="NAME,NAME,...",
        help="of the outputs [the keys of a dict, or output0, output1, ...]",
    )
    serve.add_argument(
        "--memory",
        action="store_true",
        help="predict from inputs and answers of earlier requests, of whatever client",
    )
    serve.add_argument(
        "--chaos",
        action="store_true",
        help="delay 3 %% of the calls by 50 ms, and kill a worker every 5 s",
    )
    serve.add_argument(
        "--example", type=int, metavar="ROW", help="print a request with one example, and end"
    )
    serve.set_defaults(run=_serve)


def add_plan(commands: Any) -> None:
    """Add ``plan`` to the commands."""
    plan = commands.add_parser(
        "plan",
        help="find the redundancy that meets a deadline and an accuracy at least work",
        description="Simulate uncoded, hedged, replicated and coded policies on machines whose "
        "latencies were measured, or follow a law, and say which K, N, S, fence and deadline meet "
        "the objective at least work, and whether coding is worth it.",
    )
    source = plan.add_mutually_exclusive_group()
    source.add_argument(
        "--latencies", type=Path, metavar="FILE", help="CSV: seconds of one part, a line each"
    )
    laws = ("calm", "straggling", "slow", "dead", "bursts", "mix")
    source.add_argument("--law", choices=laws, default="mix", help="built in [%(default)s]")
    for flag, kind, default, text in (
        ("deadline", float, 0.2, "seconds, within which 99.9 %% of the requests are answered"),
        ("accuracy", float, 0.99, "share of rows answered as rightly as by the model"),
        ("num-machines", int, 6, "machines"),
        ("num-data", int, 4, "K, parts of a request, whose latencies are known"),
        ("median", float, 0.01, "seconds that a part takes, under a law"),
        ("load", float, 0.3, "share of the machines' time that requests take"),
        ("known", int, 1024, "answers that are remembered, to predict from"),
        ("num-requests", int, 5000, "under each policy"),
        ("seed", int, 0, "of everything"),
    ):
        plan.add_argument(f"--{flag}", type=kind, default=default, help=f"{text} [{default}]")
    path = Path("coded-torch-plan.png")
    plan.add_argument("--output", type=Path, default=path, metavar="FILE", help=f"picture [{path}]")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    need("plan", "demo", "matplotlib")
    output = output_path("plan", args.output)
    in_range("plan", "--num-requests", args.num_requests, 1000)
    in_range("plan", "--seed", args.seed, 0, 2**63 - 1)

    from ..evaluation import planner

    try:
        names = planner.Goal.__dataclass_fields__
        goal = planner.Goal(**{name: getattr(args, name) for name in names})
        law: Any = planner.LAWS[args.law]
        if args.latencies is not None:
            law = planner.read_latencies(args.latencies)
            if slow := planner.slow_start(law):
                print(
                    f"coded-torch plan: {len(slow)} latencies at the beginning of the file are far "
                    f"longer than all later ones, up to {max(slow):.3g} s; if machines were "
                    "loading the model, remove their lines",
                    file=sys.stderr,
                )
        options = {"median": args.median, "num_requests": args.num_requests, "seed": args.seed}
        found = list(planner.plan(goal, law, **options))
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"coded-torch plan: {error}") from None
    say(planner.format_options(goal, found))
    save("plan", planner.draw(goal, found), output)
    say(f"\nShare of slower requests against latency: {output.resolve()}")


def _serve(args: argparse.Namespace) -> None:
    need("serve", "serve", "starlette", "uvicorn", "orjson", "prometheus_client")
    limits: dict[str, tuple[float, float]] = {
        "num_workers": (1, MOST_WORKERS),
        "num_data": (1, args.num_workers),
        "deadline": (1e-3, 3600),
        "port": (0, 65535),
        "max_batch_size": (1, 65536),
        "max_queued_requests": (1, 65536),
        "max_ongoing_batches": (1, 64),
        "seed": (0, 2**63 - 1),
    }
    for name, (least, most) in limits.items():
        in_range("serve", f"--{name.replace('_', '-')}", getattr(args, name), least, most)

    import orjson

    from ..serve import factories

    if args.factory is None:
        module, examples = factories.lenet5_and_digits()
    else:
        module, examples = factories.load(args.factory)
    names = args.output_names and args.output_names.split(",")
    inputs, outputs = factories.specs(module, examples, names)
    if args.example is not None:
        in_range("serve", "--example", args.example, 0, len(examples[0]) - 1)
        request = factories.example_request(inputs, examples, args.example)
        say(orjson.dumps(request, option=orjson.OPT_SERIALIZE_NUMPY).decode())
        return

    from ..serve import app

    name = args.name or (args.factory or "x:lenet5").partition(":")[2]
    workers: Workers = ProcessWorkers(args.num_workers, grace=max(1.0, _GRACE * args.deadline))
    if args.chaos:
        law = Bernoulli(0.03, latency=0.05, seed=args.seed)
        workers = FaultyWorkers(workers, delays=law, seed=args.seed, crash_every=5.0)
    memory = [Memory()] if args.memory else []
    code = KernelCode(args.num_data, args.num_workers)
    coded = CodedWrapper(module, code, workers=workers, surrogate=memory)
    options = ("deadline", "max_batch_size", "max_queued_requests", "max_ongoing_batches")
    try:
        built = app(
            coded,
            name=name,
            inputs=inputs,
            outputs=outputs,
            examples=examples,
            **{option: getattr(args, option) for option in options},
        )
    except ValueError as error:
        raise UsageError(f"coded-torch serve: {error} (see --output-names)") from None
    torch.set_num_threads(1)  # the processors are the workers'
    if memory:
        say(
            "Privacy: an answer that is not computed in time is predicted from the inputs and "
            "answers of earlier requests, of whatever client."
        )
    say(f"Loading {name} on {args.num_workers} processes; requests wait for that.")
    _listen(built, args.host, args.port, name)


def _listen(built: Starlette, host: str, port: int, name: str) -> None:
    import uvicorn

    logging.basicConfig(stream=sys.stderr, level="WARNING", format="%(name)s: %(message)s")
    logging.getLogger("coded_torch.serve").setLevel("INFO")  # how far loading is
    # The protocol is named: where it is 0, asyncio leaves Nagle's algorithm on, which adds 40 ms to
    # every request of a kept connection.
    with socket.socket(proto=socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(2048)  # as uvicorn does
        except OSError as error:
            raise UsageError(f"coded-torch serve: --port must be free, got {error}") from None
        port = listening.getsockname()[1]
        say(f"Serving {name} at http://{host}:{port}/v2/models/{name}/infer")
        config = uvicorn.Config(
            built, log_level="warning", access_log=False, timeout_keep_alive=_KEEP_ALIVE
        )
        uvicorn.Server(config).run(sockets=[listening])
