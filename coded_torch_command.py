"""The command ``coded-torch``, beside the package, so that Ctrl-C ends even its long imports."""

import atexit
import os
import shlex
import signal
import sys
from importlib import metadata


def main() -> int:
    """Import and run the command. After Ctrl-C, end without taking all packages apart."""
    if sys.argv[1:] == ["--version"]:  # importing torch would take seconds
        print(f"coded_torch {metadata.version('coded_torch')}")
        return 0

    def end(*_: object) -> None:  # nothing is begun, but imports may catch a KeyboardInterrupt
        line = [*sys.argv[1:], *(() if "--resume" in sys.argv else ["--resume"])]
        how = f"Go on with: coded-torch {shlex.join(line)}\n" if line[0] == "job" else ""
        os.write(2, f"{how}interrupted\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell's background ignores it
        signal.signal(signal.SIGINT, end)
    from coded_torch.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    if (code := run()) == 130:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
