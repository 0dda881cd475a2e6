"""A hub that drops connections, answers with errors, or is not there: a server of this test."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os.path import expanduser
from pathlib import Path

import fsspec
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline import hub_name, network
from pipeline.data.bad_lines import BadLines
from pipeline.data.formats import raw
from pipeline.data.formats.raw import layout_of, lines
from pipeline.data.hub import hub_files
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError
from pipeline.model.load import load_config
from pipeline.recipe import Domain, Model

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """One model, `who/model`. Of every two requests the first is dropped (`faults`): without an
    answer, with a 503, or in the middle of a file."""

    protocol_version = "HTTP/1.1"
    folder: Path
    faults = False
    requests: list[str]

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.requests.append(f"{self.command} {self.path}")
        number = len(self.requests)
        fault = (
            ("silence", "503", "middle")[number // 2 % 3] if self.faults and number % 2 else None
        )
        found = re.match(r"/who/model/resolve/[^/]+/(.+)$", self.path)
        file = self.folder / found[1] if found else None
        if fault == "silence":
            self.close_connection = True
            return
        if fault == "503":
            return self.answer(503, b"busy")
        if file is None and self.path.startswith("/api/models/who/model"):
            names = [{"rfilename": p.name} for p in self.folder.iterdir()]
            described = {"id": "who/model", "sha": COMMIT, "siblings": names, "tags": []}
            return self.answer(200, json.dumps(described).encode())
        if file is None or not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        start = 0
        if asked := re.match(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(asked[1])
        cut = fault == "middle" and self.command == "GET"
        self.answer(206 if start else 200, content[start:], {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }, cut)  # fmt: skip

    do_HEAD = do_GET

    def answer(self, code, body, headers=None, cut=False):
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


LOAD = """
import sys
import time
from pipeline import hub_name, network
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError
network.WAITS, hub_name.TIMEOUT = (0.01,), 2.0
from pipeline.model.load import load_config, build_model
from pipeline.recipe import Model
model = Model(path="who/model", objective="causal")
try:
    config = load_config(model)
    net = build_model(model, config, None, 0)
    print("loaded", sum(p.numel() for p in net.parameters()))
except UserError as error:
    print("refused", error)
begun = time.monotonic()
for name in sys.argv[1:]:
    for ask in (lambda: load_config(Model(path=name)), lambda: load_tokenizer(name)):
        try:
            ask()
        except UserError as error:
            print("said", error)
print("seconds", time.monotonic() - begun)
"""


def load(endpoint: str, home: Path, *others: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *others],
        cwd=ROOT, text=True, capture_output=True, timeout=200,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "*",
             "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_that_drops_connections_is_asked_again_and_a_cache_needs_none(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, n_positions=8)
    net = GPT2LMHeadModel(config)
    net.save_pretrained(tmp_path / "model")
    handler = type(
        "Handler", (Hub,), {"folder": tmp_path / "model", "faults": True, "requests": []}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        output = load(endpoint, tmp_path / "home")
        assert f"loaded {sum(p.numel() for p in net.parameters())}" in output
        asked = len(handler.requests)
        assert "loaded" in load(endpoint, tmp_path / "home", HF_HUB_OFFLINE="1")
        assert len(handler.requests) == asked  # no network is touched
    finally:
        server.shutdown()
        server.server_close()
    output = load(endpoint, tmp_path / "home", "who/other")  # nobody is there
    assert "loaded" in output
    for field in ("model.path", "tokenizer"):
        assert f"said {field}: who/other is no folder here, is not (whole) in the local" in output
    assert f"the hub cannot be asked ({endpoint}: ConnectError" in output
    assert "trying again" not in output
    # The library's own retries take 24 s for the one and 54 for the other.
    assert float(re.search(r"seconds (\S+)", output)[1]) < 15


def test_what_looks_like_a_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_name, "_asked", lambda _: pytest.fail("the hub was asked"))
    Path("models/small").mkdir(parents=True)
    for name in ("./models/big", "/no/where", "~/nowhere/model", "a/b/c", "a/"):
        assert hub_name.missing_folder(name)
        with pytest.raises(
            UserError, match=f"^model.path: no such folder: {expanduser(name)}( |$)"
        ):
            load_config(Model(path=name))
        with pytest.raises(UserError, match=f"^x: no such folder: {name}( |$)"):
            load_tokenizer(name, field="x")
        with pytest.raises(UserError, match=f"^hub: no such folder: {name}( |$)"):
            hub_files(Domain(hub=name), "train")
    for name in ("gpt2", "who/model", "models/big", "models/small", ".", "models/", str(tmp_path)):
        assert not hub_name.missing_folder(name)


class Dropping:
    """A remote file whose every second reading fails."""

    def __init__(self, file, always=False):
        self.file, self.size, self.calls, self.always = file, file.size, 0, always

    def seek(self, *where):
        return self.file.seek(*where)

    def read(self, count):
        self.calls += 1
        if self.always or self.calls % 2 == 0:
            raise ConnectionResetError("by peer")
        return self.file.read(min(count, 1000))

    def open(self):
        return self


@pytest.fixture
def remote(monkeypatch):
    """The address of a file of 400 rows that drops the connection; for ever if named `always`."""
    monkeypatch.setattr(network, "WAITS", (0.0, 0.0, 0.0))
    rows = b"".join(b'{"text": "row %d"}\n' % i for i in range(400))
    opened = fsspec.open

    def dropping(path, mode):
        return Dropping(opened(path.replace("always", "rows"), mode).open(), "always" in path)

    with fsspec.open("memory://rows.jsonl", "wb") as file:
        file.write(rows)
    monkeypatch.setattr(fsspec, "open", dropping)
    return "memory://{}.jsonl"


def test_a_connection_that_breaks_costs_no_row(remote):
    path = remote.format("rows")
    bad = BadLines(0)
    assert len(list(lines(path, layout_of(path), bad))) == 400
    assert bad.count == 0
    with pytest.raises(UserError, match=r"cannot be read behind byte 0 .*Check the network"):
        raw.layout_of(remote.format("always"))


def test_only_failures_of_the_network_are_tried_again(monkeypatch):
    monkeypatch.setattr(network, "WAITS", (0.0, 0.0))

    def fails_with(error):
        def fetch():
            calls.append(error)
            raise error

        return fetch

    wrapped = OSError("cannot connect")
    wrapped.__cause__ = ConnectionRefusedError()
    for error, times in ((ValueError("no such model"), 1), (FileNotFoundError(), 1), (wrapped, 3)):
        calls: list = []
        with pytest.raises(type(error)):
            network.retried("x", fails_with(error))
        assert len(calls) == times
    calls = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="cannot connect"):
        network.retried("x", fails_with(wrapped))
    assert len(calls) == 1
