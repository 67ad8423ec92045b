"""Answers with the help of surrogates, for all ways of dividing a batch."""

import copy
import dataclasses
import math
import pickle
from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.exchangeability import Pool
from coded_torch import CodedWrapper, Waiting
from coded_torch.codes import DeadlineExceeded, RegressionCode
from coded_torch.demo import digits, lenet5
from coded_torch.nn import Report
from coded_torch.stragglers import Trace, Uniform
from coded_torch.surrogates import Memory
from coded_torch.workers import LocalWorkers

from .modules import FIXED, SOON, WAYS, Call, divided, linear, rand


def net() -> nn.Module:
    """Far from linear, so that no decoder is right without help."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)
    nn.init.normal_(layers[0].weight, std=2.0)
    return nn.Sequential(*layers).double().requires_grad_(False)


def wrap(way, module=None, lost=2, link=None, **options) -> CodedWrapper:
    how = divided(way, 5, 6, link, **FIXED if way == "rows" else {})
    if way == "rows":
        how["waiting"] = Waiting(deadline=1.0, hedge_budget=0)
    pool = LocalWorkers(Uniform(lost, seed=1))
    return CodedWrapper(net() if module is None else module, **how, workers=pool, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", ["a class", "some rows"])
def test_masked_scores_are_estimated_within_their_dtype(dtype, masked):
    least = torch.finfo(dtype).min

    def scores(x):
        y = x @ torch.eye(4, 3, dtype=x.dtype)
        return (
            y.index_fill(1, torch.tensor([2]), least)
            if masked == "a class"
            else (y.masked_fill(y > 1.5, least))
        )

    x = torch.randn(240, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    pool = LocalWorkers(Uniform(4, seed=0))
    answers, report = CodedWrapper(Call(scores), workers=pool, parts=24, waiting=SOON).run(x)
    assert report.estimated.sum() == 40
    assert answers.isfinite().all()
    assert not report.error_bounds.isnan().any()
    if masked == "a class":
        assert (answers.argmax(1) != 2).all()


def mse(coded: CodedWrapper, x: Tensor) -> float:
    return float((coded(x) - coded.module(x)).square().mean())


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-4])
def test_what_a_surrogate_knows_is_not_decoded(way, scale):
    f, x = net(), rand(23, 4)
    coded = wrap(way, surrogate=lambda x: scale * f(x))
    answers, run = coded(x), coded.last_run
    assert run.estimated.any()
    ((weight,),) = run.surrogate_weights
    assert weight == pytest.approx(1 / scale, rel=2e-3)  # but for the ridge
    without = mse(wrap(way), x)
    assert float((answers - f(x)).square().mean()) < 1e-4 * without
    if run.error_bounds is not None:
        assert run.error_bounds.median() < 0.05 * without**0.5


def test_own_results_stay_bit_for_bit(way):
    def cubic(x):  # the same bits wherever in a batch a row stands
        return x[:, :3] * x[:, 1:] * x[:, 1:]

    x = rand(23, 4)
    coded = wrap(way, module=Call(cubic), surrogate=lambda x: cubic(x) + 1e-3 * x[:, :3])
    answers = coded(x)
    own = ~coded.last_run.estimated
    assert any(coded.last_run.surrogate_weights[0])
    assert own.any()
    assert torch.equal(answers[own], cubic(x)[own])


def test_nothing_is_asked_where_nothing_is_missing(way):
    calls = []
    coded = wrap(way, lost=0, surrogate=calls.append)
    coded(rand(12, 4))
    assert not calls
    assert (coded.last_run.surrogate_weights, coded.last_run.notes) == ((), ())


def fails(x):
    raise ValueError("out of memory\nand more")


@pytest.mark.parametrize(
    ("surrogate", "why"),
    [
        (fails, "ValueError: out of memory"),
        (lambda x: x[:, :2], "ValueError: it returned float64 (23, 2), where (23, 3) is needed"),
        (lambda x: x[0, :3], "ValueError: it returned float64 (3,), where (23, 3) is needed"),
        (lambda x: x[:, :3].long(), "it returned int64 (23, 3), where (23, 3) is needed"),
        (lambda x: None, "it returned None, where (23, 3) is needed"),
        (lambda x: (x[:, :3],), "where the module returned *"),
        (lambda x: x[:, :3] / 0, "ValueError: it returned values that are not finite"),
    ],
)
def test_one_that_fails_is_left_out(way, surrogate, why, caplog):
    x = rand(23, 4)
    coded = wrap(way, surrogate=[surrogate, net()])
    answers, run = coded(x), coded.last_run
    (note,) = run.notes
    assert note.startswith("surrogate 0 (")
    assert note.partition("left out: ")[2].endswith(why) or why in note
    assert caplog.records[0].getMessage() == note
    assert caplog.records[0].exc_info is not None
    alone = wrap(way, surrogate=net())
    assert torch.equal(answers, alone(x))
    assert run.surrogate_weights == ((0.0, *alone.last_run.surrogate_weights[0]),)
    only = wrap(way, surrogate=surrogate)
    assert torch.equal(only(x), wrap(way)(x))
    assert only.last_run.surrogate_weights == ((0.0,),)


Pair = namedtuple("Pair", "first second")


class Towers(nn.Module):
    """Two outputs in a dictionary, one with its batch at the end, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = net(), net()

    def forward(self, pair, shift, *, scale):
        left = self.left(pair.first.T + shift)
        return {"y": (left * scale[:, None]).T, "z": [self.right(pair.second), None], "k": 7}


