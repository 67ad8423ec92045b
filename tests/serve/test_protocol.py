"""Messages of the Open Inference Protocol: requests that are read or refused, and answers."""

import contextlib
import json
import math
import time
import tracemalloc
from unittest import mock

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_torch.open_inference import from_json, most_bytes, written
from coded_torch.serve import DATATYPES, TensorSpec, _protocol
from coded_torch.serve._protocol import ADDED, parse

from .servers import INPUTS, OUTPUTS, tensor

ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
MOST = 8  # rows of a request
ERROR_BOUND = ADDED[1]
SHAPES = [2, 4], [6], [], [-1, 3], [2.0, 3]


def read(message, inputs=INPUTS, outputs=OUTPUTS, tail=b""):
    head = message if isinstance(message, bytes) else orjson.dumps(message)
    length = str(len(head)) if tail else None
    return parse(head + tail, length, inputs, outputs, MOST)


def refused(*args, **kwargs):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - tests look at the message
        read(*args, **kwargs)
    return str(caught.value)


@pytest.fixture(params=["at once", "in pieces"])
def how(request, monkeypatch):
    """Read lists of numbers of small bodies with the rest, or as those of large bodies."""
    if request.param == "in pieces":
        monkeypatch.setattr(_protocol, "_AT_ONCE", 0)
        monkeypatch.setattr(_protocol, "_PIECE", 1)


def one(**changes):
    return {"inputs": [tensor(ROWS) | changes]}


def wanted(**parameters):
    return one() | {"outputs": [{"name": "output", "parameters": parameters}]}


def binary(batch, datatype="FP32", size=None, **changes):
    data = batch.contiguous().reshape(-1).view(torch.uint8).numpy().data
    parameters = {"binary_data_size": len(data) if size is None else size}
    entry = {"name": "input", "datatype": datatype, "shape": list(batch.shape)}
    return {"inputs": [entry | {"parameters": parameters} | changes]}, data


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("datatype", sorted({*DATATYPES} - {"BYTES"}))
def test_every_datatype_in_json_and_in_binary(datatype):
    spec = [TensorSpec("input", datatype, (3,))]
    values = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=DATATYPES[datatype])
    listed = values.tolist()
    found = read({"inputs": [tensor(listed, datatype=datatype)]}, spec).inputs[0]
    assert torch.equal(found, values)
    message, tail = binary(values, datatype)
    found = read(message, spec, tail=tail).inputs[0]
    assert found.dtype is DATATYPES[datatype]
    assert torch.equal(found, values)


def test_strings_among_numbers_take_no_memory():
    tracemalloc.start()
    assert "data of input 'input' must be" in refused(one(data=["1" * 10_000, *["2"] * 2_000]))
    assert "data of input 'input' must be" in refused(one(data=[[1, "2", 3], [4, 5, None]]))
    assert tracemalloc.get_traced_memory()[1] < 2**23  # an array would take 80 MB
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b'{"inputs": [%b]}' % b",".join([b'{"a":[{}]}'] * 400_000), "JSON beside numbers must be"),
        (b'{"id": "' + b"a" * 4_000_000 + b'"}', "JSON beside numbers must be at most 65536, got"),
        (
            b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3], "data": [%b]}]}'
            % b",".join([b"[]"] * 1_300_000),
            "the bytes of data of input 'input' must be at most 65632, got 3900001",
        ),
        (
            b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 1000000], "data": [%b]'
            b"}]}" % b",".join([b"[]"] * 1_000_000),
            "must be 1000000 numbers of FP32, in one list or nested as the shape [1, 1000000], got",
        ),
    ],
    ids=["objects", "string", "more than declared", "nested"],
)
def test_nothing_is_built_of_what_does_not_fit_the_shape(message, why):
    tracemalloc.start()
    begin = time.process_time()
    assert why in refused(message, [TensorSpec("input", "FP32", (-1,))])
    took, most = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**25  # 4 MB of JSON; as Python's objects, 80 MB and more
    assert took < 2


