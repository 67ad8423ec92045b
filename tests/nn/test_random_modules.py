"""Calls of random modules give the plain module's outputs, or refuse or mark them."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from coded_torch import CodedWrapper
from coded_torch.codes import NotEnoughResults, ReplicationCode
from coded_torch.testing.virtual import VirtualWorkers
from coded_torch.workers import DeviceWorkers, LocalWorkers, ProcessWorkers


class Leaf(NamedTuple):
    """A leaf of an output, made of rows x, [B, F], and of a shared tensor, [n, F]."""

    make: Callable[[Any, Any], Any]
    by_rows: bool = True  #: true if it has a row per row, each of which is independent, or none
    dim: int = 0  #: its batch dimension


LEAVES = {
    "rows": Leaf(lambda x, w: 2 * x),
    "images": Leaf(lambda x, w: x[:, None, :, None].expand(-1, 2, -1, 3)),
    "numbers": Leaf(lambda x, w: x[:, 0] + 1),
    "integers": Leaf(lambda x, w: (8 * x).long()),
    "truths": Leaf(lambda x, w: x > 0),
    "halves": Leaf(lambda x, w: x.half()),
    "complex": Leaf(lambda x, w: torch.complex(x, -x)),
    "masked": Leaf(lambda x, w: x.masked_fill(x > 0.5, -math.inf)),
    "products": Leaf(lambda x, w: (x[:, None] * w).amax(-1)),
    "nothing": Leaf(lambda x, w: x[:, :0]),
    "states": Leaf(lambda x, w: torch.stack([x, x + 1]), dim=1),
    "times": Leaf(lambda x, w: torch.stack([x, x + 1, x + 2]), dim=1),
    "last": Leaf(lambda x, w: x.T.clone(), dim=-1),
    "strings": Leaf(lambda x, w: ["+" if row[0] > 0 else "-" for row in x]),
    "pairs": Leaf(lambda x, w: tuple((row[0].item(), "a") for row in x)),
    "boxes": Leaf(lambda x, w: [{"box": row[row > 0]} for row in x]),
    "shared": Leaf(lambda x, w: w + 1),
    "anchors": Leaf(lambda x, w: torch.arange(3.0)),
    "pair of anchors": Leaf(lambda x, w: torch.arange(2.0)),
    "scalar": Leaf(lambda x, w: torch.tensor(3.0)),
    "text": Leaf(lambda x, w: "text"),
    "none": Leaf(lambda x, w: None),
    "mean": Leaf(lambda x, w: x.mean(), False),
    "length": Leaf(lambda x, w: len(x), False),
    "tail": Leaf(lambda x, w: x[1:], False),
    "twice": Leaf(lambda x, w: torch.cat([x, x]), False),
    "gram": Leaf(lambda x, w: x @ x.T, False),
    "centred": Leaf(lambda x, w: x - x.mean(0), False),
    "reversed": Leaf(lambda x, w: x.flip(0), False),
    "summed": Leaf(lambda x, w: x.cumsum(0), False),
    "shares": Leaf(lambda x, w: x.softmax(0), False),
    "numbered": Leaf(lambda x, w: x[:, 0] + 9 * torch.arange(len(x)), False),
    "all but one": Leaf(lambda x, w: ["a"] * (len(x) - 1), False),
}
PLAIN = [name for name, leaf in LEAVES.items() if leaf.by_rows]
PACKS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "dict": lambda leaves: {str(i): leaf for i, leaf in enumerate(leaves)},
    "deep": lambda leaves: {"a": [leaves[0]], "b": {"c": tuple(leaves[1:])}},
    "alone": lambda leaves: leaves[0],
}


class Random(nn.Module):
    """Returns a tree of leaves; its rows may come in a list or by name."""

    def __init__(self, names: list[str], pack: str, given: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))  # says the precision
        self.names = names
        self.pack = pack
        self.given = given

    def forward(self, x: Any, w: Any = None, *, more: Any = None) -> Any:
        if self.given == "list":
            x = x[0] + x[1]
        if more is not None:
            x = x + more
        return PACKS[self.pack]([LEAVES[name].make(x, w) for name in self.names])


def out_dims(module: Random) -> Any:
    dims = [LEAVES[name].dim for name in module.names]
    return PACKS[module.pack](dims) if any(dims) else 0


modules = st.builds(
    Random,
    st.lists(st.sampled_from(PLAIN), min_size=1, max_size=3)
    | st.lists(st.sampled_from([*LEAVES]), min_size=1, max_size=3),
    st.sampled_from([*PACKS]),
    st.sampled_from(["plain", "list", "named"]),
)
# Small numbers, so that sizes are often equal by chance.
cases = st.fixed_dictionaries(
    {
        "module": modules,
        "sizes": st.lists(st.integers(1, 8), min_size=1, max_size=3),
        "features": st.integers(1, 4),
        "shared": st.integers(1, 8),
        "parts": st.integers(1, 5),
        "declared": st.booleans(),
        "code": st.sampled_from([None, None, None, (2, 4), (1, 3)]),
        "seed": st.integers(0, 99),
    }
)


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        is_like = isinstance(found, torch.Tensor) and found.dtype == wanted.dtype
        return is_like and torch.equal(found, wanted)
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == wanted)


def try_case(pool: Any, case: dict[str, Any], counts: Counter[str], is_honest: bool = True) -> None:
    """Call a module some times, and assert that outputs are right, marked, or refused."""
    module = case["module"]
    names = module.names[:1] if module.pack == "alone" else module.names
    leaves = [LEAVES[name] for name in names]
    declared = case["declared"] or not any(leaf.dim for leaf in leaves)
    is_plain = is_honest and declared and all(leaf.by_rows for leaf in leaves)
    # A code repeats the last row in its last group, and joins no lists.
    is_plain &= case["code"] is None
    options: dict[str, Any] = {"parts": case["parts"]}
    if case["code"]:
        options = {"code": ReplicationCode(*case["code"])}
    coded = CodedWrapper(
        module,
        workers=pool,
        in_dims=(0, "shared"),
        out_dims=out_dims(module) if case["declared"] else 0,
        **options,
    )
    generator = torch.Generator().manual_seed(case["seed"])
    for size in case["sizes"]:
        x = torch.randn(size, case["features"], generator=generator)
        w = torch.randn(case["shared"], case["features"], generator=generator)
        args = ([x, x.flip(1)] if module.given == "list" else x), w
        kwargs = {"more": x.flip(1)} if module.given == "named" else {}
        wanted = module(*args, **kwargs)
        counts["calls"] += 1
        try:
            answers, report = coded.run(*args, **kwargs)
        except (TypeError, ValueError, NotEnoughResults) as error:
            if is_plain:
                pytest.fail(f"{names} of {size} rows, refused: {error}")
            counts["refused"] += 1
            counts["one line"] += "\n" not in str(error)
            continue
        is_marked = bool(report.notes) or bool(report.estimated.any())
        is_right = same(answers, wanted)
        assert is_right or is_marked, f"{names} of {size} rows: {answers}, not {wanted}"
        counts["right"] += is_right
        counts["marked"] += not is_right
        counts["plain"] += is_plain


def honest() -> VirtualWorkers:
    return VirtualWorkers([[("ok", 1.0)], [("ok", 1.5)], [("ok", 2.0)]])


POOLS = {
    "virtual": honest,
    "local": LocalWorkers,
    "devices": lambda: DeviceWorkers(["cpu"] * 2),
    "processes": lambda: ProcessWorkers(2),
}


def run_cases(pool: Any, number: int, is_honest: bool = True) -> Counter[str]:
    counts = Counter[str]()

    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(cases)
    def check(case: dict[str, Any]) -> None:
        with torch.no_grad():
            try_case(pool() if callable(pool) else pool, case, counts, is_honest)

    check()
    print(dict(counts))
    return counts


@pytest.mark.filterwarnings("ignore:.*parts get other answers than the batch")
@pytest.mark.filterwarnings("ignore:.* cannot be estimated")
@pytest.mark.parametrize("name", ["virtual", "local", "devices"])
def test_no_output_is_wrong_and_unmarked(name):
    with POOLS[name]() as pool:
        counts = run_cases(pool, 60)
    assert counts["right"] > 0
    assert counts["one line"] == counts["refused"]


acts = st.tuples(st.sampled_from(["ok", "ok", "ok", "nan", "rows", "die"]), st.just(1.0))
scripts = st.lists(st.lists(acts, min_size=1, max_size=4), min_size=1, max_size=4)
# Leaves that show that they are cut in dimension 0; a cut tensor of any length is a lie.
OF_ONE_LENGTH = {name for name in PLAIN if LEAVES[name].dim == 0}
OF_ONE_LENGTH -= {"boxes", "shared", "anchors", "pair of anchors", "scalar"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* cannot be estimated")
@pytest.mark.parametrize(
    ("name", "number"), [("virtual", 1000), ("local", 300), ("devices", 500), ("processes", 200)]
)
def test_no_output_of_2000_modules_is_wrong_and_unmarked(name, number):
    with POOLS[name]() as pool:
        counts = run_cases(pool, number)
    assert counts["plain"] > number / 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* cannot be estimated")
def test_no_output_is_wrong_and_unmarked_where_workers_fail():
    counts = Counter[str]()

    @settings(max_examples=500, deadline=None, database=None)
    @given(cases, scripts)
    def check(case: dict[str, Any], script: Any) -> None:
        cuts_rows = any(act == "rows" for worker in script for act, _ in worker)
        is_seen = OF_ONE_LENGTH.issuperset(case["module"].names)
        assume(is_seen or not cuts_rows)
        with torch.no_grad(), contextlib.closing(VirtualWorkers(script)) as pool:
            try_case(pool, case, counts, is_honest=False)

    check()
    assert counts["right"] > 100
