"""What tells compared runs apart: a label for each, and where their recipes should not differ."""

import re
from typing import get_args, get_type_hints

from eval.analysis.load import Run
from eval.analysis.text import short_float
from pipeline import method_settings
from pipeline.recipe import Recipe

CRITERIA = {
    "output": "migu",
    "random": "random rows",
    "weight": "weight magnitude",
    "gradient": "gradient magnitude",
    "fisher": "fggm",
}
METHODS = tuple(
    key
    for key, hint in get_type_hints(Recipe).items()
    if any(getattr(part, "__module__", None) == method_settings.__name__ for part in get_args(hint))
)
"""The recipe's keys of methods beside the mask; where one is set, its key is part of the label."""
FREE = ("mask", "optimizer", "seed", "name", "track", "start_from", "resume", *METHODS)
"""What compared runs may differ in; with the adapter, the learning rate and the replay of single
stages, and how and how often (not on what) the evaluation ran."""
ALSO_FREE = (
    "evaluate.batch_size",
    "evaluate.overlap",
    "evaluate.unreachable",
    "evaluate.humaneval.sandbox",
    "evaluate.end_tasks.files",
    "evaluate.end_tasks.processes",
    "evaluate.benchmark_files",
    "data.prepared",
    "train.micro_batch_size",
    "train.publish_dtype",
)
LOSSES_OF = "evaluate.domains"
ADAPTERS = ("model.lora", "model.prompt")
NAMED = (
    "mask.enabled", "mask.threshold", "mask.criterion", "optimizer.lr", "seed", "name",
    "model.lora", "model.lora.quantize", "model.lora.incremental",
    "model.lora.composed", "model.prompt", "model.prompt.progressive", "start_from",
)  # fmt: skip
"""What is in the label, or beside it, anyway."""


def methods_of(runs: list[Run]) -> list[str]:
    """Each run's method, without learning rate and seed: `ft`, `lora`, `migu T=0.7`, `anchor`,
    `lora, migu T=0.7`, ..., followed by whatever else of their training the runs may and do differ
    in."""
    recipes = [flat(run.recipe) for run in runs]
    # What a masked run sets beyond the label is told where the masked runs do not agree on it.
    masked = [r for r in recipes if r.get("mask.enabled", True)]
    adapted = [r for r in recipes if adapter_of(r)]
    used = [methods_in(recipe) for recipe in recipes]
    telling = []
    for key in sorted({key for recipe in recipes for key in recipe}):
        block = key.split(".")[0]
        among = masked if block == "mask" else recipes
        among = adapted if key.startswith(ADAPTERS) else among
        if block in METHODS:
            among = [r for r, names in zip(recipes, used, strict=True) if block in names]
        if not _is_free(key) or key in NAMED or _how_evaluated(key) or _is_replay(key):
            continue
        if len({repr(r.get(key)) for r in among}) > 1:
            telling.append(key)
    longest = max(len(run.recipe.get("stages") or []) for run in runs)
    replayed = [_replays(recipe) for recipe in recipes]
    if len(runs) > 1 and len(set(replayed)) == 1:  # tells none apart
        replayed = [""] * len(recipes)
    methods = []
    for run, recipe, names, replay in zip(runs, recipes, used, replayed, strict=True):
        is_masked = recipe.get("mask.enabled", True)
        criterion = str(recipe.get("mask.criterion", "output"))
        threshold = recipe.get("mask.threshold", 0.7)
        selected = f"{CRITERIA.get(criterion, criterion)} T={threshold:g}" if is_masked else ""
        source = recipe.get("start_from", "previous")
        alone = f"each from the {source}" if source != "previous" else ""
        together = "all at once" if _learns_all_at_once(run, longest) else ""
        parts = (adapter_of(recipe), *names, replay, selected, alone, together)
        name = ", ".join(filter(None, parts)) or "ft"
        extra = [
            f"{key.split('.', 1)[-1]} {_plain(recipe[key])}"
            for key in telling
            if recipe.get(key) is not None and (is_masked or not key.startswith("mask."))
            if key not in METHODS
        ]
        methods.append(", ".join([name, *extra]))
    return methods


def methods_in(recipe: dict) -> list[str]:
    """Of a flat recipe: the keys of the methods that it uses."""
    blocks = {key.split(".")[0] for key in recipe if "." in key}
    return [m for m in METHODS if m in blocks or recipe.get(m) is not None]


def _learns_all_at_once(run: Run, longest: int) -> bool:
    """Whether its one stage has the domains that others learn in `longest` stages."""
    stages = run.recipe.get("stages") or []
    return len(stages) == 1 < longest and not isinstance(stages[0].get("domain"), str)


