"""The held-out loss: right, repeatable to the bit, the same for every number of shares."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval.measure import lm
from eval.measure.evaluator import Evaluator
from eval.measure.lm import evaluate_share, losses_of, merge_shares
from launch.evaluate import main
from pipeline.data.heldout import load_heldout, prepare_heldout
from pipeline.data.prepare import prepare
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.model.load import load_for_evaluation
from pipeline.recipe import Data, Domain, Model, Recipe, Stage
from tests.reference import MODELS

TEXT = "the quick brown fox jumps over the lazy dog and runs into the dark green forest"


@pytest.fixture(scope="module", params=["masked", "causal"])
def prepared(request, tmp_path_factory):
    """(folder, objective): a checkpoint and held-out text of two domains."""
    folder = tmp_path_factory.mktemp("eval")
    words = TEXT.split()
    domains = {}
    for name, step in (("a", 3), ("b", 5)):
        lines = [
            json.dumps({"text": " ".join(words[(i * step + j * j) % len(words)] for j in range(25))
                        + f" {i}"})
            for i in range(120)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        domains[name] = Domain(files=[str(folder / f"{name}.jsonl")], heldout_fraction=0.3)
    recipe = Recipe(
        name="eval",
        model=Model(path="unused", objective=request.param),
        data=Data(
            domains=domains,
            prepared=str(folder / "prepared"),
            sequence_length=18,
            heldout_sequences=23,
        ),
        stages=[Stage("a", steps=1)],
    )
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    corpora = {name: prepare(recipe, name, tokenizer) for name in domains}
    prepare_heldout(recipe, tokenizer, corpora, folder / "heldout")
    model = MODELS["roberta" if request.param == "masked" else "llama"]()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "checkpoint")
    return folder, request.param


def evaluate(folder, name, shares, batch_size=4):
    parts = []
    objective = load_heldout(folder / "heldout")[0]["objective"]
    model = load_for_evaluation(folder / "checkpoint", objective, "sdpa")
    for i in range(shares):
        parts.append(folder / f"{name}-{i}.npz")
        evaluate_share(model, folder / "heldout", parts[-1], (i, shares), batch_size)
    info = {"stage": 0, "name": name, "checkpoint": "checkpoint"}
    merge_shares(parts, folder / "heldout", folder / f"{name}.json", 0.7, info)
    return json.loads((folder / f"{name}.json").read_text())


def test_the_loss_is_the_mean_over_the_predicted_tokens(prepared):
    folder, objective = prepared
    result = evaluate(folder, "plain", 1)["domains"]
    _, domains = load_heldout(folder / "heldout")
    name = "roberta" if objective == "masked" else "llama"
    model = type(MODELS[name]()).from_pretrained(folder / "checkpoint").eval()
    for domain, data in domains.items():
        losses = []
        for ids, labels, segments in zip(*data.values(), strict=True):
            for segment in range(int(segments.max()) + 1):
                here = segments == segment
                targets = labels[here].long()
                if objective == "causal":
                    targets = F.pad(targets[1:], (0, 1), value=-100)
                with torch.no_grad():
                    logits = model(input_ids=ids[here].long()[None]).logits[0]
                losses += F.cross_entropy(logits, targets, reduction="none")[targets >= 0]
        assert result[domain]["tokens"] == len(losses)
        assert result[domain]["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
        assert 0 < result[domain]["stderr"] < 0.5


def test_the_losses_alone_are_those_of_the_evaluation(prepared):
    folder, objective = prepared
    full = evaluate(folder, "full", 1)["domains"]
    model = load_for_evaluation(folder / "checkpoint", objective, "sdpa")
    losses = losses_of(model, folder / "heldout", 4)
    assert losses == {name: cell["loss"] for name, cell in full.items()}


def test_it_repeats_to_the_bit_and_does_not_depend_on_the_shares(prepared):
    folder, _ = prepared
    results = [evaluate(folder, f"run{i}", shares) for i, shares in enumerate((1, 1, 3))]
    for other in results[1:]:
        assert other["domains"] == results[0]["domains"]
        assert other["overlap"] == results[0]["overlap"]
    overlap = results[0]["overlap"]
    for matrix in overlap["kinds"].values():
        assert [matrix[i][i] for i in range(2)] == [1.0, 1.0]
        assert 0.0 <= matrix[0][1] <= 1.0


def test_the_losses_by_sequence_add_up_to_the_mean(prepared):
    folder, _ = prepared
    result = evaluate(folder, "sequences", 2)["domains"]
    with np.load(folder / "sequences.npz") as arrays:
        assert len(arrays) == 2 * len(result)
        for domain, cell in result.items():
            loss, tokens = arrays[f"loss/{domain}"], arrays[f"tokens/{domain}"]
            assert (loss.dtype, tokens.dtype) == (np.float64, np.int64)
            assert len(loss) == len(tokens) == cell["sequences"]
            assert tokens.sum() == cell["tokens"]
            assert loss.sum() / tokens.sum() == pytest.approx(cell["loss"])


def test_the_standard_error_is_that_of_a_ratio_over_sequences(tmp_path, monkeypatch):
    """One sequence of one token with 3 nats and one of three tokens with 1: a mean of 1 nat a
    token, from which they are 2 and -2 nats away; of a single sequence nothing is known."""
    manifest = {"objective": "masked", "unigram_loss": {"two": 3.0, "one": 3.0}}
    labels = torch.tensor([[5, -100, -100], [5, 6, 7]])
    domains = {"two": {"labels": labels}, "one": {"labels": labels[1:]}}
    monkeypatch.setattr(lm, "load_heldout", lambda folder: (manifest, domains))
    for i, losses in enumerate(([3.0, 0.0], [0.0, 1.0])):
        np.savez(tmp_path / f"{i}.npz", **{"loss/two": losses, "loss/one": losses[1:]})
    parts = [tmp_path / "0.npz", tmp_path / "1.npz"]
    merge_shares(parts, tmp_path, tmp_path / "eval.json", 0.7, {})
    found = json.loads((tmp_path / "eval.json").read_text())["domains"]
    assert (found["two"]["loss"], found["two"]["tokens"]) == (1.0, 4)
    # The residuals' variance is 8, hence that of their sum 16, and that of the mean 16 / 4**2.
    assert found["two"]["stderr"] == pytest.approx(1.0)
    assert found["one"]["stderr"] is None


def test_the_masks_do_not_depend_on_the_seed_of_the_run(prepared, tmp_path):
    folder, objective = prepared
    manifest, domains = load_heldout(folder / "heldout")
    recipe = Recipe(
        name="other",
        model=Model(path="unused", objective=objective),
        data=Data(
            domains={n: Domain(**s) for n, s in manifest["sources"].items()},
            sequence_length=18,
            heldout_sequences=23,
            masking=0.5,
            prepared=str(tmp_path / "prepared"),
        ),
        stages=[Stage("b", steps=1)],
        seed=7,
    )
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    corpora = {name: prepare(recipe, name, tokenizer) for name in domains}
    prepare_heldout(recipe, tokenizer, corpora, tmp_path / "heldout")
    _, again = load_heldout(tmp_path / "heldout")
    for name, data in domains.items():
        for key, tensor in data.items():
            assert torch.equal(tensor, again[name][key])


def test_the_text_is_the_same_beside_other_training_text(tmp_path):
    """Its digests say whether losses compare; what a unigram model learned is no part of them."""
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    (tmp_path / "heldout.txt").write_text(TEXT)
    manifests = []
    for name, text in (("one", TEXT[::-1]), ("other", TEXT.upper())):
        (tmp_path / f"{name}.txt").write_text(text)
        domain = Domain(
            files=[str(tmp_path / f"{name}.txt")], heldout_files=[str(tmp_path / "heldout.txt")]
        )
        data = Data(domains={"a": domain}, heldout_sequences=3, prepared=str(tmp_path / "prepared"))
        recipe = Recipe(
            name=name, model=Model(path="unused"), data=data, stages=[Stage("a", steps=1)]
        )
        corpora = {"a": prepare(recipe, "a", tokenizer)}
        prepare_heldout(recipe, tokenizer, corpora, tmp_path / name)
        manifests.append(load_heldout(tmp_path / name)[0])
    one, other = manifests
    assert one["files"] == other["files"]
    assert one["unigram_loss"] != other["unigram_loss"]


def test_text_in_other_tokens_is_refused(prepared, tmp_path, monkeypatch):
    """Its loss could be computed, and would mean nothing."""
    folder, _ = prepared
    shutil.copytree(folder / "checkpoint", tmp_path / "model")
    options = f"--checkpoint {tmp_path / 'model'} --heldout {folder / 'heldout'} --no-overlap"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *options.split()])
    train_tokenizer([TEXT] * 3, 300).save_pretrained(tmp_path / "model")
    main()
    train_tokenizer([TEXT[::-1]] * 3, 300).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="in other tokens than those of"):
        main()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--tasks humaneval --shots 0", "--shots has no effect: --tasks has no benchmarks"),
        ("--tasks hellaswag --samples 5", "--samples has no effect: --tasks has no humaneval"),
        ("--heldout X --limit 3", "--limit has no effect: --tasks has no benchmarks or humaneval"),
        ("--tasks heldout", "--heldout is missing"),
        ("--heldout X", "--heldout X: not a held-out folder"),
        ("--heldout X --threshold 1", "--threshold 1.0: must be at least 0 and below 1"),
    ],
)
def test_options_of_the_command_without_effect(monkeypatch, options, complaint):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--checkpoint", "none", *options.split()])
    with pytest.raises(UserError, match=re.escape(complaint)):
        main()


def test_a_checkpoint_is_measured_in_the_recipes_precision(tmp_path, monkeypatch, capsys):
    """The recipe's, unless the command line names another; and bf16 that is emulated is told."""
    import eval.measure.checkpoint

    measured = []

    def measure(checkpoint, kinds, *_, **__):
        measured.append(checkpoint.precision)
        return ["benchmarks: not here"]

    monkeypatch.setattr(eval.measure.checkpoint, "measure_share", measure)
    monkeypatch.setattr("pipeline.engine.config.cpu_has_bf16", lambda: False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: gpt2, objective: causal}\ndata: {domains: {a: {embedded: prose}}}\n"
        "stages: [{domain: a, steps: 1}]\n"
        "evaluate: {precision: bf16, benchmarks: {hellaswag: {}}}\n"
    )
    for more in ("", " --precision fp32", " --precision bf16"):
        options = f"--checkpoint none --recipe {recipe} --tasks hellaswag --device cpu{more}"
        monkeypatch.setattr("sys.argv", ["evaluate.py", *options.split()])
        with pytest.raises(UserError, match="could not be measured"):
            main()
        assert ("bf16 is emulated" in capsys.readouterr().out) == more.endswith("bf16")
    assert measured == ["bf16", "fp32", "bf16"]


