"""Read a recipe: a YAML file, with `key=value` overrides from the command line laid over it.

All problems are found before anything is loaded, and reported together in one `UserError`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from pipeline.errors import UserError, near
from pipeline.recipe import Model, Recipe
from pipeline.run.problems import recipe_problems
from pipeline.run.recipe_keys import OF_ENTRY, inside
from pipeline.yaml_file import read_yaml, unresolved

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, lay `key=value` overrides over it, check everything.

    Relative paths inside a recipe are relative to the working directory; a model or tokenizer path
    that does not exist there is also looked for beside the recipe file.

    Raises:
        UserError: one message that lists every problem with its key, file and a suggestion.
    """
    path = find_recipe(path)
    config = read_over_base(path)
    problems: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            problems.append(f"{override!r}: an override is written key=value, e.g. seed=1")
            continue
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
            OmegaConf.update(config, key, parsed["value"], merge=False, force_add=True)
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            text = one_line(error)
            if "list index out of range" in text:
                text = "that list has no such entry; they are counted from 0"
            problems.append(f"{override!r}, on the command line: {text}")
    try:
        data = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise _all(path, [*problems, unresolved(error)]) from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {_keys(Recipe)}")
    data.setdefault("name", path.stem)
    if isinstance(data.get("stages"), list):
        data["stages"] = [{"domain": s} if isinstance(s, str) else s for s in data["stages"]]
    given = {o.partition("=")[0] for o in overrides}
    _switch_off(data, given)
    try:
        recipe = _ADAPTER.validate_python(data)
    except ValidationError as error:
        wrong = error.errors()
        problems += [_explain(e, path, given) for e in wrong]
        raise _all(path, [*problems, *_other_problems(data, wrong)]) from None
    _beside(recipe.model, path.parent)
    problems += recipe_problems(recipe)
    if problems:
        raise _all(path, problems)
    return recipe


