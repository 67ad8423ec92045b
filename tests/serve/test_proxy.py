"""A server in front of servers: what it forwards, what it refuses, and killed servers."""

import contextlib
import json
import re
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coded_torch._page import add_page
from coded_torch.open_inference import EndpointError
from coded_torch.testing.helpers import until
from coded_torch.workers import EndpointWorkers, RemoteModule

from ..workers.endpoint_servers import sending, servers
from .servers import Client, built, serving, tensor
from .test_command import running

ROW = {"inputs": [tensor([[1.0, 2.0, 3.0]])]}
DOUBLED = [2.0, 4.0, 6.0]
PATH = "/v2/models/front/infer"
HEADER = "--header: must be NAME=@FILE or NAME='$VARIABLE', which holds the value"
HEADERS = "X-Api-Key=hidden", "hidden", "=@/dev/null", "X=$no_hidden", "X=", "X=@/dev/null"
SERVER = """
from endpoint_servers import DoubleServer
server = DoubleServer()
print(server.url, flush=True)
server.thread.join()
"""


@contextlib.contextmanager
def fronted(urls, model="double", **options):
    """Yield a client of a server, named front, before the servers."""
    module, pool = RemoteModule(urls[0], model), EndpointWorkers(urls, model=model)
    options |= {"inputs": module.metadata.inputs, "outputs": module.metadata.outputs}
    application = built(module, workers=pool, name="front", **options)
    add_page(application, is_local=True)
    with serving(application) as port, Client(port) as client:
        yield client


def test_nothing_of_a_client_but_its_tensors_is_forwarded():
    with servers(1) as (server,), fronted([server.url]) as client:
        headers = {"Authorization": "Bearer secret", "Cookie": "a=b", "X_Name": "secret"}
        status, answer = client.infer({"id": "secret", **ROW}, PATH, **headers)
        assert (status, answer["outputs"][0]["data"]) == (200, DOUBLED)
        assert "secret" not in str(server.headers)
        assert "Cookie" not in server.headers
        assert client.infer(ROW, "/v2/models/other/infer")[0] == 404
        assert len(server.rows) == 1


def test_a_request_that_a_server_refuses_is_400():
    with servers(2) as both, fronted([each.url for each in both]) as client:
        for server in both:
            server.fault = sending(400, b'{"error": "at most 0 rows"}')
        assert client.infer(ROW, PATH) == (400, {"error": "at most 0 rows"})
        assert sum(len(server.rows) for server in both) == 0


HOSTILE = (
    "x\nERROR root: forged\u2028\x1b[31m http://10.0.0.7:8000/a 10.0.0.8 [fe80::1]:80 db:5432 "
)


@pytest.mark.parametrize("code", [400, 404, 500])
def test_the_words_of_a_server_are_short_and_without_lines_and_addresses(code, caplog):
    fault = sending(code, json.dumps({"error": HOSTILE + "A" * 9000}).encode())
    with servers(2) as both, fronted([each.url for each in both]) as client:
        module = RemoteModule(both[0].url, "double")
        for server in both:
            server.fault = fault
        status, answer = client.infer(ROW, PATH)
        assert status == {400: 400, 404: 503, 500: 500}[code]
        with pytest.raises((RuntimeError, ValueError)) as caught:
            module(torch.ones(1, 3))
    logged = [record.getMessage() for record in caplog.records]
    assert len(str(caught.value)) < 250
    assert len(answer["error"]) < 250
    assert max(map(len, logged)) < 500
    text = "".join([answer["error"], str(caught.value), *logged])
    assert "forged" in text
    assert text.isprintable()
    for address in ("10.0.0", "fe80", "5432"):
        assert address not in text


def test_names_of_outputs_must_be_printable():
    with servers(1) as (server,):
        for name in ("out\nput", "x" * 201):
            server.outputs = [{"name": name, "datatype": "FP32", "shape": [-1, 3]}]
            with pytest.raises(EndpointError, match="at most 200 printable characters") as caught:
                RemoteModule(server.url, "double")
            assert str(caught.value).isprintable()


