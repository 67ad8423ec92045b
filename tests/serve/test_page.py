"""The page of a server: its headers, its refusals, its faults, and a browser that uses it."""

import base64
import hashlib
import importlib.resources
import json
import os
import re
import shutil
import signal
import threading

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from coded_torch.cli.main import main
from coded_torch.serve import page as page_module
from coded_torch.serve.page import Chaos, Page

from .servers import Client, built, serving, wait_until
from .test_command import running

FILE = importlib.resources.files("coded_torch.serve") / "page.html"
OPTIONS = ["--chaos", "--deadline", "2", "--seed", "1"]


@pytest.fixture(scope="module")
def port():
    with running(*OPTIONS) as (process, port):
        assert f"A page shows it: http://127.0.0.1:{port}/" in process.stdout.readline()
        with Client(port) as client:
            wait_until(lambda: client.get("/v2/health/ready")[0] == 200)
        yield port


@pytest.fixture
def client(port):
    with Client(port) as client:
        yield client


def test_the_page_is_one_small_file():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 400
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|style=| on\w+=", text
    )


def test_nothing_else_may_run_in_the_page(client):
    status, headers, body = client.send("GET", "/")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (part,) = re.findall(rf"<{tag}>(.*?)</{tag}>", body.decode(), re.S)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_the_status(client):
    status, found = client.get("/page/status")
    assert (status, found["name"], found["deadline"]) == (200, "lenet5", 2.0)
    assert [worker["place"] for worker in found["workers"]] == list(range(6))
    assert len(found["history"]) == 12


def fault(client, worker, action, **changes):
    """Ask for a fault as the page does, but for some headers."""
    host = f"127.0.0.1:{client.connection.port}"
    token = re.search(r'name="token" content="(.+?)"', client.send("GET", "/")[2].decode())[1]
    headers = {"X_Page_Token": token, "Origin": f"http://{host}", "Host": host} | changes
    headers = {name: value for name, value in headers.items() if value is not None}
    body = json.dumps({"worker": worker, "action": action})
    return client.send("POST", "/page/fault", body, **headers)[0]


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
        ("x", "kill", {}, 409),
        (6, "kill", {}, 409),
        (0, "k" * 1000, {}, 413),
    ],
)
def test_only_the_page_may_cause_faults(client, worker, action, changes, status):
    assert fault(client, worker, action, **changes) == status


@pytest.mark.parametrize("path", ["/", "/page/status"])
def test_a_name_that_another_site_gave_the_address_is_refused(client, path):
    assert client.send("GET", path, Host="evil.example")[0] == 403


def test_a_killed_worker_is_replaced_and_a_paused_one_is_shown(client):
    def workers():
        return client.get("/page/status")[1]["workers"]

    pid = workers()[3]["pid"]
    assert fault(client, 3, "kill") == 200
    wait_until(lambda: workers()[3]["pid"] not in (0, pid))
    assert fault(client, 3, "pause") == 200
    assert workers()[3]["fault"] == "pause"
    assert fault(client, 3, "delay") == 409


class Pool:
    """A pool of one process, whose signals are kept."""

    def __init__(self):
        self.states, self.adversaries, self.signals = {0: ("idle", 1234)}, (), []


@pytest.mark.parametrize("action", ["pause", "delay", "corrupt"])
def test_a_fault_ends(action, monkeypatch):
    pool, seen = Pool(), []
    chaos = Chaos(pool)
    monkeypatch.setattr(page_module, "_FAULT_SECONDS", 0.05)
    monkeypatch.setattr(page_module, "_TURN_SECONDS", 0.01)
    monkeypatch.setattr(os, "kill", lambda pid, number: pool.signals.append((pid, number)))
    slept = page_module.time.sleep

    def sleep(seconds):
        seen.append(pool.adversaries)
        slept(seconds)

    monkeypatch.setattr(page_module.time, "sleep", sleep)
    chaos.inject(0, action)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name.endswith("(_run)"):
            thread.join(10)
    assert (chaos.faults, pool.adversaries) == ({}, ())
    assert set(seen) == {(0,)} if action == "corrupt" else {()}
    stops = [number for _, number in pool.signals]
    stop, go = signal.SIGSTOP, signal.SIGCONT
    if action == "pause":
        assert stops == [stop] * (len(stops) - 1) + [go]
    elif action == "delay":
        assert stops == [stop, go] * (len(stops) // 2) + [go]
    assert (len(stops) > 2) is (action != "corrupt")


def test_no_signal_is_sent_to_a_process_that_was_replaced(monkeypatch):
    pool = Pool()
    chaos = Chaos(pool)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("the process is another one"))
    chaos.faults[0] = "pause"
    chaos._run(0, 1233, "pause")
    assert chaos.faults == {}
    with pytest.raises(ValueError, match="worker 5 is down"):
        chaos.inject(5, "pause")


