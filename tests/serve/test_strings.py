"""Strings over the Open Inference Protocol: BYTES in JSON and in binary, and fleets of servers."""

import contextlib
import itertools
import json
import os
import time

import numpy as np
import orjson
import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper
from coded_torch.cli.main import main
from coded_torch.open_inference import _client as endpoint_client
from coded_torch.open_inference import written
from coded_torch.serve import App, TensorSpec, _protocol, specs
from coded_torch.serve import _application as application_of_servers
from coded_torch.serve._protocol import parse
from coded_torch.testing.helpers import until
from coded_torch.workers import DeviceWorkers, EndpointWorkers, ProcessWorkers, RemoteModule

from .servers import Client, serving
from .test_command import running
from .test_protocol import read, refused

# A server answers 504 to late rows that it cannot estimate.
pytestmark = pytest.mark.filterwarnings("ignore:CodedWrapper.*cannot be estimated")

TEXTS = ["a", "", "ünï", "e" * 70, 'quoted "data": [1, 2]', "\\", "\n", "漢字 🙂"]
BYTES = [TensorSpec("texts", "BYTES", ())]


class Read(nn.Module):
    """Returns the length of each text, and the text in upper case."""

    def forward(self, texts):
        assert type(texts) is list
        lengths = torch.tensor([[len(text), 1.0] for text in texts])
        return {"lengths": lengths, "upper": [text.upper() for text in texts]}


class Scale(nn.Module):
    def forward(self, x, texts):
        return x * torch.tensor([[len(text)] for text in texts])


def application(module, examples, **options):
    """Return an application of two workers."""
    in_dims = (0,) * len(examples) if isinstance(examples, tuple) else 0
    pool = DeviceWorkers(["cpu"] * 2)
    coded = CodedWrapper(module, workers=pool, in_dims=in_dims)
    inputs, outputs = specs(module, examples)
    how = {"inputs": inputs, "outputs": outputs, "examples": examples}
    return App(coded, name="m", deadline=20.0, **how | options)


def asked(texts=TEXTS, binary=False, shape=None, **changes):
    """Return the message of a request with strings, and its binary tail."""
    pieces, length = written({}, "inputs", [(BYTES[0], texts, binary)])
    body = b"".join(pieces)
    message = orjson.loads(body[:length])
    message["inputs"][0] |= {"shape": shape or [len(texts)]} | changes
    return message, body[length:] if binary else b""


@pytest.mark.parametrize("piece", [0, 2**16])
@pytest.mark.parametrize("row", [(), (1,)])
def test_strings_are_read_in_json_and_in_binary(row, piece, monkeypatch):
    monkeypatch.setattr(_protocol, "_AT_ONCE", piece)
    inputs = [TensorSpec("texts", "BYTES", row)]
    shape = [len(TEXTS), *row]
    nested = [[text] for text in TEXTS] if row else TEXTS
    for message, tail in (
        asked(shape=shape),
        asked(shape=shape, data=nested),
        asked(binary=True, shape=shape),
    ):
        for spaces in (None, 2):
            body = json.dumps(message, indent=spaces).encode()
            (found,) = read(body, inputs, tail=tail).inputs
            assert found.shape == (len(TEXTS),)
            assert found.tolist() == TEXTS


def test_many_long_strings_are_read_beside_short_json():
    texts = ["x" * 2**15] * 8
    assert read(asked(texts)[0], BYTES).inputs[0].tolist() == texts
    assert (
        read(*[asked(texts, True)[0], BYTES], tail=asked(texts, True)[1]).inputs[0][7] == texts[7]
    )


@pytest.mark.parametrize("piece", [1, 7])
@pytest.mark.parametrize("space", [b"", b" " * 20])
def test_strings_are_read_in_pieces(piece, space, monkeypatch):
    monkeypatch.setattr(_protocol, "_AT_ONCE", 0)
    monkeypatch.setattr(_protocol, "_PIECE", piece)
    pieces, _ = written({}, "inputs", [(BYTES[0], TEXTS, False)])
    body = b"".join(pieces)
    begin = body.index(b'"data":[') + len(b'"data":[')
    spaced = space + space.join([b'"%b"' % orjson.dumps(x)[1:-1] + b"," for x in TEXTS])[:-1]
    body = body[:begin] + spaced + space + body[body.rindex(b"]", 0, -3) :]
    assert read(body, BYTES).inputs[0].tolist() == TEXTS
    for wrong in (b'"",,""', b'"",', b',""', b'"" ""', b'"":""', b'"" 1', b'"', b'"\\', b'"\\"'):
        refused(body[:begin] + wrong + body[body.rindex(b"]", 0, -3) :], BYTES)
    more = body[:begin] + b'"",' + body[begin:]
    assert "must be 8 strings, in one list, got" in refused(more, BYTES)