@pytest.mark.parametrize("shape", [(70_000, 3), (2, 35_000, 3)])
@pytest.mark.parametrize("datatype", ["FP64", "INT64"])
def test_many_numbers_are_read_in_pieces(shape, datatype):
    spec = [TensorSpec("input", datatype, shape[1:])]
    values = 1e6 * torch.randn(shape, dtype=torch.float64)
    values = values.to(DATATYPES[datatype])
    for listed in (values.tolist(), values.flatten().tolist()):
        entry = {"name": "input", "datatype": datatype, "shape": shape, "data": listed}
        body = bytearray(json.dumps({"inputs": [entry]}, indent=1).encode())
        found = parse(body, None, spec, OUTPUTS, shape[0])
        assert torch.equal(found.inputs[0], values)
        with pytest.raises(TimeoutError):
            parse(body, None, spec, OUTPUTS, shape[0], until=time.monotonic())
        listed[-1] = "1"
        with pytest.raises(ValueError, match=r"data of input 'input' must be|JSON"):
            read({"inputs": [entry]}, spec)


@pytest.mark.usefixtures("how")
def test_what_only_looks_like_data_is_no_data():
    entry = one()["inputs"][0]
    entry["parameters"] = {"data": [7, 8], "x": '"data":[9]'}
    found = read({"id": '\\"data": [1, 2', "inputs": [entry], "data": [[3]]})
    assert torch.equal(found.inputs[0], torch.tensor(ROWS))
    assert found.id == '\\"data": [1, 2'
    assert "data of input 'input' must be a list, got 0" in refused(one(data=0))
    spec = [TensorSpec(name, "FP32", ()) for name in "ab"]
    entries = [tensor([7.0], "a"), tensor([0], "b")]
    spelled = orjson.dumps({"inputs": entries}).replace(b'"data":[0]', b'"d\\u0061ta":[0]')
    assert [x.item() for x in read(spelled, spec).inputs] == [7.0, 0.0]  # and not list 0


def test_rows_that_are_to_blame_are_named():
    message, tail = binary(torch.tensor([1.0, math.inf]))
    spec = [TensorSpec("input", "FP32", ())]
    assert refused(message, spec, tail=tail) == "input 'input' must be finite, but row 1 is not"
    assert "row 1 is not" in refused(one(data=[[1, 2, 3], [4, 1e39, 6]]))
    bad = torch.tensor(ROWS)
    bad[1, 2] = torch.nan
    message, tail = binary(bad)
    assert refused(message, tail=tail) == "input 'input' must be finite, but row 1 is not"


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"", "must be JSON"),
        (b'{"inputs": [NaN]}', "must be JSON"),
        (b"[" * 5000, "must be JSON"),
        ([], "the request must be an object, got []"),
        ({}, "inputs of the request must be a list, got None"),
        ({"inputs": []}, "inputs must be ['input'], got []"),
        ({"inputs": [3]}, "an entry of inputs must be an object, got 3"),
        ({"inputs": [{}]}, "name of an entry of inputs must be a string, got None"),
        (one() | {"id": 3}, "id of the request must be a string, got 3"),
        (one() | {"parameters": 3}, "parameters of the request must be an object"),
        (one() | {"parameters": {"timeout": -1}}, "timeout of the request must be a number of mic"),
        (one() | {"parameters": {"timeout": True}}, "timeout of the request must be an integer"),
        (one() | {"parameters": {"binary_data_output": 1}}, "must be true or false, got 1"),
        (one(name="other"), "an input must be once one of ['input'], got 'other'"),
        ({"inputs": [tensor(ROWS)] * 2}, "an input must be once one of ['input'], got 'input'"),
        (one(datatype="FP64"), "datatype of input 'input' must be FP32, got 'FP64'"),
        (one(datatype=["FP32"]), "datatype of input 'input' must be a string"),
        *((one(shape=x), f"shape of input 'input' must be [-1, 3], got {x}") for x in SHAPES),
        (one(shape="23"), "shape of input 'input' must be a list, got '23'"),
        (one(shape=[9, 3]), "rows of input 'input' must be from 1 to 8, got 9"),
        (one(shape=[10**15, 3]), "must be from 1 to 8"),
        (one(shape=[0, 3]), "must be from 1 to 8"),
        (one(data="abc"), "data of input 'input' must be a list, got 'abc'"),
        (one(data=["a"] * 6), "must be 6 numbers of FP32"),
        (one(data=[True] * 6), "must be 6 numbers of FP32"),
        (one(data=[1, 2]), "6 numbers of FP32, in one list or nested as the shape [2, 3], got"),
        (one(data=[[1, 2], [3, 4], [5, 6]]), "got [[1, 2], [3, 4], [5, 6]]"),
        (one(data=[[1, 2, 3], [4, 5]]), "as the shape [2, 3], got [[1, 2, 3], [4, 5]]"),
        (one(data=[[1, 2, 3], [4, None, 6]]), "input 'input' must be finite, but row 1 is not"),
        (one(parameters={"binary_data_size": 4}), "must have either data or a binary_data_size"),
        ({"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3]}]}, "either data or"),
        (one() | {"parameters": {"coverage": 1.5}}, "coverage of the request must be between 0"),
        (one() | {"parameters": {"coverage": 2}}, "must be between 0 and 1, got 2"),
        (one() | {"outputs": 3}, "outputs of the request must be a list"),
        (one() | {"outputs": [{"name": "x"}]}, "once one of ['output', 'estimated', 'error_bound"),
        (one() | {"outputs": [{"name": "output"}] * 2}, "an output must be once one of"),
        (wanted(classification=3), "without the parameter classification"),
        (wanted(binary_data=1), "binary_data of output 'output' must be true or false"),
    ],
)
def test_errors_name_the_field_the_requirement_and_the_value(message, why):
    # Numbers that are read in pieces are shown as they were sent.
    assert why.replace(", ", ",") in refused(message).replace(", ", ",")


