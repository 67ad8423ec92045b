"""The examples of the guides, which run as they are."""

import importlib.util
import os
import re
import runpy
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "notebooks" / "examples"
#: What each script prints at its end. That of Ray Data has no main part: it is imported below.
PRINTED = {
    "faults": r"complete: 240 of 240 answers are the model's\nworker \[2\] returned wrong .*\n",
    "cnn": r"160 of 160 rows are the model's\nworker \[2\] returned wrong results.*\n",
    "fleet": r"360 of 360 rows are the model's\n",
    "gpu": r".*\nrows: equal to the model's: True\ncoded: on \w+, error below .*: True\n",
    "hugging_face": r"complete: 60 rows, equal to the model's: True\n",
    "job": r"Columns [^$]*\n5 batches, 1000 rows, equal to the model's: True\n",
}


@pytest.mark.parametrize("name", PRINTED)
def test_scripts_print_what_the_gallery_promises(name, tmp_path, monkeypatch, capfd):
    """In this process, which has imported torch; their workers import them as the main script."""
    if name == "hugging_face":
        pytest.importorskip("transformers", reason="the example is of transformers")
    script = tmp_path / f"{name}.py"
    script.write_text((EXAMPLES / script.name).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capfd.readouterr().out
    assert re.fullmatch(PRINTED[name], printed), printed


def test_the_gallery_shows_every_script_and_each_is_run():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*PRINTED, "ray_data"}
    page = (EXAMPLES / "index.md").read_text()
    assert {*re.findall(r"literalinclude\} (\w+)\.py", page)} == scripts


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(count):
    return np.arange(3 * count, dtype=np.float32).reshape(count, 3)


def test_a_batch_of_ray_data_gets_columns():
    answered = example("ray_data").Answered(nn.Flatten)
    try:
        made = answered({"data": rows(20), "name": np.array([str(i) for i in range(20)])})
    finally:
        answered.coded.workers.close()
    assert {*made} == {"data", "name", "answer", "estimated", "error_bound"}
    assert np.array_equal(made["answer"], rows(20))
    assert not made["estimated"].any()
    assert not made["error_bound"].any()


@pytest.mark.ray
@pytest.mark.slow  # a cluster starts, and runs Ray Data
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_data_loses_no_row_while_workers_are_killed(tmp_path, monkeypatch):
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "0")  # Ray listens on the loopback interface only
    pytest.importorskip("ray.data", reason="needs the extra 'ray-data'")
    import ray

    answered = example("ray_data").Answered

    class Killed(answered):
        """One of its processes is killed now and then, and logged."""

        def __init__(self, load_model, log):
            super().__init__(load_model)
            pool = self.coded.workers

            def kill():
                while not threading.Event().wait(0.1):
                    if pids := pool.pids:
                        os.kill(pids[0], signal.SIGKILL)
                        log.write_text(str(pids[0]))

            threading.Thread(target=kill, daemon=True).start()

    # Ray's workers import from the driver's folder first, where the package may not be compiled.
    monkeypatch.chdir(tmp_path)
    for module in (__name__, answered.__module__):
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "log_to_driver": False}
    ray.init("local", num_cpus=2, **local)
    try:
        log = tmp_path / "killed"
        data = ray.data.from_numpy(rows(1000)).map_batches(
            Killed, fn_constructor_args=(nn.Flatten, log), concurrency=1, batch_size=20
        )
        found = data.take_all()
    finally:
        ray.shutdown()
    assert log.exists()
    answers = np.stack([row["answer"] for row in found])
    assert np.array_equal(answers[np.argsort(answers[:, 0])], rows(1000))
    assert not any(row["estimated"] or row["error_bound"] for row in found)
