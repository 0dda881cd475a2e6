"""What is wrong with the recipe's end tasks."""

import re

from pipeline.recipe import EndTasks

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a task: it names files


def end_task_problems(e: EndTasks) -> list[str]:
    """What is wrong with the settings of the end tasks by themselves; their rows are read later."""
    found: list[str] = []

    def need(condition: bool, key: str, message: str) -> None:
        if not condition:
            found.append(f"evaluate.end_tasks{key}: {message}")

    need(bool(e.tasks), ".tasks", "name at least one task, e.g. restaurant")
    need(bool(e.seeds), ".seeds", "name at least one seed")
    twice = sorted({s for s in e.seeds if e.seeds.count(s) > 1})
    need(not twice, ".seeds", f"{twice} are given twice")
    for key in ("sequence_length", "batch_size", "lr", "patience", "processes"):
        value = getattr(e, key)
        need(value is None or value > 0, f".{key}", "must be positive")
    need(e.weight_decay >= 0, ".weight_decay", "must be at least 0")
    need(
        not (e.new_pooler and e.score == "likelihood"),
        ".new_pooler",
        "has no effect where labels are scored by likelihood; remove it",
    )
    own = [bool(t.files or t.hub) for t in e.tasks.values()]
    need(
        not (e.files and own and all(own)),
        ".files",
        "has no effect where every task has its own `files` or `hub`; remove it",
    )
    for name, task in e.tasks.items():
        where = f".tasks.{name}"
        need(
            NAME.fullmatch(name) is not None,
            where,
            "a name is made of letters, digits, '.', '_' and '-'",
        )
        need(not (task.files and task.hub), where, "give at most one of `files` and `hub`")
        need(
            bool(e.files or task.files or task.hub),
            where,
            "say where its rows are: `files` or `hub`, or evaluate.end_tasks.files for all tasks",
        )
        need(task.epochs is None or task.epochs >= 1, f"{where}.epochs", "must be at least 1")
        need(task.lr is None or task.lr > 0, f"{where}.lr", "must be positive")
    return found
