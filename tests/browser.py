"""A headless Chromium that opens a file and answers JavaScript, through its DevTools."""

import asyncio
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One tab. Of phone size where `phone`; `dark`: as a person who prefers a dark page."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
                   "--no-first-run", f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
        self._process = subprocess.Popen([str(CHROMIUM), *options], stderr=subprocess.DEVNULL)
        port = folder / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port.exists() and port.read_text().strip()):
            assert time.monotonic() < deadline, "Chromium does not start"
            time.sleep(0.05)
        address = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
        tabs = json.loads(urllib.request.urlopen(address).read())
        self._tab = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self._loop = asyncio.new_event_loop()
        self._number = 0
        self.seen: list[dict] = []  # events of the page: its errors, its requests
        self._loop.run_until_complete(self._connect())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, page: Path, phone: bool = False, dark: bool = False) -> None:
        self.seen.clear()
        width, height = (390, 844) if phone else (1280, 900)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=phone)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self.run("document.readyState") != "complete" or self.run("location.href") == (
            "about:blank"
        ):
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of an expression; of a promise, when it is kept."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                           returnByValue=True)  # fmt: skip
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def key(self, key: str, code: int) -> None:
        """Press a key: Enter (13), Tab (9), ..."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            given = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=code, **given)  # fmt: skip

    def call(self, method: str, **parameters: Any) -> dict:
        return self._loop.run_until_complete(self._call(method, parameters))

    def close(self) -> None:
        self._loop.run_until_complete(self._disconnect())
        self._process.kill()
        self._process.wait()
        self._loop.close()

    async def _connect(self) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(self._tab, max_msg_size=0)

    async def _disconnect(self) -> None:
        await self._socket.close()
        await self._session.close()

    async def _call(self, method: str, parameters: dict) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        await self._socket.send_json(message)
        while True:
            answer = await asyncio.wait_for(self._socket.receive_json(), 60)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.seen.append(answer)
