"""Runs one program that nobody has read, and says whether it passes its tests (docs/sandbox.md).

A supervisor (here) starts `jail.py`, which locks itself in, and watches time and disk from
outside. Nothing else in the project executes generated code.
"""

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.sandbox import jail
from eval.sandbox.readable import Readable, interpreter, readable
from pipeline.errors import UserError

Level = Literal["bubblewrap", "landlock", "unsafe"]
STRONGEST_FIRST: tuple[Level, ...] = ("bubblewrap", "landlock")  # of what `auto` may take
STARTUP = 20.0  # seconds that a busy machine may take to start and to end the jail
WATCH = 0.05  # seconds between two looks at the scratch folder


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0  # for its definitions and all tests together
    memory_mb: int = 1024  # address space
    file_mb: int = 1  # one file in its scratch folder
    scratch_mb: int = 16  # all files there
    answer_kb: int = 1024  # one result of the tested function


@dataclass(frozen=True)
class Outcome:
    passed: bool
    reason: str  # "passed", "timed out", "AssertionError", ...
    seconds: float  # wall time, with the start of the sandbox


@dataclass(frozen=True)
class Sandbox:
    """A level of protection that works here; `probe` makes it."""

    level: Level
    description: str  # for reports, e.g. "landlock ABI 6, seccomp, rlimits"

    def run(self, program: str, function: str, tests: str, limits: Limits | None = None) -> Outcome:
        """Whether `tests` raise nothing, of a program that defines `function`.

        program: untrusted source. tests: trusted source; `function` is the program's in it, called
        with positional arguments. Arguments and results are copied as data (None, numbers, strings,
        bytes, lists, tuples, sets, dicts; arrays of numpy are not): a result that is anything else
        fails. Several threads may run programs at the same time.

        Raises:
            RuntimeError: the sandbox itself does not start.
        """
        limits = limits or Limits()
        started = time.monotonic()
        scratch = tempfile.mkdtemp(prefix="sandbox-")
        try:
            passed, reason = self._supervise(program, function, tests, limits, scratch)
        finally:
            _remove(scratch)
        return Outcome(passed, reason, round(time.monotonic() - started, 3))

    def _supervise(
        self, program: str, function: str, tests: str, limits: Limits, scratch: str
    ) -> tuple[bool, str]:
        allowed = readable()
        read, listed = allowed.by_part()
        job = {
            **vars(limits),
            "program": program,
            "function": function,
            "parent": os.getpid() if self.level != "bubblewrap" else None,
            "landlock": jail.landlock_abi() if self.level != "unsafe" else 0,  # 0: without
            "seccomp": self.level != "unsafe",
            "read": read,
            "listed": listed,
            "search": allowed.search,
        }
        unsent: bytes | None = f"{json.dumps(job)}\n{tests}".encode()
        command = [interpreter(), "-S", "-s", "-B", jail.__file__]
        if self.level == "bubblewrap":
            command = [*_bubblewrap(allowed, scratch), "--", *command]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=scratch,
            env=_environment(),
            start_new_session=True,  # also keeps Ctrl-C from it
        )
        started = time.monotonic()
        deadline = started + limits.seconds + STARTUP
        try:
            while True:
                try:
                    out, error = process.communicate(unsent, timeout=WATCH)
                    break
                except subprocess.TimeoutExpired as waiting:
                    unsent, begun = None, bool(waiting.output)
                if _used(scratch) > limits.scratch_mb << 20:
                    return False, f"wrote more than {limits.scratch_mb} MB"
                if time.monotonic() > deadline:
                    if not begun:
                        raise RuntimeError(f"not started after {deadline - started:.0f} seconds")
                    return False, "timed out"
        finally:
            _kill(process)
        first, _, verdict = out.decode().partition("\n")
        if first != "started":
            lines = error.decode(errors="replace").splitlines()
            said = "; ".join(x for x in lines if x and not x.startswith((" ", "Traceback")))
            raise RuntimeError(f"exit code {process.returncode}: {said or 'it said nothing'}")
        if not verdict:
            return False, "the tests were killed"
        result = json.loads(verdict)
        return result["passed"], result["reason"]


def probe(wanted: Literal["auto", "bubblewrap", "landlock", "unsafe"] = "auto") -> Sandbox:
    """The wanted level, after hostile programs have failed in it; `auto`: the strongest that works.

    Raises:
        UserError: no level works, or the wanted one does not.
    """
    if wanted == "unsafe":
        return Sandbox("unsafe", "UNSAFE: no protection but rlimits")
    levels = STRONGEST_FIRST if wanted == "auto" else (wanted,)
    problems = {}
    for level in levels:
        sandbox = Sandbox(level, _description(level))
        problem = _missing(level) or _breach(sandbox)
        if problem is None:
            return sandbox
        problems[level] = problem
    found = "\n".join(f"  {level}: {problem}" for level, problem in problems.items())
    raise UserError(
        f"evaluate.humaneval.sandbox: {wanted} does not work here, and generated code does not run "
        f"without protection:\n{found}\nMend one of these, or remove evaluate.humaneval. "
        "(evaluate.humaneval.sandbox=unsafe runs whatever the model writes with your rights: only "
        "in a machine that you can throw away.)"
    )


