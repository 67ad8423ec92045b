"""Codes and baselines side by side on any model: raw data, statistics, a table and a picture."""

import math
import re

import pytest
import torch

from coded_torch import codes
from coded_torch.demo import digits, lenet5
from coded_torch.experiments import scores
from coded_torch.experiments.compare import compare, peers, received_by
from coded_torch.experiments.scores import Comparison, Record, Score, Setting
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Bernoulli, ShiftedExponential, Trace, Uniform
from coded_torch.workers import LocalWorkers

from ..nn.modules import Call

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
    must = f"compare: delays must make S = {lost} of N = 5 workers slower than all others, got \\["
    with pytest.raises(ValueError, match=must):
        compare(model, batches[:2], [(5, 4, lost)], delays=lambda lost, seed: delays)


def test_inputs_that_cannot_be_mixed_go_to_codes_that_do_not(generator):
    embedded = Call(lambda x: torch.stack([x.sin(), x.cos()], 1))
    tokens = [torch.randint(0, 50, (40,), generator=generator) for _ in range(2)]
    found = compare(embedded, tokens, [(8, 5, 2)])
    assert [row.name for row in found.rows] == ["replication", "regression", NAMES[-1]]


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


def test_wrong_use_is_not_silent(generator):
    batches = list(torch.randn(2, 8, 3, generator=generator))

    def compared(module, labels=None):
        compare(module, batches, [(3, 2, 1)], labels=labels, schemes=["replication"])

    for label in (-1, 3):
        labels = [torch.full((8,), label)] * 2
        with pytest.raises(ValueError, match=f"labels must be from 0 to 2, got \\[{label}"):
            compared(torch.nn.Tanh(), labels)
    worse = r"compare: batches\[1\]: the module must return finite outputs, .* in output$"
    with pytest.raises(RuntimeError, match=worse):
        compare(torch.nn.Tanh(), [batches[0], batches[1].log()], [(3, 2, 1)])
    with pytest.warns(UserWarning, match=r"got the module \(Dropout\) in training mode") as caught:
        compared(torch.nn.Dropout())
    assert [warning.filename for warning in caught] == [__file__]


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
    assert lines[0] == "N = 24 workers, K = 20 inputs per group, S = 4 workers lost"
    assert lines[1].split() == ["RMSE", "normalised", "MSE", "RelAcc"]
    for line, row in zip(lines[2 : 2 + len(NAMES)], found.rows, strict=False):
        assert line.startswith(f"  {row.name} ")
        assert line.count("±") + line.count("×/÷") == 3
        assert float(line[29:].split()[0]) == pytest.approx(row.rmse[0], rel=0.05)
    assert lines[2 + len(NAMES)] == ""
    assert lines[3 + len(NAMES)].startswith("N = 9 workers")


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ([0.5, 0.1], "0.50 ± 0.10"),  # an interval of a number
        ([0.26, 0.52], "0.26 ×/÷ 7.4"),  # 0.26 - 0.52 is no squared error
        ([0.0, 0.0], "0"),
        ([math.nan, 0.0], "nan"),
        (None, ""),
    ],
)
def test_no_interval_of_an_error_holds_negative_numbers(interval, text):
    assert scores._text(interval) == text


def test_methods_with_models_of_their_own_are_compared_as_codes_are():
    """A parity model, as of ParM, answers the input whose worker was lost."""
    module = torch.nn.Linear(3, 2, bias=False)
    batches = list(torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(0)))

    def parity(inputs, outputs, received):
        (x,), (y,) = inputs, outputs
        sums = module(x.unflatten(0, (-1, 2)).sum(1))
        others = y.unflatten(0, (-1, 2)).flip(1)
        decoded = (sums[:, None] - others).flatten(0, 1)
        lost = ~torch.isin(torch.arange(8) % 2, torch.tensor(received))
        return torch.where(lost[:, None], decoded, y)

    def nothing(inputs, outputs, received):
        return [torch.zeros_like(y) for y in outputs]

    def compared(decoder, **options):
        more = {"parity": decoder, "nothing": nothing}
        return compare(module, batches, [(3, 2, 1)], extra=lambda k, n: more, **options)

    rows = {row.name: row for row in compared(parity).rows}
    assert rows["parity"].rmse[0] < 1e-6
    assert rows["nothing"].mse[0] > 0.9
    assert rows["parity"].work == 1.5
    few = compared(parity, schemes=["regression"]).rows  # the caller's own are never left out
    assert {row.name for row in few} == {"regression", "parity", "nothing"}
    with pytest.raises(ValueError, match=r"'parity' must return answers of shape \[\[8, 2\]\]"):
        compared(lambda inputs, outputs, received: outputs[0][:4])
    with pytest.raises(ValueError, match="extra must return codes beside an attack"):
        compared(parity, attack=lambda results, generator: results + 1)


