"""Programs in files: exported ones, ONNX, and TorchScript, on every pool in this machine."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper
from coded_torch.nn import FixedBatch, Program
from coded_torch.workers import DeviceWorkers, LocalWorkers, ProcessWorkers, RayWorkers

ROWS = torch.export.Dim("rows")
X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def exported(rows=ROWS):
    shapes = [{0: rows}] if rows is not None else None
    return torch.export.export(plain(), (X,), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """The plain model, but for its last layer, and its sums, in ONNX."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper = onnx.helper
    weight = plain()[0].weight.detach().numpy()
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("ReduceSum", ["y", "axes"], ["sums"], keepdims=0),
    ]
    of_rows = onnx.TensorProto.FLOAT, ["rows", 3]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", *of_rows)],
        [
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", 4]),
            helper.make_tensor_value_info("sums", onnx.TensorProto.FLOAT, ["rows"]),
        ],
        [
            onnx.numpy_helper.from_array(weight.T.copy(), "w"),
            onnx.numpy_helper.from_array(torch.tensor([1]).numpy(), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx.save(model, path)
    return path


POOLS = {
    "local": LocalWorkers,
    "devices": lambda: DeviceWorkers(["cpu"] * 2),
    "processes": lambda: ProcessWorkers(2),
    "ray": lambda: RayWorkers(2),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.ray, pytest.mark.slow] if name == "ray" else ())
        for name in POOLS
    ],
)
def pool(request):
    with contextlib.ExitStack() as held:
        if request.param == "ray":  # other tests begin clusters of their own
            held.callback(pytest.importorskip("ray").shutdown)
        yield held.enter_context(POOLS[request.param]())


def check(pool, program, outputs):
    """Assert that a pool answers as a program does alone, and as the plain model does."""
    with torch.no_grad():
        coded = CodedWrapper(program, workers=pool, parts=1)
        for _ in range(3):  # TorchScript compiles in the first calls
            answers = coded(X)
            alone = program(X)
        torch.testing.assert_close(answers, outputs(X), rtol=1e-5, atol=1e-5)
        assert [*map(torch.equal, leaves(answers), leaves(alone))] == [True] * len(leaves(alone))
        divided = CodedWrapper(program, workers=pool, parts=4)(X)
        torch.testing.assert_close(divided, outputs(X), rtol=1e-5, atol=1e-5)


def leaves(tree):
    return [*tree.values()] if isinstance(tree, dict) else [tree]


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(pool, how):
    script = torch.jit.script(plain()) if how == "script" else torch.jit.trace(plain(), X)
    check(pool, script, plain())


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_frozen_torchscript_has_no_mode(pool):
    check(pool, torch.jit.freeze(torch.jit.script(plain())), plain())


def test_a_script_in_another_module_sees_its_new_weights(pool):
    model = nn.Sequential(torch.jit.script(plain()), nn.Flatten())
    with torch.no_grad():
        check(pool, model, plain())
        list(model.parameters())[-1].add_(1)
        check(pool, model, lambda x: plain()(x) + 1)


def test_exported_programs(pool):
    check(pool, Program(exported()), plain())


def test_an_exported_file(pool, tmp_path):
    torch.export.save(exported(), tmp_path / "model.pt2")
    check(pool, Program(tmp_path / "model.pt2"), plain())


def test_onnx(pool, onnx_file):
    def outputs(x):
        y = x @ plain()[0].weight.T
        return {"y": y.detach(), "sums": y.sum(1).detach()}

    check(pool, Program(onnx_file), outputs)


def test_a_program_of_one_batch_size_takes_any_by_fixed_batch(pool):
    program = Program(exported(None))
    model = FixedBatch(program, len(X), out_dims=0)
    check(pool, model, plain())


def test_examples_and_names_of_inputs(onnx_file):
    program = Program(exported())
    assert program.inputs == ["input"]
    assert torch.equal(program.example["input"], X)
    assert torch.equal(program(input=X), program(X))
    onnx = Program(onnx_file)
    assert onnx.inputs == ["x"]
    assert onnx.example["x"].shape == (2, 3)
    assert torch.equal(onnx(x=X)["y"], onnx(X)["y"])


def test_inputs_that_are_no_tensors_are_given_as_they_were_exported():
    class Pair(nn.Module):
        def forward(self, pair, scale):
            return (pair["a"] + pair["b"]) * scale

    pair = {"a": X, "b": X}
    program = Program(torch.export.export(Pair(), (pair, 2.0)))
    assert program.inputs is None
    assert torch.equal(program(*program.example), 4 * X)


def test_copies_and_pickles_load_anew():
    program = Program(exported())
    answers = program(X)
    for twin in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert torch.equal(twin(X), answers)
        assert not twin.training


def test_mode_and_dtype_cannot_be_changed():
    program = Program(exported())
    assert not program.train().training
    assert torch.equal(program.to("cpu")(X), program(X))
    with pytest.raises(ValueError, match=r"^Program: the dtype of program cannot be changed"):
        program.half()


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda folder: folder / "a.pth", ValueError, "must end in .pt2 or .onnx, got '.*a.pth'"),
        (lambda folder: plain(), TypeError, "must be an ExportedProgram or a path, got a Seq"),
        (lambda folder: folder / "bad.pt2", RuntimeError, "bad.pt2 cannot be loaded: "),
        (lambda folder: folder / "bad.onnx", RuntimeError, "bad.onnx cannot be loaded: "),
    ],
)
def test_other_sources_are_refused_in_one_line(make, error, said, tmp_path):
    if "onnx" in said and "bad" in said:
        pytest.importorskip("onnxruntime")
    for name in ("bad.pt2", "bad.onnx"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(error, match=f"^Program: .*{said}") as caught:
        Program(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_onnx_names_its_inputs(onnx_file):
    with pytest.raises(TypeError, match=r"model.onnx must be called with x, got 2 by position"):
        Program(onnx_file)(X, X)


def test_what_an_export_returns_is_refused_with_its_remedy():
    with pytest.raises(TypeError, match=r"Wrap what torch.export returns: coded_torch.nn.Program"):
        ProcessWorkers(1).start(exported().module())
