"""Calls in which machines lie: LeNet-5 on digits, on the virtual clock and on threads."""

import functools
import pickle
import random

import pytest
import torch

from coded_torch.codes import BerrutCode, KernelCode, LagrangeCode, ReplicationCode, SplineCode
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.nn import CodedWrapper, TooManyAdversaries, Waiting
from coded_torch.stragglers import Uniform
from coded_torch.surrogates import Memory
from coded_torch.workers import FaultyWorkers, LocalWorkers


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@functools.cache
def images():
    return digits()[0][:240]


def coded(code=None, liars=(), *, attack="sign_flip", lost=2, waiting=None, seed=1, **options):
    pool = FaultyWorkers(
        LocalWorkers(Uniform(lost, seed=seed) if lost else None), attack=attack, adversaries=liars
    )
    options = {"max_adversaries": 1, "shuffle": random.Random(7), **options}
    return CodedWrapper(
        lenet5(), code or KernelCode(20, 24), workers=pool, waiting=waiting, **options
    )


def test_a_liar_is_dropped_and_named():
    wrapper = coded(liars=(5, 6, 7, 8), lost=0, max_adversaries=4, code=KernelCode(20, 36))
    answers = wrapper(images())
    report = wrapper.last_run
    assert report.adversaries == (5, 6, 7, 8)
    assert set(report.rejected) == {5, 6, 7, 8}
    assert all("disagrees" in why or "differs" in why for why in report.rejected.values())
    assert not {5, 6, 7, 8} & set(report.received)
    assert min(report.scores[m] for m in (5, 6, 7, 8)) > 3
    assert report.ended == "complete"
    exact = wrapper.module(images())
    own = ~report.predicted
    torch.testing.assert_close(answers[own], exact[own])


def test_answers_are_as_good_as_if_the_liar_had_been_late():
    exact = coded().module(images())
    for seed in range(3):
        wrapper = coded(liars=(4,), seed=seed)
        error = (wrapper(images()) - exact).square().mean()
        if 4 not in wrapper.last_run.rejected:  # it was late
            continue
        assert wrapper.last_run.adversaries == (4,)
        fooled = coded(liars=(4,), seed=seed, max_adversaries=0)(images())
        assert error < 0.3 * (fooled - exact).square().mean()


def test_copies_are_enough():
    wrapper = coded(ReplicationCode(20, 60), (4,), lost=0)
    assert torch.equal(wrapper(images()).argmax(1), wrapper.module(images()).argmax(1))
    assert wrapper.last_run.adversaries == (4,)
    assert not wrapper.last_run.predicted.any()


def test_nothing_is_looked_for_by_default(monkeypatch):
    monkeypatch.setattr("coded_torch.nn.coded_wrapper.Agreement", None)
    wrapper = coded(liars=(4,), max_adversaries=0)
    wrapper(images())
    assert wrapper.last_run.adversaries == ()
    assert wrapper.last_run.scores == {}
    assert wrapper.max_adversaries == 0


def test_honest_machines_are_believed():
    wrapper = coded()
    for start in range(0, 2000, 240):
        wrapper(digits()[0][start : start + 240])
        assert wrapper.last_run.adversaries == ()
        assert len(wrapper.last_run.scores) == len(wrapper.last_run.received) == 22


@pytest.mark.parametrize(
    "code", [SplineCode(20, 24), BerrutCode(20, 24), LagrangeCode(4, 24)], ids=str
)
@pytest.mark.parametrize("attack", ["noise", "sign_flip", "swap", "shift", "replay", "constant"])
def test_an_audit_row_shows_who_lies_for_every_code(code, attack):
    wrapper = coded(code, (4,), attack=attack, lost=0, audit=True, ordering="arrival")
    wrapper(images())
    report = wrapper.last_run
    assert report.adversaries == (4,)
    groups = 240 // code.num_data
    assert report.work == pytest.approx(code.num_workers / code.num_data * (groups + 1) / groups)


