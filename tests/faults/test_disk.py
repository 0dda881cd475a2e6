"""A disk that is full, or reports errors, leaves what was there before whole."""

import errno
import json
import os
import signal
import time

import pytest

from eval.measure.results import write_json
from pipeline import heartbeat
from pipeline.checkpoint import publish, verify
from pipeline.errors import TrainingStopped, UserError, advice
from pipeline.progress import EventLog, half_line
from pipeline.ranks import gather, meet, rank
from tests.spawn import run_ranks


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
