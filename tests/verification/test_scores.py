"""How odd results look, and how far apart they are."""

import math
from types import SimpleNamespace

import pytest
import torch

from coded_torch._table import DISPUTED, Part
from coded_torch.verification._scores import Results, Scores


def smooth(x):
    return torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1], x[:, 2].exp()], 1)


def batch(size, seed=0):
    x = torch.rand(size, 3, generator=torch.Generator().manual_seed(seed))
    return x, smooth(x)


def part_of(worker, rows, *leaves):
    """A part with a good result."""
    result = SimpleNamespace(divided=range(len(leaves)), rows=leaves.__getitem__)
    return Part(worker, tuple(rows), worker=worker, result=result)


def results(scores, x, y, parts=4):
    """The results of a call in parts, and which part answers each row."""
    found = Results(scores, [x])
    answers, step = {}, len(x) // parts
    for worker in range(parts):
        rows = range(worker * step, (worker + 1) * step)
        found.add(part := part_of(worker, rows, y[list(rows)]))
        answers |= dict.fromkeys(rows, part)
    return found, answers


def conclude(found, answers, doubted=()):
    credible = {row: part for row, part in answers.items() if part.worker not in doubted}
    found.conclude(credible, None if doubted else ())


def learn(scores, count, size=64, parts=4, wrong=0.0, checked=True):
    """Learn from calls, in which a quarter of the rows may be wrong, and what is odd unchecked."""
    for seed in range(count):
        (x, y), generator = batch(size, seed), torch.Generator().manual_seed(seed)
        y[: size // 4] += wrong * torch.randn(size // 4, 3, generator=generator)
        found, answers = results(scores, x, y, parts)
        odd = found.odd(answers)
        found.conclude(answers, () if checked else odd)
    scores.learn()


class TestScores:
    @pytest.mark.parametrize("wrong", [[0, 1, 2], [1]], ids=["row", "one output"])
    def test_a_wrong_row_looks_oddest(self, wrong):
        x, y = batch(240)
        y[17, wrong] = y[99, wrong] + 0.3
        found, answers = results(Scores(), x, y)
        scores = found.scores(answers)
        assert max(scores, key=scores.__getitem__) == 17

    def test_what_is_odd_is_as_rare_as_it_should_be(self):
        scores, many = Scores(), 0
        learn(scores, 60)
        for seed in range(100, 140):
            x, y = batch(64, seed)
            found, answers = results(scores, x, y)
            many += len(set(found.odd(answers)))
        assert many <= 0.01 * 40 * 64

    def test_wrong_rows_and_parts_are_odd(self):
        scores = Scores()
        learn(scores, 60)
        x, y = batch(64, 999)
        y[16:32] += torch.randn(16, 3, generator=torch.Generator().manual_seed(5))
        found, answers = results(scores, x, y)
        assert set(found.odd(answers)) & set(range(16, 32))

    def test_what_is_odd_and_was_not_checked_does_not_become_usual(self):
        scores = Scores()
        learn(scores, 36, parts=16)
        bars = scores.rows.at, scores.parts.at
        learn(scores, 36, parts=16, wrong=1.0, checked=False)
        assert bars == (scores.rows.at, scores.parts.at)
        assert max(bars) < math.inf

    def test_nothing_is_odd_before_enough_is_known(self):
        x, y = batch(64)
        y[3] = 100.0
        found, answers = results(Scores(), x, y)
        assert not found.odd(answers)

    def test_scoring_takes_a_share_of_the_time_of_calls(self):
        scores = Scores()
        scores.spend(scoring=0.5, call=0.5)
        assert scores.has_time  # a second is there at first
        scores.spend(scoring=1.0, call=1.5)
        assert not scores.has_time
        for _ in range(4):
            assert not scores.has_time
            scores.spend(scoring=0.0, call=0.5)
        assert scores.has_time

    def test_small_batches_are_scored_beside_earlier_rows(self):
        scores = Scores()
        x, y = batch(8, 1)
        found, answers = results(scores, x, y)
        assert not found.scores(answers)
        learn(scores, 1)
        y[5] = y[0] + 1.0
        found, answers = results(scores, x, y)
        of_rows = found.scores(answers)
        assert max(of_rows, key=of_rows.__getitem__) == 5

    def test_rows_beside_rows_that_come_again_look_no_odder(self):
        scores, many = Scores(), 0
        learn(scores, 150, size=8, parts=8)
        assert scores.parts.at < math.inf
        for seed in range(30):
            (x, y), (past, known) = batch(8, 1000 + seed), batch(8, 149 - seed // 2)
            x[:5], y[:5] = past[:5], known[:5]
            found, answers = results(scores, x, y, 8)
            many += len(found.odd(answers))
        assert many <= 2

    def test_of_large_batches_240_rows_are_scored(self):
        x, y = batch(1000)
        found, answers = results(Scores(), x, y)
        assert 190 <= len(found.scores(answers)) <= 240

    def test_rows_of_doubted_and_excluded_workers_are_not_kept(self):
        scores = Scores()
        x, y = batch(64)
        found, answers = results(scores, x, y)
        conclude(found, answers, doubted={1})
        scores.learn()
        assert set(scores.recent.workers.tolist()) == {0, 2, 3}
        scores.forget(2)
        assert set(scores.recent.workers.tolist()) == {0, 3}

    def test_results_that_are_not_finite_or_missing_are_not_scored(self):
        x, y = batch(64)
        y[3, 0] = math.inf
        found, answers = results(Scores(), x, y)
        assert not found.scores(answers)
        del answers[5]
        assert not found.scores(answers)


class TestDifferences:
    def of(self, a, b):
        found = Results(Scores())
        base = torch.linspace(-2, 2, 8)[:, None].to(a.dtype)
        one, other = part_of(1, (2, 5), a), part_of(2, (5, 7), b)
        for part in (part_of(0, range(8), base), one, other):
            found.add(part)
        return found, found.differences([(one, other)])[0]

    def test_are_of_common_rows_in_spreads(self):
        _, by = self.of(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.5], [0.0]]))
        assert by.keys() == {5}
        assert 0.2 < by[5] < 0.6

    def test_a_huge_wrong_result_does_not_widen_the_spread(self):
        _, by = self.of(torch.tensor([[0.0], [1.0]]), torch.tensor([[1e30], [0.0]]))
        assert by[5] > 5  # a tenth of its own size is added to the spread

    @pytest.mark.parametrize("sizes", [(12, 12, 12, 12), (4, 4, 4, 36), (1, 1, 1, 1)])
    @pytest.mark.parametrize("factor", [1e-6, 1e6])
    def test_no_worker_sets_the_spread_however_many_rows_it_has(self, sizes, factor):
        # Of one row per worker, 18 of 600 seeds draw rows so close that .3 is more than 3 spreads.
        rows = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(0))
        first = 0
        parts = list[Part]()
        found = Results(Scores())
        for worker, size in enumerate(sizes):
            units = range(first, first + size)
            parts.append(part_of(worker, units, rows[first : first + size]))
            first += size
        parts[-1] = part_of(3, parts[-1].units, factor * rows[-sizes[-1] :])
        parts.append(part_of(4, [0], rows[:1] + 0.3))
        for part in parts:
            found.add(part)
        assert 0.02 < found.differences([(parts[0], parts[-1])])[0][0] < 3

    def test_the_spread_is_taken_anew_without_doubted_workers(self):
        rows = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
        parts = [part_of(i, range(16), (1.0, 1e6, 1e6, 1e6)[i] * rows) for i in range(4)]
        parts.append(part_of(4, [0], rows[:1] + 0.3))
        found = Results(Scores())
        for part in parts:
            found.add(part)
        pair = parts[0], parts[4]
        assert found.differences([pair])[0][0] < found.tolerance
        found.doubt({1, 2, 3})
        assert found.differences([pair])[0][0] > found.tolerance

    def test_half_precision_of_a_part_that_failed_is_not_tolerated(self):
        found = Results(Scores())
        for worker, dtype in enumerate((torch.float32, torch.float16)):
            found.add(part := part_of(worker, [0], torch.zeros(1, 2, dtype=dtype)))
        assert found.tolerance == 0.03
        part.outcome = DISPUTED
        assert found.tolerance == 1e-3

    def test_an_output_that_few_workers_vary_has_the_spread_of_the_others(self):
        """The worker that varies it may be the one that is wrong."""
        found = Results(Scores())
        rows = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
        rows[:, 1] = 0.0
        parts = [part_of(i, range(16), rows) for i in range(4)]
        parts.append(part_of(4, range(16), torch.stack([rows[:, 0], 1e6 * rows[:, 0]], 1)))
        parts.append(part_of(5, [0], rows[:1] + torch.tensor([[0.0, 0.3]])))
        for part in parts:
            found.add(part)
        assert found.differences([(parts[0], parts[5])])[0][0] > 0.05

    def test_each_output_has_a_spread_of_its_own(self):
        found = Results(Scores())
        base = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
        base = torch.stack([1e5 * base[:, 0], base[:, 1].sigmoid()], 1)
        wrong = torch.stack([base[:, 0], 1 - base[:, 1]], 1)
        parts = [part_of(i, range(8), rows) for i, rows in enumerate((base, base + 1e-7, wrong))]
        for part in parts:
            found.add(part)
        rounded, changed = found.differences([(parts[0], parts[1]), (parts[0], parts[2])])
        assert max(rounded.values()) < 1e-4
        assert min(changed.values()) > 1e-3

    def test_an_output_that_is_mostly_0_is_rounded_as_the_others(self):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)).double()
        rows = net(torch.randn(64, 64, dtype=torch.float64)).detach()
        rows = (rows - rows.quantile(0.85, 0)).relu().float()
        noise = 1e-6 * torch.randn(64, 64) * (rows > 0)
        found = Results(Scores())
        parts = [part_of(i, range(64), x) for i, x in enumerate((rows, rows + noise))]
        for part in parts:
            found.add(part)
        assert max(found.differences([(parts[0], parts[1])])[0].values()) < found.tolerance

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_a_large_probability_among_small_ones_is_rounded_as_such(self, dtype):
        logits = torch.tensor([[7.0, 0.0, -8.0]]).repeat(8, 1)
        logits += torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        logits[5] = torch.tensor([0.0, 7.5, -8.0])
        found, rows = Results(Scores()), logits.softmax(1).to(dtype)
        above = torch.nextafter(rows, rows + 1)
        parts = [part_of(i, range(8), x) for i, x in enumerate((rows, above))]
        for part in parts:
            found.add(part)
        assert max(found.differences([(parts[0], parts[1])])[0].values()) < found.tolerance

    @pytest.mark.parametrize(
        ("a", "b", "difference"),
        [
            (math.nan, math.nan, 0.0),
            (1.0, math.nan, math.inf),
            (1, 2, math.inf),
            (1, 1, 0.0),
            (True, False, math.inf),
        ],
    )
    def test_equal_bits_do_not_differ_and_nan_and_integers_differ_without_bound(
        self, a, b, difference
    ):
        _, by = self.of(torch.tensor([[a], [a]]), torch.tensor([[b], [b]]))
        assert by[5] == difference

    def test_outputs_whose_spread_float32_loses_differ_by_it(self):
        """Else wrong results far from 0 would count as alike."""
        found = Results(Scores())
        base = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None] + 65536 * 15258789 + 32768
        parts = [part_of(0, range(8), base), part_of(1, (2, 5), base[[2, 5]])]
        parts.append(part_of(2, (5, 7), base[[5, 7]] + 3))
        for part in parts:
            found.add(part)
        assert found.differences([(parts[1], parts[2])])[0][5] > 0.5  # of both spread and value

    def test_half_precision_is_tolerated(self):
        x = torch.zeros(2, 1)
        assert self.of(x.half(), x.half())[0].tolerance == 0.03
        assert self.of(x, x)[0].tolerance == 1e-3
