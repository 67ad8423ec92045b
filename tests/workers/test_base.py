"""Tasks: how they are cut into parts, and outputs back into those of the parts."""

import pickle

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from coded_torch.testing.helpers import CumulativeSum
from coded_torch.testing.workers import WAIT, task_of
from coded_torch.workers import (
    DeviceWorkers,
    FaultyWorkers,
    ProcessWorkers,
    Task,
    WorkerError,
    Workers,
)
from coded_torch.workers._local import cut

from ..nn.modules import Call


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("units", [(2,), (1, 2, 3), range(6), (0, 2), (1, 3, 4, 5), (3, 0), (2, 2)])
def test_the_payload_of_units_is_a_view_if_they_are_consecutive(units):
    batch = torch.randn(12, 3).T.contiguous().T  # any strides
    values = batch.unflatten(0, (6, 2))
    (got,), kwargs = task_of(values).payload(units)
    assert kwargs == {}
    assert torch.equal(got, values[list(units)].flatten(0, 1))
    consecutive = list(units) == list(range(units[0], units[0] + len(units)))
    assert (storage(got) == storage(batch)) == consecutive


def test_what_is_divided_goes_where_the_module_expects_the_batch():
    x, mask = torch.randn(4, 2, 3, 5), torch.rand(4, 2, 3) > 0.5
    leaves, spec = pytree.tree_flatten(((x, "shared"), {"mask": mask, "scale": torch.ones(7)}))
    flat = [leaf.flatten(0, 1) if leaf is x or leaf is mask else leaf for leaf in leaves]
    task = Task(flat, [-1, None, 1, None], spec, 4, 2, x.device)
    (got, shared), kwargs = task.payload((1, 3))
    assert torch.equal(got, x[[1, 3]].flatten(0, 1).movedim(0, -1))
    assert shared == "shared"
    assert kwargs["scale"] is leaves[3]
    assert torch.equal(kwargs["mask"], mask[[1, 3]].flatten(0, 1).movedim(0, 1))


def test_outputs_are_cut_into_parts_of_any_size():
    task = task_of(torch.randn(5, 2, 3), dim=1)
    (batch,), _ = task.payload(range(5))
    first, second, third = cut(task, {"a": batch, "b": None}, [2, 1, 2])
    assert [part["a"].shape for part in (first, second, third)] == [(3, 4), (3, 2), (3, 4)]
    assert torch.equal(torch.cat([first["a"], second["a"], third["a"]], 1), batch)
    assert first["b"] is None


def test_outputs_without_the_batch_are_refused():
    task = task_of(torch.randn(3, 2, 1))
    with pytest.raises(ValueError, match=r"output\['sum'\] must have size 6, .* got shape \(\)"):
        cut(task, {"sum": torch.tensor(1.0)}, [3])
    with pytest.raises(ValueError, match=r"output must have size 6, .* got shape \(3, 1\)"):
        cut(task, torch.ones(3, 1), [3])


def test_errors_say_which_worker_or_else_which_part():
    error = pickle.loads(pickle.dumps(WorkerError(3, 1, "failed")))
    assert (str(error), error.part, error.worker) == ("worker 1 failed", 3, 1)
    assert str(WorkerError(3, -1, "did not start")) == "part 3 did not start"


def test_pools_must_open():
    with pytest.raises(TypeError, match="open"):
        Workers()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeviceWorkers(["cpu"] * 2),
        lambda: ProcessWorkers(2),
        lambda: FaultyWorkers(DeviceWorkers(["cpu"]), rates={"nan": 1.0}),
    ],
    ids=["devices", "processes", "faulty"],
)
def test_starting_warns_of_rows_that_depend_on_each_other(make, caplog):
    """Warnings are errors here, so that none comes for the other modules."""
    example = torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 3.0]])
    with make() as pool:
        pool.start(nn.Linear(2, 3), example, timeout=2 * WAIT)
        assert "was not checked" not in caplog.text
        depends = "Workers: output of a row depends on the other rows of its batch, by 2; parts"
        with pytest.warns(UserWarning, match=depends):
            pool.start(CumulativeSum(), example, timeout=2 * WAIT)
        pair = example, example[0]
        for module, rows, why in (
            (CumulativeSum(), example[:2], "the example must have two different rows, got 2 eq"),
            (Call(torch.mul), pair, "the inputs of the example must have one size at dim"),
            (nn.Dropout(), 1 + torch.rand(2, 99), "the outputs differ from call to call"),
        ):
            pool.start(module, rows, timeout=2 * WAIT)
            assert f"rows depend on each other was not checked: {why}" in caplog.text


def test_pools_of_several_types_of_devices_are_mixed():
    for devices, mixed in ((["cpu"], False), (["cpu", "cuda:0"], True)):
        with ProcessWorkers(2, devices=devices) as pool:
            assert pool.mixed == FaultyWorkers(pool).mixed == mixed
