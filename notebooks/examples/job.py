"""All rows of a file by ``coded-torch job``, whose answers are read from the folder of results."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))


if __name__ == "__main__":
    rows = np.random.default_rng(0).random((1000, 8), np.float32)
    np.save("rows.npy", rows)
    # In a shell: coded-torch job job:make --inputs rows.npy --output answers ...
    main = "import sys; from coded_torch.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "job", f"{Path(__file__).stem}:make"]
    command += ["--inputs", Path("rows.npy").resolve(), "--output", Path("answers").resolve()]
    options = ["--batch-size", "200", "--num-workers", "2", "--resume"]
    subprocess.run([*command, *options], cwd=Path(__file__).parent, check=True)
    files = sorted(Path("answers").glob("batch-*.pt"))
    batches = [torch.load(file, weights_only=True) for file in files]
    answers = torch.cat([batch["outputs"][0] for batch in batches])
    with torch.no_grad():
        same = torch.allclose(answers, make()(torch.from_numpy(rows)), atol=1e-5)
    print(f"{len(files)} batches, {len(answers)} rows, equal to the model's: {same}")
