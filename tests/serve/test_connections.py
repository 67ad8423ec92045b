"""Connections of the HTTP server: what no client can hold, and what each one gets."""

import asyncio
import contextlib
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
from torch import nn

from coded_torch.serve import TensorSpec, _connections
from coded_torch.testing.helpers import until

from .servers import Client, built, serving, started, tensor


async def test_a_response_is_sent_at_once_unless_the_client_has_gone():
    transport = mock.Mock(**{"is_closing.return_value": False})
    together = _connections._Transport(transport, mock.Mock(loop=asyncio.get_running_loop()))
    together.write(b"head")
    together.write(b"body")
    await asyncio.sleep(0)
    together.write(b"last")
    together.close()
    assert transport.mock_calls[1::2] == [mock.call.write(b"headbody"), mock.call.write(b"last")]
    assert transport.mock_calls[-1] == mock.call.close()
    together.write(b"more")
    transport.is_closing.return_value = True
    await asyncio.sleep(0)
    assert transport.write.call_count == 2


@pytest.fixture
def port(monkeypatch):
    """Yield the port of a server with short limits, of rows of any size."""
    monkeypatch.setattr(_connections, "_HEADERS_SECONDS", 60.0)
    monkeypatch.setattr(_connections, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(_connections, "_WATCH_SECONDS", 0.1)
    monkeypatch.setattr(_connections._Connection, "most", 6)
    spec = TensorSpec("input", "FP32", (-1,))
    with serving(built(nn.Identity(), inputs=[spec], outputs=[spec])) as port:
        yield port


def connected(port, text=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(text)
    return connection


def ended(connection):
    """Return what the server sent before it closed the connection."""
    found = b""
    with contextlib.suppress(ConnectionError), connection:
        while data := connection.recv(65536):
            found += data
    return found


GET = b"GET /v2 HTTP/1.1\r\nHost: x\r\n"
CHUNKED = (
    b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
)


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (GET, b"a: b\r\n"),
        (GET + b"a: ", b"b" * 1000),
        (b"GET /", b"v" * 1000),
        (CHUNKED + b"0\r\n", b"a: b\r\n"),
        (CHUNKED + b"2;a=", b"b" * 1000),
    ],
    ids=["many", "one", "path", "trailers", "extension"],
)
def test_headers_without_end_end_the_connection(port, begin, more):
    sent = 0
    with connected(port, begin) as connection:
        with contextlib.suppress(ConnectionError):
            while sent < 2**26:
                connection.sendall(more * 100)
                sent += 100 * len(more)
        assert sent < 2**26  # of which most lies in the buffers of the sockets
        with contextlib.suppress(ConnectionError):
            assert b" 431 " in connection.recv(65536) or b" 400 " in connection.recv(65536)


def test_nothing_is_parsed_of_a_connection_that_has_ended(port, monkeypatch):
    """Each took time of the loop for ever."""
    lost = queue.Queue()
    connection_lost = _connections._Connection.connection_lost

    def noted(connection, error):
        connection_lost(connection, error)
        lost.put(connection)

    monkeypatch.setattr(_connections._Connection, "connection_lost", noted)
    with connected(port, GET + b"a: b\r\n" * 10_000) as connection:
        assert b" 431 " in connection.recv(65536)
    ended = lost.get(timeout=30)
    with Client(port) as client:
        assert client.get("/v2")[0] == 200
    assert ended.turn is None
    assert not ended.waiting


def test_headers_come_in_time(port, monkeypatch):
    monkeypatch.setattr(_connections, "_HEADERS_SECONDS", 0.5)
    start, begins = time.monotonic(), (b"", b"\r\n", GET, GET + b"\r\n" + GET)
    with contextlib.ExitStack() as stack:
        several = [(begin, stack.enter_context(connected(port, begin))) for begin in begins]
        for _ in range(20):  # a byte at a time
            time.sleep(0.1)
            for begin, connection in several:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"a" if begin else b"")
        for begin, connection in several:
            assert ended(connection).count(b" 200 ") == begin.count(b"\r\n\r\n")
    assert time.monotonic() - start < 20


def test_a_kept_connection_may_be_idle_for_longer(port, monkeypatch):
    with Client(port) as client:
        assert client.get("/v2")[0] == 200
        monkeypatch.setattr(_connections, "_HEADERS_SECONDS", 0.5)
        own = client.connection.sock
        time.sleep(1)
        assert client.get("/v2")[0] == 200
        assert client.connection.sock is own


def test_the_connection_that_is_idle_the_longest_makes_room(port):
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(connected(port))
        for _ in range(3):
            with Client(port) as client:
                assert client.get("/v2")[0] == 200
    with contextlib.ExitStack() as stack:
        head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
        busy = [stack.enter_context(connected(port, head)) for _ in range(6)]
        time.sleep(0.3)
        assert b" 503 Service Unavailable" in ended(connected(port, GET + b"\r\n"))
        assert all(b" 408 " in connection.recv(65536) for connection in busy)  # of 2.5 s


def test_half_of_the_descriptors_are_left_for_workers_and_files():
    code = "from coded_torch.serve import _connections as c; print(c._Connection.most)"
    line = ["bash", "-c", 'ulimit -n 256 && exec "$@"', "bash", sys.executable, "-c", code]
    assert subprocess.check_output(line, text=True, cwd="/") == "128\n"


