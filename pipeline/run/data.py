"""The data of a run: what its stages read and are measured on, prepared or streamed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from pipeline.data.bad_lines import BadLines
from pipeline.data.batches import StageBatches, frame_of, training_batches
from pipeline.data.heldout import Sides
from pipeline.data.mixture import Corpus
from pipeline.data.prepare import left_out
from pipeline.data.prepared import Prepared
from pipeline.data.stage import StagePlan, plan_stage
from pipeline.data.streaming import open_streams, streamed_batches
from pipeline.progress import say
from pipeline.ranks import rank, world_size
from pipeline.recipe import Recipe
from pipeline.run.corpora import open_corpora


@dataclass
class RunData:
    """What the stages of a run share. bad: rows that could not be read, by domain; of streams it
    grows as they are read."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    prepared: dict[str, Prepared] | None  # None: everything is streamed
    bad: dict[str, BadLines] = field(default_factory=dict)

    def sides(self) -> Mapping[str, Sides]:
        """The domains that are measured."""
        if self.prepared is None:
            return open_streams(self.recipe, self.tokenizer, self.bad)
        return self.prepared

    def plan(self, stage: int) -> StagePlan:
        """Of stage 1...; reads the lengths of its documents."""
        frame = frame_of(self.recipe, self.tokenizer)
        return plan_stage(self.recipe, stage, self._train(), frame)

    def batches(self, stage: int) -> StageBatches:
        """This rank's micro-batches of stage 1..., from its first step."""
        corpora, ranks = self._train(), (rank(), world_size())
        if corpora is None:
            return streamed_batches(self.recipe, stage, self.tokenizer, *ranks, self.bad)
        return training_batches(self.recipe, stage, self.tokenizer, corpora, *ranks)

    def counts(self) -> dict[str, dict[str, Any]]:
        """By domain, what its prepared corpus holds and what preparing left out, for the log."""
        return {
            name: {
                "documents": prepared.train.documents,
                "tokens": prepared.train.tokens,
                "heldout_documents": prepared.heldout.documents,
                "left_out": left_out(prepared),
            }
            for name, prepared in (self.prepared or {}).items()
        }

    def _train(self) -> dict[str, Corpus] | None:
        if self.prepared is None:
            return None
        return {name: prepared.train for name, prepared in self.prepared.items()}


def describe_unread(unread: Mapping[str, tuple[int, int]]) -> str:
    """A line for people: by domain (documents, tokens) that the end of a stage cuts."""
    each = ", ".join(f"{n:,} of {name} ({left:,} tokens)" for name, (n, left) in unread.items())
    return f"its length ends the stage within documents, whose rest is not read: {each}"


def open_data(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> RunData:
    """All ranks call it; domains that are not prepared yet are, unless they are to be streamed.

    folder: of the run.
    """
    if not recipe.data.prepare:
        return RunData(recipe, tokenizer, None)
    prepared = open_corpora(recipe, tokenizer, folder)
    bad = {}
    for name, corpus in prepared.items():
        found = corpus.manifest["bad"]
        examples = [(str(f), int(n), str(r)) for f, n, r in found["examples"]]
        damaged = [(str(f), int(n), str(r)) for f, n, r in found["damaged"]]
        lines = BadLines(recipe.data.bad_lines, found["count"], examples, damaged, found["blank"])
        bad[name] = lines
        if rank() == 0 and lines.describe():  # also where it was prepared long ago
            say(f"{name}: {lines.describe()}")
    return RunData(recipe, tokenizer, prepared, bad)
