"""The command as forks of one process, which has imported torch: that takes seconds."""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys

from coded_torch.testing.helpers import WAIT

# It runs on asyncio's own loop, as without uvloop, which is not among the dependencies. A fork in
# between waits for the command and tells its process id and exit code.
_PROGRAM = """
import sys; sys.modules["uvloop"] = None
import json, os, signal, socket
import coded_torch.serve
from coded_torch.cli.main import main

orders = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    order, descriptors, _, _ = socket.recv_fds(orders, 2**16, 3)
    if not order:
        sys.exit()
    if os.fork():
        for each in descriptors:
            os.close(each)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    orders.close()
    *output, status = descriptors
    if pid := os.fork():
        os.write(status, f"{pid}\\n".encode())
        for each in output:
            os.close(each)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, f"{code}\\n".encode())
        os._exit(0)
    os.close(status)
    for number, each in enumerate(output, start=1):
        os.dup2(each, number)
        os.close(each)
    folder, environment, first, arguments = json.loads(order)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    exec(first)
    sys.argv = ["coded-torch", *arguments]
    sys.exit(main(arguments))
"""


@functools.cache
def _orders():
    """Return the socket of the process, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        line = [sys.executable, "-c", _PROGRAM, str(theirs.fileno())]
        # Not in the checkout, whose package may not be built: Python looks there first.
        process = subprocess.Popen(line, pass_fds=[theirs.fileno()], cwd="/")
    atexit.register(process.wait)
    atexit.register(ours.close)  # which comes first
    return ours


class Command:
    """A command that runs in a folder, with its standard output and its process id.

    Args:
        arguments: of ``coded-torch``.
        folder: the working directory, which Python imports from.
        log: the file for the standard error.
        first: a program that runs first.
    """

    def __init__(self, arguments, folder, log, first=""):
        output, theirs = os.pipe()
        status, told = os.pipe()
        order = json.dumps([str(folder), dict(os.environ), first, arguments]).encode()
        socket.send_fds(_orders(), [order], [theirs, log.fileno(), told])
        os.close(theirs)
        os.close(told)
        self.stdout = os.fdopen(output)
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline())
        self.returncode = None

    def send_signal(self, number):
        if self.returncode is None and not select.select([self._status], [], [], 0)[0]:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def wait(self, seconds):
        """Return the exit code, as of a process that :mod:`subprocess` has started."""
        if self.returncode is None:
            assert select.select([self._status], [], [], seconds)[0]
            self.returncode = int(self._status.readline())
        return self.returncode

    def end(self):
        """Kill the command, and wait until nothing that it has started holds its output."""
        self.send_signal(signal.SIGKILL)
        self.wait(WAIT)
        with self.stdout, self._status:
            while select.select([self.stdout], [], [], WAIT)[0]:
                if not os.read(self.stdout.fileno(), 2**16):
                    return
        raise AssertionError("a process of the command holds its output")
