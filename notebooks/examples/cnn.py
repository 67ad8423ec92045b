"""A convolutional network for images of any size, on four replicas, one of which computes wrongly.

In place of ``Network``, take a network of torchvision, such as ``torchvision.models.resnet18``.
"""

import torch
from torch import nn

from coded_torch import CodedWrapper, workers


class Block(nn.Module):
    """Two convolutions, and a path around them."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Network(nn.Sequential):
    """Images ``[B, 3, height, width]`` to the logits of ten classes."""

    def __init__(self):
        stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        super().__init__(stem, Block(16), Block(16), *head)


def corrupt(rows, generator):
    """Return what a faulty worker returns in place of its results."""
    return rows + torch.randn(rows.shape, generator=generator)


if __name__ == "__main__":
    torch.manual_seed(0)
    model, images = Network().eval(), torch.rand(160, 3, 64, 64)
    replicas = workers.DeviceWorkers(["cpu"] * 4)  # or ["cuda:0", "cuda:1", ...]
    pool = workers.FaultyWorkers(replicas, attack=corrupt, adversaries=[2])
    with pool, torch.no_grad():
        coded = CodedWrapper(model, workers=pool, parts=16, verify=0.2)
        answers, report = coded.run(images)
        right = torch.isclose(answers, model(images), atol=1e-5).all(1)
        print(f"{int(right.sum())} of {len(images)} rows are the model's")
        print(f"worker {[*report.wrong_results]} returned wrong results, which were replaced")
