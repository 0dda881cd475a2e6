"""Tell people of events: by a command, a webhook, e-mail. Retried, and sent once.

Settings are a YAML file (docs/reports.md). What could not be delivered is tried again by the next
call. An event counts as sent when its channel has taken it; a process that is killed between the
two sends it again, with the same id.
"""

import json
import shlex
import smtplib
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from email.message import EmailMessage
from email.utils import formatdate
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.due.events import Event
from eval.due.state import State
from pipeline.errors import UserError
from pipeline.progress import now
from pipeline.redact import redact, redacted
from pipeline.yaml_file import unresolved

TRIES = 3  # in a call
PAUSE = 1.0  # seconds before the second try; doubled for each one after it
LIMIT = 30.0  # seconds for one try
TOGETHER = 10  # more events than these at once are one message


@dataclass
class Email:
    to: list[str]
    sender: str
    host: str = "localhost"
    port: int = 25
    starttls: bool = False
    user: str | None = None
    password: str | None = None  # ${oc.env:SMTP_PASSWORD}


@dataclass
class Notify:
    """At least one of `command`, `webhook`, `email`."""

    command: str | list[str] | None = None  # gets the message as JSON on its standard input
    webhook: str | None = None  # gets it by POST
    email: Email | None = None
    events: list[Literal["finished", "failed", "regression"]] = field(
        default_factory=lambda: ["finished", "failed", "regression"]
    )


for _class in (Email, Notify):
    _class.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[union-attr]


class _Refused(Exception):
    """A channel did not take a message; trying again at once does not help."""


def load_notify(path: Path) -> Notify:
    """Raises UserError that names the key."""
    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        settings = pydantic.TypeAdapter(Notify).validate_python(data)
    except FileNotFoundError:
        raise UserError(f"--notify {path}: no such file; docs/reports.md shows one") from None
    except pydantic.ValidationError as error:  # without the values: one may be a password
        found = [f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()]
        raise UserError(f"--notify {path}: {'; '.join(found)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"--notify {path}: {unresolved(error)}") from None
    except Exception as error:  # every YAML error is the user's
        raise UserError(f"--notify {path}: {' '.join(str(error).split())}") from None
    if not (settings.command or settings.webhook or settings.email):
        raise UserError(f"--notify {path}: names no command, webhook or email to send to")
    if settings.webhook and urlsplit(settings.webhook).scheme not in ("http", "https"):
        raise UserError(f"--notify {path}: webhook: give an http:// or https:// address")
    return settings


def send(events: list[Event], settings: Notify, state: State) -> list[str]:
    """Send each event that was not sent, over each channel; what could not be delivered."""
    channels: dict[str, Callable[[dict[str, Any]], None]] = {}
    if settings.command:
        channels["command"] = lambda message: _run(settings.command, message)
    if settings.webhook:
        channels["webhook"] = lambda message: _post(str(settings.webhook), message)
    if settings.email:
        channels["email"] = lambda message: _mail(settings.email, message)
    wanted = [event for event in events if event.kind in settings.events]
    undelivered = []
    for channel, deliver in channels.items():
        sent = state.sent.setdefault(channel, {})
        fresh = [event for event in wanted if event.id not in sent]
        for batch in _batches(fresh):
            problem = redact(_try(deliver, redacted(_message(batch))))
            if problem:
                left = sum(event.id not in sent for event in fresh)
                undelivered.append(f"{left} by {channel} ({problem})")
                break  # the others would wait for the same
            sent.update({event.id: now() for event in batch})
            state.save()
    return undelivered


def _batches(events: list[Event]) -> list[list[Event]]:
    if len(events) > TOGETHER:
        return [events]
    return [[event] for event in events]


def _message(batch: list[Event]) -> dict[str, Any]:
    """One event; or several, as a list under a common title."""
    if len(batch) == 1:
        return {**asdict(batch[0]), "time": now()}
    lines = [f"{event.title}\n  {event.text}" for event in batch[:50]]
    lines += [f"and {len(batch) - 50} more"] * (len(batch) > 50)
    return {
        "id": batch[0].id,
        "kind": "several",
        "title": f"{len(batch)} events",
        "text": "\n".join(lines),
        "events": [asdict(event) for event in batch],
        "time": now(),
    }


def _try(deliver: Callable[[dict[str, Any]], None], message: dict[str, Any]) -> str:
    """Deliver, with pauses between the tries; why it could not be, "" where it was."""
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            _within(LIMIT, deliver, message)
            return ""
        except _Refused as error:
            return str(error)
        except Exception as error:  # whatever a network, a mail server or a program does
            problem = " ".join(f"{type(error).__name__}: {error}".split())
    return problem


def _within(seconds: float, deliver: Callable[[dict[str, Any]], None], message: Any) -> None:
    """Call it in a thread: a server that sends a byte now and then outlives every time-out of a
    socket. Raises what it raises, or TimeoutError."""
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            deliver(message)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    if outcome[0] is not None:
        raise outcome[0]


def _run(command: str | list[str] | None, message: dict[str, Any]) -> None:
    words = shlex.split(command) if isinstance(command, str) else list(command or [])
    try:
        done = subprocess.run(
            words, input=json.dumps(message).encode(), capture_output=True, timeout=LIMIT
        )
    except (FileNotFoundError, PermissionError) as error:
        raise _Refused(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"{words[0]} ended with {done.returncode} {' '.join(said)}".strip())


def _post(url: str, message: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": message["id"]}
    data = json.dumps(message).encode()
    host = urlsplit(url).hostname  # the rest of an address may be a secret
    try:
        request = urllib.request.Request(url, data, headers, method="POST")
        urllib.request.urlopen(request, timeout=LIMIT).close()
    except HTTPError as error:
        text = f"{host} answered {error.code}"
        if error.code < 500 and error.code not in (408, 425, 429):
            raise _Refused(text) from None
        raise RuntimeError(text) from None


def _mail(email: Email | None, message: dict[str, Any]) -> None:
    assert email is not None
    mail = EmailMessage()
    mail["Subject"] = "".join(c if c.isprintable() else " " for c in message["title"])
    mail["From"], mail["To"] = email.sender, ", ".join(email.to)
    mail["Date"] = formatdate()
    mail["Message-ID"] = f"<{message['id']}@{email.sender.rpartition('@')[2] or 'localhost'}>"
    page = f"\n\n{message['page']}" if "page" in message else ""
    mail.set_content(f"{message['text']}{page}\n")
    try:
        with smtplib.SMTP(email.host, email.port, timeout=LIMIT) as server:
            if email.starttls:
                server.starttls(context=ssl.create_default_context())
            if email.user:
                server.login(email.user, email.password or "")
            server.send_message(mail)
    except smtplib.SMTPAuthenticationError as error:
        raise _Refused(f"{email.host} refused the login ({error.smtp_code})") from None
