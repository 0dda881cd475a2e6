"""A run folder, read into what the reports need; whatever is missing so far is left open."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eval.analysis.files import Damaged, Findings, finite, read_json
from eval.analysis.log import Log, StageTime, interventions, read_log, stage_times
from eval.analysis.matrix import Matrix
from eval.analysis.points import Point, load_points, losses_of
from pipeline.errors import UserError
from pipeline.run.recipe_defaults import with_defaults
from pipeline.yaml_file import Loader, read_yaml

LATER_WORK = "is missing, although later work is there."


@dataclass
class Run:
    """What is known of a run: finished, under way, or broken off."""

    path: Path
    recipe: dict
    environment: dict
    matrix: Matrix  # held-out loss, nats per predicted token
    stderr: list[list[float | None]]  # of each cell of the matrix
    unigram: dict[str, float]  # loss of predicting by frequency alone, where the evaluation has it
    overlap: dict[int, dict]  # stage -> the "overlap" of its eval.json
    log: Log
    times: list[StageTime]
    trained: dict[str, int]  # domain -> the stage (from 1) that first trains it, measured or not
    heldout: str | None = None  # digests of the held-out text, as one string
    points: list[Point] = field(default_factory=list)  # all that was evaluated, in order
    warnings: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)  # of these, why no verdict rests on its losses

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.path.name)

    @property
    def evaluated(self) -> int:
        """The last stage that has an evaluation, -1 for none."""
        rows = [t for t, row in enumerate(self.matrix.values) if any(v is not None for v in row)]
        return max(rows, default=-1)

    @property
    def finished(self) -> bool:
        """Whether every stage was measured."""
        return all(any(v is not None for v in row) for row in self.matrix.values)

    @property
    def untrained(self) -> list[str]:
        """The domains of the matrix of which no stage trains on anything, not even replayed."""
        replayed = {d for domains in replayed_by_name(self.recipe).values() for d in domains}
        return [d for d in self.matrix.base if d not in replayed]

    @property
    def progress(self) -> str:
        """How far the evaluations are, as the pages write it."""
        if self.evaluated < 0:
            return "nothing evaluated yet"
        return f"after stage {self.evaluated} of {self.matrix.last}"

    @property
    def examples(self) -> dict[int, dict]:
        """stage -> of its instruction data."""
        found = {}
        for stage, end in self.log.ends.items():
            data = end.get("data")
            counts = ("too_long", "examples")
            if isinstance(data, dict) and all(isinstance(data.get(k, 0), int) for k in counts):
                found[stage] = data
        return found

    @property
    def stopped(self) -> str:
        """Where and why the run broke off by itself; "" where it did not."""
        record = self.log.stopped
        if record is None or self.finished:
            return ""
        step = f"step {record['step']} of " if record.get("step") else ""
        where = f"{step}stage {record['stage']} ({self.matrix.stages[record['stage']]})"
        return f"The run stopped at {where}: {record.get('reason', 'it does not say why')}."


def load_run(folder: Path) -> Run:
    """Read a run folder. `UserError` if it is not one, or its recipe cannot be read."""
    folder = Path(folder)
    recipe = _recipe(folder)
    sequence = [
        [stage["domain"]] if isinstance(stage["domain"], str) else list(stage["domain"])
        for stage in recipe["stages"]
    ]
    names = ["base", *("+".join(mixture) for mixture in sequence)]
    findings = Findings()
    log = read_log(folder / "log.jsonl", len(sequence), findings)
    evals = _evals(folder, names, log, findings)
    trained: dict[str, int] = {}
    for stage, mixture in enumerate(sequence, start=1):
        for domain in mixture:
            trained.setdefault(domain, stage)
    matrix, stderr = _matrix(recipe, trained, names, evals)
    for stage, results in evals.items():
        if lacking := [d for d in matrix.domains if d not in results]:
            findings.damaged(f"The evaluation after stage {stage} has no loss on {lacking}.")
    points = load_points(folder, recipe["stages"], matrix, stderr, log.shares, findings)
    run = Run(
        path=folder,
        recipe=recipe,
        environment=_environment(folder, findings),
        matrix=matrix,
        stderr=stderr,
        unigram={
            domain: value
            for results in evals.values()
            for domain, result in results.items()
            if (value := result["unigram_loss"]) is not None
        },
        overlap=_overlaps(folder, evals, findings),
        log=log,
        times=[],
        trained=trained,
        heldout=_heldout(folder, points, findings),
        points=points,
        warnings=findings.warnings,
        damage=findings.damage,
    )
    run.times = stage_times(names, log, run.evaluated)
    run.warnings += interventions(log, names)
    if unasked := [d for d in trained if d not in matrix.trained]:
        run.warnings.append(
            f"The losses of {', '.join(unasked)} were not asked for (evaluate.domains): what was "
            "learned there is in no number."
        )
    if run.stopped:
        run.warnings.insert(0, run.stopped)
    return run


def _recipe(folder: Path) -> dict:
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no recipe.yaml. Give the folder that training "
            "wrote, for example runs/demo."
        )
    try:
        recipe = yaml.load(read_yaml(path), Loader)
        problem = _recipe_problem(recipe)
    except (yaml.YAMLError, ValueError, UserError) as error:
        problem = f"{type(error).__name__} ({error})"
    if problem:
        raise UserError(
            f"{path} is not the recipe of a run: {problem}. Training writes this file; restore it, "
            "or run the recipe again."
        )
    return with_defaults(recipe)


def _recipe_problem(recipe: Any) -> str:
    if not isinstance(recipe, dict):
        return "it holds no keys"
    for key in ("model", "mask", "optimizer", "train", "data", "evaluate"):
        if not isinstance(recipe.get(key) or {}, dict):
            return f"{key} holds no keys"
    if not isinstance((recipe.get("data") or {}).get("domains") or {}, dict):
        return "data.domains holds no keys"
    stages = recipe.get("stages")
    if not isinstance(stages, list) or not stages:
        return "stages is no list"
    for stage in stages:
        domain = stage.get("domain") if isinstance(stage, dict) else None
        mixture = list(domain) if isinstance(domain, list | dict) else [domain]
        if not mixture or not all(isinstance(name, str) for name in mixture):
            return "a stage names no domain"
    for key, place in (("threshold", recipe.get("mask")), ("lr", recipe.get("optimizer"))):
        if finite((place or {}).get(key, 0.0)) is None:
            return f"{key} is no number"
    return ""


def _evals(
    folder: Path, names: list[str], log: Log, findings: Findings
) -> dict[int, dict[str, dict[str, Any]]]:
    """stage -> the results of each domain, of the stages that were evaluated."""
    found = {stage: _eval_of(folder, stage) for stage in range(len(names))}
    done = max([stage for stage, path in found.items() if path], default=-1)
    done = max(done, *log.ends, log.begun - 1) if log.ends or log.begun else done
    evals = {}
    for stage, path in found.items():
        if path is None:
            if stage <= done:
                name = f"{stage:02d}_{names[stage]}/eval.json"
                findings.damaged(f"{name} {LATER_WORK}")
            continue
        try:
            record = read_json(path) or {}
            where = f"after stage {stage} ({names[stage]})"
            evals[stage] = losses_of(record, path, where, findings)
        except Damaged as damaged:
            findings.damaged(str(damaged))
    return {stage: results for stage, results in evals.items() if results}


def _eval_of(folder: Path, stage: int) -> Path | None:
    return next(iter(sorted((folder / "stages").glob(f"{stage:02d}_*/eval.json"))), None)


def _matrix(
    recipe: dict, trained: dict[str, int], names: list[str], evals: dict[int, dict]
) -> tuple[Matrix, list[list[float | None]]]:
    """Of the domains whose losses the recipe asks for."""
    asked = (recipe.get("evaluate") or {}).get("domains")
    trained = {d: stage for d, stage in trained.items() if asked is None or d in asked}
    seen = {domain: None for results in evals.values() for domain in results}
    order = [*((recipe.get("data") or {}).get("domains") or {}), *seen]
    base = [d for d in dict.fromkeys(order) if d in seen and d not in trained]
    domains = [*base, *trained]

    def rows(key: str) -> list[list[float | None]]:
        return [[evals.get(t, {}).get(d, {}).get(key) for d in domains] for t in range(len(names))]

    alone = separate_models(recipe)
    return Matrix(names, domains, trained, rows("loss"), alone=alone), rows("stderr")


def replayed_by_name(recipe: dict) -> dict[int, list[str]]:
    """stage -> the domains that it replays by their names, which it need not train on otherwise."""
    given = enumerate(recipe.get("stages") or [], start=1)
    return {t: list(s["replay"]) for t, s in given if isinstance(s.get("replay"), dict)}


def separate_models(recipe: dict) -> bool:
    """Whether each of several stages of a recipe has a model of its own."""
    if len(recipe.get("stages") or []) < 2:
        return False
    return recipe.get("start_from", "previous") != "previous" or bool(recipe.get("hat_adapter"))


def _overlaps(folder: Path, evals: dict[int, dict], findings: Findings) -> dict[int, dict]:
    found = {}
    for stage in evals:
        path = _eval_of(folder, stage)
        record = read_json(path) if path else None
        overlap = record.get("overlap") if record else None
        if isinstance(overlap, dict) and _is_overlap(overlap):
            found[stage] = overlap
        elif overlap:
            findings.warnings.append(f"The overlap of stage {stage} is damaged and left out.")
    return found


def _is_overlap(overlap: dict) -> bool:
    domains, kinds = overlap.get("domains"), overlap.get("kinds")
    if not isinstance(domains, list) or not isinstance(kinds, dict):
        return False
    if finite(overlap.get("threshold", 0.0)) is None:
        return False
    tables = list(kinds.values())
    rows = [row for table in tables if isinstance(table, list) for row in table]
    return all(isinstance(t, list) and len(t) == len(domains) for t in tables) and all(
        isinstance(row, list) and len(row) == len(domains) and None not in map(finite, row)
        for row in rows
    )


def _environment(folder: Path, findings: Findings) -> dict:
    try:
        environment = read_json(folder / "environment.json")
    except Damaged as damaged:
        findings.warnings.append(str(damaged))
        return {}
    if environment is None:
        findings.warnings.append("There is no environment.json: what it was run on is not known.")
        return {}
    kinds = {"versions": dict, "hardware": dict, "masked_rows": dict, "parameters": int}
    for key, kind in kinds.items():
        value = environment.get(key)
        whole = isinstance(value, kind)
        if isinstance(value, dict) and key == "masked_rows":
            whole = all(isinstance(value.get(k, 0), int) for k in ("total", "kept"))
        if not whole:
            environment.pop(key, None)
        if not whole and value is not None:
            findings.warnings.append(f"environment.json: {key} is damaged and left out.")
    return environment


def _heldout(folder: Path, points: list[Point], findings: Findings) -> str | None:
    try:
        manifest = read_json(folder / "heldout" / "manifest.json")
    except Damaged as damaged:
        findings.damaged(str(damaged))
        return None
    if manifest is None:
        if any(point.sequences for point in points):
            findings.damaged("heldout/manifest.json is missing: on which text is not known.")
        return None
    return json.dumps(manifest.get("files", manifest), sort_keys=True)
