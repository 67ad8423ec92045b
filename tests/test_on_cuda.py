"""The package on CUDA devices: answers are the CPU's, where they belong, whoever computes them."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from coded_torch.codes import BerrutCode, LagrangeCode, RegressionCode, ReplicationCode, SplineCode
from coded_torch.input_space._ordering import Grouping
from coded_torch.linear import MatrixMap, SplineMap
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.nn._finite import all_finite, sums_of
from coded_torch.stragglers import Uniform
from coded_torch.workers import DeviceWorkers, LocalWorkers

from .nn.modules import Call
from .waits import Launches, host_waits

pytestmark = pytest.mark.cuda

CODES = {
    "spline": lambda: SplineCode(4, 8),
    "berrut": lambda: BerrutCode(4, 8),
    "lagrange": lambda: LagrangeCode(2, 8),
    "replication": lambda: ReplicationCode(4, 8),
    "kernel": lambda: RegressionCode(4, 8),
    "kernel, spread": lambda: RegressionCode(4, 8, metric="spread"),
    "midpoints": lambda: RegressionCode(4, 8, redundancy="midpoints"),
}
every_code = pytest.mark.parametrize("make_code", CODES.values(), ids=CODES)
# Answers of float32 that were computed in another order, after a decoder that amplifies.
TOLERANCE = 1e-3
# The same in 8 bits.
TOLERANCE_OF_HALF = 0.1
DEVICES = ["cuda:0", "cuda:1"]
POOLS = {
    "two devices": ["cuda:0", "cuda:1"],
    "one device twice": ["cuda:0", "cuda:0"],
    "with the host": ["cuda:0", "cpu"],
    "the host": ["cpu", "cpu"],
    "the other device": ["cuda:1"],
}


either_pool = pytest.mark.parametrize(
    "pool", [contextlib.nullcontext, lambda: DeviceWorkers(["cuda:0", "cuda:0"])],
    ids=["LocalWorkers", "DeviceWorkers"],
)  # fmt: skip


def random_numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = random_numbers(30, 12)


def network(dtype=torch.float32):
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 5))
    return module.to(dtype).eval()


def there(*devices):
    """The devices, where this machine has them all."""
    most = max((torch.device(d).index or 0 for d in devices if d != "cpu"), default=0)
    if most >= torch.cuda.device_count():
        pytest.skip(f"there is no cuda:{most}")
    return devices if len(devices) > 1 else devices[0]


def coded(module, make_code, *, ordering="similarity", link=None, **options):
    """A wrapper that loses two of its workers and shuffles as another does."""
    code = make_code().replace(ordering=ordering, link=link)
    options = {"workers": LocalWorkers(Uniform(2, seed=0))} | options
    return CodedWrapper(module, code, **options)


def check_agreement(make_code, device="cuda:0", x=X, module=None, tolerance=TOLERANCE, **options):
    """Answers on a device are the CPU's. Options that have a state are given as functions."""
    device = there(device)
    module = network() if module is None else module

    def answers(device):
        made = {key: v() if callable(v) else v for key, v in options.items()}
        with torch.no_grad():
            return coded(module.to(device), make_code, **made)(x.to(device))

    want, got = answers("cpu"), answers(device)
    assert got.device == torch.device(device)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.cpu(), want, atol=tolerance, rtol=0)


def cast(dtype):
    options = {"x": X.to(dtype), "module": network(dtype), "tolerance": TOLERANCE_OF_HALF}
    return pytest.param(options, id=str(dtype))


VARIANTS = [
    *(pytest.param({"device": device}, id=device) for device in DEVICES),
    *map(cast, (torch.float64, torch.bfloat16, torch.float16)),
    pytest.param({"ordering": "arrival"}, id="arrival"),
    *(pytest.param({"waiting": w}, id=str(w)) for w in (Waiting(), Waiting.first(2))),
    pytest.param(
        {"module": nn.Sequential(network(), nn.Softmax(-1)), "link": "softmax"}, id="shares"
    ),
]


@pytest.mark.parametrize("variant", VARIANTS)
@every_code
def test_codes(make_code, variant):
    check_agreement(make_code, **variant)


@pytest.mark.parametrize("device", DEVICES)
@every_code
def test_gradients(make_code, device):
    device = there(device)

    def gradients(device):
        module, x = network().to(device), X.clone().to(device).requires_grad_()
        coded(module, make_code)(x).square().sum().backward()
        return [t.grad.cpu() for t in (x, *module.parameters())]

    # A sum over 30 rows.
    torch.testing.assert_close(gradients(device), gradients("cpu"), atol=30 * TOLERANCE, rtol=0)


