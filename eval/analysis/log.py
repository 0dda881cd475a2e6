"""`log.jsonl`: the steps of a run, the ends of its stages, and why it stopped."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from eval.analysis.files import Findings, finite

# What a record must hold, and what is a number if it is there (a loss may be NaN).
NEEDED = {
    "step": ("stage", "step"),
    "begin": ("stage", "step"),
    "target": ("stage", "step"),
    "stage": ("stage",),
    "stopped": ("stage",),
    "guard": ("stage", "step"),
    "bad_step": ("stage", "step"),
}
PARTS = ("data", "forward", "backward", "mask", "step")  # of a step: `pipeline/run/speed.py`
NUMBERS = (
    "loss", "target", "rise", "max_rise", "seconds", "tokens", "steps", "publish_seconds",
    "eval_seconds",
    *(f"{part}_seconds" for part in PARTS), "tflops", "mfu", "peak_memory_gb",
)  # fmt: skip


@dataclass
class StageTime:
    """Where the time of one stage went; None where the log does not say. Times in seconds."""

    stage: int
    name: str
    steps: int
    finished: bool
    tokens: int
    tokens_per_second: float | None
    step_seconds: float | None  # median
    percents: dict[str, float]  # median time of each of PARTS / median step time
    tflops: float | None  # medians over the steps, of a rank
    mfu: float | None
    peak_memory_gb: float | None
    seconds: float | None
    publish_seconds: float | None
    eval_seconds: float | None


@dataclass
class Log:
    steps: list[dict] = field(default_factory=list)  # in order, the last of any repeated ones
    ends: dict[int, dict] = field(default_factory=dict)  # stage -> the record of its end
    stopped: dict | None = None  # why the run stopped, if that is the last it said
    targets: dict[int, dict] = field(default_factory=dict)  # stage -> the last look at its target
    guards: dict[int, dict] = field(default_factory=dict)  # stage -> its guard's last intervention
    bad_steps: list[dict] = field(default_factory=list)  # those that were left out
    corpora: dict[str, dict] = field(default_factory=dict)  # domain -> what preparing it gave
    bad_lines: dict[str, dict] = field(default_factory=dict)  # domain -> {"count", "examples"}

    @property
    def begun(self) -> int:
        """The last stage that has said anything, 0 for none."""
        return max([*self.ends, *(step["stage"] for step in self.steps)], default=0)

    @property
    def shares(self) -> dict[int, float]:
        """How much of its planned steps each stage took that ended before them: `stop`, a guard."""
        planned = {r["stage"]: finite(r.get("steps")) for r in self.steps}
        shares = {}
        for stage, end in self.ends.items():
            steps, of = finite(end.get("steps")), planned.get(stage)
            if steps and of and steps < of:
                shares[stage] = steps / of
        return shares


def read_log(path: Path, stages: int, findings: Findings) -> Log:
    """The log of a run of that many stages."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        findings.warnings.append("There is no log.jsonl: training loss and times are missing.")
        return Log()
    except OSError as error:
        findings.warnings.append(f"log.jsonl cannot be read: {error}")
        return Log()
    if not any(map(str.strip, lines)):
        findings.warnings.append("log.jsonl is empty: training loss and times are missing.")
    records, unreadable = [], 0
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and _fits(record, stages):
            records.append(record)
        else:
            unreadable += bool(line.strip())
    if unreadable:
        findings.warnings.append(
            f"{unreadable} line(s) of log.jsonl cannot be read and are left out (a run that was "
            "killed can leave half a line)."
        )
    by_place: dict[tuple[int, int], dict] = {}
    for r in records:
        if r.get("event") == "step":
            by_place[r["stage"], r["step"]] = r
        elif r.get("event") == "begin":  # an attempt: what one before did behind that is undone
            undone = [at for at in by_place if at[0] == r["stage"] and at[1] > r["step"]]
            for at in undone:
                del by_place[at]
    said = [r for r in records if r.get("event") in ("step", "stage", "stopped")]
    log = Log(
        steps=[by_place[place] for place in sorted(by_place)],
        ends={r["stage"]: r for r in records if r.get("event") == "stage"},
        targets={r["stage"]: r for r in records if r.get("event") == "target"},
        guards={r["stage"]: r for r in records if r.get("event") == "guard" and r.get("action")},
        bad_steps=list(
            {
                (r["stage"], r["step"]): r
                for r in records
                if r.get("event") == "bad_step" and r.get("policy") != "stop"
            }.values()
        ),
        stopped=said[-1] if said and said[-1]["event"] == "stopped" else None,
    )
    for record in records:
        if record.get("event") == "corpus":
            log.corpora[record["domain"]] = record
        if record.get("event") == "bad_lines":
            known = log.bad_lines.get(record["domain"], {"count": 0})
            if record["count"] > known["count"]:
                log.bad_lines[record["domain"]] = record
    return log


