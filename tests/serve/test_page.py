"""The page of a server: its headers, its refusals, its faults, and a browser that uses it."""

import importlib.resources
import json
import os
import re
import shutil
import signal
import threading
import types

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from coded_torch import _page as page_module
from coded_torch._page import Chaos, add_page
from coded_torch.cli.main import main
from coded_torch.demo import lenet5, lenet5_and_digits
from coded_torch.serve import TensorSpec, specs
from coded_torch.testing.helpers import until

from ..nn.modules import Call
from .servers import OUTPUTS, Client, built, linear, serving, tensor
from .test_command import running

FILE = importlib.resources.files("coded_torch") / "page.html"
KINDS = "computed", "hedged", "estimated", "corrected"
OPTIONS = ["--chaos", "--deadline", "2", "--seed", "1"]


@pytest.fixture(scope="module")
def port():
    with running(*OPTIONS) as (process, port):
        said = f"A page shows its workers and requests: http://127.0.0.1:{port}/"
        assert said in process.stdout.readline()
        with Client(port) as client:
            until(lambda: client.get("/v2/health/ready")[0] == 200)
        yield port


@pytest.fixture
def client(port):
    with Client(port) as client:
        yield client


def test_the_page_is_one_small_file():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 500
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    unsafe = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|style=| on\w+="
    assert not re.search(unsafe, text)


def test_nothing_else_may_run_in_the_page(client):
    seen = set()
    for _ in range(2):
        status, headers, body = client.send("GET", "/")
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'self'; ")
        assert "unsafe" not in policy
        for tag in ("script", "style"):
            (nonce,) = re.findall(rf'<{tag} nonce="(.{{32}})">', body.decode())
            assert f"{tag}-src 'nonce-{nonce}'" in policy
        seen.add(nonce)
        assert not [name for name in headers if name.lower().startswith("access-control")]
    assert len(seen) == 2  # nobody can know it before


def test_the_status(client):
    status, found = client.get("/page/status")
    assert (status, found["name"], found["deadline"]) == (200, "lenet5", 2.0)
    assert found["verify"] == 0
    assert [worker["place"] for worker in found["workers"]] == list(range(6))
    for worker in found["workers"]:
        why = worker["actions"]
        assert list(why) == ["kill", "pause", "delay", "corrupt"]
        assert why["corrupt"] == "wrong results are found with --verify only"
    with Client(client.connection.port) as other:
        entry = tensor(torch.zeros(2, 1, 28, 28))
        assert other.infer({"inputs": [entry]}, "/v2/models/lenet5/infer")[0] == 200
    for path in ("/page/status", "/page/status?minute"):
        found = client.get(path)[1]
        when, seconds, rows, estimated = found["answers"][-1]
        assert 0 <= found["now"] - when < 60
        assert (seconds > 0, rows, estimated) == (True, 2, 0)


def fault(client, worker, action, **changes):
    """Ask for a fault as the page does, but for some headers."""
    host = f"127.0.0.1:{client.connection.port}"
    token = re.search(r'name="token" content="(.+?)"', client.send("GET", "/")[2].decode())[1]
    headers = {"X_Page_Token": token, "Origin": f"http://{host}", "Host": host} | changes
    headers = {name: value for name, value in headers.items() if value is not None}
    path = f"/page/action?worker={worker}&action={action}"
    return client.send("POST", path, **headers)[0]


