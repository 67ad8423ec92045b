"""A pool of servers of the Open Inference Protocol, some of which fail."""

import contextlib
import copy
import json
import math
import os
import pickle
import select
import socket
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting
from coded_torch.codes import NotEnoughResults, SplineCode
from coded_torch.open_inference import EndpointError, Model, RefusedError
from coded_torch.open_inference._client import BusyError, Client, RemoteError, run
from coded_torch.testing.workers import numbered, task_of, until
from coded_torch.workers import EndpointWorkers, Part, RemoteModule, Reply, _endpoints

from .endpoint_servers import sending, servers

X = torch.arange(36.0).reshape(12, 3)
WAIT = 20.0  # seconds, of a test that hangs


@pytest.fixture
def three():
    with servers(3) as made:
        yield made


def wrapped(made, waiting=None, **options):
    module = RemoteModule(made[0].url, "double")
    pool = EndpointWorkers([each.url for each in made], model="double", **options)
    waiting = waiting or Waiting(deadline=WAIT, estimate=False)
    return CodedWrapper(module, workers=pool, waiting=waiting)


@pytest.mark.parametrize("binary", [True, False, None])
def test_a_batch_is_computed_by_all_servers(binary):
    with servers(3, binary=binary) as made:
        coded = wrapped(made)
        coded(X)  # proves the rows of outputs
        for each in made:
            each.rows.clear()
        together = threading.Barrier(3, timeout=WAIT)
        for each in made:
            each.fault = lambda handler, rows: len(rows) < 5 and together.wait() and False
        answers, report = coded.run(X)
        assert torch.equal(answers, 2 * X)
        assert report.asked == (0, 1, 2)
        assert [len(each.rows) for each in made] == [1, 1, 1]
        assert torch.equal(RemoteModule(made[0].url, "double")(X), 2 * X)


@pytest.mark.parametrize("first", [True, False])
def test_a_fleet_may_have_servers_with_and_without_binary_tensors(first):
    with servers(2, binary=first) as some, servers(2, binary=not first) as others:
        coded = wrapped([*some, *others])
        together = threading.Barrier(4, timeout=WAIT)
        coded(X)  # proves the rows of outputs
        for each in [*some, *others]:
            each.rows.clear()
            each.fault = lambda handler, rows: together.wait() and False
        answers, report = coded.run(X)
        assert torch.equal(answers, 2 * X)
        assert not report.rejected
        assert [len(each.rows) for each in [*some, *others]] == [1] * 4
        some[0].fault = None
        coded.module(X)
        some[0].binary = not first  # another server got its address
        if first:
            with pytest.raises(ValueError, match="tensors must be JSON"):
                coded.module(X)
        assert torch.equal(coded.module(X), 2 * X)


def test_gradients_are_refused(three):
    module, message = RemoteModule(three[0].url, "double"), "inputs must not require gradients"
    with wrapped(three).workers as pool:
        coded = CodedWrapper(module, workers=pool)
        for call in (module, coded):
            with pytest.raises(RuntimeError, match=message):
                call(X.clone().requires_grad_())
            with pytest.raises(RuntimeError, match=message):
                torch.func.grad(lambda x, call=call: call(x).sum())(X)


@pytest.mark.parametrize("word", ["NaN", "null"])
def test_json_with_numbers_that_are_not_finite_is_an_answer(word):
    def one_nan(handler, rows):
        rows[rows[:, 0] == 0] = math.nan

    with servers(2, binary=False) as made:
        coded = wrapped(made, Waiting(deadline=WAIT))
        for each in made:
            each.fault, each.nan = one_nan, word
        answers, report = coded.run(X)
        assert torch.equal(answers[1:], 2 * X[1:])
        assert report.estimated.nonzero().flatten().tolist() == [0]
        assert coded.workers.num_ready == 2
        assert coded.module(X)[0].isnan().all()


def test_a_busy_server_is_no_failure(three):
    coded = wrapped(three)
    three[0].fault = sending(503, Retry_After="30")
    reports = []
    until(lambda: reports.append(coded.run(X)[1]) or coded.workers.num_ready == 2)
    assert not any(report.rejected or report.hedges for report in reports)
    assert {report.work_ratio for report in reports} == {
        1.0
    }  # a part that was handed back counts once
    assert not three[0].rows


def broken(handler, rows):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def no_http(handler, rows):
    handler.wfile.write(b"SSH-2.0 \x00\r\n\r\n")
    handler.close_connection = True
    return True


