"""Compromised workers under a code: their results are dropped, or rows are marked."""

import copy

import pytest
import torch
from torch import nn

import coded_torch
from coded_torch import CodedWrapper, codes, stragglers, workers
from coded_torch.codes._suspects import Copies
from coded_torch.experiments._faults import FaultyWorkers
from coded_torch.verification._evidence import CALLS, Evidence

ATTACKS = {
    "noise": lambda rows, generator: rows + 20 * torch.randn(rows.shape, generator=generator),
    "negated": lambda rows, _: -rows,
    "scaled": lambda rows, _: 3 * rows,
    "shifted together": lambda rows, _: rows + 3,
    "rolled": lambda rows, _: rows.roll(1, -1),
}
CODES = {
    "spline": lambda a: codes.SplineCode(10, 60, adversaries=a),
    "Berrut": lambda a: codes.BerrutCode(10, 60, adversaries=a),
    "Floater-Hormann": lambda a: codes.FloaterHormannCode(10, 60, adversaries=a),
    "Lagrange": lambda a: codes.LagrangeCode(10, 60, degree=2, adversaries=a),
    "replication": lambda a: codes.ReplicationCode(10, 60, adversaries=a),
    "regression": lambda a: codes.RegressionCode(10, 60, adversaries=a),
}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


@pytest.fixture(scope="module")
def batch():
    return torch.randn(80, 4, generator=torch.Generator().manual_seed(1))


def undecided(places):
    """Return errors of results that decide nothing."""
    return [0.0] * len(places)


class Square(nn.Module):
    """A polynomial, which Lagrange's code decodes exactly."""

    def forward(self, x):
        return torch.cat([x, x * x.roll(1, -1)], -1)


def answered(model, batch, code, attack=None, adversaries=(), seed=0):
    pool = workers.LocalWorkers(stragglers.Uniform(4, seed=seed))
    if attack is not None:
        pool = FaultyWorkers(pool, attack=attack, adversaries=adversaries)
    with torch.no_grad():
        answers, report = CodedWrapper(model, code, workers=pool).run(batch)
        return float((answers - model(batch)).square().mean()), report


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("code", CODES)
def test_wrong_results_are_dropped(model, batch, code, attack):
    model = Square() if code == "Lagrange" else model
    wrong = (7, 8, 33)  # two of them side by side in the order of asking
    trusting, _ = answered(model, batch, CODES[code](0), ATTACKS[attack], wrong)
    honest, _ = answered(model, batch, CODES[code](3))
    error, report = answered(model, batch, CODES[code](3), ATTACKS[attack], wrong)
    assert {*report.suspects} == {*wrong}.intersection(report.received)
    assert error <= max(3 * honest, 1e-9) < trusting
    assert not report.undefended.any()


@pytest.mark.parametrize("code", CODES)
def test_honest_calls_lose_no_worker(model, batch, code):
    model = Square() if code == "Lagrange" else model
    for seed in range(20):
        _, report = answered(model, batch, CODES[code](3), seed=seed)
        assert report.suspects == ()


@pytest.mark.parametrize("places", [(20, 21), (20, 22), (0, 1), (28, 29, 30)])
def test_neighbouring_wrong_results_do_not_hide_each_other(model, batch, places):
    code = codes.SplineCode(10, 60, ordering="arrival", adversaries=len(places))
    plan = code.plan([batch])
    coded = plan.encode(batch)
    with torch.no_grad():
        results = model(coded.flatten(0, 1)).unflatten(0, coded.shape[:2])
    results[[*places]] = -results[[*places]]
    trust = plan.trusted([results], range(60))
    assert {*range(60)} - {*trust.places} == {*places}


@pytest.mark.parametrize("scale", [1e9, 1e30, 1e200])
@pytest.mark.parametrize("code", CODES)
def test_a_huge_result_hides_no_other(model, batch, code, scale):
    """Residuals of the others were below the rounding errors of the huge one."""
    model = Square() if code == "Lagrange" else model
    wide = batch.double()
    plan = CODES[code](3).plan([wide])
    coded = plan.encode(wide)
    with torch.no_grad():
        results = copy.deepcopy(model).double()(coded.flatten(0, 1)).unflatten(0, coded.shape[:2])
    results[7] *= scale
    results[[20, 41]] *= -1
    trust = plan.trusted([results], range(60))
    assert {*range(60)} - {*trust.places} == {7, 20, 41}


