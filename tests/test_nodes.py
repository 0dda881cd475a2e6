"""Ranks that see different folders, and ranks that are gone: nobody waits for what cannot come."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import heartbeat, nodes, ranks
from pipeline.errors import TrainingStopped
from pipeline.nodes import first_beside, send_folder
from tests.spawn import free_port, run_ranks

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["river", "stone", "cloud", "winter", "morning", "light", "forest", "garden", "silver"]


def write_recipe(folder: Path) -> Path:
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        for i in range(80):
            text = " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(30 + i % 9))
            file.write(json.dumps({"text": f"{text} {i}"}) + "\n")
    path = folder / "tiny.yaml"
    path.write_text(
        f"""
name: tiny
model:
  config: {{model_type: roberta, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
            intermediate_size: 24, max_position_embeddings: 34}}
  train_tokenizer: 300
data:
  domains: {{a: {{files: ['{folder}/a.jsonl.gz'], heldout_fraction: 0.2}}}}
  sequence_length: 32
  heldout_sequences: 8
stages: [{{domain: a, steps: 2}}]
evaluate: {{overlap: false}}
train: {{batch_size: 8}}
""",
        encoding="utf-8",
    )
    return path


def run_on_its_own_node(recipe: Path, folder: Path) -> list[str]:
    """A whole run, where every rank has a run folder of its own; what this one's holds."""
    from eval.measure.lm import measure_in_engine
    from eval.measure.process import evaluate_in_processes
    from pipeline.engine.config import resolve_engine_config
    from pipeline.run.recipe_file import load_recipe
    from pipeline.run.run import run_recipe

    recipe_ = load_recipe(recipe)
    config = resolve_engine_config(None, recipe_, ranks.world_size(), "cpu")
    runs = folder / f"node{ranks.rank()}"
    run_recipe(recipe_, config, runs, measure_in_engine, evaluate_in_processes, lambda run: run)
    return sorted(str(p.relative_to(runs)) for p in runs.rglob("*") if p.is_file())


def test_nodes_that_share_no_folder_train_and_evaluate(tmp_path):
    first, second = run_ranks(run_on_its_own_node, 2, write_recipe(tmp_path), tmp_path)
    for name in ("00_base/eval.json", "01_a/eval.json", "01_a/checkpoint/manifest.json"):
        assert f"tiny/stages/{name}" in first
    assert not [name for name in first + second if "share-" in name or ".rank-" in name]
    assert not [name for name in second if "eval.json" in name]
    for name in ("tokenizer/tokenizer.json", "heldout/manifest.json"):  # what every rank reads
        one, two = ((tmp_path / f"node{r}/tiny" / name).read_bytes() for r in (0, 1))
        assert one == two


def see_and_send(folder: Path):
    """Ranks 0 and 1 share a folder, rank 2 has its own."""
    nodes.PIECE = 64
    mine = folder / ("far" if ranks.rank() == 2 else "near")
    if ranks.rank() == 0:
        target = mine / "sent"
        (target / "deep").mkdir(parents=True)
        (target / "manifest.json").write_text("{}", encoding="utf-8")
        (target / "deep" / "weights").write_bytes(b"0123456789" * 30)
        (target / "empty").touch()
    send_folder(mine / "sent")
    send_folder(mine / "hub/model")  # an id, or a folder that nobody may write beside
    assert not (mine / "hub").exists()
    return first_beside(mine)


def test_a_folder_is_sent_to_the_nodes_that_do_not_see_it(three):
    tmp_path, results = three
    assert [seen for seen, _ in results] == [[0, 0, 2]] * 3
    for name in ("manifest.json", "deep/weights", "empty"):
        assert (tmp_path / "far/sent" / name).read_bytes() == (
            tmp_path / "near/sent" / name
        ).read_bytes()


