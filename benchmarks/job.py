"""A job of many batches on workers that fail: ``python -m benchmarks job``.

50,000 rows go through ``CodedWrapper.map`` on six worker processes, through
``multiprocessing.Pool.imap`` with chunks of one task, through ``concurrent.futures``, and through
``map_batches`` of Ray Data. The model sleeps 7.2 ms a row, so that six processes are six machines.
A task of the others has as many rows as a part of ours. All workers are up before the time begins.

- cases: calm, a worker five times slower, a worker killed every 5 s, two of six drained;
- memory: of this process, while 10^6 rows pass.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.nn import CodedWrapper
from coded_torch.workers import ProcessWorkers

from .runs import Measurement

SEED = 0  # the seed of kills
N, BATCH = 6, 256
PART = -(-BATCH // N)  # rows of a task
EVERY = 5.0  # seconds between kills
STUCK = 20.0  # seconds without any result after which a job hangs
START = 120.0  # seconds that a pool may take to come up
#: Hears the pool, once its workers are up.
Begun = Callable[[Any], None]


class Model(nn.Module):
    """Returns twice its rows after a sleep.

    A process holds a place in a folder from its first call to its end. The process at the first
    place is slower by a factor, and so is the one that replaces it.
    """

    def __init__(self, folder: str, seconds: float, slower: float) -> None:
        super().__init__()
        self.folder, self.seconds, self.slower = folder, seconds, slower

    def forward(self, rows: Tensor) -> Tensor:
        time.sleep(len(rows) * self.seconds * (1.0 if _place(self.folder) else self.slower))
        return 2 * rows


@functools.cache
def _place(folder: str) -> int:
    for place in itertools.count():
        file = os.open(f"{folder}/{place}", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        else:
            os.pwrite(file, f"{os.getpid():10} {time.time():20.6f}".encode(), 0)
            return place
    raise AssertionError


def holders(folder: str) -> list[tuple[int, float]]:
    """Return the process at each place, and the time at which it took it."""
    found = [path.read_text().split() for path in Path(folder).iterdir()]
    return [(int(each[0]), float(each[1])) for each in found if each]


def ours(model: Model, rows: Tensor, begun: Begun) -> Iterator[Any]:
    with ProcessWorkers(N).start(model, rows[:1], timeout=START) as pool, torch.no_grad():
        coded = CodedWrapper(model, workers=pool)
        begun(pool)
        for answers, _ in coded.map(rows.split(BATCH), in_flight=4):
            yield answers


def _rest(_: int) -> None:
    time.sleep(0.5)


def _compute(model: Model, rows: Any) -> Any:
    """Compute a task, as an array: a tensor would pass through a file."""
    return model(torch.from_numpy(rows)).numpy()


def _tasks(rows: Tensor) -> list[Any]:
    return np.array_split(rows.numpy(), -(-len(rows) // PART))


def imap(model: Model, rows: Tensor, begun: Begun) -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Pool(N) as pool:
        pool.map(_rest, range(2 * N), chunksize=1)
        begun(pool)
        found = pool.imap(functools.partial(_compute, model), _tasks(rows), chunksize=1)
        for _ in _tasks(rows):
            yield found.next(STUCK)  # the task of a worker that was killed never ends


def futures(model: Model, rows: Tensor, begun: Begun) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(N, context) as pool:
        list(pool.map(_rest, range(2 * N)))
        begun(pool)
        yield from pool.map(functools.partial(_compute, model), _tasks(rows))


class Actor:
    """Computes batches for Ray Data."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"data": _compute(self.model, np.array(batch["data"]))}


def ray_data(model: Model, rows: Tensor, begun: Begun) -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2 * N, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    actors = ray.data.ActorPoolStrategy(size=N)
    found = ray.data.from_numpy(_tasks(rows)).map_batches(
        Actor, fn_constructor_args=[model], batch_size=PART, compute=actors
    )
    begun(None)
    for batch in found.iter_batches(batch_size=None):
        yield np.array(batch["data"])
    ray.shutdown()


CLIENTS = {"ours": ours, "imap": imap, "futures": futures, "Ray Data": ray_data}
#: The clients of each case. The others cannot drain a worker.
CASES = {
    "calm": tuple(CLIENTS),
    "five times slower": ("imap", "futures", "ours"),
    "killed every 5 s": tuple(CLIENTS),
    "two drained": ("ours",),
}


def _disturb(case: str, done: threading.Event, folder: str, pool: Any, seconds: float) -> None:
    source = random.Random(SEED)
    if case == "two drained" and not done.wait(seconds / 3):
        pool.drain(0)
        pool.drain(1)
    while case == "killed every 5 s" and not done.wait(EVERY):
        with contextlib.suppress(IndexError, ProcessLookupError):  # no worker is up, or one ended
            os.kill(source.choice(holders(folder))[0], signal.SIGKILL)


def job(case: str, client: str, num_rows: int, seconds: float) -> dict[str, Any]:
    """Send all rows through a client; return its seconds, and which rows came back."""
    torch.set_num_threads(1)
    rows = torch.stack([torch.arange(num_rows), torch.ones(num_rows)], 1).float()
    done, start, threads, answers = threading.Event(), 0.0, [], []

    def begun(pool: Any) -> None:
        nonlocal start
        about = case, done, folder, pool, seconds * num_rows / N
        threads.append(threading.Thread(target=_disturb, args=about))
        threads[0].start()
        start = time.time()

    with tempfile.TemporaryDirectory() as folder:
        model = Model(folder, seconds, 5.0 if case == "five times slower" else 1.0)
        ended = "complete"
        try:
            for some in CLIENTS[client](model, rows, begun):
                answers.append(torch.as_tensor(some))
                end = time.time()
        except (multiprocessing.TimeoutError, concurrent.futures.BrokenExecutor) as error:
            ended = "hung" if isinstance(error, multiprocessing.TimeoutError) else "raised"
        done.set()
        threads[0].join()
        if client == "Ray Data":  # its actors come up within the call
            start = min(at for _, at in holders(folder))
    found = torch.cat(answers) / 2
    times = torch.bincount(found[:, 0].long(), minlength=num_rows)
    counts = {"lost": times == 0, "repeated": times > 1, "wrong": found[:, 1] != 1}
    numbers = {key: int(which.sum()) for key, which in counts.items()}
    return {"wall": round(end - start, 2), "ended": ended, **numbers}


def memory(num_rows: int) -> dict[str, Any]:
    """Return the megabytes of this process after a fifth of the rows and at the end."""
    model, found = nn.Linear(64, 8), []
    batches = (torch.randn(BATCH, 64) for _ in range(num_rows // BATCH))
    with ProcessWorkers(N).start(model, torch.zeros(1, 64), timeout=START) as pool, torch.no_grad():
        coded = CodedWrapper(model, workers=pool)
        for _ in coded.map(batches, in_flight=4):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1))
    return {"after a fifth": found[len(found) // 5], "at the end": found[-1]}


def measurements(quick: bool) -> Iterator[Measurement]:
    load = (3000, 5e-4) if quick else (50_000, 7.2e-3)
    for case, clients in {"calm": ("ours", "imap")}.items() if quick else CASES.items():
        for client in clients:
            yield ("cases", case, client), functools.partial(job, case, client, *load)
    yield ("memory",), functools.partial(memory, 20_000 if quick else 1_000_000)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "workers": N, "batch": BATCH, "seconds between kills": EVERY}