def test_a_page_without_faults():
    application = built()
    with serving(application) as port, Client(port) as client:
        assert client.get("/")[0] == 404  # an application of one's own has no page
        Page(application, chaos=None, is_local=False)
        status, _, body = client.send("GET", "/", Host="some.name")
        assert (status, b'name="token" content=""' in body) == (200, True)
        headers = {"Host": "a", "Origin": "http://a", "X_Page_Token": ""}
        assert client.send("POST", "/page/fault", "{}", **headers)[0] == 403


def test_faults_are_refused_where_others_reach_them(capsys):
    assert main(["serve", "--chaos", "--host", "0.0.0.0"]) == 2
    must = "--chaos must listen on a loopback address, one of 127.0.0.1, localhost, ::1, got 0.0.0"
    assert must in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "has_page"),
    [("", True), ("--host 0.0.0.0", False), ("--host 0.0.0.0 --page", True)],
)
def test_where_others_reach_it_the_page_is_off_unless_it_is_asked_for(
    options, has_page, monkeypatch
):
    listened = []
    monkeypatch.setattr("coded_torch.cli.serve._listen", lambda *args: listened.append(args))
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
    """Open the page in a browser, and return functions that find elements and wait for texts."""
    browser.get(f"http://127.0.0.1:{port}/")
    page = Opened(browser)
    page.until("name", "lenet5")
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
        wait_until(lambda: text in self.text(key))

    def answered(self):
        """Return how many rows were answered, and how many requests were refused."""
        numbers = [int(number) for number in re.findall(r"\d+", self.text("counts"))]
        return sum(numbers[:-1]), sum(numbers[-1:])

    def press(self, action, worker):
        label = f"{action} worker {worker}"
        self.browser.find_element("css selector", f'[aria-label="{label}"]').click()
        wait_until(lambda: f"{action.lower()} worker {worker}" in self.text("said"))

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
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened.draw(*SEVEN)
    opened.until("class", "7")
    assert opened.text("how") in ("exact", "hedged")
    assert opened.text("radius") == "0"
    wide = opened.browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
    assert opened.browser.get_log("browser") == []


@pytest.mark.browser
def test_answers_go_on_while_four_of_six_workers_are_dead(opened):
    opened.draw(*SEVEN)
    opened.until("class", "7")
    opened.find("repeat").click()
    for _ in range(5):
        for worker in range(4):
            opened.press("Kill", worker)
        before = opened.answered()[0]
        wait_until(lambda before=before: opened.answered()[0] >= before + 3)
    red = "return document.querySelectorAll('li.bad').length"
    assert opened.browser.execute_script(red) >= 4
    assert opened.answered()[1] == 0
    assert opened.text("class") == "7"
    wait_until(lambda: opened.browser.execute_script(red) == 0)  # all have come back
    opened.until("latency-text", "p99.9")


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
    wait_until(lambda: opened.browser.execute_script("return sent.length"))
    sent = json.loads(opened.browser.execute_script("return sent[0]"))
    assert sent["parameters"] == {"timeout": 1_999_000}


@pytest.mark.browser
def test_a_request_as_json(opened):
    opened.browser.execute_script("document.getElementById('json').open = true")
    entry = {"name": "input", "datatype": "FP32", "shape": [3, 1, 28, 28]}
    entry["data"] = [0.0] * 3 * 784
    for text, answer in (
        (json.dumps({"inputs": [entry]}), "radius"),
        ("{", "Refused: "),
        ("{}", "Refused: the request must have inputs"),
        ('{"inputs": []}', "Refused: inputs must be"),
    ):
        fill = "document.getElementById('text').value = arguments[0]"
        opened.browser.execute_script(fill, text)
        opened.find("send").click()
        opened.until("answer", answer)
