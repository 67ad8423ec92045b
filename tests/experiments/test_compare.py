"""Codes and baselines side by side on any model: raw data, statistics, a table and a picture."""

import math

import pytest
import torch

import coded_torch
from coded_torch import codes
from coded_torch.demo import digits, lenet5
from coded_torch.experiments import scores
from coded_torch.experiments.compare import compare, peers, received_by
from coded_torch.experiments.scores import Comparison, Record, Score
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Bernoulli, Contiguous, ShiftedExponential, Trace, Uniform
from coded_torch.workers import LocalWorkers

NAMES = [*peers(4, 6), "no redundancy, regression"]
WITH_A_SURROGATE = [
    "surrogate alone",
    "replication, surrogate",
    "regression, residuals",
    "no redundancy, surrogate",
    "no redundancy, residuals",
]


@pytest.fixture(scope="module")
def shipped():
    images, labels = digits()
    return lenet5(), list(images[:384].split(96)), list(labels[:384].split(96))


@pytest.fixture(scope="module")
def found(shipped):
    model, batches, labels = shipped
    return compare(model, batches, [(24, 20, 4), (9, 8, 1)], labels=labels, seeds=3)


def by_name(comparison, setting):
    return {row.name: row for row in comparison.rows if row.setting == setting}


def test_every_scheme_at_every_setting_in_order(found):
    expected = [(setting, name) for setting in ((24, 20, 4), (9, 8, 1)) for name in NAMES]
    assert [(row.setting, row.name) for row in found.rows] == expected
    for (setting, name), code in found.codes.items():
        single = name == "no redundancy, regression"
        assert (code.num_workers, code.num_data) == (setting[0], setting[1 - single])
    assert isinstance(found.codes[(9, 8, 1), "replication"], codes.ReplicationCode)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_wrapper(shipped, found, name):
    model, batches, labels = shipped
    row = by_name(found, (24, 20, 4))[name]
    coded = CodedWrapper(
        model,
        found.codes[(24, 20, 4), name].replace(shuffle=False),
        workers=LocalWorkers(Uniform(4, seed=3)),
    )
    with torch.inference_mode():
        answers = [coded(x) for x in batches[1:]]
        exact = [model(x) for x in batches[1:]]
    squares = [scores.rmse(a, e) ** 2 for a, e in zip(answers, exact, strict=True)]
    assert row.rmse[0] == pytest.approx(math.sqrt(sum(squares) / 3), rel=2e-3)
    right = scores.relative_accuracy(torch.cat(answers), torch.cat(exact), torch.cat(labels[1:]))
    assert row.relative_accuracy[0] == pytest.approx(right, abs=1e-3)
    variances = [scores.rmse(e.mean(0).expand_as(e), e) ** 2 for e in exact]
    assert row.mse[0] == pytest.approx(sum(squares) / sum(variances), rel=2e-3)
    assert row.rmse[1] > 0


def test_codes_are_tuned_on_the_first_quarter_only(shipped, found):
    model, batches, _ = shipped
    others = [batches[0], *(torch.rand_like(x) for x in batches[1:])]
    again = compare(model, others, [(24, 20, 4)], seeds=3)
    for name, row in by_name(again, (24, 20, 4)).items():
        code = again.codes[(24, 20, 4), name]
        assert repr(code) == repr(found.codes[(24, 20, 4), name])
        assert row.relative_accuracy is None
    numbers = found.codes[(24, 20, 4), "the paper's scheme"]
    assert (numbers.encoder_smoothing, numbers.decoder_smoothing) != (0.0, 0.0)


