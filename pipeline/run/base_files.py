"""What the model and the tokenizer that a run begins with are, wherever they lie: it goes on from
another place of the same files, and not from others in the same place."""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.data.prepared import fingerprint
from pipeline.errors import UserError
from pipeline.recipe import Model

FILE = "base.json"  # in the run folder: {key of KEYS: {file: fingerprint}, null for no folder}
KEYS = ("path", "tokenizer")  # of the recipe's `model`
READ = {".json", ".safetensors", ".gguf", ".model", ".txt", ".jinja"}  # not cards and logs
SHOWN = 3  # files in a message

Files = dict[str, str]


def base_files(model: Model) -> dict[str, Files | None]:
    """For each of KEYS the files that lie on this machine; None where that is an id of the hub, or
    nothing is given."""
    return {key: _files(getattr(model, key)) for key in KEYS}


def _files(path: str | None) -> Files | None:
    """A file's size and samples tell two trainings apart, and whole weights would take minutes to
    hash. Of what a run has published, manifest.json has the hash of every byte."""
    place = Path(os.path.expanduser(path or ""))
    if not path or not place.exists():
        return None
    files = [place] if place.is_file() else place.iterdir()
    return {p.name: fingerprint(p) for p in sorted(files) if p.is_file() and p.suffix in READ}


def base_differences(
    folder: Path, before: dict[str, Any], model: Model, present: dict[str, Files | None]
) -> list[str]:
    """What of `model` is not what the run in the folder began with.

    before: the `model` of the run's recipe. A run that has no FILE is older than that: what its
    paths say is looked at where it still lies.
    present: `base_files` of `model`.
    """
    known = _recorded(folder / FILE)
    found = []
    for key, files in present.items():
        there, now = before.get(key), getattr(model, key)
        began = known.get(key) if known is not None else _files(there)
        if began is not None and files is not None:
            names = sorted(n for n in {*began, *files} if began.get(n) != files.get(n))
            if names:
                listed = ", ".join(names[:SHOWN])
                found.append(f"model.{key}: {now} has other files than it began with: {listed}")
        elif began != files or there != now:
            gone = known is None and there and files is not None
            why = "; nothing tells whether they are the same, as the first is gone" if gone else ""
            found.append(f"model.{key}: {_said(there, began)} there, {_said(now, files)} now{why}")
    return found


def _recorded(file: Path) -> dict[str, Files | None] | None:
    if not file.is_file():
        return None
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {key: known[key] for key in KEYS}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file}: damaged; delete it if you know that the model is the one the run began with"
        ) from None


def _said(value: str | None, files: Files | None) -> str:
    return f"{value!r}, a folder," if files is not None else repr(value)
