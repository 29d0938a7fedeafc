"""A real browser without a window: Debian's Chromium, spoken to through its DevTools protocol over two pipes.

Protocol: https://chromedevtools.github.io/devtools-protocol/, messages as JSON, each ended by a zero byte.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_SECONDS = 60  # for any one answer


def chromium() -> str:
    """Its path. Skips the test where there is none."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here (apt install chromium)")
    return found


@dataclass
class Tab:
    """A page that is open. requests: addresses that it asked for; errors: what its console and its scripts complain of."""

    browser: "Browser"
    session: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, parameters, self)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of what is seen, or of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])


class Browser:
    """Chromium with a profile of its own; `browser` ends it."""

    def __init__(self, profile: Path):
        commands, self._to = os.pipe()
        self._from, answers = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        # Chromium reads commands from file descriptor 3 and writes answers to 4.
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", chromium(), *flags],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands)
        os.close(answers)
        self._number, self._rest = 0, b""
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, parameters: dict[str, Any], tab: Tab | None = None) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": tab.session} if tab else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._note(found, tab)

    def wait_for(self, event: str, tab: Tab) -> None:
        """Until the page says so."""
        while event not in [each["method"] for each in self._events]:
            self._note(self._read(), tab)

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> Tab:
        """Show a file in a tab of that width, pixels."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        tab = Tab(self, self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"])
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.call(f"{domain}.enable")
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        tab.call("Page.navigate", url=path.as_uri())
        self.wait_for("Page.loadEventFired", tab)
        return tab

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser has not answered for {_SECONDS} s"
            part = os.read(self._from, 2**20)
            assert part, "the browser has ended"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event, tab):
        if tab is None or event.get("sessionId") != tab.session:
            return
        self._events.append(event)
        method, found = event["method"], event["params"]
        if method == "Network.requestWillBeSent":
            tab.requests.append(found["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            tab.errors.append(found["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            tab.errors.append(found["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            tab.errors.append(str(found["args"]))

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._to)
        os.close(self._from)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser for a block. profile: a folder of its own."""
    opened = Browser(profile)
    try:
        yield opened
    finally:
        opened.close()