def test_a_seed_repeats_and_another_does_not(shipped):
    model, batches, _ = shipped
    runs = [compare(model, batches[:2], [(9, 8, 1)], seeds=seed).rows[0].rmse for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_workers_are_lost_by_any_law(shipped):
    model, batches, _ = shipped
    asked = []

    def delays(lost, seed):
        asked.append((lost, seed))
        return Trace([[math.inf] * lost + [0.0] * (9 - lost)])

    compare(model, batches[:2], [(9, 8, 1)], delays=delays, seeds=5)
    assert sorted(asked) == [(1, 5), (1, 6)]
    uniform = compare(model, batches[:2], [(9, 8, 3)]).rows[0].rmse
    assert compare(model, batches[:2], [(9, 8, 3)], delays=Contiguous).rows[0].rmse > uniform
    with pytest.raises(TypeError, match=r"the result of delays must be .*Stragglers"):
        compare(model, batches[:2], [(9, 8, 1)], delays=lambda lost, seed: 0.5)
    with pytest.raises(TypeError, match="delays must be"):
        compare(model, batches[:2], [(9, 8, 1)], delays=Uniform(1))


def test_the_slowest_are_lost_under_a_law_of_finite_latencies(shipped):
    model, batches, _ = shipped
    setting = [(9, 8, 3)]
    slow = [[1.0, 3.0, 2.0, 0.5, 9.0, 0.1, 8.0, 0.2, 7.0]]
    dead = [[math.inf if x > 6 else 0.0 for x in slow[0]]]
    found, expected = (
        compare(model, batches[:2], setting, delays=lambda lost, seed, x=x: Trace(x))
        for x in (slow, dead)
    )
    assert [row.rmse for row in found.rows] == [row.rmse for row in expected.rows]
    mixed = Trace([[math.inf, 1.0, 3.0, 2.0]])  # one never answers, and the next slowest is lost
    assert received_by(mixed, 4, 2) == [1, 3]
    delays = ShiftedExponential(0.1, 1.0, seed=0)
    latencies = ShiftedExponential(0.1, 1.0, seed=0).sample(9)
    received = received_by(delays, 9, 3)
    assert len(received) == 6
    assert max(latencies[received]) < min(latencies[sorted({*range(9)} - {*received})])


@pytest.mark.parametrize(
    ("delays", "lost"),
    [
        *((Uniform(2, seed=0), lost) for lost in (0, 1, 3)),
        (Bernoulli(1.0, latency=1.0), 2),
        (Trace([[1.0] * 5]), 1),
    ],
)
def test_delays_must_tell_which_workers_are_lost(shipped, delays, lost):
    model, batches, _ = shipped
    must = f"compare: delays must make S = {lost} of N = 5 workers slower than all others, got lat"
    with pytest.raises(ValueError, match=must):
        compare(model, batches[:2], [(5, 4, lost)], delays=lambda lost, seed: delays)


def test_nothing_lost(shipped):
    model, batches, labels = shipped
    for row in compare(model, batches[:2], [(12, 4, 0)], labels=labels[:2]).rows:
        if row.name in ("replication", "regression", "no redundancy, regression"):
            assert row.rmse[0] < 1e-4
            assert row.relative_accuracy[0] == 1


def test_several_arguments_and_outputs(generator):
    class Two(torch.nn.Module):
        def forward(self, x, scale):
            return {"sine": (x * scale).sin(), "sum": x.sum(1)}

    batches = [(torch.randn(40, 3, generator=generator), torch.tensor(0.5)) for _ in range(2)]
    found = coded_torch.compare(Two(), batches, [(8, 5, 2)], in_dims=(0, None))
    assert [row.name for row in found.rows] == NAMES
    assert by_name(found, (8, 5, 2))["regression"].mse[0] < 0.1


def test_inputs_that_cannot_be_mixed_go_to_codes_that_do_not(generator):
    class Embedded(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.sin(), x.cos()], 1)

    tokens = [torch.randint(0, 50, (40,), generator=generator) for _ in range(2)]
    found = compare(Embedded(), tokens, [(8, 5, 2)])
    assert [row.name for row in found.rows] == ["replication", "regression", NAMES[-1]]


def test_sets_that_no_code_can_decode_choose_nothing(generator):
    """A batch of two rows has two workers without redundancy, which may both be lost."""
    batches = [torch.randn(2, 2, generator=generator) for _ in range(4)]
    for seed in range(4):
        found = compare(torch.nn.Tanh(), batches, [(6, 2, 3)], seeds=seed)
        assert len({row.name for row in found.rows}) == 9


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (lambda x: x[:, :1], r"compare: surrogate must return \[\[16, 2\]\], got \[\[16, 1\]\]"),
        (lambda x: x * torch.nan, "surrogate must return finite outputs"),
        (lambda x: x.long(), "surrogate must return floating-point tensors"),
    ],
)
def test_a_surrogate_must_return_what_the_module_does(generator, surrogate, message):
    batches = [torch.randn(16, 2, generator=generator) for _ in range(2)]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        compare(torch.nn.Tanh(), batches, [(4, 4, 1)], surrogate=surrogate)


