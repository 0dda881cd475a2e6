"""The process group of a run: joined, guarded, and never outliving its launcher."""

import logging
import os
import threading
import time
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
import transformers

from pipeline import heartbeat
from pipeline.errors import UserError

# Of a collective. What may take longer (rank 0's own work, evaluations) waits by heartbeat.
TIMEOUT = timedelta(hours=1)


def start_distributed() -> None:
    """Join the launcher's process group; without a launcher, make one of a single rank.

    Raises:
        UserError: the launcher's port is in use.
    """
    deepspeed.utils.logger.setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    launched = "RANK" in os.environ
    if not launched:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"
        )
    if deepspeed.get_accelerator().device_name() == "cpu":
        # The op is compiled for two minutes at the first start and used by inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():  # before the first collective: NCCL takes the current device
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if dist.is_initialized():
        return
    if launched:
        _check_store()
        _end_with_launcher()
    else:  # without a port, which anybody could reach
        backend = deepspeed.get_accelerator().communication_backend_name()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        deepspeed.init_distributed(verbose=False, timeout=TIMEOUT)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
            raise
        raise UserError(
            f"port {os.environ.get('MASTER_PORT')} is in use, by another run or by what a killed "
            "one has left. Wait for it, or give this run another port: --master_port before the "
            "script's name, e.g. deepspeed --master_port 29511 launch/cpt.py ..."
        ) from None
    heartbeat.start()


def _check_store() -> None:
    """Raises UserError where torchrun would let its next attempt meet in the store of this one."""
    starts_again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if starts_again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts: ranks that are started again would find what those before "
            "have left in torchrun's own store, and end. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "in its environment and give it --rdzv-backend c10d --rdzv-endpoint HOST:PORT, so that "
            "each attempt has a store of its own; or leave --max-restarts out"
        )


def leave_group() -> None:
    """At the end of a program that went well: NCCL warns where its groups are not closed."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.destroy_process_group()


def _end_with_launcher() -> None:
    """End this rank when its launcher is gone (kill -9), so that its port is free again.

    DeepSpeed's launcher is two processes: the one that the user has started waits for the one that
    has started the ranks.
    """
    parent = os.getppid()
    launchers = [parent]
    if "deepspeed.launcher" in _command(parent) and "deepspeed" in _command(_parent(parent)):
        launchers.append(_parent(parent))
    started = {p: _started(p) for p in launchers}
    if None in started.values():
        return  # no /proc here

    def watch() -> None:
        while all(_started(p) == since for p, since in started.items()):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _stat(process: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the command's name: state, parent, ..."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _started(process: int) -> str | None:
    """When, in ticks since the boot; None where it does not run."""
    fields = _stat(process)
    return fields[19] if fields and fields[0] not in "ZX" else None


def _parent(process: int) -> int:
    fields = _stat(process)
    return int(fields[1]) if fields else 0


def _command(process: int) -> str:
    try:
        with open(f"/proc/{process}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