def huge(handler, rows):
    handler.send_response(200)
    handler.send_header("Content-Length", str(2**40))
    handler.end_headers()
    handler.close_connection = True


def interim(handler, rows):
    with contextlib.suppress(OSError):
        for _ in range(100_000):
            handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 64)


def answering(**head):
    return lambda handler, rows: handler.head.update(head) or handler.answer(2 * rows)


def counting(estimated):
    """Return a fault that says how many rows it estimated."""
    return answering(parameters={"estimated_rows": estimated})


FAULTS = {
    "broken": broken,
    "no http": no_http,
    "huge": huge,
    "interim": interim,
    "another id": answering(id="another"),
    "another model": answering(model_name="another"),
    **{f"estimated {x!r}": counting(x) for x in (3.0, 0.0, "3.0", True, -1, 99, [], "")},
    "garbage": lambda handler, _: handler.send(200, b"\x00garbage"),
    "deep": lambda handler, _: handler.send(200, b"[" * 60_000),
    "packed": lambda handler, _: handler.send(200, b"\x1f\x8b", Content_Encoding="gzip"),
    "elsewhere": lambda handler, _: handler.send(307, b"", Location="http://127.0.0.1:1/"),
    "shape": lambda handler, rows: handler.answer(rows[:1], shape=[len(rows) + 1, 3]),
    "dtype": lambda handler, rows: handler.answer(rows, datatype="FP64"),
    "beyond all floats": lambda handler, rows: handler.answer(
        rows, parameters={}, data=[math.nan] + [10**400] * (rows.size - 1)
    ),
    "unhashable name": lambda handler, rows: handler.answer(rows, name=["output"]),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_an_answer_against_the_protocol_is_not_used(three, fault):
    coded = wrapped(three)
    three[1].ready = False
    used = []
    three[1].fault = lambda handler, rows: used.append(rows) or fault(handler, rows) or True
    until(lambda: torch.equal(coded(X), 2 * X) and used)
    assert coded.workers.num_ready == 2


@pytest.mark.parametrize("kind", [int, str])  # protobuf writes 64 bits as strings
def test_rows_that_a_server_says_it_estimated_are_computed_by_another(three, kind):
    """Whatever the server that described the model is: fleets may be mixed, also of versions."""

    def estimated(handler, rows):
        used.append(rows)
        counting(kind(len(rows)))(handler, np.float32(-50) * rows)
        return True

    coded, used = wrapped(three), []
    three[1].fault = estimated
    until(lambda: torch.equal(coded(X), 2 * X) and used)
    assert not coded.last_run.estimated.any()


@pytest.mark.parametrize(
    ("listed", "bound"),
    [  # by versions 0.4, 0.5 and a later one
        ("predicted radius label_risk source verified", "radius"),
        ("estimated radius label_p_value source verified corrected", "radius"),
        ("estimated error_bound label_p_value source verified corrected", "error_bound"),
    ],
)
def test_rows_are_marked_by_servers_of_all_versions(listed, bound):
    kinds = dict.fromkeys(("predicted", "estimated", "verified", "corrected"), "BOOL")
    kinds["source"] = "UINT8"

    def marked(handler, rows):
        out = {"name": "output", "datatype": "FP32", "shape": [len(rows), 3]}
        out["data"] = (2 * rows).ravel().tolist()
        mark = {"name": "estimated", "datatype": "BOOL", "shape": [len(rows)]}
        mark["data"] = [row == 5 for row in range(len(rows))]
        error = {"name": bound, "datatype": "FP32", "shape": [len(rows)]}
        error["data"] = [float(row == 5) for row in range(len(rows))]
        message = handler.head | {"parameters": {"estimated_rows": 1}}
        message["outputs"] = [out, mark, error][: len(server.wanted)]
        return handler.send(200, json.dumps(message).encode()) or True

    with servers(1, binary=False) as (server,):
        server.outputs = server.outputs + [
            {"name": key, "datatype": kinds.get(key, "FP32"), "shape": [-1]}
            for key in listed.split()
        ]
        server.fault = marked
        names = ["output", "estimated", "error_bound"]
        found = RemoteModule(server.url, "double", outputs=names)(X)
        assert server.wanted == ["output", "estimated", bound]
        assert list(found) == names
        assert torch.equal(found["output"], 2 * X)
        assert found["estimated"].nonzero().flatten().tolist() == [5]
        assert found["error_bound"].nonzero().flatten().tolist() == [5]
        plain = RemoteModule(server.url, "double")
        with pytest.raises(BusyError, match=r"estimated 1 of 12 rows; ask for .*'estimated'"):
            plain(X)
        assert server.wanted == ["output"]


REFUSALS = {
    "400": sending(400, b'{"error": "no"}'),
    "405": sending(405),
    "413": sending(413, b"<html>413 Request Entity Too Large</html>"),
    "422": sending(422, b""),
    "500": sending(500, b"Internal Server Error"),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_server_that_refuses_what_others_compute_is_paused_and_named(three, refusal, caplog):
    coded = wrapped(three)
    three[1].fault, three[1].ready = refusal, False
    until(lambda: torch.equal(coded(X), 2 * X) and coded.workers.num_ready == 2)
    began = time.monotonic()
    assert torch.equal(coded(X), 2 * X)
    # The rows of outputs are not proved yet: nothing waits for the server that is down.
    assert time.monotonic() - began < WAIT / 4
    failed = f"{three[1].url} failed, and is probed until it is ready: it refused what others"
    assert caplog.text.count(failed) == 1
    assert caplog.text.count("failed, and is probed") == 1
    three[1].fault, three[1].ready = None, True
    until(lambda: coded.workers.num_ready == 3)


@pytest.mark.parametrize("many", [1, 3])
def test_a_request_that_all_servers_refuse_is_the_callers_error(many, caplog):
    with servers(many) as made:
        coded = wrapped(made)
        for each in made:
            each.fault = sending(400, b'{"error": "no"}')
        for _ in range(4):
            with pytest.raises(RefusedError, match="no") as raised:
                coded(X)
            assert raised.value.rows == tuple(range(12))
        assert coded.workers.num_ready == many
        assert "failed" not in caplog.text


def test_a_refusal_of_every_column_is_the_callers_error(three):
    for each in three:
        each.fault = sending(400, b'{"error": "no"}')
    module = RemoteModule(three[0].url, "double")
    pool = EndpointWorkers([each.url for each in three], model="double")
    with pool, pytest.raises(RefusedError, match="no"):
        CodedWrapper(module, SplineCode(4, 6), workers=pool)(X)


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        (422, b'{"error": "fifteen"}', RefusedError, "fifteen"),
        (500, b'{"error": "fifteen"}', RemoteError, "fifteen"),
        (500, b"Internal Server Error", RemoteError, "answered 500"),
    ],
)
def test_an_error_of_some_rows_is_raised_with_them(three, status, body, kind, text, caplog):
    coded = wrapped(three)
    refuse = sending(status, body)
    for each in three:
        each.fault = lambda handler, rows: (rows == 15).any() and refuse(handler, rows)
    for _ in range(4):
        with pytest.raises(kind, match=text) as raised:
            coded(X)
        assert raised.value.rows == (5,)
    assert coded.workers.num_ready == 3
    assert "failed" not in caplog.text


