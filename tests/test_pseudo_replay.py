"""Pseudo-replay: what the model writes of earlier tasks, and what a step learns of it."""

import json

import numpy as np
import pytest
import torch

from pipeline.data.sequences import Sequence
from pipeline.errors import UserError
from pipeline.methods.method import Start, Teacher
from pipeline.methods.pseudo_replay import PseudoReplay
from pipeline.recipe import PseudoReplay as Settings
from pipeline.recipe import Stage
from pipeline.run.recipe_file import load_recipe
from tests.reference import MODELS
from tests.spawn import run_ranks
from tests.test_anchor import tokenizer_of
from tests.test_finetune import RECIPE
from tests.test_parity import recipe_for

END, INSTRUCTION, ASKED = 2, [10, 11], [12]


def example(i, instruction=INSTRUCTION):
    """A row of a task: its instruction, a text, the question, and the answer."""
    source = [*instruction, 20 + i, 30 + i, *ASKED, END]
    ids = np.array([*source, 40 + i % 2, END, 1], np.int32)
    learnt = np.arange(len(ids)) >= len(source)
    segments = np.where(np.arange(len(ids)) < len(ids) - 1, 0, -1).astype(np.int16)
    return Sequence(ids, segments.astype(np.int32), segments, learnt & (segments == 0), segments)


def writer_of(*tasks):
    """(the model, the recipe of a stage a task)"""
    net = MODELS["t5"]().eval()
    torch.manual_seed(1)
    net.lm_head.weight.data.normal_(std=0.3)  # it writes this and that
    recipe = recipe_for("t5", 8)
    recipe.model.objective, recipe.data.template = "seq2seq", "plain"
    recipe.stages = [Stage(task, steps=2) for task in tasks]
    recipe.pseudo_replay = Settings(sequences=6, fraction=0.5, weight=0.3)
    return net, recipe


def test_the_model_writes_earlier_tasks_and_answers_them(tmp_path):
    net, recipe = writer_of("one", "two")
    method = PseudoReplay(recipe)
    assert (method.weight, method.rows) == (0.3, 4)

    def prepare(stage):
        method.prepare(
            Start(stage, recipe, tokenizer_of("t5"), lambda _: Teacher(lambda: net, dict),
                  lambda _, count: [example(i) for i in range(count)], tmp_path, tmp_path)
        )  # fmt: skip

    prepare(1)
    assert len(method._own) == 6
    assert method._old == []
    cue = method._own[0][0][method._own[0][1] < 0].tolist()
    for i, (ids, labels, _) in enumerate(method._own):  # the text alone, without the instruction
        assert ids[labels >= 0].tolist() == [20 + i, 30 + i, END]
    assert sum(method.predictions(batch) for batch in method.batches(1)) == 4 * 3

    prepare(2)
    solved = [row for row in method._old if row[0][row[1] < 0].tolist() != cue]
    written = [row for row in method._old if row[0][row[1] < 0].tolist() == cue]
    assert len(solved) == len(written) > 0
    for ids, labels, _ in solved:
        source = ids[labels < 0].tolist()
        assert source[:2] == INSTRUCTION
        assert source[-2:] == [*ASKED, END]
        text = [*source[2:-2], END]  # which it learns to write again too
        assert text in [row[0][row[1] >= 0].tolist() for row in written]
        said = net.generate(
            torch.tensor([source]), do_sample=False, max_new_tokens=2,
            decoder_start_token_id=0, eos_token_id=END, pad_token_id=1,
        )[0, 1:].tolist()  # fmt: skip
        answer = said[: said.index(END)] if END in said else said
        assert ids[labels >= 0].tolist() == [*answer, END]
    kept, old = (tmp_path / "pseudo_replay/stage-02.json").read_text(), method._old
    prepare(2)  # again, as after an interruption
    assert (tmp_path / "pseudo_replay/stage-02.json").read_text() == kept
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(old, method._old, strict=True))
    rows = [row.tolist() for batch in method.batches(1) for row in batch["input_ids"]]
    own = [row[0].tolist() for row in method._own]
    assert [any(row[: len(o)] == o for o in own) for row in rows] == [True, True, False, False]

    recipe.data.sequence_length = len(cue) + 2  # a text has two tokens and its end
    with pytest.raises(UserError, match=r"no text of one fits behind its cue .*sequence_length="):
        prepare(1)


def of_three_tasks(folder):
    """What is written before the third of three tasks, whose second has another instruction; its
    asked examples by instruction; and the learnt tokens of this rank's rows of a step."""
    net, recipe = writer_of("one", "two", "three")
    recipe.pseudo_replay.sequences = 34  # in two blocks a task
    instructions = {"one": INSTRUCTION, "two": [13, 14], "three": [15, 16]}
    method = PseudoReplay(recipe)
    for stage in (1, 2, 3):
        method.prepare(
            Start(stage, recipe, tokenizer_of("t5"), lambda _: Teacher(lambda: net, dict),
                  lambda d, count: [example(i % 8, instructions[d]) for i in range(count)],
                  folder, folder)
        )  # fmt: skip
    content = (folder / "pseudo_replay/stage-03.json").read_text()
    asked = {d: sum(s[:2] == two for s, _ in json.loads(content)["texts"])
             for d, two in instructions.items()}  # fmt: skip
    learnt = sum(method.predictions(batch) for batch in method.batches(1))
    return content, asked, len(method._old), learnt


def test_every_earlier_task_is_written_whatever_the_ranks(tmp_path):
    """Each rank writes its share, and together they write what one process does."""
    alone, asked, count, learnt = of_three_tasks(tmp_path / "alone")
    assert asked["one"] > 32 > 0 == asked["three"]
    assert asked["two"] > 32
    assert count == 2 * (asked["one"] + asked["two"])  # a text and its answer
    ranks = run_ranks(of_three_tasks, 2, tmp_path / "ranks")
    assert [content == alone for content, *_ in ranks] == [True, True]
    assert [rank[2] for rank in ranks] == [count] * 2
    assert sum(rank[3] for rank in ranks) == learnt


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.packing=true", "set data.packing=false"),
        ("pseudo_replay.sequences=1", "must be at least 2"),
        ("start_from=base", "pseudo_replay is for one that goes through all stages"),
        ("data.domains.mood={embedded: math}", "has no `task` or `instruction`"),
    ],
)
def test_what_it_does_not_go_with_is_named(tmp_path, override, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\n" + RECIPE)
    with pytest.raises(UserError, match=message):
        load_recipe(path, ["pseudo_replay={}", override])