@pytest.mark.parametrize("code", ["spline", "Berrut", "Floater-Hormann"])
def test_a_small_shift_that_is_alike_in_all_groups_is_found(model, batch, code):
    """Residuals of single groups hid it; their mean does not."""

    def attack(rows, _):
        return rows + 0.05

    _, report = answered(model, batch, CODES[code](3), attack, (7, 8, 33))
    assert report.suspects == (7, 8, 33)
    assert not report.undefended.any()


@pytest.mark.parametrize("code", ["spline", "Berrut", "Floater-Hormann"])
def test_small_changes_that_spoil_answers_are_marked(model, batch, code):
    batch = 2 * batch
    plan = CODES[code](3).plan([batch])
    coded = plan.encode(batch)
    with torch.no_grad():
        exact = model(batch)
        honest = model(coded.flatten(0, 1)).unflatten(0, coded.shape[:2])

    def error(results, received):
        return float((plan.decode(results[received], received) - exact).square().mean())

    generator = torch.Generator().manual_seed(0)
    spoilt = 0
    for _ in range(30):
        wrong = torch.randperm(60, generator=generator)[:3].tolist()
        results = honest.clone()
        results[wrong] *= 1.1
        trust = plan.trusted([results], range(60))
        if error(results, trust.places) > 3 * error(results, [*{*range(60)} - {*wrong}]):
            spoilt += 1
            assert trust.undefended.all()
    assert spoilt > 10


@pytest.mark.parametrize("code", ["spline", "Berrut", "Floater-Hormann"])
def test_results_scaled_alike_are_marked_where_none_stands_out(batch, code):
    """Beside a rough model's residuals each looks honest, but together they have one factor."""
    plan = CODES[code](5).plan([batch])
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(8, 12, generator=generator)  # of each group and output
    honest = level + 0.5 * torch.randn(60, 8, 12, generator=generator)
    trust = plan.trusted([honest], range(60))
    assert trust.places == [*range(60)]
    assert not trust.undefended.any()
    scaled = honest.clone()
    scaled[[3, 17, 24, 40, 51]] *= 0.6
    trust = plan.trusted([scaled], range(60))
    assert trust.places == [*range(60)]
    assert trust.undefended.all()


def test_a_row_whose_only_honest_worker_was_outvoted_is_marked():
    """Two that are wrong alike had the majority of three copies, in silence."""
    copies = [[0] * 3, [1] * 5, [2] * 5, [3] * 5, [4] * 5]
    rows = torch.tensor([row for row_copies in copies for row in row_copies])[:, None]
    results = rows.double()[..., None] + torch.tensor([1.0, 2.0]).double()
    results[[0, 1]] += 7.0
    results[[3, 8, 13]] *= -1
    found = Copies(rows, [results])
    wrong = found.wrong(5, undecided)
    assert wrong == [2, 3, 8, 13]
    assert found.undefended(wrong, 5, 5).tolist() == [True, False, False, False, False]


def test_too_few_numbers_to_tell_are_marked(model, batch):
    """One group of eight outputs was decoded with wrong results, in silence."""
    for attack in (None, ATTACKS["negated"]):
        _, report = answered(model, batch[:10], CODES["spline"](3), attack, (7, 8, 33))
        assert report.undefended.all()


@pytest.mark.parametrize(("adversaries", "third"), [(2, 1.0), (3, 1.0), (3, 1.1), (3, -1.0)])
def test_wrong_workers_that_are_found_in_part_are_marked(model, batch, adversaries, third):
    """A worker beside those found stood out too little to be dropped, in silence."""
    code = codes.SplineCode(10, 60, ordering="arrival", adversaries=adversaries)
    plan = code.plan([batch])
    coded = plan.encode(batch)
    with torch.no_grad():
        results = model(coded.flatten(0, 1)).unflatten(0, coded.shape[:2])
    results[[20, 35]] *= -1
    results[50] *= third
    trust = plan.trusted([results], range(60))
    found = {*range(60)} - {*trust.places}
    assert found == ({20, 35, 50} if third == -1 else {20, 35})
    assert trust.undefended.all() == (len(found) < adversaries)


