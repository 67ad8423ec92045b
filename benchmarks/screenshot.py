"""Photograph the page of a server while its workers fail: ``python -m benchmarks.screenshot``.

It needs chromium and chromedriver. The picture is ``results/page.png``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains

from .runs import RESULTS

TARGET = RESULTS / "page.png"
WIDTH, HEIGHT = 1160, 1480  # pixels
COLOURS = 128  # of the picture; with all, the file is three times as large
WATCHED = 20.0  # seconds in which requests are sent, so that charts have points
SEVEN = (-50, -60), (90, 0), (-50, 130)  # moves of the pointer
SERVE = "import sys; from coded_torch.cli.main import main; sys.exit(main())"


def opened() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def photograph(url: str) -> None:
    """Draw a seven, repeat the request while a worker is killed and one paused, and keep it."""
    browser = opened()
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(url)
        browser.implicitly_wait(60)
        browser.find_element("css selector", '[aria-label="Kill worker 0"]:enabled')
        chain = ActionChains(browser).move_to_element(browser.find_element("id", "canvas"))
        chain.move_by_offset(*SEVEN[0]).click_and_hold()
        for move in SEVEN[1:]:
            chain.move_by_offset(*move)
        chain.release().perform()
        browser.find_element("id", "repeat").click()
        time.sleep(WATCHED)
        for action in ("Pause worker 4", "Kill worker 1"):
            browser.find_element("css selector", f'[aria-label="{action}"]:enabled').click()
        time.sleep(1.0)
        browser.save_screenshot(str(TARGET))
    finally:
        browser.quit()
    Image.open(TARGET).convert("RGB").quantize(COLOURS).save(TARGET, optimize=True)


def main() -> int:
    options = ["--port", "0", "--chaos", "--deadline", "400ms", "--seed", "1"]
    line = [sys.executable, "-c", SERVE, "serve", *options]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            for said in server.stdout or ():
                if url := re.search(r"requests: (http://\S+)", said):
                    photograph(url[1])
                    break
        finally:
            server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
