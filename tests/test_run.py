"""Whole runs through the command line: faults, restarts, and mistakes of the user."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from pipeline.checkpoint import is_published, publish, require_space, verify
from pipeline.errors import UserError
from pipeline.run.folder import open_run
from pipeline.run.recipe_file import load_recipe
from pipeline.run.run import run_recipe
from pipeline.run.stage import _require_space, stage_resume
from pipeline.run.state import Run
from tests.spawn import free_port

ROOT = Path(__file__).resolve().parent.parent
WORDS = {
    "a": ["river", "stone", "cloud", "winter", "morning", "light", "forest", "garden", "silver"],
    "b": ["matrix", "vector", "kernel", "tensor", "gradient", "scalar", "integral", "theorem"],
}


def write_corpus(path: Path, domain: str, documents: int = 80) -> None:
    words = WORDS[domain]
    lines = []
    for i in range(documents):
        text = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(30 + i % 9))
        lines.append(json.dumps({"text": f"{text} {i}"}) + "\n")
    # Without the time that gzip notes: a corpus that is written again is the same one.
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


def tiny_recipe(tmp_path: Path) -> Path:
    """A recipe of two tiny domains, and its corpora."""
    for domain in WORDS:
        write_corpus(tmp_path / f"{domain}.jsonl.gz", domain)
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""
name: tiny
model:
  config: {{model_type: roberta, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
            intermediate_size: 24, max_position_embeddings: 34, hidden_dropout_prob: 0.1}}
  train_tokenizer: 300
data:
  domains:
    a: {{files: ['{tmp_path}/a.jsonl.gz'], heldout_fraction: 0.2}}
    b: {{files: ['{tmp_path}/b.jsonl.gz'], heldout_fraction: 0.2}}
  sequence_length: 32
  heldout_sequences: 8
stages: [{{domain: a, steps: 12}}, {{domain: b, steps: 12}}]
optimizer: {{lr: 1.0e-3}}
train: {{batch_size: 8}}
""")
    return path


def command(recipe: Path, *extra: str) -> list[str]:
    return [sys.executable, "launch/cpt.py", "--recipe", str(recipe), "--runs",
            str(recipe.parent / "runs"), *extra]  # fmt: skip


def start(arguments: list[str], **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **kwargs,
    )  # fmt: skip


def finish(arguments: list[str]) -> tuple[int, str]:
    process = start(arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def evaluation(run: Path, stage: str) -> dict:
    return json.loads((run / "stages" / stage / "eval.json").read_text())


def weights(run: Path, stage: str) -> dict:
    return load_file(run / "stages" / stage / "checkpoint" / "model.safetensors")


def test_a_killed_run_continues_and_ends_like_an_unbroken_one(recipe):
    halved = "train.publish_dtype=bfloat16"
    process = start(command(recipe, "name=killed", halved), start_new_session=True)
    log = recipe.parent / "runs" / "killed" / "log.jsonl"
    deadline = time.time() + 200
    while time.time() < deadline and not (
        log.exists() and '"stage": 2, "domain": "b", "step": 3' in log.read_text()
    ):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed, whole = log.parent, log.parent.parent / "whole"
    assert is_published(killed / "stages/01_a/checkpoint")
    assert not (killed / "stages/02_b/checkpoint").exists()
    before = (killed / "stages/01_a/eval.json").read_text()

    code, output = finish(command(recipe, "name=killed", halved))
    assert code == 0, output
    assert "stage 1 a: finished before" in output
    # The unbroken run goes through the DeepSpeed launcher, with another split of the batch.
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    launcher += ["--master_port", str(free_port())]
    code, output = finish([*launcher, *command(recipe, "name=whole", halved)[1:]])
    assert code == 0, output
    assert "held-out loss" in output
    assert (killed / "stages/01_a/eval.json").read_text() == before
    for stage in ("01_a", "02_b"):
        published = killed / "stages" / stage / "checkpoint"
        assert json.loads((published / "config.json").read_text())["dtype"] == "bfloat16"
        assert {w.dtype for w in weights(killed, stage).values()} == {torch.bfloat16}
        # Dropout differs between one rank and two; what is trained on does not.
        losses = [
            [d["loss"] for d in evaluation(run, stage)["domains"].values()]
            for run in (killed, whole)
        ]
        assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert (killed / "report" / "index.html").is_file()

    # A process that is killed behind publishing loses the stage's line of the log: it comes back.
    lines = log.read_text(encoding="utf-8").splitlines()
    kept = [x for x in lines if not ('"event": "stage"' in x and '"stage": 1' in x)]
    assert len(kept) == len(lines) - 1
    log.write_text("\n".join(kept) + "\n", encoding="utf-8")
    code, output = finish(command(recipe, "name=killed", halved))
    assert code == 0, output
    records = [json.loads(x) for x in log.read_text(encoding="utf-8").splitlines()]
    ends = {r["stage"]: r for r in records if r["event"] == "stage"}
    assert sorted(ends) == [1, 2]
    assert ends[1]["steps"] == 12
    assert ends[1]["seconds"] > 0
    code, output = finish(command(recipe, "name=killed", halved, "stages[0].steps=5"))
    assert code == 2
    assert "holds a run of another recipe (stages[0].steps: 12 there, 5 now). Give" in output
    assert "--restart" in output
    assert "Traceback" not in output


def test_a_run_that_stops_says_so_in_its_log(recipe):
    code, output = finish(command(recipe, "optimizer.lr=1e30", "stages=[{domain: a, steps: 4}]"))
    assert code == 1, output
    assert "stopped: " in output
    assert "Traceback" not in output
    last = (recipe.parent / "runs/tiny/log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    record = json.loads(last)
    assert (record["event"], record["stage"]) == ("stopped", 1)
    assert record["step"] >= 2
    assert record["reason"] in output


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.domains.a.files=[{}/empty.jsonl]"], r"empty\.jsonl"),
        (["data.domains.a.files=[{}/nofield.jsonl]"], "text_field"),
        (["data.domains.a.files=[{}/broken.jsonl]", "data.bad_lines=5"], r"broken\.jsonl:2"),
        (["data.sequence_length=64"], "over the 32 tokens"),
        (["mask.components=[qkv]"], "nothing to mask"),
        (["model.config.model_type=robberta"], "robberta"),
        (["model.config.hidden_sise=3"], "hidden_sise: roberta has no such attribute"),
    ],
)
def test_mistakes_are_found_before_training(recipe, overrides, expected):
    folder = recipe.parent
    (folder / "empty.jsonl").write_text("")
    (folder / "nofield.jsonl").write_text('{"body": "x"}\n')
    (folder / "broken.jsonl").write_text('{"text": "fine words here"}\n{"text": oops}\n' * 40)
    wrong = load_recipe(recipe, [o.format(folder) for o in overrides])
    with pytest.raises(UserError, match=expected):
        run_recipe(wrong, {}, folder / "runs", pytest.fail, pytest.fail, pytest.fail)
    # Nothing was begun, so the mended recipe takes the folder over.
    with open_run(folder / "runs" / "tiny", load_recipe(recipe), {}):
        pass


