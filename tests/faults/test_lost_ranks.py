"""A rank that ends, or a node that is gone: what the others do."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.errors import UserError
from tests.spawn import PRELOADED, free_port
from tests.test_run import tiny_recipe

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))
ROOT = Path(__file__).resolve().parents[2]


def one_cannot_go_on(rank, who, error, port):
    """The process of a rank of two, of which `who` has an error while the other waits for it in a
    collective."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    from pipeline import heartbeat
    from pipeline.engine.distributed import start_distributed
    from pipeline.ranks import gather
    from pipeline.run.cli import run_command

    heartbeat.INTERVAL = 0.2

    def run():
        start_distributed()
        gather(None)
        if rank == who:
            raise error
        gather(None)

    run_command(run)


@pytest.mark.parametrize(
    ("who", "error", "code"),
    [(0, UserError("the disk is full"), 2), (1, UserError("the disk is full"), 2),
     (0, ZeroDivisionError("0 / 0"), 1), (1, MemoryError(), 1)],
)  # fmt: skip
def test_all_ranks_end_with_the_code_of_the_one_that_has_said_why(who, error, code):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    ranks = [context.Process(target=one_cannot_go_on, args=(r, who, error, port)) for r in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [code, code]


ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.mark.skipif(not EVERYTHING, reason="RUN_EVERYTHING=1: a run is started three times")
def test_ranks_that_are_started_again_go_on(tmp_path):
    """Two of them, one of which dies: the next attempt must not meet where this one has."""
    recipe = tiny_recipe(tmp_path)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts",
        "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}",
        "--local-addr", "127.0.0.1", "launch/cpt.py", "--recipe", str(recipe), "--runs",
        str(tmp_path / "runs"), "stages=[{domain: a, steps: 60}]", "resume={steps: 5}",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stdout + done.stderr
    run = subprocess.Popen(
        command, cwd=ROOT, env=env | ELASTIC, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not list((tmp_path / "runs/tiny").glob("stages/01_a/resume/step-*")):
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.1)
        ranks = [p for p in psutil.Process(run.pid).children() if "launch/cpt.py" in p.cmdline()]
        ranks[1].kill()
        output, _ = run.communicate(timeout=300)
    finally:
        end(run)
    assert run.returncode == 0, output
    assert "goes on behind step" in output


def agent(recipe, port, *overrides):
    """The launcher of a node with one rank, of a run that goes on with one node or two."""
    # How soon a node is missed, and how long others are waited for.
    waits = "keep_alive_interval=1,keep_alive_max_attempt=2,last_call_timeout=2,join_timeout=60"
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
         "--max-restarts", "9", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
         "--rdzv-id", "elastic", "--rdzv-conf", waits, "--local-addr", "127.0.0.1",
         "launch/cpt.py", "--recipe", str(recipe), "--runs", str(recipe.parent / "runs"),
         *overrides],
        cwd=ROOT, env={**os.environ, **ELASTIC, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def end(launcher):
    """Kill a launcher and its ranks, as if the power had gone."""
    if launcher.poll() is None:
        node = psutil.Process(launcher.pid)
        for process in (node, *node.children(recursive=True)):
            process.kill()
        launcher.wait()


@pytest.mark.skipif(not EVERYTHING, reason="RUN_EVERYTHING=1: two launchers, and their patience")
def test_a_run_goes_on_with_the_node_that_is_left(tmp_path):
    recipe, port = tiny_recipe(tmp_path), free_port()
    overrides = ["stages=[{domain: a, steps: 100}]", "resume={steps: 5}"]
    first = agent(recipe, port, *overrides)  # it has the place where they meet
    time.sleep(2)
    second = agent(recipe, port, *overrides)
    folder = tmp_path / "runs/tiny"
    try:
        deadline = time.monotonic() + 200
        while not list(folder.glob("stages/01_a/resume/step-*")):
            assert time.monotonic() < deadline
            assert (first.poll(), second.poll()) == (None, None)
            time.sleep(0.1)
        [saved, *_] = folder.glob("stages/01_a/resume/step-*")
        assert len(list(saved.glob("rank-*.json"))) == 2
        end(second)
        output, _ = first.communicate(timeout=300)
    finally:
        end(first)
        end(second)
    assert first.returncode == 0, output
    assert "goes on behind step" in output
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if r["event"] == "step"]
    assert steps[-1] == 100
    assert sorted(set(steps)) == list(range(1, 101))
