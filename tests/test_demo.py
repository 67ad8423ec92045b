"""The shipped digits and network."""

import importlib.resources

import pytest
import torch

from coded_torch.demo import LeNet5, digits, lenet5


@pytest.fixture(scope="module")
def shipped():
    return lenet5(), *digits()


def test_digits(shipped):
    _, images, labels = shipped
    assert images.shape == (2000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal((images * 255).round() / 255, images)
    assert labels.dtype == torch.int64
    # Rows 0, 5, 10, ... of the official test set, whose first labels are 7 2 1 0 4 1 4 9 5 9 0.
    assert labels[:3].tolist() == [7, 1, 0]
    assert labels.bincount().tolist() == [189, 222, 212, 242, 196, 186, 158, 215, 193, 187]


def test_lenet5_reads_the_shipped_digits(shipped):
    model, images, labels = shipped
    assert not model.training
    with torch.inference_mode():
        right = (model(images).argmax(-1) == labels).double().mean()
    assert right >= 0.990  # measured: 0.991; rounding may turn a digit or two


def test_lenet5_is_the_classic_size():
    assert sum(p.numel() for p in LeNet5().parameters()) == 61_706


def test_notice():
    notice = (importlib.resources.files("coded_torch") / "data" / "NOTICE").read_text()
    for needed in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0", "every fifth", "Changed"):
        assert needed in notice
