"""Classification tasks: their rows and prompts, the answers of models, and what is made of them."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.analysis.accuracy import bootstrap, estimates
from eval.analysis.matrix import Matrix, acc, bwt, forgetting, fwt
from eval.measure.tasks import answers, matches, merge_shares, rouge_l
from pipeline.data.encode import Encoder, Tokens
from pipeline.data.instruct import Example
from pipeline.data.sources import task_examples
from pipeline.data.tasks import check_answers_fit, example_of, prompt_of
from pipeline.data.tokenizer import train_tokenizer
from pipeline.data.toy_tasks import TOY_TASKS, toy_examples
from pipeline.engine.config import resolve_ds_config
from pipeline.errors import UserError
from pipeline.model.attention import start_token
from pipeline.model.generate import written
from pipeline.recipe import Answers, Data, Domain, Model, Recipe, Stage, Task, Train
from pipeline.run import dry_run
from pipeline.run.dry_run import describe_run
from pipeline.run.recipe_file import load_recipe
from tests.corpora import write_cl_benchmark
from tests.reference import tiny_llama, tiny_t5

LABELS = ["good", "bad", "very bad"]
T5 = "{model_type: t5, d_model: 16, d_kv: 8, d_ff: 24, num_layers: 1, num_heads: 2}"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(count, labels=LABELS):
    return [{"label": labels[i % len(labels)], "sentence": f"row {i}"} for i in range(count)]


@pytest.fixture
def task_files(tmp_path):
    """(Domain of a task, its folder): 30 rows to train on, 15 to test on."""
    domain = Domain(
        files=[write_rows(tmp_path / "train.jsonl", rows_of(30))],
        heldout_files=[write_rows(tmp_path / "test.jsonl", rows_of(15))],
        task=Task(instruction="How was it?", labels=LABELS),
    )
    return domain, tmp_path


def test_rows_become_prompts_with_the_options_and_are_drawn_by_hash(task_files):
    domain, folder = task_files
    found = task_examples(domain, 0)
    assert [len(found[side]) for side in ("train", "heldout")] == [30, 15]
    assert (
        Example("How was it?\nOption: good, bad, very bad\nrow 4\nAnswer:", "", "bad")
        in (found["train"])
    )
    domain.task.list_options = False
    unlisted = Example("How was it?\nrow 4\nAnswer:", "", "bad")
    assert unlisted in task_examples(domain, 0)["train"]
    domain.task.list_options = True
    domain.task.train_rows, domain.task.test_rows = 7, 2
    few = task_examples(domain, 0)
    assert len(few["train"]) == 7
    assert sorted(e.response for e in few["heldout"]) == sorted(LABELS * 2)
    assert set(few["train"]) < set(found["train"])
    shuffled = rows_of(30)
    random.Random(0).shuffle(shuffled)
    numbered = [{**row, "label": LABELS.index(row["label"])} for row in shuffled]
    write_rows(folder / "train.jsonl", numbered)  # in another order, with numbers for labels
    assert task_examples(domain, 0)["train"] == few["train"]


def test_long_texts_and_rows_without_a_label_are_cut_and_left_out(task_files):
    domain, folder = task_files
    write_rows(folder / "test.jsonl", [*rows_of(6), {"label": "-", "sentence": "nobody knows"}])
    domain.task.leave_out = ["-"]
    assert len(task_examples(domain, 0)["heldout"]) == 6
    for label in (-1, False):  # a data set's mark of rows that have none
        more = {"label": label, "sentence": "nobody knows"}
        write_rows(folder / "test.jsonl", [*rows_of(6), more])
        domain.task.leave_out = [str(label)]
        assert len(task_examples(domain, 0)["heldout"]) == 6
    digits = replace(domain.task, labels=["1", "2", "3", "4", "5"], leave_out=["3"])
    kept = [example_of("x", i, digits, digits.labels, "f", 1) for i in range(5)]
    assert [e and e.response for e in kept] == ["1", "2", None, "4", "5"]
    write_rows(folder / "test.jsonl", [{**r, "more": f"no. {i}"} for i, r in enumerate(rows_of(6))])
    domain.task.text = ["sentence", "more"]
    domain.files = domain.heldout_files
    prompts = [e.prompt for e in task_examples(domain, 0)["heldout"]]
    assert any("\nsentence: row 4\nmore: no. 4\n" in prompt for prompt in prompts)
    domain.task.max_words = 2
    assert prompt_of("one two three", domain.task, LABELS).splitlines()[-2] == "one two"
    domain.task.keep = "last"
    assert prompt_of("one two three", domain.task, LABELS).splitlines()[-2] == "two three"


def broken(tmp_path, override):
    write_rows(tmp_path / "train.jsonl", rows_of(30))
    write_rows(tmp_path / "test.jsonl", rows_of(15))
    write_rows(tmp_path / "other.jsonl", [*rows_of(9), {"label": "odd", "sentence": "s"}])
    write_rows(tmp_path / "two.jsonl", rows_of(30, LABELS[:2]))
    (tmp_path / "labels.json").write_text('["good", "good"]')
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
model: {{config: {T5}, train_tokenizer: 400, objective: seq2seq}}
data:
  template: plain
  domains:
    a:
      files: [{tmp_path}/train.jsonl]
      heldout_files: [{tmp_path}/test.jsonl]
      task: {{instruction: "How was it?", labels: [good, bad, very bad]}}
stages: [{{domain: a, steps: 2}}]
""")
    override = override.replace("HERE", str(tmp_path))
    if override.startswith("twice"):
        path.write_text(path.read_text().replace("stages:", "    a: {}\nstages:"))
        override = "seed=1"
    domain = load_recipe(path, [override]).data.domains["a"]
    task_examples(domain, 0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.domains.a.max_documents=10", "a.max_documents: has no effect on a task"),
        ("data.domains.a.files=[HERE/other.jsonl]", "other.jsonl: row 10 .*'odd'.*leave_out"),
        ("data.domains.a.heldout_files=[HERE/other.jsonl]", "other.jsonl: row 10 .*'odd'"),
        ("data.domains.a.files=[HERE/two.jsonl]", "two.jsonl: no row to train on .*'very bad'"),
        ("data.domains.a.heldout_files=[HERE/two.jsonl]", "no row to test on .*'very bad'"),
        ("data.domains.a.heldout_files=[]", "a task needs rows to test on; give `heldout_files`"),
        ("data.domains.a.task.labels=HERE/labels.json", "labels.json: the label 'good' is .*twice"),
        ("data.domains.a.task.labels=HERE/none.json", "none.json: cannot be read"),
        ("data.domains.a.task.labels=[good]", "at least two labels"),
        ("data.domains.a.task.labels=['1','-1']", "labels: '-1' is counted as '1'"),
        ("data.domains.a.task.labels=[good,'+']", "'\\+' is counted as an empty answer"),
        ("data.domains.a.task.label=other", "no row has the field 'other'.*`text` and `label`"),
        ("data.domains.a.task.text=other", "no row has the field 'other'"),
        ("stages=[{domain: b, steps: 2}]", "'b' is not in data.domains"),
        ("twice", "duplicate key a"),
        ("model.objective=masked", "responses are learnt by a causal or an encoder-decoder"),
        ("evaluate.benchmarks={piqa: {}}", "an encoder-decoder continues no text"),
        ("data.cross_document=true", "no effect on an encoder-decoder"),
        ("data.domains.a.task.train_rows=0", "train_rows: must be at least 1"),
        ("data.domains.a.task.keep=last", "task.keep: has no effect without `max_words`"),
        ("evaluate.answers.limit=0", "evaluate.answers.limit: must be at least 1"),
    ],
)
def test_a_mistake_is_one_message_with_the_place_and_the_fix(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        broken(tmp_path, override)


def model_of(objective, tokenizer):
    model = tiny_t5() if objective == "seq2seq" else tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def longhand(model, encoder, example, most):
    """Greedy tokens, one forward of the whole for each."""
    (tokens,) = encoder.encode([example])
    prompt = torch.from_numpy(tokens.ids[~tokens.predicted]).long()[None]
    said: list[int] = []
    for _ in range(most):
        new = torch.tensor([said], dtype=torch.long)
        if encoder.objective == "seq2seq":
            begun = torch.cat([torch.tensor([[start_token(model.config)]]), new], dim=1)
            logits = model(input_ids=prompt, decoder_input_ids=begun).logits
        else:
            logits = model(input_ids=torch.cat([prompt, new], dim=1)).logits
        said.append(int(logits[0, -1].argmax()))
        if said[-1] == encoder.after[0]:
            break
    return encoder.backend.decode([t for t in said if t != encoder.after[0]]).strip()


@pytest.mark.parametrize("objective", ["seq2seq", "causal"])
def test_answers_are_greedy_however_they_are_batched(objective):
    texts = ["is it good", "or is it very bad", "a row of words that is rather long", "bad"]
    tokenizer = train_tokenizer([*texts, *LABELS] * 3, 330)
    model = model_of(objective, tokenizer)
    encoder = Encoder.of(tokenizer, objective, "plain")
    examples = [Example(text, "", LABELS[i % 3]) for i, text in enumerate(texts)]
    with torch.inference_mode():
        expected = [longhand(model, encoder, e, 6) for e in examples]
        for size in (1, 3):
            settings = Answers(max_new_tokens=6, batch_size=size)
            # What a checkpoint may bring along, and the paper's evaluation does not have.
            model.generation_config.update(repetition_penalty=50.0, min_new_tokens=6)
            assert answers(model, encoder, examples, LABELS, settings) == expected
        settings = Answers(max_new_tokens=30, constrained=True)
        assert set(answers(model, encoder, examples, LABELS, settings)) <= set(LABELS)


def end_of(encoder, learnt):
    return encoder.end_of(Tokens(np.array(learnt), None, np.ones(len(learnt), bool)))


def test_a_prompt_near_the_models_limit_shortens_no_other_answer():
    texts = ["is it good", "or is it very bad", "a row of words that is rather long"]
    tokenizer = train_tokenizer([*texts, *LABELS] * 3, 330)
    model = model_of("causal", tokenizer)
    encoder = Encoder.of(tokenizer, "causal", "plain")
    examples = [Example(text, "", LABELS[0]) for text in texts]
    prompts = encoder.prompts(examples)
    limit = model.config.max_position_embeddings = max(map(len, prompts)) + 4
    end = len(tokenizer)  # which it never writes
    together = written(model, prompts, [end], encoder.pad, 9)
    assert together == [written(model, [p], [end], encoder.pad, 9)[0] for p in prompts]
    assert list(map(len, together)) == [min(9, limit - len(p)) for p in prompts]
    assert len(set(map(len, together))) > 1
    needed = max(len(tokenizer.encode(" " + label, add_special_tokens=False)) for label in LABELS)
    for room in (needed, needed - 1):
        model.config.max_position_embeddings = max(map(len, prompts)) + room
        settings = Answers(max_new_tokens=9, constrained=True)
        if room == needed:
            assert set(answers(model, encoder, examples, LABELS, settings)) <= set(LABELS)
        else:
            with pytest.raises(UserError, match=f"its answer up to {needed}, the model takes"):
                answers(model, encoder, examples, LABELS, settings)


def test_an_answer_in_a_chat_ends_with_its_turn():
    tokenizer = train_tokenizer([*LABELS, "is it good"] * 3, 330)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '> ' if m.role == 'assistant' }}{{ m.content }}<turn>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}> {% endif %}"
    )
    turn, end = tokenizer.convert_tokens_to_ids("<turn>"), tokenizer.eos_token_id
    labels = [Example("is it good", "", label) for label in LABELS]
    assert Encoder.of(tokenizer, "causal", "plain").ends_of(labels) == [end]
    encoder = Encoder.of(tokenizer, "causal", "chat")
    assert set(encoder.ends_of(labels)) == {turn, end}
    assert end_of(encoder, [turn, 9, turn, 10, 11, end]) == 5  # the answer has its own beginning
    assert end_of(encoder, [10, 11, turn, end]) == 2
    assert end_of(encoder, [turn, 10, 11]) == 3  # nothing ends it
    (said,) = encoder.encode(labels[:1])  # more is learnt behind the turn
    assert said.ids[said.predicted].tolist()[-1] != turn
    model = model_of("causal", tokenizer)
    prompts = encoder.prompts(labels[:1])
    (row,) = written(model, prompts, [end], encoder.pad, 5)
    assert written(model, prompts, [row[-1], end], encoder.pad, 5) == [row[: row.index(row[-1])]]


