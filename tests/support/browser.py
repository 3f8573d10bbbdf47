"""A headless Chromium that tests control through the DevTools protocol. It can reach this machine only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 60.0


def find_chromium() -> str:
    """Return the path of Chromium. Without it, skip the test, or fail if REQUIRE_BROWSER is 1."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    reason = f"no browser is installed ({', '.join(NAMES)}): apt-get install chromium"
    if os.environ.get("REQUIRE_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class Tab:
    """A browser tab.

    Attributes:
        requested: Addresses that the page has requested.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.requested: list[str] = []
        self._number = 0

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a DevTools command and return its result."""
        self._number += 1
        await self.socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=WAIT_S)
            if message.get("method") == "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, script: str) -> Any:
        """Evaluate a JavaScript expression until its value is true, and return the value."""
        deadline = time.monotonic() + WAIT_S
        while not (value := await self.evaluate(script)):
            assert time.monotonic() < deadline, (
                f"still false: {script}\n{await self.evaluate('document.body.innerText')}"
            )
            await asyncio.sleep(0.1)
        return value

    async def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        root = (await self.send("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.send("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    async def type_and_enter(self, text: str) -> None:
        """Type a text into the element that has the focus, and press the enter key."""
        await self.send("Input.insertText", text=text)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        await self.send("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **key)


@contextlib.asynccontextmanager
async def open_tab(address: str, profile: Path) -> AsyncIterator[Tab]:
    """Open an address in a new browser, which cannot resolve any name and cannot reach any other machine."""
    switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    switches += ["--disable-background-networking", "--disable-component-update", "--no-proxy-server"]
    switches += [f"--user-data-dir={profile}", "--remote-debugging-port=0"]
    switches += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"]
    browser = subprocess.Popen(
        [find_chromium(), *switches, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        port = await _debugging_port(profile / "DevToolsActivePort", browser)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                [page] = [each for each in json.loads(await response.text()) if each["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                await tab.send("Network.enable")
                await tab.send("Page.enable")
                await tab.send("Page.navigate", url=address)
                yield tab
    finally:
        browser.terminate()
        browser.wait()


async def _debugging_port(file: Path, browser: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + WAIT_S
    while not (file.exists() and (lines := file.read_text().splitlines())):
        assert browser.poll() is None, "the browser has ended"
        assert time.monotonic() < deadline, "the browser does not start"
        await asyncio.sleep(0.05)
    return int(lines[0])
