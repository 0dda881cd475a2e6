"""Read a YAML file that somebody else may have written: data only, and no more than it looks."""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

LARGEST = 1 << 20  # bytes
NODES = 100_000  # values, with those of every alias counted again
DEPTH = 50  # of lists and mappings in one another
CHAINED = 16  # interpolations of values that hold interpolations: each may double the text

# libyaml's, where PyYAML has it: ten times as fast, and an index reads hundreds of recipes.
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INTERPOLATION = re.compile(r"\$\{([^${}]*)\}")


def read_yaml(path: Path) -> str:
    """The file's text, which is safe to be parsed and to have its interpolations resolved.

    Raises:
        UserError: it cannot be read; no YAML; tags; larger than any recipe, on disk or once its
            aliases or interpolations are written out.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are no recipe; give its file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        _check_events(path, text)
        _check_interpolations(path, yaml.load(text, Loader))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not a YAML file: {error}") from None
    return text


def unresolved(error: Exception) -> str:
    """Why a value with `${...}` stands for nothing: OmegaConf's error in one line."""
    key = getattr(error, "full_key", None)
    text = str(error).partition("\n")[0] or type(error).__name__
    if variable := re.search(r"Environment variable '(.*)' not found", text):
        name = variable[1]
        text = f"the environment variable {name} is not set ({name}=... before the command)"
    return f"{key}: {text}" if key else text


def _check_events(path: Path, text: str) -> None:
    """Without making a value: how many there will be, how deep, and of which kinds."""
    sizes: dict[str, int] = {}  # of what has an anchor
    open_: list[tuple[str | None, int]] = [(None, 0)]  # anchor and values so far
    for event in yaml.parse(text, Loader=Loader):
        tag = getattr(event, "tag", None)
        if tag and (not tag.startswith("tag:yaml.org,2002:") or "python" in tag):
            line = event.start_mark.line + 1
            raise UserError(f"{path}: line {line}: a recipe has no tags; remove {tag}")
        size = 0
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise UserError(
                    f"{path}: the recursive alias *{event.anchor} has no end; remove it"
                )
            size = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
            if anchor:
                sizes[anchor] = size
        outer, count = open_[-1]
        open_[-1] = (outer, count + size)
        if count + size > NODES or len(open_) > DEPTH:
            what = f"{NODES:,} values" if count + size > NODES else f"{DEPTH} levels"
            raise UserError(f"{path}: more than {what}, with its aliases written out: no recipe is "
                            "that large; write out what it needs")  # fmt: skip


def _check_interpolations(path: Path, data: Any) -> None:
    texts: list[str] = []
    _collect(data, texts)
    chained = sum(
        not _is_plain(data, reference)
        for text in texts
        for reference in _INTERPOLATION.findall(text) or ["."] * ("${" in text)
    )
    if chained > CHAINED:
        raise UserError(
            f"{path}: {chained} interpolations of values that are interpolated themselves, or of "
            f"whole lists; at most {CHAINED} are resolved. Write the values out"
        )


def _collect(node: Any, texts: list[str]) -> None:
    if isinstance(node, dict):
        for value in node.values():
            _collect(value, texts)
    elif isinstance(node, list):
        for value in node:
            _collect(value, texts)
    elif isinstance(node, str) and "${" in node:
        texts.append(node)


def _is_plain(data: Any, reference: str) -> bool:
    """Whether what an interpolation stands for is one value that has none itself."""
    if reference.startswith("oc.env:"):
        return True
    node = data
    for part in re.split(r"[.\[\]]+", reference.rstrip("]")):
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return False
    return node is not None and not isinstance(node, dict | list) and "${" not in str(node)
