"""The shipped digits and network, and what the demo makes of them."""

import importlib.resources
import math

import pytest
import torch

from coded_torch.codes import RegressionCode
from coded_torch.demo.lenet5 import LeNet5, digits, lenet5
from coded_torch.demo.situations import draw, situations
from coded_torch.evaluation.compare import Comparison, Row


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


def test_what_becomes_of_answers(shipped):
    model, images, labels = shipped
    batches, classes = images[:480].split(240), labels[:480].split(240)
    found = {each.name: each for each in situations(model, batches, classes, (24, 20, 4))}
    all_answer, lost, replication = found.values()
    assert (all_answer.exact, all_answer.predicted) == (480, 0)
    assert math.isnan(all_answer.radius)
    assert math.isnan(all_answer.error)
    assert all_answer.right == (model(images[:480]).argmax(-1) == labels[:480]).float().mean()
    for each in found.values():
        assert each.exact + each.predicted == 480
    assert lost.predicted > 0
    assert lost.error / 2 < lost.radius < 4 * lost.error
    assert lost.error < replication.error
    assert replication.right < lost.right


def test_predicted_logits_are_drawn_with_their_bars(shipped):
    model, images, _ = shipped
    row = Row((2, 1, 1), "a code", RegressionCode(1, 2), [1.0, 0.1], [1.0, 0.1], None)
    figure = draw(Comparison([row]), model, images[:240], (24, 20, 4))
    left, axes = figure.axes
    assert left.get_title() == "1 inputs a group on 2 workers"
    (own,) = [line for line in axes.lines if line.get_label() == "computed by the model"]
    points, _, (bars,) = axes.containers[0]
    assert len(own.get_ydata()) == len(points.get_ydata()) == len(bars.get_segments()) > 20
    assert (own.get_ydata()[1:] >= own.get_ydata()[:-1]).all()
    heights = torch.tensor([float(end[1] - start[1]) for start, end in bars.get_segments()])
    pairs = zip(points.get_ydata(), own.get_ydata(), strict=True)
    off = torch.tensor([abs(float(predicted - exact)) for predicted, exact in pairs])
    assert 0.4 < (off < heights / 2).double().mean() < 0.95  # .68 of normal errors
