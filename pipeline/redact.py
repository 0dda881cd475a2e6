"""Tokens and passwords never reach a log, a file of a run, a page or a message."""

import os
import re
from typing import Any

HIDDEN = "<hidden>"  # neither an alias nor a list of YAML
SHORTEST = 8  # letters of a variable's value that is taken for a secret; "true" is none

_NAMES = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?|WEBHOOK(_URL)?)$",
    re.IGNORECASE,
)
# Of variables of the environment also others that end so; in a recipe a key of a mapping might.
_VARIABLES = re.compile(rf"{_NAMES.pattern}|(^|_)(KEY|PASS|PASSPHRASE)$", re.IGNORECASE)
# In an address the password, or what a query carries; the forms of common tokens; and what is
# called a secret where it is set.
_PATTERNS = (
    (
        re.compile(r"(\b[a-z][a-z0-9+.-]*://[^/\s:@\"']*):[^/\s@\"']+@", re.IGNORECASE),
        rf"\1:{HIDDEN}@",
    ),
    (
        re.compile(r"(hooks\.slack\.com/services/|/api/webhooks/)[^\s\"']+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"([?&](?:[a-z_-]*token|key|api_?key|sig|signature|password|secret|x-amz-[a-z-]+)=)"
            r"[^&\s\"']+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
            r"|github_pat_\w{20,}|xox[abposr]-[A-Za-z0-9-]{10,}|AKIA[0-9A-Z]{16})\b"
        ),
        HIDDEN,
    ),
    (re.compile(r"(\bBearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"(\b(?:password|passwd|secret|api_?key|access_?token|auth_?token|client_secret)"
            r"[\"']?\s*[:=]\s*[\"']?)(?!null\b|none\b|[\"'])[^\s\"',;}&]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)  # fmt: skip


def redact(text: str) -> str:
    """The text without the values of the environment's secrets, and without what looks like one."""
    return _redact(text, _secrets())


def redacted(value: Any) -> Any:
    """Of everything that JSON can hold, with every text in it redacted, and with what is under a
    secret's name hidden."""
    return _redacted(value, _secrets())  # the environment is gone through once, not for every text


def _redact(text: str, secrets: list[str]) -> str:
    for value in secrets:
        text = text.replace(value, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _redact(value, secrets)
    if isinstance(value, dict):
        return {
            _redact(k, secrets) if isinstance(k, str) else k: HIDDEN
            if isinstance(v, str) and v and isinstance(k, str) and _NAMES.search(k)
            else _redacted(v, secrets)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(v, secrets) for v in value]
    return value


def _secrets() -> list[str]:
    """The longest first: one may be a part of another."""
    values = {v for k, v in os.environ.items() if _VARIABLES.search(k) and len(v) >= SHORTEST}
    return sorted(values, key=len, reverse=True)