def test_an_audit_row_changes_no_answer():
    for code in (KernelCode(20, 24), SplineCode(20, 24)):
        plain, audited = coded(code), coded(code, audit=True)
        torch.testing.assert_close(
            plain.replace(shuffle=random.Random(1))(images()),
            audited.replace(
                shuffle=random.Random(1), workers=LocalWorkers(Uniform(2, seed=1)), audit=False
            )(images()),
        )
        audited(images())
        assert audited.last_run.adversaries == ()


def test_two_liars_do_not_hide_each_other_along_a_curve():
    wrapper = coded(SplineCode(20, 30), (4, 17), lost=0, max_adversaries=2)
    wrapper(images())
    assert wrapper.last_run.adversaries == (4, 17)


def test_more_liars_than_may_be_dropped_are_an_error():
    wrapper = coded(liars=(2, 5, 9), lost=0)
    with pytest.raises(TooManyAdversaries, match="more machines than max_adversaries lie: machine"):
        wrapper(images())
    assert wrapper.last_run.failed
    assert len(wrapper.last_run.adversaries) == 1
    error = TooManyAdversaries((1, 2), 1, 24, "machine 3 lies")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_rows_of_a_liar_are_asked_again():
    wrapper = coded(KernelCode(8, 11), (3,), lost=0, waiting=Waiting())
    answers, report = wrapper.run(images())
    assert report.adversaries == (3,)
    assert any("asked by rows" in note for note in report.notes)
    assert report.asked[8:]  # machines that stand in for the liar
    assert not report.predicted.any()
    torch.testing.assert_close(answers, wrapper.module(images()))


def test_probabilities_and_pytrees():
    softmax = torch.nn.Sequential(lenet5(), torch.nn.Softmax(-1))
    wrapper = coded(liars=(4,), lost=0, attack="swap", link="softmax")
    wrapper.module = softmax
    wrapper(images())
    assert wrapper.last_run.adversaries == (4,)


def test_token_ids_have_copies_only():
    embedding = torch.nn.Embedding(100, 8)
    pool = FaultyWorkers(LocalWorkers(), attack="noise", adversaries=(4,))
    wrapper = CodedWrapper(embedding, ReplicationCode(4, 12), workers=pool, max_adversaries=1)
    wrapper(torch.arange(100))
    report = wrapper.last_run
    assert report.adversaries == (4,)
    assert report.scores == {}
    assert any("copies only" in note for note in report.notes)


def test_where_machines_sit_is_a_secret_unless_a_generator_says():
    first, again = coded(shuffle=random.Random(3)), coded(shuffle=random.Random(3))
    torch.testing.assert_close(first(images()), again(images()), rtol=0, atol=0)
    assert isinstance(coded(shuffle=True)._deal(), random.SystemRandom)
    pickle.loads(pickle.dumps(coded(shuffle=True)))


def test_bad_arguments():
    with pytest.raises(ValueError, match="max_adversaries must be at least 0, got -1"):
        coded(max_adversaries=-1)
    with pytest.raises(TypeError, match=r"max_adversaries must be an integer, got 1\.0"):
        coded(max_adversaries=1.0)
    with pytest.raises(ValueError, match=r"max_adversaries must be at most 11, .*, got 12"):
        coded(max_adversaries=12)
    with pytest.raises(
        ValueError, match=r"num_stragglers must be at most 19.* max_adversaries=2, got 20"
    ):
        coded(max_adversaries=2, waiting=Waiting.first(20))
    with pytest.raises(ValueError, match=r"shuffle must be True or a random\.Random"):
        coded(shuffle=False)
    with pytest.raises(ValueError, match="audit must be False without max_adversaries"):
        coded(max_adversaries=0, audit=True)
    with pytest.raises(TypeError, match=r"shuffle must be of type bool, got str"):
        coded(shuffle="secret")


