"""The trial of all CUDA kernels, ``coded-torch info --device cuda``, in a process of its own."""

import warnings
from functools import partial

import numpy as np
import torch
from torch.utils.benchmark import Timer

from .. import _extension
from ..linear import SplineMap
from . import say

# Knots, points and columns at which CUDA kernels are timed, as benchmarks/gpu_model.py.
_SHAPES = (
    (20, 100, 150_528), (64, 128, 65_536), (100, 20, 150_528), (96, 20, 120),
    (256, 320, 32_768), (1024, 1280, 8_192),
)  # fmt: skip
_CALLS = 20  # that are timed


def try_kernels(shrink: int = 1) -> None:
    """Print whether each kernel is right on each device, and times of six shapes."""
    warnings.simplefilter("ignore")  # what they say is printed
    kernels, width = torch.ops.coded_torch, 32
    for device in range(torch.cuda.device_count()):
        say(f"\ncuda:{device} {torch.cuda.get_device_name(device)}")
        for number in range(30):
            right = _extension._try_kernel(device, number)
            local = f"right, {kernels._local_bytes(device, number)} bytes of local memory a thread"
            state = local if right else _extension.CUDA_FAILURES[-1]
            say(f"{kernels._kernel_name(number):<{width}}{state}")
        with torch.cuda.device(device):
            say(f"\n{'float32, in microseconds':<{width}}  copy  matmul product   sweep")
            for n, N, columns in _SHAPES:
                spline = SplineMap(np.linspace(-1, 1, n), np.linspace(-1, 1, N), smoothing=1e-6)
                plan, schedule = (x.cuda() for x in spline._operands(torch.empty(0)))
                matrix = spline.matrix(torch.float32).cuda()
                both = torch.cat([plan, matrix.T.reshape(1, -1)], 1)
                values = torch.randn(n, 1, columns // shrink, device="cuda")
                half = torch.empty((n + N) * values.shape[2] // 2, device="cuda")
                calls = (
                    half.clone,
                    partial(torch.matmul, matrix, values[:, 0]),
                    partial(kernels.spline_apply, values, both, schedule, False),
                    partial(kernels.spline_apply, values, plan, schedule, False),
                )
                timers = [Timer("call()", globals={"call": call}) for call in calls]
                times = "  ".join(f"{timer.timeit(_CALLS).mean * 1e6:6.0f}" for timer in timers)
                say(f"{f'{n} -> {N} x {values.shape[2]:,}':<{width}}{times}")