def test_a_method_cannot_change_what_others_are_compared_on():
    module, batches = torch.nn.Linear(3, 2), [torch.randn(8, 3) for _ in range(3)]
    before = [batch.clone() for batch in batches]

    class Spoils(torch.nn.ModuleList):  # without modules it is false
        __hash__ = None

        def __call__(self, inputs, outputs, received):
            inputs[0].zero_()
            outputs[0].zero_()
            received.clear()
            return outputs[0].half()

    def compared(**more):
        options = {"schemes": ["replication", *more], "received_sets": 2}
        return compare(module, batches, [(3, 2, 1)], extra=lambda k, n: more, **options).rows

    (alone,), (spoiled, mine) = compared(), compared(spoils=Spoils())
    assert spoiled == alone
    assert mine.mse[0] >= 1
    assert mine.work == 1.5
    assert all(map(torch.equal, batches, before))
    with pytest.raises(TypeError, match="compare: an answer of 'f' must be of type Tensor"):
        compared(f=lambda inputs, outputs, received: outputs[0].numpy())


def test_the_default_device_of_the_caller_holds_in_methods():
    found = []

    def answers(inputs, outputs, received):
        found.append(torch.empty(0).device.type)
        return outputs

    def more(k, n):
        found.append(torch.empty(0).device.type)
        return {"mine": answers}

    batches, module = [torch.randn(8, 3) for _ in range(2)], torch.nn.Tanh()
    with torch.device("meta"):
        compare(module, batches, [(3, 2, 1)], extra=more, schemes=["mine"])
    assert {*found} == {"meta"}


@pytest.mark.parametrize("schemes", [["mine"], "replication", b"replication"])
def test_schemes_are_named(schemes):
    with pytest.raises(ValueError, match="compare: schemes must be names of "):
        compare(torch.nn.Tanh(), [torch.ones(6, 2)] * 2, [(3, 2, 1)], schemes=schemes)


@pytest.mark.parametrize("name", [*WITH_A_SURROGATE, "Berrut"])
def test_names_of_schemes_are_not_taken_twice(name):
    batches = list(torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0)))
    more = {name: lambda inputs, outputs, received: outputs}
    with pytest.raises(ValueError, match="under names that are not taken, got"):
        compare(torch.nn.Tanh(), batches, [(3, 2, 1)], extra=lambda k, n: more)


def made(setting, name, mse, batch=0):
    scores = Score(mse, 1.0, 1.0, math.nan, math.nan, 1.0)
    return Record(*setting, name, "", 0, batch, 4, 1.0, scores)


def test_the_verdict_names_the_least_error_and_what_is_not_clearly_worse():
    errors = {
        "a": (1.0, 1.1, 1.2),
        "b": (1.2, 1.0, 1.2),
        "c": (5.0, 5.1, 5.3),
        "d": (0.1, math.nan, 1),
        "e": (1.3, 0.9, 1.2),
        "f": (9.0, 900.0, 9.0),  # a wide interval, whose low end is above 1, too
    }
    records = [made((6, 4, 2), x, e, i) for x in errors for i, e in enumerate(errors[x])]
    setting = Setting(6, 4, 2)
    code = codes.RegressionCode(4, 6)
    found = Comparison(records, {(setting, "a"): code})
    first, second = re.sub("\n  ", " ", found.verdict()).splitlines()
    assert (
        first == f"Best on 3 batches at N = 6, K = 4, S = 2: a, CodedWrapper(model, codes.{code})"
    )
    assert second == "Not clearly worse: b; e"
    assert Comparison(records[:1]).verdict() == ""  # one batch shows no interval


