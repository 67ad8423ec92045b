"""Metrics from gradients and outputs: their distances, who has them, and that they compete."""

import copy
import pickle

import pytest
import torch

from coded_torch import CodedWrapper, Regression, metrics
from coded_torch._extension import short_path
from coded_torch.codes import BerrutCode, RegressionCode, SplineCode
from coded_torch.input_space.metrics import METRICS
from coded_torch.surrogates import Memory
from coded_torch.workers import LocalWorkers


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Two(torch.nn.Module):
    """Two inputs, one of them by keyword, one that is no number, and two outputs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(3, 2))

    def forward(self, x, table, *, y):
        x.mul_(2)  # in place
        found = (x @ self.weight).tanh() + y.flatten(1).sum(1, keepdim=True).sin()
        return {"a": found, "b": 1e4 * y.flatten(1).square(), "class": table}


def squared(features):
    features = features.double()
    return (features[:, None] - features).square().sum(-1)


def dense(jacobian, power, floor=1e-4):
    """M^(2 p) from Jacobians ``[n, C, d]``."""
    matrix = torch.einsum("nci,ncj->ij", jacobian, jacobian)
    values, vectors = torch.linalg.eigh(matrix.double())
    values = (values.clamp(min=0) / values[-1] + floor) ** (2 * power)
    return vectors * values @ vectors.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_distances_are_the_gradients(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x = normal(50, 2, 3)
    jacobian = torch.func.vmap(torch.func.jacrev(model))(x.flatten(1)).detach()
    whole = torch.nn.Sequential(torch.nn.Flatten(), model).to(dtype)
    metric = metrics.from_gradients(whole, x.to(dtype))
    z = x.flatten(1).double()
    difference = z[:, None] - z
    for one, power in zip(metric.competing, (0.5, 0.25), strict=True):
        got = one(x)
        assert got.dtype == torch.float32
        want = torch.einsum("abi,ij,abj->ab", difference, dense(jacobian, power), difference)
        close = (
            {"rtol": 1e-4, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 0.1, "atol": 0.1}
        )
        torch.testing.assert_close(squared(got), want, **close)
    assert metric(x.double()).dtype == torch.float64
    assert all(p.grad is None for p in model.parameters())


def test_many_outputs_are_projected_and_wide_inputs_have_a_low_rank():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 3), torch.nn.Tanh(), torch.nn.Linear(3, 40))
    x = normal(300, 20)
    jacobian = torch.func.vmap(torch.func.jacrev(model))(x).detach()
    exact = dense(jacobian, 0.5)
    metric = metrics.from_gradients(model, x)
    z = x[:40].double()
    difference = z[:, None] - z
    want = torch.einsum("abi,ij,abj->ab", difference, exact, difference)
    correlation = torch.corrcoef(torch.stack([squared(metric(x[:40])).flatten(), want.flatten()]))
    assert correlation[0, 1] > 0.99

    class Wide(torch.nn.Module):
        def forward(self, x):
            return model(x.flatten(1)[:, ::7527])  # 20 of 150,528 numbers

    picture = torch.zeros(300, 3, 224, 224)
    picture.flatten(1)[:, ::7527] = x
    wide = metrics.from_gradients(Wide(), picture)
    got = wide(picture[:40])
    assert got.shape[1] <= 512
    correlation = torch.corrcoef(torch.stack([squared(got).flatten(), want.flatten()]))
    assert correlation[0, 1] > 0.98


def test_several_inputs_and_outputs():
    module = Two()
    table = torch.arange(30)
    x, y = normal(30, 3), normal(30, 2, 2, seed=1)
    kept = x.clone()
    with torch.inference_mode():
        metric = metrics.from_gradients(module, {"x": x, "table": table, "y": y})
    assert torch.equal(x, kept)
    assert metric(x, y).shape == (30, 7)
    # Each output counts alike, so the first one's gradients are seen beside 1e4 times larger ones.
    moved = metric(x + 1, y) - metric(x, y)
    assert float(moved.norm(dim=1).mean()) > 0.1
    with pytest.raises(ValueError, match=r"\[3, 4\] numbers per row.*got \[3\]"):
        metric(x)
    plan = Regression(metric=metric).plan([x])
    known = [i for i in range(30) if i % 3]
    plan.decode(x.sin()[known][:, None], known)
    assert "the metric gradients was left out: ValueError" in plan.note


@pytest.mark.parametrize("width", [8, 2000], ids=["narrow", "wide"])
def test_outputs_alone_show_the_direction_in_which_they_change(width):
    x = normal(300, width)
    x[:, 2:] /= width**0.5
    y = {"a": x[:, 0].sin(), "constant": torch.ones(300), "b": 1e4 * x[:, 0].square()}
    metric = metrics.from_outputs({"x": x}, y)
    near = squared(metric(x))
    along = squared(x[:, :1])
    correlation = torch.corrcoef(torch.stack([near.flatten(), along.flatten()]))[0, 1]
    plain = torch.corrcoef(torch.stack([squared(x).flatten(), along.flatten()]))[0, 1]
    assert correlation > 0.9 > plain
    assert metric(x.double()).dtype == torch.float64
    again = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(again(x), metric(x), rtol=0, atol=0)


def test_a_metric_from_outputs_lowers_the_error_of_estimates():
    x = normal(540, 12, seed=3)
    answers = (x[:, :1] + 0.5 * x[:, 1:2]).sin()
    metric = metrics.from_outputs(x[:300], answers[:300])
    known = [i for i in range(240) if i % 6]
    errors = []
    for estimator in (Regression(), Regression(metric=metric)):
        plan = estimator.plan([x[300:]])
        decoded = plan.decode(answers[300:][known][:, None], known)
        errors.append(float((decoded - answers[300:]).square().sum()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("rows", "outputs", "message"),
    [
        (normal(9, 2), normal(8, 2), "with the same rows"),
        (torch.arange(9), normal(9, 2), "floating-point tensors"),
        (normal(9, 2), torch.arange(9), "floating-point tensors"),
        (normal(7, 2), normal(7, 2), "got 7 finite rows"),
        (torch.ones(9, 2), normal(9, 2), "rows and outputs must differ"),
        (normal(9, 2), torch.ones(9, 2), "rows and outputs must differ"),
        (torch.full((9, 2), torch.inf), normal(9, 2), "got 0 finite rows"),
    ],
    ids=["sizes", "integers", "classes", "few", "one row", "one output", "infinite"],
)
def test_outputs_that_teach_nothing(rows, outputs, message):
    with pytest.raises(ValueError, match=f"from_outputs: .*{message}"):
        metrics.from_outputs(rows, outputs)


@pytest.mark.parametrize(
    ("module", "rows", "message"),
    [
        (torch.sign, normal(9, 2), "none that are finite and not 0"),
        (lambda x: x.detach() + 1, normal(9, 2), "none that are finite and not 0"),
        (lambda x: x.argmax(1), normal(9, 2), "none that are finite and not 0"),
        (torch.sqrt, torch.zeros(9, 2), "none that are finite and not 0"),
        (torch.nn.Embedding(4, 2), torch.arange(4), "rows must hold a floating-point tensor"),
        (torch.nn.Tanh(), torch.zeros(0, 2), "with at least one row"),
    ],
    ids=["zero", "detached", "integers", "infinite", "tokens", "empty"],
)
def test_modules_without_gradients(module, rows, message):
    with pytest.raises(ValueError, match=f"from_gradients: .*{message}"):
        metrics.from_gradients(module, rows)


def test_errors_of_the_module_reach_the_caller():
    def broken(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        metrics.from_gradients(broken, normal(9, 2))


def test_rows_without_finite_gradients_are_left_out():
    x = normal(40, 2).abs() + 0.1
    want = metrics.from_gradients(torch.sqrt, x)
    spoilt = torch.cat([x, torch.zeros(3, 2)])
    got = metrics.from_gradients(torch.sqrt, spoilt)
    torch.testing.assert_close(squared(got(x)), squared(want(x)), rtol=1e-5, atol=1e-5)


def one_direction(rows=64):
    """A module of one direction among twelve."""
    direction = normal(12, 1, seed=2)

    def module(x):
        return (x @ direction).sin()

    return module, normal(rows, 12, seed=3)


def test_it_competes_and_estimates_better():
    module, x = one_direction()
    metric = metrics.from_gradients(module, normal(300, 12, seed=4))
    received = range(8)
    errors = {}
    for name, one in {"today": "auto", "gradients": metric}.items():
        plan = RegressionCode(8, 10, metric=one).plan([x], num_stragglers=2)
        results = module(plan.encode(x))[list(received)]
        errors[name] = float((plan.decode(results, received) - module(x)).square().sum())
        assert plan.choices[0].metric.startswith("gradients") == (name == "gradients")
    assert errors["gradients"] < 0.2 * errors["today"]
    code = RegressionCode(8, 10, metric=metric)
    assert sum(not isinstance(x, str) for x in code.candidates()["metric"]) == 2


def test_today_is_kept_where_gradients_tell_nothing():
    """Of a module without a preferred direction; and the estimates are equal to the bit."""
    x = normal(60, 6)
    metric = metrics.from_gradients(lambda x: x, normal(300, 6, seed=1))
    known = [i for i in range(60) if i % 4]
    results = x.sin()[known][:, None]
    plans = [Regression(metric=one).plan([x]) for one in ("auto", metric)]
    today, ours = (plan.decode(results, known) for plan in plans)
    assert plans[1].choices[0].metric in METRICS
    assert torch.equal(today, ours)


@pytest.mark.parametrize("kind", [SplineCode, BerrutCode])
def test_an_order_by_gradients(kind):
    module, x = one_direction()
    metric = metrics.from_gradients(module, normal(300, 12, seed=4))
    errors = []
    for ordering in ("similarity", metric):
        plan = kind(8, 24, ordering=ordering).plan([x])
        answers = plan.decode(module(plan.encode(x)), range(24))
        errors.append(float((answers - module(x)).square().sum()))
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(ValueError, match="'arrival' or a metric of from_gradients"):
        kind(2, 3, ordering="other")
    with pytest.raises(ValueError, match=r"\[12\] numbers per row"):
        kind(2, 3, ordering=metric).plan([x[:, :3]])
    with pytest.raises(ValueError, match="as metric= takes metrics"):
        RegressionCode(2, 3, ordering=metric)


def folded(x):
    """Return outputs that depend on products, so that no direction is the one of all rows."""
    return torch.cat([(4 * x[:, :1] * x[:, 1:2]).tanh(), x[:, 2:3] * x[:, :1]], 1)


@pytest.mark.parametrize("wide", [False, True])
def test_predicted_outputs_order_rows(wide):
    spread = normal(2, 40, seed=9)
    module = (lambda x: folded(x) @ spread) if wide else folded
    metric = metrics.from_gradients(module, normal(300, 6, seed=1))
    x = normal(120, 6, seed=2)
    wanted = folded(x)
    for one in (metric, pickle.loads(pickle.dumps(metric))):
        features = one.for_orders(x)
        plain = one(x)
        steps = []
        for of in (plain, features):
            order = short_path(squared(of).numpy())
            steps.append(float((wanted[order][1:] - wanted[order][:-1]).square().mean()))
        assert steps[1] < 0.8 * steps[0]
        assert torch.equal(one.competing[0](x), plain)


@pytest.mark.parametrize("rows", ["few", "not finite", "alike"])
def test_rows_that_tell_no_outputs(rows):
    x = normal(7 if rows == "few" else 60, 6, seed=1)
    if rows == "not finite":
        x[::2] = torch.nan
    if rows == "alike":
        x[:] = x[0]
    metric = metrics.from_gradients(folded, x)
    others = normal(40, 6, seed=2)
    features = metric.for_orders(others)
    assert features.isfinite().all()
    assert features.shape == ((40, 8) if rows == "not finite" else (40, 6))


def test_it_is_copied_and_pickled():
    module, x = one_direction()
    metric = metrics.from_gradients(module, x)
    want = metric(x)
    for other in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
        assert torch.equal(other(x), want)
    assert metric.competing[0] == metric
    assert metric.competing[1] != metric
    assert len({*metric.competing, *metric.competing}) == 2


def test_a_memory_learns_by_gradients():
    module, x = one_direction(400)
    metric = metrics.from_gradients(module, normal(300, 12, seed=4))
    others = normal(100, 12, seed=5)
    errors = []
    for one in (None, metric):
        memory = Memory(metric=one)
        memory.observe([x], [module(x)])
        memory.rebuild()
        (found,) = memory.estimate([others])
        errors.append(float((found - module(others)).square().sum()))
    assert errors[1] < 0.1 * errors[0]
    assert pickle.loads(pickle.dumps(memory)).metric is not None
    with pytest.raises(TypeError, match="metric must be of type GradientMetric or None"):
        Memory(metric="shrunk")
    memory = Memory(metric=metric)  # inputs that it does not fit are learnt by other metrics
    memory.observe([x[:, :3]], [x[:, :1]])
    memory.rebuild()
    assert memory.estimate([others[:, :3]])[0].shape == (100, 1)


def test_a_mean_by_gradients():
    direction = torch.nn.Linear(12, 1)
    with torch.no_grad():
        direction.weight.copy_(normal(1, 12, seed=2))
    model = torch.nn.Sequential(direction, torch.nn.Tanh())
    x = normal(2000, 12, seed=3)
    metric = metrics.from_gradients(model, x[:300])
    widths = []
    for one in ("auto", metric):
        coded = CodedWrapper(model, workers=LocalWorkers(), parts=2, estimator=Regression(one))
        *_, last = coded.mean(x, max_rows=200, seed=0)
        widths.append(float(last.half_width))
        exact = float(model(x).detach().double().mean())
        assert abs(float(last.value) - exact) < 2 * widths[-1]
    assert widths[1] < 0.7 * widths[0]


@pytest.mark.cuda
def test_on_a_device():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x = normal(50, 6)
    want = metrics.from_gradients(model, x)(x)
    metric = metrics.from_gradients(model.cuda(), x)
    got = metric(x.cuda())
    assert got.is_cuda
    torch.testing.assert_close(squared(got.cpu()), squared(want), rtol=1e-3, atol=1e-3)
