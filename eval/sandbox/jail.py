"""Runs inside the sandbox (docs/sandbox.md): the tests in one process, the program in another.

Started by `eval/sandbox/sandbox.py` as a script, with the standard library only. It gives up rights
for good and forks. The child, with no system calls left but those of plain computing, executes the
program; the parent executes the tests, where the tested function is a stand-in that sends its
arguments to the child and gets the result back as data. The tests and the verdict exist only in
the parent, hence a program can pass by returning the right values, and in no other way.

stdin: a line of JSON (the job), then the source of the tests. stdout: the line `started`, then the
verdict as a line of JSON, `{"passed": bool, "reason": str}`.
"""

import ctypes
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

# System calls that stay allowed, with their numbers on x86_64 and aarch64 (None: it has no such
# call). Whatever is not named is refused: processes and threads, sockets, signals, tracing, other
# processes, limits, owners and modes, links, folders, mounts, keys, and calls yet to be invented.
SYSTEM_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "dup2": (33, None), "nanosleep": (35, 101), "getpid": (39, 172),
    "exit": (60, 93), "uname": (63, 160), "ftruncate": (77, 46), "getcwd": (79, 17),
    "rename": (82, None), "unlink": (87, None), "readlink": (89, None), "gettimeofday": (96, 169),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173),
    "sigaltstack": (131, 132), "arch_prctl": (158, None), "gettid": (186, 178),
    "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79),
    "unlinkat": (263, 35), "renameat": (264, 38), "readlinkat": (267, 78), "faccessat": (269, 48),
    "pselect6": (270, 72), "ppoll": (271, 73), "dup3": (292, 24), "renameat2": (316, 276),
    "getrandom": (318, 278), "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
# Allowed for some arguments only; ioctl never, as if no file were a terminal.
OPENAT, FCNTL, IOCTL = (257, 56), (72, 25), (16, 29)
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)  # duplicate and flags; not owners of signals, nor leases
O_CREATES = os.O_CREAT | (os.O_TMPFILE & ~os.O_DIRECTORY)  # only then openat has a mode
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Landlock's rights on files (linux/landlock.h) and the calls, which all architectures number alike.
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1 << bit for bit in (1, 2, 3, 5, 8, 14)
)
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

CALLS, ANSWERS = 20, 21  # the child's only file descriptors beside 0 to 2, which are /dev/null

libc = ctypes.CDLL(None, use_errno=True)


class ProgramError(Exception):
    """The program raised, ended, or gave something that is no answer."""


# --- giving up rights ---


def system_call(number: int, *arguments: Any) -> int:
    """Raises OSError where the call fails."""
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def landlock_abi() -> int:
    """Version of the kernel's Landlock; 0 where it has none."""
    abi = libc.syscall(ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), 1)
    return max(0, abi)


def die_with_parent(parent: int | None) -> None:
    """Be killed when the parent ends, and now if it already has (parent: its process id, or None
    where that has no meaning)."""
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def set_limits(seconds: float, memory_mb: int, file_mb: int) -> None:
    """Of each process; a process cannot raise them again."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_FSIZE, file_mb << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def restrict_files(job: dict[str, Any]) -> None:
    """Landlock, if the job has it: `read` (files, or folders with all below) can be read, `listed`
    only be listed, and files be made, written and removed in the working directory. Nothing else
    can be opened, also not by root, and processes outside this one's domain cannot be traced or
    looked into."""
    abi = job["landlock"]
    if not abi:
        return
    handled = (1 << 13) - 1
    handled |= sum(1 << bit for bit, since in ((13, 2), (14, 3), (15, 5)) if abi >= since)
    network = 3 if abi >= 4 else 0  # bind and connect
    scope = 3 if abi >= 6 else 0  # signals and abstract sockets of processes outside
    attributes = struct.pack("QQQ", handled, network, scope)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = system_call(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)

    def allow(path: str, rights: int) -> None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not there, or not for this user
            return
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE
        rule = struct.pack("=Qi", rights & handled, descriptor)
        system_call(LANDLOCK_ADD_RULE, rules, 1, rule, 0)
        os.close(descriptor)

    for path in job["read"]:
        allow(path, READ_FILE | READ_DIR)
    for path in job["listed"]:
        allow(path, READ_DIR)
    allow(os.getcwd(), READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | MAKE_REG | REMOVE_FILE)
    allow("/dev/null", READ_FILE | WRITE_FILE)
    system_call(LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def restrict_system_calls() -> None:
    """seccomp: only `SYSTEM_CALLS` from here on, in this process; the others fail with EPERM."""
    machine = os.uname().machine
    column = list(AUDIT_ARCHITECTURES).index(machine)
    load, equal, mask, give = 0x20, 0x15, 0x54, 0x06
    allow, refuse, no_terminal, kill = 0x7FFF0000, 0x00050001, 0x00050019, 0x80000000
    code: list[tuple[int, int, int, int]] = []  # (operation, skip if true, skip if false, operand)

    def verdict_if(value: int, verdict: int) -> None:
        code.extend([(equal, 0, 1, value), (give, 0, 0, verdict)])

    # Offsets into struct seccomp_data: number 0, architecture 4, low half of argument i 16 + 8 i.
    code += [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCHITECTURES[machine]), (give, 0, 0, kill)]
    code += [(load, 0, 0, 0)]
    for numbers in SYSTEM_CALLS.values():
        if (number := numbers[column]) is not None:
            verdict_if(number, allow)
    verdict_if(IOCTL[column], no_terminal)
    # Landlock before ABI 3 lets a file be emptied by opening it with O_TRUNC but not for writing.
    # A new file is never set-uid, set-gid or sticky: it may outlive the sandbox, as root's.
    code += [(equal, 0, 16, OPENAT[column]), (load, 0, 0, 32)]
    code += [(mask, 0, 0, os.O_TRUNC | os.O_ACCMODE)]
    for flags in (os.O_TRUNC, os.O_ACCMODE, os.O_TRUNC | os.O_ACCMODE):
        verdict_if(flags, refuse)
    code += [(load, 0, 0, 32), (mask, 0, 0, O_CREATES), (equal, 3, 0, 0)]
    code += [(load, 0, 0, 40), (mask, 0, 0, 0o7000), (equal, 0, 1, 0)]
    code += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code += [(equal, 1, 0, FCNTL[column]), (give, 0, 0, refuse), (load, 0, 0, 24)]
    for command in FCNTL_COMMANDS:
        verdict_if(command, allow)
    code += [(give, 0, 0, refuse)]

    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *c) for c in code))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(instructions))
    if libc.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp: " + os.strerror(ctypes.get_errno()))


# --- values between the two processes: data, never objects with code of their own ---


def encode(value: Any) -> Any:
    """What JSON can hold, with the types that it lacks as `{type: content}`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(v) for v in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item())
    raise TypeError(f"returned {type(value).__name__}, which is not plain data")