def test_an_answer_must_have_room_for_each_label():
    tokenizer = train_tokenizer([*LABELS] * 3, 330)
    for objective, said in (("seq2seq", "very bad"), ("causal", " very bad")):
        encoder = Encoder.of(tokenizer, objective, "plain")
        longest = len(tokenizer.encode(said, add_special_tokens=False))
        assert longest > 1
        check_answers_fit("mood", LABELS, encoder, longest)
        message = f"max_new_tokens: the label 'very bad' of mood has {longest} tokens"
        with pytest.raises(UserError, match=message):
            check_answers_fit("mood", LABELS, encoder, longest - 1)


def test_the_scores_are_those_of_every_answer(tmp_path):
    said = [("Good.", "good"), ("very  BAD", "very bad"), ("bad", "very bad"), ("", "good")]
    said.append(("it is good", "good"))
    rows = [
        {"task": "a", "row": i, "answer": answer, "said": text}
        for i, (text, answer) in enumerate(said)
    ]
    parts = []
    for share in (0, 1):
        parts.append(tmp_path / f"part{share}")
        write_rows(parts[-1], rows[share::2])
    merge_shares(parts, tmp_path / "tasks.json", {"stage": 1})
    result = json.loads((tmp_path / "tasks.json").read_text())["tasks"]["a"]
    assert result["value"] == 0.4
    # Two are 0.6 over the mean and three 0.4 below it; their variance is of 5 - 1 degrees.
    variance = (2 * 0.6**2 + 3 * 0.4**2) / 4
    assert result["stderr"] == pytest.approx((variance / 5) ** 0.5)
    assert result["rows"] == 5
    assert result["majority"] == 0.6
    assert result["rouge_l"] == pytest.approx((1 + 1 + 2 / 3 + 0 + 1 / 2) / 5, abs=1e-4)
    kept = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["said"] for row in kept] == [text for text, _ in said]
    assert rouge_l("the cat sat on a mat", "the cat on the mat") == pytest.approx(2 * 4 / 11)
    assert matches("A", "a")