@either_pool
@every_code
def test_autocast(make_code, pool):
    module, x = network().to("cuda"), X.to("cuda")
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(pool())
        wrapper = CodedWrapper(module, make_code(), workers=workers)
        stack.enter_context(torch.autocast("cuda", torch.bfloat16))
        with torch.no_grad():
            answers = wrapper(x)
    host = CodedWrapper(network(), make_code())
    assert answers.dtype == torch.bfloat16
    with torch.no_grad():
        want = host(X)
    torch.testing.assert_close(answers.cpu().float(), want, atol=TOLERANCE_OF_HALF, rtol=0)


@pytest.mark.parametrize("grad", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize(
    ("make_code", "waiting"),
    [(CODES["kernel"], None), (CODES["spline"], Waiting.first(2))],
    ids=["kernel", "spline"],
)
@pytest.mark.parametrize("home", ["cuda:0", "cuda:1", "cpu"])
@pytest.mark.parametrize("devices", POOLS.values(), ids=POOLS)
def test_device_workers(devices, home, make_code, waiting, grad):
    there(home, *devices)
    module, x = network().to(home), X.clone().to(home).requires_grad_(grad)
    want = coded(network(), make_code, workers=None, waiting=waiting)(X).detach()
    with DeviceWorkers(devices) as pool:
        wrapper = coded(module, make_code, workers=pool, waiting=waiting)
        for _ in range(3):
            module.zero_grad()
            with torch.set_grad_enabled(grad):
                answers = wrapper(x)
            assert answers.device == torch.device(home)
            if grad:
                answers.square().sum().backward()
                for leaf in (x, *module.parameters()):
                    assert leaf.grad.isfinite().all()
            if waiting is None:  # all results arrive
                torch.testing.assert_close(answers.detach().cpu(), want, atol=TOLERANCE, rtol=0)
            assert not wrapper.last_run.rejected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["spline", "matrix"])
def test_linear_maps(kind, dtype, device):
    device = there(device)
    maps = {
        "spline": SplineMap(np.linspace(0, 1, 9), np.linspace(0, 1, 12)),
        "matrix": MatrixMap(random_numbers(12, 9)),
    }
    map, values = maps[kind], random_numbers(9, 300).to(dtype)

    def check(got, want):
        assert got.device == torch.device(device)
        tolerance = TOLERANCE_OF_HALF if dtype.itemsize == 2 else TOLERANCE
        torch.testing.assert_close(got.cpu(), want, atol=tolerance, rtol=0)

    want = map(values)
    for strided in (values, values[:, ::3], values[:, :0], values[:, :1].expand(9, 5)):
        check(map(strided.to(device)), map(strided))
    check(map.adjoint(want.to(device)), map.adjoint(want))
    batch, grouping = random_numbers(30, 40).to(dtype), Grouping.arrival(30, 9)
    check(map.gathered(batch.to(device), grouping), map.gathered(batch, grouping))
    if dtype.itemsize > 2:
        check(
            *(
                torch.func.grad(lambda v: map(v).square().sum())(values.to(d))
                for d in (device, "cpu")
            )
        )
        check(*(torch.func.vmap(map)(values.expand(2, 9, 300).to(d)) for d in (device, "cpu")))


@either_pool
def test_serve(pool):
    servers = pytest.importorskip("tests.serve.servers")
    rows = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(pool())
        application = servers.built(servers.linear().to("cuda"), workers=workers)
        port = stack.enter_context(servers.serving(application))
        client = stack.enter_context(servers.Client(port))
        status, answer = client.infer({"inputs": [servers.tensor(rows)]})
    assert status == 200, answer
    want = servers.linear()(torch.tensor(rows)).flatten()
    torch.testing.assert_close(torch.tensor(answer["outputs"][0]["data"]), want, atol=1e-3, rtol=0)


# Waits in a call of 240 rows, counted on the pretended accelerator. Without compiled kernels a new
# decoder takes 3 more.
WAITS = {
    "spline": (lambda: SplineCode(20, 24), 2 + 3),
    "replication": (lambda: ReplicationCode(20, 24), 2),
    "kernel": (lambda: RegressionCode(20, 24), 4),
}


@pytest.mark.parametrize(("make_code", "most"), WAITS.values(), ids=WAITS)
def test_a_warm_call_waits_seldom(make_code, most):
    x = random_numbers(240, 12).to("cuda")
    wrapper = CodedWrapper(
        network().to("cuda"), make_code(), workers=LocalWorkers(Uniform(4, seed=0))
    )
    with torch.no_grad():
        for _ in range(2):
            wrapper(x)
        with host_waits() as lines:
            wrapper(x)
    assert sum(lines.values()) <= most, lines


# Launches in a call of 240 rows in 24 parts, three of which are the module's: before parts of one
# batch were reduced together, 64, 58 and 60 (with 4 stragglers).
LAUNCHES = {
    "spline": ({"code": SplineCode(20, 24)}, 15),
    "rows": ({"parts": 24}, 11),
    "replication": ({"code": ReplicationCode(20, 24)}, 17),
}