def decode(value: Any) -> Any:
    """Raises for what `encode` does not write."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "dict":
        return {decode(k): decode(v) for k, v in content}
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(v) for v in content)


def read_line(descriptor: int, pending: bytearray, deadline: float, limit: int) -> bytes:
    """One line of at most `limit` bytes; `pending` keeps what came behind it.

    Raises TimeoutError at `deadline` (time.monotonic).
    """
    while (end := pending.find(b"\n")) < 0:
        left = deadline - time.monotonic()
        wait = None if left == math.inf else left
        if left <= 0 or not select.select([descriptor], [], [], wait)[0]:
            raise TimeoutError
        part = os.read(descriptor, 1 << 16)
        if not part:
            raise ProgramError("the program ended before it answered")
        pending += part
        if len(pending) > limit:
            raise ProgramError(f"an answer is longer than {limit >> 10} kB")
    line = bytes(pending[:end])
    del pending[: end + 1]
    return line


# --- the two processes ---


def serve(program: str, function: str) -> None:
    """In the child: execute the program, then answer calls until they end."""

    def answer(content: dict[str, Any]) -> None:
        line = json.dumps(content).encode() + b"\n"
        while line:
            line = line[os.write(ANSWERS, line) :]

    answer({})  # the rights are given up
    module = types.ModuleType("program")
    sys.modules["program"] = module  # dataclasses look there
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
        tested = getattr(module, function)
    except BaseException as error:
        answer({"error": describe(error)})
        return
    answer({})
    for line in os.fdopen(CALLS, "rb"):
        try:
            result = {"value": encode(tested(*decode(json.loads(line))))}
        except BaseException as error:
            result = {"error": describe(error)}
        answer(result)


def run_tests(
    tests: str, function: str, calls: int, receive: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """In the parent: the verdict on the program that answers."""

    def ask(*arguments: Any) -> Any:
        line = json.dumps(encode(arguments)["tuple"]).encode() + b"\n"
        while line:
            line = line[os.write(calls, line) :]
        return decode(receive()["value"])

    try:
        receive()  # the program is executed
        exec(compile(tests, "<tests>", "exec"), {"__name__": "tests", function: ask})
    except TimeoutError:
        return {"passed": False, "reason": "timed out"}
    except BrokenPipeError:
        return {"passed": False, "reason": "the program ended before it answered"}
    except BaseException as error:
        return {"passed": False, "reason": describe(error)}
    return {"passed": True, "reason": "passed"}


def describe(error: BaseException) -> str:
    text = str(error)
    if not isinstance(error, ProgramError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:300]


def main() -> None:
    # Unbuffered: what follows the first line must not be in memory when the child is forked.
    stdin = os.fdopen(0, "rb", buffering=0)
    job = json.loads(stdin.readline())
    die_with_parent(job["parent"])
    set_limits(job["seconds"], job["memory_mb"], job["file_mb"])
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    restrict_files(job)
    sys.path[:] = sys.path[1:] + job["search"]  # the first entry is this script's folder
    call_pipe, answer_pipe = os.pipe(), os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            die_with_parent(parent)
            restrict_files(job)  # again: from a domain of its own it cannot look into the parent's
            null = os.open("/dev/null", os.O_RDWR)
            moves = ((null, 0), (null, 1), (call_pipe[0], CALLS), (answer_pipe[1], ANSWERS))
            for source, target in moves:
                os.dup2(source, target)
            os.closerange(3, CALLS)
            os.closerange(ANSWERS + 1, 64)
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            if job["seccomp"]:
                restrict_system_calls()
            os.dup2(0, 2)  # so far, stderr could tell what is wrong
            serve(job["program"], job["function"])
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    os.close(call_pipe[0])
    os.close(answer_pipe[1])
    deadline = math.inf  # until the program begins, the supervisor watches the time
    pending = bytearray()

    def receive() -> dict[str, Any]:
        line = read_line(answer_pipe[0], pending, deadline, job["answer_kb"] << 10)
        answer = json.loads(line)
        if "error" in answer:
            raise ProgramError(str(answer["error"])[:300])
        return answer

    receive()
    print("started", flush=True)
    deadline = time.monotonic() + job["seconds"]
    verdict = run_tests(stdin.read().decode(), job["function"], call_pipe[1], receive)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