def test_pytrees_and_dims(way):
    args, scale = (Pair(rand(4, 23), rand(23, 4, seed=1)), rand(4, seed=2)), rand(23, seed=3)
    dims = {"in_dims": (Pair(1, 0), "shared"), "out_dims": {"y": 1, "z": 0, "k": None}}
    f = Towers()

    def surrogate(*args, **kwargs):
        out = f(*args, **kwargs)
        return {"y": 2 * out["y"], "z": [-out["z"][0], None], "k": 8}

    coded = wrap(way, module=f, surrogate=surrogate, **dims)
    out, exact = coded(*args, scale=scale), f(*args, scale=scale)
    for got, wanted in ((out["y"], exact["y"]), (out["z"][0], exact["z"][0])):
        assert float((got - wanted).square().mean()) < 1e-4 * float(wanted.square().mean())
    assert out["k"] == 7
    ((of_y,), (of_z,)) = coded.last_run.surrogate_weights
    assert (of_y, of_z) == (pytest.approx(0.5, rel=0.01), pytest.approx(-1.0, rel=0.01))
    assert coded.last_run.notes == ()


def test_gradients_pass_through_results_only(way):
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale).double())

        def forward(self, x):
            return self.scale * x[:, :3].sin()

    student = Scaled(0.9)
    coded = wrap(way, module=Scaled(1.0), lost=1, surrogate=student)
    x = rand(23, 4).requires_grad_()
    coded(x).sum().backward()
    assert any(coded.last_run.surrogate_weights[0])
    assert student.scale.grad is None
    assert x.grad.isfinite().all()
    coded.surrogate = [student, Memory()]
    values = torch.func.grad(lambda x: coded(x).sum())(x.detach())
    for name in ("estimated", "error_bounds", "label_p_values"):  # they outlive the transform
        kept = getattr(coded.last_run, name)
        assert not torch._C._functorch.is_functorch_wrapped_tensor(kept), name
    assert values.shape == x.shape
    assert torch.isfinite(values).all()
    assert coded.module.scale.grad.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["rows", "regression"])
def test_error_bounds_hold_rounded_answers(way, dtype):
    """As wide as a float32 module of the same results has them, and the rounding."""
    f, x = net(), rand(64, 4)

    def run(wide):
        module = Call(lambda x: (100 + f(x)).to(dtype).to(wide))
        return wrap(way, module).run(x)

    exact, known = run(torch.float32)
    answers, report = run(dtype)
    assert torch.equal(answers, exact.to(dtype))
    moved = (answers.double() - exact.double()).norm(dim=1)
    wider = (report.error_bounds - known.error_bounds)[report.estimated]
    assert (wider >= moved[report.estimated]).all()
    assert wider.max() < 200 * torch.finfo(dtype).eps
    assert not report.error_bounds[~report.estimated].any()
    reports = []

    def total(x):
        answers, report = wrap(way, Call(lambda x: (100 + f(x)).to(dtype))).run(x)
        reports.append(report)
        return answers.float().sum()

    torch.func.grad(total)(x)  # reports outlive transforms
    torch.testing.assert_close(reports[0].error_bounds, report.error_bounds)


def test_surrogates_are_no_part_of_the_module():
    student = linear(4, 3)
    coded = wrap("regression", surrogate=student)
    assert coded.surrogate == (student,)
    names = {name for name, _ in coded.named_parameters()}
    assert names == {f"module.{name}" for name, _ in net().named_parameters()}
    assert coded.state_dict().keys() == net().state_dict().keys()
    nn.Sequential(coded).load_state_dict(nn.Sequential(net()).state_dict())
    assert coded.to(torch.float32) is coded
    assert student.weight.dtype == torch.float32  # it has to go where the inputs are
    x = rand(23, 4).float()
    torch.testing.assert_close(pickle.loads(pickle.dumps(coded.eval()))(x), copy.deepcopy(coded)(x))


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_raised_with_the_answers_that_came(error):
    def surrogate(x):
        raise error("no memory is left")

    coded, x = wrap("rows", surrogate=surrogate), rand(23, 4)
    with pytest.raises(error, match="no memory is left") as info:
        coded(x)
    assert info.value.report is coded.last_run
    own = ~coded.last_run.estimated
    torch.testing.assert_close(info.value.answers[own], net()(x)[own])
    assert info.value.answers[~own].isnan().all()


