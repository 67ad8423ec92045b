"""The application in replicas of Ray Serve: the same answers, and the death of a replica."""

import functools
import json
import os
import re
import signal
import socket
import time
from urllib.request import urlopen

import pytest

from .servers import Client, started
from .test_triton import TritonTests

ray = pytest.importorskip("ray", reason="needs the extra 'serve-ray'")
serve = pytest.importorskip("ray.serve", reason="needs the extra 'serve-ray'")
pytestmark = [pytest.mark.ray, pytest.mark.slow]  # a cluster, Ray Serve and four replicas start
WAIT = 120.0  # seconds for a cluster to start


def lenet():
    """Return an application. Ray pickles this whole, so its imports stand inside."""
    from coded_torch import CodedWrapper
    from coded_torch.demo import lenet5_and_digits
    from coded_torch.serve import App, specs
    from coded_torch.workers import LocalWorkers

    module, examples = lenet5_and_digits()
    inputs, outputs = specs(module, examples)
    coded = CodedWrapper(module, workers=LocalWorkers(), parts=4)
    return App(coded, name="m", inputs=inputs, outputs=outputs, deadline=30.0)


def where(actors=0):
    """Serve a model whose answer is its process, after as many seconds as it is given.

    The process is the replica's, or of one of so many actors of the cluster.
    """
    import os
    import time

    import torch

    from coded_torch import CodedWrapper
    from coded_torch.serve import App, TensorSpec
    from coded_torch.workers import LocalWorkers, RayWorkers

    class Where(torch.nn.Module):
        def forward(self, x):
            time.sleep(float(x.max()))
            return torch.full_like(x, os.getpid(), dtype=torch.float64)

    workers = RayWorkers(actors) if actors else LocalWorkers()
    return App(
        CodedWrapper(Where(), workers=workers, parts=2),
        name="m",
        inputs=[TensorSpec("seconds", "FP32", ())],
        outputs=[TensorSpec("pid", "FP64", ())],
        deadline=30.0,
    )


def by_value(function, *defaults):
    """Return the same function as one of no module, so that it is pickled whole."""
    import types

    known = {"__builtins__": __builtins__}
    copy = types.FunctionType(function.__code__, known, function.__name__, defaults)
    copy.__module__ = "__main__"
    return copy


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Start a cluster on loopback, with both models."""
    from coded_torch.serve import deployment
    from coded_torch.workers import RayWorkers

    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        # Replicas look for packages where the driver is: not in the checkout, which is not built.
        patch.chdir(tmp_path_factory.mktemp("driver"))
        # Ray Serve ends a proxy that is not ready within 5 s, which a busy machine needs to import.
        for check in ("READY", "HEALTH"):
            patch.setenv(f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S", str(WAIT))
        patch.setenv("RAY_metrics_report_interval_ms", "500")  # for a test that waits
        with RayWorkers(1).start(timeout=WAIT):  # holds a cluster of its own
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            try:
                wanted = []
                for name, factory, replicas in (
                    ("lenet", by_value(lenet), 1),
                    ("where", by_value(where, 0), 2),
                    ("actors", by_value(where, 2), 1),
                ):
                    options = {"ray_actor_options": {"num_cpus": 0}, "num_replicas": replicas}
                    made = deployment(factory, **options).bind()
                    wanted.append(serve.RunTarget(made, name=name, route_prefix=f"/{name}"))
                serve.run_many(wanted)  # beside each other
                yield port
            finally:
                serve.shutdown()


class TestRay(TritonTests):
    @pytest.fixture
    def address(self, port):
        return f"127.0.0.1:{port}/lenet"


def test_a_body_that_is_too_large_is_413(port):
    with Client(port) as client:
        status, answer = client.infer(bytes(2**27), "/lenet/v2/models/m/infer")
    assert (status, answer["error"][:20]) == (413, "the body must be at ")


def ask(port, *seconds, route="where"):
    """Return the status of an answer, and the processes that gave it, row by row."""
    data = list(seconds)
    entry = {"name": "seconds", "datatype": "FP32", "shape": [len(data)], "data": data}
    with Client(port) as client:
        body = json.dumps({"inputs": [entry]}).encode()
        status, _, answer = client.send("POST", f"/{route}/v2/models/m/infer", body)
    found = json.loads(answer)["outputs"][0]["data"] if status == 200 else ()
    return status, tuple(map(int, found))


def test_a_replica_that_dies_takes_only_its_own_requests(port):
    found = [ask(port, 0.0) for _ in range(30)]
    assert {status for status, _ in found} == {200}
    victim, other = {pid for _, (pid,) in found}
    answers = []
    threads = []
    for _ in range(8):  # one after the other, so that the router sees the queues of both replicas
        threads += started([lambda: answers.append(ask(port, 2.0))])
        time.sleep(0.05)
    time.sleep(1.0)
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
    actors = functools.partial(ask, port, 0.0, 0.0, route="actors")
    status, before = actors()
    assert (status, len(set(before))) == (200, 2)
    os.kill(before[0], signal.SIGKILL)
    for _ in range(5):
        status, later = actors()
        assert status == 200
        assert before[0] not in later
    where = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    until = time.monotonic() + WAIT / 2  # Ray collects now and then
    while (text := urlopen(where, timeout=10).read().decode()) is not None:
        if "ray_coded_torch_answers_total" in text or time.monotonic() > until:
            break
        time.sleep(0.2)
    assert re.search(r'ray_coded_torch_answers_total\{[^}]*kind="computed"[^}]*\} [1-9]', text)


def test_the_application_refuses_before_ray():
    from coded_torch.serve import deployment

    made = deployment(lenet, name="x")
    assert (made.max_ongoing_requests, made.max_queued_requests) == (1024, 1024)
