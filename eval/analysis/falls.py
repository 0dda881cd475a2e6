"""Where a run has lost something, beyond the noise of what it was measured on.

The end of every stage is held against the end of the stage before and against the model before any
training, so that neither a sudden nor a slow fall is missed; of both, the one further beyond its
noise is told. What the noise is: twice the standard error of the difference (`NOISE`), over the
documents, problems or sequences, in pairs where both points have the result on each of them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eval.analysis.load import Run
from eval.analysis.points import NOISE, Point, Score
from eval.analysis.text import percent, printable

HUMANEVAL = "HumanEval"


@dataclass
class Fall:
    """Something that is worse after a stage than it was, by more than the noise."""

    kind: Literal["score", "loss"]
    what: str  # a benchmark, HumanEval, or the domain of a held-out loss
    stage: int
    since: int  # the stage that it is held against
    change: float  # of a share (negative), or of nats per token (positive)
    noise: float  # in the same unit


def measures(point: Point) -> dict[str, Score]:
    """Everything at a point that is a share of documents or problems: higher is better."""
    found = dict(point.scores)
    if point.greedy:
        found[HUMANEVAL] = point.greedy
    return found


def falls(run: Run) -> list[Fall]:
    """Of the ends of all stages, in their order.

    Losses count where they could be forgotten: of the base domains, and of those that an earlier
    stage trained on and the stage itself does not; not before they were learned.
    """
    ends = {point.stage: point for point in run.points if point.step is None}
    found = []
    for stage, now in ends.items():
        earlier = [t for t in ends if t in run.matrix.before(stage)]
        for what in measures(now):
            before = [t for t in earlier if what in measures(ends[t])]
            seen = [_score_fall(what, ends[t], now) for t in _against(before)]
            found += _worst(seen)
        for domain in run.matrix.old(stage):
            if run.matrix.trains(stage, domain):
                continue
            first = run.matrix.trained.get(domain, 0)
            before = [t for t in earlier if first <= t]
            column = run.matrix.domains.index(domain)
            seen = [_loss_fall(domain, column, ends[t], now) for t in _against(before)]
            found += _worst(seen)
    return found


def describe(fall: Fall, stages: list[str]) -> str:
    """One sentence of a fall: HellaSwag fell by 3.1 points (noise 1.2) from stage 0 to stage 1."""
    change, noise = abs(fall.change), fall.noise
    amount = (
        f"fell by {percent(change)} points (noise {percent(noise)})"
        if fall.kind == "score"
        else f"has a held-out loss {change:.3f} nats higher (noise {noise:.3f})"
    )
    where = f"after stage {fall.stage} ({stages[fall.stage]})"
    before = "before training" if fall.since == 0 else f"after stage {fall.since}"
    return printable(f"{fall.what} {amount} {where} than {before}".replace(") after", "), after"))


def _against(before: list[int]) -> list[int]:
    return sorted({before[0], before[-1]}) if before else []


def _worst(seen: list[Fall | None]) -> list[Fall]:
    beyond = [fall for fall in seen if fall is not None]
    return [max(beyond, key=lambda fall: abs(fall.change) - fall.noise)] if beyond else []


def _score_fall(what: str, before: Point, now: Point) -> Fall | None:
    a, b = measures(before)[what], measures(now)[what]
    key = "humaneval" if what == HUMANEVAL else what
    first, second = before.per_document().get(key), now.per_document().get(key)
    error = _paired_scores(first, second, b.value - a.value)
    if error is None and a.stderr is not None and b.stderr is not None:
        error = math.hypot(a.stderr, b.stderr)
    change = b.value - a.value
    if error is None or not change < -NOISE * error:
        return None
    return Fall("score", what, now.stage, before.stage, change, NOISE * error)


def _paired_scores(a: np.ndarray | None, b: np.ndarray | None, change: float) -> float | None:
    """None where the documents are not the same ones, or are not what the values were made of."""
    if a is None or b is None or a.shape != b.shape or a.size < 2:
        return None
    difference = b - a
    if not math.isclose(difference.mean(), change, abs_tol=1e-6):
        return None
    return float(difference.std(ddof=1) / math.sqrt(a.size))


def _loss_fall(domain: str, column: int, before: Point, now: Point) -> Fall | None:
    a, b = before.loss[column], now.loss[column]
    if a is None or b is None:
        return None
    error = _paired_losses(domain, before, now)
    errors = before.stderr[column], now.stderr[column]
    if error is None and errors[0] is not None and errors[1] is not None:
        error = math.hypot(errors[0], errors[1])
    if error is None or not b - a > NOISE * error:
        return None
    return Fall("loss", domain, now.stage, before.stage, b - a, NOISE * error)


def _paired_losses(domain: str, before: Point, now: Point) -> float | None:
    """Standard error of the difference of two means per token, over the sequences of one text."""
    if before.sequences is None or now.sequences is None:
        return None
    tokens, same = (p.sequences.get(f"tokens/{domain}") for p in (before, now))  # type: ignore
    first, second = (p.sequences.get(f"loss/{domain}") for p in (before, now))  # type: ignore
    if tokens is None or same is None or first is None or second is None or len(tokens) < 2:
        return None
    if not np.array_equal(tokens, same):
        return None
    difference = second - first
    residual = difference - difference.sum() / tokens.sum() * tokens
    return float(residual.std(ddof=1) * math.sqrt(len(tokens)) / tokens.sum())
