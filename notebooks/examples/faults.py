"""Six worker processes, of which one dies, one hangs, and one returns wrong results."""

import os
import signal

import torch

from coded_torch import CodedWrapper, workers
from coded_torch.demo import digits, lenet5


def corrupt(rows, generator):
    """Return what a faulty worker returns in place of its results."""
    return rows + 10 * torch.randn(rows.shape, generator=generator)


if __name__ == "__main__":  # worker processes import this script
    model, images = lenet5(), digits()[0]
    pool = workers.ProcessWorkers(6, hang_timeout=3.0)
    with pool.start(model, images[:2]), torch.no_grad():
        faulty = workers.FaultyWorkers(pool, attack=corrupt, adversaries=[2])
        coded = CodedWrapper(model, workers=faulty, parts=24, verify=0.02)
        os.kill(pool.pids[0], signal.SIGKILL)  # one worker dies
        os.kill(pool.pids[1], signal.SIGSTOP)  # another one hangs
        answers, report = coded.run(images[:240])
        right = torch.isclose(answers, model(images[:240]), atol=1e-4).all(1)
        print(f"{report.ended}: {int(right.sum())} of 240 answers are the model's")
        print(f"worker {[*report.wrong_results]} returned wrong results, which were replaced")
