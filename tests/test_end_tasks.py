"""End tasks: the training is a plain loop, the metrics are scikit-learn's, bad rows are named, and
what was measured is not measured again."""

import json
import math
import os
import re
import time

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
)

from eval.measure.checkpoint import check as check_settings
from eval.measure.classification import METRICS
from eval.measure.classifier import Classifier, Likelihood, Source
from eval.measure.end_task_data import load_task
from eval.measure.end_tasks import check, evaluate_share, fine_tune, merge_shares
from eval.measure.side_by_side import run_side_by_side
from launch.evaluate import main
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.model.lora import add_adapter
from pipeline.recipe import Data, Domain, EndTask, EndTasks, Evaluation, Lora, Model, Recipe, Stage
from tests.reference import MODELS

TEXT = "the method of the paper extends prior work on parsing and we compare it with others"
WORDS = TEXT.split()
LABELS = ("Background", "Extends", "Uses")
CUES = ("known", "extended", "used")


def rows(count, seed):
    """Citations whose label is in a word; the label is drawn, so that classes are unequal."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        label = i % 3 if i < 3 else int(rng.integers(3))
        words = [*rng.choice(WORDS, rng.integers(3, 12)), CUES[label], *rng.choice(WORDS, 3)]
        found.append({"text": " ".join(words), "label": LABELS[label]})
    return found


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with checkpoints of two families and an end task of our own."""
    folder = tmp_path_factory.mktemp("end_tasks")
    write(folder / "data/cites", train=rows(37, 0), dev=rows(12, 1), test=rows(23, 2))
    tokenizer = train_tokenizer([" ".join((*WORDS, *CUES))] * 3, 300)
    for name in ("roberta", "llama"):
        model = MODELS[name]()
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
        if name == "llama":
            model.config.max_position_embeddings = 64  # rotary: no table of them
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def settings(folder, **changes):
    defaults = {
        "tasks": {"cites": EndTask(epochs=2)}, "files": str(folder / "data"), "seeds": [7],
        "batch_size": 8, "lr": 1e-2, "processes": 1,
    }  # fmt: skip
    return EndTasks(**{**defaults, **changes})


def plain_loop(folder, name, seed, epochs=2, batch_size=8, lr=1e-2):
    """What anybody would write: the losses of the steps, and the predictions."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    data = {
        split: [json.loads(x) for x in (folder / f"data/cites/{split}.jsonl").open()]
        for split in ("train", "test")
    }
    config = AutoConfig.from_pretrained(folder / name, num_labels=3)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(seed)
    net = AutoModelForSequenceClassification.from_config(config)
    body = AutoModel.from_pretrained(folder / name).state_dict()
    net.base_model.load_state_dict({k: v for k, v in body.items() if "pooler" not in k})
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    total = epochs * math.ceil(len(data["train"]) / batch_size)
    torch.manual_seed(seed)
    order, losses = torch.Generator().manual_seed(seed), []

    def inputs(batch):
        return tokenizer(
            [r["text"] for r in batch], truncation=True, padding=True, return_tensors="pt",
            max_length=18 if name == "roberta" else 64,
        )  # fmt: skip

    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data["train"]), generator=order).split(batch_size):
            chosen = [data["train"][i] for i in batch.tolist()]
            labels = torch.tensor([LABELS.index(r["label"]) for r in chosen])
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - len(losses) / total)
            loss = net(**inputs(chosen), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    net.eval()
    with torch.no_grad():
        return losses, [int(net(**inputs([r])).logits.argmax()) for r in data["test"]]


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_the_training_is_a_plain_loop(made, name):
    ours = settings(made, sequence_length=164)
    result = fine_tune(Source(str(made / name)), load_task("cites", ours), ours, 7)
    losses, predictions = plain_loop(made, name, 7)
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    assert result["predictions"] == predictions
    truth = [LABELS.index(r["label"]) for r in rows(23, 2)]
    assert result["accuracy"] == pytest.approx(np.mean(np.array(truth) == predictions))


def test_the_metrics_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7, 13):
        for size in (1, 5, 40):
            truth, predicted = rng.integers(classes, size=size), rng.integers(classes, size=size)
            for kind in ("macro", "micro"):
                theirs = metrics.f1_score(truth, predicted, average=kind, zero_division=0)
                assert METRICS[f"{kind}_f1"](truth, predicted) == pytest.approx(theirs, abs=1e-12)
            theirs = metrics.accuracy_score(truth, predicted)
            assert METRICS["accuracy"](truth, predicted) == pytest.approx(theirs)


def test_every_setting_of_the_training_counts(made):
    """Each changes the steps' losses or how many there are, or what is tested."""
    source = Source(str(made / "roberta"))

    def result(task=None, **changes):
        given = settings(made, tasks={"cites": task or EndTask(epochs=2)}, **changes)
        return fine_tune(source, load_task("cites", given), given, 7)

    plain = result()["losses"]
    changed = {"batch_size": 16, "lr": 1e-4, "weight_decay": 0.9, "sequence_length": 9}
    for key, value in changed.items():
        assert result(**{key: value})["losses"] != plain, key
    assert result(EndTask(epochs=2, lr=1e-4))["losses"] != plain
    assert len(result(EndTask(epochs=1))["losses"]) == len(plain) / 2
    # Rates this high lose what the first epoch found; it is not the last one that is tested.
    stopped = result(EndTask(epochs=30, lr=0.3), patience=2)
    assert stopped["epochs"] == stopped["tested_epoch"] + 2 < 30