@pytest.mark.parametrize("begun", ["hft={}", "hft=null"])
def test_a_method_without_settings_belongs_to_the_recipe(recipe, begun):
    """It is an empty mapping, and its absence null."""
    folder = recipe.parent / "run"
    with open_run(folder, load_recipe(recipe, [begun]), {}):
        (folder / "stages").mkdir()
    other = load_recipe(recipe, ["hft=null" if begun == "hft={}" else "hft={}"])
    with pytest.raises(UserError, match=r"another recipe \(hft: "), open_run(folder, other, {}):
        pytest.fail("it goes on")


def test_what_a_stage_read_and_left_out_is_reported(recipe):
    with gzip.open(recipe.parent / "a.jsonl.gz", "at") as file:
        file.write("{broken\n")
    code, output = finish(command(recipe, "stages=[{domain: [a, b], steps: 12}]"))
    assert code == 0, output
    assert "a: skipped 1 broken rows" in output
    assert "a.jsonl.gz:81" in output
    records = [json.loads(line) for line in (recipe.parent / "runs/tiny/log.jsonl").open()]
    (unread,) = [r["unread"] for r in records if r["event"] == "stage"]
    said = [f"{u['documents']} of {n} ({u['tokens']} tokens)" for n, u in unread.items()]
    assert said
    assert f"whose rest is not read: {', '.join(said)}" in output
    corpora = {r["domain"]: r for r in records if r["event"] == "corpus"}
    assert {n: c["left_out"]["broken"] for n, c in corpora.items()} == {"a": 1, "b": 0}
    for record in [r for r in records if r["event"] == "step"]:
        parts = record["domains"].values()
        total = sum((d["loss"] or 0) * d["predicted"] for d in parts)
        assert record["loss"] == pytest.approx(total / sum(d["predicted"] for d in parts))
    page = (recipe.parent / "runs/tiny/report/index.html").read_text()
    assert "Domains of the stages" in page
    assert "Corpora" in page


def test_a_run_folder_in_use_is_refused(recipe):
    folder = recipe.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        code, output = finish(command(recipe))
    assert code == 2
    assert "is in use by another process" in output


def test_a_dry_run_says_what_would_happen_and_does_nothing(recipe):
    code, output = finish(command(recipe, "--dry-run"))
    assert code == 0, output
    for part in ("criterion output, T = 0.7", "12 steps, 3,072 tokens", "memory per rank"):
        assert part in output
    assert not (recipe.parent / "runs").exists()


def test_publishing_is_all_or_nothing(tmp_path):
    target = tmp_path / "checkpoint"

    def write(folder):
        (folder / "weights").write_bytes(b"1" * 1000)

    publish(target, write, {"stage": 1})
    verify(target)

    def fill_the_disk(folder):
        (folder / "weights").write_bytes(b"2" * 1000)
        with open("/dev/full", "wb") as file:  # every write to it ends with ENOSPC
            file.write(b"3" * 100_000)

    with pytest.raises(UserError, match="No space left on device"):
        publish(target, fill_the_disk, {})
    verify(target)  # the old one is whole
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    (target / "weights").write_bytes(b"4")
    with pytest.raises(UserError, match="differs from its SHA-256"):
        verify(target)
    with pytest.raises(UserError, match="Free some space"):
        require_space(tmp_path, 10**18)


def test_what_a_stage_has_on_the_disk_needs_no_more_space(tmp_path, monkeypatch):
    """A disk that its checkpoints fill is no reason not to go on from them."""
    run = Run(tmp_path, load_recipe(tiny_recipe(tmp_path)), {}, None, None, None, None)
    engine = SimpleNamespace(module=torch.nn.Linear(100, 100, bias=False))
    plan = SimpleNamespace(steps=12, pauses=lambda every: {})
    needed = 10_000 * (4 + 12 * 3)  # what is published; two checkpoints and the next one
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1000))
    with pytest.raises(UserError, match="Free some space"):
        _require_space(run, engine, 1, plan)
    (stage_resume(run, 1) / "step-000006").mkdir(parents=True)
    (stage_resume(run, 1) / "step-000006/rank-00000.safetensors").write_bytes(bytes(1000))
    _require_space(run, engine, 1, plan)
