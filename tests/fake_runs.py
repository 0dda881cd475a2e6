"""Run folders as training would leave them, with invented but plausible numbers."""

import gzip
import json
import math
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml

KINDS = ("q", "k", "v", "o", "ffn_in", "ffn_out")
START = {"prose": 4.02, "math": 5.31, "python": 4.87, "cpp": 4.55}
UNIGRAM = {"prose": 6.11, "math": 6.42, "python": 6.05, "cpp": 5.88}
STARTED = "2025-03-01T10:00:00+00:00"


def fake_run(
    folder: Path,
    *,
    trained: tuple[str, ...] = ("math", "python", "cpp"),
    base: tuple[str, ...] = ("prose",),
    enabled: bool = True,
    threshold: float = 0.7,
    criterion: str = "output",
    lr: float = 1e-3,
    seed: int = 0,
    steps: int = 60,
    evaluated: int | None = None,
    unigram: bool = True,
    overlap: bool = True,
    bad_lines: int = 0,
    stderr: float = 0.02,
    heldout: str | None = None,
    replayed: str | None = None,
) -> Path:
    """Write one run; `evaluated` is the last evaluated stage (all of them by default), and the
    stage after it is left half trained. `heldout` names the held-out text: losses by sequence are
    then written, in which most of what makes a sequence hard is the same in all runs on it.
    `replayed` is a domain to which every stage gives a quarter of its tokens."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    evaluated = len(trained) if evaluated is None else evaluated
    domains = [*base, *trained]
    noise = random.Random(f"{seed} {lr} {enabled}")
    rate = 1 - math.exp(-lr / 5e-4)
    if enabled:
        rate *= 1 - 0.25 * threshold
    recipe = {
        "name": folder.name,
        "model": {"path": "base/roberta-tiny"},
        "mask": {
            "enabled": enabled,
            "threshold": threshold,
            "criterion": criterion,
            "normalize": "none",
            "rule": "exact",
            "components": None,
            "from_stage": 1,
        },
        "optimizer": {
            "lr": lr,
            "betas": [0.9, 0.98],
            "eps": 1e-6,
            "weight_decay": 0.01,
            "schedule": "linear",
            "warmup": 0.06,
        },
        "train": {"batch_size": 32, "micro_batch_size": 16},
        "data": {
            "sequence_length": 128,
            "domains": {domain: {"embedded": domain} for domain in domains},
        },
        "stages": [
            {"domain": domain, "steps": steps} | ({"replay": {replayed: 0.25}} if replayed else {})
            for domain in trained
        ],
        "seed": seed,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    environment = {
        "started": STARTED,
        "command": "deepspeed launch/cpt.py --config ds_configs/zero2.json",
        "commit": "0123abc",
        "dirty": False,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "deepspeed": "0.19.8"},
        "hardware": {"device": "cpu", "name": "generic CPU", "cores": 2, "memory_gb": 23.5},
        "ranks": 1,
        "engine": "DeepSpeed ZeRO-2",
        "precision": "fp32",
        "parameters": 2_713_088,
        "masked_linears": 24,
        "masked_rows": {"total": 5376, "kept": 1613} if enabled else None,
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=1))

    if heldout:
        (folder / "heldout").mkdir(exist_ok=True)
        manifest = {"files": {f"{domain}.safetensors": heldout for domain in domains}}
        (folder / "heldout" / "manifest.json").write_text(json.dumps(manifest))

    loss = {d: START.get(d, 5.0 + 0.1 * len(d)) for d in domains}
    log = []
    if bad_lines:
        example = {"file": "data/math.jsonl", "line": 7, "reason": "not JSON"}
        record = {"event": "bad_lines", "domain": trained[0], "count": bad_lines}
        log.append(record | {"examples": [example]})
    _write_eval(folder, 0, "base", loss, domains, unigram, overlap, noise, stderr, heldout)
    for stage, domain in enumerate(trained, start=1):
        if stage > evaluated + 1:
            break
        done = stage <= evaluated
        goal = {d: loss[d] + 0.22 * rate**2 * noise.uniform(0.6, 1.6) for d in domains}
        goal[domain] = loss[domain] - rate * noise.uniform(0.9, 1.1)
        for step in range(1, (steps if done else steps // 2) + 1):
            share = 1 - math.exp(-4 * step / steps)
            seconds = 0.21 + noise.uniform(0, 0.02) + (0.004 if enabled else 0)
            log.append(
                {
                    "event": "step",
                    "stage": stage,
                    "domain": domain,
                    "step": step,
                    "steps": steps,
                    "loss": loss[domain]
                    + (goal[domain] - loss[domain]) * share
                    + noise.gauss(0, 0.12),
                    "grad_norm": 1.2,
                    "lr": lr * (1 - step / steps),
                    "kept": 1 - threshold if enabled else 1.0,
                    "tokens": 4096,
                    "seconds": seconds,
                    "mask_seconds": 0.004 if enabled else 0.0,
                    "time": STARTED,
                }
            )
            if replayed:
                own = {"loss": log[-1]["loss"], "predicted": 460, "tokens": 3072}
                other = {"loss": START[replayed], "predicted": 150, "tokens": 1024}
                log[-1]["domains"] = {domain: own, replayed: other}
        if not done:
            break
        loss = goal
        log.append(
            {
                "event": "stage",
                "stage": stage,
                "domain": domain,
                "steps": steps,
                "tokens": 4096 * steps,
                "seconds": 0.23 * steps,
                "publish_seconds": 0.4,
                "eval_seconds": 8.1,
                "time": STARTED,
            }
        )
        _write_eval(folder, stage, domain, loss, domains, unigram, overlap, noise, stderr, heldout)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    return folder


def _write_eval(folder, stage, name, loss, domains, unigram, overlap, noise, stderr, heldout):
    values = {
        domain: {"loss": loss[domain], "stderr": stderr, "tokens": 2450, "sequences": 128}
        | ({"unigram_loss": UNIGRAM.get(domain, 6.2)} if unigram else {})
        for domain in domains
    }
    record = {
        "stage": stage,
        "name": name,
        "checkpoint": f"stages/{stage:02d}_{name}/checkpoint" if stage else None,
        "seconds": 6.2,
        "domains": values,
    }
    if overlap:
        kinds = {kind: _overlap(len(domains), stage, noise) for kind in KINDS}
        record["overlap"] = {"domains": domains, "kinds": kinds, "threshold": 0.7}
    path = folder / "stages" / f"{stage:02d}_{name}" / "eval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    if heldout:
        by_sequence = {}
        for domain in domains:
            arrays = _sequences(domain, loss[domain], stderr, heldout, noise.random())
            by_sequence |= {f"{key}/{domain}": array for key, array in arrays.items()}
        np.savez_compressed(path.with_name("sequences.npz"), **by_sequence)


def _sequences(domain, loss, stderr, heldout, run_seed, count=128):
    """Summed loss and tokens of each sequence, of about that standard error in all, a tenth of
    which is the run's own."""
    text = np.random.default_rng(zlib.crc32(f"{heldout} {domain}".encode()))
    own = np.random.default_rng(int(run_seed * 2**32))
    tokens = text.integers(15, 24, count)
    excess = stderr * math.sqrt(count) * (text.normal(size=count) + 0.1 * own.normal(size=count))
    excess -= (excess * tokens).sum() / tokens.sum()
    return {"loss": tokens * (loss + excess), "tokens": tokens}


