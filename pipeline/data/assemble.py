"""Finished units put together: published as a corpus, and taken apart again where it is damaged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from pipeline.checkpoint import MANIFEST, is_published
from pipeline.data.bad_lines import EXAMPLES, BadLines
from pipeline.data.cleaning import first_places
from pipeline.data.prepared import SIDES, Side, damaged_files, describe_file
from pipeline.data.shards import Shard
from pipeline.data.work import Job
from pipeline.errors import UserError
from pipeline.progress import now, say

COUNTS = ("contaminated", "sampled_out", "without_tokens", "refused", "text_bytes")


def publish_units(job: Job, folder: Path, manifest: dict[str, Any]) -> None:
    """Rename the working folder to the corpus: readers see all of it or nothing.

    Does nothing where another process has done it, or where a unit has to be made again.
    """
    with FileLock(job.lock("publish")):
        if is_published(folder):
            return
        units = [json.loads(job.info(u).read_text(encoding="utf-8")) for u in job.units]
        damaged = [
            unit
            for unit, info in zip(job.units, units, strict=True)
            if damaged_files(job.work, _files(info), thorough=False)
        ]
        for unit in damaged:  # what an attempt that was killed left behind
            job.info(unit).unlink()
        if damaged:
            return
        bad = {
            "count": sum(u["bad"]["count"] for u in units),
            "examples": [e for u in units for e in u["bad"]["examples"]][:EXAMPLES],
            "damaged": [d for u in units for d in u["bad"]["damaged"]],
            "blank": sum(u["bad"]["blank"] for u in units),
        }
        check_bad(job, bad)
        sides = {side: _merge(job, side, units) for side in SIDES}
        merged = sorted(job.work.glob("*.npy"))
        files = {name: known for unit in units for name, known in _files(unit).items()}
        manifest = {
            **manifest,
            "sides": sides,
            "duplicates": sum(side["duplicates"] for side in sides.values()),
            **{key: sum(unit[key] for unit in units) for key in COUNTS},
            "bad": bad,
            "cores": sorted({unit["core"] for unit in units}),
            "refusal": next((u["refusal"] for u in units if u["refusal"]), ""),
            "units": units,
            "files": {**files, **{path.name: describe_file(path) for path in merged}},
            "published": now(),
        }
        path = job.work / MANIFEST
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(job.work, folder)
        for unit in job.units:  # only now: without them a unit would be made again
            (folder / job.info(unit).name).unlink()
    for lock in job.locks.parent.glob(f"{job.locks.name}.*"):
        lock.unlink(missing_ok=True)  # who still holds one finds the corpus published


def mend(job: Job, folder: Path, thorough: bool) -> None:
    """Turn a corpus with damaged files into a working folder that lacks their units."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not damaged_files(folder, manifest["files"], thorough):
        return
    job.locks.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(job.lock("publish")):
        if not is_published(folder):
            return  # another process is at it
        damaged = damaged_files(folder, manifest["files"], thorough)
        say(
            f"{job.name}: {', '.join(damaged)} in {folder} differ from the manifest: made again, "
            "the others stay"
        )
        shutil.rmtree(job.work, ignore_errors=True)
        for unit, info in zip(job.units, manifest["units"], strict=True):
            path = folder / job.info(unit).name
            path.unlink(missing_ok=True)
            if not set(_files(info)) & set(damaged):
                path.write_text(json.dumps(info), encoding="utf-8")
        os.replace(folder, job.work)
        (job.work / MANIFEST).unlink()


def check_bad(job: Job, bad: dict[str, Any]) -> None:
    """Raises UserError for more bad rows in all units than data.bad_lines allows."""
    if bad["count"] <= job.bad_lines:
        return
    lines = BadLines(job.bad_lines, bad["count"], [tuple(e) for e in bad["examples"]])
    raise UserError(
        f"data.domains.{job.name}: {bad['count']} rows cannot be read, more than data.bad_lines "
        f"({job.bad_lines}); the first are:\n{lines.listing()}\nMend the files, or raise "
        "data.bad_lines to skip such rows."
    )


def _files(unit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {s["file"]: {k: s[k] for k in ("size", "sample", "sha256")} for s in unit["shards"]}


def _merge(job: Job, side: Side, units: list[dict[str, Any]]) -> dict[str, int]:
    """Write the lengths of a side's documents and, without duplicates, their places; its counts."""

    def column(read: Callable[[Shard], np.ndarray], dtype: type, side: Side = side) -> np.ndarray:
        names = [s["file"] for unit in units for s in unit["shards"] if s["side"] == side]
        return np.concatenate([np.zeros(0, dtype), *(read(Shard(job.work / n)) for n in names)])

    lengths = column(Shard.lengths, np.int32)
    predicted = column(Shard.predicted, np.int32)
    duplicates = 0
    places = job.work / f"{side}-places.npy"
    places.unlink(missing_ok=True)
    if job.domain.deduplicate:
        digests = column(Shard.digests, np.uint64)
        kept = first_places(digests)
        if side == "train" and any(unit.side for unit in job.units):  # not split by the hash
            heldout = column(Shard.digests, np.uint64, "heldout")
            kept = kept[~np.isin(digests[kept], heldout)]
        duplicates = len(lengths) - len(kept)
        if duplicates:
            np.save(places, kept)
            lengths, predicted = lengths[kept], predicted[kept]
    np.save(job.work / f"{side}-lengths.npy", lengths)
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "predicted": int(predicted.sum(dtype=np.int64)),
        "longest": int(lengths.max(initial=0)),
        "duplicates": duplicates,
    }