@pytest.mark.parametrize(("division", "most"), LAUNCHES.values(), ids=LAUNCHES)
def test_parts_of_one_batch_take_few_launches(division, most):
    x = random_numbers(240, 12).to("cuda")
    wrapper = CodedWrapper(network().to("cuda"), **division, workers=LocalWorkers())
    with torch.no_grad():
        for _ in range(2):
            wrapper(x)
        with Launches() as launches:
            wrapper(x)
    assert len(wrapper.last_run.received) in (24, 240)
    assert len(launches.names) <= most, launches.names


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_results_that_lie_apart_are_looked_at_together(bad):
    kinds = itertools.product([(3, 5), (0, 5), (7,)], [torch.float32, torch.bfloat16], range(9))
    apart = [torch.ones(shape, device="cuda", dtype=dtype) for shape, dtype, _ in kinds]
    apart += [torch.ones(3, 8, device="cuda")[:, ::2], torch.ones(4, 4, device="cuda").int()]
    with Launches() as launches:
        assert all_finite(sums_of(apart))
    # Of each dtype, a stack of these, and a copy to the host.
    assert len(launches.names) <= 2 * 3 + 1 + 2, launches.names
    for tensor in apart:
        if tensor.numel() and tensor.is_floating_point():
            tensor[-1] = bad
            assert not all_finite(sums_of(apart))
            tensor[-1] = 1


def raises_for_nan(x):
    if not x.isfinite().all():
        raise ZeroDivisionError("the module raised")
    return x.sin()


@pytest.mark.parametrize("forward", [torch.sin, raises_for_nan, lambda x: x.sin()[:1]])
@either_pool
@pytest.mark.parametrize("make_code", [CODES["spline"], CODES["berrut"]])
def test_inputs_that_are_not_finite_and_mixed_are_named(make_code, pool, forward):
    """By the caller's error, though they are known only when results are."""
    x = X.to("cuda")
    x[7, 3] = torch.nan
    with contextlib.ExitStack() as stack:
        wrapper = CodedWrapper(Call(forward), make_code(), workers=stack.enter_context(pool()))
        with torch.no_grad():
            for _ in range(2):
                with pytest.raises(ValueError, match=r"args\[0\] must be finite, .* nan in row 7"):
                    wrapper(x)
            if forward is torch.sin:
                assert wrapper(X.to("cuda")).isfinite().all()


@pytest.mark.parametrize("pool", [LocalWorkers, lambda: DeviceWorkers(["cuda:0", "cuda:0"])])
@pytest.mark.parametrize("code", [None, ReplicationCode(4, 8)], ids=["rows", "replication"])
def test_rows_that_are_not_finite_and_not_mixed_are_computed(code, pool):
    x = X.to("cuda")
    x[7, 3] = torch.nan
    division = {"parts": 6} if code is None else {"code": code}
    with pool() as workers:
        wrapper = CodedWrapper(Call(torch.sin), workers=workers, **division)
        answers = wrapper(x)
    torch.testing.assert_close(answers, x.sin(), equal_nan=True)
    assert not wrapper.last_run.estimated.any()
    assert not wrapper.last_run.rejected


class Copies(TorchDispatchMode):
    """The bytes of each copy to the host."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "_local_scalar_dense"):
            source = args[1] if name == "copy_" else args[0]
            is_here = not isinstance(result, torch.Tensor) or result.device.type == "cpu"
            if source.device.type != "cpu" and is_here:
                self.sizes.append(source.numel() * source.element_size())
        return result


class Wide(nn.Module):
    def __init__(self, columns):
        super().__init__()
        self.register_buffer("weights", random_numbers(12, columns))

    def forward(self, x):
        return (x @ self.weights).sin()


def test_error_bounds_of_wide_outputs_are_computed_where_they_lie():
    x, reports = random_numbers(240, 12), []
    for device in ("cpu", "cuda"):
        workers = LocalWorkers(Uniform(4, seed=0))
        wrapper = CodedWrapper(Wide(20_000).to(device), RegressionCode(20, 24), workers=workers)
        with torch.no_grad(), Copies() as copies:
            reports.append(wrapper.run(x.to(device))[1])
    assert 0 < max(copies.sizes) <= 2**20
    host, there = (report.error_bounds for report in reports)
    assert int((host > 0).sum()) > 10
    torch.testing.assert_close(there, host, rtol=1e-3, atol=0)


def test_verification_of_wide_outputs_copies_few_columns():
    x, module = random_numbers(240, 12).to("cuda"), Wide(20_000).to("cuda")
    devices = [f"cuda:{n % torch.cuda.device_count()}" for n in range(4)]
    with DeviceWorkers(devices) as pool, torch.no_grad():
        wrapper = CodedWrapper(module, workers=pool, verify=0.1)
        for _ in range(5):
            with Copies() as copies:
                _, report = wrapper.run(x)
            assert report.verified.any()
            assert max(copies.sizes) <= 2**20