def test_servers_that_fail_on_the_same_rows_clear_each_other(three, monkeypatch):
    for name in ("PROBE_SECONDS", "MOST_PROBE_SECONDS", "ALONE_PROBE_SECONDS"):
        monkeypatch.setattr(_endpoints, name, 600.0)
    coded = wrapped(three, Waiting(deadline=5.0))
    for each in three:
        each.fault = lambda handler, rows: (rows == 15).any() and broken(handler, rows)
    for _ in range(3):
        _, report = coded.run(X)
        assert report.estimated.nonzero().flatten().tolist() == [5]
        until(lambda: coded.workers.num_ready == 3)
    for each in three:
        each.fault = broken if each is three[0] else None
    until(lambda: torch.equal(coded(X), 2 * X) and coded.workers.num_ready == 2)
    assert torch.equal(coded(X), 2 * X)
    assert coded.workers.num_ready == 2  # it failed alone: only a probe clears it


@pytest.mark.parametrize("echoes", [True, False])
def test_a_late_second_response_is_not_the_next_answer(echoes):
    def twice(handler, rows):
        for _ in range(2):
            handler.answer(2 * rows)
            time.sleep(0.01)
        return True

    with servers(3, echoes=echoes) as made:
        coded = wrapped(made)
        made[1].fault = twice
        for n in range(100):
            assert torch.equal(coded(X + n), 2 * (X + n))
            time.sleep(0.002)