VALUES = [[0.1, 0.2, 0.3], [0.9, 0.3, 0.3], [0.6, 0.8, 0.5], [0.7, 0.4, 1.0]]


def accuracy(values=VALUES):
    tasks = ["x", "y", "z"]
    trained = {name: i for i, name in enumerate(tasks, start=1)}
    return Matrix(["base", *tasks], tasks, trained, values, lower_is_better=False)


def test_the_metrics_of_accuracies_are_those_of_their_definitions():
    matrix = accuracy()
    assert acc(matrix) == pytest.approx((0.7 + 0.4 + 1.0) / 3)
    assert bwt(matrix) == pytest.approx(((0.7 - 0.9) + (0.4 - 0.8)) / 2)
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.4)) / 2)
    assert fwt(matrix) == pytest.approx(((0.3 - 0.2) + (0.5 - 0.3)) / 2)


def drawn_matrix(matrix, columns):
    names = [f"{i} {matrix.domains[c]}" for i, c in enumerate(columns)]
    trained = {n: matrix.trained[matrix.domains[c]] for n, c in zip(names, columns, strict=True)}
    values = [[row[c] for c in columns] for row in matrix.values]
    return Matrix(matrix.stages, names, trained, values, lower_is_better=False)


def test_the_interval_is_of_tasks_and_seeds():
    same = accuracy([[0.0] * 3, [0.5] * 3, [0.5] * 3, [0.5] * 3])
    low, high = bootstrap(acc, [same])
    assert low == high == 0.5  # tasks that are all alike
    other = accuracy([[0.0] * 3, [0.9] * 3, [0.9] * 3, [0.9] * 3])
    low, high = bootstrap(acc, [same, other])
    assert (low, high) == pytest.approx((0.5, 0.9))  # seeds that are not
    random_tasks = [accuracy(np.random.default_rng(i).random((4, 3)).tolist()) for i in range(2)]
    by_hand = np.random.default_rng(0)
    values = []
    for _ in range(1000):  # the metric of matrices that are put together anew
        chosen, runs = by_hand.integers(3, size=3), by_hand.integers(2, size=2)
        again = [drawn_matrix(random_tasks[r], chosen) for r in runs]
        values.append(np.mean([v for m in again if (v := bwt(m)) is not None] or [np.nan]))
    expected = np.nanquantile(values, [0.025, 0.975])
    assert bootstrap(bwt, random_tasks) == pytest.approx(expected, abs=0.05)
    for tasks in (
        6,
        8,
    ):  # half of them right: binomial, 1.6 % of 6 have none, 3.5 % of 8 at most one
        names = [str(i) for i in range(tasks)]
        after = [float(i % 2) for i in range(tasks)]
        half = Matrix(["base", "all"], names, dict.fromkeys(names, 1), [after, after], False)
        assert bootstrap(acc, [half]) == pytest.approx((1 / tasks, 1 - 1 / tasks))
    found = estimates([accuracy(), accuracy()])
    values = [[0, 0], [0.5, 0], [0.2, 0.5]]  # one task alone can have been forgotten
    two = Matrix(["base", "a", "b"], ["a", "b"], {"a": 1, "b": 2}, values, False)
    assert estimates([two])["bwt"].interval is None
    low, high = found["acc"].interval
    assert 0.399 < low < found["acc"].value < high <= 1
    assert found["acc"].value == pytest.approx(acc(accuracy()))
    assert bootstrap(acc, [accuracy()]) == bootstrap(acc, [accuracy()])