def _replays(recipe: dict) -> str:
    """Of a flat recipe: what share of older text its stages have, or "" without."""
    shares = {share for key, share in recipe.items() if _is_replay(key) and share}
    return f"replay {', '.join(map(_plain, sorted(shares)))}" if shares else ""


def adapter_of(recipe: dict) -> str:
    """Of a flat recipe: lora, qlora, inclora (an adapter a stage), prompt, prog_prompt, or "" where
    the weights themselves are trained."""
    if any(key.startswith("model.prompt.") for key in recipe):
        return "prog_prompt" if recipe.get("model.prompt.progressive") else "prompt"
    if not any(key.startswith("model.lora.") for key in recipe):
        return ""
    name = "lora" if recipe.get("model.lora.quantize", "none") == "none" else "qlora"
    return f"inc{name}" if recipe.get("model.lora.incremental") else name


def without_seed(run: Run) -> str:
    """All of a recipe that repetitions of one setting share: what is trained and measured, but not
    its seed and name, and not how it is evaluated."""
    return repr(_settings(run))


def without_rate(run: Run) -> str:
    """What the runs of one method share over its learning rates and seeds: all of a recipe that its
    losses come from."""
    return repr(
        [
            (key, value)
            for key, value in _settings(run)
            if key != "optimizer.lr" and (key == LOSSES_OF or not key.startswith("evaluate."))
        ]
    )


def _settings(run: Run) -> list[tuple[str, str]]:
    recipe = flat(run.recipe)
    masked = recipe.get("mask.enabled", True)
    return sorted(
        (key, repr(value))
        for key, value in recipe.items()
        if key not in ("seed", "name", "track") and not _how_evaluated(key)
        if masked or not key.startswith("mask.") or key == "mask.enabled"
    )


def learning_rate(run: Run) -> float:
    return float((run.recipe.get("optimizer") or {}).get("lr") or 0.0)


def differences(runs: list[Run]) -> list[str]:
    """A warning for every key of the recipes in which comparable runs do not differ."""
    recipes = [flat(run.recipe) for run in runs]
    stages = [len(run.recipe.get("stages") or []) for run in runs]
    found = []
    if len(set(stages)) > 1:  # said once, not for each key of each stage
        each = _by_value(runs, [str(n) for n in stages])
        found.append(f"The runs differ in the number of their stages ({each}).")
        recipes = [{k: v for k, v in r.items() if not k.startswith("stages.")} for r in recipes]
    differing: dict[tuple[str, str], list[str]] = {}  # the stages of a key and who has what
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        if not _is_free(key) and len({repr(recipe.get(key)) for recipe in recipes}) > 1:
            each = _by_value(runs, [_plain(recipe.get(key)) for recipe in recipes])
            of = re.fullmatch(r"stages\.(\d+)\.(.+)", key)
            name, stage = (of[2], [str(int(of[1]) + 1)]) if of else (key, [])
            differing.setdefault((name, each), []).extend(stage)
    for (name, each), of_stages in differing.items():
        where = f" of stage {', '.join(of_stages)}" if of_stages else ""
        found.append(
            f"The runs differ in {name}{where} ({each}), so a difference may come from that."
        )
    return found


def _by_value(runs: list[Run], values: list[str]) -> str:
    """Which runs have which value."""
    names: dict[str, list[str]] = {}
    for run, value in zip(runs, values, strict=True):
        names.setdefault(value, []).append(run.name)
    return "; ".join(f"{some(of)}: {value}" for value, of in names.items())


def some(names: list[str]) -> str:
    """Two names; of more the first, and how many more."""
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"


def flat(value: object, prefix: str = "") -> dict:
    """Nested keys as dotted ones; lists of mappings by index, other lists as they are."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    found: dict[str, object] = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _is_free(key: str) -> bool:
    of_stage = key.startswith("stages.") and key.endswith((".lr", ".evaluate_every"))
    of_adapter = key in ADAPTERS or key.startswith(tuple(f"{a}." for a in ADAPTERS))
    own = of_stage or of_adapter or _is_replay(key)
    return key.split(".")[0] in FREE or key in ALSO_FREE or own


def _is_replay(key: str) -> bool:
    parts = key.split(".")  # stages.1.replay, or stages.1.replay.DOMAIN
    return parts[0] == "stages" and "replay" in parts[2:3]


def _how_evaluated(key: str) -> bool:
    """How and how often, not on what."""
    return (key.startswith("evaluate.") and key in ALSO_FREE) or key.endswith(".evaluate_every")


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if value is None:
        return "not set"
    return short_float(value) if isinstance(value, float) and 0 < value < 1e-2 else str(value)
