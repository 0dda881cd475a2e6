"""Messages of `report.py due`: tried again, sent once, and no secret in what is said of them."""

import http.server
import json
import socketserver
import threading
import time
from typing import ClassVar

import pytest

import eval.due.notify
from eval.due.due import due
from eval.due.notify import Email, Notify, load_notify
from pipeline.errors import UserError
from tests.fake_runs import fake_run
from tests.published_runs import working_directory


@pytest.fixture
def root(tmp_path, monkeypatch):
    return working_directory(tmp_path, monkeypatch)


class Hook(http.server.BaseHTTPRequestHandler):
    answers: ClassVar[list] = []
    got: ClassVar[list] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.answers.pop(0) if self.answers else 200
        if answer is None:
            time.sleep(3)
            return
        self.got.append((answer, json.loads(body)))
        self.send_response(answer)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("answers", "takes"),
    [([500, 503], 1), ([500] * 3, 2), ([None], 1), ([404], 2)],
    ids=["two errors", "errors for a call", "no answer", "not found"],
)
def test_a_webhook_is_tried_again_and_gets_a_message_once(
    root, monkeypatch, answers, takes, capsys
):
    monkeypatch.setattr(eval.due.notify, "LIMIT", 0.5)
    Hook.answers, Hook.got = list(answers), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake_run(root / "run")
    settings = Notify(webhook=f"http://127.0.0.1:{server.server_port}/secret")
    for call in range(1, takes + 2):
        due(root, notify=settings)
        taken = [body for answer, body in Hook.got if answer == 200]
        assert len(taken) == (call >= takes)
    assert taken[0]["kind"] == "finished"
    assert ("not delivered" in (said := capsys.readouterr().out)) == (takes > 1)
    assert "secret" not in said
    server.shutdown()
    server.server_close()


class Mailbox(socketserver.StreamRequestHandler):
    got: ClassVar[list] = []

    def handle(self):
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline():
            word = line[:4].upper()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                lines = iter(self.rfile.readline, b".\r\n")
                self.got.append(b"".join(lines).decode())
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 fine\r\n")


def test_mail_is_sent_once_and_many_events_are_one_message(root):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mailbox) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for i in range(11):
            (root / f"empty{i}").mkdir()
        mail = Email(["a@b.org"], "c@d.org", "127.0.0.1", server.server_address[1])
        for _ in range(2):
            due(root, notify=Notify(email=mail))
        server.shutdown()
    (message,) = Mailbox.got
    assert "Subject: 11 events" in message
    assert "Message-ID: <" in message
    assert "empty10" in message


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "names no command"),
        ("command: [", "notify.yaml"),
        ("webhook: ftp://x", "http:// or https://"),
        ("web: http://x", "web: Unexpected"),
        ("email: {to: [a], sender: b, password: {a: secret}}", "email.password"),
        (
            "webhook: ${oc.env:NOT_SET_ANYWHERE}",
            "webhook: the environment variable NOT_SET_ANYWHERE is",
        ),
        ("command: x\nevents: [everything]", "events.0"),
    ],
)
def test_wrong_settings_are_one_message(tmp_path, text, complaint):
    path = tmp_path / "notify.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_notify(path)
    assert complaint in str(error.value)
    assert "secret" not in str(error.value)
