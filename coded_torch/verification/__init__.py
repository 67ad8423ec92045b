"""Find workers that return wrong results: a few rows are computed twice.

Nothing here waits, or reads a clock but the table's: :class:`Verifier` is a waiting policy
(:mod:`coded_torch.scheduling`) around another one.
"""

from .record import Record
from .scores import Results, Scores
from .verifier import Verifier

__all__ = ["Record", "Results", "Scores", "Verifier"]
