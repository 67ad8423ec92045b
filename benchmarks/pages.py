"""The pages of long tables, which ``report.py`` writes into the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Page(NamedTuple):
    """A page of long tables, each with its heading, and pictures, each with its description."""

    title: str
    text: str
    tables: Mapping[str, str]
    pictures: Sequence[tuple[str, str]] = ()


PAGES = {
    "codes": Page(
        "Codes",
        "All schemes answer the same batches from the same received sets. Intervals are Student's, "
        "at 95 %: over five trainings of LeNet-5 and five splits of the table, else over batches, "
        "and paired where schemes are compared. They are not corrected for the number of "
        "comparisons, one for each row of the leaderboard but `RegressionCode`'s. Rates below 1 % "
        "have exact intervals, as if rows were independent.",
        {
            "lost": "LeNet-5 at (24, 20, 4) in batches of 240, squared error by the lost workers",
            "parm": "ParM beside the schemes of `compare`, LeNet-5 at (3, 2, 1)",
        },
    ),
    "leaderboard": Page(
        "Leaderboard",
        "One row for each setting and scheme, the least squared error of a setting first. All "
        "schemes of a setting answer the same batches. Logits are decoded. `python -m benchmarks` "
        "with the words in the last column measures a setting; with `--rows FOLDER` it writes the "
        "raw rows, one for each batch and scheme.\n\nTo add a row to a setting, add "
        '`"NAME": YourCode(k, n)` to the codes that `peers` in '
        "`coded_torch/evaluation/compare.py` returns. Measure the setting anew: append `--again` "
        "to the command in its last column. Then run `python -m benchmarks.report`, which makes "
        "this page again. Results of another processor or version are not mixed: there, move "
        "`benchmarks/results/accuracy.json` away and run `python -m benchmarks accuracy`. "
        "Your row joins the page; it is also a scheme of every later `compare`.",
        {"leaderboard": "All settings"},
    ),
    "coverage": Page(
        "Error bars",
        "Wrappers answer held-out batches of 240 rows, with 8 of 24 parts missing: 50 batches, "
        "20 received sets each. The oracle's constant contains as many errors of a data set as are "
        "wanted. A label is certified at a risk of at most .05.",
        {
            "coverage": "Radii at a nominal coverage of .95, and labels",
            "coverages": "The worst data set of each setting",
            "rivals": "Rivals at .95, on one received set a batch",
        },
        [("coverage", "coverage against its nominal level, and radii, by data set")],
    ),
    "metrics": Page(
        "Metrics",
        "Squared error relative to the choice among all metrics on the results.",
        {"distances": "The choice, and the baselines, (24, 20, 4)", "metrics": "Each metric alone"},
    ),
    "surrogates": Page(
        "Surrogates",
        "The wrapper at (6, 4, 2) on batches of 64. Squared errors are relative to the same code "
        "without a surrogate.",
        {
            "memories": "A memory, by thirds of a stream that starts cold",
            "useless": "Surrogates that do not fit",
        },
    ),
    "waiting": Page(
        "Waiting",
        "Latencies that one request in a thousand exceeds, in medians of a part, and the share of "
        "predicted answers, simulated. Then percentiles on real processes.",
        {"waiting": "By regime", "fan_out": "By the number of parts", "latency": "Real processes"},
    ),
    "resilience": Page(
        "Resilience",
        "Times are milliseconds. A minus sign turns a bar around.",
        {"resilience": "Bars"},
    ),
    "serving": Page(
        "Serving",
        "Saturation is measured by wrk with kept connections, one row a request. The model sleeps "
        "1 ms a row on two processes. *Direct* is the same server, whose batcher calls the model "
        "in threads of its own. LitServe and Ray Serve have as many processes and batches as "
        "large.\n\n"
        "Under faults, requests of 1 to 8 digits arrive at random, and latencies count from when a "
        "request was due, in milliseconds. Every row is compared with what the module computes.",
        {"saturation": "Rows a second, by connections", "serving": "LeNet-5 under faults"},
    ),
    "fleets": Page(
        "Fleets and jobs",
        "Six servers of the Open Inference Protocol answer in 5 ms ± 2 ms, or later. Requests "
        "arrive at random. `CodedWrapper` on `EndpointWorkers` may hedge as much as hedge-python "
        "0.3.0 does with its defaults, exactly, or with a deadline of 15 ms and a memory. Tenacity "
        "tries again after 25 ms. Latencies, in milliseconds, are of requests that were answered. "
        "Under faults a request has four parts, our deadline is 100 ms, and `verify=0.02` is set "
        "where a server returns wrong numbers.\n\n"
        "Jobs are 50,000 rows in batches of 256 on six worker processes, which sleep 7.2 ms a row. "
        "Tasks of the others are as large as parts of `CodedWrapper.map`. All workers are up "
        "before the time begins.",
        {
            "jobs": "Seconds of a job, or how it ended",
            "job_memory": "Megabytes of the process that sends 1,000,000 rows",
            "fleet": "Fleets, by client",
            "fleet_faults": "Faults of servers",
            "fleet_bars": "Bars",
        },
    ),
    "theory": Page(
        "Theory",
        "Rates that papers state, measured. Slopes are of the logarithm of the error over that of "
        "N, for all N, and between 32, 64, 128, 256 and 512 workers. Near the floor of float32 a "
        "slope says nothing of the code.",
        {"convergence": "Slopes"},
    ),
}
