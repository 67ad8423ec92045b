"""Test suites for pools and codes of your own: inherit, implement ``make``, and run pytest.

Example:
    .. code-block:: python

        from coded_torch.testing.codes import CodeTests

        class TestMine(CodeTests):
            def make(self):
                return Mine(20, 24)

This package needs pytest, and so it is imported by tests alone.
"""

import pytest

# Rewritten asserts explain themselves.
pytest.register_assert_rewrite(*(f"{__name__}.{name}" for name in ("codes", "helpers", "workers")))
