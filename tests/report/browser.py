"""A headless Chromium on a pipe: enough of its DevTools protocol to press keys, move the mouse and read the page. No extra package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HINT = "no Chromium found; install one: `apt install chromium` (Debian), `brew install --cask chromium` (macOS)"


def find() -> str | None:
    """The path of a browser, by name."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `requests` are the addresses it asked for, `errors` what went wrong in its scripts."""

    def __init__(self, program: str) -> None:
        self.profile = tempfile.TemporaryDirectory(prefix="eckart-browser-", ignore_cleanup_errors=True)
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
        )
        command = [program, *flags.split(), "--disable-quic", "--hide-scrollbars", f"--user-data-dir={self.profile.name}", "about:blank"]
        # Chromium talks on descriptors 3 and 4: a Python in between moves the pipes there, out of the way of each other.
        move = f"import fcntl, os, sys; a, b = (fcntl.fcntl(f, fcntl.F_DUPFD, 10) for f in ({to_read}, {to_write}));"
        wrap = [sys.executable, "-c", f"{move} os.dup2(a, 3); os.dup2(b, 4); os.execvp(sys.argv[1], sys.argv[1:])", *command]
        wrap.append("--remote-debugging-pipe")
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(wrap, pass_fds=(to_read, to_write), stdin=quiet, stdout=quiet, stderr=quiet)
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.count = b"", 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.session: str | None = None

    def __enter__(self) -> Browser:
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Chromium and its profile are gone afterwards."""
        os.close(self.write)  # Chromium leaves when its pipe ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.read)
        self.profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, and its answer."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self.read, 1 << 20) if ready else b""
            assert chunk, f"the browser did not answer within {seconds} s" if not ready else "the browser closed its pipe"
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\0", 1)
        event: dict[str, Any] = json.loads(line)
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"].get("exception", {}).get("description", params["exceptionDetails"]["text"])))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        return event

    def open(self, path: Path, hash_: str = "", *, width: int = 1280, height: int = 900, dark: bool = False, media: str = "screen") -> None:
        """Load a file on a screen of that size and wait until its script says that it is ready."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=path.resolve().as_uri() + hash_)
        end = time.monotonic() + 60
        while self.js("document.body && document.body.dataset.ready") != "1":
            assert not self.errors, self.errors
            assert time.monotonic() < end, "the page never became ready"
            time.sleep(0.02)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str) -> None:
        """Press and release a key."""
        text = {"text": "\r"} if name == "Enter" else {}
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, windowsVirtualKeyCode=codes[name], **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, code=name, windowsVirtualKeyCode=codes[name])

    def hover(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _middle(self, selector: str) -> tuple[float, float]:
        find_it = f"(() => {{ const n = document.querySelector({json.dumps(selector)});"
        find_it += " n.scrollIntoView({block: 'center', inline: 'nearest', behavior: 'instant'});"
        # Scroll events are sent with the next frame, and hide what is shown: let them pass first.
        find_it += " return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(n)))).then(n => {"
        box = self.js(find_it + " const b = n.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }); })()")
        return box[0], box[1]

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self, path: Path) -> None:
        """The page as it prints."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))
