"""End tasks on the pages: of one run the stage x task matrix, of all the rows of Tables 3 and 4."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from eval.analysis.end_tasks import DEFINITIONS, EndTaskMatrix, Estimate, estimate, read_end_tasks
from eval.analysis.end_tasks import table as numbers_of
from eval.analysis.load import Run
from eval.analysis.text import percent, signed_percent
from eval.report.cells import Cell

COLUMNS = {
    "score": "MF1",
    "accuracy": "ACC",
    "forgetting_score": "Forgetting, MF1",
    "forgetting_accuracy": "Forgetting, ACC",
    "first_two": "ACC, domains 1-2",
    "last_two": "ACC, the last two",
}


@dataclass
class EndTasksShown:
    """columns, and a row of cells per method; `matrix`: of one run, a row per measured stage."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    tasks: list[tuple[str, str]]  # name, metric
    matrix: list[tuple[str, list[Cell]]]
    definitions: dict[str, str]
    numbers: dict
    warnings: list[str]


def end_tasks_of(methods: Mapping[str, Sequence[Run]]) -> EndTasksShown | None:
    """By method its runs, which differ in their seed alone; None where none measured an end task.

    `numbers` go into report.json: {rows: {method: {column: mean, half}}, matrix: {stage: {task:
    {score, accuracy: a number per seed}}} of a run alone}.
    """
    found: dict[str, list[EndTaskMatrix]] = {}
    warnings: list[str] = []
    for method, runs in methods.items():
        for run in runs:
            matrix, said = read_end_tasks(run)
            warnings += said if len(methods) == 1 else [f"{run.name}: {text}" for text in said]
            if matrix is not None:
                found.setdefault(method, []).append(matrix)
    if not found:
        return None
    tables = {method: numbers_of(matrices) for method, matrices in found.items()}
    numbers: dict = {
        "rows": {m: {k: e and asdict(e) for k, e in row.items()} for m, row in tables.items()}
    }
    rows = [
        (method, [_cell(row[key], key.startswith("forgetting")) for key in COLUMNS])
        for method, row in tables.items()
    ]
    first = next(iter(found.values()))[0]
    shown: list[tuple[str, list[Cell]]] = []
    if [len(runs) for runs in methods.values()] == [1]:
        run = next(iter(methods.values()))[0]
        numbers["matrix"] = first.values
        shown = [
            (f"{stage} {run.matrix.stages[stage]}", _row(first, stage)) for stage in first.values
        ]
    tasks = [(task, first.metrics[task].replace("_f1", "-F1")) for task in first.tasks]
    return EndTasksShown(list(COLUMNS.values()), rows, tasks, shown, DEFINITIONS, numbers, warnings)


def _row(matrix: EndTaskMatrix, stage: int) -> list[Cell]:
    cells = []
    for task in matrix.tasks:
        found = matrix.values[stage].get(task)
        cell = _cell(estimate([found["score"]]) if found else None, False)
        if found:
            cell.note = f"ACC {percent(sum(found['accuracy']) / len(found['accuracy']))}"
        cell.kind = "trained" if matrix.own.get(task) == stage else ""
        cells.append(cell)
    return cells


def _cell(value: Estimate | None, signed: bool) -> Cell:
    if value is None:
        return Cell("\N{EM DASH}")
    text = (signed_percent if signed else percent)(value.mean, 2)
    return Cell(text, note="" if value.half is None else f"± {percent(value.half, 2)}")