def test_baselines_with_a_surrogate_are_the_formulas(generator):
    model, cheap = torch.nn.Tanh(), torch.nn.Hardtanh()
    batches = [torch.randn(12, 2, generator=generator) for _ in range(3)]

    def delays(lost, seed):
        return Trace([[0.0, 0.0, math.inf, 0.0]])

    found = compare(model, batches, [(4, 3, 1)], surrogate=cheap, delays=delays)
    rows = by_name(found, (4, 3, 1))
    assert list(rows) == [*NAMES, *WITH_A_SURROGATE]
    exact, stands = torch.cat(batches[1:]).tanh(), cheap(torch.cat(batches[1:]))
    assert rows["surrogate alone"].rmse[0] == pytest.approx(scores.rmse(stands, exact), rel=1e-3)
    assert rows["surrogate alone"].work == 0
    missing = rows["no redundancy, surrogate"]
    assert 0 < missing.rmse[0] < rows["surrogate alone"].rmse[0]
    assert missing.work == rows["no redundancy, residuals"].work == 1
    assert rows["replication, surrogate"].work == pytest.approx(4 / 3)
    assert rows["replication, surrogate"].mse[0] < rows["replication"].mse[0]
    some = compare(model, batches, [(4, 3, 1)], surrogate=cheap, schemes=["replication"])
    assert [row.name for row in some.rows] == ["replication", *WITH_A_SURROGATE[:2]]
    found = compare(model, batches, [(4, 3, 1)], surrogate=model, delays=delays)
    perfect = by_name(found, (4, 3, 1))
    for name in WITH_A_SURROGATE:
        assert perfect[name].rmse[0] < 1e-6


def test_received_sets_and_seeds_are_averaged_in_the_raw_data(shipped):
    model, batches, labels = shipped
    options = {"labels": labels, "tuning": 2}
    one = compare(model, batches, [(9, 8, 2)], seeds=[0, 7], **options)
    assert {(x.seed, x.batch) for x in one.records} == {(s, b) for s in (0, 7) for b in (0, 1)}
    assert {x.rows for x in one.records} == {96}
    many = compare(model, batches, [(9, 8, 2)], received_sets=3, **options)
    assert {x.rows for x in many.records} == {3 * 96}
    assert len(many.records) == 2 * len(NAMES)
    first = [x for x in one.records if x.scheme == "replication" and x.batch == 0]
    assert len({x.score.mse for x in first}) == 2
    row = by_name(one, (9, 8, 2))["replication"]
    mean = sum(x.score.mse for x in one.records if x.scheme == "replication") / 4
    assert row.rmse[0] == pytest.approx(mean**0.5, rel=1e-3)