@pytest.mark.parametrize(
    "places", [(27, 32, 33, 34, 35), (37, 38, 40, 41, 42), (14, 18, 19, 20, 21)]
)
def test_honest_workers_between_wrong_ones_are_kept(model, batch, places):
    """Honest workers were dropped between wrong ones that shift alike, some in silence."""
    plan = codes.SplineCode(10, 60, ordering="arrival", adversaries=5).plan([batch])
    coded = plan.encode(batch)
    with torch.no_grad():
        results = model(coded.flatten(0, 1)).unflatten(0, coded.shape[:2])
    results[[*places]] += 1
    trust = plan.trusted([results], range(60))
    assert {*range(60)} - {*trust.places} == {*places}
    assert not trust.undefended.any()


def test_replication_decides_between_copies_by_the_other_answers(model, batch):
    """Both of two workers that differed were dropped, and inputs lost their answers."""
    plan = codes.ReplicationCode(10, 20, adversaries=2).plan([batch])
    with torch.no_grad():
        right = model(batch)
        results = plan.encode(right)
        results[[3, 14]] *= 1.5
        trust = plan.trusted([results], range(20))
    assert {*range(20)} - {*trust.places} == {3, 14}
    assert torch.equal(plan.decode(results[trust.places], trust.places), right)
    assert trust.undefended.any()


@pytest.mark.parametrize("code", CODES)
def test_more_wrong_workers_than_the_code_bears_are_not_silent(model, batch, code):
    wrong = (2, 11, 23, 37, 44)
    _, report = answered(model, batch, CODES[code](1), ATTACKS["noise"], wrong)
    assert report.undefended.all()
    assert "wrong results may have changed 80 of 80 answers" in report.notes


def test_too_few_results_to_tell_are_marked(model, batch):
    _, report = answered(model, batch, codes.SplineCode(4, 6, adversaries=1))
    assert report.undefended.all()
    assert report.suspects == ()


def test_a_single_copy_is_defended_by_its_workers_other_copies(model, batch):
    # With 1.2 copies per input, most rows have one, whose worker agrees with others elsewhere.
    code = codes.RegressionCode(20, 24, adversaries=1)
    pool = workers.LocalWorkers()
    with torch.no_grad():
        _, report = CodedWrapper(model, code, workers=pool).run(batch.repeat(3, 1))
    assert report.undefended.float().mean() < 0.2


def test_two_copies_that_differ_are_decided_by_the_regression(model):
    x = torch.linspace(-1, 1, 24)[:, None].repeat(1, 4)
    code = codes.RegressionCode(12, 24, adversaries=1)
    plan = code.plan([x])
    with torch.no_grad():
        right = model(x)
        results = plan.encode(right)
        results[5] += 10
        trust = plan.trusted([results], range(24))
        kept = [*trust.places]
        assert 5 not in kept
        assert torch.equal(plan.decode(results[kept], kept), right)


def test_copies_that_only_differ_from_each_other_are_undecided():
    rows = torch.tensor([[0], [0], [1], [1]])
    results = [torch.tensor([[[1.0]], [[2.0]], [[3.0]], [[3.0]]])]
    copies = Copies(rows, results)
    assert copies.wrong(1, undecided) == [0, 1]
    assert copies.undecided == {0, 1}
    assert copies.undefended([0, 1], 1, 2).tolist() == [True, False]
    copies = Copies(rows, results)
    assert copies.wrong(1, lambda places: [0.0, 5.0]) == [1]
    assert copies.undefended([1], 1, 2).tolist() == [True, False]


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_copies_that_are_not_finite_are_dropped(model, batch, wrong):
    plan = codes.ReplicationCode(10, 20, adversaries=1).plan([batch])
    with torch.no_grad():
        results = plan.encode(model(batch))
    results[3] = wrong
    assert {*range(20)} - {*plan.trusted([results], range(20)).places} == {3}


