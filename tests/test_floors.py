"""The oldest releases that the package allows: none has an advisory, as far as is known."""

import http.server
import json
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parents[1] / ".ci" / "audit"
# The first release without each package's last known advisory. November 2026.
MENDED = {
    "aiohttp": "3.14.4",  # CVE-2026-128131: quadratic time for many compressed streams in one
    "anyio": "4.4.0",  # a race of its event loops in threads
    "httptools": "0.6.3",  # CVE-2024-27982: smuggled requests
    "numpy": "1.22.2",  # CVE-2021-41495
    "orjson": "3.11.6",  # CVE-2025-67221: endless recursion
    "pyarrow": "23.0.1",  # CVE-2026-25087: use after free
    "starlette": "1.3.1",  # CVE-2026-54282, CVE-2026-54283, CVE-2026-48710: a Host that misleads
    "uvicorn": "0.42.0",  # no advisory, but quadratic time for a body in many pieces
}


def numbers(version):
    return [*map(int, version.split(".")), 0, 0][:3]


def test_no_floor_has_a_known_advisory():
    floors = runpy.run_path(str(AUDIT))["floors"]()
    assert floors.keys() >= MENDED.keys()
    for name, version in MENDED.items():
        assert numbers(floors[name]) >= numbers(version), name


@pytest.fixture
def index():
    """Yield the address of an index, and the advisories that it knows, by release."""
    known = {}

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, version, _ = self.path.strip("/").split("/")
            self.send_response(404 if known.get("gone") else 200)
            self.end_headers()
            found = known.get((name, version), [])
            self.wfile.write(json.dumps({"vulnerabilities": found}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", known
        server.shutdown()


def audit(url):
    done = subprocess.run([sys.executable, AUDIT, url], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_an_advisory_of_a_floor_fails(index):
    url, known = index
    version = runpy.run_path(str(AUDIT))["floors"]()["starlette"]
    code, said = audit(url)
    assert code == 0
    assert "releases were audited" in said
    known["starlette", version] = [{"id": "A-1", "withdrawn": "2026-01-01"}]
    assert audit(url)[0] == 0
    known["starlette", version] += [{"id": "A-2", "withdrawn": None}]
    code, said = audit(url)
    assert code == 1
    assert f"starlette {version}: A-2\n" in said


def test_an_audit_that_could_not_run_says_so(index):
    url, known = index
    known["gone"] = True
    for where in (url, "http://127.0.0.1:9"):
        code, said = audit(where)
        assert code == 0
        assert said.startswith("The audit did not run: ")
        assert said.count("\n") == 1
