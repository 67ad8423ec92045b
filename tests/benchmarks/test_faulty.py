"""The faults of rows that the benchmark of verification injects."""

import pytest
import torch

from benchmarks import faulty


@pytest.fixture
def data():
    return faulty.Data(seed=1)


@pytest.fixture
def rows(data):
    return data.outputs[:4].clone()


def test_the_two_largest_outputs_are_swapped(data, rows):
    wrong = faulty.swap(data, rows)
    assert torch.equal(wrong.sort(1).values, rows.sort(1).values)
    assert (wrong.argmax(1) != rows.argmax(1)).all()


def test_one_row_or_one_number_of_another_row_or_a_block_of_all(data, rows):
    wrong = faulty.one_row(data, rows) != rows
    assert wrong.any(1).sum() == 1
    assert (faulty.one_output(data, rows) != rows).sum() == 1
    wrong = faulty.block(data, rows) != rows
    assert wrong.any(1).all()
    assert wrong.any(0).sum() == 2  # a quarter of 10


@pytest.mark.parametrize("bits", [faulty.EXPONENT, faulty.MANTISSA])
def test_one_bit_of_one_number_is_wrong_and_finite(data, rows, bits):
    wrong = faulty.one_bit(data, rows, *bits)
    assert (wrong != rows).sum() == 1
    assert wrong.isfinite().all()
