"""Triton's own client, unmodified, gets right answers."""

import pytest

from .servers import serving
from .triton import CASES, WRONG, check_case, check_metadata, check_wrong, triton_application


@pytest.fixture(scope="module")
def port():
    with serving(triton_application()) as port:
        yield port


def test_metadata(port):
    check_metadata(port)


@pytest.mark.parametrize(("rows", "datatype", "binary", "packed"), CASES)
def test_answers(port, rows, datatype, binary, packed):
    check_case(port, rows, datatype, binary, packed)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_400(port, name):
    check_wrong(port, name)