def test_raw_data_are_saved(found, tmp_path):
    found.save(tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + len(found.records)
    assert lines[1].startswith(f"24,20,4,{found.records[0].scheme},")


def test_against_a_reference_differences_are_paired():
    def record(name, batch, mse, right):
        return Record(3, 2, 1, name, "", 0, batch, 10, 1.5, Score(mse, 1.0, 2.0, right, 1.0, 0.9))

    records = [record("a", i, 1.0 + i, 0.5) for i in range(8)]
    records += [record("b", i, 2.0 + 2 * i, 0.75) for i in range(8)]
    records += [record("c", i, 1.0 + i + (-1) ** i, 0.5) for i in range(8)]
    a, b, c = Comparison(records).against("a")
    assert a.mse_ratio is a.p is a.gain is None
    assert (b.mse_ratio, b.gain) == ([2.0, 0.0], [0.25, 0.0])
    difference = torch.arange(1.0, 9.0).numpy() / 2  # over the variance
    assert b.mse_difference == [2.25, pytest.approx(scores.half_width(difference), rel=1e-3)]
    assert b.p == 2 * 2 / 2**8  # of two comparisons
    assert c.p == 1
    assert b.changed == (8, 80)
    with pytest.raises(ValueError, match="reference must be one of a, b, c, got 'd'"):
        Comparison(records).against("d")
    assert b.mse == pytest.approx([4.5, b.mse[1]])
    lost = [*records[:15], record("b", 7, math.nan, 0.5)]
    assert Comparison(lost).against("a")[-1].p is None  # an answer is missing


def test_table(found):
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "N = 24 workers, K = 20 inputs a group, S = 4 workers lost"
    assert lines[1].split() == ["RMSE", "normalised", "MSE", "RelAcc"]
    for line, row in zip(lines[2 : 2 + len(NAMES)], found.rows, strict=False):
        assert line.startswith(f"  {row.name} ")
        assert line.count("±") == 3
        assert float(line[29:].split()[0]) == pytest.approx(row.rmse[0], rel=0.05)
    assert lines[2 + len(NAMES)] == ""
    assert lines[3 + len(NAMES)].startswith("N = 9 workers")


def made(setting, name, mse, batch=0):
    scores = Score(mse, 1.0, 1.0, math.nan, math.nan, 1.0)
    return Record(*setting, name, "", 0, batch, 4, 1.0, scores)


def test_table_without_labels_and_intervals():
    numbers = 1e-6 + 1e-9 * torch.tensor([-1.0, 1.0])
    rows = [made((3, 2, 1), "few", 0.0152416), made((5, 2, 1), "mine", float(numbers[0]))]
    rows.append(made((5, 2, 1), "mine", float(numbers[1]), 1))
    assert str(Comparison(rows)).splitlines() == [
        "N = 3 workers, K = 2 inputs a group, S = 1 workers lost",
        "                              RMSE            normalised MSE",
        "  few                         0.123           0.0152",
        "",
        "N = 5 workers, K = 2 inputs a group, S = 1 workers lost",
        "                              RMSE            normalised MSE",
        "  mine                        1.0e-03 ± 6e-06 1.0e-06 ± 1e-08",
    ]


class Half(codes.ReplicationCode):
    pass


def test_codes_of_ones_own_take_part():
    batches = [torch.randn(20, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def more(k, n):
        return {"half": Half(k, n), "arrived": Half(k, n, ordering="arrival")}

    names = [row.name for row in compare(torch.nn.Tanh(), batches, [(6, 4, 2)], more=more).rows]
    assert names == [*NAMES, "half", "arrived"]
    for wrong in (lambda k, n: [Half(k, n)], lambda k, n: {"half": Half}):
        with pytest.raises(TypeError, match="what more returns"):
            compare(torch.nn.Tanh(), batches, [(6, 4, 2)], more=wrong)
    for wrong in ({"regression": Half(4, 6)}, {"half": Half(2, 12)}):
        with pytest.raises(ValueError, match=r"^compare: more must return codes of K = 4"):
            compare(torch.nn.Tanh(), batches, [(6, 4, 2)], more=lambda k, n, wrong=wrong: wrong)


def test_picture_of_one_setting_has_a_bar_for_each_scheme():
    (axes,) = Comparison([made((9, 8, 1), x, 0.5) for x in "abc"]).draw().axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [*"abc"]
    assert [bar.get_width() for bar in axes.patches] == [0.5] * 3


def test_pictures_of_several_settings_leave_out_what_is_exact():
    by_s = [made((24, 20, s), x, (s or 1e-7) / 9) for s in (0, 4, 8) for x in "ab"]
    (axes,) = Comparison(by_s).draw().axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines if line.get_label()}
    assert axes.get_title() == "20 inputs a group on 24 workers"
    assert [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata())] == [[4, 8]] * 2
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert lines
    by_n = [made((n, 4, 2), x, 1 / n) for n in (8, 16) for x in "ab"]
    (axes,) = Comparison(by_n).draw().axes
    assert (axes.get_title(), axes.get_xlabel()) == ("4 inputs a group, 2 workers lost", "workers")
    figure = Comparison([made((n, n - 1, 1), "a", 0.5) for n in (3, 4, 5)]).draw()
    assert [len(figure.axes), *figure.get_size_inches()] == [4, 13, 8.4]


def test_received_are_those_not_lost():
    received = received_by(Uniform(3, seed=0), 10, 3)
    assert len(received) == 7
    assert received == sorted(set(received))


ONES = [torch.ones(4, 1)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"module": None}, "module must be of type Module, got NoneType"),
        ({"batches": None}, "batches must be a sequence of batches, such as .x., got NoneType"),
        ({"batches": ONES[0]}, "batches must be a sequence of batches"),
        ({"batches": [ONES[0], ONES[0][:0]]}, r"batches\[1\] must hold"),
        ({"batches": ONES[:1]}, "batches must hold at least two, .* got 1"),
        ({"settings": [(4, 5, 1)]}, r"settings must .* got \(4, 5, 1\)"),
        ({"settings": [(5, 4, 5)]}, r"settings must .* got \(5, 4, 5\)"),
        ({"settings": [(5, 4)]}, r"settings must be .* got \(5, 4\)"),
        ({"settings": (5, 4, 1)}, "settings must be triples .* got 5"),
        ({"settings": []}, "settings must hold at least one"),
        ({"seeds": -1}, "seeds must be at least 0, got -1"),
        ({"seeds": ["x"]}, "seeds must be an int"),
        ({"seeds": []}, "seeds must hold at least one"),
        ({"seeds": [10**30]}, "seeds must be at most"),
        ({"tuning": 2}, "tuning must be .* got 2"),
        ({"received_sets": 0}, "received_sets must be"),
        ({"surrogate": 3}, "surrogate must be"),
        ({"attack": "noise"}, "attack must be"),
        ({"labels": ONES[:1]}, "labels must be .* of 2"),
        ({"schemes": "regression"}, "schemes must be names of"),
        ({"schemes": ["x"]}, "schemes must be names of .the"),
        ({"schemes": ["regression", "x"]}, r"schemes must be .* got \['regression', 'x'\]"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"compare: {message}"):
        compare(**{"module": torch.nn.Tanh(), "batches": ONES} | changes)