def test_copies_of_half_precision_may_be_rounded_otherwise():
    rows = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]])
    values = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)
    noisy = (values * torch.tensor([1, 1.002, 0.999])[:, None, None]).half()
    assert Copies(rows, [noisy]).wrong(1, undecided) == []
    noisy[1] *= 1.5
    assert Copies(rows, [noisy]).wrong(1, undecided) == [1]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [(torch.tensor(2**60), torch.tensor(2**60 + 1)), (torch.tensor(1 + 2j), torch.tensor(1 + 9j))],
    ids=["integers", "complex"],
)
def test_copies_of_other_dtypes_are_compared_exactly(right, wrong):
    rows = torch.tensor([[0, 1], [0, 1], [0, 1]])
    results = torch.stack([right.repeat(2), right.repeat(2), wrong.repeat(2)])
    assert Copies(rows, [results]).wrong(1, undecided) == [2]


def test_outputs_of_any_width_and_number(model, batch):
    class Wide(nn.Module):
        def forward(self, x):
            y = model(x)
            return {"few": y, "many": y.repeat(1, 40).reshape(len(x), 16, 20), "one": y[:, 0]}

    pool = FaultyWorkers(workers.LocalWorkers(), attack=ATTACKS["negated"], adversaries=[9])
    code = codes.SplineCode(10, 40, adversaries=1)
    with torch.no_grad():
        answers, report = CodedWrapper(Wide(), code, workers=pool).run(batch)
    assert report.suspects == (9,)
    assert torch.allclose(answers["few"], model(batch), atol=0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: codes.RegressionCode(3, 4, redundancy="midpoints", adversaries=1),
            "RegressionCode: adversaries must be 0 with midpoints, which have no copies, got 1",
        ),
        (lambda: codes.SplineCode(3, 4, adversaries=-1), "adversaries must be"),
        (lambda: codes.SplineCode(3, 4, adversaries=5), "adversaries must be"),
    ],
)
def test_arguments_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_code_that_cannot_tell_wrong_results_refuses_adversaries():
    class Mean(codes.FixedCode):
        def _make_encoder(self):
            raise NotImplementedError

        _make_decoder = _make_encoder

    with pytest.raises(ValueError, match="Mean: adversaries must be 0 with a code that cannot"):
        Mean(2, 3, adversaries=1)


class _Pool:
    def __init__(self):
        self.excluded = []

    def exclude(self, worker):
        self.excluded.append(worker)


def test_workers_are_excluded_by_many_calls_alone():
    pool = _Pool()
    evidence = Evidence(pool)
    for call in range(CALLS):
        assert pool.excluded == []
        evidence.add(range(6), {3} if call % 2 else {3, call % 6})
    assert pool.excluded == [3]
    for _ in range(CALLS - 1):  # a worker that was restarted begins anew
        assert evidence.add(range(6), {3}) == ()
    assert evidence.add(range(6), {3}) == (3,)


def test_a_pool_loses_a_worker_that_is_always_wrong(model, batch):
    with workers.DeviceWorkers(["cpu"] * 12) as pool, torch.no_grad():
        faulty = FaultyWorkers(pool, attack=ATTACKS["negated"], adversaries=[4])
        code = codes.RegressionCode(4, 12, adversaries=1)
        coded = CodedWrapper(model, code, workers=faulty)
        excluded = set[int]()
        for _ in range(60):
            answers, report = coded.run(batch)
            assert torch.allclose(answers, model(batch), atol=1e-5)
            assert {*report.suspects} <= {4}
            excluded.update(report.excluded)
            if excluded:
                break
        assert excluded == {4}
        assert pool.states[4][0] == "excluded"


def test_comparisons_try_codes_with_and_without_defence(model, batch):
    batches = [batch, batch.flip(0), 0.7 * batch]
    found = coded_torch.compare(
        model,
        batches,
        [(40, 8, 2)],
        attack=ATTACKS["noise"],
        adversaries=2,
        schemes=["the paper's, ordered", "regression"],
    )
    error = {row.name: row.mse[0] for row in found.rows}
    assert error["the paper's, ordered, defended"] < 1e-2 < error["the paper's, ordered"]
    assert error["regression, defended"] < 1e-6 < error["regression"]
