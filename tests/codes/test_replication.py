import pytest
import torch

from coded_torch.codes import ReplicationCode
from coded_torch.testing.codes import DTYPES, CodeTests, normal


class TestReplicationCode(CodeTests):
    def make(self):
        return ReplicationCode(6, 21)


class TestUncoded(CodeTests):
    def make(self):
        return ReplicationCode(20, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_with_an_answer_of_their_own_inputs_come_back_bit_for_bit(dtype):
    code = ReplicationCode(4, 10)
    results = normal(10, 33, dtype=dtype) * 100
    received = [9, 2, 6, 1, 5]  # inputs 1, 2, 2, 1, 1
    answers = code.decode(results[received], received)
    assert torch.equal(answers[[1, 2]], results[[1, 2]])
    mean = results[[1, 2]].double().mean(0).to(dtype)
    torch.testing.assert_close(answers[[0, 3]], mean.expand(2, -1))
    assert torch.equal(answers[0], answers[3])


def test_workers_compute_the_inputs_in_turn():
    code = ReplicationCode(3, 8)
    inputs = normal(3, 5)
    assert torch.equal(code.encode(inputs), inputs[[0, 1, 2, 0, 1, 2, 0, 1]])


def test_every_input_counts_once_in_the_mean():
    code = ReplicationCode(3, 9)
    answers = code.decode(torch.tensor([1.0, 1.0, 1.0, 4.0]), [0, 3, 6, 1])
    assert answers.tolist() == [1.0, 4.0, 2.5]


def test_inputs_with_an_answer_of_their_own():
    code = ReplicationCode(3, 9)
    assert (code.source([8, 2, 3]) >= 0).tolist() == [True, False, True]
    assert (code.source(torch.tensor([1])) >= 0).tolist() == [False, True, False]
    assert (code.source([]) >= 0).tolist() == [False, False, False]
    assert (code.source(range(9)) >= 0).all()
    with pytest.raises(ValueError, match=r"received must lie in 0\.\.8, got 9"):
        code.source([9])


def test_every_input_needs_a_worker():
    with pytest.raises(ValueError, match="num_workers must be at least num_data, 5, got 4"):
        ReplicationCode(5, 4)