def wait_for_the_lost() -> list[str]:
    """Every way to wait, with rank 2 silent (its process lives: that no connection breaks)."""
    heartbeat.LIMIT = 3.0
    heart = heartbeat.mine()
    time.sleep(2 * heartbeat.INTERVAL)  # until all have been heard
    if ranks.rank() == 2:
        heart.gone = "silent"  # its thread ends
        time.sleep(12)
        return []
    said, start = [], time.monotonic()
    waits = [ranks.meet]
    if ranks.rank() == 1:
        waits += [lambda: ranks.on_rank0(lambda: None)]
    for wait in waits:
        with pytest.raises(TrainingStopped) as stopped:
            wait()
        said.append(str(stopped.value))
    assert time.monotonic() - start < 9
    time.sleep(max(0, 12 - (time.monotonic() - start)))
    return said


def see_send_and_wait(folder: Path):
    return see_and_send(folder), wait_for_the_lost()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The folder, and what each of three ranks says."""
    folder = tmp_path_factory.mktemp("nodes")
    return folder, run_ranks(see_send_and_wait, 3, folder)


def test_a_silent_rank_is_named_by_all_that_wait(three):
    (_, first), (_, second), _ = three[1]
    assert set(first + second) == {"rank 2 has not been heard of for 3 seconds"}


def fail_elsewhere(folder: Path) -> str:
    """An evaluation process of rank 1 is killed; on rank 0 it ends without a result."""
    from eval.measure import evaluator, process
    from pipeline.recipe import Data, Model, Recipe
    from pipeline.run.evaluation import Evaluation

    script = folder / "evaluate.py"
    if ranks.rank() == 0:
        script.write_text(
            "import os, sys\nif '1/2' in sys.argv: os.kill(os.getpid(), 9)\nsys.exit(3)\n",
            encoding="utf-8",
        )
    ranks.meet()
    evaluator.SCRIPT = script
    recipe = Recipe("tiny", Model(path="unused"), Data(), [])
    task = Evaluation(folder, 1, "a", "unused")
    with pytest.raises(RuntimeError) as failed:
        process.evaluate_in_processes(task, recipe, ["heldout"])
    return str(failed.value)


def test_an_evaluation_process_that_is_gone_is_named(tmp_path):
    for text in run_ranks(fail_elsewhere, 2, tmp_path):
        assert "process of rank 0 ended with exit code 3" in text
        assert "process of rank 1 was ended by SIGKILL" in text


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from pipeline.run.cli import run_command

def main():
    from pipeline import ranks
    from pipeline.engine.distributed import start_distributed
    from pipeline.errors import UserError
    start_distributed()
    if "late" in sys.argv:
        # One write: the launcher has its ranks print unbuffered, piece by piece, into one pipe.
        os.write(1, b"pid %d\\n" % os.getpid())
        time.sleep(600)
    if ranks.rank() == 1:
        raise UserError("the disk of node 1 is full")
    ranks.on_rank0(lambda: time.sleep(600))

if __name__ == "__main__":
    run_command(main)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)), encoding="utf-8")
    return path


def launch(launcher: str, script: Path, port: int, *arguments: str) -> subprocess.Popen:
    command = [str(Path(sys.executable).with_name(launcher))]
    if launcher == "deepspeed":
        command += ["--num_accelerators", "2", "--master_port", str(port)]
    else:
        command += ["--nproc_per_node", "2", "--master_port", str(port)]
    return subprocess.Popen(
        [*command, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_an_error_of_one_rank_alone_ends_the_run_and_is_printed(launcher, script):
    process = launch(launcher, script, free_port())
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (2 if launcher == "deepspeed" else 1)  # torchrun has its own
    assert "the disk of node 1 is full" in output
    assert "rank 1" in output
    # torchrun prints a table of its own; neither rank prints a traceback of this project.
    assert "pipeline/ranks.py" not in output


def test_a_port_in_use_is_said_and_a_killed_launcher_leaves_nothing(script):
    port = free_port()
    process = launch("deepspeed", script, port, "late")
    pids = []
    for line in process.stdout:
        pids += map(int, re.findall(r"pid (\d+)", line))  # ranks may share a line
        if len(pids) == 2:
            break
    assert len(pids) == 2
    second = launch("deepspeed", script, port, "late")
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"port {port} is in use" in output
    assert "--master_port" in output
    assert "Traceback" not in output
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    process.wait()