@pytest.mark.parametrize("data", [b'"%b"' % (b"a" * 20) + b",", b" ", b'\\n", "', b"a"])
def test_long_lists_leave_the_interpreter_to_other_threads(data, monkeypatch):
    """Other threads wait for the interpreter's lock while a pattern is matched."""
    times = [time.thread_time()]
    monkeypatch.setattr(_protocol, "_yield", lambda _: times.append(time.thread_time()))
    pieces, _ = written({}, "inputs", [(BYTES[0], ["-"] * 8, False)])
    strings = data * (2**23 // len(data))
    if not data.startswith((b'"', b" ")):
        strings = b'"' + strings + b'",'
    with contextlib.suppress(ValueError):
        parse(bytearray(b"".join(pieces).replace(b'"-"', strings + b'"-"', 1)), None, BYTES, [], 8)
    times.append(time.thread_time())
    assert max(after - before for before, after in itertools.pairwise(times)) < 0.03


@pytest.mark.parametrize(
    ("message", "tail", "why"),
    [
        (*asked(data=[1] * 8), "data of input 'texts' must be 8 strings, in one list or nested"),
        (*asked(data=TEXTS[:7]), "must be 8 strings, in one list or nested as the shape [8], got"),
        (*asked(data=[None] * 8), "must be 8 strings"),
        (*asked(shape=[8, 1]), "shape of input 'texts' must be [-1], got [8, 1]"),
        (*asked(datatype="FP32"), "datatype of input 'texts' must be BYTES, got 'FP32'"),
        (asked(binary=True)[0], b"", "binary_data_size of input 'texts' must be"),
        (*asked(parameters={"binary_data_size": -1}, data=None), "binary_data_size of input"),
        (asked(["a"], True)[0], b"\1\0\0\0\xff", "texts must be UTF-8, but row 0 is not"),
        (asked(["a"], True)[0], b"\2\0\0\0a", "the bytes of texts must be all of 1 strings"),
        (asked(["ab"], True, [2])[0], b"\1\0\0\0ab", "the bytes of texts must be all of 2 strings"),
        (asked(["ab"], True)[0], b"\1\0\0\0ab", "the bytes of texts must be all of 1 strings"),
        (asked(["x" * 2**20])[0], b"", "the bytes of data of input 'texts' must be at most 131072"),
        (asked(data=[["a"] * 40_000])[0], b"", "JSON beside numbers must be at most 65536"),
    ],
)
def test_strings_that_do_not_fit_are_refused(message, tail, why):
    message["inputs"][0] = {k: x for k, x in message["inputs"][0].items() if x is not None}
    assert why in refused(message, BYTES, tail=tail)


@pytest.mark.parametrize(
    "part", [b'"data":["', b'"data":["a",', b'\\"', b'"data":["\\"', b'"', b"["]
)
def test_what_looks_like_lists_of_strings_takes_linear_time(part):
    body = b'{"inputs":[' + part * (2**21 // len(part))
    begin = time.process_time()
    refused(body, BYTES)
    assert time.process_time() - begin < 2


def test_specs_of_strings():
    inputs, outputs = specs(Read(), np.array(TEXTS))
    assert inputs == BYTES
    wanted = [TensorSpec("lengths", "FP32", (2,)), TensorSpec("upper", "BYTES", ())]
    assert outputs == wanted
    inputs, outputs = specs(Scale(), {"texts": TEXTS, "x": torch.ones(8, 3)})
    assert [spec.datatype for spec in inputs] == ["FP32", "BYTES"]
    with pytest.raises(ValueError, match=r"shape of BYTES must be \(\) or \(1,\), one string per"):
        TensorSpec("x", "BYTES", (2,))


@pytest.mark.parametrize("binary", [True, False])
def test_a_server_takes_and_returns_strings(binary, monkeypatch):
    monkeypatch.setattr(application_of_servers, "_EXTENSIONS", ["binary_tensor_data"] * binary)
    with serving(application(Read(), TEXTS[:3])) as port, Client(port) as client:
        description = client.get("/v2/models/m")[1]
        assert description["inputs"] == [{"name": "texts", "datatype": "BYTES", "shape": [-1]}]
        assert description["outputs"][1] == {"name": "upper", "datatype": "BYTES", "shape": [-1]}
        if not binary:
            status, answer = client.infer(asked()[0])
            assert status == 200
            lengths, upper = answer["outputs"]
            assert lengths["data"][::2] == [len(text) for text in TEXTS]
            assert upper["data"] == [text.upper() for text in TEXTS]
            assert client.infer(asked(data=[1] * 8)[0])[0] == 400
        module = RemoteModule(f"http://127.0.0.1:{port}", "m")
        for given in (TEXTS, np.array(TEXTS), np.array(TEXTS, object)):
            assert module(given)["upper"] == [text.upper() for text in TEXTS]
        for wrong in (["a", 1], torch.ones(3), "abc"):
            with pytest.raises(TypeError, match="texts must be strings, one per row, got"):
                module(wrong)


def test_strings_beside_tensors_are_rows():
    x = torch.rand(8, 3)
    examples = x[:3], TEXTS[:3]
    with serving(application(Scale(), examples)) as port:
        module = RemoteModule(f"http://127.0.0.1:{port}", "m")
        assert torch.equal(module(x, TEXTS), Scale()(x, TEXTS))
        assert torch.equal(module(x[:1], TEXTS[:1]), Scale()(x[:1], TEXTS[:1]))
        coded = CodedWrapper(module, workers=EndpointWorkers([module.url], model="m"), parts=3)
        coded.in_dims = 0, 0
        with coded.workers:
            assert torch.equal(coded(x, TEXTS), Scale()(x, TEXTS))
    inputs, outputs = specs(Scale(), examples)
    coded = CodedWrapper(Scale(), workers=DeviceWorkers(["cpu"]))
    with pytest.raises(ValueError, match=r"in_dims, such as \(0, 0\), as strings are one of 2"):
        App(coded, name="m", inputs=inputs, outputs=outputs, deadline=1.0)


def test_strings_that_would_be_verified_are_refused_at_once():
    inputs, outputs = specs(Read(), TEXTS[:3])
    coded = CodedWrapper(Read(), workers=DeviceWorkers(["cpu"] * 2), verify=0.5)
    with pytest.raises(
        ValueError, match=r"verify=None, as strings are not compared \(upper\), got"
    ):
        App(coded, name="m", inputs=inputs, outputs=outputs, deadline=1.0)


def test_triton_sends_strings():
    triton = pytest.importorskip("tritonclient.http")
    with serving(application(Read(), TEXTS[:3])) as port:
        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        for binary in (True, False):
            given = triton.InferInput("texts", [len(TEXTS)], "BYTES")
            given.set_data_from_numpy(np.array(TEXTS, object), binary_data=binary)
            wanted = [triton.InferRequestedOutput("upper", binary_data=binary)]
            found = client.infer("m", [given], outputs=wanted).as_numpy("upper").tolist()
            found = [text.decode() if isinstance(text, bytes) else text for text in found]
            assert found == [text.upper() for text in TEXTS]
        client.close()


MODEL = """
import torch

class Lengths(torch.nn.Module):
    def forward(self, texts, scale=None):
        lengths = torch.tensor([[float(len(text))] for text in texts])
        return (lengths if scale is None else lengths * scale), [text.upper() for text in texts]

def make():
    return Lengths(), ["a", "bb", "ccc"]

def scaled():
    return Lengths(), {"texts": ["a", "bb", "ccc"], "scale": torch.ones(3, 1)}
"""


def test_commands_serve_strings_and_fleets_of_such_servers(tmp_path, monkeypatch, capsys):
    (tmp_path / "texts_of.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["serve", "texts_of:make", "--example", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"][0]["data"] == ["bb"]
    texts = ["dddd", "", "ü"]
    wanted = torch.tensor([[4.0], [0.0], [1.0]])
    how = "--num-workers", "2", "--deadline", "20"
    with (
        running("texts_of:scaled", "--name", "m", *how, cwd=tmp_path) as (_, first),
        running("--endpoints", f"http://127.0.0.1:{first}", "--model", "m", "--deadline", "20") as (
            _,
            second,
        ),
    ):
        for port in (first, second):
            module = RemoteModule(f"http://127.0.0.1:{port}", "m")
            until(lambda module=module: is_ready(module.url))
            lengths, upper = module(texts, torch.full((3, 1), 2.0)).values()
            assert torch.equal(lengths, 2 * wanted)
            assert upper == ["DDDD", "", "Ü"]
            with Client(port) as client:
                status, _, page = client.send("GET", "/")
                assert status == 200
                assert (b'"datatype":"BYTES"' in page) == (port == first)


def is_ready(url):
    client = endpoint_client.Client("test")
    return endpoint_client.run(client.is_ready(url))


class Hostile(nn.Module):
    def forward(self, texts):
        if "end" in texts:
            os._exit(1)
        return torch.tensor([[float(len(text))] for text in texts])


def test_a_string_that_ends_workers_is_refused():
    coded = CodedWrapper(Hostile(), workers=ProcessWorkers(2))
    inputs, outputs = specs(coded.module, TEXTS)
    app = App(coded, name="m", inputs=inputs, outputs=outputs, examples=TEXTS, deadline=20.0)
    with serving(app) as port, Client(port) as client:
        answers = [client.infer(asked(["end"])[0]) for _ in range(2)]
        assert {status for status, _ in answers} == {500}
        assert "row 0 hung or ended 3 workers" in answers[1][1]["error"]
        assert client.infer(asked()[0])[0] == 200