def test_labels_are_scored_by_their_likelihood(made):
    """Against one forward per row and label; and the loss is that of the right label."""
    given = settings(made, score="likelihood", tasks={"cites": EndTask(epochs=8)})
    source, task = Source(str(made / "llama")), load_task("cites", given)
    head = Likelihood(source, task, given, 0)
    encoded = [head.encode(row) for row in task.splits["test"][:5]]
    scores = torch.empty(5, 3)
    with torch.no_grad():
        for i, row in enumerate(encoded):
            for j, answer in enumerate(head.answers):
                logits = head.net(torch.tensor([row.ids + answer])).logits[0].log_softmax(-1)
                places = range(len(row.ids) - 1, len(row.ids) + len(answer) - 1)
                scores[i, j] = sum(logits[p, t] for p, t in zip(places, answer, strict=True))
        right = scores[range(5), [row.label for row in encoded]]
        assert head.loss(encoded).item() == pytest.approx(-right.mean().item(), abs=1e-5)
        assert head.predict(encoded) == scores.argmax(-1).tolist()
    losses = fine_tune(source, task, given, 7)["losses"]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    with pytest.raises(UserError, match="likelihood needs a causal model"):
        Likelihood(Source(str(made / "roberta")), task, given, 0)


def test_an_adapter_counts_with_its_base(made, tmp_path):
    base = LlamaForCausalLM.from_pretrained(made / "llama")
    add_adapter(base, Lora(), str(made / "llama"), None, "CAUSAL_LM", 0)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    base.save_pretrained(tmp_path / "adapter")
    given = settings(made)
    source = Source(str(tmp_path / "adapter"), tokenizer=str(made / "llama"))
    head = Classifier(source, load_task("cites", given), given, 0)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = (n.eval()(input_ids=ids)[0] for n in (head.net.base_model, base.base_model))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_measurement_continues_whatever_the_shares(made, tmp_path, monkeypatch):
    given = settings(made, seeds=[1, 2])
    run = "eval.measure.end_tasks.run_side_by_side"
    monkeypatch.setattr(run, lambda function, jobs, *_: [function(*job) for job in jobs] and {})
    source = Source(str(made / "roberta"))
    results = []
    for shares in (1, 2):
        folder = tmp_path / str(shares)
        folder.mkdir()
        parts = [folder / f"{i}.json" for i in range(shares)]
        for i, part in enumerate(parts):
            evaluate_share(source, given, ["cites"], part, (i, shares))
        merge_shares(parts, folder / "end_tasks.json", {"stage": 1})
        record = json.loads((folder / "end_tasks.json").read_bytes())["tasks"]["cites"]
        for seed in record["seeds"].values():
            del seed["seconds"]
        results.append(record)
    assert results[0] == results[1]
    scores = [results[0]["seeds"][s]["score"] for s in ("1", "2")]
    assert results[0]["score"] == pytest.approx(np.mean(scores))
    assert results[0]["score_stderr"] == pytest.approx(abs(scores[0] - scores[1]) / 2)

    # Only what is not there, or of other settings, is done again.
    done = []
    monkeypatch.setattr(
        run,
        lambda function, jobs, *_: done.append([job[3] for job in jobs]) or {},
    )
    kept = tmp_path / "1/end_tasks"
    evaluate_share(source, given, ["cites"], tmp_path / "1/part.json", (0, 1))
    (kept / "cites-2.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):  # nothing has measured it
        evaluate_share(source, given, ["cites"], tmp_path / "1/part.json", (0, 1))
    other = settings(made, seeds=[1, 2], lr=1e-3)
    with pytest.raises(ValueError, match="Expecting"):
        evaluate_share(source, other, ["cites"], tmp_path / "1/part.json", (0, 1))
    assert done == [[], [2], [1, 2]]


def test_what_failed_is_said_and_the_rest_is_kept(made, tmp_path):
    """A pooler that masked-LM training leaves out is missing before anything is trained."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 300)
    config = BertConfig(
        vocab_size=300, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=24,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    source = Source(str(tmp_path / "bert"))
    with pytest.raises(UserError, match=r"cites, seed 7: .*has no pooler.*new_pooler=true"):
        evaluate_share(source, settings(made), ["cites"], tmp_path / "part.json", (0, 1))
    for model, problem in (
        (Model(path=str(tmp_path / "bert")), r"bert has no pooler.*new_pooler=true"),
        (Model(config={"model_type": "t5", "num_layers": 1}), "t5 is an encoder-decoder"),
    ):
        with pytest.raises(UserError, match=problem):  # before a run trains anything
            check_settings(Evaluation(end_tasks=settings(made)), model)
    given = settings(made, new_pooler=True, tasks={"cites": EndTask(epochs=1)})
    for name in (made / "roberta", made / "llama", tmp_path / "bert"):
        check_settings(Evaluation(end_tasks=given), Model(path=str(name)))
    assert len(fine_tune(source, load_task("cites", given), given, 7)["losses"]) == 5
    words = " ".join(f"{i * i:x}q{i * 7:x}" for i in range(300))
    train_tokenizer([words] * 3, 600).save_pretrained(tmp_path / "tokenizer")
    wrong = Source(str(made / "roberta"), tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens, .*roberta only"):
        Classifier(wrong, load_task("cites", given), given, 7)


GOOD = {"term": "menu", "sentence": "the Menu is long", "polarity": "good"}
BAD = {"term": "soup", "sentence": "the soup was cold", "polarity": "bad"}


@pytest.mark.parametrize(
    ("splits", "task", "complaint"),
    [
        ({"train": [GOOD, BAD]}, {}, "has no test split; it has train"),
        ({"train": [GOOD, BAD], "test": []}, {}, "the test split of .* has no rows"),
        (
            {"train": [GOOD, BAD], "test": [GOOD, {**BAD, "polarity": "neutral"}]},
            {},
            "test.jsonl, line 2: its polarity 'neutral' is none of the labels",
        ),
        ({"train": [GOOD, BAD], "test": [GOOD]}, {"labels": ["good", "bad", "x"]}, "label 'x'"),
        ({"train": [GOOD, GOOD], "test": [GOOD]}, {}, "needs two labels or more"),
        (
            {"train": [GOOD, {**BAD, "term": "waiter"}], "test": [GOOD]},
            {},
            "train.jsonl, line 2: its term 'waiter' does not occur in 'the soup was cold'",
        ),
        ({"train": [GOOD, {**BAD, "sentence": " "}], "test": [GOOD]}, {}, "line 2: its 'sentence'"),
        ({"train": [GOOD, BAD, {"term": "a"}], "test": [GOOD]}, {}, "line 3: no field 'sentence'"),
        ({"train": [GOOD, [1]], "test": [GOOD]}, {}, "line 2: not a JSON object"),
        ({"train": [GOOD, BAD], "test": [GOOD]}, {"text_field": "words"}, "no field 'words'"),
        ({"train": [GOOD, BAD], "test": [GOOD]}, {"task": "phones"}, "'phones' is none of"),
    ],
)
def test_a_bad_row_is_named(tmp_path, splits, task, complaint):
    write(tmp_path / "menus", **splits)
    given = EndTasks(tasks={"menus": EndTask(files=str(tmp_path / "menus"), **task)})
    with pytest.raises(UserError, match=complaint) as caught:
        check(given)
    assert len(str(caught.value).splitlines()) == 1


def test_fields_labels_and_absent_terms_are_configurable(tmp_path):
    made = [{"a": "x y", "b": "z", "c": 1}, {"a": "x", "b": "x", "c": 0}]
    write(tmp_path / "own", train=made, test=made)
    fields = {"text_field": "a", "term_field": "b", "label_field": "c"}
    task = EndTask(
        files=str(tmp_path / "own"), **fields, labels=["1", "0"], absent_terms="keep",
        metric="micro_f1",
    )  # fmt: skip
    given = EndTasks(tasks={"own": task})
    found = load_task("own", given)
    seen = [(r.text, r.term, r.label) for r in found.splits["test"]]
    assert seen == [("x y", "z", 0), ("x", "x", 1)]
    assert found.metric == "micro_f1"
    given.patience = 2
    with pytest.raises(UserError, match="has no dev split to stop by"):
        check(given)


def test_a_hub_folder_of_an_end_task_has_the_same_rules(tmp_path):
    folder = write(tmp_path / "hub", train=rows(9, 0), validation=rows(4, 1), test=rows(5, 2))
    found = load_task("cites", EndTasks({"cites": EndTask(hub=str(folder))}))
    files = load_task("cites", EndTasks({"cites": EndTask(files=str(folder))}))
    assert found.digest == files.digest
    assert list(found.splits) == ["train", "dev", "test"]
    write(folder, test=[*rows(3, 0), {"text": "a b", "label": "None"}])
    with pytest.raises(UserError, match="test, row 4: its label 'None' is none of the labels"):
        check(EndTasks({"cites": EndTask(hub=str(folder))}))


def job(folder, number):
    """Waits for its fellow where both should run; says who it is."""
    (folder / str(number)).write_text(str(os.getpid()))
    if number == 2:
        raise UserError("no such thing")
    if number == 3:
        os._exit(9)
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)


def test_jobs_run_side_by_side_in_processes_of_their_own(tmp_path):
    ended = []
    failed = run_side_by_side(job, [(tmp_path, i) for i in range(4)], 2, ended.append)
    assert failed == {2: "no such thing", 3: "its process ended with exit code 9"}
    assert sorted(ended) == [0, 1, 2, 3]
    assert len({path.read_text() for path in tmp_path.iterdir()} | {str(os.getpid())}) == 5


def threads(path):
    path.write_text(str(torch.get_num_threads()))


def test_a_job_takes_no_more_threads_than_its_parent(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as OMP_NUM_THREADS does
    try:
        assert run_side_by_side(threads, [(tmp_path / "n",)], 1, lambda _: None) == {}
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "n").read_text() == "1"


def test_which_tasks_follow_which_stage():
    def after(how):
        return Recipe(
            name="r",
            model=Model(path="x"),
            data=Data(domains={n: Domain(files=["x"]) for n in "abc"}),
            stages=[Stage("a", steps=1), Stage(["b", "c"], steps=1), Stage("a", steps=1)],
            evaluate=Evaluation(
                end_tasks=EndTasks(
                    {"a": EndTask(), "t": EndTask(domain="c"), "u": EndTask()}, after=how
                )
            ),
        )  # fmt: skip

    every = ["a", "t", "u"]
    assert [after("own").end_tasks_after(i) for i in range(4)] == [[], ["a"], ["t"], every]
    assert [after("last").end_tasks_after(i) for i in range(4)] == [[], [], [], every]
    assert [after("every").end_tasks_after(i) for i in range(4)] == [every] * 4


def test_the_command_measures_any_checkpoint(made, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: x}\ndata: {domains: {a: {embedded: prose}}}\n"
        "stages: [{domain: a, steps: 1}]\n"
        f"evaluate: {{end_tasks: {{files: '{made}/data', batch_size: 8, seeds: [3], "
        "tasks: {cites: {epochs: 1}, gone: {epochs: 1}}}}\n"
    )
    options = f"--checkpoint {made}/roberta --recipe {recipe} --seeds 4 --device cpu"
    command = ["evaluate.py", *options.split(), "--end-tasks", "cites", "--tasks", "end_tasks"]
    write(made / "data/gone", train=rows(5, 0), test=rows(5, 0))
    monkeypatch.setattr("sys.argv", command)
    main()
    printed = capsys.readouterr().out
    record = json.loads(printed[printed.index("{") :])["end_tasks"]["tasks"]
    assert list(record) == ["cites"]
    assert list(record["cites"]["seeds"]) == ["4"]
    monkeypatch.setattr("sys.argv", [*command, "--end-tasks", "other"])
    with pytest.raises(UserError, match=re.escape("--end-tasks other: not in evaluate.end_tasks")):
        main()
