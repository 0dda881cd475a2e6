"""A disk that is full, or reports errors, leaves what was there before whole."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.measure.results import write_json
from pipeline import heartbeat
from pipeline.checkpoint import publish, verify
from pipeline.errors import TrainingStopped, UserError, advice
from pipeline.progress import EventLog, half_line
from pipeline.ranks import gather, meet, rank
from pipeline.recipe import Resume
from pipeline.run.resume import Attempt
from pipeline.run.saver import newest
from pipeline.run.stage_state import StageState
from pipeline.shard import MOMENTS, Shard, StateShard
from tests.spawn import run_ranks

ROOT = Path(__file__).resolve().parents[2]


def test_a_full_disk_leaves_the_result_of_an_evaluation_as_it_was(tmp_path):
    result = tmp_path / "eval.json"
    write_json(result, {"loss": 1.0})
    full = tmp_path / f".eval.json.{os.getpid()}.tmp"
    full.symlink_to("/dev/full")  # every write to it ends with ENOSPC
    with pytest.raises(OSError, match="No space left") as caught:
        write_json(result, {"loss": 2.0})
    assert advice(caught.value) == "Free some space"
    assert json.loads(result.read_text()) == {"loss": 1.0}
    write_json(result, {"loss": 3.0})  # there is space again: nothing is in its way
    assert json.loads(result.read_text()) == {"loss": 3.0}


class OneWeight:
    """As much of an engine as a resume checkpoint needs, and of data."""

    def __init__(self):
        self.weight = torch.zeros(30_000)  # a checkpoint has 360 kB
        self._moments = {name: torch.zeros_like(self.weight) for name in MOMENTS}
        self._adam = {"step": 0}

    def state_shards(self):
        master = Shard("weight", self.weight, 0, tuple(self.weight.shape))
        return [StateShard(master, self._moments, self._adam)]

    def loss_scale(self):
        return {}

    state_dict = loss_scale

    def load_loss_scale(self, state):
        assert state == {}

    load_state_dict = load_loss_scale

    def state_changed(self):
        pass


def save_three(folder, policy):
    """Save behind each of three steps; what is whole then, its weights, and the message."""
    one, message = OneWeight(), None
    attempt = Attempt(folder, Resume(1, None, keep=1, on_error=policy), StageState(one, one), 9)
    try:
        for step in range(1, 4):
            one.weight.fill_(step)
            attempt.after_step(step)
            attempt.finish()
    except UserError as error:
        message = str(error)
    again = OneWeight()
    step = StageState(again, again).load(newest(folder))
    there = [p.name for p in folder.iterdir()]
    return step, there, again.weight.unique().tolist(), message


SMALL_DISK = 'mount -t tmpfs -o size=600k none "$0" && exec "$@"'  # in the sight of this alone
SAVES = """
import json, shutil, sys
from pathlib import Path
from tests.faults.test_disk import save_three
for policy in ("go_on", "stop"):
    print(json.dumps(save_three(folder := Path(sys.argv[1]) / policy, policy)))
    shutil.rmtree(folder)
"""


def test_a_full_disk_costs_no_checkpoint_and_the_recipe_says_what_then(tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK]
    done = subprocess.run(
        [*namespace, str(tmp_path), sys.executable, "-c", SAVES, str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no disk of its own for a test here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    said, (go_on, stop) = [], ([], [])
    for line in done.stdout.splitlines():
        said.append(line) if line[0] != "[" else (stop if go_on else go_on).extend(json.loads(line))
    assert go_on == [1, ["step-000001"], [1.0], None]
    assert stop[:3] == go_on[:3]
    for message in (*said, stop[3]):
        assert "no resume checkpoint was written: rank 0: " in message
        assert "No space left on device" in message
    assert len(said) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, code):
    target = tmp_path / "checkpoint"

    def write(folder):
        (folder / "weights").write_bytes(b"1" * 1000)

    def fails(folder):
        (folder / "weights").write_bytes(b"2" * 500)
        raise OSError(code, os.strerror(code))

    publish(target, write, {"stage": 1})
    with pytest.raises(UserError, match=os.strerror(code)) as caught:
        publish(target, fails, {"stage": 1})
    assert "run the same command again" in str(caught.value)
    verify(target)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_log_that_ends_in_half_a_line_goes_on_in_the_next(tmp_path):
    path = tmp_path / "log.jsonl"
    EventLog(path).write("step", stage=1, step=1)
    with path.open("ab") as file:
        file.write(b'{"event": "step", "stage": 1, "st')  # the disk was full
    assert half_line(path)
    EventLog(path).write("step", stage=1, step=2)
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["step"] for i in (0, 2)] == [1, 2]


def stand_still():
    """Rank 1 is stopped, until rank 0 has missed it; what they were told, and after how long."""
    heartbeat.INTERVAL, heartbeat.LIMIT = 0.1, 2.0
    pids = gather(os.getpid())
    started = time.monotonic()
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        meet()
        told = None
    except TrainingStopped as error:
        told = str(error)
    if rank() == 0:
        os.kill(pids[1], signal.SIGCONT)
    return told, time.monotonic() - started


def test_a_rank_that_stands_still_is_named_within_the_limit():
    (told, seconds), _ = run_ranks(stand_still, 2)
    assert told == "rank 1 has not been heard of for 2 seconds"
    assert seconds < 20
