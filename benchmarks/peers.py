"""Other papers' schemes that are pairs of linear maps on one module, as codes for `compare`.

NeRCC (Moradi and Maddah-Ali, arXiv 2402.04377) nests two regressions, which are smoothing splines
whose two regularisations are chosen together. That is ``SplineCode`` with both smoothings tuned;
here they are tuned on a grid, where the paper optimises them. tests/benchmarks/test_peers.py checks
both maps against a dense solution of the penalised least squares.

SBACC (Borah and Harshan, arXiv 2507.01330) is Berrut's code with Chebyshev points of the first kind
for inputs and workers, so that results are a word of a code of the discrete cosine transform. The
test checks both maps against the paper's formula. Its decoder of wrong results is not here.
"""

from __future__ import annotations

from typing import Any

from coded_torch.codes import BerrutCode, Code, SplineCode
from coded_torch.codes.nodes import chebyshev_first


def peers(num_data: int, num_workers: int, **options: Any) -> dict[str, Code]:
    """Return the codes by the name of their scheme, NeRCC's with smoothings still to be tuned.

    ``compare(module, batches, more=peers)`` adds them to the table, and tunes NeRCC.
    """
    options = {"ordering": "arrival"} | options  # the papers' order
    points = chebyshev_first(num_workers)
    return {
        "NeRCC": SplineCode(num_data, num_workers, **options),
        "SBACC": BerrutCode(num_data, num_workers, worker_points=points, **options),
    }
