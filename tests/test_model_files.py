"""Models in files: ``coded-torch job FILE`` and ``coded-torch serve FILE``."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coded_torch import serve
from coded_torch.cli import find_model
from coded_torch.cli.main import main

from .serve.servers import Client
from .serve.test_command import running

ROWS = 20
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def save_exported(path):
    rows = torch.export.Dim("rows")
    shapes = [{0: rows}]
    torch.export.save(
        torch.export.export(plain(), (torch.rand(4, 3),), dynamic_shapes=shapes), path
    )


def save_script(path):
    torch.jit.script(plain()).save(str(path))


def save_onnx(path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper
    weights = [x.detach().numpy().T.copy() for x in plain().parameters()]
    names = ["w0", "b0", "w1", "b1"]
    nodes = [
        helper.make_node("Gemm", ["input", "w0", "b0"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["positive"]),
        helper.make_node("Gemm", ["positive", "w1", "b1"], ["output"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])]
        for name, size in (("input", 3), ("output", 2))
    ]
    constants = [onnx.numpy_helper.from_array(x, n) for x, n in zip(weights, names, strict=True)]
    graph = helper.make_graph(nodes, "model", *ends, constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )


def save_trace(path):
    torch.jit.trace(plain(), torch.rand(4, 3)).save(str(path))


FACTORIES = """
import torch
from coded_torch.nn import FromFactory

def build():
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
    model = torch.nn.Sequential(*layers).eval()
    model.scale = lambda y: 2 * y  # cannot be pickled
    return model

def make():
    return FromFactory(build), torch.rand(2, 3)

def script():
    return torch.jit.load("model.pt"), torch.rand(2, 3)

def trace():
    return torch.jit.load("traced.pt"), torch.rand(2, 3)
"""


def save_factory(path):
    Path("factories.py").write_text(FACTORIES)


SAVE = {
    "model.pt2": save_exported,
    "model.pt": save_script,
    "traced.pt": save_trace,
    "model.onnx": save_onnx,
    "factories:make": save_factory,
}


def alone(name, rows):
    """The answers of a file or a factory, as it gives them without this package."""
    made = find_model(name)()
    module = made[0] if isinstance(made, tuple) else made
    with torch.no_grad():
        for _ in range(3):  # TorchScript compiles in the first calls
            answers = module(rows)
    torch.testing.assert_close(answers, plain()(rows).detach(), rtol=1e-5, atol=1e-5)
    return answers


@pytest.fixture
def rows(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).standard_normal((ROWS, 3)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return torch.from_numpy(rows)


@pytest.mark.parametrize("name", SAVE)
def test_a_job_runs_a_file_and_goes_on_only_with_the_same(name, rows, capsys):
    SAVE[name](name)
    line = ["job", name, "--inputs", "rows.npy", "--output", "out", "--num-workers", "1"]
    assert main([*line, "--batch-size", str(ROWS)]) == 0
    (path,) = Path("out").glob("batch*")
    (answers,) = torch.load(path)["outputs"]
    assert torch.equal(answers, alone(name, rows))
    assert main([*line, "--batch-size", str(ROWS), "--resume"]) == 0
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    torch.jit.script(other).save("other.pt")
    capsys.readouterr()
    assert main(["job", "other.pt", *line[2:], "--batch-size", str(ROWS), "--resume"]) == 2
    assert "model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("factories:make", "factories:make"),
        pytest.param("model.pt2", "model.pt2", marks=pytest.mark.slow),
        pytest.param("model.pt", "factories:script", marks=pytest.mark.slow),
        pytest.param("traced.pt", "factories:trace", marks=pytest.mark.slow),
        pytest.param("model.onnx", "model.onnx", marks=pytest.mark.slow),
    ],
)
def test_a_server_answers_as_the_file_does_alone(name, model, rows):
    save_factory(None)
    SAVE[name](name)
    tensor = {"datatype": "FP32", "shape": [ROWS, 3], "data": rows.tolist()}
    options = ["--name", "m", "--num-workers", "1", "--deadline", "60"]
    with running(model, *options, cwd=Path.cwd()) as (_, port), Client(port) as client:
        _, described = client.get("/v2/models/m")
        tensor["name"] = described["inputs"][0]["name"]
        for _ in range(3):
            status, answer = client.infer({"inputs": [tensor]})
            assert status == 200, answer
    numbers = torch.tensor(answer["outputs"][0]["data"]).view(ROWS, 2)
    assert torch.equal(numbers, alone(name, rows))


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_a_server_knows_inputs_and_outputs_by_the_file(name, rows):
    SAVE[name](name)
    model, examples = find_model(name)()
    inputs, outputs = serve.specs(model, examples)
    assert [(x.name, x.shape) for x in inputs] == [("input", (3,))]
    assert [(x.name, x.shape) for x in outputs] == [("output", (2,))]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: None, r"model.pt2 cannot be read: .*No such file"),
        (lambda: torch.save(plain().state_dict(), "model.pt"), "model.pt cannot be read: it is no"),
        (lambda: save_script("model.ts"), "model.ts must come with examples of its inputs"),
        (lambda: open("model.onnx", "w").close(), "model.onnx cannot be read: Program: model.onnx"),
    ],
)
def test_files_that_cannot_be_served_are_refused_in_one_line(make, said, rows, capsys):
    make()
    assert main(["serve", re.search(r"model\.\w+", said)[0]]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert error.count("\n") == 1


def test_the_dtype_of_a_program_cannot_be_changed(rows, capsys):
    save_exported("model.pt2")
    line = ["job", "model.pt2", "--inputs", "rows.npy", "--output", "out", "--dtype", "float16"]
    assert main(line) == 2
    assert "--dtype float16: Program: the dtype of model.pt2" in capsys.readouterr().err
