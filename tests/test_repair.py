"""Interpolation and the hard threshold on what is known of them, and on whole checkpoints."""

import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from eval.repair import _loaded, find
from launch.repair import main
from pipeline.checkpoint import publish, read_manifest, verify
from pipeline.data.heldout import prepare_heldout
from pipeline.data.prepare import prepare
from pipeline.data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from pipeline.methods.repair import (
    hard_threshold,
    interpolate,
    marchenko_pastur_median,
    noise_threshold,
    write_repaired,
)
from pipeline.recipe import Data, Domain, Model, Recipe, Stage
from tests.fake_runs import fake_run
from tests.reference import MODELS


def test_square_noise_has_the_published_threshold():
    """2.858 times the median, for a square matrix of unknown noise (Gavish and Donoho 2014)."""
    values = torch.ones(5)
    assert noise_threshold(values, (5, 5)) == pytest.approx(2.858, abs=1e-3)
    for beta, omega in ((0.5, 2.1711), (0.1, 1.6089)):  # their Table IV
        assert noise_threshold(values, (1000, int(1000 * beta))) == pytest.approx(omega, abs=2e-3)


def test_the_median_of_the_law_is_that_of_noise():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(600, 300, generator=generator) / math.sqrt(600)
    values = torch.linalg.svdvals(noise)
    assert float(values.median()) ** 2 == pytest.approx(marchenko_pastur_median(0.5), rel=0.02)


def test_a_signal_of_low_rank_comes_out_of_the_noise():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(120, 80, generator=generator)
    signal = 3 * torch.outer(
        torch.randn(120, generator=generator), torch.randn(80, generator=generator)
    )
    noise = 0.2 * torch.randn(120, 80, generator=generator)
    repaired = hard_threshold(base, base + signal + noise)
    assert torch.linalg.matrix_rank(repaired - base, rtol=1e-4) == 1
    assert (repaired - base - signal).norm() < 0.3 * noise.norm()
    # Experts in one weight are repaired each by itself.
    experts = hard_threshold(base.expand(2, -1, -1), torch.stack([base, base + signal + noise]))
    assert torch.equal(experts, torch.stack([base, repaired]))
    # Noise alone is no update, and what did not move stays.
    assert torch.equal(hard_threshold(base, base + noise), base)
    assert torch.equal(hard_threshold(base, base), base)
    vector = torch.randn(7, generator=generator)
    assert torch.equal(hard_threshold(vector, vector + 1), vector + 1)


