import pytest

# The inherited suite is no test module by name, and its asserts should explain themselves.
pytest.register_assert_rewrite(f"{__name__}.code_tests")
