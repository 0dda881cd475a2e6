"""The model card of a run: what was learned and forgotten, on what data, by which recipe."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from eval.analysis.accuracy import DEFINITIONS as ACCURACY_DEFINITIONS
from eval.analysis.accuracy import accuracy_matrix, estimates
from eval.analysis.falls import HUMANEVAL, describe, falls, measures
from eval.analysis.labels import methods_of
from eval.analysis.load import Run, replayed_by_name
from eval.analysis.matrix import DEFINITIONS, METRICS, learning_curve
from eval.analysis.points import Point, Score
from eval.analysis.text import number, percent, signed
from eval.report.page import NAMES, render, summary
from pipeline.redact import redact, redacted

# What the hub calls the use of a model, by its objective.
PIPELINES = {"causal": "text-generation", "seq2seq": "text2text-generation"}


def model_card(run: Run, stage: int, license_: str, language: list[str], merged: bool) -> str:
    """The README.md of the checkpoint after a stage, with the hub's metadata before it.

    Args:
        license_: of the weights, as the hub spells it.
        merged: whether an adapter was merged into its base.
    """
    matrix = run.matrix.until(stage)
    curve = learning_curve(run.matrix)
    metrics = {key: function(matrix) for key, function in METRICS.items()}
    if stage < len(curve):
        metrics["learned"], metrics["forgotten"] = curve[stage]
    ends = [point for point in run.points if point.step is None and point.stage <= stage]
    names = list(dict.fromkeys(name for point in ends for name in _scores(point)))
    scores = [
        (p.stage, [100 * s.value if (s := _scores(p).get(n)) else None for n in names])
        for p in ends
        if _scores(p)
    ]
    answered = accuracy_matrix(run)
    accuracies = estimates([answered.until(stage)]) if answered is not None else {}
    fallen = [fall for fall in falls(run) if fall.stage <= stage]
    body = render(
        "card.md.j2",
        title=_one_line(run.name),
        summary=_one_line(summary(run)) if stage == run.evaluated else "",
        stage=stage,
        alone=matrix.alone and not run.recipe.get("epi") and not run.recipe.get("hat_adapter"),
        stages=list(map(_one_line, matrix.stages)),
        domains=list(map(_one_line, matrix.domains)),
        losses=[
            (_one_line(matrix.stages[t]), [number(v) for v in row])
            for t, row in enumerate(matrix.values)
        ],
        metrics=[
            (NAMES[k], (number if k == "acc" else signed)(v), DEFINITIONS[k])
            for k, v in metrics.items()
        ]
        + [
            (f"{name} of the tasks", f"{percent(accuracies[k].value)}%", text)
            for k, definition in ACCURACY_DEFINITIONS.items()
            if k in accuracies
            for name, _, text in [definition.partition(": ")]
        ],
        names=list(map(_one_line, names)),
        scores=[(_one_line(matrix.stages[t]), [number(v, 1) for v in row]) for t, row in scores],
        fallen=[_one_line(describe(fall, run.matrix.stages)) for fall in fallen],
        data=_data(run.recipe, matrix.stages),
        base=base_id(run.recipe),
        method=_one_line(_method(run)),
        warnings=[_one_line(text) for text in run.warnings],
        versions=run.environment.get("versions") or {},
        engine=run.environment.get("engine"),
        recipe=yaml.safe_dump(shareable(run.recipe), sort_keys=False, allow_unicode=True),
    )
    return f"---\n{_metadata(run, stage, license_, language, merged)}\n---\n\n{body}"


def _metadata(run: Run, stage: int, license_: str, language: list[str], merged: bool) -> str:
    model = run.recipe.get("model") or {}
    adapter = any(model.get(k) is not None for k in ("lora", "prompt")) and not merged
    domains = (run.recipe.get("data") or {}).get("domains") or {}
    trained = {n for name in run.matrix.stages[1 : stage + 1] for n in name.split("+")}
    trained |= {n for t, names in replayed_by_name(run.recipe).items() if t <= stage for n in names}
    datasets = [d["hub"] for n, d in domains.items() if n in trained and (d or {}).get("hub")]
    task = PIPELINES.get(str(model.get("objective")), "fill-mask")
    last = next((p for p in run.points if p.step is None and p.stage == stage), None)
    results = [
        EvalResult(
            task_type=task,
            dataset_type="openai_humaneval" if name == HUMANEVAL else name,
            dataset_name=name,
            metric_type=_metric(last, name),
            metric_value=round(100 * score.value, 2),
        )
        for name, score in (_scores(last) if last else {}).items()
    ]
    card = ModelCardData(
        license=license_,
        language=language or None,
        base_model=base_id(run.recipe),
        datasets=sorted(set(datasets)) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        tags=["continual-learning", "migu"] if _is_migu(run.recipe) else ["continual-learning"],
        model_name=run.name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml()


def _scores(point: Point) -> dict[str, Score]:
    return {**measures(point), **point.task_scores}


def _metric(point: Any, name: str) -> str:
    if name == HUMANEVAL:
        return "pass@1"
    if name in point.task_scores:
        return "exact_match"
    return str(point.benchmarks["benchmarks"][name].get("metric") or "acc")


def base_id(recipe: dict) -> str | None:
    """The base model's hub id; None for a folder or a model from scratch."""
    path = (recipe.get("model") or {}).get("path")
    here = path is None or Path(path).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
    return None if here else path


def _is_migu(recipe: dict) -> bool:
    mask = recipe.get("mask") or {}
    return bool(mask.get("enabled", True)) and mask.get("criterion", "output") == "output"


def _method(run: Run) -> str:
    name = methods_of([run])[0]
    if _is_migu(run.recipe):
        share = f"{(run.recipe.get('mask') or {}).get('threshold', 0.7):.0%}"
        return f"{name}: {share} of the gradient's rows masked by the magnitude of the outputs"
    return "fine-tuning of all weights" if name == "ft" else name


def _data(recipe: dict, stages: list[str]) -> list[tuple[str, str, str]]:
    """(domain, where its text is from, the stages that train on it)."""
    replayed = replayed_by_name(recipe)
    domains = (recipe.get("data") or {}).get("domains") or {}
    found = []
    for name, domain in domains.items():
        domain = domain or {}
        where = "not said"
        if domain.get("hub"):
            where = f"hub `{domain['hub']}`"
        elif domain.get("embedded"):
            where = "text of the Python installation"
        elif domain.get("files"):
            names = ", ".join(f"`{shareable(str(file))}`" for file in list(domain["files"])[:4])
            more = len(domain["files"]) - 4
            where = f"files {names}" + (f" and {more} more" if more > 0 else "")
        used = [
            f"{t}" if name in stage.split("+") else f"{t} (replayed)"
            for t, stage in enumerate(stages)
            if t and (name in stage.split("+") or name in replayed.get(t, ()))
        ]
        found.append((_one_line(name), _one_line(where), ", ".join(used) or "held-out text only"))
    return found


def shareable(value: Any) -> Any:
    """A recipe without what is nobody's business: secrets, and the folders of this machine."""
    if isinstance(value, dict):
        return {k: shareable(v) for k, v in redacted(value).items()}
    if isinstance(value, list):
        return [shareable(item) for item in value]
    if isinstance(value, str):
        if "://" in value:
            return redact(value.split("?")[0])
        if value.startswith(("/", "~", "..")):
            return Path(value).name
    return value


def _one_line(text: str) -> str:
    """As Markdown shows it in a line or a cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