@pytest.mark.parametrize("echoes", [True, False])
def test_a_connection_is_kept_if_answers_have_ids(echoes):
    with servers(1, echoes=echoes) as (server,):
        module = RemoteModule(server.url, "double")
        module(X)
        before = server.num_connections
        for _ in range(5):
            assert torch.equal(module(X), 2 * X)
        assert server.num_connections - before == (1 if echoes else 5)
        server.echoes = False
        if echoes:  # on a kept connection, nothing shows whose answer it is
            with pytest.raises(EndpointError, match="the answer must have the id of the request"):
                module(X)
        assert torch.equal(module(X), 2 * X)


def test_versions_are_reported_and_two_in_a_call_are_logged(three, caplog):
    coded = wrapped(three)
    for server, version in zip(three, ("1", "1", None), strict=True):
        server.head = {"model_version": version}
    _, report = coded.run(X)
    assert report.versions == {worker: "1" for worker in report.received if worker < 2}
    assert not caplog.text
    three[2].head = {"model_version": "2"}
    reports = []
    until(lambda: reports.append(coded.run(X)[1]) or len({*reports[-1].versions.values()}) > 1)
    assert reports[-1].versions[2] == "2"
    assert "one call got answers of versions ['1', '2'] of double" in caplog.text


def test_a_server_that_answers_nothing_while_others_do_gets_no_parts(three, monkeypatch):
    monkeypatch.setattr(_endpoints, "MOST_DOUBTS", 3)
    coded, hung = wrapped(three, Waiting(deadline=0.1)), threading.Event()
    three[2].fault, three[2].ready = lambda handler, rows: hung.wait(WAIT) or True, False

    def is_out():
        with contextlib.suppress(NotEnoughResults):  # a busy machine may have none at the deadline
            coded(X)
        return coded.workers.num_ready == 2

    try:
        until(is_out)
        answers, report = coded.run(X, waiting=Waiting(deadline=WAIT))
        assert torch.equal(answers, 2 * X)
        assert 2 not in report.asked
    finally:
        hung.set()
    three[2].fault, three[2].ready = None, True
    until(lambda: coded.workers.num_ready == 3)


def test_each_server_that_fails_or_comes_back_is_logged_with_the_reason(three, caplog):
    coded, down = wrapped(three), three[1:]
    for each in down:
        each.fault, each.ready = sending(502), False
    until(lambda: torch.equal(coded(X), 2 * X) and coded.workers.num_ready == 1)
    for each in down:
        text = f"{each.url} failed, and is probed until it is ready: it answered 502"
        assert caplog.text.count(text) == 1
        each.fault, each.ready = None, True
    until(lambda: coded.workers.num_ready == 3)
    for each in down:
        assert caplog.text.count(f"{each.url} is ready again") == 1


def test_servers_are_probed_often_while_none_is_up(three, monkeypatch):
    monkeypatch.setattr(_endpoints, "PROBE_SECONDS", 600.0)
    monkeypatch.setattr(_endpoints, "MOST_PROBE_SECONDS", 600.0)
    coded = wrapped(three, Waiting(deadline=1.0, estimate=False))
    three[0].fault = broken
    until(lambda: torch.equal(coded(X), 2 * X) and coded.workers.num_ready == 2)
    three[0].fault = None
    for each in three[1:]:
        each.fault, each.ready = broken, False
    with contextlib.suppress(RuntimeError):
        coded(X)
    until(lambda: torch.equal(coded(X), 2 * X))


def test_starting_warns_of_a_model_whose_rows_depend_on_each_other(three):
    def centred(handler, rows):
        handler.answer(rows - rows.mean(0))
        return True

    coded = wrapped(three[:1])
    coded.workers.start(coded.module, X, timeout=WAIT)
    three[0].fault = centred
    with pytest.warns(UserWarning, match="EndpointWorkers: output of a row depends on the other"):
        coded.workers.start(coded.module, X, timeout=WAIT)


def test_servers_come_and_go(three):
    coded = wrapped(three[:1])
    pool = coded.workers
    pool.add(three[1].url)
    until(lambda: torch.equal(coded(X), 2 * X) and three[1].rows)
    pool.remove(three[1].url)
    count = len(three[1].rows)
    assert torch.equal(coded(X), 2 * X)
    assert len(three[1].rows) == count
    with pytest.raises(ValueError, match="url must be one of"):
        pool.remove(three[2].url)
    start = time.monotonic()
    pool.start(coded.module, X, timeout=WAIT)  # of the servers that are left
    assert time.monotonic() - start < WAIT / 2
    pool.add(three[2].url)
    pool.drain(0)
    assert copy.deepcopy(pool).urls == pool.urls == (three[2].url,)
    assert (pool.num_workers, pool.num_ready) == (1, 1)
    with pytest.raises(NotImplementedError, match="EndpointWorkers: the pool cannot be resized"):
        pool.resize(2)


