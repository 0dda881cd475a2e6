"""Pseudo-replay: the model writes examples of earlier tasks and learns them with the new ones.

LFPT5 (Qin and Joty 2021, arXiv 2110.07298) with `model.prompt`, LAMOL (Sun et al. 2020, arXiv
1909.03329) without. Beside the new examples some rows a step teach the model to write such a text,
when it is asked for one by the task's name. Before a later stage the model writes texts of every
earlier task and answers them itself; these are learnt along, to answer and to write. What all
prompts of a task have in common (its instruction and options) is kept, not written.
"""

import json
from collections.abc import Sequence as Items
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.checkpoint import keep_file
from pipeline.data.encode import Encoder
from pipeline.data.instruct import Example
from pipeline.data.mlm import IGNORED, Row, collate
from pipeline.data.objective import OBJECTIVES, targets_of
from pipeline.data.sequences import Sequence
from pipeline.errors import UserError
from pipeline.methods.domain_text import asked_and_answer
from pipeline.methods.extra_rows import ExtraRows
from pipeline.methods.method import Method, Start
from pipeline.model.attention import Separation, arrange
from pipeline.model.generate import written
from pipeline.model.load import PredictedPositions, predict
from pipeline.ranks import gather, meet, on_rank0, rank, world_size
from pipeline.recipe import Recipe

STREAM = 19  # of the seeds that are drawn from the recipe's
BLOCK = 32  # texts that are written together, from a seed of their own
TOP_P = 0.9  # of the probability is drawn from
Pair = tuple[list[int], list[int]]  # ids of what is read and of what is to be written


