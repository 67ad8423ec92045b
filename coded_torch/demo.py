"""The network and the digits that ship in the package."""

import importlib.resources

import numpy as np
import torch
from torch import Tensor, nn


class LeNet5(nn.Sequential):
    """LeNet-5 (LeCun et al., 1998): images ``[B, 1, 28, 28]`` with pixels in 0..1 to 10 logits.

    The layers have today's usual form, with ReLU, maximum pooling and a linear last layer.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )


def lenet5() -> LeNet5:
    """Return the trained LeNet-5, in evaluation mode. It reads 99.10 % of :func:`digits`.

    ``benchmarks/networks.py`` trained it.
    """
    with torch.device("meta"):  # no weights are drawn from the global random state
        model = LeNet5()
    weights = {name: torch.from_numpy(w).float() for name, w in _arrays("lenet5.npz").items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def digits() -> tuple[Tensor, Tensor]:
    """Return real digits: images float32 ``[2000, 1, 28, 28]`` in 0..1, labels int64 ``[2000]``.

    Every fifth of the official MNIST test digits; the network has not seen them in training.
    """
    arrays = _arrays("digits.npz")
    images = torch.from_numpy(arrays["images"]).unsqueeze(1).float() / 255
    return images, torch.from_numpy(arrays["labels"]).long()


def lenet5_and_digits() -> tuple[LeNet5, tuple[Tensor]]:
    """Return the network and 63 digits for ``coded-torch serve``; the first ten are 0 to 9."""
    images, labels = digits()
    rows = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    return lenet5(), (images[rows + [row for row in range(63) if row not in rows]],)


def _arrays(file: str) -> dict[str, np.ndarray]:
    with (importlib.resources.files("coded_torch") / "data" / file).open("rb") as stream:
        return dict(np.load(stream))