def _overlap(size, stage, noise):
    rows = [[1.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i):
            rows[i][j] = rows[j][i] = noise.uniform(0.75, 0.92) - 0.05 * stage
    return rows


BENCHMARKS = {"hellaswag": ("acc_norm", 0.41), "arc_challenge": ("acc_norm", 0.29),
              "winogrande": ("acc", 0.52)}  # fmt: skip
UNREACHABLE = "the hub cannot be reached (ConnectionError)"
HOSTILE = "    return 1\n</code></pre><script>alert('x')</script>\n{{ 7 * 7 }} \x00\ud800\u202e"


def fake_tuning(
    folder: Path,
    *,
    trained: tuple[str, ...] = ("code",),
    epochs: float = 8,
    every: float = 2,
    limit: int | None = 100,
    problems: int = 20,
    skipped: tuple[str, ...] = (),
    sampled: bool = True,
    damage: float = 0.03,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """An instruction-tuned causal run: points within its stages, HumanEval and the benchmarks.

    `damage` is the accuracy that a stage costs the benchmarks. What makes a document hard is the
    same in all runs. Further settings are those of `fake_run`."""
    steps = 60
    settings = {"heldout": "text", "overlap": False, "base": ("prose",), **settings}
    fake_run(folder, trained=trained, steps=steps, seed=seed, **settings)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["model"] |= {"objective": "causal"}
    recipe["stages"] = [
        {"domain": d, "epochs": epochs, "evaluate_every": every, "steps": None} for d in trained
    ]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for record in log:
        if record["event"] == "stage":
            record["data"] = {"examples": 4000, "too_long": 12, "longest": 611}
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    ends = sorted(path for path in (folder / "stages").iterdir() if path.is_dir())
    own = random.Random(f"{seed} {damage}")
    for stage, end in enumerate(ends):
        for point in range(1, round(epochs / every)) if stage else ():
            progress = point * every
            inner = end / f"step-{round(steps * progress / epochs):06d}"
            inner.mkdir()
            _write_between(ends[stage - 1], end, inner, progress / epochs, own)
            _write_tasks(inner, stage - 1 + progress / epochs, progress, limit, problems, skipped,
                         sampled, damage, own)  # fmt: skip
        _write_tasks(end, float(stage), None, limit, problems, skipped, sampled, damage, own)
    return folder


def _write_between(before: Path, after: Path, folder: Path, share: float, own: random.Random):
    """Held-out losses on the way from one end of a stage to the next."""
    share = 1 - (1 - share) ** 2
    records = [json.loads((end / "eval.json").read_text()) for end in (before, after)]
    record = records[1] | {"checkpoint": None}
    arrays = [dict(np.load(end / "sequences.npz")) for end in (before, after)]
    mixed = dict(arrays[1])
    for domain, result in record["domains"].items():
        key, tokens = f"loss/{domain}", arrays[1][f"tokens/{domain}"]
        mixed[key] = (1 - share) * arrays[0][key] + share * arrays[1][key]
        mixed[key] = mixed[key] + own.gauss(0, 0.01) * tokens
        result["loss"] = float(mixed[key].sum() / tokens.sum())
    step, stage = int(folder.name[5:]), record["stage"]
    record |= {"stage": stage, "step": step}
    (folder / "eval.json").write_text(json.dumps(record))
    np.savez_compressed(folder / "sequences.npz", **mixed)


def _write_tasks(folder, trained, progress, limit, problems, skipped, sampled, damage, own):
    info = {"stage": int(folder.name[:2]) if progress is None else 1, "checkpoint": "checkpoint"}
    if progress is not None:
        info |= {"step": int(folder.name[5:]), "progress": progress}
        path = folder / "eval.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"progress": progress}))
    entries, arrays = {}, {}
    for name, (metric, start) in BENCHMARKS.items():
        if name in skipped:
            continue
        hard = np.random.default_rng(zlib.crc32(name.encode())).random(limit or 1267)
        accuracy = start - damage * trained + own.uniform(-0.01, 0.01)
        right = (hard < accuracy).astype(np.float32)
        arrays[name] = right
        value, stderr = _mean_of(right)
        entries[name] = {
            "task": name, "metric": metric, "value": value, "stderr": stderr,
            "metrics": {metric: {"value": value, "stderr": stderr}}, "shots": 0, "limit": limit,
            "documents": len(right), "version": 1.0, "source": f"hub {name}",
        }  # fmt: skip
    values = [entry["value"] for entry in entries.values()]
    errors = [entry["stderr"] for entry in entries.values()]
    record = {
        **info,
        "benchmarks": entries,
        "skipped": dict.fromkeys(skipped, UNREACHABLE),
        "average": None if skipped else sum(values) / len(values),
        "average_stderr": None if skipped else math.hypot(*errors) / len(errors),
        "lm_eval": "0.4.13",
    }
    (folder / "benchmarks.json").write_text(json.dumps(record))
    np.savez_compressed(folder / "benchmarks.npz", **arrays)

    hard = np.random.default_rng(5).random(problems)
    passed = hard < 0.05 + 0.12 * math.sqrt(trained) + own.uniform(0, 0.04)
    value, stderr = _mean_of(passed)
    record = {
        **info,
        "problems": problems, "limit": problems, "template": "none", "max_new_tokens": 512,
        "cut_off": 3, "greedy": {"pass@1": value, "stderr": stderr},
        "sandbox": {"level": "landlock", "description": "landlock ABI 6, seccomp, rlimits"},
    }  # fmt: skip
    if sampled:
        record["sampled"] = {
            "samples": 10, "temperature": 0.8, "top_p": 0.95,
            "pass@1": {"value": 0.8 * value, "stderr": stderr},
            "pass@10": {"value": min(1.0, 1.7 * value), "stderr": stderr},
        }  # fmt: skip
    (folder / "humaneval.json").write_text(json.dumps(record))
    with gzip.open(folder / "humaneval_completions.jsonl.gz", "wt") as file:
        for i, right in enumerate(passed):
            row = {"task_id": f"HumanEval/{i}", "sample": None, "passed": bool(right)}
            row |= {"completion": HOSTILE, "reason": "" if right else "AssertionError: <b>"}
            file.write(json.dumps(row) + "\n")
            if sampled:
                file.write(json.dumps(row | {"sample": 0, "completion": "sampled"}) + "\n")


def _mean_of(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def many_runs(root: Path, count: int) -> None:
    """Five kinds of runs, each many times."""
    made = [fake_run(root / f"pretrain-{i}", seed=i, enabled=i % 2 > 0, heldout="text",
                     steps=30, evaluated=1 + i % 3) for i in range(3)]  # fmt: skip
    made += [fake_tuning(root / f"tune-{i}", seed=i, trained=("code", "law"), limit=300,
                         damage=0.2 * i) for i in range(2)]  # fmt: skip
    for i in range(len(made), count):
        shutil.copytree(made[i % len(made)], root / f"{made[i % len(made)].name[:-2]}-{i}")
