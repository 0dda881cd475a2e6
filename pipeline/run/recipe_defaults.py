"""The recipe of a run that an earlier version made, with the keys that it did not know yet."""

import dataclasses
from functools import cache
from typing import Any, get_type_hints

from pipeline.recipe import Recipe
from pipeline.run.recipe_keys import inside


def with_defaults(recipe: dict[str, Any], owner: type = Recipe) -> dict[str, Any]:
    """Missing keys have today's defaults, which leave a run as it was before there was such a key;
    so runs of two versions differ in nothing that was not there to differ in."""
    hints = _hints(owner)
    whole = dict(recipe)
    for field in dataclasses.fields(owner):
        inner, step = inside(hints[field.name])
        if field.name in recipe:
            if inner is not None:
                whole[field.name] = _inner(recipe[field.name], inner, step)
        elif field.default is not dataclasses.MISSING:
            whole[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            whole[field.name] = _plain(field.default_factory())
    return whole


_hints = cache(get_type_hints)  # of many runs


def _inner(value: Any, owner: type, step: str) -> Any:
    if isinstance(value, list):
        return [_inner(each, owner, "") for each in value]
    if not isinstance(value, dict):
        return value
    if step:
        return {name: _inner(each, owner, "") for name, each in value.items()}
    return with_defaults(value, owner)


def _plain(default: Any) -> Any:
    """As YAML has it."""
    if dataclasses.is_dataclass(default):
        default = dataclasses.asdict(default)  # type: ignore[arg-type]
    if isinstance(default, dict):
        return {key: _plain(value) for key, value in default.items()}
    return list(default) if isinstance(default, tuple) else default