@functools.cache
def imitation(share=0.1):
    """A surrogate: LeNet-5 with other weights by a tenth."""
    student, generator = lenet5(), torch.Generator().manual_seed(0)
    for weight in student.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data += share * weight.std() * noise
    return student


@pytest.mark.parametrize("code", [KernelCode(20, 20), SplineCode(20, 24)], ids=str)
def test_what_a_surrogate_leaves_shows_smaller_lies(code):
    """Of machines that lie by a tenth of the outputs' spread, none of which has copies."""
    gains = []
    for liar in (3, 11, 17):
        pool = FaultyWorkers(LocalWorkers(), attack="noise", adversaries=(liar,), strength=0.1)
        scores = {}
        for surrogate in ((), imitation()):
            wrapper = CodedWrapper(
                lenet5(),
                code,
                workers=pool,
                waiting=Waiting.first(0),
                max_adversaries=1,
                shuffle=random.Random(7),
                surrogate=surrogate,
            )
            wrapper(images())
            scores[surrogate != ()] = wrapper.last_run.scores[liar]
            if surrogate != ():
                assert wrapper.last_run.adversaries == (liar,)
        gains.append(scores[True] - scores[False])
    assert min(gains) > 3


def test_a_useless_surrogate_changes_no_score():
    def noise(x):
        return torch.randn(len(x), 10, generator=torch.Generator().manual_seed(1))

    def scores(surrogate):
        wrapper = coded(surrogate=surrogate)
        wrapper(images())
        assert wrapper.last_run.adversaries == ()
        return wrapper.last_run.scores

    assert scores(noise) == scores(())


class Rough(torch.nn.Module):
    """LeNet-5 for 20 columns, every third of which is computed in bfloat16."""

    def __init__(self):
        super().__init__()
        self.exact, self.rough = lenet5(), lenet5().bfloat16()

    def forward(self, x):
        rows = x.unflatten(0, (20, -1))  # [columns, groups, ...]
        outputs = self.exact(x).unflatten(0, rows.shape[:2]).clone()
        for column in range(0, 20, 3):
            outputs[column] = self.rough(rows[column].bfloat16()).float()
        return outputs.flatten(0, 1)


@pytest.mark.parametrize("share", [None, 0.0, 0.03])
def test_rounding_is_no_lie_however_well_a_surrogate_predicts(share):
    for start in range(0, 1920, 240):
        wrapper = CodedWrapper(
            Rough(),
            KernelCode(20, 20),
            waiting=Waiting.first(0),
            max_adversaries=1,
            shuffle=random.Random(7),
            surrogate=() if share is None else imitation(share),
        )
        wrapper(digits()[0][start : start + 240])
        assert wrapper.last_run.adversaries == ()
        assert max(wrapper.last_run.scores.values()) < 4


def test_a_surrogate_is_asked_once():
    calls = []

    def student(x):
        calls.append(len(x))
        return imitation()(x)

    coded(surrogate=student)(images())
    assert calls == [240]


@pytest.mark.parametrize("defended", [True, False])
def test_lies_are_never_remembered(defended):
    """What a machine says that is dropped is no answer, and none that a memory learns from."""
    known, module = Memory(), lenet5()
    for start in range(0, 960, 240):
        pool = FaultyWorkers(LocalWorkers(), attack="sign_flip", adversaries=(4,))
        wrapper = CodedWrapper(
            module,
            KernelCode(20, 24),
            workers=pool,
            waiting=Waiting.first(0),
            shuffle=random.Random(start),
            max_adversaries=int(defended),
            surrogate=known,
        )
        wrapper(digits()[0][start : start + 240])
        assert wrapper.last_run.adversaries == ((4,) if defended else ())
    seen, outputs = (torch.cat(column) for column in zip(*known._rows, strict=True))
    assert len(seen) > 800
    off = (module(seen.view(-1, 1, 28, 28)) - outputs).abs().amax(1) > 1e-3
    assert bool(off.any()) != defended
