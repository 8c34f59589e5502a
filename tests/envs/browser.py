"""A headless Chromium that a test drives over the DevTools protocol."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-extensions",
    "--disable-dev-shm-usage",
)


class Tab:
    """One page of a browser."""

    def __init__(self, socket: Any):
        self._socket, self._numbers, self._session, self._events = socket, itertools.count(1), "", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result; events received meanwhile are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            reply = json.loads(self._socket.recv(timeout=60))
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]
            self._events.append(reply.get("method"))

    def visit(self, url: str) -> None:
        """Opens an address and waits for the page."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        self._wait()

    def does(self, script: str) -> None:
        """Runs JavaScript that leads to another page, and waits for it."""
        self._events.clear()
        self.value(script)
        self._wait()

    def value(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def press(self, label: str) -> None:
        """Presses the first button or link of that name."""
        element = f"[...document.querySelectorAll('button, a')].find(e => e.innerText.trim() === {json.dumps(label)})"
        self.does(f"{element}.click()")

    @property
    def text(self) -> str:
        """The visible text of the page."""
        return self.value("document.body.innerText")

    def _wait(self) -> None:
        while "Page.loadEventFired" not in self._events:
            self._events.append(json.loads(self._socket.recv(timeout=60)).get("method"))


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Tab]:
    """A new browser with its profile in a separate folder."""
    command = [CHROMIUM, *_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            match = next(filter(None, (re.search(r"listening on (ws://\S+)", line) for line in process.stderr)))
            with connect(match[1], max_size=None) as socket:
                yield Tab(socket)
        finally:
            process.kill()
