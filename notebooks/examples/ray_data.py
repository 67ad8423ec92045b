"""Ray Data: answers of a wrapper, and what is known of each row, as columns of a dataset."""

import torch

from coded_torch import CodedWrapper, workers


class Answered:
    """An actor of Ray Data, for ``Dataset.map_batches``. It keeps its workers between batches."""

    def __init__(self, load_model):
        pool = workers.ProcessWorkers(2)
        self.coded = CodedWrapper(load_model(), workers=pool)

    def __call__(self, batch):
        with torch.no_grad():
            answers, report = self.coded.run(torch.tensor(batch["data"]))
        known = report.rows("estimated", "error_bound")
        return batch | {"answer": answers.numpy()} | {x: y.numpy() for x, y in known.items()}


# ray.data.read_parquet("rows").map_batches(Answered, fn_constructor_args=(make,), concurrency=1)