@pytest.mark.parametrize(
    ("worker", "action", "changes", "status"),
    [
        (0, "kill", {"X_Page_Token": None}, 403),
        (0, "kill", {"X_Page_Token": "no"}, 403),
        (0, "kill", {"Origin": None}, 403),
        (0, "kill", {"Origin": "null"}, 403),
        (0, "kill", {"Origin": "http://evil.example"}, 403),
        (0, "kill", {"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        (0, "fly", {}, 409),
        (0, "restart", {}, 409),  # it is not excluded
        (0, "corrupt", {}, 409),  # without --verify nobody would find it
        ("x", "kill", {}, 409),
        (6, "kill", {}, 409),
        (0, "k" * 1000, {}, 409),
    ],
)
def test_only_the_page_may_act(client, worker, action, changes, status):
    assert fault(client, worker, action, **changes) == status


def test_a_killed_worker_is_replaced_and_a_paused_one_is_shown(client):
    def workers():
        return client.get("/page/status")[1]["workers"]

    pid = workers()[3]["pid"]
    until(lambda: fault(client, 3, "kill") == 200)  # the server itself may just have killed it
    until(lambda: workers()[3]["pid"] not in (0, pid))
    until(lambda: fault(client, 3, "pause") == 200)
    assert workers()[3]["fault"] == "pause"
    assert fault(client, 3, "delay") == 409
    until(lambda: fault(client, 3, "kill") == 200)  # paused, it would outlive a killed server


class Pool:
    """A pool of processes, whose signals are kept, in an application."""

    def __init__(self, size=1):
        self.states = {place: ("idle", 1234 + place) for place in range(size)}
        self.adversaries, self.signals, self.restarted = (), [], []

    def restart(self, place):
        self.restarted.append(place)

    def chaos(self, faults=True):
        application = types.SimpleNamespace(pool=self, coded=types.SimpleNamespace(verify=0.2))
        return Chaos(application, faults=faults, is_local=True)


def ended():
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name.endswith("(_run)"):
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize("action", ["pause", "delay", "corrupt"])
def test_a_fault_ends(action, monkeypatch):
    pool, seen = Pool(3), []
    chaos = pool.chaos()
    monkeypatch.setattr(page_module, "FAULT_SECONDS", 0.05)
    monkeypatch.setattr(page_module, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(os, "kill", lambda pid, number: pool.signals.append((pid, number)))
    slept = page_module.time.sleep

    def sleep(seconds):
        seen.append(set(pool.adversaries))
        slept(seconds)

    monkeypatch.setattr(page_module.time, "sleep", sleep)
    chaos.act(0, action)
    ended()
    assert (chaos.faults, set(pool.adversaries)) == ({}, set())
    assert {0} in seen if action == "corrupt" else {0} not in seen
    stops = [number for _, number in pool.signals]
    stop, go = signal.SIGSTOP, signal.SIGCONT
    if action == "pause":
        assert stops == [stop] * (len(stops) - 1) + [go]
    elif action == "delay":
        assert stops == [stop, go] * (len(stops) // 2) + [go]
    else:
        assert set(stops) == {0}  # asks whether the process is there
    assert len(stops) > 2


@pytest.mark.parametrize("action", ["pause", "corrupt"])
def test_a_fault_ends_with_its_process(action, monkeypatch):
    pool = Pool(3)
    chaos = pool.chaos()
    monkeypatch.setattr(page_module, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(os, "kill", lambda pid, number: pool.signals.append((pid, number)))
    chaos.act(0, action)
    until(lambda: pool.signals)
    pool.states[0] = ("idle", 77)  # not a second of the ten has gone
    ended()
    assert (chaos.faults, set(pool.adversaries)) == ({}, set())
    assert {pid for pid, _ in pool.signals} == {1234}  # 77 may be anything
    with pytest.raises(ValueError, match="worker 5 is down"):
        chaos.act(5, "pause")


def test_a_worker_that_ends_meanwhile_is_not_signalled(monkeypatch):
    reads = [{0: ("idle", 1234)}, {0: ("down", 0)}]

    class Ending(Pool):
        states = property(lambda self: reads.pop(0), lambda self, states: None)

    pool = Ending()
    chaos = pool.chaos()
    monkeypatch.setattr(os, "kill", lambda pid, number: pool.signals.append((pid, number)))
    chaos.act(0, "kill")
    assert pool.signals == [(1234, signal.SIGKILL)]  # 0 is this process, and its whole group


@pytest.mark.parametrize(("size", "most"), [(2, 0), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3)])
def test_fewer_than_half_of_the_workers_are_corrupt(size, most, monkeypatch):
    pool = Pool(size)
    chaos = pool.chaos()
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)  # faults do not end
    for place in range(most):
        assert chaos.offered(place, pool.states)["corrupt"] == ""
        chaos.act(place, "corrupt")
    why = f"fewer than half of {size} workers may be corrupt"
    for place in range(size):
        assert chaos.offered(place, pool.states)["corrupt"] == why
    with pytest.raises(ValueError, match="fewer than half"):
        chaos.act(most, "corrupt")
    assert set(pool.adversaries) == set(range(most))


def test_an_excluded_worker_can_only_be_restarted():
    pool = Pool(6)
    pool.states |= {1: ("excluded", 1235), 2: ("excluded", 1236)}
    chaos = pool.chaos()
    chaos.corrupt |= {1, 2, 3}  # excluded ones do not count, but of four workers one may be
    assert chaos.offered(0, pool.states)["corrupt"] == "fewer than half of 4 workers may be corrupt"
    assert chaos.offered(1, pool.states) == {"restart": ""}
    with pytest.raises(ValueError, match="the action must be one of restart"):
        chaos.act(1, "kill")
    chaos.act(1, "restart")
    assert pool.restarted == [1]
    calm = pool.chaos(faults=False)  # without --chaos, nothing else
    assert (calm.offered(0, pool.states), calm.offered(2, pool.states)) == ({}, {"restart": ""})


def shown(application, **options):
    """Return the examples in the page of an application."""
    add_page(application, **options)
    with serving(application) as port, Client(port) as client:
        text = client.send("GET", "/")[2].decode()
    (found,) = re.findall(r'id="examples">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_a_page_without_faults():
    application = built()
    with serving(application) as port, Client(port) as client:
        assert client.get("/")[0] == 404  # an application of one's own has no page
        add_page(application, is_local=False)
        status, _, body = client.send("GET", "/", Host="some.name")
        assert (status, b'name="token" content=""' in body) == (200, True)
        headers = {"Host": "a", "Origin": "http://a", "X_Page_Token": ""}
        assert client.send("POST", "/page/action", **headers)[0] == 403


def test_the_page_has_63_digits_and_their_right_answers():
    module, (digits,) = lenet5_and_digits()
    inputs, outputs = specs(module, (digits,))
    how = {"inputs": inputs, "outputs": outputs, "examples": (digits,)}
    found = shown(built(module, **how), is_local=True)
    (images,), (answer,) = found["inputs"], found["outputs"]
    assert images["shape"] == [63, 1, 28, 28]
    assert torch.tensor(images["data"]).equal(digits.flatten())
    labels = torch.tensor(answer["data"]).reshape(63, 10).argmax(1)
    assert labels.equal(lenet5()(digits).argmax(1))
    assert labels[:10].tolist() == list(range(10))
    few = shown(built(module, **how, max_batch_size=8), is_local=True)
    assert few["inputs"][0]["shape"][0] == 7  # the drawing is the eighth


@pytest.mark.parametrize(
    ("module", "width", "rows", "known"),
    [
        (linear(), 3, 5, 5),
        (Call(lambda x: torch.rand(len(x), 2)), 3, 5, 0),
        (torch.nn.Identity(), 40_000, 2, 2),
    ],
)
def test_examples_of_any_model(module, width, rows, known):
    how = {"inputs": [TensorSpec("</script>NONCE", "FP32", (width,))], "outputs": OUTPUTS}
    found = shown(built(module, **how, examples=(torch.ones(5, width),)), is_local=True)
    assert found["inputs"][0]["name"] == "</script>NONCE"
    assert found["inputs"][0]["shape"] == [rows, width]
    assert sum(each["shape"][0] for each in found["outputs"]) == known


@pytest.mark.parametrize("examples", [None, (torch.ones(5, 100_001),)])
def test_no_examples(examples):
    assert shown(built(torch.nn.Identity(), examples=examples), is_local=True) == {}


def test_faults_are_refused_where_others_reach_them(refused):
    must = "--chaos must listen on a loopback address, one of 127.0.0.1, localhost, ::1, got 0.0.0"
    assert must in refused(["serve", "--chaos", "--host", "0.0.0.0"])


@pytest.mark.parametrize(
    ("options", "has_page"),
    [("", True), ("--host 0.0.0.0", False), ("--host 0.0.0.0 --page", True)],
)
def test_where_others_reach_it_the_page_is_off_unless_asked_for(options, has_page, monkeypatch):
    listened = []
    monkeypatch.setattr("coded_torch.cli._serve._listen", lambda *args: listened.append(args))
    assert main(["serve", *options.split()]) == 0
    ((application, *_, said),) = listened
    assert said is has_page
    assert ("/" in [route.path for route in application.routes]) is has_page


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as driver:
        driver.set_script_timeout(30)
        yield driver


@pytest.fixture
def opened(port, browser):
    return open_page(port, browser)


def resize(browser, width):
    """Give the page a width in pixels, which the browser keeps for the next page."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def open_page(port, browser, name="lenet5"):
    """Open the page in a browser, and return functions that find elements and wait for texts."""
    browser.get(f"http://127.0.0.1:{port}/")
    page = Opened(browser)
    page.until("name", name)
    return page


class Opened:
    """The open page."""

    def __init__(self, browser):
        self.browser = browser

    def find(self, key):
        return self.browser.find_element("id", key)

    def text(self, key):
        """Return the text of an element, or "" while there is none."""
        script = "return document.getElementById(arguments[0])?.textContent ?? ''"
        return self.browser.execute_script(script, key)

    def until(self, key, text):
        until(lambda: text in self.text(key))

    def answered(self):
        """Return how many rows of each kind were answered, and how many requests were refused."""
        numbers = [int(number) for number in re.findall(r"\d+", self.text("counts"))]
        return dict(zip([*KINDS, "wrong", "refused"], numbers or [0] * 6, strict=True))

    def rows(self):
        return sum(self.answered()[kind] for kind in KINDS)

    def states(self):
        """Return what is said of each worker."""
        script = "return [...document.querySelectorAll('#workers li p')].map(p => p.textContent)"
        return self.browser.execute_script(script)

    def press(self, action, worker):
        """Press a button once it is enabled, which it is not while the worker is replaced."""
        where = f'[aria-label="{action} worker {worker}"]:enabled'
        # In one step, as the page moves and replaces its buttons while answers come.
        script = "const b = document.querySelector(arguments[0]); b?.click(); return b !== null"
        until(lambda: self.browser.execute_script(script, where))
        until(lambda: f"{action.lower()} worker {worker}" in self.text("said"))

    def draw(self, *moves):
        """Draw with the pointer, from the middle of the drawing area."""
        chain = ActionChains(self.browser).move_to_element(self.find("canvas"))
        chain.move_by_offset(*moves[0]).click_and_hold()
        for move in moves[1:]:
            chain.move_by_offset(*move)
        chain.release().perform()


SEVEN = (-50, -60), (90, 0), (-50, 130)


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_drawn_digit_is_read(opened, width):
    resize(opened.browser, width)
    opened.draw(*SEVEN)
    opened.until("class", "7")
    assert opened.text("how") in ("computed, not verified", "hedged, not verified")
    until(lambda: opened.browser.find_elements("css selector", "#latency circle"))
    found = opened.answered()
    assert found["computed"] + found["hedged"] == 64
    assert found["wrong"] == 0
    tiles = opened.browser.find_elements("css selector", "#tiles li")
    assert len(tiles) == 64
    assert [tile.find_element("tag name", "b").text for tile in tiles[:11]] == list("70123456789")
    wide = opened.browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    assert opened.browser.get_log("browser") == []


@pytest.mark.browser
def test_answers_go_on_while_four_of_six_workers_are_dead(opened):
    opened.draw(*SEVEN)
    opened.until("class", "7")
    opened.find("repeat").click()
    red, most = "return document.querySelectorAll('li.bad').length", 0
    for _ in range(2):
        for worker in range(4):
            opened.press("Kill", worker)
        most = max(most, opened.browser.execute_script(red))
        before = opened.rows()
        until(lambda before=before: opened.rows() >= before + 3 * 64)
    assert most >= 3  # the first may be back on a busy machine
    assert opened.answered()["refused"] == 0
    assert opened.text("class") == "7"
    until(lambda: opened.browser.execute_script(red) == 0)  # all have come back
    opened.until("latency-text", "p99.9")


ANSWER = """
const answer = {parameters: {coverage: .9}, outputs: [
  {shape: [64, 10], data: Array(640).fill(0)},
  ...["estimated", "error_bound", "source", "verified", "corrected"].map(
    name => ({name, shape: [64], data: Array(64).fill(0)}))]};
const [output, estimated, errorBound, source, verified, corrected] = answer.outputs;
for (let row = 0; row < 64; row++) output.data[10 * row + (row ? labels[row - 1] : 7)] = 9;
source.data[1] = 1;
estimated.data[2] = estimated.data[3] = 1; source.data[2] = source.data[3] = 2;
errorBound.data[2] = .25; errorBound.data[3] = null;
corrected.data[4] = source.data[4] = verified.data[4] = 1;
output.data[10 * 5 + (labels[4] + 1) % 10] = 99;
output.data[10 * 6 + (labels[5] + 1) % 10] = 99; estimated.data[6] = 1; errorBound.data[6] = 120;
const own = fetch, stub = async () => ({ok: true, json: async () => answer});
window.fetch = (path, options) => path.endsWith("/infer") ? stub() : own(path, options);
"""


@pytest.mark.browser
def test_each_row_is_shown_as_what_it_is(port, browser):
    resize(browser, 1280)  # narrow tiles have no words
    opened = open_page(port, browser)
    module, (digits,) = lenet5_and_digits()
    labels = module(digits).argmax(1).tolist()
    browser.execute_script(f"const labels = {labels}; {ANSWER}")
    opened.find("ask").click()
    opened.until("how", "computed, not verified")
    tiles = browser.find_elements("css selector", "#tiles li")[:8]
    shown = [
        (tile.get_attribute("class"), tile.find_element("tag name", "small").text) for tile in tiles
    ]
    assert shown == [
        ("kind computed", ""),
        ("kind hedged", "hedged"),
        ("kind estimated", "±0.25"),
        ("kind estimated", "±?"),
        ("kind corrected", "corrected"),
        ("kind computed wrong", ""),
        ("kind estimated wrong", "±120"),
        ("kind computed", ""),
    ]
    titles = [tile.get_attribute("title") for tile in tiles]
    assert titles[2] == "estimated, error at most 0.25"
    assert titles[4:6] == ["corrected, verified", "computed, wrong"]
    assert tiles[5].find_element("tag name", "b").text == f"{(labels[4] + 1) % 10} ✗"
    counts = {"computed": 59, "hedged": 1, "estimated": 3, "corrected": 1, "wrong": 2, "refused": 0}
    assert opened.answered() == counts


@pytest.mark.browser
def test_corrupt_workers_are_excluded_and_restarted(browser):
    options = "--chaos", "--verify", "0.5", "--deadline", "5"
    with running(*options) as (_, port):
        opened = open_page(port, browser)
        until(lambda: "Ready. 6 of 6 workers up" in opened.text("summary"))
        opened.until("summary", "50 % of the rows are verified")
        opened.find("ask").click()
        opened.find("repeat").click()
        for worker in (1, 4):
            opened.press("Corrupt", worker)
            until(lambda worker=worker: "excluded" in opened.states()[worker])
        assert opened.answered()["corrected"] > 0
        for worker in (1, 4):
            opened.press("Restart", worker)
            until(lambda worker=worker: "excluded" not in opened.states()[worker])
        opened.until("summary", "6 of 6 workers up")
        assert not [state for state in opened.states() if "excluded" in state]
        assert opened.answered()["refused"] == 0


@pytest.mark.browser
def test_a_model_without_pictures(browser):
    application = built(examples=(torch.eye(3),))
    add_page(application, is_local=True)
    with serving(application) as port:
        opened = open_page(port, browser, "m")
        assert not opened.find("drawing").is_displayed()
        opened.find("ask").click()
        until(lambda: opened.rows() == 3)
        assert opened.answered()["wrong"] == 0
        tiles = browser.find_elements("css selector", "#tiles li")
        wanted = linear()(torch.eye(3)).argmax(1).tolist()
        assert [tile.text for tile in tiles] == [str(label) for label in wanted]


@pytest.mark.browser
def test_the_page_is_used_by_keyboard_alone(opened):
    keys = ActionChains(opened.browser)
    opened.browser.execute_script("document.getElementById('canvas').focus()")
    keys.send_keys(*[Keys.UP] * 9, " ", *[Keys.DOWN] * 18, " ", Keys.TAB, Keys.ENTER).perform()
    opened.until("class", "1")
    opened.browser.execute_script("document.getElementById('deadline').focus()")
    keys = ActionChains(opened.browser)
    keys.send_keys(Keys.LEFT).perform()
    opened.until("deadline-text", "1999 ms")
    opened.browser.execute_script(
        "window.sent = []; const own = fetch; window.fetch = (path, options) => {"
        "if (options) sent.push(options.body); return own(path, options); }"
    )
    opened.find("ask").send_keys(Keys.ENTER)
    until(lambda: opened.browser.execute_script("return sent.length"))
    sent = json.loads(opened.browser.execute_script("return sent[0]"))
    assert sent["parameters"] == {"timeout": 1_999_000}
