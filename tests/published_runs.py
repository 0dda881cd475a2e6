"""Runs that published and evaluated nothing, for `report.py due`, and an evaluator that takes no
time."""

import json
from pathlib import Path

import eval.due.due
import eval.due.evaluate
import eval.due.notify
from eval.due.notify import Notify
from pipeline.checkpoint import publish, replace_file

# Stands for launch/evaluate.py: does what the file `behave` beside the checkpoint says.
EVALUATOR = """
import json, shutil, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
checkpoint, output = Path(given["--checkpoint"]), Path(given["--output"])
behave = checkpoint.parent / "behave"
what = behave.read_text() if behave.exists() else ""
with open("started.txt", "a") as file:
    file.write(str(checkpoint) + "\\n")
if what == "fail":
    sys.exit("error: could not be measured:\\n  heldout: out of luck")
if what == "slow":
    time.sleep(60)
if what == "delete":
    shutil.rmtree(checkpoint)
loss = 5 - len(checkpoint.parts[-2]) / 10
domains = {d: {"loss": loss, "stderr": 0.01} for d in "ab"}
(output / "eval.json").write_text(json.dumps({"domains": domains}))
"""
RECIPE = """
name: {name}
model: {{path: models/base, objective: causal}}
data: {{domains: {{a: {{files: [a.jsonl]}}, b: {{files: [b.jsonl]}}}}}}
stages: [{{domain: a, steps: 3}}, {{domain: b, steps: 3}}]
"""


def working_directory(folder, monkeypatch):
    """The folder of the runs, below one that becomes the working directory."""
    monkeypatch.chdir(folder)
    Path("evaluator.py").write_text(EVALUATOR)
    monkeypatch.setattr(eval.due.evaluate, "SCRIPT", folder / "evaluator.py")
    monkeypatch.setattr(eval.due.notify, "PAUSE", 0.01)
    monkeypatch.setattr(eval.due.due, "write_report", page_of)
    for name in "ab":
        Path(f"{name}.jsonl").write_text('{"text": "words"}\n')
    Path("runs").mkdir()
    Path("models").mkdir()
    return Path("runs")


def published_run(root, name="run", stages=("01_a", "02_b")):
    """A run that published and evaluated nothing."""
    folder = root / name
    (folder / "stages").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(name=name))
    publish(folder / "heldout", lambda f: (f / "a.txt").write_text("text"), {})
    for stage in stages:
        write = weights_of(f"{name} {stage}")
        publish(folder / "stages" / stage / "checkpoint", write, {"stage": int(stage[:2])})
    return folder


def page_of(run):
    """In place of the report, whose figures take a second."""
    (run / "report").mkdir(exist_ok=True)
    replace_file(run / "report" / "index.html", "<html></html>\n")


def weights_of(text):
    return lambda folder: (folder / "model.safetensors").write_text(text)


def started():
    path = Path("started.txt")
    return path.read_text().splitlines() if path.exists() else []


def index(root):
    return {run["folder"]: run for run in json.loads((root / "index.json").read_text())["runs"]}


def told(path="told.jsonl"):
    """The events that the command got, by kind."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    found = [json.loads(line) for line in lines if line]
    return [event for message in found for event in message.get("events", [message])]


TELL = ["sh", "-c", "cat >> told.jsonl; echo >> told.jsonl"]
NOTIFY = Notify(command=TELL)