def interventions(log: Log, stages: list[str]) -> list[str]:
    """What the guard and the rule for bad steps did, for people. stages: names, from stage 0."""
    found = []
    for stage, r in log.guards.items():
        where = f"stage {stage} ({stages[stage]})"
        did = {
            "stop": f"The guard ended {where}",
            "lower_lr": f"The guard lowered the learning rate of {where}",
        }.get(r["action"], f"The guard warns of {where}")
        if "benchmark" in r:
            what, unit = f"{r['benchmark']} had fallen", "points"
            worse, limit = finite(r.get("fall")), finite(r.get("max_fall"))
        else:
            what, unit = f"the held-out loss of {r.get('domain')} had risen", "nats"
            worse, limit = finite(r.get("rise")), finite(r.get("max_rise"))
        by = "" if worse is None or limit is None else f" by {worse:.3f} {unit}, over {limit:g},"
        text = f"{did}: {what}{by} at step {r['step']}."
        if r["action"] == "stop":
            text += " Its checkpoint is that of the last check that passed."
        found.append(text)
    for stage in dict.fromkeys(r["stage"] for r in log.bad_steps):
        steps = [r["step"] for r in log.bad_steps if r["stage"] == stage]
        found.append(
            f"Stage {stage} ({stages[stage]}) left out {len(steps)} step(s) whose loss or gradient "
            f"was bad, the first at step {steps[0]}; log.jsonl names their documents."
        )
    return found


def _fits(record: dict, stages: int) -> bool:
    event = record.get("event")
    if event == "bad_lines":
        examples = record.get("examples") or []
        return (
            isinstance(record.get("domain"), str)
            and isinstance(record.get("count"), int)
            and isinstance(examples, list)
            and all(isinstance(example, dict) for example in examples)
        )
    if event == "corpus":
        return isinstance(record.get("domain"), str) and (
            _counts([record.get(k) for k in ("documents", "tokens", "heldout_documents")])
            and isinstance(record.get("left_out"), dict)
            and _counts(record["left_out"].values())
        )
    if not isinstance(event, str) or event not in NEEDED:
        return isinstance(event, str)
    if not all(type(record.get(key)) is int for key in NEEDED[event]):
        return False
    numbers = all(isinstance(record.get(k), int | float | None) for k in NUMBERS)
    domains = record.get("domains") or {}
    mixed = isinstance(domains, dict) and all(
        isinstance(d, dict)
        and _counts([d.get("predicted"), d.get("tokens")])
        and isinstance(d.get("loss"), int | float | None)
        for d in domains.values()
    )
    return numbers and mixed and 0 <= record["stage"] <= stages


def _counts(values: Iterable[object]) -> bool:
    return all(type(value) is int for value in values)


def stage_times(stages: list[str], log: Log, measured: int) -> list[StageTime]:
    """Where the time of each stage went; the stages up to `measured` are finished, whatever became
    of their lines in the log."""
    times = []
    for stage, name in enumerate(stages[1:], start=1):
        mine = [step for step in log.steps if step["stage"] == stage]
        end = log.ends.get(stage, {})
        if not mine and not end:
            continue
        timed = [s for s in mine if finite(s.get("seconds")) and finite(s.get("tokens") or 0.0)]
        spent = sum(s["seconds"] for s in timed)
        tokens = sum(s.get("tokens") or 0 for s in timed)
        step_seconds = statistics.median(s["seconds"] for s in timed) if timed else None
        percents = {part: _median(timed, f"{part}_seconds") for part in PARTS}
        times.append(
            StageTime(
                stage=stage,
                name=name,
                steps=end.get("steps") or len(mine),
                finished=bool(end) or stage <= measured,
                tokens=end.get("tokens") or sum(s.get("tokens") or 0 for s in mine),
                tokens_per_second=tokens / spent if spent else None,
                step_seconds=step_seconds,
                percents={
                    part: 100 * value / step_seconds
                    for part, value in percents.items()
                    if value is not None and step_seconds
                },
                tflops=_median(timed, "tflops"),
                mfu=_median(timed, "mfu"),
                peak_memory_gb=_median(timed, "peak_memory_gb"),
                seconds=end.get("seconds"),
                publish_seconds=end.get("publish_seconds"),
                eval_seconds=end.get("eval_seconds"),
            )
        )
    return times


def _median(steps: list[dict], key: str) -> float | None:
    values = [s[key] for s in steps if finite(s.get(key)) is not None]
    return statistics.median(values) if values else None
