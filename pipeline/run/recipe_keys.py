"""Every key of a recipe with its type, default and meaning, read from `pipeline/recipe.py`."""

import ast
import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline import recipe


@dataclass(frozen=True)
class Key:
    name: str  # dotted; [] stands for an entry of a list, <name> for one of a mapping
    type: str  # as a user writes it: int | null, masked | causal
    default: str  # as in YAML; "" for a key that must be given
    meaning: str  # the comment beside it in the code; may be empty


def recipe_keys(owner: type = recipe.Recipe, prefix: str = "") -> list[Key]:
    """The keys in the order of the classes, each class where the key that holds it stands."""
    found = []
    hints = get_type_hints(owner)
    comments = _comments(owner)
    for field in dataclasses.fields(owner):
        name = prefix + field.name
        found.append(Key(name, _type(hints[field.name]), _default(field), comments[field.name]))
        inner, step = inside(hints[field.name])
        if inner is not None:
            found += recipe_keys(inner, f"{name}{step}.")
    return found


def markdown() -> str:
    """The keys as a page: a heading and a table for each class."""
    sections: dict[str, list[str]] = {}
    for key in recipe_keys():
        cells = [f"`{key.name}`", key.type, f"`{key.default}`" if key.default else "", key.meaning]
        row = "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
        sections.setdefault(key.name.rpartition(".")[0], []).append(row)
    head = "| key | type | default | |\n| --- | --- | --- | --- |"
    return "\n\n".join(
        f"## {f'`{above}`' if above else 'The recipe'}\n\n{head}\n" + "\n".join(rows)
        for above, rows in sections.items()
    )


OF_ENTRY = ".<name>"  # how the keys of a mapping's entries follow


def inside(hint: Any) -> tuple[type | None, str]:
    """The dataclass that a key holds, and how its keys follow: alone, in a list, in a mapping."""
    if dataclasses.is_dataclass(hint):
        return hint, ""  # type: ignore[return-value]
    for part in get_args(hint):
        if dataclasses.is_dataclass(part):
            step = {list: "[]", dict: OF_ENTRY}.get(get_origin(hint), "")  # type: ignore[arg-type]
            return part, step  # type: ignore[return-value]
    return None, ""


def _type(hint: Any) -> str:
    """`int | None` as `int | null`, `Literal["a", "b"]` as `a | b`, a dataclass as `mapping`."""
    if dataclasses.is_dataclass(hint):
        return "mapping"
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and not get_args(hint):
        return {"str": "text", "bool": "true | false"}.get(hint.__name__, hint.__name__)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is dict:
        return "mapping" if args[1] is Any else f"mapping of names to {_type(args[1])}"
    if origin is tuple:
        return f"[{', '.join(map(_type, args))}]"
    return " | ".join(dict.fromkeys(map(_type, args)))


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return {"list": "[]", "dict": "{}"}.get(type(value).__name__, "")
    if field.default is dataclasses.MISSING:
        return ""
    words = {None: "null", True: "true", False: "false"}
    value = field.default
    if isinstance(value, bool) or value is None:
        return words[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _comments(owner: type) -> dict[str, str]:
    """For each field of a class, the comment at its line or above it; for a field of another
    dataclass without one, the first line of that class's docstring."""
    source = inspect.getsource(owner)
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign):
            continue
        above: list[str] = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().lstrip("# "))
        within = [
            line.partition("  # ")[2].strip() for line in lines[node.lineno - 1 : node.end_lineno]
        ]
        text = " ".join(part for part in [*above, *within] if part)
        name = node.target.id  # type: ignore[union-attr]
        if not text and (inner := inside(get_type_hints(owner)[name])[0]) is not None:
            text = (inner.__doc__ or "").split("\n\n")[0].replace("\n", " ")
            text = "" if text.startswith(f"{inner.__name__}(") else text
        found[name] = text
    return found
