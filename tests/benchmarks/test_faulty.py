"""The faults of rows that the benchmark of verification injects."""

import pytest
import torch

from benchmarks import faulty

ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def draws():
    return torch.Generator().manual_seed(1)


def other(places):
    return ROWS[places - 1]


def test_the_two_largest_outputs_are_swapped():
    wrong = faulty.swap(ROWS)
    assert torch.equal(wrong.sort(1).values, ROWS.sort(1).values)
    assert (wrong.argmax(1) != ROWS.argmax(1)).all()


def test_one_row_or_one_number_of_another_row_or_a_block_of_all():
    wrong = faulty.one_row(ROWS, other, draws()) != ROWS
    assert wrong.any(1).sum() == 1
    assert (faulty.one_output(ROWS, other, draws()) != ROWS).sum() == 1
    wrong = faulty.block(ROWS, other, draws()) != ROWS
    assert wrong.any(1).all()
    assert wrong.any(0).sum() == 1  # a quarter of 6


@pytest.mark.parametrize("bits", [faulty.EXPONENT, faulty.MANTISSA])
def test_one_bit_of_one_number_is_wrong_and_finite(bits):
    wrong = faulty.one_bit(ROWS, *bits, draws())
    assert (wrong != ROWS).sum() == 1
    assert wrong.isfinite().all()