def test_a_server_whose_endpoints_are_down_is_not_ready():
    with servers(2) as both, fronted([each.url for each in both]) as client:
        assert client.get("/v2/health/ready")[0] == 200
        workers = client.get("/page/status")[1]["workers"]
        assert [worker["name"] for worker in workers] == [server.url for server in both]
        for server in both:
            server.ready, server.fault = False, sending(502)
        status, answer = client.infer(ROW | {"parameters": {"timeout": 500_000}}, PATH)
        assert status == 503
        why = r"no worker computed it: (worker [01] answered 502|no worker is up)"
        assert re.fullmatch(why, answer["error"])
        for path in ("/v2/health/ready", "/v2/models/front/ready"):
            assert client.get(path) == (503, {"name": "front", "ready": False})
        assert client.get("/v2/health/live")[0] == 200
        both[1].ready, both[1].fault = True, None
        until(lambda: client.get("/v2/health/ready")[0] == 200)
        assert client.infer(ROW, PATH)[0] == 200


def test_a_killed_server_loses_nothing():
    folder = Path(__file__).parents[1] / "workers"
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(3):
            process = subprocess.Popen(
                [sys.executable, "-c", SERVER], cwd=folder, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            started.append(process)
        urls = [process.stdout.readline().strip() for process in started]
        options = ["--endpoints", "http://127.0.0.1:1", *urls, "--model", "double"]
        options += ["--deadline", "10", "--parts", "3"]
        _, port = stack.enter_context(running(*options))
        client = stack.enter_context(Client(port))
        for n in range(60):
            if n in (20, 40):
                started.pop().kill()
            rows = [[float(n), 0.0, 1.0], [1.0, float(n), 2.0], [3.0, 1.0, float(n)]]
            request = {"inputs": [tensor(rows)], "outputs": [{"name": "output"}]}
            status, answer = client.infer(request, "/v2/models/double/infer")
            assert (status, answer["parameters"]["estimated_rows"]) == (200, 0)
            assert answer["outputs"][0]["data"] == [2 * x for row in rows for x in row]


def test_headers_and_certificates_come_from_files_and_variables(tmp_path, monkeypatch):
    certificate, key, secret = (tmp_path / name for name in ("cert.pem", "key.pem", "secret"))
    line = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -subj /CN=x"
    line += f" -days 2 -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(line.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secret.write_text("hidden in a file\n")
    monkeypatch.setenv("A_SECRET", "hidden in a variable")
    with servers(2, context=context) as both:
        options = ["--endpoints", *(each.url for each in both), "--model", "double"]
        options += ["--deadline", "10"]
        with pytest.raises(EndpointError, match="could not be reached"):
            RemoteModule(both[0].url, "double")
        options += ["--ca-file", str(certificate), "--header", f"X-Api-Key=@{secret}"]
        options += ["--header", "Authorization=$A_SECRET"]
        with running(*options) as (process, port), Client(port) as client:
            status, answer = client.infer(ROW, "/v2/models/double/infer")
            assert (status, answer["outputs"][0]["data"]) == (200, DOUBLED)
            both[0].fault = both[1].fault = sending(502)
            assert client.infer(ROW, "/v2/models/double/infer")[0] == 503
            seen = Path(f"/proc/{process.pid}/cmdline").read_text() + process.head
            seen += process.log.read_text() + client.metrics()
        for each in both:
            if each.rows:
                assert each.headers["X-Api-Key"] == "hidden in a file"
                assert each.headers["Authorization"] == "hidden in a variable"
        assert "answered 502" in seen
        assert "hidden" not in seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--endpoints {url}", "--endpoints must come with --model, the model's name there"),
        ("--model double", "--model must come with --endpoints"),
        ("--header A=@b", "--header must come with --endpoints"),
        ("--ca-file {url}", "--ca-file must come with --endpoints"),
        (
            "--endpoints {url} --model double --ca-file none",
            "--ca-file must be a file of certif",
        ),
        *((f"--endpoints {{url}} --model double --header {x}", HEADER) for x in HEADERS),
        ("--endpoints http://10.0.0.1 --model double --header Authorization=$PATH", "needs https"),
        ("--endpoints {url} --model double --chaos", "--chaos must be left out with --endpoints"),
        ("--endpoints {url} --model double --example 0", "--example must be left out with"),
        ("--endpoints {url} --model none", "no endpoint describes the model 'none'; http://"),
        ("--endpoints ftp://a --model double", "--endpoints: an endpoint must be a URL such as"),
        ("--endpoints http://127.0.0.1:1 --model double", "no endpoint describes the model"),
        ("--endpoints {url} --model double --name estimated/x", "name must be a part of a URL"),
    ],
)
def test_bad_values_get_one_line(arguments, message, refused):
    with servers(1) as (server,):
        said = refused(["serve", *arguments.format(url=server.url).split()])
    assert message in said
    assert "hidden" not in said
