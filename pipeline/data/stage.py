"""What a stage draws from and how long it is: domains, weights, repetitions, steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice, takewhile

import numpy as np

from pipeline.data.encode import Frame
from pipeline.data.instruct import ExampleStatistics
from pipeline.data.mixture import BLOCK, Corpus, Mixture, Part, Source
from pipeline.data.packing import POOL, Packer, Shape
from pipeline.errors import UserError
from pipeline.recipe import Recipe

SAMPLED = 100  # steps from which the padding of a stage is estimated


@dataclass(frozen=True)
class Share:
    """Domains that are read in one order, and their share of a stage's tokens."""

    domains: tuple[str, ...]
    share: float


def shares_of(recipe: Recipe, stage: int) -> list[Share]:
    """The sources of stage 1..., its own first, then what it replays; the shares sum to 1."""
    s = recipe.stages[stage - 1]
    replayed: list[Share] = []
    if isinstance(s.replay, dict):
        replayed = [Share((name,), share) for name, share in s.replay.items()]
    elif s.replay is not None:
        before = dict.fromkeys(n for e in recipe.stages[: stage - 1] for n in e.domains)
        replayed = [Share(tuple(n for n in before if n not in s.domains), s.replay)]
    rest = 1 - sum(r.share for r in replayed)
    if isinstance(s.domain, dict):
        total = sum(s.domain.values())
        return [Share((n,), rest * w / total) for n, w in s.domain.items()] + replayed
    return [Share(tuple(s.domains), rest), *replayed]


def domains_of(recipe: Recipe, stage: int) -> list[str]:
    """All the domains whose documents a stage reads, its own first."""
    return list(dict.fromkeys(n for s in shares_of(recipe, stage) for n in s.domains))


def stage_packer(
    recipe: Recipe, stage: int, corpora: Mapping[str, Corpus], frame: Frame
) -> tuple[Packer, list[Part], list[Source]]:
    """The rows of a stage's steps, the domains that their pieces name, and what they draw from. A
    stage of epochs ends with its last document, any other has no end."""
    s = recipe.stages[stage - 1]
    names = domains_of(recipe, stage)
    parts = [Part(name, corpora[name]) for name in names]
    sources = []
    for i, share in enumerate(shares_of(recipe, stage)):
        members = [names.index(name) for name in share.domains]
        source = Source(parts, members, (recipe.stage_seed(stage), i), share.share)
        if not source.tokens:
            raise UserError(f"data.domains.{'+'.join(share.domains)}: no document to train on")
        if i == 0 and s.epochs is not None:
            source.limit = max(1, round(s.epochs * source.documents))
        sources.append(source)
    shape = Shape(recipe.data.sequence_length, frame.ends, alone=not recipe.data.packing)
    pool = POOL if any(p.corpus.whole for p in parts) else 0
    mixture = Mixture(sources, longest=shape.length)
    return Packer(mixture, recipe.train.batch_size, shape, pool), parts, sources


@dataclass
class StagePlan:
    """How long a stage is, and what it reads."""

    steps: int
    steps_per_unit: float  # of the unit in which the recipe gives the length
    examples: ExampleStatistics | None = None  # of its instruction domains
    padding: float = 0.0  # share of the tokens of its sequences
    repetitions: dict[str, float] | None = None  # of a mixture: how often each source is read

    def pauses(self, every: float | None) -> dict[int, float]:
        """Steps before the last at which to evaluate, and how many units are done by then."""
        if every is None:
            return {}
        places = takewhile(
            lambda place: place[0] < self.steps,
            ((round(i * every * self.steps_per_unit), i * every) for i in count(1)),
        )
        return {max(1, step): progress for step, progress in places}

    def describe(self, length: int) -> list[str]:
        """Lines for people. length: tokens of a sequence."""
        lines = []
        if self.examples:
            lines.append(f"{self.examples.describe(length)}; rows {1 - self.padding:.1%} full")
        if self.repetitions:
            read = ", ".join(f"{n} {times:.3g} times" for n, times in self.repetitions.items())
            lines.append(f"read: {read}")
        return lines


