"""Run folders as training would leave them, with invented but plausible numbers."""

import json
import math
import random
import zlib
from pathlib import Path

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
) -> Path:
    """Write one run; `evaluated` is the last evaluated stage (all of them by default), and the
    stage after it is left half trained. `heldout` names the held-out text: losses by sequence are
    then written, in which most of what makes a sequence hard is the same in all runs on it."""
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
        "stages": [{"domain": domain, "steps": steps} for domain in trained],
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
