# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A real browser without a window, driven by the DevTools protocol over a pipe."""

import base64
import json
import os
import select
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
HOW = "apt-get install --no-install-recommends chromium"


def find_browser():
    """The browser's path. Without one the test is skipped; on CI (CI=true) it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = f"no browser is installed, looked for {', '.join(NAMES)}: {HOW}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return found


class Browser:
    """One page.

    Args:
        profile: An empty folder for the browser's own files.
        page: The file to open.
        dark: Whether the system prefers dark pages.
        size: (width, height) of the window in pixels.
    """

    def __init__(self, profile, page, dark=False, size=(1200, 900)):
        # The browser reads from file descriptor 3 and writes to 4.
        (its_input, self.to), (self.back, its_output) = os.pipe(), os.pipe()
        options = f"--headless --no-sandbox --disable-gpu --user-data-dir={profile}"
        command = f'exec "$0" {options} --remote-debugging-pipe 3<&{its_input} 4>&{its_output}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, find_browser()],
            pass_fds=(its_input, its_output),
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        self.received, self.count, self.errors, self.session = b"", 0, [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        metrics = dict(width=size[0], height=size[1], deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Runtime.enable")
        self.send("Page.enable")
        self.send("Page.navigate", url=Path(page).as_uri())
        self.run(
            "new Promise((done) => document.readyState === 'complete' ? done() : onload = done)"
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self.to)
        os.close(self.back)

    def send(self, method, **parameters):
        """Call a method of the protocol and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"])
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        while b"\0" not in self.received:
            assert select.select([self.back], [], [], 300)[0], "the browser does not answer"
            data = os.read(self.back, 1 << 20)
            assert data, "the browser ended"
            self.received += data
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def run(self, script):
        """The JSON-able value of an expression in the page."""
        result = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def place(self, selector):
        """(left, top, width, height) of an element in the window, after scrolling to it."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center'}})")
        box = (
            f"(({{x, y, width, height}}) => [x, y, width, height])({found}.getBoundingClientRect())"
        )
        return self.run(box)

    def drag(self, *places):
        """Press the mouse at the first (x, y), move it over the others, release it at the last."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(places) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*places, places[-1]]):
            mouse = dict(x=x, y=y, button="left", buttons=1, clickCount=1)
            self.send("Input.dispatchMouseEvent", type=kind, **mouse)

    def click(self, selector):
        """Click the middle of an element."""
        x, y, width, height = self.place(selector)
        self.drag((x + width / 2, y + height / 2))

    def screenshot(self, path):
        """Write the window as a PNG."""
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
