"""A headless Chromium, driven by the DevTools protocol over a pair of pipes.

It needs no package and no port: ``--remote-debugging-pipe`` reads commands from descriptor 3 and
writes answers to descriptor 4, each a JSON document that ends with a NUL.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {"Enter": ("\r", 13), "Escape": ("", 27), "Tab": ("", 9)}

# The pipes have to be descriptors 3 and 4 of the browser. This process ends in the browser.
_STARTER = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(read, 3); os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None if there is none."""
    chosen = os.environ.get("CHROMIUM")
    if chosen:
        return chosen
    return next(filter(None, map(shutil.which, NAMES)), None)


class BrowserError(AssertionError):
    """The browser refused a command, a script threw, or what was waited for did not come."""


class Browser:
    """A Chromium with one page; a context manager.

    ::

        with Browser() as browser:
            browser.open("http://127.0.0.1:8000/")
            browser.click("#add")
            browser.wait_for("document.querySelectorAll('li').length === 3")
            assert browser.errors == []

    :param width: the page's width in CSS pixels.
    :param height: its height.
    :param dark: whether the page is told that the user prefers dark colours.
    :param timeout: how many seconds to wait for an answer, a page or a condition.
    :raises BrowserError: there is no Chromium, or it does not start.
    """

    def __init__(
        self, *, width: int = 1200, height: int = 900, dark: bool = False, timeout: float = 60
    ) -> None:
        self.timeout = timeout
        #: Uncaught exceptions and ``console.error`` of the page, and requests that failed.
        self.errors: list[str] = []
        #: The addresses that the page asked for.
        self.requests: list[str] = []
        self._stack = contextlib.ExitStack()
        self._buffer = b""
        self._number = 0
        self._loaded = False
        self._session: str | None = None
        try:
            self._start()
            self._attach()
            self.resize(width, height)
            self.prefer(dark=dark)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        chromium = find_chromium()
        if chromium is None:
            raise BrowserError("no Chromium found. Install one, or set CHROMIUM to its path")
        # Its profile may still be written while it ends.
        profile = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        )
        its_input, self._commands = os.pipe()
        self._answers, its_output = os.pipe()
        command = [sys.executable, "-c", _STARTER, str(its_input), str(its_output), chromium]
        self._log = Path(profile, "stderr.txt")
        log = self._stack.enter_context(self._log.open("w"))
        self._process = subprocess.Popen(
            [*command, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(its_input, its_output),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Its children too are stopped with it.
            start_new_session=True,
        )
        self._stack.callback(self._stop)
        for descriptor in (its_input, its_output):
            os.close(descriptor)
        for descriptor in (self._commands, self._answers):
            self._stack.callback(os.close, descriptor)
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        self._selector.register(self._answers, selectors.EVENT_READ)

    def _attach(self) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def _ended(self) -> BrowserError:
        words = self._log.read_text(errors="replace").strip() if self._log.exists() else ""
        return BrowserError(f"the browser has ended. {words[-2000:]}".strip())

    def _stop(self) -> None:
        # Its pipes are closed already, at which it ends by itself, with all of its processes.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Stop the browser and remove its profile."""
        self._stack.close()

    # -- the protocol -----------------------------------------------------------------------------

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol, and wait for its answer.

        :raises BrowserError: it was refused, or there is no answer in time.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        try:
            while data:
                data = data[os.write(self._commands, data) :]
        except BrokenPipeError:
            raise self._ended() from None
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._receive(deadline)
            if answer is None:
                raise BrowserError(f"{method}: no answer after {self.timeout} s")
            if answer.get("id") == self._number:
                break
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """Return the next message, or None if there is none by then."""
        while b"\0" not in self._buffer:
            if not self._selector.select(max(0, deadline - time.monotonic())):
                return None
            data = os.read(self._answers, 1 << 16)
            if not data:
                raise self._ended()
            self._buffer += data
        first, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        self._take_note(message)
        return message

    def _take_note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.errors.append(_describe(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] == "error":
                self.errors.append(" ".join(str(each.get("value")) for each in params["args"]))
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Network.loadingFailed" if not params.get("canceled"):
                self.errors.append(f"{params['type']}: {params['errorText']}")
            case _:
                pass

    # -- the page ---------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        """Go to an address, and wait until the page has loaded."""
        self._loaded = False
        result = self.send("Page.navigate", url=url)
        if "errorText" in result:
            raise BrowserError(f"{url}: {result['errorText']}")
        if "loaderId" in result:  # another part of the same page loads nothing
            self.wait_for_load()

    def wait_for_load(self) -> None:
        """Wait until a page has loaded that was asked for, by :meth:`open` or by a click."""
        deadline = time.monotonic() + self.timeout
        while not self._loaded:
            if self._receive(deadline) is None:
                raise BrowserError(f"the page has not loaded after {self.timeout} s")

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        result = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise BrowserError(f"{script}: {_describe(result['exceptionDetails'])}")
        return result["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Wait until a JavaScript expression is true, also across pages, and return its value."""
        deadline = time.monotonic() + self.timeout
        last: object = None
        while True:
            try:
                last = value = self.evaluate(script)
            except BrowserError as error:  # one page is going, the next has not come
                last, value = error, None
            if value:
                return value
            if time.monotonic() > deadline:
                raise BrowserError(f"not true after {self.timeout} s: {script}, but {last}")
            time.sleep(0.05)

    def text(self, selector: str = "body") -> str:
        """Return the visible text of the first element that a CSS selector finds."""
        found: str = self.evaluate(f"{self._find(selector)}.innerText")
        return found

    def click(self, selector: str) -> None:
        """Click with the mouse into the middle of the first element of a selector.

        Another page that loads by that is for :meth:`wait_for_load` or :meth:`wait_for`.
        """
        box = self.evaluate(
            f"(() => {{ const element = {self._find(selector)};"
            "element.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const box = element.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        self._loaded = False
        for kind in ("mousePressed", "mouseReleased"):
            self.send(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    def type(self, selector: str, words: str) -> None:
        """Put the focus on an element, and type."""
        self.evaluate(f"{self._find(selector)}.focus()")
        self.send("Input.insertText", text=words)

    def press(self, key: str) -> None:
        """Press a key of `KEYS`, wherever the focus is."""
        text, code = KEYS[key]
        self._loaded = False
        for kind in ("keyDown", "keyUp"):
            down = {"text": text} if kind == "keyDown" and text else {}
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **down,
            )

    def _find(self, selector: str) -> str:
        quoted = json.dumps(selector)
        self.wait_for(f"document.querySelector({quoted}) !== null")
        return f"document.querySelector({quoted})"

    def resize(self, width: int, height: int) -> None:
        """Give the page another size."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, *, dark: bool) -> None:
        """Tell the page which colours the user prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        wider: int = self.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return wider

    def screenshot(self, path: Path) -> None:
        """Write what is visible to a PNG file."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


def _describe(details: dict[str, Any]) -> str:
    thrown = details.get("exception", {})
    return str(thrown.get("description") or thrown.get("value") or details["text"])
