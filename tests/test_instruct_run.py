"""Whole instruction-tuning runs through the command line: measured within and after the stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["write", "a", "function", "that", "adds", "two", "numbers", "and", "returns", "the", "sum"]


def sentence(seed: int, length: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i + i * seed) % len(WORDS)] for i in range(length))


@pytest.fixture
def recipe(tmp_path):
    rows = [
        {"instruction": sentence(i, 5), "response": sentence(i + 1, 6 + i % 5)} for i in range(150)
    ]
    rows[0]["response"] = sentence(0, 900)
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": sentence(i, 30) + f" {i}"} for i in range(80)]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""
name: tiny
model:
  config: {{model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
            intermediate_size: 24, max_position_embeddings: 600}}
  train_tokenizer: 400
  objective: causal
data:
  domains:
    code: {{files: ['{tmp_path}/code.jsonl'], instruction: {{}}, heldout_fraction: 0.2}}
    general: {{files: ['{tmp_path}/general.jsonl'], heldout_fraction: 0.2}}
  sequence_length: 300
  heldout_sequences: 6
stages: [{{domain: code, steps: 5, evaluate_every: 3}}]
optimizer: {{lr: 1.0e-3}}
train: {{batch_size: 4}}
evaluate:
  benchmarks: {{arc_challenge: {{limit: 4}}}}
  benchmark_files: {tmp_path}/benchmarks
  humaneval: {{limit: 2, max_new_tokens: 4, sandbox: unsafe}}
""")
    (tmp_path / "benchmarks").mkdir()
    return path


def write_benchmark(folder: Path) -> None:
    rows = [
        {"query": f"Question: {sentence(i, 5)}", "choices": WORDS[i : i + 4], "gold": i % 4}
        for i in range(6)
    ]
    target = folder / "benchmarks" / "arc_challenge"
    target.mkdir()
    (target / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def instruct(recipe: Path, *extra: str) -> tuple[int, str]:
    command = [sys.executable, "launch/instruct.py", "--recipe", str(recipe), "--runs",
               str(recipe.parent), *extra]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def result(folder: Path, file: str) -> dict:
    return json.loads((folder / file).read_text())


def test_a_run_is_measured_within_and_what_failed_is_retried_alone(recipe):
    code, output = instruct(recipe)  # by several ranks: test_finetune
    assert code == 2, output  # the benchmark's data is neither here nor on a hub
    assert "evaluation failed" in output
    assert "run the same command again" in output
    assert "1 longer than 300 tokens left out" in output
    run = recipe.parent / "tiny"
    stage = run / "stages" / "01_code"
    points = [run / "stages" / "00_base", stage / "step-000003", stage]
    for point in points:
        assert set(result(point, "eval.json")["domains"]) == {"code", "general"}
        assert result(point, "humaneval.json")["problems"] == 2
        assert not (point / "benchmarks.json").exists()
        assert not list(point.glob("share-*"))
    before = (stage / "checkpoint" / "model.safetensors").stat().st_mtime_ns

    write_benchmark(recipe.parent)
    code, output = instruct(recipe)
    assert code == 0, output
    assert "stage 1 code: finished before" in output
    assert (stage / "checkpoint" / "model.safetensors").stat().st_mtime_ns == before
    for point, step in zip(points, (None, 3, None), strict=True):
        measured = result(point, "benchmarks.json")
        assert measured["benchmarks"]["arc_challenge"]["documents"] == 4
        assert measured.get("step") == step
    page = (run / "report" / "index.html").read_text()
    assert "HumanEval" in page
    assert "arc_challenge" in page

    # The same stage without looking at it in between: the same weights.
    code, output = instruct(
        recipe, "name=plain", "stages=[{domain: code, steps: 5}]", "evaluate.benchmarks={}",
        "evaluate.humaneval=null",
    )  # fmt: skip
    assert code == 0, output
    plain = load_file(recipe.parent / "plain/stages/01_code/checkpoint/model.safetensors")
    looked = load_file(stage / "checkpoint/model.safetensors")
    assert all(torch.equal(plain[name], looked[name]) for name in plain)
    assert not (recipe.parent / "plain/stages/01_code/humaneval.json").exists()


def test_a_masked_model_is_refused_with_the_reason(recipe):
    code, output = instruct(
        recipe, "model.objective=masked", "model.config.model_type=roberta", "--dry-run"
    )
    assert code == 2
    assert "evaluate.humaneval: needs a causal model" in output
    assert "Traceback" not in output
