"""A whole run over tasks: trained, answered after every stage, and on the page."""

import json
from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from eval.analysis.load import load_run
from eval.measure.checkpoint import Checkpoint, measure_share, merge
from eval.measure.command import arguments
from eval.measure.lm import measure_in_engine
from eval.report.page import write_report
from eval.report.summary import accuracy_lines
from pipeline.engine.config import resolve_engine_config
from pipeline.errors import UserError
from pipeline.ranks import on_rank0, world_size
from pipeline.run.evaluation import Evaluation
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from tests.spawn import run_ranks

RECIPE = """
model:
  config: {model_type: t5, d_model: 16, d_kv: 8, d_ff: 24, num_layers: 1, num_heads: 2}
  train_tokenizer: 420
  objective: seq2seq
data:
  domains:
    subject:
      embedded: toy_subject
      task: {instruction: "Of what?", labels: [animal, plant, tool, person], train_rows: 40}
    mood:
      embedded: toy_mood
      task: {instruction: "How?", labels: [happy, sad], train_rows: 40}
  template: plain
  packing: false
  sequence_length: 96
  heldout_sequences: 4
stages: [{domain: subject, steps: 2}, {domain: mood, steps: 2}]
train: {batch_size: 4}
evaluate: {answers: {limit: 6, max_new_tokens: 9}}
"""


def answer(task, recipe, kinds):
    """Instead of in processes of their own."""

    def measure():
        heldout = task.run / "heldout"
        checkpoint = Checkpoint(task.checkpoint, None, None, "seq2seq", "fp32", "sdpa", "cpu")
        asked = recipe.tasks_after(task.stage)
        measure_share(checkpoint, kinds, recipe.evaluate, heldout, task.folder, (0, 1), asked=asked)
        failed = merge(task.folder, kinds, 1, recipe.evaluate, heldout, 0.7, task.describe())
        assert failed == []

    on_rank0(measure)


def run_both(folder):
    path = folder / "recipe.yaml"
    on_rank0(lambda: path.write_text(RECIPE))
    for name, more in {"zero": (), "fsdp": ("engine.kind=fsdp",)}.items():
        prepared = f"data.prepared={folder}/prepared"
        recipe = load_recipe(path, [prepared, f"name={name}", *more])
        zero = None if more else "ds_configs/zero2.json"
        config = resolve_engine_config(zero, recipe, world_size(), "cpu")
        run_recipe(recipe, config, folder, measure_in_engine, answer, write_report)


def test_a_run_of_tasks_has_the_matrix_of_its_answers(tmp_path):
    run_ranks(run_both, 2, tmp_path)
    for name in ("zero", "fsdp"):
        run = tmp_path / name
        tasks = {"subject", "mood"}
        for stage in ("00_base", "01_subject", "02_mood"):
            measured = json.loads((run / "stages" / stage / "tasks.json").read_text())["tasks"]
            assert {t: r["rows"] for t, r in measured.items()} == dict.fromkeys(tasks, 6)
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        trained = [r["tokens"] for r in records if r["event"] == "stage"]
        steps = [r for r in records if r["event"] == "step"]
        assert trained == [sum(r["tokens"] for r in steps if r["stage"] == n) for n in (1, 2)]
        numbers = json.loads((run / "report/report.json").read_text())["tasks"]
        assert set(numbers["tasks"]) == tasks
        assert numbers["tasks"][0] == "subject"  # in the order of the stages
        assert len(numbers["accuracy"]) == 3
        assert {"acc", "bwt", "forgetting", "fwt"} <= set(numbers["metrics"])
        page = (run / "report/index.html").read_text()
        assert "Accuracy on every task after every stage" in page
        _, title, head, *rows, metrics = "\n".join(accuracy_lines(load_run(run))).split("\n")
        assert title.startswith("accuracy")
        assert head.split() == numbers["tasks"]
        assert [[float(x) / 100 for x in row.split()[1:]] for row in rows] == [
            pytest.approx(row, abs=1e-3) for row in numbers["accuracy"]
        ]
        assert all(name in metrics for name in ("ACC", "BWT", "FWT"))
        net = T5ForConditionalGeneration.from_pretrained(run / "stages/02_mood/checkpoint")
        ids = torch.tensor([[5, 6, 1]])
        assert net(input_ids=ids, labels=ids).loss.isfinite()  # outside of this project too
    losses = [
        json.loads((tmp_path / name / "stages/02_mood/eval.json").read_text())["domains"]
        for name in ("zero", "fsdp")
    ]
    for domain in losses[0]:  # the same training, however it is sharded
        torch.testing.assert_close(losses[0][domain]["loss"], losses[1][domain]["loss"])


def test_a_run_whose_answers_are_too_short_for_a_label_does_not_begin(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(path, ["evaluate.answers.max_new_tokens=1"])
    config = resolve_engine_config("ds_configs/zero2.json", recipe, 1, "cpu")
    with pytest.raises(UserError, match=r"max_new_tokens: the label '.*' of (subject|mood) has"):
        run_recipe(recipe, config, tmp_path, measure_in_engine, answer, write_report)


def test_tasks_are_asked_when_they_have_been_seen(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(path, ["evaluate.answers.asked=seen", "stages[1].domain=subject"])
    assert [recipe.tasks_after(stage) for stage in (0, 1)] == [["mood"], ["subject", "mood"]]
    recipe = load_recipe(path, ["evaluate.answers.asked=seen"])
    asked = [recipe.tasks_after(stage) for stage in (0, 1, 2)]
    assert asked == [[], ["subject"], ["subject", "mood"]]
    task = Evaluation(Path("run"), 1, "subject", "checkpoint")
    given = arguments(task, recipe, ["tasks"], task.run)
    assert given[given.index("--answer") + 1 : given.index("--tasks")] == ["subject"]
