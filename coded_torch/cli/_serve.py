"""The command ``coded-torch serve``."""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import ssl
import sys
import tempfile
import threading
import warnings
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .._loaded import unload_all
from ..nn import CodedWrapper, Waiting
from ..stragglers import Bernoulli
from ..surrogates import Memory
from ..workers import FaultyWorkers
from ..workers._torchscript import with_scripts
from . import POOL_NAMES, CommandError, find_model, make_model, need, processes, say, usage
from ._untuned import HANG_DEADLINES

#: The factory of the embedded LeNet-5.
LENET5 = "coded_torch.demo:lenet5_and_digits"


_NICE = 10  # of the process that makes the next version, while the present one answers
_PR_SET_PDEATHSIG = 1  # Linux: a process gets a signal at the end of the one that started it


def serve(args: Namespace) -> None:
    """Serve a model over HTTP (KServe v2) within a deadline, although workers fail.

    Example: coded-torch serve my_model:make --num-workers 6 --deadline 200ms
    A DURATION is such as 0.2, 200ms or 2s.
    """
    need("serve", "starlette", "uvicorn", "httptools", "orjson", "prometheus_client")
    from .._page import LOOPBACK, add_page
    from ..open_inference import Model, flatten, request
    from ..serve import App
    from ..serve._model import bind

    is_local = args.host in LOOPBACK
    if args.memory and args.no_estimates:
        raise CommandError("--memory must be left out with --no-estimates")
    workers: Any = None
    with usage(errors=(RuntimeError, ValueError)):
        if args.chaos and not is_local:
            requirement = f"must listen on a loopback address, one of {', '.join(LOOPBACK)}"
            raise ValueError(f"--chaos {requirement}, got {args.host}")
        if args.endpoints:
            module, workers, how = _fleet(args)
        else:
            for flag in ("model", "header", "ca-file"):
                if getattr(args, flag.replace("-", "_")) is not None:
                    raise ValueError(f"--{flag} must come with --endpoints")
    if workers is None:
        module, how = _own(args)
    if args.example is not None:
        call = bind("serve", module, how["examples"])
        leaves, _ = flatten((call.args, call.kwargs))
        if not 0 <= args.example < len(leaves[0]):
            requirement = f"--example must be from 0 to {len(leaves[0]) - 1}, got {args.example}"
            raise CommandError(requirement)
        rows = [x[args.example : args.example + 1] for x in leaves]
        say(request(Model("", tuple(how["inputs"]), ()), rows, False)[0].decode())
        return
    made = Path(args.factory).stem.rpartition(":")[2]  # a factory, or a file
    usual = args.model or ("lenet5" if args.factory == LENET5 else made)
    how["name"] = name = args.name or usual
    how |= {x: getattr(args, x) for x in ("deadline", "max_batch_size", "max_queued_requests")}
    local_hosts = (*LOOPBACK, args.host) if is_local or args.host.startswith("127.") else ()
    if args.token is not None:
        with usage("--token must be @FILE or '$VARIABLE', which holds the value"):
            token = _secret(args.token)
            if not token:
                raise ValueError("it is empty")
            how["token"] = token
    if hosts := [*dict.fromkeys((*local_hosts, *(args.allowed_hosts or ())))]:
        how["allowed_hosts"] = hosts
    with usage():
        if workers is None:
            workers = processes(args, hang_timeout=max(1.0, HANG_DEADLINES * args.deadline))
        if args.chaos:  # the page says which workers attack, each in its own way
            delays = Bernoulli(0.03, latency=0.05, seed=args.seed)
            workers = FaultyWorkers(
                workers, delays=delays, seed=args.seed, crash_every=5.0, attack=_spoil
            )
        in_dims: Any = 0
        if any(spec.is_text for spec in how["inputs"]):  # beside other inputs, they are rows, too
            has_examples = "examples" in how
            given = bind("serve", module, how["examples"]).args if has_examples else how["inputs"]
            in_dims = (0,) * len(given)
        coded = CodedWrapper(
            module,
            workers=workers,
            waiting=Waiting(estimate=not args.no_estimates),
            surrogate=[Memory()] if args.memory else [],
            verify=args.verify or None,
            parts=args.parts,
            in_dims=in_dims,
        )
        built = App(coded, **how)
        del module  # the next version replaces it
    if whole := [spec.name for spec in how["outputs"] if "F" not in spec.datatype]:
        warnings.filterwarnings("ignore", "CodedWrapper: .* cannot be estimated")  # it is said here
        rest = ", ".join(whole)
        say(f"Late requests get 504: integers and strings cannot be estimated ({rest}).")
    if is_local or args.page:
        add_page(built, faults=args.chaos, is_local=is_local)
    torch.set_num_threads(1)  # the processors are the workers'
    if args.memory:
        say("Privacy: late answers are estimated from answers of earlier requests, of any client.")
    if args.endpoints:
        say(f"Requests go to {len(args.endpoints)} endpoints of the model {args.model}.")
    else:
        say(f"Loading {name} on {workers.num_workers} processes; requests wait until it is loaded.")
    _listen(built, args.host, args.port, name, is_local or args.page)


def _spoil(rows: Tensor, draws: torch.Generator) -> Tensor:
    return rows + rows.abs().amax().add(1) * torch.randn(rows.shape, generator=draws)


