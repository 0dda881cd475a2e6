"""What launch/cluster holds: valid for the schedulers, and a run over two nodes is the same run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.spawn import free_port

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "launch/cluster"
EVERYTHING = bool(os.environ.get("RUN_EVERYTHING"))
SHELL = sorted(CLUSTER.glob("*.sh"))


def tool(name: str) -> str:
    """A checker beside this interpreter, or on the path; the test is skipped without it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed: pip install -e '.[dev]'")
    return found


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("kubernetes*.yaml")), ids=lambda p: p.stem)
def test_kubernetes_objects_are_valid_and_safe(path):
    validate = pytest.importorskip("kubernetes_validate").validate
    pods = []
    for item in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        validate(item, "1.33", strict=True)
        spec = item["spec"].get("jobTemplate", item)["spec"]
        if "template" in spec:
            pods.append(spec["template"]["spec"])
    assert len(pods) == 1
    assert pods[0]["securityContext"]["runAsNonRoot"]
    for container in pods[0]["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        assert mounts == {"shared": "/shared", "memory": "/dev/shm"}
        assert set(mounts) == {v["name"] for v in pods[0]["volumes"]}
        files = [a for a in container["args"] if a.startswith(("launch/", "ds_configs/"))]
        assert files
        assert all((ROOT / f).is_file() for f in files)


def test_an_object_with_a_wrong_field_is_refused():
    kubernetes = pytest.importorskip("kubernetes_validate")
    (job,) = yaml.safe_load_all((CLUSTER / "kubernetes_report.yaml").read_text(encoding="utf-8"))
    job["spec"]["shedule"] = job["spec"].pop("schedule")
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(job, "1.33", strict=True)


def test_shell_scripts_are_sound():
    for path in SHELL:
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert os.access(path, os.X_OK), path
    check = [tool("shellcheck"), "-x", f"--source-path={CLUSTER}", *map(str, SHELL)]
    subprocess.run(check, check=True)


def test_the_image_is_described_without_a_complaint():
    subprocess.run([tool("hadolint"), str(ROOT / "Dockerfile")], check=True)


def test_the_image_explains_itself_runs_commands_and_knows_its_health(tmp_path):
    (tmp_path / "migu").write_text("#!/bin/sh\necho the programs\n", encoding="utf-8")
    (tmp_path / "migu").chmod(0o755)
    beside = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def entry(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [ROOT / "docker/entrypoint.sh", *command], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "PATH": beside, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    for asked in ((), ("--help",)):
        said = entry(*asked).stdout
        assert "make demo" in said
        assert "--gpus all" in said
        assert said.endswith("the programs\n")
    assert entry("sh", "-c", "exit 75").returncode == 75  # what asks to be queued again
    assert entry("health").returncode == 0


def test_the_environment_can_be_read_by_all_who_read_it():
    """DeepSpeed takes only KEY=VALUE, without comments; the shell must not expand anything."""
    lines = (CLUSTER / "environment").read_text(encoding="utf-8").splitlines()
    assert lines
    assert all(re.fullmatch(r"[A-Z_]+=[\w/^,.-]+", line) for line in lines)


def test_the_hostfile_is_one(monkeypatch):
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(CLUSTER / "hostfile")) == {"node-1": 8, "node-2": 8}


def test_the_skypilot_task_runs_what_is_there():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
    files = [w for w in shlex.split(task["run"]) if w.startswith(("launch/", "ds_configs/"))]
    assert len(files) == 3
    assert all((ROOT / f).is_file() for f in files)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


RANK = """
import json, os, signal, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
os.write(1, (json.dumps([*(os.environ[n] for n in names), sys.argv[1:]]) + "\\n").encode())
rank, codes = int(os.environ["RANK"]), os.environ["CODES"].split()
if codes[rank] == "wait":
    def save(*_):
        time.sleep(1 + rank)  # the later ones save longer
        os.write(1, b"saved ")
        os._exit(75)
    signal.signal(signal.SIGTERM, save)
    open(f"{os.environ['READY']}-{rank}", "w").close()
    time.sleep(60)
sys.exit(int(codes[rank]))
"""


@pytest.fixture
def rank(tmp_path):
    path = tmp_path / "rank.py"
    path.write_text(RANK, encoding="utf-8")
    return path


def node(rank: Path, codes: str, **variables) -> subprocess.Popen:
    environment = {
        **os.environ, "PYTHON": sys.executable, "CODES": codes, "READY": str(rank.parent / "ready"),
        **variables,
    }  # fmt: skip
    return subprocess.Popen(
        [CLUSTER / "ranks.sh", rank, "a b", "x=1"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_ranks_are_numbered_over_the_nodes(rank):
    said = []
    for i in range(2):
        where = {"NODES": "2", "NODE_RANK": str(i), "PROCESSES": "2", "MASTER_ADDR": "first"}
        output, _ = node(rank, "0 0 0 0", **where).communicate(timeout=60)
        said += [json.loads(line) for line in output.splitlines()]
    assert sorted(said) == [
        [str(r), str(r % 2), "4", "first", "29500", ["a b", "x=1"]] for r in range(4)
    ]


@pytest.mark.parametrize(("codes", "code"), [("0 0", 0), ("75 75", 75), ("75 2", 2), ("0 1", 1)])
def test_a_node_ends_with_the_code_of_its_ranks(rank, codes, code):
    process = node(rank, codes, PROCESSES="2")
    process.communicate(timeout=60)
    assert process.returncode == code


def test_a_node_waits_until_all_of_its_ranks_have_saved(rank):
    process = node(rank, "wait wait", PROCESSES="2")
    while len(list(rank.parent.glob("ready-*"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output.count("saved") == 2
    assert process.returncode == 75


def test_several_nodes_need_an_address(rank):
    process = node(rank, "0", NODES="2", PROCESSES="1", MASTER_ADDR="")
    assert "MASTER_ADDR" in process.communicate(timeout=60)[1]
    assert process.returncode == 2


OPTIONS = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "exclusive",
    "time", "signal", "requeue", "open-mode", "output",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*slurm.sh")), ids=lambda p: p.stem)
def test_slurm_sees_every_directive(path):
    """sbatch reads directives up to the first command and ignores what comes after."""
    lines = path.read_text(encoding="utf-8").splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert at
    assert max(at) < first_command
    for i in at:
        option = re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", lines[i])
        assert option, lines[i]
        assert option[1] in OPTIONS


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False), (2, False)])
def test_a_slurm_job_is_queued_again_only_where_it_has_saved(code, requeued, tmp_path):
    """With stand-ins for srun, which runs one of the tasks, and scontrol."""
    for name, text in {
        "srun": 'while [ "${1:0:2}" = -- ]; do shift; done; SLURM_PROCID=9 SLURM_LOCALID=1 "$@"',
        "scontrol": 'case $1 in show) printf "n1\\nn2\\n";; *) echo "$@" >> $REQUEUED;; esac',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        "names = 'RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT HF_HOME'.split()\n"
        "print(*(os.environ[n] for n in names), *sys.argv[2:])\n"
        "sys.exit(int(sys.argv[1]))\n",
        encoding="utf-8",
    )
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8", "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip
    job = subprocess.run(
        [CLUSTER / "slurm.sh", script, str(code), "a b"], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert job.returncode == code, job.stderr
    assert job.stdout == "9 1 16 n1 22345 /shared/cache/huggingface a b\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 12345\n"


WORDS = ["river", "stone", "cloud", "winter", "morning", "light", "forest", "garden", "silver"]
RECIPE = """
name: tiny
model:
  config: {{model_type: roberta, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
            intermediate_size: 24, max_position_embeddings: 34, hidden_dropout_prob: 0,
            attention_probs_dropout_prob: 0}}  # drawn by each rank for itself
  train_tokenizer: 300
data:
  domains: {{a: {{files: ['{folder}/a.txt'], heldout_fraction: 0.2}}}}
  sequence_length: 32
  heldout_sequences: 8
stages: [{{domain: a, steps: 3}}]
evaluate: {{overlap: false}}
optimizer: {{lr: 1.0e-3, eps: 1.0e-3}}  # with a small eps, Adam makes differences of rounding large
train: {{batch_size: 8}}
"""


@pytest.fixture
def two_nodes():
    """The names of two network namespaces, 10.77.0.1 and 10.77.0.2, that see only each other."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"migu-{os.getpid()}-{i}" for i in (1, 2)]
    links = [f"mg{os.getpid() % 10**6}x{i}" for i in (1, 2)]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        ip("netns", "add", names[1])
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            ip("link", "set", link, "netns", name, "name", "eth0")
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize("shared", [False, True] if EVERYTHING else [False])
def test_two_nodes_of_two_ranks_end_with_the_weights_of_one_process(two_nodes, shared, tmp_path):
    text = (f"{' '.join(WORDS[(i * 7 + j * j) % 9] for j in range(20))} {i}" for i in range(80))
    (tmp_path / "a.txt").write_text("\n\n".join(text), encoding="utf-8")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path), encoding="utf-8")
    command = ["launch/cpt.py", "--config", "ds_configs/zero2.json", "--recipe", str(recipe)]

    def start(name: str, prefix: list[str], **variables: str) -> subprocess.Popen:
        environment = {
            **os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
            "MIGU_PREPARED": str(tmp_path / name / "prepared"), **variables,
        }  # fmt: skip
        return subprocess.Popen(
            [*prefix, str(CLUSTER / "ranks.sh"), *command, "--runs", str(tmp_path / name)],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(process: subprocess.Popen) -> None:
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output

    nodes = [
        start(
            "shared" if shared else f"node{i}", ["ip", "netns", "exec", name], NODES="2",
            NODE_RANK=str(i), PROCESSES="2", MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME="eth0",
        )
        for i, name in enumerate(two_nodes)
    ]  # fmt: skip
    try:
        for process in nodes:
            finish(process)
    finally:
        for process in nodes:
            process.terminate()  # where the other one has failed
    finish(start("one", [], PROCESSES="1", MASTER_PORT=str(free_port())))
    weights = "tiny/stages/01_a/checkpoint/model.safetensors"
    one = load_file(tmp_path / "one" / weights)
    two = load_file(tmp_path / ("shared" if shared else "node0") / weights)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert (value - two[key]).abs().max() <= 1e-6, key
