"""The application in replicas of Ray Serve: the same answers, and the death of a replica."""

import json
import os
import re
import signal
import socket
import threading
import time
from urllib.request import urlopen

import pytest

from .servers import Client
from .triton import CASES, WRONG, check_case, check_metadata, check_wrong

ray = pytest.importorskip("ray", reason="needs the extra 'serve-ray'")
serve = pytest.importorskip("ray.serve", reason="needs the extra 'serve-ray'")
pytestmark = [
    pytest.mark.ray,
    # Ray's own files, sockets and tasks, when its connection ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
WAIT = 120.0


def lenet():
    """An application; a factory that is sent to replicas whole, as it stands in no package."""
    from coded_torch import CodedWrapper
    from coded_torch.demo.lenet5 import lenet5_and_digits
    from coded_torch.serve import app, specs
    from coded_torch.workers import LocalWorkers

    module, examples = lenet5_and_digits()
    inputs, outputs = specs(module, examples)
    coded = CodedWrapper(module, workers=LocalWorkers(), parts=4)
    return app(coded, name="m", inputs=inputs, outputs=outputs, deadline=30.0)


def where(actors=0):
    """A model whose answer is the process that it runs in, after as many seconds as it is given.

    That is the replica, or one of so many actors of the cluster that the replica asks.
    """
    import os
    import time

    import torch

    from coded_torch import CodedWrapper
    from coded_torch.serve import TensorSpec, app
    from coded_torch.workers import LocalWorkers, RayWorkers

    class Where(torch.nn.Module):
        def forward(self, x):
            time.sleep(float(x.max()))
            return torch.full_like(x, os.getpid(), dtype=torch.float64)

    workers = RayWorkers(actors) if actors else LocalWorkers()
    return app(
        CodedWrapper(Where(), workers=workers, parts=2),
        name="m",
        inputs=[TensorSpec("seconds", "FP32", ())],
        outputs=[TensorSpec("pid", "FP64", ())],
        deadline=30.0,
    )


def by_value(function, *defaults):
    """The same function as one of no module, so that it is pickled whole."""
    import types

    known = {"__builtins__": __builtins__}
    copy = types.FunctionType(function.__code__, known, function.__name__, defaults)
    copy.__module__ = "__main__"
    return copy


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """A cluster on loopback, with both models."""
    # Replicas look for packages where the driver is: not in the checkout, whose is not built.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("driver"))
        yield from deployed()


def deployed():
    from coded_torch.serve import deployment
    from coded_torch.workers import RayWorkers

    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    with RayWorkers(1).start(timeout=WAIT):  # holds a cluster of its own
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"ray_actor_options": {"num_cpus": 0}}
        try:
            lenet_app = deployment(by_value(lenet), **options).bind()
            serve.run(lenet_app, name="lenet", route_prefix="/lenet")
            replicas = deployment(by_value(where, 0), num_replicas=2, **options).bind()
            serve.run(replicas, name="where", route_prefix="/where")
            actors = deployment(by_value(where, 2), **options).bind()
            serve.run(actors, name="actors", route_prefix="/actors")
            yield port
        finally:
            serve.shutdown()


def test_metadata(port):
    check_metadata(f"{port}/lenet")


def test_answers(port):
    for case in CASES:
        check_case(f"{port}/lenet", *case)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_400(port, name):
    check_wrong(f"{port}/lenet", name)


def test_a_body_that_is_too_large_is_413(port):
    with Client(port) as client:
        status, answer = client.infer(bytes(2**22), "/lenet/v2/models/m/infer")
    assert (status, answer["error"][:20]) == (413, "the body must be at ")


def ask(port, *seconds, route="where"):
    """The status of an answer, and the processes that gave it, row by row."""
    data = list(seconds)
    entry = {"name": "seconds", "datatype": "FP32", "shape": [len(data)], "data": data}
    with Client(port) as client:
        body = json.dumps({"inputs": [entry]}).encode()
        status, _, answer = client.send("POST", f"/{route}/v2/models/m/infer", body)
    found = json.loads(answer)["outputs"][0]["data"] if status == 200 else ()
    return status, tuple(map(int, found))


def test_of_a_replica_that_dies_only_what_it_held_fails(port):
    found = [ask(port, 0.0) for _ in range(30)]
    assert {status for status, _ in found} == {200}
    both = {pid for _, (pid,) in found}
    assert len(both) == 2
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(port, 2.0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    victim, other = both
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(WAIT)
    assert len(answers) == 8
    failed = [status for status, _ in answers if status != 200]
    assert 0 < len(failed) < 8
    assert all(status >= 500 for status in failed)
    assert (other,) in {pids for _, pids in answers}
    later = [ask(port, 0.0) for _ in range(20)]
    assert {status for status, _ in later} == {200}
    assert (victim,) not in {pids for _, pids in later}


def test_actors_of_the_cluster_compute_for_a_replica_and_one_may_die(port):
    status, before = ask(port, 0.0, 0.0, route="actors")
    assert status == 200
    assert len(set(before)) == 2
    os.kill(before[0], signal.SIGKILL)
    for _ in range(5):
        status, later = ask(port, 0.0, 0.0, route="actors")
        assert status == 200
        assert before[0] not in later


def test_the_numbers_of_a_replica_are_in_rays_metrics(port):
    assert ask(port, 0.0, 0.0, route="actors")[0] == 200
    where = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    until = time.monotonic() + WAIT / 2  # Ray collects every few seconds
    while (text := urlopen(where, timeout=10).read().decode()) is not None:
        if "ray_coded_torch_answers_total" in text or time.monotonic() > until:
            break
        time.sleep(1.0)
    assert re.search(r'ray_coded_torch_answers_total\{[^}]*kind="exact"[^}]*\} [1-9]', text)


def test_it_is_the_application_that_refuses():
    from coded_torch.serve import deployment
    from coded_torch.serve.ray_serve import service_of

    made = deployment(lenet, name="x")
    assert (made.max_ongoing_requests, made.max_queued_requests) == (1024, 1024)
    with pytest.raises(TypeError, match=r"factory must return what .*app does, got int"):
        service_of(3)
    assert service_of(lenet()).name == "m"