class PseudoReplay(Method):
    """The recipe's `pseudo_replay`."""

    name = "pseudo_replay"
    needs = ("task labels",)

    def __init__(self, recipe: Recipe):
        assert recipe.pseudo_replay is not None
        self.settings, self.recipe = recipe.pseudo_replay, recipe
        self.weight = self.settings.weight
        self.objective = recipe.model.objective
        self.rows = max(1, round(self.settings.fraction * recipe.train.batch_size))  # of a step
        self._extra = ExtraRows(self.rows, recipe.train.micro_batch_size)
        self._own: list[Row] = []  # the stage's texts, to be written
        self._old: list[Row] = []  # the model's own texts of earlier tasks
        self._stage = 0
        self._separation: Separation | None = None

    def prepare(self, start: Start) -> None:
        self._stage, self._separation = start.stage, start.separation
        encoder = Encoder.of(start.tokenizer, self.objective, self.recipe.data.template)
        to_row = partial(_row, objective=self.objective, start=start)
        folder = start.kept / self.name
        pairs: list[Pair] = []
        frames = {}
        for domain in self.recipe.stages[start.stage - 1].domains:
            rows = start.domain(domain, self.settings.sequences)
            parts = [asked_and_answer(row) for row in rows]
            examples = [(asked.tolist(), answer.tolist()) for asked, answer in parts]
            frames[domain] = frame = _frame(examples)
            cut = len(frame["prefix"]), len(frame["suffix"])
            texts = [source[cut[0] : len(source) - cut[1]] for source, _ in examples]
            pairs += [(_cue(encoder, domain), [*text, *encoder.after]) for text in texts]
        self._own = [to_row(p) for p in pairs if _length(p) <= self.recipe.data.sequence_length]
        path = folder / f"stage-{start.stage:02d}.json"
        if not self._own:
            length = self.recipe.data.sequence_length
            raise UserError(
                f"pseudo_replay: no text of {' and '.join(frames)} fits behind its cue into "
                f"data.sequence_length={length}; raise it"
            )
        if not on_rank0(path.is_file):
            content = {"frames": frames, "texts": self._write(start, encoder, folder)}
            on_rank0(partial(keep_file, path, json.dumps(content)))
        self._old = [to_row(pair) for pair in on_rank0(partial(_read, path))["texts"]]

    def micro_batches(self) -> int:
        return self._extra.micro_batches

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        rng = np.random.default_rng((self.recipe.stage_seed(self._stage), STREAM, step))
        of_old = self.rows - self.rows // 2 if self._old else 0
        chosen = [self._own[i] for i in _draw(rng, self._own, self.rows - of_old)]
        chosen += [self._old[i] for i in _draw(rng, self._old, of_old)]
        return [self._batch(chosen, mine) for mine in self._extra.deal(range(len(chosen)))]

    def predictions(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(
        self, engine: Any, head: PredictedPositions | None, batch: dict[str, Tensor]
    ) -> Tensor:
        waiting = {k: v.to(engine.device) for k, v in batch.items()}
        inputs, tokens = arrange(waiting, self._separation, engine.module)
        targets = targets_of(tokens["labels"], self.objective)
        logits = predict(engine.forward, inputs, targets >= 0, head).float()
        return F.cross_entropy(logits, targets[targets >= 0], reduction="sum")

    @staticmethod
    def _batch(chosen: list[Row], places: list[int | None]) -> dict[str, Tensor]:
        """None: a row without anything to predict."""
        batch = collate([chosen[p or 0] for p in places])
        batch["labels"][[p is None for p in places]] = IGNORED
        return batch

    def _write(self, start: Start, encoder: Encoder, folder: Path) -> list[Pair]:
        """Of every earlier task as many texts as the recipe says: to be answered, and written."""
        if start.stage == 1:
            return []
        net: Any = start.teacher("previous").load_on_all()
        (end,) = encoder.after
        device = [net.device] if net.device.type == "cuda" else []
        pairs: list[tuple[int, Pair]] = []
        number = 0
        for stage in range(1, start.stage):
            kept = on_rank0(partial(_read, folder / f"stage-{stage:02d}.json"))["frames"]
            for domain, frame in kept.items():
                cue = np.array(_cue(encoder, domain))
                taken = len(frame["prefix"] + frame["suffix"]) + frame["answer"] + 1
                room = self.recipe.data.sequence_length - taken
                for first in range(0, self.settings.sequences, BLOCK):
                    number += 1
                    if number % world_size() != rank():
                        continue
                    count = min(BLOCK, self.settings.sequences - first)
                    with torch.random.fork_rng(devices=device):
                        torch.manual_seed(self.recipe.stage_seed(start.stage) * 1009 + number)
                        drawn = written(net, [cue] * count, [end], encoder.pad, max(room, 1),
                                        do_sample=True, top_k=0, top_p=TOP_P)  # fmt: skip
                    texts = [t for t in drawn if t]
                    asked = [[*frame["prefix"], *t, *frame["suffix"]] for t in texts]
                    prompts = [np.array(a) for a in asked]
                    said = (
                        written(net, prompts, [end], encoder.pad, frame["answer"])
                        if prompts
                        else []
                    )
                    for text, source, answer in zip(texts, asked, said, strict=True):
                        pairs.append((number, (source, [*answer, end])))
                        pairs.append((number, (cue.tolist(), [*text, end])))
        meet()  # however long the others take
        found = sorted((p for mine in gather(pairs) for p in mine), key=lambda p: p[0])
        return [p for _, p in found if _length(p) <= self.recipe.data.sequence_length]


def _frame(examples: list[Pair]) -> dict[str, Any]:
    """What the prompts of a task begin and end with, and how long its answers are."""
    sources = [source for source, _ in examples]
    prefix = _common(sources)
    suffix = _common([source[len(prefix) :][::-1] for source in sources])[::-1]
    return {"prefix": prefix, "suffix": suffix, "answer": max(len(t) for _, t in examples)}


def _common(rows: list[list[int]]) -> list[int]:
    """What all of them begin with."""
    columns = zip(*rows, strict=False)
    return [column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns)]


def _cue(encoder: Encoder, domain: str) -> list[int]:
    return encoder.prompts([Example(f"Write a text of {domain}.", "", "-")])[0].tolist()


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def _row(pair: Pair, objective: str, start: Start) -> Row:
    ids = np.array([*pair[0], *pair[1]], np.int32)
    learnt = np.arange(len(ids)) >= len(pair[0])
    nothing = np.zeros(len(ids), np.int16)
    sequence = Sequence(ids, nothing.astype(np.int32), nothing, learnt, nothing)
    make = OBJECTIVES[objective].row
    return make(sequence, start.tokenizer, np.random.default_rng(0), 0.0, False)


def _draw(rng: np.random.Generator, rows: Items[Row], count: int) -> list[int]:
    return rng.choice(len(rows), count, replace=count > len(rows)).tolist() if count else []


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