def at_work(server, pool, task):
    """Return a request whose part a server computes, and the event that lets it go on."""
    arrived, gate = threading.Event(), threading.Event()
    server.fault = lambda handler, rows: arrived.set() or not gate.wait(WAIT)
    request = pool.open(RemoteModule(server.url, "double"), task)
    request.ask([Part(0, (0,))])
    assert arrived.wait(WAIT)
    return request, gate


def test_a_server_that_was_removed_at_work_can_be_added_again(three):
    pool = EndpointWorkers([three[0].url], model="double")
    request, gate = at_work(three[0], pool, task_of(X[None]))
    pool.remove(three[0].url)
    assert pool.urls == ()
    pool.add(three[0].url)
    assert pool.urls == (three[0].url,)
    assert request.idle == 4
    gate.set()
    events = [request.wait(WAIT) for _ in range(2)]  # the part that it had goes on
    assert events[1].error is None
    assert request.idle == 4
    request.close()
    pool.close()


def test_a_pool_that_is_closed_by_the_thread_of_its_loop_does_not_wait(three, monkeypatch):
    monkeypatch.setattr(_endpoints, "CLOSING_SECONDS", 3 * WAIT)
    pool = EndpointWorkers([three[0].url], model="double")

    async def close():
        start = time.monotonic()
        pool.close()
        return time.monotonic() - start

    assert run(close()) < WAIT


def test_a_server_that_does_not_accept_did_not_end_at_work():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:  # they fill the queue of the socket
            each.setblocking(False)
            each.connect_ex(full.getsockname())
        client = Client(None, connect_timeout=0.1)
        model = Model("double", (), ())
        with pytest.raises(EndpointError, match="could not be reached") as caught:
            run(client.infer(url, model, [], 1))
        assert not caught.value.lost
        for each in waiting:
            each.close()
        run(client.close())


def test_a_forked_process_opens_its_own_connections(three):
    module = RemoteModule(three[0].url, "double")
    pool = EndpointWorkers([three[0].url], model="double")
    module(X)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            said = b"1" if torch.equal(module(X[:1]), 2 * X[:1]) else b"0"
            try:
                pool.open(module, task_of(X[None]))
            except RuntimeError as error:
                said += b"1" if "in the process that started it" in str(error) else b"0"
            os.write(writer, said)
        finally:
            os._exit(0)
    os.close(writer)
    assert select.select([reader], [], [], WAIT)[0]
    assert os.read(reader, 9) == b"11"
    os.close(reader)
    os.waitpid(child, 0)
    assert torch.equal(module(X), 2 * X)
    pool.close()


def test_a_callable_says_which_servers_there_are(three):
    names = [three[0].url]
    pool = EndpointWorkers(lambda: names, model="double", refresh=0.05)
    assert pool.urls == (three[0].url,)
    names.append(three[1].url)
    until(lambda: len(pool.urls) == 2)
    del names[0]
    until(lambda: pool.urls == (three[1].url,))
    pool.close()


def test_an_excluded_server_returns_when_it_is_added_again(three):
    coded = wrapped(three)
    pool = coded.workers
    pool.exclude(0)
    coded(X)
    assert not three[0].rows
    pool.add(three[0].url)
    until(lambda: torch.equal(coded(X), 2 * X) and three[0].rows)


def test_a_server_computes_several_parts_at_a_time():
    with servers(1) as (server,):
        arrived = threading.Barrier(3, timeout=WAIT)
        server.fault = lambda handler, rows: arrived.wait() and False
        pool = EndpointWorkers([server.url], model="double", concurrency=3)
        with pool.open(RemoteModule(server.url, "double"), task_of(X.reshape(3, 4, 3))) as request:
            request.ask(numbered((0,), (1,), (2,)))
            events = [request.wait(WAIT) for _ in range(6)]
        assert all(e.error is None for e in events if isinstance(e, Reply))