@pytest.mark.parametrize(
    ("size", "tail", "why"),
    [
        (23, 24, "must be 24, of 24 bytes that are left of the body, got 23"),
        (24, 23, "must be 24, of 23 bytes that are left of the body, got 24"),
        (True, 24, "binary_data_size of input 'input' must be an integer"),
        (24, 25, "bytes after the last tensor must be 0, got 1"),
    ],
)
def test_binary_sizes_that_do_not_fit(size, tail, why):
    message, _ = binary(torch.zeros(2, 3), size=size)
    assert why in refused(message, tail=bytes(tail))


@pytest.mark.parametrize("shift", [0, 1])
def test_binary_tensors_are_read_in_place_if_they_are_aligned(shift):
    message, tail = binary(torch.tensor(ROWS))
    head = orjson.dumps(message)
    head += b" " * (shift - len(head) % 4 + 4)
    body = bytearray(head + tail)
    (found,) = parse(body, str(len(head)), INPUTS, OUTPUTS, MOST).inputs
    assert torch.equal(found, torch.tensor(ROWS))
    body[-4:] = bytes(4)
    assert found[-1, -1].item() == (6.0 if shift else 0.0)


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "", "9" * 30, "3"])
def test_bad_header_lengths(length):
    must = "Inference-Header-Content-Length must be an integer of at most the length of the body, 2"
    with pytest.raises(ValueError, match=must):
        parse(b"{}", length, INPUTS, OUTPUTS, MOST)


def test_several_inputs_in_any_order_of_open_sizes():
    specs = [TensorSpec("ids", "INT64", (-1,)), TensorSpec("scale", "FP64", ())]
    scales, ids = tensor([1.5, 2.5], "scale", "FP64"), tensor([[1, 2]] * 2, "ids", "INT64")
    message = {"inputs": [scales, ids]}
    ids, scale = read(message, specs).inputs
    assert (ids.tolist(), scale.tolist()) == ([[1, 2], [1, 2]], [1.5, 2.5])
    message["inputs"][0] |= {"shape": [1], "data": [1.5]}
    assert "numbers of rows of inputs must be equal, got [2, 1]" in refused(message, specs)


def test_requested_outputs_and_times():
    parameters = {"timeout": 50_000, "coverage": 0.9, "binary_data_output": True, "any": "else"}
    outputs = [{"name": "error_bound"}, {"name": "output", "parameters": {"binary_data": False}}]
    request = read(one() | {"id": "a", "parameters": parameters, "outputs": outputs})
    assert request.outputs == [(ERROR_BOUND, True), (OUTPUTS[0], False)]
    assert (request.id, request.timeout, request.coverage) == ("a", 0.05, 0.9)


