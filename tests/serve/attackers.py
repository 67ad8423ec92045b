"""Attackers of a server of LeNet-5: ``python attackers.py KIND PORT``, 20 requests a second.

Only Python's own library is imported, so that attackers start soon and take little time.
"""

import contextlib
import gzip
import json
import socket
import sys
import threading
import time

PATH = "/v2/models/lenet5/infer"
RATE = 20.0
HELD = 10.0  # seconds for which an attacker holds a connection, unless the server ends it


def body(rows, numbers, output="output"):
    entry = {"name": "input", "datatype": "FP32", "shape": [rows, 1, 28, 28], "data": []}
    message = {"inputs": [entry], "outputs": [{"name": output}]}
    return json.dumps(message).encode().replace(b"[]", b"[" + numbers + b"]")


def post(content, *headers, length=None, path=PATH):
    lines = [f"POST {path} HTTP/1.1", *(headers or ["Host: 127.0.0.1"])]
    lines += [f"Content-Length: {len(content) if length is None else length}", "", ""]
    return "\r\n".join(lines).encode() + content


def packed(content):
    return post(gzip.compress(content, 9), "Host: 127.0.0.1", "Content-Encoding: gzip")


def chunked(path=PATH):
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()


ONE = ",".join(["0.123456789"] * 784).encode()
WRONG = b",".join([ONE] * 63 + [ONE[:-1] + b"x"])
FOREIGN = "Host: evil.example", "Content-Type: text/plain"
LOCAL = "Host: 127.0.0.1"
LOAD = "/v2/repository/models/lenet5/load"


NUMBER = b"0.123456789"
DIGITS = b"#" * 9  # each attack replaces them by its own


def row(first, second=NUMBER):
    return body(1, b",".join([first, second, *[NUMBER] * 782]))


def rows(first):
    """Return 64 rows, which all differ from each other and from rows of other attacks."""
    different = [b"%b,%d.%b" % (first, i, DIGITS) for i in range(64)]
    return body(64, b",".join([start + (b"," + NUMBER) * 782 for start in different]))


#: By name of an attack: the bytes that its client sends first, the bytes that it then repeats, and
#: how it goes on. It reads one piece of the answer, reads all, reads nothing, or sends no more.
KINDS = {
    "lists, 200 KB packed": (lambda: packed(body(1, b"[]," * 2**26)), b""),
    "objects, 2 KB packed": (lambda: packed(b'{"inputs": [' + b'{"a":[{}]},' * 150_000), b""),
    "zeros, 3 KB packed": (lambda: packed(body(1, b"0," * 1_000_000)), b""),
    "1 MB of numbers, one wrong": (lambda: post(body(64, WRONG)), b""),
    "1.5 MB of lists": (lambda: post(body(64, b",".join([b"[]"] * 500_000))), b""),
    "no body": (lambda: post(b"", length=1000), b""),
    "half a body": (lambda: post(bytes(10**6), length=10**6 + 1), b""),
    "a slow body": (lambda: post(b"{", length=10**6), b" " * 100),
    "headers without end": (lambda: b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 10_000),
    "idle": (lambda: b"", b""),
    "a foreign page": (lambda: post(body(1, ONE), *FOREIGN), b""),
    "malformed": (lambda: post(body(1, b"null")), b""),
    "chunks of one byte": (chunked, b"1\r\na\r\n" * 20_000),
    "chunk extensions": (chunked, b"1;e=" + b"a" * 15_000 + b"\r\na\r\n"),
    "a body for nobody": (lambda: post(b"", LOCAL, length=10**14, path="/v2"), bytes(2**16)),
    "many requests at once": (lambda: b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200, b""),
    "20 MB of spaces": (lambda: post(body(1, b" " * 20_000_000 + ONE)), b""),
    "9 MB of numbers, one wrong": (lambda: post(body(1024, b",".join([ONE] * 15 + [WRONG]))), b""),
    "hanging rows": (lambda: post(row(b"668")), b""),
    "crashing rows": (lambda: post(row(b"666")), b""),
    "spinning rows": (lambda: post(row(b"669")), b""),
    "hanging rows, all different": (lambda: post(row(b"668", b"0." + DIGITS)), b""),
    "crashing rows, all different": (lambda: post(row(b"666", b"0." + DIGITS)), b""),
    "spinning rows, all different": (lambda: post(row(b"669", b"0." + DIGITS)), b""),
    "64 hanging rows, all different": (lambda: post(rows(b"668")), b""),
    "wide answers": (lambda: post(body(64, b",".join([ONE] * 64), "wide")), b"", "all"),
    "wide answers, unread": (lambda: post(body(64, b",".join([ONE] * 64), "wide")), b"", "nothing"),
    "loads": (lambda: post(b"", LOCAL, path=LOAD), b""),
    "half-closed": (lambda: post(body(1, ONE)), b"", "ends"),
    "gone": (lambda: post(body(1, ONE)), b"", "gone"),
}  # fmt: skip


def attack(port, first, more, how=""):
    """Send what is wrong, and wait for the end of the connection."""
    until = time.monotonic() + HELD
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), timeout=HELD) as connection,
    ):
        connection.sendall(first)
        if how == "gone":
            return
        if how == "ends":
            connection.shutdown(socket.SHUT_WR)
        if how == "nothing":
            time.sleep(HELD)
        while more and time.monotonic() < until:
            connection.sendall(more)
            time.sleep(0 if len(more) > 1000 else 0.05)
        while time.monotonic() < until and connection.recv(65536):
            if first[:4] == b"POST" and not (more or how == "all"):
                break  # it is answered


def main(kind, port):
    make, *rest = KINDS[kind]
    first = make()
    print("ready", flush=True)
    start = time.monotonic()
    for i in range(100_000):
        time.sleep(max(0.0, start + i / RATE - time.monotonic()))
        different = first.replace(DIGITS, b"%09d" % i)
        threading.Thread(target=attack, args=(port, different, *rest), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
