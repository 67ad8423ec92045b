"""Questions put to coded computing, a file each: ``python -m benchmarks``, see README.md."""

import sys
from pathlib import Path

# `python -m` puts the checkout first on the path, where the compiled parts of coded_torch may be
# missing: an installed package goes before it.
_checkout = str(Path(__file__).resolve().parents[1])
if sys.path[0] == _checkout:
    sys.path.append(sys.path.pop(0))
