"""Two inference servers behind one wrapper. One hangs while calls go on.

The servers are ``coded-torch serve`` with a model of this file. Any servers of the Open Inference
Protocol do, such as Triton or KServe.
"""

import contextlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

from coded_torch import CodedWrapper, workers


def make():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3).eval(), torch.eye(4)


@contextlib.contextmanager
def server():
    """Start a server at a free port; yield its process and its address, and end it."""
    main = "import sys; from coded_torch.cli.main import main; sys.exit(main())"
    line = [sys.executable, "-c", main, "serve", "fleet:make", "--port", "0", "--num-workers", "1"]
    folder = Path(__file__).parent
    with subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            for said in process.stdout:
                if address := re.search(r"http://[\d.]+:\d+", said):
                    yield process, address[0]
                    break
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.stdout.read()


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(server()) for _ in range(2)]
        urls = [url for _, url in servers]
        remote = workers.RemoteModule(urls[0], "make", outputs=["output"])
        pool = stack.enter_context(workers.EndpointWorkers(urls, model="make"))
        coded = CodedWrapper(remote, workers=pool, parts=4)
        model, _ = make()
        right = 0
        for call in range(30):
            if call == 15:  # by now, the wrapper knows how long a part takes
                servers[1][0].send_signal(signal.SIGSTOP)  # the second server hangs
            rows = torch.randn(12, 4)
            with torch.no_grad():
                right += int(torch.isclose(coded(rows), model(rows), atol=1e-5).all(1).sum())
        print(f"{right} of 360 rows are the model's")
