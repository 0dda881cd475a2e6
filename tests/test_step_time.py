"""The benchmark of a step runs, in every mode, and writes what others read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.speed import peak_of

ROOT = Path(__file__).resolve().parent.parent


def test_it_measures_every_mode_in_turn(tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/step_time.py", "--shape", "tiny", "--pairs", "2",
               "--json", str(result)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text(encoding="utf-8"))
    baseline = json.loads((ROOT / "benchmarks/baselines/tiny.json").read_text(encoding="utf-8"))
    assert found.keys() == baseline.keys()
    assert found["seconds"].keys() == baseline["seconds"].keys()
    for name in ("ft_vs_trainer", "exact_vs_ft", "row_sparse_vs_ft", "rows_per_stage_vs_ft"):
        low, high = found[f"{name}_spread"]
        assert 0 < low <= found[name] <= high, name
        assert 0.1 < found[name] / baseline[name] < 10, name  # of milliseconds on a busy machine
        assert name in done.stdout


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10G", 70),
        ("NVIDIA RTX A4000", None), ("NVIDIA GeForce RTX 4090", 165), ("Tesla T4", 65),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_that_of_its_whole_name(gpu, peak):
    assert peak_of(gpu) == peak
