"""Surrogates that learn: memories, and students of a module."""

import copy
import os
import pickle
import signal

import pytest
import torch
from torch import nn

from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.stragglers import Uniform
from coded_torch.surrogates import Memory, _memory, distill
from coded_torch.testing.helpers import until
from coded_torch.workers import LocalWorkers

from .nn.modules import WAYS, Call, divided, rand


def f(x):
    return torch.stack([(2 * x[:, 0]).sin() + x[:, 1], x[:, 2] * x[:, 3]], 1)


class Function(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.scale * f(x)


def filled(size=600, capacity=2048, outputs=f):
    known = Memory(capacity)
    for x in rand(size, 4).split(100):
        known.observe([x], [outputs(x)])
    known.rebuild()
    return known


def error(known, function=f):
    x = rand(200, 4, seed=1)
    (got,) = known.estimate([x])
    wanted = function(x)
    return float((got - wanted).square().mean() / wanted.var(0).mean())


def test_it_estimates_what_it_has_seen_and_what_is_near():
    known = filled()
    (got,) = known.estimate([rand(600, 4)])
    assert got.dtype == torch.float32
    assert float((got - f(rand(600, 4))).square().mean()) < 1e-3
    assert error(known) < 0.1 < error(filled(40))


def test_it_knows_nothing_at_first_and_its_capacity_is_a_count():
    known = Memory()
    assert known.estimate([rand(3, 4)]) is None
    known.rebuild()
    assert (len(known), known.estimate([rand(3, 4)])) == (0, None)
    with pytest.raises(ValueError, match=r"^Memory: capacity must be at least 1, got 0"):
        Memory(0)


@pytest.mark.parametrize("far", [1e6, 1e20])
def test_a_far_row_spoils_no_estimates(far):
    known, x = Memory(), rand(600, 3)
    x[0] = far
    y = x.clamp(max=9).sum(1, keepdim=True).sin()
    known.observe([x], [y])
    known.rebuild()
    (got,) = known.estimate([x[1:200] + 1e-3])
    assert float((got - y[1:200]).square().mean()) < 0.02 * float(y.var())


def test_other_shapes_are_ignored():
    known = filled(300)
    known.observe([rand(10, 5)], [rand(10, 2)])
    known.observe([rand(10, 4)], [rand(10, 3)])
    assert len(known) == 300
    assert known.estimate([rand(10, 5)]) is None


@pytest.mark.parametrize("x", [torch.zeros(300, 4), torch.ones(300, 1), rand(300, 1).round()])
def test_inputs_that_repeat_or_say_nothing(x):
    known = Memory()
    known.observe([x], [x[:, :1] * 2])
    known.rebuild()
    (got,) = known.estimate([x])
    torch.testing.assert_close(got.double(), x[:, :1].double() * 2, rtol=0, atol=0.01)


def test_the_oldest_go_first_and_memory_is_bounded():
    known = Memory(100)
    for i in range(30):
        known.observe([rand(17, 4, seed=i)], [torch.full((17, 1), float(i))])
        known.rebuild()
        assert len(known) <= 100
    kept = sum(len(outputs) for _, outputs in known._rows)
    assert kept == len(known) == 85
    (old,) = known.estimate([rand(17, 4, seed=0)])
    (new,) = known.estimate([rand(17, 4, seed=29)])
    torch.testing.assert_close(new, torch.full((17, 1), 29.0), rtol=0, atol=0.1)
    assert float(old.min()) > 20


def test_it_measures_in_the_metric_that_estimates_best():
    """The feature that decides is a thousandth of the others."""

    def hidden(x):
        return (3 * 1e3 * x[:, :1]).sin()

    scale = torch.tensor([1e-3, 1.0, 1.0, 1.0])
    known = Memory()
    x, unseen = (rand(n, 4, seed=n) * scale for n in (1100, 200))
    known.observe([x], [hidden(x)])
    known.rebuild()
    (got,) = known.estimate([unseen])
    error = (got - hidden(unseen)).square().mean() / hidden(unseen).var()
    assert float(error) < 0.2


def test_a_failure_is_logged_and_what_was_known_stays(monkeypatch, caplog):
    known = filled(300)
    before = error(known)

    def fail(*args):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(_memory, "RowProcess", fail)
    known.observe([rand(9, 4)], [f(rand(9, 4))])
    known.rebuild()
    assert "Memory: could not be rebuilt" in caplog.text
    assert error(known) == before


def test_it_travels_empty():
    known = filled(300, capacity=500)
    for twin in (pickle.loads(pickle.dumps(known)), copy.deepcopy(known)):
        assert (len(twin), twin.capacity, repr(twin)) == (0, 500, "Memory(capacity=500)")
    assert len(known) == 300


def wrap(known, way="regression", module=None, link=None, **options):
    options = {"workers": LocalWorkers(Uniform(2, seed=1)), "surrogate": known} | options
    return CodedWrapper(module or Function(), **divided(way, 5, 6, link) | options)


def mse(coded, batches):
    with torch.no_grad():
        return sum(float((coded(x) - coded.module(x)).square().mean()) for x in batches)


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapper_fills_it_with_exact_answers_and_asks_it(way):
    known = Memory()
    # Without hedges, rows are missing in every batch.
    never = {"waiting": Waiting(estimate_after=3.0, hedge_budget=0)} if way == "rows" else {}
    coded = wrap(known, way, **never)
    exact = 0
    for i in range(10):
        coded(rand(64, 4, seed=i))
        exact += int((~coded.last_run.estimated).sum())
    assert len(known) == exact
    known.rebuild()
    batches = [rand(32, 4, seed=100 + i) for i in range(8)]
    alone = wrap((), way, **never)
    assert mse(coded, batches) < 0.5 * mse(alone, batches)
    assert coded.last_run.surrogate_weights[0][0] > 0.5


def test_what_it_leaves_is_estimated_in_the_metric_and_length_of_the_results():
    known, x, module = filled(2000), rand(64, 4, seed=9), Function()
    known.follow(module)
    coded, alone = wrap(known, module=module), wrap((), module=module)
    with torch.no_grad():
        coded(x), alone(x)
    assert coded.last_run.surrogate_weights[0][0] > 0.5
    (choice,), (of_results,) = coded.last_run.distances, alone.last_run.distances
    assert (choice.metric, choice.length) == (of_results.metric, of_results.length)
    assert choice.error > of_results.error


@pytest.mark.parametrize("way", WAYS)
def test_all_are_remembered_where_nothing_is_missing(way):
    known, x = Memory(), rand(10, 4)
    pool = LocalWorkers()
    coded = CodedWrapper(Function(), **divided(way, 5, 6), workers=pool, surrogate=known)
    coded(x)
    assert len(known) == 10
    with torch.inference_mode():
        coded(x)
    assert len(known) == 20
    assert not coded.last_run.estimated.any()
    known.rebuild()
    torch.testing.assert_close(known.estimate([x])[0].double(), f(x), rtol=0, atol=0.01)


def test_it_is_forgotten_when_the_weights_change():
    known, module = Memory(), Function()
    coded = wrap(known, module=module)
    coded(rand(64, 4))
    coded(rand(64, 4, seed=1))
    assert len(known) > 64
    with torch.no_grad():
        module.scale.mul_(2)
    coded(rand(64, 4))
    assert 0 < len(known) <= 64
    coded.module = Function()
    coded(rand(64, 4))
    assert len(known) <= 64
    # Results of other weights arrive too late to be remembered.
    generation = known.follow(coded.module)
    known.clear()
    known.observe([rand(9, 4)], [f(rand(9, 4))], generation)
    assert len(known) == 0


def test_a_memory_that_another_wrapper_took_meanwhile_answers_nothing():
    known = Memory()
    other = wrap(known, module=Call(lambda x: -100 * f(x)))

    def taken(module, *_):
        for i in range(3):
            other(rand(200, 4, seed=i))
        known.rebuild()
        assert known.estimate([rand(64, 4)]) is not None  # of the other module

    module, alone = Function(), wrap((), module=Function())
    alone(rand(64, 4))
    coded = wrap(known, module=module)
    coded(rand(64, 4))
    module.register_forward_hook(taken)
    answers, report = coded.run(rand(64, 4))
    assert report.estimated.any()
    assert torch.equal(answers, alone(rand(64, 4)))


@pytest.mark.filterwarnings("ignore:.*parts get other answers than the batch")
def test_nothing_is_learnt_of_a_call_in_which_the_weights_changed():
    known, module = Memory(), Function()

    def change(module, *_):
        with torch.no_grad():
            module.scale.mul_(2)

    module.register_forward_hook(change)
    coded = wrap(known, module=module)
    coded(rand(64, 4))
    assert len(known) == 0


def test_probabilities_are_remembered_as_logarithms():
    class Soft(Function):
        def forward(self, x):
            return (3 * super().forward(x)).softmax(-1)

    known = Memory()
    coded = wrap(known, module=Soft(), link="softmax")
    for i in range(10):
        coded(rand(64, 4, seed=i))
    known.rebuild()
    batches = [rand(32, 4, seed=100 + i) for i in range(8)]
    assert mse(coded, batches) < 0.6 * mse(wrap((), module=Soft(), link="softmax"), batches)
    assert coded.last_run.notes == ()
    assert any(x.min() < 0 for x in known.estimate([batches[0]]))


def teacher():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3)).requires_grad_(False)
    module[0].weight.mul_(4)  # or it would be a matter of straight lines
    return module


