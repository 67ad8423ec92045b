"""A model of which rows may hang, spin or end its worker, and which has a wide output."""

import os
import signal
import time

import torch
from torch import nn


class Hostile(nn.Module):
    """Computes ten numbers of each image, and a wide output; the first number may be hostile."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(784, 10)

    def forward(self, input):
        first = input[:, 0, 0, 0]
        if bool((first == 666).any()):
            os.kill(os.getpid(), signal.SIGSEGV)
        if bool((first == 668).any()):
            time.sleep(3600)
        while bool((first == 669).any()):
            pass
        output = self.inner(input.flatten(1))
        return {"output": output, "wide": output.repeat_interleave(1000, 1)}


def make():
    return Hostile(), torch.randn(4, 1, 28, 28)
