"""A sweep: many runs of a recipe over a grid of settings, and which they are."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.engine.config import memory_per_rank, resolve_engine_config
from pipeline.errors import UserError, near
from pipeline.model.load import empty_model, load_config
from pipeline.run.folder import require_same
from pipeline.run.problems import NAME
from pipeline.run.recipe_file import RECIPES, find_recipe, load_recipe, read_over_base

SWEEPS = RECIPES / "sweeps"


@dataclass
class Sweep:
    """A YAML file of launch/recipes/sweeps, or what the command line says. A file may be laid over
    another, its `base`, as recipes may; a method of it that is null here is left out.

    Every method is a set of overrides of the recipe; it runs over the product of `grid`, its own
    entry in `grids` (which goes before `grid` key by key), and, with several `seeds`, 0..seeds-1;
    with `seeds_of: best` all of it with seed 0, and the other seeds of each method's best setting.
    """

    recipe: str
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    grid: dict[str, list[Any]] = field(default_factory=dict)
    grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seeds: int = 1
    seeds_of: Literal["all", "best"] = "all"
    program: str = "cpt"
    config: str | None = None  # DeepSpeed's JSON

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Point:
    """One run: its name and the overrides that make it. setting: its name without the seed."""

    name: str
    overrides: tuple[str, ...]
    method: str
    setting: str
    seed: int


def load_sweep(name: str) -> Sweep | None:
    """The sweep of that name or file; None where it is a recipe (it has no key `recipe`).

    Raises:
        UserError: a key or a value that a sweep does not take.
    """
    for path in (Path(name), SWEEPS / f"{name}.yaml"):
        if not path.is_file():
            continue
        content = OmegaConf.to_container(read_over_base(path, _find_base))
        if not isinstance(content, dict) or "recipe" not in content:
            return None
        _leave_out(content)
        try:
            sweep = TypeAdapter(Sweep).validate_python(content)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise UserError(
                "\n".join([f"{path}: not a sweep", *(f"  {w}" for w in wrong)])
            ) from None
        for method in sweep.grids:
            if method not in sweep.methods:
                hint = near(method, sweep.methods)
                raise UserError(f"{path}: grids.{method}: no such method{hint}")
        return sweep
    return None


def _leave_out(content: dict[Any, Any]) -> None:
    """The base's methods that are null."""
    methods, grids = content.get("methods"), content.get("grids")
    if isinstance(methods, dict):
        for name in [n for n, settings in methods.items() if settings is None]:
            del methods[name]
            if isinstance(grids, dict):
                grids.pop(name, None)


def _find_base(name: str) -> Path:
    """A sweep's base is a sweep, a recipe's a recipe: what a file is, is known once it is read."""
    sweep = SWEEPS / f"{name}.yaml"
    return sweep if sweep.is_file() else find_recipe(name)


def sweep_points(sweep: Sweep, more: Sequence[str] = ()) -> list[Point]:
    """Every run of a sweep: all settings with the first seed, then all with the next, so that a
    sweep that is ended early compares them all.

    more: settings of all runs, as the command line has them.

    Raises:
        UserError: an empty list of values, no seed, two runs of one name; one of `more` that would
            undo what tells the runs apart.
    """
    _check_settings_of_all(sweep, more)
    if sweep.seeds < 1:
        raise UserError(f"--seeds {sweep.seeds}: must be at least 1")
    if sweep.seeds_of == "best" and sweep.seeds < 2:
        raise UserError("seeds_of: best: has no effect without several seeds; give --seeds")
    points = []
    for seed, (method, settings) in itertools.product(range(sweep.seeds), sweep.methods.items()):
        grid = {**sweep.grid, **sweep.grids.get(method, {})}
        for key, values in grid.items():
            if not values:
                raise UserError(f"--grid {key}: the list of values is empty")
        if sweep.seeds > 1 and "seed" in {**settings, **grid}:
            raise UserError("--seeds: has no effect on a seed that is given too; remove one")
        seeds = {"seed": seed} if sweep.seeds > 1 else {}  # one seed is the recipe's own
        for combination in itertools.product(*grid.values()):
            chosen = dict(zip(grid, combination, strict=True))
            written = tuple(
                f"{k}={_written(v)}" for k, v in {**settings, **chosen, **seeds}.items()
            )
            varied = {k: v for k, v in chosen.items() if len(grid[k]) > 1}
            name, setting = _name(method, varied | seeds), _name(method, varied)
            points.append(Point(name, (*written, *more), method, setting, seed))
    for p in points:
        if not NAME.fullmatch(p.name):
            raise UserError(
                f"the sweep has a run named {p.name!r}, which names files: letters, digits, '.', "
                "'_' and '-', and no '.', '_' or '-' first; name the method so"
            )
    doubled = {p.name for p in points if sum(q.name == p.name for q in points) > 1}
    if doubled:
        raise UserError(f"the sweep has two runs named {sorted(doubled)[0]!r}; vary their values")
    return points


