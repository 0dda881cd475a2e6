"""A run that is killed, asked to end, or goes on with other ranks, is the run that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline import signals
from pipeline.errors import RETRY
from tests.faults.attempts import Scene, attempt, end, kill, start
from tests.spawn import free_port
from tests.test_run import tiny_recipe

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))
ROOT = Path(__file__).resolve().parents[2]
# Dropout is drawn by rank; a small eps would make steps of the rounding of gradients of nearly 0.
EXACT = ["model.config.hidden_dropout_prob=0.0", "model.config.attention_probs_dropout_prob=0.0",
         "optimizer.eps=1.0e-4", "seed=4294967295"]  # fmt: skip
# Where an attempt is ended by a signal to rank 0, and by which.
PLACES = {"saving": signal.SIGUSR1, "measuring": signal.SIGTERM}
if EVERYTHING:
    PLACES |= {"preparing": signal.SIGUSR1, "step": signal.SIGINT, "publishing": signal.SIGTERM}
# Ranks, engine, sequences of a micro-batch, the last step.
HOPS = ((2, "zero2", 6, (1, 4)), (1, "zero3", 4, (1, 7)), (3, "fsdp", 2, (2, 5)),
        (2, "zero1", 6, None))  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def unbroken(recipe):
    """A run of two ranks that nothing interrupts."""
    scene = Scene(recipe, recipe.parent / "unbroken", EXACT)
    assert attempt(scene, 2) == [0, 0], output(scene)
    return scene


def output(scene):
    return (scene.notes / "output.txt").read_text()[-4000:]


def weights(scene):
    stages = scene.folder / "stages"
    return {
        str(p.parent.relative_to(stages)): torch.load(p) for p in sorted(stages.rglob("weights.pt"))
    }


def tokens(scene):
    """Trained on, by stage."""
    records = map(json.loads, (scene.folder / "log.jsonl").read_text().splitlines())
    return {r["stage"]: r["tokens"] for r in records if r["event"] == "stage"}


def same(scene, other, tolerance):
    """The same documents in the same places, the same masks, the same weights and evaluations."""
    assert tokens(scene) == tokens(other)
    for what in ("row", "mask"):
        assert scene.steps(what) == other.steps(what), what
    got, expected = weights(scene), weights(other)
    assert list(got) == list(expected)
    assert "01_a/step-000005" in got
    for place, named in expected.items():
        difference = max(float((got[place][n] - w).abs().max()) for n, w in named.items())
        assert difference <= tolerance, place
    if tolerance == 0.0:
        assert scene.measured() == other.measured()
    assert not list(scene.folder.rglob("resume")), "nothing is left to go on from"


def killed(scene, moments):
    """Kill an attempt at a random moment; whether it did not end before."""
    processes = start(scene)
    log, lines = scene.folder / "log.jsonl", moments.randrange(2, 32)
    while processes[0].is_alive() and not (log.exists() and log.read_text().count("\n") >= lines):
        time.sleep(0.01)
    processes[0].join(moments.uniform(0, 0.2))
    kill(processes)
    return end(processes) == [-signal.SIGKILL]


def test_killed_at_random_moments_it_ends_with_the_same_bits(recipe):
    whole = Scene(recipe, recipe.parent / "whole")
    assert attempt(whole) == [0], output(whole)
    moments = random.Random(0)
    kills = runs = 0
    while kills < (50 if EVERYTHING else 2):
        runs += 1
        scene = Scene(recipe, recipe.parent / f"killed-{runs}")
        for _ in range(5):
            kills += killed(scene, moments)
            if not EVERYTHING and kills == 2:
                break
        assert attempt(scene) == [0], output(scene)
        same(scene, whole, 0.0)


def send(wanted, place, stage, step):
    """Send its signal to this process there: before there is a stage, or in the first one behind
    its first steps."""
    there = stage == 0 if wanted == "preparing" else stage == 1 and step >= 4
    if place == wanted and there and not os.environ.get("SENT"):
        os.environ["SENT"] = "1"
        os.kill(os.getpid(), PLACES[place])
        time.sleep(0.2)  # it is heard by a thread


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_to_one_rank_ends_all_and_the_run_goes_on(place, unbroken):
    scene = Scene(unbroken.recipe, unbroken.recipe.parent / place, EXACT)
    assert attempt(scene, 2, act=partial(send, place)) == [RETRY, RETRY], output(scene)
    text = (scene.notes / "output.txt").read_text()
    assert "Traceback" not in text
    assert f"interrupted ({PLACES[place].name}); run the same command again to continue" in text
    saved = list(scene.folder.glob("stages/01_a/resume/step-*"))
    assert saved or place in ("preparing", "publishing")
    assert attempt(scene, 2) == [0, 0], output(scene)
    same(scene, unbroken, 0.0)


def stop(wanted, place, stage, step):
    if place == "step" and (stage, step) == wanted:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)


def test_ranks_and_engines_change_in_the_middle_of_stages(unbroken):
    scene = Scene(unbroken.recipe, unbroken.recipe.parent / "changing", EXACT)
    for ranks, engine, size, last in HOPS:
        scene.overrides = [*EXACT, f"train.micro_batch_size={size}"]
        codes = attempt(scene, ranks, engine, partial(stop, last) if last else None)
        assert codes == [RETRY if last else 0] * ranks, output(scene)
    text = (scene.notes / "output.txt").read_text()
    assert [f"goes on behind step {step}" in text for step in (4, 7, 5)] == [True] * 3
    same(scene, unbroken, 1e-6)


def test_a_signal_while_ranks_are_waited_for_asks_for_another_start(recipe):
    waiting = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "launch/cpt.py", "--recipe", str(recipe)], cwd=ROOT, env=waiting,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    status = Path(f"/proc/{process.pid}/status")
    sigterm = 1 << (signal.SIGTERM - 1)
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & sigterm:
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == RETRY, errors


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from pipeline import signals
with signals.listening(float(sys.argv[1])):
    signals.be_careful()
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_grace_period_and_a_second_signal_end_at_once(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(SCRIPT.format(root=str(ROOT)), encoding="utf-8")
    for grace, again, said in (("1", False, "grace period is over"), ("50", True, "second time")):
        process = subprocess.Popen(
            [sys.executable, str(script), grace], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        if again:
            time.sleep(signals.SAME_WISH + 0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == RETRY
        assert said in errors