@pytest.mark.parametrize("shape", [(3,), ()])
@pytest.mark.parametrize("lost", [1, 4])
def test_few_results_are_calibrated_by_a_memory(lost, shape):
    """One of four rows missing, or all; 1,000 earlier rows say how far off it may be."""
    f, known = net(), Memory()
    f = f if shape else Call(lambda x, of=f: of(x)[:, 0])
    coded = CodedWrapper(
        f, parts=4, workers=LocalWorkers(Uniform(lost, seed=1)), waiting=SOON, surrogate=known
    )
    known.follow(f)
    earlier = rand(1000, 4, seed=9)
    known.observe([earlier], [f(earlier).detach()])
    with torch.no_grad():
        coded.workers = LocalWorkers()
        coded(rand(4, 4))  # the form of outputs is known then
        coded.workers = LocalWorkers(Uniform(lost, seed=1))
        known.rebuild()
        inside = []
        for seed in range(100):
            x = rand(4, 4, seed=100 + seed)
            answers, report = coded.run(x)
            missing = report.estimated
            assert report.error_bounds[missing].isfinite().all()
            assert report.error_bounds_at(0.999)[missing].isinf().all()
            errors = (answers - f(x)).reshape(4, -1).norm(dim=1)
            inside += (errors <= report.error_bounds)[missing].tolist()
    assert 0.85 <= sum(inside) / len(inside) <= 1


def test_levels_of_error_bounds_are_checked():
    _, report = wrap("rows").run(rand(23, 4))
    for level in (0, 1.5, math.nan, "x"):
        with pytest.raises((TypeError, ValueError), match="coverage must be between 0 and 1, got"):
            report.error_bounds_at(level)
    with pytest.raises(ValueError, match="error_bounds_at: odds must be at least 1 and finite"):
        report.error_bounds_at(0.9, odds=0.5)


def test_a_worker_that_is_always_late_does_not_lose_the_same_rows_in_every_call():
    """Else the bounds of sorted batches, whose rows differ by their places, would not hold."""
    state = torch.random.get_rng_state()
    x, y = torch.arange(24.0)[:, None], torch.zeros(24, 1)
    pool = LocalWorkers(Trace([[math.inf] + [0.0] * 23]))
    module = Call(lambda rows: y[rows.flatten().long()])
    coded = CodedWrapper(module, workers=pool, parts=24, waiting=Waiting(1.0, hedge_budget=0))
    generator, inside, lost = torch.Generator().manual_seed(0), [], set()
    for _ in range(300):
        noise = torch.randn(24, 1, generator=generator)
        y.copy_((x / 6).sin() + (x / 23) ** 4 * noise)  # the last rows are noisy
        answers, report = coded.run(x)
        lost |= {*report.missing_rows}
        errors = (answers - y).abs().flatten()
        inside += (errors <= report.error_bounds_at(0.9))[report.estimated].tolist()
    assert len(lost) == 24
    assert 0.85 <= sum(inside) / len(inside) <= 1
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize("parts", [24, 48])
def test_a_loss_that_depends_on_content_is_reported(content, parts):
    """Bounds hold less often then, and nothing else says so."""
    y, generator = torch.zeros(48, 1), torch.Generator().manual_seed(0)
    module, x = Call(lambda rows: y[rows.flatten().long()]), torch.arange(48.0)[:, None]
    pool = Pool()
    pool.lost = 6
    waiting = Waiting(estimate_after=math.inf, hedge_budget=0)
    coded = CodedWrapper(module, workers=pool, parts=parts, waiting=waiting)
    inside, alarms = [], []
    for _ in range(50):
        noise = torch.randn(48, 1, generator=generator) * (torch.arange(48.0)[:, None] % 7) ** 2
        y.copy_(noise)
        seconds = noise.abs().flatten() if content else torch.rand(48, generator=generator)
        pool.seconds = seconds.tolist()
        answers, report = coded.run(x)
        inside += ((answers - y).abs().flatten() <= report.error_bounds_at(0.9))[
            report.estimated
        ].tolist()
        alarms.append(report.missing_not_at_random)
        is_said = any("not missing at random" in note for note in report.notes)
        assert report.missing_not_at_random == is_said
    assert (sum(inside) / len(inside) < 0.8) == content
    assert any(alarms) == alarms[-1] == content


