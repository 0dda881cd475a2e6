"""What somebody else made: recipes, archives, weights, names. It is refused with one message, and
secrets stay where they are."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zstandard

from pipeline.data.bad_lines import BadLines
from pipeline.data.formats import raw
from pipeline.data.reader import read_documents
from pipeline.errors import UserError
from pipeline.model.load import load_config, load_for_evaluation
from pipeline.recipe import Domain, Model
from pipeline.redact import HIDDEN, redact, redacted
from pipeline.run.recipe_file import load_recipe
from tests.test_surroundings import RECIPE, recipe_file

ROOT = Path(__file__).resolve().parents[2]
LAUGHS = "\n".join(
    ["x0: &x0 [a, a, a, a, a, a, a, a, a, a]"]
    + [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 9)]
)
DOUBLED = "x0: aaaaaaaaaa\n" + "\n".join(
    f"x{i}: '${{x{i - 1}}}${{x{i - 1}}}'" for i in range(1, 60)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "more than 100,000 values"),
        (DOUBLED, "interpolations"),
        ("x: " + "[" * 200 + "]" * 200, "more than 50 levels"),
        ("x: !!python/object/apply:os.system ['touch owned']", "no tags"),
        ("x: !include /etc/passwd", "no tags"),
        ("x: &a [*a]", "recursive"),
        ("x: " + "y" * (1 << 21), "bytes are no recipe"),
        (RECIPE.replace("été", "../../elsewhere"), "name: "),
        (RECIPE.replace("été", '"a\\e[2Jb"'), "name: "),
        (RECIPE.replace("{a:", "{'../a':"), "data.domains"),
    ],
)
def test_a_hostile_recipe_is_refused(tmp_path, text, expected):
    with pytest.raises(UserError, match=expected) as caught:
        load_recipe(recipe_file(tmp_path, text))
    assert len(str(caught.value)) < 1000
    assert not Path("owned").exists()


def test_aliases_and_interpolations_of_an_honest_recipe_are_read(tmp_path):
    text = RECIPE.replace("{a: {embedded: prose}", "{a: &a {embedded: prose}, b: *a") + "seed: 7\n"
    text += "optimizer: {warmup: '${mask.threshold}'}\nmask: {threshold: 0.5}\n"
    recipe = load_recipe(recipe_file(tmp_path, text.replace("domain: a", "domain: [a, b]")))
    assert recipe.data.domains["a"] == recipe.data.domains["b"]
    assert recipe.optimizer.warmup == 0.5


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(raw, "BOMB", 1 << 23)
    monkeypatch.setattr(raw, "LONGEST_LINE", 1 << 24)
    rows = (b'{"text": "' + b"a" * 500 + b'"}\n') * 60_000
    pack = gzip.compress if kind == "gz" else zstandard.ZstdCompressor(level=19).compress
    bomb = tmp_path / f"bomb.jsonl.{kind}"
    bomb.write_bytes(pack(rows))
    with pytest.raises(UserError, match=rf"bomb\.jsonl\.{kind}.*unpack"):
        list(read_documents(Domain(files=[str(bomb)]), "train", BadLines(10)))
    line = tmp_path / f"line.jsonl.{kind}"
    monkeypatch.setattr(raw, "BOMB", 1 << 40)
    line.write_bytes(pack(b"a" * (1 << 25)))
    with pytest.raises(UserError, match=r"line\.jsonl.*is no row"):
        list(read_documents(Domain(files=[str(line)]), "train", BadLines(10)))


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_weights_in_pickles_and_code_of_a_model_are_not_read(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 20}
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["GPT2LMHeadModel"]})
    )
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "owned")))
    torch.save({"x": Touch(tmp_path / "owned")}, folder / "more.pt")
    with pytest.raises(UserError, match="no safetensors, only pickles"):
        load_for_evaluation(folder, "causal", "sdpa")
    foreign = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(foreign))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    with pytest.raises(UserError, match="code of its own, which is never run"):
        load_config(Model(path=str(folder)))
    assert not (tmp_path / "owned").exists()


PLANTED = {
    "HF_TOKEN": "planted-hub-secret", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_DB_PASSWORD": "planted$word", "AZURE_OPENAI_KEY": "planted-for-azure",
    "SMTP_PASS": "planted-for-mail",
}  # fmt: skip


def test_secrets_are_hidden_in_every_form_and_the_rest_is_left(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    for harmless in ("TOKENIZERS_PARALLELISM", "MONKEY", "COMPASS"):
        monkeypatch.setenv(harmless, "a_long_value")
    for text in (
        f"Authorization: Bearer {PLANTED['HF_TOKEN']}", "https://user:hunter22@host/x?a=1",
        "https://host/x?token=hunter22&b=2", "password=hunter22", '{"api_key": "hunter22"}',
        "hf_" + "hunter22" * 4, f"x{PLANTED['WANDB_API_KEY']}x", PLANTED["MY_DB_PASSWORD"],
        PLANTED["AZURE_OPENAI_KEY"], PLANTED["SMTP_PASS"],
        "https://hooks.slack.com/services/T0/B0/hunter22",
    ):  # fmt: skip
        shown = redact(text)
        assert HIDDEN in shown
        assert not any(secret in shown for secret in ("hunter22", *PLANTED.values()))
        assert redact(shown) == shown
    for text in ("tokens: 300", "mask_token: <mask>", "a_long_value", "http://host:80/x", "a:b@c",
                 'the key=value pairs: "password": null'):  # fmt: skip
        assert redact(text) == text
    assert redacted({"wandb_token": "short", "n": [1, None]}) == {
        "wandb_token": HIDDEN, "n": [1, None],
    }  # fmt: skip


def test_planted_secrets_reach_no_file_of_a_run_and_no_message(tmp_path):
    """The command line, the recipe, the environment, the engine's JSON, messages and tracebacks."""
    rows = "".join(json.dumps({"text": f"words {i} of some text"}) + "\n" for i in range(60))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "r.yaml").write_text(f"""
name: planted
model: {{config: {{model_type: gpt2, n_embd: 8, n_layer: 1, n_head: 1, n_positions: 16}},
        objective: causal, train_tokenizer: 300, revision: null}}
data: {{domains: {{a: {{files: [{tmp_path}/rows.jsonl]}},
                b: {{hub: "https://me:hunter22@host/x"}},
                c: {{hub: "${{oc.env:HF_TOKEN}}"}}}}, sequence_length: 16}}
stages: [{{domain: a, steps: 1}}, {{domain: b, steps: 1}}, {{domain: c, steps: 1}}]
train: {{batch_size: 2}}
""")
    (tmp_path / "ds.json").write_text(json.dumps({
        "zero_optimization": {"stage": 1}, "wandb": {"enabled": False, "team": "hunter22@x",
        "project": "https://me:hunter22@host"},
    }))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "launch/cpt.py", "--config", tmp_path / "ds.json", "--recipe",
         tmp_path / "r.yaml", "--runs", tmp_path / "runs"],
        cwd=ROOT, env={**os.environ, **PLANTED, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    written = [p for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    names = {p.name for p in written}
    assert {"recipe.yaml", "ds_config.json", "environment.json"} <= names, done.stderr
    shown = done.stdout + done.stderr + "".join(p.read_text(errors="replace") for p in written)
    assert HIDDEN in shown
    for secret in (":hunter22", *PLANTED.values()):
        around = max(0, shown.find(secret) - 300)
        assert secret not in shown, shown[around : around + 600]
