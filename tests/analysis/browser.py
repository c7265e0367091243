"""Debian's chromium through its own driver, by the WebDriver protocol alone."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000")


class Browser:
    """One window; `script` runs JavaScript in the page and returns what it returns."""

    def __init__(self, address, options):
        self._address = address
        wanted = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": [*_OPTIONS, *options]},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        asked = {"capabilities": {"alwaysMatch": wanted}}
        self._session = f"/session/{self._ask('POST', '/session', asked)['sessionId']}"

    def _ask(self, method, path, content=None):
        body = None if content is None else json.dumps(content).encode()
        request = Request(self._address + path, body, method=method)
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path):
        """Open a file and wait until its charts are drawn."""
        self._ask("POST", f"{self._session}/url", {"url": Path(path).resolve().as_uri()})
        ready = """
            const done = arguments[0];
            const look = () => "ready" in document.body.dataset ? done(true) : setTimeout(look, 20);
            look();
        """
        self._ask("POST", f"{self._session}/execute/async", {"script": ready, "args": []})

    def script(self, code, *arguments):
        content = {"script": code, "args": list(arguments)}
        return self._ask("POST", f"{self._session}/execute/sync", content)

    def click(self, css):
        self._ask("POST", f"{self._element(css)}/click", {})

    def type(self, css, words):
        """Type into an emptied field, key by key."""
        element = self._element(css)
        self._ask("POST", f"{element}/clear", {})
        self._ask("POST", f"{element}/value", {"text": words})

    def _element(self, css):
        wanted = {"using": "css selector", "value": css}
        found = self._ask("POST", f"{self._session}/element", wanted)
        return f"{self._session}/element/{next(iter(found.values()))}"

    def console(self):
        """Everything the console has said since the last call."""
        return [line["message"] for line in self._ask("POST", f"{self._session}/se/log",
                                                     {"type": "browser"})]  # fmt: skip

    def screenshot(self, path):
        image = self._ask("GET", f"{self._session}/screenshot")
        Path(path).write_bytes(base64.b64decode(image))

    def close(self):
        self._ask("DELETE", self._session)


@contextmanager
def chromium(*options):
    """A browser that is closed again; `options` are chromium's."""
    driver = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                break
        browser = Browser(f"http://127.0.0.1:{found.group(1)}", options)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