@pytest.mark.parametrize("odds", [1, 3])
def test_bounds_hold_as_often_although_some_rows_are_likelier_to_be_missing(odds):
    """By a level at which a row of these odds is inside as often."""
    _, report = wrap("rows").run(rand(23, 4))
    level = 1 - 0.3 / (0.3 + odds * 0.7)
    assert torch.equal(report.error_bounds_at(0.7, odds=odds), report.error_bounds_at(level))


def test_bounds_are_no_tensors_of_the_mode_in_which_they_are_read():
    _, report = wrap("rows").run(rand(23, 4))
    with torch.inference_mode():
        assert not report.estimated.is_inference()
        assert not report.error_bounds.is_inference()


def test_a_report_with_replaced_fields_keeps_its_bounds():
    _, report = wrap("rows").run(rand(23, 4))
    other = dataclasses.replace(report, notes=("mine",))
    for name in ("estimated", "error_bounds", "label_p_values"):
        assert torch.equal(getattr(other, name), getattr(report, name))
    assert torch.equal(other.error_bounds_at(0.7), report.error_bounds_at(0.7))


def test_classes_are_certified_at_a_false_discovery_rate():
    """By Benjamini and Hochberg's rule, over estimated rows alone."""
    report = Report(source=torch.tensor([2] * 4 + [0]))
    report.label_p_values = torch.tensor([0.01, 0.3, 0.1, 0.02, 0.0], dtype=torch.float64)
    assert report.certified(0.1).tolist() == [True, False, False, True, True]
    assert report.certified(0.14).tolist() == [True, False, True, True, True]
    assert report.certified(0.001).tolist() == [False] * 4 + [True]
    assert report.certified(0.31).all()
    with torch.device("meta"):
        assert report.certified(0.3).all()  # a float32 of .3 would be smaller than the p-value
    assert Report(source=torch.zeros(3)).certified(0.1) is None
    with pytest.raises(ValueError, match="certified: rate must be between 0 and 1, got 1"):
        report.certified(1)


@pytest.mark.parametrize(("shape", "classes"), [((3,), True), ((1,), False), ((3, 2), False)])
@pytest.mark.parametrize("lost", [0, 2, 4])
def test_only_scores_of_classes_have_label_p_values(shape, classes, lost):
    """If every answer is exact, if some are estimated, and if a surrogate answers alone."""
    f = Call(lambda x: x[:, : math.prod(shape)].reshape(-1, *shape) if len(x) else x)
    coded = wrap("rows", f, lost, surrogate=f)
    _, run = coded.run(rand(20, 6), waiting=Waiting(deadline=1.0, hedge_budget=0))
    assert run.estimated.sum() == 4 * lost
    assert (run.label_p_values is not None) == classes
    assert run.error_bounds is not None


def test_error_bounds_hold_for_periodic_batches():
    """Rows of 24 sources in turn, on 24 parts: a part of one source would be lost as a whole."""
    generator = torch.Generator().manual_seed(0)
    module, held = nn.Tanh(), []
    for seed in range(30):
        level = torch.randn(24, 4, generator=generator).repeat(10, 1)
        x = level + 0.05 * torch.randn(240, 4, generator=generator)
        pool = LocalWorkers(Uniform(8, seed=seed))
        answers, report = CodedWrapper(module, workers=pool, parts=24, waiting=SOON).run(x)
        errors = (answers - module(x)).norm(dim=1)
        held.append((errors <= report.error_bounds)[report.estimated].double().mean())
    assert torch.stack(held).mean() > 0.93  # .95 less two standard errors; .2 with strides


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_shared_output_has_its_shape_beside_a_surrogate(shape):
    """It does not answer alone: another call's shared output may differ."""
    module = Call(lambda x: (x[:, :2], torch.ones(shape)))
    coded = wrap("rows", module, 2, surrogate=module, out_dims=(0, None))
    answers, shared = coded(rand(20, 4))
    assert (answers.shape, shared.shape) == ((20, 2), shape)
    coded.workers = LocalWorkers(Uniform(5))
    with pytest.raises(DeadlineExceeded):
        coded(rand(20, 4))


def test_threads_estimate_in_inference_mode_too():
    """Threads of torch do not know of the caller's mode."""
    images, model, found = digits()[0][:240], lenet5(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for mode in (torch.no_grad, torch.inference_mode):
            workers = LocalWorkers(Uniform(4, seed=0))
            coded = CodedWrapper(model, RegressionCode(20, 24), workers=workers)
            with mode():
                found.append(coded.run(images))
    finally:
        torch.set_num_threads(threads)
    (answers, report), (others, other) = found
    assert report.estimated.any()
    assert torch.equal(answers, others)
    assert torch.equal(report.error_bounds, other.error_bounds)
