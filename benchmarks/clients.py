"""Clients of a server: ``python clients.py PORT COUNT PATH BODY``, without torch.

Each keeps a connection, and sends the next request when the last one is answered. For each number
that is read, a line each, they send so many requests together, and write how many were answered.
"""

from __future__ import annotations

import selectors
import socket
import sys

HANGS = 60.0  # seconds without any answer


def answered(connection: socket.socket) -> bool:
    """Read an answer, and return whether its status is 200."""
    data, end = b"", -1
    while end < 0 or len(data) < end:
        if not (more := connection.recv(65536)):
            raise ConnectionError("the server has closed a connection")
        data += more
        head, found, _ = data.partition(b"\r\n\r\n")
        if found:
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            end = len(head) + 4 + int(fields[b"content-length"])
    return data.startswith(b"HTTP/1.1 200 ")


def main(port: str, count: str, path: str, body: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    request, ready = (head + body).encode(), selectors.DefaultSelector()
    address = "127.0.0.1", int(port)
    connections = [socket.create_connection(address, timeout=HANGS) for _ in range(int(count))]
    for each in connections:
        ready.register(each, selectors.EVENT_READ, each)
    for line in sys.stdin:
        left, waiting, good = int(line), 0, 0
        for each in connections[:left]:
            each.sendall(request)
            left, waiting = left - 1, waiting + 1
        while waiting and (events := ready.select(HANGS)):
            for key, _ in events:
                good += answered(key.data)
                waiting -= 1
                if left:
                    key.data.sendall(request)
                    left, waiting = left - 1, waiting + 1
        print(good, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
