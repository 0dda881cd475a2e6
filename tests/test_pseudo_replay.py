"""Pseudo-replay: what the model writes of earlier tasks, and what a step learns of it."""

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
from tests.test_anchor import tokenizer_of
from tests.test_finetune import RECIPE
from tests.test_parity import recipe_for

END, INSTRUCTION, ASKED = 2, [10, 11], [12]


def example(i):
    """A row of a task: its instruction, a text, the question, and the answer."""
    source = [*INSTRUCTION, 20 + i, 30 + i, *ASKED, END]
    ids = np.array([*source, 40 + i % 2, END, 1], np.int32)
    learnt = np.arange(len(ids)) >= len(source)
    segments = np.where(np.arange(len(ids)) < len(ids) - 1, 0, -1).astype(np.int16)
    return Sequence(ids, segments.astype(np.int32), segments, learnt & (segments == 0), segments)


def test_the_model_writes_earlier_tasks_and_answers_them(tmp_path):
    net = MODELS["t5"]().eval()
    torch.manual_seed(1)
    net.lm_head.weight.data.normal_(std=0.3)  # it writes this and that
    recipe = recipe_for("t5", 8)
    recipe.model.objective, recipe.data.template = "seq2seq", "plain"
    recipe.stages = [Stage("one", steps=2), Stage("two", steps=2)]
    recipe.pseudo_replay = Settings(sequences=6, fraction=0.5, weight=0.3)
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