@pytest.mark.parametrize("family", MODELS)
def test_checkpoints_are_repaired_file_by_file(family, tmp_path):
    model = MODELS[family]()
    model.save_pretrained(tmp_path / "base")
    before = {n: w.clone() for n, w in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    after = model.state_dict()
    for share in (0.0, 0.25, 1.0):
        folder = tmp_path / f"{share}"
        folder.mkdir()
        write_repaired(
            tmp_path / "tuned",
            tmp_path / "base",
            lambda base, tuned, s=share: interpolate(base, tuned, s),
            folder,
        )
        loaded = type(model).from_pretrained(folder).state_dict()
        exact = {0.0: after, 1.0: before}.get(share)
        for name, weight in loaded.items():
            if exact is not None:
                assert torch.equal(weight, exact[name]), name
            else:
                torch.testing.assert_close(weight, 0.25 * before[name] + 0.75 * after[name])
    other = MODELS["llama" if family == "gpt2" else "gpt2"]()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="the model it was trained from"):
        write_repaired(tmp_path / "other", tmp_path / "base", interpolate, tmp_path / "0.0")
    with pytest.raises(UserError, match="no model"):
        write_repaired(tmp_path, tmp_path / "base", interpolate, tmp_path / "0.0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one stage on domain a whose checkpoint was trained on a by hand."""
    folder = tmp_path_factory.mktemp("repair") / "run"
    folder.mkdir()
    words = {"a": "river stone cloud winter morning light", "b": "matrix vector kernel tensor"}
    domains = {}
    for name, text in words.items():
        some = text.split()
        rows = [" ".join(some[(i + j * j) % len(some)] for j in range(25)) for i in range(60)]
        path = folder.parent / f"{name}.jsonl"
        path.write_text(
            "".join(json.dumps({"text": f"{row} {i}"}) + "\n" for i, row in enumerate(rows))
        )
        domains[name] = Domain(files=[str(path)], heldout_fraction=0.3)
    recipe = Recipe(
        name="run",
        model=Model(config={"model_type": "llama"}, train_tokenizer=300, objective="causal"),
        data=Data(domains=domains, sequence_length=18, heldout_sequences=8),
        stages=[Stage("a", steps=1)],
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    tokenizer = train_tokenizer([" ".join(words.values())] * 3, 300)
    corpora = {name: prepare(recipe, name, tokenizer) for name in domains}
    prepare_heldout(recipe, tokenizer, corpora, folder / "heldout")
    model = MODELS["llama"]()
    model.resize_token_embeddings(len(tokenizer))
    publish(folder / "stages/00_base/checkpoint", model.save_pretrained, {"stage": 0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = load_file(folder / "heldout/a.safetensors")["input_ids"].long()
    for _ in range(12):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    publish(folder / "stages/01_a/checkpoint", model.save_pretrained, {"stage": 1})
    return folder


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["repair.py", *map(str, arguments)])
    main()


def test_a_grid_is_measured_and_its_best_is_written(run, tmp_path, monkeypatch, capsys):
    command(monkeypatch, run, "--grid", "0.25,0.5", "--out", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if "learned" in line)
    rows = [line.split() for line in lines[head + 1 : head + 5]]
    assert [row[0] for row in rows] == ["0", "0.25", "0.5", "1"]
    numbers = [[float(x.replace("\N{MINUS SIGN}", "-")) for x in row if x.lstrip("+\N{MINUS SIGN}")
                .replace(".", "").isdigit() and "." in x] for row in rows]  # fmt: skip
    numbers = [row[-4:] for row in numbers]
    base = numbers[-1]
    assert base[:2] == [0, 0]
    for learned, forgotten, a, b in numbers:
        assert learned == pytest.approx(base[2] - a, abs=2e-3)
        assert forgotten == pytest.approx(b - base[3], abs=2e-3)
    assert numbers[0][0] > 0.1  # it did learn
    best = max(rows, key=lambda row: numbers[rows.index(row)][0] - numbers[rows.index(row)][1])
    assert "best" in best
    assert [row for row in rows if "best" in row] == [best]
    verify(tmp_path / "out")
    assert read_manifest(tmp_path / "out")["repaired"]["repair"] == best[0]
    base, tuned, out = (
        load_file(folder / "model.safetensors")
        for folder in (run / "stages/00_base/checkpoint", run / "stages/01_a/checkpoint",
                       tmp_path / "out")
    )  # fmt: skip
    share = float(best[0])
    for name, weight in out.items():
        torch.testing.assert_close(weight, share * base[name] + (1 - share) * tuned[name])


def test_the_trained_domains_are_those_between_the_base_and_the_checkpoint(run, tmp_path):
    other = fake_run(tmp_path / "other", trained=("math", "python", "cpp"), base=())
    recipe = other / "recipe.yaml"
    text = recipe.read_text().replace("domain: cpp", "domain: math")  # again, as the third stage
    places = [other / f"stages/{stage}/checkpoint" for stage in ("00_base", "01_math", "03_cpp")]
    for place in places:
        place.mkdir(parents=True)
    for start_from, toward, trained in (
        ("previous", None, ["math", "python"]),
        ("previous", str(places[1]), ["math", "python"]),
        ("base", None, ["math"]),
        ("base", str(places[1]), None),
        ("nearest", None, None),
    ):
        recipe.write_text(f"start_from: {start_from}\n{text}")
        assert find(places[2], toward, run).trained == trained


def test_the_threshold_and_a_base_from_elsewhere(run, tmp_path, monkeypatch, capsys):
    """A base that is no published folder, and a checkpoint outside of any run."""
    checkpoint = run / "stages/01_a/checkpoint"
    copy = tmp_path / "copy"
    MODELS["llama"]().from_pretrained(checkpoint).save_pretrained(copy)
    base = tmp_path / "base"
    MODELS["llama"]().from_pretrained(run / "stages/00_base/checkpoint").save_pretrained(base)
    command(monkeypatch, copy, "--toward", base, "--dg-hard", "--out", tmp_path / "out")
    assert "learned" not in capsys.readouterr().out
    command(monkeypatch, copy, "--toward", base, "--dg-hard", "--heldout", run, "--out",
            tmp_path / "measured")  # fmt: skip
    assert "dg-hard" in capsys.readouterr().out
    before, after, out = (
        load_file(d / "model.safetensors") for d in (base, copy, tmp_path / "out")
    )
    for name, weight in out.items():
        torch.testing.assert_close(weight, hard_threshold(before[name], after[name]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--share", "0.3"], "--out is missing"),
        (["{run}", "--share", "1.5", "--out", "{new}"], "between 0"),
        (["{run}", "--grid", "a,b"], "as numbers"),
        (["{run}", "--share", "0.1,0.2", "--out", "{new}"], "--grid measures several"),
        (["{run}", "--out", "{run}"], "there already"),
        (["{run}", "--toward", "{elsewhere}", "--share", "0.3", "--out", "{new}"], "cannot load"),
        (["{new}", "--share", "0.3", "--out", "{out}"], "no such folder"),
        (["{elsewhere}", "--share", "0.3", "--out", "{new}"], "--toward"),
        (["{run}", "--heldout", "{elsewhere}"], "no held-out text"),
        (["{elsewhere}", "--toward", "{run}"], "--heldout is missing"),
        (["{adapter}", "--toward", "{base}", "--share", "0.3", "--out", "{new}"], "adapter"),
    ],
)
def test_mistakes_are_one_message(run, tmp_path, monkeypatch, arguments, message):
    places = {name: tmp_path / name for name in ("elsewhere", "adapter", "new", "out")}
    for name in ("elsewhere", "adapter"):
        places[name].mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    places |= {"run": run, "base": run / "stages/00_base/checkpoint"}
    filled = [a.format(**places) for a in arguments]
    with pytest.raises(UserError) as caught:
        command(monkeypatch, *filled)
    assert message.format(**places) in str(caught.value)
    assert not places["new"].exists()


def test_a_model_is_measured_with_the_attention_of_its_run(run, tmp_path):
    assert find(run, None, None).attention == "sdpa"
    copied = shutil.copytree(run, tmp_path / "run")
    recipe = (copied / "recipe.yaml").read_text().replace("attention: sdpa", "attention: eager")
    (copied / "recipe.yaml").write_text(recipe)
    task = find(copied, None, None)
    assert task.attention == "eager"
    assert _loaded(task, task.checkpoint).config._attn_implementation == "eager"
