"""Record an example as a picture that moves: ``python -m benchmarks.cast``.

The example runs. What it prints and logs appears line by line, as it did, but no wait is longer
than two seconds. The picture is ``results/example.svg``. It stands still for readers who ask for
less motion.
"""

from __future__ import annotations

import html
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from .runs import RESULTS

EXAMPLE = Path(__file__).resolve().parents[1] / "notebooks" / "examples" / "faults.py"
TARGET = RESULTS / "example.svg"
LINE, COLUMNS = 22, 58  # the height of a line in pixels, and its characters
LONGEST = 2.0  # seconds of a wait
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 500 {height}" role="img" \
aria-label="One worker dies, one hangs, one is wrong: all answers are the model's.">
<style>
text {{ font: 13px monospace; fill: #e6e6e6; white-space: pre; }}
@keyframes show {{ from {{ opacity: 0 }} to {{ opacity: 1 }} }}
.later {{ animation: show 0.2s backwards; }}
@media (prefers-reduced-motion: reduce) {{ .later {{ animation: none }} }}
</style>
<rect width="100%" height="100%" rx="8" fill="#1e1e1e"/>
"""


def recorded() -> list[tuple[float, str]]:
    """Run the example; return its lines with the seconds that passed before each."""
    lines, before = [(0.0, f"$ python {EXAMPLE.name}")], time.perf_counter()
    command = [sys.executable, "-u", str(EXAMPLE)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, **pipes) as process:
        for line in process.stdout:
            now = time.perf_counter()
            lines.append((now - before, line.rstrip()))
            before = now
    if process.returncode:
        raise RuntimeError(f"the example ended with code {process.returncode}")
    return lines


def drawn(lines: list[tuple[float, str]]) -> str:
    """Return the picture of lines, each of which appears so many seconds after the last."""
    at = 0.0
    shown: list[tuple[float, str]] = []
    for seconds, line in lines:
        if shown:  # the first line stands there from the begin, so that the picture is not empty
            at += min(seconds, LONGEST)
        shown += [(at, part) for part in textwrap.wrap(line, COLUMNS, subsequent_indent="  ")]
    text = HEAD.format(height=LINE * (len(shown) + 1))
    for i, (seconds, line) in enumerate(shown, 1):
        when = f' class="later" style="animation-delay: {seconds:.1f}s"' if seconds else ""
        text += f'<text x="16" y="{LINE * i + 5}"{when}>{html.escape(line)}</text>\n'
    return text + "</svg>\n"


if __name__ == "__main__":
    TARGET.write_text(drawn(recorded()))