def _check_settings_of_all(sweep: Sweep, more: Sequence[str]) -> None:
    given: dict[str, list[Any]] = {}  # by key what runs have in grids
    for method in sweep.methods:
        for key, values in {**sweep.grid, **sweep.grids.get(method, {})}.items():
            given.setdefault(key, []).extend(v for v in values if v not in given.get(key, []))
    grids = {key for key, values in given.items() if len(values) > 1}
    methods = {key for settings in sweep.methods.values() for key in settings}

    def touches(key: str, others: Iterable[str]) -> bool:
        return any(f"{a}.".startswith(f"{b}.") for o in others for a, b in ((key, o), (o, key)))

    for setting in more:
        key = setting.partition("=")[0]
        where = ""
        if touches(key, grids):
            where = "the grid varies it"
        elif touches(key, methods):
            where = "the methods differ in it"
        elif key == "seed" and sweep.seeds > 1:
            where = "the seeds are 0 to N-1 of --seeds"
        elif key == "name":
            where = "a run is named by what it varies; name the sweep by --sweep"
        if where:
            raise UserError(f"{setting}: would make the runs alike: {where}; remove it")


def of_the_best(points: Sequence[Point], scores: Mapping[str, float]) -> list[Point]:
    """Those of each method's best setting: the one whose run with seed 0 has the highest score."""
    first = [p for p in points if p.seed == 0]
    methods = dict.fromkeys(p.method for p in points)
    best = {
        max((p for p in first if p.method == m), key=lambda p: scores[p.name]).setting
        for m in methods
    }
    return [p for p in points if p.setting in best]


def _name(method: str, varied: dict[str, Any]) -> str:
    """Of a run folder: the method and what varies, by the last part of each key."""
    parts = [method] if method else []
    for key, value in varied.items():
        short = "".join(c if c.isalnum() or c in ".-" else "_" for c in _written(value))
        parts.append(f"{key.rsplit('.', 1)[-1]}_{short}")
    return "-".join(parts) or "run"


def _written(value: Any) -> str:
    """As the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def require_same_runs(sweep: Sweep, points: Sequence[Point], folder: Path) -> None:
    """Raises UserError where a run that is there is another recipe's: its file has changed."""
    for point in points:
        if (folder / point.name).is_dir():
            overrides = [*point.overrides, f"name={point.name}"]
            require_same(folder / point.name, load_recipe(sweep.recipe, overrides))


def model_bytes(sweep: Sweep, points: Sequence[Point]) -> int:
    """Bytes of model state of the largest run. Every run's recipe is read and checked for it.

    Raises:
        UserError: what is wrong with a point's recipe, by the name of the point.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes: dict[str, int] = {}
    for point in points:
        try:
            recipe = load_recipe(sweep.recipe, point.overrides)
            engine = resolve_engine_config(sweep.config, recipe, 1, device)
        except UserError as error:
            raise UserError(f"{point.name}: {error}") from None
        key = f"{recipe.model} {recipe.optimizer.name} {engine}"
        if key not in sizes:
            config = load_config(recipe.model, recipe.model.train_tokenizer)
            parameters = sum(p.numel() for p in empty_model(recipe.model, config).parameters())
            memory = memory_per_rank(parameters, engine, 1, recipe.optimizer.name)
            sizes[key] = sum(device + host for device, host in memory.values())
    return max(sizes.values())
