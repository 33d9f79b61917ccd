"""A headless Chromium, driven over the pipe of its DevTools protocol; no packages needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


class Browser:
    """One tab. Use it as a context manager.

    Attributes:
      errors: the uncaught exceptions of the page.
    """

    def __init__(self, profile, width=1280, height=900):
        self.errors, self._count, self._buffer = [], 0, b""
        # High numbers, so that neither end is 3 or 4, which Chromium reads and writes.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 50) for fd in (*os.pipe(), *os.pipe())]
        commands, self._write, self._read, answers = ends
        self._process = subprocess.Popen(
            [
                PATH, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                f"--user-data-dir={profile}", "about:blank",
            ],
            preexec_fn=lambda: (os.dup2(commands, 3), os.dup2(answers, 4)),
            close_fds=False, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands), os.close(answers)
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable"), self.call("Runtime.enable")
        self.resize(width, height)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._write), os.close(self._read)

    def call(self, method, **params):
        """Calls a method of the protocol and returns its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("method") == "Runtime.exceptionThrown":
                self.errors.append(found["params"]["exceptionDetails"])
            if found.get("id") == self._count:
                assert "error" not in found, found["error"]
                return found["result"]

    def _receive(self):
        while b"\0" not in self._buffer:
            data = os.read(self._read, 2**20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def resize(self, width, height):
        metrics = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **metrics)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def run(self, script):
        """Returns the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition, seconds=120):
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"!!({condition})"):
            assert time.monotonic() < end, f"not true after {seconds} s: {condition}"
            time.sleep(0.1)

    def drag(self, *points):
        """Presses the mouse at the first point, moves it over the others and releases it."""
        for kind, (x, y) in [
            ("mousePressed", points[0]), *(("mouseMoved", p) for p in points[1:]),
            ("mouseReleased", points[-1]),
        ]:  # fmt: skip
            more = {"button": "left", "buttons": 1, "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def screenshot(self, path, whole=True):
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))