def _fleet(args: Namespace) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return the model of the endpoints, their pool, and the model's specs."""
    need("endpoints", "aiohttp")
    from ..workers import EndpointWorkers, RemoteModule

    flags = {"MODEL": args.factory != LENET5, "--chaos": args.chaos}
    flags |= {flag: getattr(args, name) is not None for flag, name in POOL_NAMES.items()}
    for flag, is_given in (flags | {"--example": args.example is not None}).items():
        if is_given:
            raise ValueError(f"{flag} must be left out with --endpoints")
    if args.model is None:
        raise ValueError("--endpoints must come with --model, the model's name there")
    with usage("--header"):
        options: dict[str, Any] = {"headers": dict(map(_header, args.header or ()))}
    if args.ca_file is not None:
        with usage("--ca-file must be a file of certificates"):
            options["context"] = ssl.create_default_context(cafile=args.ca_file)
    why = ""
    for url in args.endpoints:
        with usage("--endpoints", ValueError, prefix="RemoteModule: "):
            try:
                module = RemoteModule(url, args.model, **options)
            except RuntimeError as error:
                why = str(error).removeprefix("RemoteModule: ")
                continue
        found = {"inputs": module.metadata.inputs, "outputs": module.metadata.outputs}
        return module, EndpointWorkers(args.endpoints, model=args.model, **options), found
    raise RuntimeError(f"no endpoint describes the model {args.model!r}; {why}")


def _header(text: str) -> tuple[str, str]:
    """Return the name and the value of a header. No message shows the value."""
    name, _, source = text.partition("=")
    value = _secret(source)
    if not name or not value:
        raise ValueError("must be NAME=@FILE or NAME='$VARIABLE', which holds the value")
    return name, value


def _secret(source: str) -> str:
    """Return the value that ``@FILE`` or ``$VARIABLE`` holds; "" if there is none."""
    if source[:1] == "@":
        return Path(source[1:]).read_text().strip()
    if source[:1] == "$":
        return os.environ.get(source[1:], "")
    return ""


def _own(args: Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of the factory, its specs and examples of its inputs."""
    from ..serve import specs

    factory = find_model(args.factory)
    model, examples = make_model(args, factory)
    with usage():
        if examples is None:
            requirement = (
                "come with examples of its inputs, a tensor, a tuple or a dict: let a factory"
            )
            requirement += " return the module and these"
            raise TypeError(f"{args.factory} must {requirement}, got {type(model).__name__}")
        with usage(args.factory, prefix="specs: "):
            inputs, outputs = specs(model, examples, fixed_shapes=args.fixed_shapes)
    unload_all(model)  # the workers load it
    found = {"inputs": inputs, "outputs": outputs, "examples": examples}
    make = _Apart(args) if ":" in args.factory else lambda: make_model(args, factory)[0]
    return model, found | {"make": make}


class _Apart:
    """Makes a factory's module in a process of its own, which cannot stop this one."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._process: Any = None

    def __call__(self) -> nn.Module:
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/module"
            ours, theirs = context.Pipe(duplex=False)
            how = self._args, path, theirs, os.getpid()
            process = context.Process(target=_make_apart, args=how, daemon=True)
            with theirs:
                process.start()
            self._process = process
            with ours:
                try:
                    error = ours.recv()
                except EOFError:
                    error = RuntimeError(f"the process that made {self._args.factory} has ended")
            process.join()
            self._process = None
            if error is not None:
                raise error
            module: nn.Module = torch.load(path, weights_only=False, mmap=True)
            return module

    def cancel(self) -> None:
        """End the process, if it has started, and so the call."""
        process = self._process
        if process is not None:
            process.kill()


def _make_apart(args: Namespace, path: str, link: Any, parent: int) -> None:
    """Save the module of a factory, and send the error that it raised, or None."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it may hold the interpreter's lock
    if os.getppid() != parent:
        return
    os.nice(_NICE)
    error: BaseException | None = None
    try:
        names = {"__name__": "pickle", "Pickler": with_scripts(pickle.Pickler)}
        torch.save(make_model(args)[0], path, pickle_module=SimpleNamespace(**names))
    except BaseException as cause:  # SystemExit, too
        error = cause
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # raised by the exception's own class, which may raise anything
        error = RuntimeError(f"{type(error).__name__}: {error}")
    link.send(error)


def _listen(built: Any, host: str, port: int, name: str, has_page: bool) -> None:
    """Serve at a host and port until a signal, and load new weights at SIGHUP."""
    from ..serve import server

    logging.basicConfig(stream=sys.stderr, level="WARNING", format="%(name)s: %(message)s")
    for each in ("workers", "serve"):  # say when a version of the model is loaded
        logging.getLogger(f"coded_torch.{each}").setLevel("INFO")

    def renew() -> None:
        with contextlib.suppress(Exception):  # its log says why
            built.renew()

    # Requests may come before the model is loaded, so the socket is opened here. The protocol is
    # named: if it is 0, asyncio leaves Nagle's algorithm on, which adds 40 ms to every request of a
    # kept connection.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, proto=socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with usage("--host and --port must be free"):
            listening.bind((host, port))
            listening.listen(2048)  # uvicorn's own backlog
        site = f"[{host}]" if ":" in host else host
        site = f"http://{site}:{listening.getsockname()[1]}/"
        say(f"Serving {name} at {site}v2/models/{name}/infer")
        if has_page:
            say(f"A page shows its workers and requests: {site}")
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=renew, daemon=True).start())
        with usage(errors=TypeError, prefix="Workers: "):
            built.load()  # here Ctrl-C ends it, and an error of the model ends the command
        built.load = lambda: None  # not twice
        server(built).run(sockets=[listening])
