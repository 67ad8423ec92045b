"""nginx and HAProxy before a server, configured as the page "Behind a proxy" says."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from coded_torch.serve import TensorSpec
from coded_torch.testing.helpers import until

from .servers import Client, built, serving, tensor

PAGE = Path(__file__).parents[2] / "notebooks" / "guides" / "proxies.md"
PATH = "/v2/models/m/infer"
HOST = {"Host": "api.example.com"}
WIDE = [TensorSpec("output", "FP32", (300_000,))]
ONE = {"inputs": [tensor([[1.0, 2.0, 3.0]])]}


class Wide(nn.Module):
    def forward(self, x):
        return x.repeat_interleave(100_000, 1)


@contextlib.contextmanager
def running(kind, folder, port):
    """Yield the port of a proxy before a server's port."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        own = found.getsockname()[1]
    text = re.search(rf"(?i)\n## {kind}.*?```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    text = text.replace("listen 8080", f"listen 127.0.0.1:{own}")
    text = text.replace("bind :8080", f"bind 127.0.0.1:{own}")
    command = ["haproxy", "-db", "-f", str(folder / "conf")]
    if kind == "nginx":
        paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{x}_temp_path {folder}/{x};\n" for x in paths)
        head = f"daemon off;\nuser root;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n"
        text = f"{head}http {{\naccess_log off;\n{temporary}{text}}}\n"
        command = ["nginx", "-c", str(folder / "conf"), "-p", str(folder)]
    (folder / "conf").write_text(text)
    with subprocess.Popen(command) as process:
        try:
            until(lambda: socket.socket().connect_ex(("127.0.0.1", own)) == 0 or process.poll())
            yield own
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed")
@pytest.mark.parametrize("kind", ["nginx", "haproxy"])
def test_a_server_behind_a_proxy(kind, tmp_path):
    if shutil.which(kind) is None:
        pytest.skip(f"{kind} is missing")
    hosts = {"allowed_hosts": ["api.example.com", "127.0.0.1"]}
    application = built(Wide(), outputs=WIDE, **hosts)
    with (
        serving(application) as port,
        running(kind, tmp_path, port) as front,
        Client(front) as client,
    ):
        until(lambda: client.send("GET", "/v2", **HOST)[0] == 200)
        status, headers, body = client.send("POST", PATH, json.dumps(ONE), **HOST)
        assert status == 200
        (output,) = json.loads(body)["outputs"]
        assert output["data"] == Wide()(torch.tensor([[1.0, 2.0, 3.0]]))[0].tolist()
        binary = ONE | {"parameters": {"binary_data_output": True}}
        status, headers, body = client.send("POST", PATH, json.dumps(binary), **HOST)
        assert len(body) - int(headers["Inference-Header-Content-Length"]) == 1_200_000
        status, _, body = client.send("POST", PATH, bytes(2_000_000), **HOST)
        assert (status, b"the body must be at most" in body) == (413, True)
        assert client.send("POST", "/v2/repository/models/m/load", **HOST)[0] == 403
        assert client.send("GET", "/metrics", **HOST)[0] == 403
        assert client.send("GET", "/v2", Host="evil.example")[0] == 403
        with Client(port) as direct:  # the proxy itself is not what refuses loads alone
            forwarded = {"X_Forwarded_For": "192.0.2.1"} | HOST
            assert direct.send("POST", "/v2/repository/models/m/load", **forwarded)[0] == 403
        head = f"POST {PATH} HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n"
        with socket.create_connection(("127.0.0.1", front)) as half:
            content = json.dumps(ONE).encode()
            half.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            half.shutdown(socket.SHUT_WR)
            assert half.recv(12) == b"HTTP/1.1 200"
