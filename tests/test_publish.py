"""Publishing: what is shared is whole, says what was measured, and tells nobody's business."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import eval.publish
from eval.analysis.load import load_run
from eval.publish import upload, write_folder
from eval.report.card import model_card
from pipeline.checkpoint import publish, verify
from pipeline.errors import UserError
from tests.fake_runs import fake_run, fake_tuning

LICENCE = "apache-2.0"


def share(run, stage=None, merge=False, out=None):
    return write_folder(run, stage, LICENCE, ["en"], merge, out)


@pytest.fixture
def tuned(tmp_path):
    run = fake_tuning(tmp_path / "tuned", trained=("code", "law"), damage=0.25, limit=300)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["path"] = "someone/base-1b"
    recipe["data"]["domains"]["code"] = {"hub": "someone/code"}
    recipe["data"]["domains"]["law"] = {
        "files": ["/home/me/secret-place/law.jsonl", "https://me:pass@host/law.jsonl?sig=abc"]
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("01_code", "02_law"):
        write = weights(stage)
        publish(run / "stages" / stage / "checkpoint", write, {})
    return run


def weights(text):
    def write(folder):
        (folder / "model.safetensors").write_text(text)
        (folder / "tokenizer.json").write_text("{}")

    return write


def test_the_card_says_what_was_measured(tuned):
    folder = share(tuned)
    assert folder == tuned / "publish" / "stage_02"
    verify(folder)
    assert (folder / "model.safetensors").read_text() == "02_law"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == LICENCE
    assert (card.data.base_model, card.data.datasets) == ("someone/base-1b", ["someone/code"])
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    last = json.loads((tuned / "stages" / "02_law" / "benchmarks.json").read_text())["benchmarks"]
    shown = {r.dataset_name: r.metric_value for r in card.data.eval_results}
    assert shown["hellaswag"] == pytest.approx(100 * last["hellaswag"]["value"], abs=0.01)
    assert {"HumanEval", "winogrande"} <= set(shown)
    losses = json.loads((tuned / "stages" / "02_law" / "eval.json").read_text())["domains"]
    for result in losses.values():
        assert f"{result['loss']:.3f}" in card.text
    assert "hellaswag fell by" in card.text
    assert "**Forgotten:" in card.text


def test_what_is_shared_tells_no_place_and_no_password(tuned):
    folder = share(tuned)
    for path in folder.glob("*"):
        text = path.read_text()
        for private in ("secret-place", "/home/me", "me:pass", "sig=abc", str(tuned.parent)):
            assert private not in text, path


def test_an_earlier_stage_has_the_numbers_of_then(tuned):
    folder = share(tuned, stage=1)
    text = (folder / "README.md").read_text()
    assert (folder / "model.safetensors").read_text() == "01_code"
    end = json.loads((tuned / "stages" / "02_law" / "eval.json").read_text())["domains"]
    assert f"{end['law']['loss']:.3f}" not in text
    assert "stage 2" not in text


def test_the_card_of_tasks_has_their_accuracies(tmp_path):
    run = fake_run(tmp_path / "run", trained=("mood", "place"), base=())
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["objective"] = "seq2seq"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    values = {"00_base": (0.1, 0.2), "01_mood": (0.8, 0.2), "02_place": (0.5, 0.7)}
    for stage, (mood, place) in values.items():
        tasks = {"mood": {"value": mood}, "place": {"value": place}}
        (run / "stages" / stage / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    publish(run / "stages" / "02_place" / "checkpoint", weights("x"), {})
    card = ModelCard.load(share(run) / "README.md")
    assert card.data.pipeline_tag == "text2text-generation"
    shown = {r.dataset_name: (r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert shown == {"mood": ("exact_match", 50.0), "place": ("exact_match", 70.0)}
    assert "**ACC of the tasks: 60.0%.**" in card.text
    assert "**BWT of the tasks: -30.0%.**" in card.text
    assert "| base | 10.0 | 20.0 |" in card.text


@pytest.mark.parametrize(
    ("settings", "method", "tagged"),
    [
        ({}, "migu T=0.7: 70% of the gradient's rows masked by the magnitude of the outputs", True),
        ({"mask": {"enabled": True, "threshold": 0.7, "criterion": "random"}}, "random", False),
        ({"mask": {"enabled": False}, "hft": {}}, "hft", False),
        ({"mask": {"enabled": False}}, "of that sequence (replay 0.05).", False),
    ],
)
def test_the_card_names_the_method(tmp_path, settings, method, tagged):
    run = fake_run(tmp_path / "run")
    recipe = {**yaml.safe_load((run / "recipe.yaml").read_text()), **settings}
    recipe["stages"][1]["replay"] = {"prose": 0.05}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = model_card(load_run(run), 3, "mit", [], False)
    assert method in text
    assert ("- migu\n" in text) == tagged
    assert re.search(r"\| prose \| .* \| 2 \(replayed\) \|", text)


def test_masked_models_and_unfinished_runs_have_a_card(tmp_path):
    run = fake_run(tmp_path / "run", evaluated=1, enabled=False)
    publish(run / "stages" / "01_math" / "checkpoint", weights("x"), {})
    card = ModelCard.load(share(run) / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert "migu" not in card.data.tags
    assert card.data.eval_results is None


def test_what_cannot_be_shared_is_one_message(tuned, tmp_path):
    checkpoint = tuned / "stages" / "02_law" / "checkpoint"
    for wrong, complaint in (
        ({"stage": 5}, "checkpoints of the stages"),
        ({"merge": True}, "is no adapter"),
        ({"out": tmp_path}, "was not written by this"),
    ):
        with pytest.raises(UserError, match=complaint):
            share(tuned, **wrong)
    (checkpoint / "model.safetensors").write_text("02_lav")
    with pytest.raises(UserError, match="differs from its SHA-256"):
        share(tuned)
    assert not (tuned / "publish").exists()
    with pytest.raises(UserError, match="has published no checkpoint"):
        share(fake_run(tmp_path / "none"))
    for name in ("a/b/c", "-x", "two words"):
        with pytest.raises(UserError, match="owner/name"):
            upload(tmp_path, name, False)


def test_the_folder_is_what_is_uploaded(tuned, monkeypatch):
    seen = {}

    class Api:
        def create_repo(self, to, private, exist_ok):
            seen.update(to=to, private=private, exist_ok=exist_ok)
            return type("Url", (str,), {"repo_id": to})(f"https://hub/{to}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen["files"] = {p.name for p in Path(folder_path).iterdir()}

    monkeypatch.setattr(eval.publish, "HfApi", Api)
    assert upload(share(tuned), "me/model", True) == "https://hub/me/model"
    assert seen["to"] == "me/model"
    assert seen["private"]
    assert {"README.md", "recipe.yaml", "model.safetensors", "tokenizer.json"} <= seen["files"]


def test_a_hub_that_cannot_be_reached_is_one_message_and_keeps_the_folder(tuned, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    class Api:
        def create_repo(self, *_, **__):
            raise ConnectionError("refused")

    monkeypatch.setattr(eval.publish, "HfApi", Api)
    folder = share(tuned)
    with pytest.raises(UserError, match=f"refused.*{folder}"):
        upload(folder, "me/model", False)
    assert (folder / "README.md").exists()


def test_an_adapter_is_merged_into_its_base(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    run = fake_run(tmp_path / "run", trained=("code",))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] = {"path": str(tmp_path / "base"), "objective": "causal", "lora": {"r": 2}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    publish(run / "stages" / "01_code" / "checkpoint", adapted.save_pretrained, {})
    with pytest.raises(UserError, match="give --merge"):
        share(run)
    merged = AutoModelForCausalLM.from_pretrained(share(run, merge=True))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=tokens).logits
        assert torch.allclose(merged(input_ids=tokens).logits, wanted, atol=1e-5)
    card = ModelCard.load(run / "publish" / "stage_01" / "README.md")
    assert card.data.library_name == "transformers"
    recipe["model"]["overrides"] = {"rms_norm_eps": 0.1}  # as it was trained and measured
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(run / "publish")
    merged = AutoModelForCausalLM.from_pretrained(share(run, merge=True))
    assert merged.config.rms_norm_eps == 0.1


def test_command_line(tuned):
    script = Path(__file__).resolve().parents[1] / "launch" / "publish.py"
    done = subprocess.run([sys.executable, script, str(tuned), "--license", LICENCE, "--dry-run"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stage_02" in done.stdout
    done = subprocess.run([sys.executable, script, str(tuned), "--license", LICENCE],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert "--to is missing" in done.stderr
    assert "Traceback" not in done.stderr