def test_a_process_measures_one_checkpoint_after_another(prepared, tmp_path):
    folder, environment = prepared[0], dict(os.environ)
    train_tokenizer([TEXT] * 3, 300).save_pretrained(folder / "checkpoint")

    def asked(output: Path) -> list[str]:
        output.mkdir()
        options = f"--checkpoint {folder / 'checkpoint'} --heldout {folder / 'heldout'} --share 0/1"
        return [*options.split(), "--tasks", "heldout", "--no-overlap", "--output", str(output)]

    def done(evaluator: Evaluator) -> int:
        while (code := evaluator.wait(60)) is None:
            pass
        return code

    evaluator = Evaluator(asked(tmp_path / "first"), environment)
    assert done(evaluator) == 0
    assert evaluator.waits(environment)
    assert not evaluator.waits({**environment, "OMP_NUM_THREADS": "7"})
    evaluator.ask(asked(tmp_path / "second"))
    assert done(evaluator) == 0
    found = [(tmp_path / n / "share-0.heldout.npz").read_bytes() for n in ("first", "second")]
    assert found[0] == found[1]
    evaluator.ask(["--checkpoint", "none", "--heldout", str(tmp_path), "--share", "0/1"])
    assert done(evaluator) == 2
    assert not evaluator.waits(environment)
    evaluator.end()
