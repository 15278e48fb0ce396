# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A browser without a window that a test drives: clicks, waits, screenshots, what went wrong.

Chromium's DevTools protocol over a pair of pipes (``--remote-debugging-pipe``): JSON messages that
end with a zero byte. No port, no driver program, no further package.
"""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
HOW = "apt-get install --no-install-recommends chromium"
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)


def find_browser():
    """The browser's path. Without one the test is skipped; on CI (CI=true) it fails."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = f"no browser is installed, looked for {', '.join(NAMES)}: {HOW}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return found


class Browser:
    """One page in a browser; a context manager.

    Args:
        folder: An empty folder for the browser's own files.
        size: (width, height) of the page in pixels.

    Attributes:
        requests: Addresses of everything that the page asked for, ``data:`` aside.
        errors: What its scripts did not catch.
    """

    def __init__(self, folder, size=(1240, 900)):
        self.requests, self.errors = [], []
        self._numbers, self._read = itertools.count(1), b""
        down_read, self._write_fd = os.pipe()
        self._read_fd, up_write = os.pipe()

        def connect():  # in the browser's process, which reads from 3 and writes to 4
            ends = os.dup(down_read), os.dup(up_write)
            for end, place in zip(ends, (3, 4)):
                os.dup2(end, place)

        options = [*_OPTIONS, f"--user-data-dir={folder}", "--window-size={},{}".format(*size)]
        self._process = subprocess.Popen(
            [find_browser(), *options, "about:blank"],
            preexec_fn=connect,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(down_read), os.close(up_write)
        self._session = None
        (target, *_) = [
            one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"
        ]
        options = {"targetId": target["targetId"], "flatten": True}
        self._session = self._call("Target.attachToTarget", **options)["sessionId"]
        self._call("Network.enable")
        self._call("Page.enable")
        self._call("Runtime.enable")
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(OSError):
            self._call("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read_fd), os.close(self._write_fd)

    def open(self, address):
        """Go to an address."""
        self._call("Page.navigate", url=address)

    def run(self, script):
        """What a JavaScript expression is worth; a promise is waited for."""
        options = {"expression": script, "returnByValue": True, "awaitPromise": True}
        found = self._call("Runtime.evaluate", **options)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script, seconds=180):
        """Wait until a JavaScript expression is true; return its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.1)
        raise AssertionError(f"never true: {script}; {self.run('document.body.innerText')}")

    def click(self, selector, at=0.5):
        """Press and release the mouse on an element, at this fraction of its width."""
        box = self.run(
            f"(() => {{ const one = document.querySelector({selector!r}); one.scrollIntoView("
            "{block: 'center'}); const {x, y, width, height} = one.getBoundingClientRect();"
            "return {x, y, width, height}; })()"
        )
        place = {"x": box["x"] + at * box["width"], "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            options = {"type": kind, "button": "left", "clickCount": 1}
            self._call("Input.dispatchMouseEvent", **options, **place)

    def type(self, text):
        """Type into what has the focus, in place of what is there."""
        self.run("document.activeElement.select()")
        self._call("Input.insertText", text=text)

    def press(self, key, code, text=""):
        """Press and release a key: its name, such as 'Enter', its number, what it types."""
        for kind in ("keyDown", "keyUp"):
            options = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
            self._call("Input.dispatchKeyEvent", type=kind, **options)

    def screenshot(self, path):
        """Write the page as PNG."""
        data = self._call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def _call(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("method") == "Network.requestWillBeSent":
                address = found["params"]["request"]["url"]
                if not address.startswith("data:"):
                    self.requests.append(address)
            if found.get("method") == "Runtime.exceptionThrown":
                self.errors.append(found["params"]["exceptionDetails"]["text"])
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def _next(self):
        """The next message of the browser."""
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._read_fd], [], [], 120)
            part = os.read(self._read_fd, 1 << 20) if ready else b""
            assert part, "the browser has gone or does not answer"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)