def test_a_request_that_is_closed_is_cancelled(three):
    arrived, gone = threading.Event(), threading.Event()

    def hang(handler, rows):
        arrived.set()
        handler.connection.recv(1)  # returns when the client closes the connection
        gone.set()
        return True

    three[0].fault = hang
    pool = EndpointWorkers([three[0].url], model="double")
    with pool.open(RemoteModule(three[1].url, "double"), task_of(X.reshape(12, 1, 3))) as request:
        request.ask([Part(0, (0,))])
        request.wait(WAIT)
        assert arrived.wait(WAIT)
    assert gone.wait(WAIT)
    with pool.open(RemoteModule(three[1].url, "double"), task_of(X.reshape(12, 1, 3))) as request:
        request.ask([Part(0, (0,))])
        request.wait(WAIT)
    until(lambda: pool.open(RemoteModule(three[1].url, "double"), task_of(X[None])).idle == 4)


def test_no_log_and_no_error_has_a_secret(three, caplog):
    coded = wrapped(three, token="secret", headers={"X-Api-Key": "hidden"})
    for each in three:
        each.fault = no_http
    with pytest.raises(NotEnoughResults) as info:
        coded.run(X, waiting=Waiting(deadline=1.0))
    text = f"{caplog.text} {info.value} {info.value.report}"
    assert "broke the connection" in text
    with pytest.raises(EndpointError) as raised:
        RemoteModule(three[0].url, "double", token="secret", headers={"X-Api-Key": "hidden"})(X)
    assert raised.value.__context__ is None  # aiohttp's error holds the headers
    again = pickle.loads(pickle.dumps(coded))
    text += f"{again!r} {again.workers!r} {again.module!r} {again.workers._queue.client!r}"
    assert "secret" not in text
    assert "hidden" not in text


def test_a_token_goes_over_tls_or_loopback_only(three):
    with pytest.raises(ValueError, match="a token needs https"):
        EndpointWorkers(["http://10.0.0.1:8000"], model="double", token="secret")
    coded = wrapped(three, token="secret", headers={"X-Tenant": "me"})
    coded(X)
    assert three[0].headers["Authorization"] == "Bearer secret"
    assert three[0].headers["X-Tenant"] == "me"
    for again in (pickle.loads(pickle.dumps(coded)), copy.deepcopy(coded)):
        assert torch.equal(again(X), 2 * X)  # without the connections
        assert "secret" not in repr(again.workers)
    with pytest.raises(ValueError, match="value of each header must be printable, got 'Auth"):
        RemoteModule(three[0].url, "double", token="two\nlines")


@pytest.mark.parametrize(
    "url", ["a:8000", "http://a:8000/v2", "ftp://a", "http://u:p@a", "http://[", 3]
)
def test_an_endpoint_must_be_a_url(url):
    with pytest.raises(ValueError, match="an endpoint must be a URL"):
        EndpointWorkers([url], model="double")


def test_other_modules_are_refused(three):
    pool = EndpointWorkers([three[0].url], model="other")
    with pytest.raises(TypeError, match="module must be a RemoteModule"):
        CodedWrapper(nn.Identity(), workers=pool)(X)
    with pytest.raises(ValueError, match="must stand for the model 'other', got 'double'"):
        CodedWrapper(RemoteModule(three[0].url, "double"), workers=pool)(X)
    pool.close()
    pool.close()


def test_inputs_are_checked_before_they_are_sent(three):
    module = RemoteModule(three[0].url, "double")
    assert torch.equal(module(input=X), 2 * X)
    for wrong in (X.double(), X.tolist()):
        with pytest.raises(TypeError, match=r"input must be of torch.float32, got"):
            module(wrong)
    with pytest.raises(TypeError, match=r"input must be of torch.float32, got torch.float64"):
        wrapped(three)(X.double())
    with pytest.raises(TypeError, match="inputs must be input, got"):
        module(X, X)
    with pytest.raises(ValueError, match=r"the shape of input must be \[-1, 3\], got \[12, 0\]$"):
        module(X[:, :0])
    empty = wrapped(three).run(X[:0])
    assert torch.equal(empty[0], 2 * X[:0])
    assert "complete" in str(empty[1])
    with pytest.raises(EndpointError, match=r"RemoteModule: http.* answered 404: unknown"):
        RemoteModule(three[0].url, "another")
    with pytest.raises(EndpointError, match=r"http.* sent metadata with unusable inputs"):
        RemoteModule(three[0].url, "shapeless")
    with pytest.raises(ValueError, match="outputs must be some of output"):
        RemoteModule(three[0].url, "double", outputs=["logits"])