def test_toy_tasks_ask_for_different_things_of_the_same_words():
    words = {}
    for name, labels in TOY_TASKS.items():
        examples = toy_examples(name)
        assert examples == toy_examples(name)
        assert len({e.prompt for e in examples}) == len(examples)
        counts = [sum(e.response == label for e in examples) for label in labels]
        assert sum(counts) == len(examples)
        assert max(counts) < 1.3 * min(counts)
        words[name] = {word for e in examples for word in e.prompt.split()}
    assert len({frozenset(w) for w in words.values()}) == 1


ORDERS = {1: 4, 2: 4, 3: 4, 4: 15, 5: 15, 6: 15}


def test_the_papers_orders_resolve_and_show_rows_labels_and_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_BENCHMARK", str(tmp_path))
    small = ["model.path=null", f"model.config={T5}", "model.train_tokenizer=300"]
    with pytest.raises(UserError, match=r"no file matches .*/WiC/WiC/train\.json"):
        load_recipe("t5_order4", small)
    write_cl_benchmark(tmp_path, LABELS)
    sequences = []
    for order, tasks in ORDERS.items():
        recipe = load_recipe(f"t5_order{order}", small)
        assert recipe.name == f"t5_order{order}"
        sequences.append([stage.name for stage in recipe.stages])
        assert len(sequences[-1]) == len(set(sequences[-1])) == tasks
        if order not in (2, 6):  # the others differ in their stages only
            continue
        config = resolve_ds_config({"zero_optimization": {"stage": 2}}, recipe, 1, "cpu")
        text = describe_run(recipe, config, 1)
        assert text.count("train: 12 rows (good 4, bad 4, very bad 4)") == tasks
        assert text.count("Answer: -> ") == 3 * tasks
    assert sequences[0] == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert len({tuple(s) for s in sequences}) == 6


@pytest.mark.parametrize(
    ("packing", "rows", "steps"),
    [
        (False, {"a": 500}, ", about 63 steps"),
        (False, {}, "prepared)"),
        (True, {"a": 9}, "prepared)"),
    ],
)
def test_the_steps_of_a_task_are_those_of_its_rows(packing, rows, steps):
    task = Domain(files=["rows.json"], task=Task("Which?", labels=["yes", "no"]))
    data = Data(domains={"a": task}, packing=packing, sequence_length=64)
    recipe = Recipe("r", Model(path="m"), data, [Stage("a", epochs=2)], train=Train(batch_size=16))
    assert dry_run._about(recipe, 1, object(), rows).endswith(steps)


def test_a_recipe_that_is_its_own_base_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="leads back"):
        load_recipe(tmp_path / "a.yaml")