def test_a_client_that_does_not_read_its_answer_is_disconnected(port, monkeypatch):
    lost = threading.Event()
    connection_lost = _connections._Connection.connection_lost

    def noted(*how):
        connection_lost(*how)
        lost.set()

    monkeypatch.setattr(_connections._Connection, "connection_lost", noted)
    tail = bytes(16_000_000)
    how = {"parameters": {"binary_data_size": len(tail)}}
    entry = {"name": "input", "datatype": "FP32", "shape": [1, 4_000_000]} | how
    wanted = [{"name": "input", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [entry], "outputs": wanted}).encode()
    asked = (
        b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %d\r\n"
    )
    asked = asked % len(head) + b"Content-Length: %d\r\n\r\n" % len(head + tail)
    with connected(port, asked + head + tail) as connection:
        assert lost.wait(60)
        assert len(ended(connection)) < len(tail)
    with Client(port) as client:
        assert client.get("/v2")[0] == 200


def infer(value=1.0, *headers):
    body = json.dumps({"inputs": [tensor([[value, 2.0, 3.0]])]}).encode()
    lines = [b"POST /v2/models/m/infer HTTP/1.1", b"Host: x", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", b""]) + body


class Held(nn.Module):
    """Returns its rows when it may."""

    def __init__(self):
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def forward(self, x):
        self.begun.set()
        assert self.go.wait(30)
        return x


@pytest.mark.parametrize(
    "piece",
    [b"1\r\na\r\n" * 20_000, (b"1;e=" + b"a" * 15_000 + b"\r\na\r\n") * 8],
    ids=["chunks of a byte", "extensions"],
)
@pytest.mark.parametrize("path", [b"/v2/models/m/infer", b"/v2/health/live"])
def test_framing_of_a_body_ends_the_connection(port, path, piece):
    """It took the loop: others waited for 6.4 s."""
    sent, begin = 0, time.process_time()
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    with connected(port, head) as connection, contextlib.suppress(ConnectionError):
        while sent < 100:
            connection.sendall(piece)
            sent += 1
    assert sent < 100
    assert time.process_time() - begin < 1


def test_a_body_may_have_small_chunks(port):
    body = json.dumps({"inputs": [tensor([[float(i) for i in range(100)]])]}).encode()
    pieces = [body[at : at + 8] for at in range(0, len(body), 8)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(x), x) for x in [*pieces, b""])
    with connected(port, CHUNKED.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + framed) as connection:
        assert b" 200 " in connection.recv(65536)


def test_many_requests_at_once_are_answered_in_their_order(port):
    paths = [b"/v2", b"/v2/health/live", b"/v2/models/m"] * 100
    sent = b"".join(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in paths)
    with Client(port) as client:
        bodies = [client.get(path.decode())[1] for path in paths[:3]]
    with connected(port, sent) as connection:
        connection.shutdown(socket.SHUT_WR)
        found = [x.partition(b"\r\n\r\n")[2] for x in ended(connection).split(b"HTTP/1.1 200")[1:]]
    assert [json.loads(x) for x in found] == bodies * 100


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_client_that_sends_no_more_gets_its_answer(is_slow):
    module = Held()
    specs = [TensorSpec("input", "FP32", (3,))]
    with (
        serving(built(module, inputs=specs, outputs=specs)) as port,
        connected(port, infer() + infer(2.0)) as connection,
    ):
        connection.shutdown(socket.SHUT_WR)
        assert module.begun.wait(30)
        time.sleep(6 * _connections._LOOK_SECONDS if is_slow else 0)
        module.go.set()
        found = ended(connection)
    assert found.count(b"HTTP/1.1 200 OK\r\n") == 2
    assert [json.loads(x.partition(b"\r\n\r\n")[2])["outputs"][0]["data"][0] for x in
            found.split(b"HTTP/1.1 200 OK")[1:]] == [1.0, 2.0]  # fmt: skip


def test_the_application_hears_of_a_client_that_has_gone():
    module = Held()
    specs = [TensorSpec("input", "FP32", (3,))]
    application = built(module, inputs=specs, outputs=specs, max_queued_requests=1)
    with serving(application) as port:
        with connected(port, infer()), connected(port, infer(2.0)):
            until(lambda: application.batcher._queue)
        until(lambda: not application.batcher._queue)  # long before its deadline
        module.go.set()


def test_a_body_that_nobody_reads_ends_in_time(port, monkeypatch):
    monkeypatch.setattr(_connections, "_HEADERS_SECONDS", 0.5)
    head = b"POST /v2/health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n\r\n"
    with connected(port, head) as connection, contextlib.suppress(ConnectionError):
        assert b" 405 " in connection.recv(65536)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            connection.sendall(bytes(2**16))
    assert time.monotonic() < end


def test_no_client_that_connects_as_the_server_ends_is_reset(monkeypatch):
    """It comes between the last look at the clients that wait and the end of the listener."""
    outcomes = []
    threads = []
    accept = socket.socket.accept

    def ask():
        try:
            with connected(
                port, b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            ) as client:
                outcomes.append(client.recv(12))
        except ConnectionError as error:
            outcomes.append(type(error))

    def accept_late(listening):
        try:
            return accept(listening)
        except BlockingIOError:
            threads.extend(started([ask]))
            threads[-1].join(0.3)  # now it has connected, if it can
            raise

    with serving(built()) as port:
        monkeypatch.setattr(socket.socket, "accept", accept_late)
    for thread in threads:
        thread.join(60)
    assert outcomes == [ConnectionRefusedError]
