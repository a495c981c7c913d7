"""A real Chromium that a test types and clicks in, over its debugging protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page, without a window.

    Attributes:
        console: what the page complained about.
    """

    def __init__(self, profile: Path, width: int = 900, height: int = 640):
        self.profile, self.at_start = profile, (width, height)
        self.console: list[str] = []

    def __enter__(self) -> Browser:
        command = [
            CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={self.profile}", "--remote-debugging-port=0", "about:blank",
        ]  # fmt: skip
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        port = self.profile / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (port.exists() and len(port.read_text().splitlines()) == 2):
            assert time.monotonic() < until and self.process.poll() is None, "no browser starts"
            time.sleep(0.05)
        number, path = port.read_text().splitlines()
        self.socket = connect(f"ws://127.0.0.1:{number}{path}", max_size=None)
        self.count, self.session = 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.size(*self.at_start)
        return self

    def __exit__(self, *error: Any) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            said = json.loads(self.socket.recv(timeout=60))
            if said.get("id") == self.count:
                assert "error" not in said, said
                return said["result"]
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(said["params"]))

    def size(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, script: str) -> Any:
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, script: str, seconds: float = 30) -> Any:
        """The value of a script as soon as it is truthy."""
        until = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < until, f"{script} stays {value!r}"
            time.sleep(0.05)
        return value

    def drag(self, selector: str, path: list[tuple[float, float]]) -> None:
        """Press the mouse on an element, move it along shares of its size, and let go."""
        box = self.evaluate(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [b.x, b.y, b.width, b.height]; })()"
        )
        for index, (x, y) in enumerate([*path, path[-1]]):
            kind = "mousePressed" if index == 0 else "mouseMoved"
            self._mouse("mouseReleased" if index == len(path) else kind, box, x, y)

    def drop(self, selector: str, file: str) -> None:
        """Let go of a file over an element."""
        box = self.evaluate(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [b.x, b.y, b.width, b.height]; })()"
        )
        data = {"items": [], "files": [file], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            place = {"x": box[0] + box[2] / 2, "y": box[1] + box[3] / 2}
            self.call("Input.dispatchDragEvent", type=kind, data=data, **place)

    def _mouse(self, kind: str, box: list[float], x: float, y: float) -> None:
        place = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        options = {"button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, **place, **options)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])
