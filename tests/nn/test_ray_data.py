"""The columns that a wrapper adds to batches of Ray Data, also with real Ray Data."""

import functools
import os
import signal
import sys
import threading

import numpy as np
import pytest
from torch import nn

from coded_torch.nn import CodedWrapper, RayDataPredictor, Waiting
from coded_torch.stragglers import Uniform
from coded_torch.testing.workers import WAIT
from coded_torch.workers import LocalWorkers, ProcessWorkers

from .modules import Call


def half():
    """Return a wrapper that loses one of two parts."""
    workers, waiting = LocalWorkers(Uniform(1)), Waiting(deadline=1.0, hedge_budget=0)
    return CodedWrapper(nn.Identity(), workers=workers, parts=2, waiting=waiting)


def batch(size=20):
    return {"data": np.linspace(0, 1, 3 * size, dtype=np.float32).reshape(size, 3)}


def test_a_batch_gets_columns():
    given = batch()
    given["data"].flags.writeable = False  # as Ray Data's
    made = RayDataPredictor(half, output="y")(given)
    assert set(made) == {"data", "y", "estimated", "error_bound"}
    exact = ~made["estimated"]
    assert exact.sum() == 10
    assert np.array_equal(made["y"][exact], given["data"][exact])
    assert (made["error_bound"][exact] == 0).all()
    assert (made["error_bound"][~exact] > 0).all()


def test_several_inputs_and_outputs_are_columns_of_their_own():
    both = Call(lambda a, b: {"sum": a + b, "difference": a - b})
    estimator = RayDataPredictor(
        lambda: CodedWrapper(both, workers=LocalWorkers(), parts=2), inputs=["a", "b"]
    )
    ones = np.ones((4, 2), np.float32)
    made = estimator({"a": 2 * ones, "b": ones, "name": np.array(list("abcd"))})
    assert (made["sum"] == 3).all()
    assert (made["difference"] == 1).all()
    assert list(made["name"]) == list("abcd")
    assert not made["estimated"].any()


def test_what_is_no_wrapper_or_no_tensor_is_named():
    with pytest.raises(TypeError, match="the result of factory must be of type CodedWrapper, got"):
        RayDataPredictor(nn.Identity)
    two = Call(lambda x: (x, [x, 1]))
    estimator = RayDataPredictor(lambda: CodedWrapper(two, workers=LocalWorkers(), parts=2))
    with pytest.raises(TypeError, match=r"the output 'answer1\.1' must be of type Tensor, got int"):
        estimator(batch())


def test_outputs_of_a_tuple_are_numbered():
    two = Call(lambda x: (x, {"a": 2 * x}))
    made = RayDataPredictor(lambda: CodedWrapper(two, workers=LocalWorkers(), parts=2))(batch())
    assert {*made} == {"data", "answer0", "answer1.a", "estimated", "error_bound"}
    assert np.array_equal(2 * made["answer0"], made["answer1.a"])


def test_columns_that_would_be_lost_are_named():
    with pytest.raises(ValueError, match=r"columns answer, .* must be new, got \['error_bound'\]$"):
        RayDataPredictor(half)(batch() | {"error_bound": np.zeros(20)})
    for name in ("estimated", "data"):
        with pytest.raises(ValueError, match=rf"got \['{name}'\]$"):
            RayDataPredictor(half, output=name)(batch())
    with pytest.raises(ValueError, match=r"inputs must be columns .*\['data'\], got \['x'\]"):
        RayDataPredictor(half, inputs="x")(batch())


def killed(log):
    """Return an exact wrapper, one of whose processes is killed now and then, and logged."""
    pool = ProcessWorkers(2).start(nn.Flatten(), timeout=WAIT)

    def kill():
        while not threading.Event().wait(0.1):
            if pids := pool.pids:
                os.kill(pids[0], signal.SIGKILL)
                log.write_text(str(pids[0]))

    threading.Thread(target=kill, daemon=True).start()
    return CodedWrapper(nn.Flatten(), workers=pool, parts=4, waiting=Waiting(estimate=False))


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_data_loses_no_row_while_workers_are_killed(tmp_path, monkeypatch):
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "0")  # Ray listens on the loopback interface only
    pytest.importorskip("ray.data", reason="needs the extra 'ray-data'")
    import ray

    # Ray's workers import from the driver's folder first, where the package may not be compiled.
    monkeypatch.chdir(tmp_path)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "log_to_driver": False}
    ray.init("local", num_cpus=2, **local)
    try:
        rows = np.arange(3000, dtype=np.float32).reshape(1000, 3)
        make = functools.partial(killed, log := tmp_path / "killed")
        data = ray.data.from_numpy(rows).map_batches(
            RayDataPredictor, fn_constructor_args=(make,), concurrency=1, batch_size=20
        )
        found = data.take_all()
    finally:
        ray.shutdown()
    assert log.exists()
    assert len(found) == len(rows)
    answers = np.stack([row["answer"] for row in found])
    assert np.array_equal(answers[np.argsort(answers[:, 0])], rows)
    assert not any(row["estimated"] or row["error_bound"] for row in found)
