"""A run folder, read into what the reports need; whatever is missing so far is left open."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from eval.analysis.matrix import Matrix
from eval.analysis.points import Point, finite, load_points, losses_of, read_json
from pipeline.errors import UserError


@dataclass
class StageTime:
    """Where the time of one stage went; None where the log does not say. Times in seconds."""

    stage: int
    name: str
    steps: int
    finished: bool
    tokens: int
    tokens_per_second: float | None
    step_seconds: float | None  # median
    mask_percent: float | None  # median mask time / median step time
    seconds: float | None
    publish_seconds: float | None
    eval_seconds: float | None


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
    steps: list[dict]  # one log record per optimizer step, in order, the last of any repeated ones
    times: list[StageTime]
    heldout: str | None = None  # digests of the held-out text, as one string
    bad_lines: dict[str, dict] = field(default_factory=dict)  # domain -> {"count", "examples"}
    examples: dict[int, dict] = field(default_factory=dict)  # stage -> of its instruction data
    points: list[Point] = field(default_factory=list)  # all that was evaluated, in order
    warnings: list[str] = field(default_factory=list)

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
        return self.evaluated == self.matrix.last


def load_run(folder: Path) -> Run:
    """Read a run folder. `UserError` if it is not one, or its recipe cannot be read."""
    folder = Path(folder)
    recipe_file = folder / "recipe.yaml"
    if not recipe_file.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no recipe.yaml. Give the folder that training "
            "wrote, for example runs/demo."
        )
    try:
        recipe = yaml.safe_load(recipe_file.read_text())
        sequence = [
            [stage["domain"]] if isinstance(stage["domain"], str) else list(stage["domain"])
            for stage in recipe["stages"]
        ]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{recipe_file} is not the recipe of a run: {type(error).__name__} ({error}). Training "
            "writes this file; restore it, or run the recipe again."
        ) from None

    warnings: list[str] = []
    evals = {}
    for stage in range(len(sequence) + 1):
        record = _eval_of(folder, stage, warnings)
        if record:
            evals[stage] = record
    matrix, stderr, unigram = _matrix(recipe, sequence, evals, warnings)
    records = _log(folder / "log.jsonl", warnings)
    # A resumed stage repeats the steps after its last saved state: the later record counts.
    by_place = {(r["stage"], r["step"]): r for r in records if r.get("event") == "step"}
    steps = [by_place[place] for place in sorted(by_place)]
    ends = {r["stage"]: r for r in records if r.get("event") == "stage"}
    bad: dict[str, dict] = {}
    for record in records:
        if record.get("event") == "bad_lines":
            known = bad.get(record["domain"], {"count": 0})
            if record.get("count", 0) > known["count"]:
                bad[record["domain"]] = record
    manifest = read_json(folder / "heldout" / "manifest.json", warnings)
    return Run(
        path=folder,
        recipe=recipe,
        environment=read_json(folder / "environment.json", warnings) or {},
        matrix=matrix,
        stderr=stderr,
        unigram=unigram,
        overlap={t: r["overlap"] for t, r in evals.items() if r.get("overlap")},
        steps=steps,
        times=_times(matrix.stages, steps, ends),
        heldout=json.dumps(manifest.get("files", manifest), sort_keys=True) if manifest else None,
        bad_lines=bad,
        examples={t: r["data"] for t, r in ends.items() if isinstance(r.get("data"), dict)},
        points=load_points(folder, recipe["stages"], matrix, stderr, warnings),
        warnings=warnings,
    )


def _eval_of(folder: Path, stage: int, warnings: list[str]) -> dict | None:
    for path in sorted((folder / "stages").glob(f"{stage:02d}_*/eval.json")):
        record = read_json(path, warnings)
        if record and isinstance(record.get("domains"), dict):
            return record
    return None


def _matrix(
    recipe: dict, sequence: list[list[str]], evals: dict[int, dict], warnings: list[str]
) -> tuple[Matrix, list[list[float | None]], dict[str, float]]:
    trained: dict[str, int] = {}
    for stage, mixture in enumerate(sequence, start=1):
        for domain in mixture:
            trained.setdefault(domain, stage)
    seen = {domain: None for record in evals.values() for domain in record["domains"]}
    order = [*((recipe.get("data") or {}).get("domains") or {}), *seen]
    base = [d for d in dict.fromkeys(order) if d in seen and d not in trained]
    domains = [*base, *trained]
    stages = ["base", *("+".join(mixture) for mixture in sequence)]

    results = {
        stage: losses_of(record, f"after stage {stage} ({stages[stage]})", warnings)
        for stage, record in evals.items()
    }

    def rows(key: str) -> list[list[float | None]]:
        return [
            [results.get(t, {}).get(d, {}).get(key) for d in domains] for t in range(len(stages))
        ]

    unigram = {
        domain: value
        for record in evals.values()
        for domain, result in record["domains"].items()
        if (value := finite(result.get("unigram_loss"))) is not None
    }
    return Matrix(stages, domains, trained, rows("loss")), rows("stderr"), unigram


def _log(path: Path, warnings: list[str]) -> list[dict]:
    if not path.is_file():
        warnings.append("There is no log.jsonl: training loss and times are missing.")
        return []
    records, unreadable = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            needed = {"step": ("stage", "step"), "stage": ("stage",), "bad_lines": ("domain",)}
            if all(key in record for key in needed.get(record.get("event"), ())):
                records.append(record)
        except (ValueError, AttributeError):
            unreadable += bool(line.strip())
    if unreadable:
        warnings.append(
            f"{unreadable} line(s) of log.jsonl cannot be read and are left out (a run that was "
            "killed can leave half a line)."
        )
    return records


def _times(stages: list[str], steps: list[dict], ends: dict[int, dict]) -> list[StageTime]:
    times = []
    for stage, name in enumerate(stages[1:], start=1):
        mine = [step for step in steps if step["stage"] == stage]
        end = ends.get(stage, {})
        if not mine and not end:
            continue
        timed = [s for s in mine if s.get("seconds")]
        spent = sum(s["seconds"] for s in timed)
        step_seconds = statistics.median(s["seconds"] for s in timed) if timed else None
        masking = [s["mask_seconds"] for s in timed if s.get("mask_seconds") is not None]
        times.append(
            StageTime(
                stage=stage,
                name=name,
                steps=end.get("steps", len(mine)),
                finished=bool(end),
                tokens=end.get("tokens", sum(s.get("tokens", 0) for s in mine)),
                tokens_per_second=sum(s.get("tokens", 0) for s in timed) / spent if spent else None,
                step_seconds=step_seconds,
                mask_percent=100 * statistics.median(masking) / step_seconds if masking else None,
                seconds=end.get("seconds"),
                publish_seconds=end.get("publish_seconds"),
                eval_seconds=end.get("eval_seconds"),
            )
        )
    return times