def student(width=32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def test_a_student_learns_without_labels():
    module, small = teacher(), student()
    x = rand(1000, 4).float()
    reached = distill(small, module, x.split(100), epochs=60)
    held_out = rand(300, 4, seed=7).float()
    with torch.no_grad():
        missed, wanted = module(held_out) - small(held_out), module(held_out)
    assert reached < 0.2
    assert float(missed.var(0).mean() / wanted.var(0).mean()) < 2 * reached
    assert not small.training
    coded = wrap(small, module=module)
    batches = held_out.split(50)
    assert mse(coded, batches) < 0.5 * mse(wrap((), module=module), batches)


@pytest.mark.parametrize("drawing", [nn.Identity(), nn.Dropout(0.5)], ids=["plain", "drawing"])
def test_the_same_seed_gives_the_same_student(drawing):
    def taught(seed):
        module, small = teacher(), nn.Sequential(student(), drawing)
        torch.seed()
        state = torch.random.get_rng_state()
        distill(small, module, [rand(100, 4).float()], epochs=2, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return small[0][0].weight

    assert torch.equal(taught(0), taught(0))
    assert not torch.equal(taught(0), taught(1))


def test_it_stops_early_and_keeps_the_best():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.evaluations = student(), 0

        def forward(self, x):
            self.evaluations += not self.training
            return self.inner(x)

    small, x = Counted(), rand(200, 4).float()
    reached = distill(small, teacher(), [x], epochs=50, learning_rate=30.0, patience=2)
    assert small.evaluations < 50
    held_out = x[::10]
    exact = teacher()(held_out)
    missed = (exact - small(held_out)).detach()
    assert reached == pytest.approx(float(missed.var(0).mean() / exact.var(0).mean()), rel=1e-4)


def test_a_student_must_reach_a_finite_error():
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="student must reach a finite error"):
        distill(nn.Linear(4, 4), Call(torch.log), [x - 0.5], epochs=1)


def test_a_memory_goes_on_learning_in_a_forked_process():
    memory = Memory()
    memory.observe([rand(300, 4)], [rand(300, 2)])
    memory.rebuild()
    before = memory._learnt
    # MKL frees a thread's buffers under a lock when the thread ends, which may be after join(); a
    # child forked meanwhile finds it locked for ever. No use of MKL after a fork can prevent that.
    task = f"/proc/self/task/{memory._making.native_id}"
    until(lambda: not os.path.exists(task))
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)
        memory.observe([rand(300, 4)], [rand(300, 2)])
        memory.rebuild()
        os._exit(0 if memory._learnt is not before else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_poor_surrogate_has_no_weight_where_results_estimate_each_other_well():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 4)).requires_grad_(False)
    x, waves = torch.randn(240, 4), torch.randn(4, 4)
    wrong = 0.05 * module(x).std()

    def poor(x):
        return module(x) + wrong * torch.sin(3 * x @ waves)

    workers = LocalWorkers(Uniform(4, seed=0))
    _, report = CodedWrapper(
        module, parts=24, workers=workers, surrogate=poor, waiting=Waiting(estimate_after=3.0)
    ).run(x)
    assert report.estimated.any()
    assert report.surrogate_weights == ((0.0,),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": []}, "batches must hold at least four rows, got 0"),
        ({"batches": [rand(1, 4)]}, "batches must hold at least four rows, got 1"),
        ({"batches": [(rand(3, 4), rand(2, 4))]}, r"tensors of one batch size .* got \[\(3, 4\), "),
        ({"student": nn.Identity(), "module": nn.Identity()}, "student must have weights to train"),
        ({"student": nn.Linear(4, 1)}, r"student must return shapes \[\(3, 3\)\].* got \[\(3, 1"),
        ({"student": 3}, "student must be of type Module, got int"),
        ({"batches": 3}, r"batches must be a sequence of batches, such as \[x\], got int"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0}, "learning_rate must be positive and finite, got 0"),
        ({"batches": [rand(5, 4), rand(5, 3)]}, "batches must differ in their sizes only"),
        ({"batches": [rand(5, 4), (rand(5, 4),) * 2]}, "batches must differ in their sizes only"),
        ({"seed": "a"}, "seed must be an integer"),
        ({"link": "logit"}, "link must be None or 'softmax', got 'logit'"),
    ],
)
def test_arguments_are_checked(arguments, message):
    given = {"student": student(), "module": teacher(), "batches": [rand(9, 4).float()]}
    with pytest.raises((TypeError, ValueError), match=f"^distill: .*{message}"):
        distill(**given | arguments)


def test_a_memory_needs_as_many_outputs_as_inputs():
    with pytest.raises(ValueError, match="inputs and outputs must have the same number of rows"):
        Memory().observe([rand(6, 2)], [rand(5, 2)])
