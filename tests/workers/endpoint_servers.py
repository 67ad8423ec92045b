"""Small servers of the Open Inference Protocol, without torch, that misbehave on purpose."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

SPEC = {"datatype": "FP32", "shape": [-1, 3]}
META = {
    "name": "double",
    "inputs": [{"name": "input", **SPEC}],
    "outputs": [{"name": "output", **SPEC}],
}


class DoubleServer:
    """A server that returns twice its input.

    Attributes:
        binary: whether it takes binary tensors; None if it does not tell.
        fault: a function of a handler and the rows that answers in place of the server, and returns
            whether it did.
        rows: the rows of every request that was answered.
        headers: the headers of the last request.
        ready: whether ``/v2/health/ready`` says so.
        num_connections: how many were opened.
        nan: how JSON has it.
        outputs: the descriptions of the outputs.
        wanted: the names of the outputs that the last request asked for.
        head: what the JSON of answers has beside the outputs, in place of the usual.
    """

    def __init__(self, binary=True, echoes=True, context=None):
        self.binary, self.fault, self.rows, self.headers = binary, None, [], {}
        self.ready, self.delay, self.num_connections = True, 0.0, 0
        self.echoes, self.head, self.scheme = echoes, {}, "https" if context else "http"
        self.nan, self.outputs, self.wanted = "NaN", META["outputs"], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"{self.scheme}://127.0.0.1:{self.server.server_address[1]}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def handler(owner):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self):
                owner.num_connections += 1
                super().setup()

            def log_message(self, *_):
                pass

            def send(self, status, body, **headers):
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                owner.headers = dict(self.headers)
                if self.path.endswith("/ready"):
                    self.send(200 if owner.ready else 503, b"")
                elif self.path == "/v2" and owner.binary is not None:
                    known = ["binary_tensor_data"] if owner.binary else []
                    self.send(200, json.dumps({"name": "test", "extensions": known}).encode())
                elif self.path == "/v2/models/double":
                    self.send(200, json.dumps(META | {"outputs": owner.outputs}).encode())
                elif self.path == "/v2/models/shapeless":
                    self.send(200, json.dumps(META | {"inputs": [{"name": "input"}]}).encode())
                else:
                    self.send(404, b'{"error": "unknown"}')

            def do_POST(self):
                owner.headers = dict(self.headers)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                length = self.headers.get("Inference-Header-Content-Length")
                if length and not owner.binary:
                    self.send(400, b'{"error": "tensors must be JSON"}')
                    return
                head = json.loads(body[: int(length)] if length else body)
                (entry,), self.head = head["inputs"], {"model_name": "double"}
                owner.wanted = [each["name"] for each in head["outputs"]]
                if owner.echoes and "id" in head:
                    self.head["id"] = head["id"]
                if length:
                    rows = np.frombuffer(body[int(length) :], "<f4").reshape(entry["shape"])
                else:
                    rows = np.array(entry["data"], "f4").reshape(entry["shape"])
                if owner.fault is not None and owner.fault(self, rows):
                    return
                if owner.delay:
                    time.sleep(owner.delay)
                owner.rows.append(rows)
                self.answer(2 * rows)

            def answer(self, array, **changes):
                """Answer with an array; ``changes`` replace fields of the output's description."""
                out = {"name": "output", "datatype": "FP32", "shape": list(array.shape)}
                tail = b""
                if owner.binary:
                    tail = array.astype("<f4").tobytes()
                    out["parameters"] = {"binary_data_size": len(tail)}
                else:
                    out["data"] = array.ravel().tolist()
                message = self.head | {"outputs": [out | changes]} | owner.head
                head = json.dumps(message).replace("NaN", owner.nan).encode()
                sizes = {"Inference_Header_Content_Length": str(len(head))} if owner.binary else {}
                with contextlib.suppress(OSError):  # the client may have gone
                    self.send(200, head + tail, **sizes)

        return Handler


def sending(status, body=b"{}", **headers):
    """Return a fault that sends an answer."""
    return lambda handler, rows: handler.send(status, body, **headers) or True


@contextlib.contextmanager
def servers(count, **options):
    """Yield some servers, and close them."""
    made = [DoubleServer(**options) for _ in range(count)]
    try:
        yield made
    finally:
        for server in made:
            server.close()
