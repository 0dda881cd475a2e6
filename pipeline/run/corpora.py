"""The prepared corpora of a run, and that they stay the same while it lasts."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from pipeline.checkpoint import replace_file
from pipeline.data.prepare import prepare, sources_of
from pipeline.data.prepared import Prepared
from pipeline.data.stage import domains_of
from pipeline.errors import UserError
from pipeline.ranks import rank
from pipeline.recipe import Recipe
from pipeline.run.folder import CORPORA


def open_corpora(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> dict[str, Prepared]:
    """Every domain that the run reads, measures or keeps by a method, prepared where it is not yet.

    All ranks call it. What was read is written into the run folder (`corpora.json`).

    Files may lie elsewhere than when the run began: what counts are their bytes, and the tokens.

    Raises:
        UserError: a domain's files changed since the run began, by name; what `prepare` refuses.
    """
    trained = [n for i in range(len(recipe.stages)) for n in domains_of(recipe, i + 1)]
    texts = {method.text for method in (recipe.anchor, recipe.ssu) if method is not None}
    kept = [n for n in recipe.data.domains if n in texts]
    names = list(dict.fromkeys([*trained, *recipe.heldout_domains(), *kept]))
    known = _known(folder)
    for name in names:
        if name in known:
            _refuse_changed(name, known[name]["sources"], sources_of(recipe, name))
    found = {name: prepare(recipe, name, tokenizer) for name in names}
    now = {
        name: {
            "folder": str(prepared.folder),
            "sources": prepared.manifest["sources"],
            "content": _content(prepared),
        }
        for name, prepared in found.items()
    }
    for name in names:  # of files whose time changed, but not their samples
        if name in known and known[name]["content"] != now[name]["content"]:
            raise _changed(name, _touched(known[name]["sources"], now[name]["sources"]))
    if rank() == 0:
        replace_file(folder / CORPORA, json.dumps(now, indent=1) + "\n")
    return found


def _known(folder: Path) -> dict[str, Any]:
    """What the run has read so far; nothing before its first stage."""
    if not (folder / "stages").is_dir() or not (folder / CORPORA).is_file():
        return {}
    return json.loads((folder / CORPORA).read_text(encoding="utf-8"))


def _refuse_changed(name: str, before: list[dict], now: list[dict]) -> None:
    def without_place(source: dict) -> dict[str, Any]:
        left_out = ("name", "changed") if "sample" in source else ("changed",)
        return {k: v for k, v in source.items() if k not in left_out}

    old, new = [without_place(s) for s in before], [without_place(s) for s in now]
    if old == new:
        return
    if len(old) == len(new):
        changed = [s["name"] for s, a, b in zip(now, old, new, strict=True) if a != b]
    else:
        names = [{s["name"] for s in sources} for sources in (before, now)]
        changed = sorted(names[0] ^ names[1])
    raise _changed(name, changed)


def _touched(before: list[dict], now: list[dict]) -> list[str]:
    return [s["name"] for s in now if s not in before]


def _changed(name: str, files: list[str]) -> UserError:
    more = f" and {len(files) - 10} more" if len(files) > 10 else ""
    return UserError(
        f"data.domains.{name}: changed since this run began: {', '.join(map(str, files[:10]))}"
        f"{more}. Put it back as it was, or start anew with --restart (or another name=...)"
    )


def _content(prepared: Prepared) -> str:
    """A hash of the tokens of a corpus."""
    files = prepared.manifest["files"]
    text = json.dumps({name: known["sha256"] for name, known in files.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