def test_columns_do_not_touch_and_wide_intervals_are_drawn_as_factors():
    wide = "a scheme with a name longer than its column"
    records = [made((6, 4, 2), wide, e, i) for i, e in enumerate((1e-5, 3e2, 1e-3))]
    found = Comparison(records)
    row = found.rows[0]
    line = str(found).splitlines()[2]
    assert len(re.split(" {2,}", line.strip())) == 3
    value, half = row.mse
    factor = scores.of_logarithm(value, half)
    (bars,) = found.draw().axes[0].collections
    (low, _), (high, _) = bars.get_segments()[0]
    assert [low, high] == pytest.approx([value / factor, value * factor])


def test_pictures_of_several_settings_leave_out_what_is_exact():
    by_s = [made((24, 20, s), x, (s or 1e-7) / 9) for s in (0, 4, 8) for x in "ab"]
    (axes,) = Comparison(by_s).draw().axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines if line.get_label()}
    assert axes.get_title() == "20 inputs per group on 24 workers"
    assert [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata())] == [[4, 8]] * 2
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert lines
    errors = {"exact": 0.0, "partly": math.nan, "wrong": 1.0}
    records = [made((9, 4, s), x, s and errors[x]) for s in (1, 2, 0) for x in errors]
    (legend,) = Comparison(records).draw().legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["partly, some missing", "wrong"]
    by_n = [made((n, 4, 2), x, 1 / n) for n in (8, 16) for x in "ab"]
    (axes,) = Comparison(by_n).draw().axes
    assert axes.get_title() == "4 inputs per group, 2 workers lost"
    assert axes.get_xlabel() == "workers"


def test_pictures_of_one_setting_each_show_every_number_the_least_on_top():
    errors = {"a": (1.0, 9.0), "b": (0.02, 0.03), "c": (0.0, 0.0), "d": (1.0, math.nan)}
    records = [
        made((n, n - 1, 1), x, mse, i)
        for n in (5, 6)
        for x in errors
        for i, mse in enumerate(errors[x])
    ]
    figure = Comparison(records).draw()
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert [text.get_text().strip() for text in axes.texts] == [
            "5",
            "0.025",
            "exact",
            "missing answers",
        ]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("score", "scale", "shown"),
    [("rmse", "log", ["0.4", "0.2"]), ("relative_accuracy", "linear", ["0.25", "0"])],
)
def test_pictures_show_the_score_that_is_named(score, scale, shown):
    scores = {"a": Score(0.16, 0.3, 1.0, 0.0, 0.8, 0.5), "b": Score(0.04, 0.1, 1.0, 0.2, 0.8, 0.5)}
    records = [
        Record(5, 4, 1, name, "", 0, batch, 4, 1.25, of)
        for name, of in scores.items()
        for batch in (0, 1)
    ]
    (axes,) = Comparison(records).draw(score).axes
    assert axes.get_xscale() == scale
    assert sorted(text.get_text().strip() for text in axes.texts) == sorted(shown)
    several = [record._replace(lost=lost) for record in records for lost in (1, 2)]
    (axes,) = Comparison(several).draw(score).axes
    assert axes.get_yscale() == scale
    lines = [[*line.get_ydata()] for line in axes.lines if len(line.get_ydata())]
    assert sorted(lines) == sorted([[float(x)] * 2 for x in shown])


def test_pictures_need_a_known_score_and_labels_for_accuracies():
    records = [made((5, 4, 1), "a", 0.1)]
    with pytest.raises(ValueError, match="draw: score must be one of 'mse', 'rmse', 'relative_acc"):
        Comparison(records).draw("error")
    with pytest.raises(ValueError, match="draw: score 'relative_accuracy' needs labels"):
        Comparison(records).draw("relative_accuracy")
