"""Rows on all GPUs, then coded computing on one GPU. Without a GPU, the CPU stands in."""

import torch
from torch import nn

from coded_torch import CodedWrapper, codes, stragglers, workers

if __name__ == "__main__":
    cards = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    print(f"{len(cards)} cards" if cards else "no card: the CPU stands in")
    devices = cards or ["cpu", "cpu"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 5)).to(devices[0]).eval()
    batch = torch.randn(240, 12, device=devices[0])
    with torch.no_grad():
        exact = model(batch)
        with workers.DeviceWorkers(devices) as pool:  # a replica for each device
            answers = CodedWrapper(model, workers=pool, parts=4)(batch)
        print("rows: equal to the model's:", torch.allclose(answers, exact, atol=1e-4))

        pool = workers.LocalWorkers(stragglers.Uniform(4, seed=0))  # 4 of 24 results are lost
        answers = CodedWrapper(model, codes.SplineCode(20, 24), workers=pool)(batch)
        error = (answers - exact).norm() / (exact - exact.mean(0)).norm()
        print(f"coded: on {answers.device.type}, error below the outputs' spread:", bool(error < 1))