def test_answers_in_json_and_binary():
    wanted = [{"name": "output", "parameters": {"binary_data": True}}]
    wanted += [{"name": "estimated"}, {"name": "error_bound"}]
    message = one() | {"id": "a", "outputs": wanted}
    output = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T  # not contiguous
    errors = torch.tensor([0.5, torch.nan])  # JSON has no number for it
    answers = {"output": output, "estimated": torch.tensor([True, False]), "error_bound": errors}
    tensors = ((spec, answers[spec.name], binary) for spec, binary in read(message).outputs)
    pieces, length = written({"id": "a"}, "outputs", tensors)
    body = b"".join(pieces)
    found = json.loads(body[:length])
    size = {"binary_data_size": 16}
    assert found.pop("outputs") == [
        {"name": "output", "datatype": "FP32", "shape": [2, 2], "parameters": size},
        {"name": "estimated", "datatype": "BOOL", "shape": [2], "data": [True, False]},
        {"name": "error_bound", "datatype": "FP32", "shape": [2], "data": [0.5, None]},
    ]
    assert found == {"id": "a"}
    assert np.frombuffer(body[length:], "<f4").tolist() == [1, 3, 2, 4]


def test_the_largest_body_grows_with_the_model():
    assert most_bytes(INPUTS, 64) == 2**16 + 32 * 64 * 3
    open_size = TensorSpec("x", "FP32", (-1,))
    assert most_bytes([open_size, *INPUTS], 64) == 2**26 + most_bytes(INPUTS, 64)


@pytest.mark.parametrize("datatype", ["INT64", "BOOL", "FP32"])
def test_no_numbers_are_numbers_of_any_type(datatype):
    assert from_json("x", TensorSpec("x", datatype, (0,)), [1, 0], []).shape == (1, 0)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [("INT8", [300]), ("UINT8", [-1]), ("INT64", [2**63]), ("INT8", [1.0]), ("BOOL", [1])],
)
def test_no_number_is_changed(datatype, data):
    with pytest.raises(ValueError, match=f"data of x must be 1 numbers of {datatype}, in one"):
        from_json("x", TensorSpec("x", datatype, ()), [1], data)


@pytest.mark.parametrize("data", [[[1, 2, 3], [4, 5, 6]], [[[1, 2, 3], [4, 5, 6]]], [[1, 2]] * 3])
def test_numbers_nested_otherwise_than_the_shape_are_refused(data):
    """Transposed rows must not be read as if they lay the right way."""
    with pytest.raises(ValueError, match=r"in one list or nested as the shape \[1, 3, 2\]"):
        from_json("x", TensorSpec("x", "FP32", (3, 2)), [1, 3, 2], data)
    right = from_json("x", TensorSpec("x", "FP32", (3, 2)), [1, 3, 2], [[[1, 2], [3, 4], [5, 6]]])
    assert right.tolist() == [[[1, 2], [3, 4], [5, 6]]]


KEYS = ["name", "shape", "datatype", "data", "parameters", "binary_data_size"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("at_once", [0, 2**16])
@settings(max_examples=300, deadline=None)
@given(
    message=st.fixed_dictionaries(
        {"inputs": st.lists(st.fixed_dictionaries({"name": st.just("input")}, optional={
            "shape": st.lists(st.integers(0, 9), max_size=3) | JSON,
            "datatype": st.sampled_from([*DATATYPES, "BYTES"]) | JSON,
            "data": JSON,
            "parameters": JSON,
        }), max_size=2)},
        optional={"outputs": JSON, "parameters": JSON, "id": JSON},
    ),
    tail=st.binary(max_size=30),
)  # fmt: skip
def test_rubbish_is_refused(at_once, message, tail):
    head = json.dumps(message).encode()
    found = torch.zeros(1, 3)
    with mock.patch.object(_protocol, "_AT_ONCE", at_once), contextlib.suppress(ValueError):
        found = parse(head + tail, str(len(head)), INPUTS, OUTPUTS, MOST).inputs[0]
    assert found.shape in [(rows, 3) for rows in range(1, MOST + 1)]
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "FLOAT", (3,)), "datatype must be one of BOOL, UINT8, .*, got 'FLOAT'"),
        (("x", "FP32", (-2,)), "shape must be at least -1, got -2"),
        ((3, "FP32", (3,)), "name must be of type str, got int"),
    ],
)
def test_specs(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TensorSpec(*arguments)
    with pytest.raises(TypeError, match=r"x must be of one of DATATYPES, got torch.complex64"):
        TensorSpec.of("x", torch.zeros(2, 3, dtype=torch.complex64))
    assert TensorSpec.of("x", torch.zeros(2, 3)) == TensorSpec("x", "FP32", (3,))
