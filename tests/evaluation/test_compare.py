"""Codes side by side on any model: the same batches and lost workers, a table and a picture."""

import dataclasses
import math

import pytest
import torch

import coded_torch
from coded_torch import codes
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.evaluation import scores
from coded_torch.evaluation.compare import Comparison, Row, compare, peers, received_by
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Contiguous, Trace, Uniform
from coded_torch.workers import LocalWorkers

NAMES = list(peers(4, 6))


@pytest.fixture(scope="module")
def shipped():
    images, labels = digits()
    return lenet5(), list(images[:384].split(96)), list(labels[:384].split(96))


@pytest.fixture(scope="module")
def found(shipped):
    model, batches, labels = shipped
    return compare(model, batches, [(24, 20, 4), (9, 8, 1)], labels=labels, seed=3)


def by_name(comparison, setting):
    return {row.name: row for row in comparison.rows if row.setting == setting}


def test_every_scheme_at_every_setting_in_order(found):
    expected = [(setting, name) for setting in ((24, 20, 4), (9, 8, 1)) for name in NAMES]
    assert [(row.setting, row.name) for row in found.rows] == expected
    for row in found.rows:
        assert (row.code.num_workers, row.code.num_data) == row.setting[:2]
    assert isinstance(by_name(found, (9, 8, 1))["replication"].code, codes.ReplicationCode)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_wrapper(shipped, found, name):
    model, batches, labels = shipped
    row = by_name(found, (24, 20, 4))[name]
    coded = CodedWrapper(
        model,
        row.code.replace(shuffle=False),
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
    again = compare(model, others, [(24, 20, 4)], seed=3)
    for name, row in by_name(again, (24, 20, 4)).items():
        assert repr(row.code) == repr(by_name(found, (24, 20, 4))[name].code)
        assert row.relative_accuracy is None
    numbers = by_name(found, (24, 20, 4))["the paper's scheme"].code
    assert (numbers.encoder_smoothing, numbers.decoder_smoothing) != (0.0, 0.0)


def test_a_seed_repeats_and_another_does_not(shipped):
    model, batches, _ = shipped
    runs = [compare(model, batches[:2], [(9, 8, 1)], seed=seed).rows[0].rmse for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_workers_are_lost_by_any_law(shipped):
    model, batches, _ = shipped
    asked = []

    def law(lost, seed):
        asked.append((lost, seed))
        return Trace([[math.inf] * lost + [0.0] * (9 - lost)])

    compare(model, batches[:2], [(9, 8, 1)], law=law, seed=5)
    assert sorted(asked) == [(1, 5), (1, 6)]
    uniform = compare(model, batches[:2], [(9, 8, 3)]).rows[0].rmse
    assert compare(model, batches[:2], [(9, 8, 3)], law=Contiguous).rows[0].rmse > uniform
    with pytest.raises(TypeError, match=r"the result of law must be .*Stragglers"):
        compare(model, batches[:2], [(9, 8, 1)], law=lambda lost, seed: 0.5)


def test_nothing_lost(shipped):
    model, batches, labels = shipped
    for row in compare(model, batches[:2], [(12, 4, 0)], labels=labels[:2]).rows:
        if not row.code.mixes:
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
    assert [row.name for row in found.rows] == ["replication", "regression"]


def test_table(found):
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "N = 24 workers, K = 20 inputs a group, S = 4 workers lost"
    assert lines[1].split() == ["RMSE", "MSE", "/", "variance", "RelAcc"]
    for line, row in zip(lines[2 : 2 + len(NAMES)], found.rows, strict=False):
        assert line.startswith(f"  {row.name} ")
        assert line.count("±") == 3
        assert float(line[28:].split()[0]) == pytest.approx(row.rmse[0], rel=0.05)
    assert lines[2 + len(NAMES)] == ""
    assert lines[3 + len(NAMES)].startswith("N = 9 workers")


def test_table_without_labels_and_intervals():
    row = Row((3, 2, 1), "mine", codes.SplineCode(2, 3), [0.123456, None], [1e-7, 2e-8], None)
    assert str(Comparison([row])).splitlines()[1:] == [
        "                            RMSE              MSE / variance",
        "  mine                      0.123             1.0e-07 ± 2e-08",
    ]
    (axes,) = Comparison([dataclasses.replace(row, mse=[0.5, None])]).draw().axes
    assert [bar.get_width() for bar in axes.patches] == [0.5]


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


def test_picture_of_one_setting_has_a_bar_for_each_scheme(found):
    rows = list(by_name(found, (9, 8, 1)).values())
    (axes,) = Comparison(rows).draw().axes
    assert [text.get_text() for text in axes.get_yticklabels()] == NAMES
    assert [bar.get_width() for bar in axes.patches] == [row.mse[0] for row in rows]


def test_picture_of_several_settings_leaves_out_what_is_exact(found):
    rows = list(by_name(found, (24, 20, 4)).values())
    exact = [dataclasses.replace(row, setting=(24, 20, 0), mse=[1e-12, 0.0]) for row in rows]
    more = [dataclasses.replace(row, setting=(24, 20, 8)) for row in rows]
    (axes,) = Comparison([*exact, *rows, *more]).draw().axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert lines == {name: [4, 8] for name in NAMES}
    assert len(Comparison(found.rows).draw().axes) == 2


def test_received_are_those_not_lost():
    received = received_by(Uniform(3, seed=0), 10)
    assert len(received) == 7
    assert received == sorted(set(received))


ONES = [torch.ones(4, 1)] * 2


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((None, ONES), {}, TypeError, "module must be of type Module, got NoneType"),
        (
            (torch.nn.Tanh(), None),
            {},
            TypeError,
            "batches must be a sequence of batches, such as .x., got NoneType",
        ),
        ((torch.nn.Tanh(), ONES[0]), {}, TypeError, "batches must be a sequence of batches"),
        ((torch.nn.Tanh(), [ONES[0], ONES[0][:0]]), {}, ValueError, r"batches\[1\] must hold"),
        ((torch.nn.Tanh(), ONES[:1]), {}, ValueError, "batches must hold at least two, .* got 1"),
        ((torch.nn.Tanh(), ONES, [(4, 5, 1)]), {}, ValueError, r"settings must .* got \(4, 5, 1\)"),
        ((torch.nn.Tanh(), ONES, [(5, 4, 5)]), {}, ValueError, r"settings must .* got \(5, 4, 5\)"),
        ((torch.nn.Tanh(), ONES, [(5, 4)]), {}, ValueError, r"settings must be .* got \(5, 4\)"),
        ((torch.nn.Tanh(), ONES, (5, 4, 1)), {}, ValueError, "settings must be triples .* got 5"),
        ((torch.nn.Tanh(), ONES), {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ((torch.nn.Tanh(), ONES), {"labels": ONES[:1]}, ValueError, "labels must be given for all"),
        ((torch.nn.Tanh(), ONES), {"labels": None, "seed": "x"}, TypeError, "seed must be an int"),
    ],
)
def test_bad_arguments(arguments, options, kind, message):
    with pytest.raises(kind, match=f"compare: {message}"):
        compare(*arguments, **options)


def test_labels_must_fit_the_answers():
    with pytest.raises(ValueError, match=r"labels must be \[B\] .* got \[3\] for \[4, 1\]"):
        compare(torch.nn.Tanh(), ONES, [(4, 2, 1)], labels=[torch.zeros(3, dtype=int)] * 2)
    with pytest.raises(TypeError, match=r"labels must be integer tensors, .* got torch\.float32"):
        compare(torch.nn.Tanh(), ONES, [(4, 2, 1)], labels=ONES)


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