def find_recipe(path: str | Path) -> Path:
    for candidate in (Path(path), RECIPES / path, RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    raise UserError(
        f"{path}: no such recipe. Give a YAML file, or one of the recipes here: {', '.join(names)}"
    )


def read_over_base(
    path: Path, find: Callable[[str], Path] = find_recipe, over: tuple[Path, ...] = ()
) -> Any:
    """The content of a recipe or a sweep, laid over that of the file that its `base` names.

    find: the file of a base that is not beside this one.
    over: the files that are laid over this one.
    """
    if path in over:
        raise UserError(f"{path}: `base` leads back to this file; name another one")
    try:
        config: Any = OmegaConf.create(read_yaml(path))
    except UserError:
        raise
    except Exception as error:  # every YAML error is the user's
        if "key type" in str(error):
            raise UserError(f"{path}: {one_line(error)}. {NOT_TEXT}") from None
        raise UserError(f"{path}: not a YAML file: {error}") from None
    content = OmegaConf.to_container(config)
    _check_keys(path, content)
    if not isinstance(content, dict) or "base" not in content:
        return config
    base = content["base"]
    if not isinstance(base, str):
        raise UserError(f"{path}: base: name one file, or one of launch/recipes")
    beside = path.parent / base
    found = beside if beside.is_file() else find(base)
    del config["base"]
    return OmegaConf.merge(read_over_base(found, find, (*over, path)), config)


def _switch_off(data: dict[Any, Any], given: set[str]) -> None:
    """What the command line switches off (`mask.enabled=false`, `evaluate.benchmarks={}`) takes the
    file's settings of it away, which would have no effect. Not the threshold: the overlap of the
    kept rows is measured of dense runs too."""
    mask, evaluate = data.get("mask"), data.get("evaluate")
    if "mask.enabled" in given and isinstance(mask, dict) and mask.get("enabled") is False:
        for key in set(mask) - {"enabled", "threshold"}:
            if f"mask.{key}" not in given:
                del mask[key]
    if {"evaluate.benchmarks", "evaluate.humaneval"} & given and isinstance(evaluate, dict):
        tasks = evaluate.get("benchmarks") or evaluate.get("humaneval") is not None
        if not tasks and "evaluate.precision" not in given:
            evaluate.pop("precision", None)
    if "evaluate.benchmarks" in given and isinstance(evaluate, dict):
        for key in ("benchmark_files", "unreachable"):
            if not evaluate.get("benchmarks") and f"evaluate.{key}" not in given:
                evaluate.pop(key, None)


def _beside(model: Model, folder: Path) -> None:
    for key in ("path", "tokenizer"):
        value = getattr(model, key)
        if value and not Path(value).exists() and (folder / value).exists():
            setattr(model, key, str(folder / value))


NOT_TEXT = (
    "YAML reads a key that is no, yes, on, off, null or a number as something else than text; "
    'write it in quotes, e.g. "no"'
)


def _check_keys(path: Path, data: Any, where: str = "") -> None:
    """YAML reads some words as other things than text; as the name of a domain they lose it."""
    if isinstance(data, list):
        for i, value in enumerate(data):
            _check_keys(path, value, f"{where}[{i}]")
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        if not isinstance(key, str):
            raise UserError(f"{path}: {where or 'the recipe'}: a key there is {key!r}. {NOT_TEXT}")
        _check_keys(path, value, f"{where}.{key}".lstrip("."))


def one_line(error: Exception) -> str:
    """A library's message: all that it says, without its blank lines and indents."""
    lines = [line.strip() for line in str(error).splitlines()]
    return "; ".join(line for line in lines if line)[:500] or type(error).__name__


_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
LONGEST = 80  # letters of a key in a message: a file that is none may be read as one


def _explain(error: Any, path: Path, overridden: set[str]) -> str:
    """One pydantic error as 'key (file): what is wrong; suggestion'."""
    loc = _place(error)
    key = _key(loc)
    where = "on the command line" if _is_under(key, overridden) else f"in {path}"
    if error["type"] in _UNKNOWN:
        owner = _dataclass_at(loc[:-1])
        known = [f.name for f in dataclasses.fields(owner)] if owner else []
        hint = near(str(loc[-1]), known) or f"; known keys: {', '.join(known)}"
        if any(o.startswith((f"{key}.", f"{key}[")) for o in overridden):
            where = "on the command line"
        short = key if len(key) <= LONGEST else f"{key[:LONGEST]}..."
        return f"{short}: unknown key, {where}{hint}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: missing, {where}; add it"
    message = _ASKED.get(error["type"], error["msg"].removeprefix("Value error, "))
    return f"{key}: {message[0].lower() + message[1:]}, got {error['input']!r}, {where}"


# What to write, by pydantic's name of a mistake.
_ASKED = {
    "dataclass_type": "write a mapping of settings ({} takes the defaults)",
    "dict_type": "write a mapping",
    "list_type": "write a list, e.g. [a, b]",
    "int_parsing": "write a whole number",
    "int_type": "write a whole number",
    "int_from_float": "write a whole number",
    "float_parsing": "write a number",
    "float_type": "write a number",
    "bool_parsing": "write true or false",
    "bool_type": "write true or false",
    "string_type": "write text",
}


def _place(error: Any) -> list[Any]:
    """The keys that lead to a mistake. Pydantic names the alternatives of a union there too; users
    name domains as they like."""
    above = [None, *error["loc"]]
    return [
        x
        for before, x in zip(above, error["loc"], strict=False)
        if before in _NAMED or not str(x).startswith(("function-", "str", "list["))
    ]


def _key(place: list[Any]) -> str:
    return "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in place).lstrip(".")


def _other_problems(data: Any, wrong: list[Any]) -> list[str]:
    """What else is wrong with a recipe where some keys have values of other kinds than theirs.
    Nothing is said of what stands beside those, which may go with them."""
    data, beside = deepcopy(data), []
    for error in wrong:
        *above, last = place = _place(error)
        try:
            holder: Any = data
            for part in above:
                holder = holder[part]
            holder.pop(last)
        except (AttributeError, LookupError, TypeError):
            return []
        beside.append(_key(place if error["type"] in _UNKNOWN else above or place))
    try:
        problems = recipe_problems(_ADAPTER.validate_python(data))
    except (ValidationError, UserError):
        return []
    return [p for p in problems if not p.startswith(tuple(beside))]


def _is_under(key: str, overridden: set[str]) -> bool:
    """Whether an override gave this key, or the value that holds it."""
    return any(key == o or key.startswith((f"{o}.", f"{o}[")) for o in overridden)


# Mappings whose entries users name, maybe as pydantic names a kind of value.
_NAMED = {"domains", "benchmarks", "tasks"}


def _dataclass_at(loc: list[Any]) -> type | None:
    """The dataclass that a place in a recipe holds."""
    owner: type | None = Recipe
    named = False  # the next part is the name of an entry
    for part in loc:
        if isinstance(part, int):
            continue
        if named or owner is None:
            named = False
            continue
        owner, step = inside(get_type_hints(owner).get(part))
        named = step == OF_ENTRY
    return None if named else owner


def _keys(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _all(path: Path, problems: list[str]) -> UserError:
    noun = "problem" if len(problems) == 1 else "problems"
    return UserError("\n".join([f"{path}: {len(problems)} {noun}", *(f"  {p}" for p in problems)]))


_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