class Pair(torch.nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("module", "labels", "kind", "message"),
    [
        (torch.nn.Tanh(), torch.zeros(3, dtype=int), ValueError, r"have shape \(4,\), got \(3,\)"),
        (torch.nn.Tanh(), ONES[0], TypeError, r"be an integer tensor, got torch\.float32"),
        (
            Pair(),
            torch.zeros(4, dtype=int),
            ValueError,
            r"go with .* got \[\[4, 1\], \[4",
        ),
    ],
    ids=str,
)
def test_labels_must_fit_the_answers(module, labels, kind, message):
    with pytest.raises(kind, match=f"compare: labels must {message}"):
        compare(module, ONES, [(4, 2, 1)], labels=[labels] * 2)


def test_a_module_that_would_learn_from_the_batches_is_refused():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(8)).train()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"must be in evaluation mode, as 0 learns .*call eval"):
        compare(module, [x, x], settings=[(4, 2, 1)])
    assert not module[0].running_mean.any()


@pytest.mark.cuda
def test_labels_may_stay_on_the_host():
    model, batches = torch.nn.Linear(3, 4).cuda(), [torch.randn(24, 3).cuda() for _ in range(3)]
    labels = [model(x).argmax(1) for x in batches]
    on_device = compare(model, batches, [(6, 4, 2)], labels=labels)
    assert str(compare(model, batches, [(6, 4, 2)], labels=[x.cpu() for x in labels])) == str(
        on_device
    )


def test_faulty_workers_spoil_every_scheme_alike():
    x = torch.randn(3, 24, 2, generator=torch.Generator().manual_seed(0))
    module, seen = torch.nn.Linear(2, 3), []

    def compared(**options):
        return compare(module, list(x), **{"settings": [(6, 4, 0)]} | options)

    def attack(rows, generator):
        seen.append(rows.shape)
        return rows + 100 + torch.rand((), generator=generator)

    surrogate = torch.nn.Linear(2, 3)
    honest = {row.name: row.mse[0] for row in compared(surrogate=surrogate).rows}
    assert not seen
    attacked = compared(surrogate=surrogate, attack=attack, faulty=2)
    for row in attacked.rows:
        if row.name != "surrogate alone":
            assert row.mse[0] > honest[row.name] + 1, row.name
    assert seen
    again = str(compared(surrogate=surrogate, attack=attack, faulty=2))
    assert again == str(attacked)
    few = {"schemes": ["regression"], "settings": [(6, 4, 2)]}
    for wrong in (lambda rows, _: None, lambda rows, _: rows[:1]):
        with pytest.raises(ValueError, match=r"attack must .* it got, \[6, 3\], got"):
            compared(attack=wrong, **few)
    with pytest.raises(ValueError, match="faulty, of the workers received, must be at most 4"):
        compared(attack=attack, faulty=5, **few)
