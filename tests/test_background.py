"""A process ends with its own exit code, whatever its threads were doing."""

import subprocess
import sys

# Forks, since each has to load torch otherwise. Without the wait about half end with 134.
ENDINGS = """
import os, sys, time
import torch.distributed as dist
from pipeline import heartbeat

heartbeat.INTERVAL = 0
children = []
for i in range(6):
    pid = os.fork()
    if not pid:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        heartbeat.Heartbeat(store, 0, 2)
        time.sleep(0.2)
        sys.exit((0, 2, 75)[i % 3])
    children.append(pid)
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""


def test_a_heartbeat_does_not_abort_the_process_that_ends():
    done = subprocess.run([sys.executable, "-c", ENDINGS], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "2", "75"] * 2, done.stderr


PREFETCH = """
import sys, torch
from pipeline.data.batches import prefetch

def items():
    while True:
        yield torch.ones(100).cumsum(0).sum()

batches = prefetch(items(), 2)
next(batches)
sys.exit(75)
"""


def test_nor_does_what_reads_ahead():
    done = subprocess.run([sys.executable, "-c", PREFETCH], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "")