def plan_stage(
    recipe: Recipe, stage: int, corpora: Mapping[str, Corpus] | None, frame: Frame
) -> StagePlan:
    """Optimizer steps of stage 1...; those of epochs are counted by packing their lengths, those of
    tokens where rows have padding by how full the first ones are.

    corpora: by domain; None where they are streamed, so that nothing is known of them.

    Raises:
        UserError: no document; no example that is short enough; more tokens than
            `max_repetitions` gives.
    """
    s = recipe.stages[stage - 1]
    length = recipe.data.sequence_length
    per_step = recipe.train.batch_size * length
    plan = StagePlan(0, 0)
    if s.steps is not None:
        plan = StagePlan(s.steps, 1)
    elif s.tokens is not None:
        plan = StagePlan(max(1, math.ceil(s.tokens / per_step)), 1 / per_step)
    if corpora is None:
        return plan
    packer, parts, sources = stage_packer(recipe, stage, corpora, frame)
    plan.examples = examples = _statistics([p for p in parts if p.corpus.whole], length)
    used = steps = 0
    if s.epochs is not None or examples or not recipe.data.packing:
        for rows in islice(packer, None if s.epochs is not None else min(plan.steps, SAMPLED)):
            steps += 1
            used += sum(p.stop - p.start + frame.ends for row in rows for p in row)
        plan.padding = 1 - used / max(1, steps * per_step)
    if s.epochs is not None:
        plan.steps, plan.steps_per_unit = steps, steps / s.epochs
    elif s.tokens is not None and used:
        plan.steps, plan.steps_per_unit = math.ceil(s.tokens * steps / used), steps / used
    if len(sources) == 1 and s.max_repetitions is None:
        return plan
    filled = plan.steps * per_step * (1 - plan.padding)
    read: dict[str, float] = {}
    for i, source in enumerate(sources):
        name, wanted = "+".join(source.names), source.weight * filled
        if s.epochs is not None:  # all that is drawn is packed by now
            times = packer.mixture.drawn[i] / source.documents
        else:
            times = wanted / _readable(source, length)
        read[name] = times
        bounded = i == 0 and s.epochs is not None
        if s.max_repetitions is not None and times > s.max_repetitions and not bounded:
            raise UserError(
                f"stages[{stage - 1}].max_repetitions: {name} has {_readable(source, length):,} "
                f"tokens, and the stage wants {wanted:,.0f} of it, {times:.3g} times "
                f"as many; at most {s.max_repetitions:g} are allowed. Lower its weight or the "
                "length of the stage, or raise max_repetitions"
            )
    if len(sources) > 1:
        plan.repetitions = read
    return plan


def _readable(source: Source, length: int) -> int:
    """Tokens of a source without examples that are longer than a row, which are left out."""
    found = 0
    for corpus in (source.parts[m].corpus for m in source.members):
        if not corpus.whole:
            found += corpus.tokens
            continue
        for places in _blocks(corpus):
            lengths = corpus.lengths(places)
            found += int(lengths[lengths <= length].sum())
    return found


def _blocks(corpus: Corpus) -> Iterator[np.ndarray]:
    for first in range(0, corpus.documents, BLOCK):
        yield np.arange(first, min(first + BLOCK, corpus.documents))


def _statistics(parts: Sequence[Part], length: int) -> ExampleStatistics | None:
    """Of the examples of these domains; None without any."""
    if not parts:
        return None
    found = ExampleStatistics()
    for part in parts:
        corpus, before = part.corpus, found.examples
        found.response_tokens += corpus.predicted
        for places in _blocks(corpus):
            lengths = corpus.lengths(places)
            fits = lengths <= length
            found.examples += int(fits.sum())
            found.too_long += int((~fits).sum())
            found.tokens += int(lengths[fits].sum())
            found.longest = max(found.longest, int(lengths.max()))
            for place, tokens in zip(places[~fits], lengths[~fits], strict=True):
                predicted = corpus.piece(int(place), 0, int(tokens)).predicted
                found.response_tokens -= int(tokens if predicted is None else predicted.sum())
        if found.examples == before:
            raise UserError(
                f"data.sequence_length: none of the {corpus.documents} examples of {part.name} "
                f"fits into {length} tokens; raise it (the longest has {found.longest})"
            )
    return found