def _missing(level: Level) -> str | None:
    """What the machine lacks for a level, and what to do."""
    if sys.platform != "linux" or platform.machine() not in jail.AUDIT_ARCHITECTURES:
        return f"needs Linux on x86_64 or aarch64, not {sys.platform} on {platform.machine()}"
    if level == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed; apt-get install bubblewrap (dnf, conda: the same name)"
    if level == "landlock" and jail.landlock_abi() == 0:
        return (
            f"the kernel ({platform.release()}) has no Landlock, or it is off; it needs Linux 5.13 "
            "with CONFIG_SECURITY_LANDLOCK=y and `landlock` in the boot option lsm="
        )
    return None


def _breach(sandbox: Sandbox) -> str | None:
    """What a program can do that it must not, or why none runs; None where all is well."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listening:
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        arguments = (str(secret), listening.getsockname()[1], os.getpid())
        tests = f"done = attempts{arguments!r}\nassert not done, ', '.join(done)"
        try:
            outcome = sandbox.run(ATTEMPTS, "attempts", tests, Limits(seconds=20))
        except RuntimeError as error:
            return f"does not start: {error}"
        if not secret.exists():
            return "a program could delete a file outside"
    if outcome.passed:
        return None
    reason = outcome.reason.removeprefix("AssertionError: ")
    return reason if reason == outcome.reason else f"a program could {reason}"


# Each attempt must fail, and what comes after them, which programs need, must not.
ATTEMPTS = """
import os, socket, _thread

def attempts(secret, port, supervisor):
    def attempt(what, action):
        try:
            action()
        except (OSError, RuntimeError):
            return
        done.append(what)

    def fork():
        if os.fork() == 0:
            os._exit(0)

    done = []
    attempt("read a file outside", lambda: open(secret).read())
    attempt("write outside", lambda: open(secret + "2", "w"))
    attempt("change a file's mode", lambda: os.chmod(secret, 0o777))
    attempt("make a set-uid file", lambda: os.open("set-uid", os.O_CREAT | os.O_WRONLY, 0o4755))
    attempt("delete a file outside", lambda: os.unlink(secret))
    attempt("read another environment", lambda: open(f"/proc/{supervisor}/environ").read())
    attempt("read its own process", lambda: open("/proc/self/maps").read())
    attempt("write its own verdict", lambda: open(f"/proc/{os.getppid()}/fd/1", "w"))
    attempt("open a connection", lambda: socket.create_connection(("127.0.0.1", port)))
    attempt("make a socket", lambda: socket.socket(socket.AF_UNIX))
    attempt("start a process", fork)
    attempt("start a thread", lambda: _thread.start_new_thread(int, ()))
    attempt("signal the supervisor", lambda: os.kill(supervisor, 0))
    with open("scratch", "w") as file:
        file.write("x")
    os.unlink("scratch")
    import hashlib, random
    return done
"""


def _description(level: Level) -> str:
    """One line for the report."""
    abi = jail.landlock_abi()
    parts = [f"landlock ABI {abi}"] if abi else []
    if level == "bubblewrap" and (bwrap := shutil.which("bwrap")):
        version = subprocess.run([bwrap, "--version"], capture_output=True, text=True).stdout
        parts.insert(0, version.strip())
    return ", ".join([*parts, "seccomp", "rlimits"])


def _environment() -> dict[str, str]:
    """A fixed hash seed, so that a program which depends on the order of a set always does alike;
    one thread for numpy, since threads cannot be started."""
    kept = {k: os.environ[k] for k in ("LD_LIBRARY_PATH",) if k in os.environ}
    return kept | {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _bubblewrap(allowed: Readable, scratch: str) -> list[str]:
    """Namespaces of its own, with what it may read and its scratch folder as the only files."""
    # By its full path: the environment that it is started with has another PATH.
    command = [
        str(shutil.which("bwrap")),
        "--unshare-all",
        "--die-with-parent",
        "--cap-drop",
        "ALL",
    ]
    for path in (*allowed.whole, interpreter(), jail.__file__):
        command += ["--ro-bind", path, path]
    for path in allowed.hidden:
        command += ["--tmpfs", path]
    for path in allowed.packages:  # some lie in what is hidden
        command += ["--ro-bind", path, path]
    for path in allowed.hidden:
        command += ["--remount-ro", path]
    for device in ("/dev/null", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    return [*command, "--bind", scratch, scratch, "--remount-ro", "/", "--chdir", scratch]


def _used(folder: str) -> int:
    """Bytes on disk, each file at least a block. The jail lets no folders be made."""
    used = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                used += max(4096, entry.stat(follow_symlinks=False).st_blocks * 512)
            except FileNotFoundError:
                continue
    return used


def _remove(scratch: str) -> None:
    """Delete the folder. The program dies with the tests, a moment later on a busy machine, and may
    write until then."""
    for _ in range(100):
        shutil.rmtree(scratch, ignore_errors=True)
        if not os.path.exists(scratch):
            return
        time.sleep(0.05)


def _kill(process: "subprocess.Popen[Any]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
