"""A KL anchor: on text beside the new one, the model stays close to a frozen teacher.

Each step has a small batch more, of text that the teacher wrote itself (or of a domain); the step
minimises loss + weight * mean KL(teacher || model) over its predicted positions, at temperature 1
(arXiv 2605.26097, 2505.13811). No old data is needed, and no second model while training: what the
teacher predicts on the text is computed once and kept.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.checkpoint import keep_file, read_manifest
from pipeline.data.mlm import IGNORED, collate
from pipeline.data.objective import OBJECTIVES, targets_of
from pipeline.data.order import Permutation
from pipeline.data.prepare import prepared_before
from pipeline.methods.anchor_text import AnchorText, Row, make_text
from pipeline.methods.divergence import summed_kl, summed_kl_top_k
from pipeline.methods.extra_rows import ExtraRows
from pipeline.methods.method import Method, Start, Teacher, frozen_teacher
from pipeline.methods.sampled_text import BLOCK, sampled_sequences
from pipeline.model.attention import Separation, arrange, separation_of
from pipeline.model.load import PredictedPositions, predict
from pipeline.ranks import on_rank0
from pipeline.recipe import Recipe

FORMAT = 1  # of the text's folder
STREAM = 7  # of the seeds that are drawn from the recipe's


@dataclass(frozen=True)
class AnchorBatch:
    """A micro-batch of anchor text, and what the teacher's cache has of its labelled positions."""

    batch: dict[str, Tensor]
    cached: tuple[Tensor, Tensor] | None


class Anchor(Method):
    """The recipe's `anchor`."""

    name = "anchor"
    needs = ("old weights",)

    def __init__(self, recipe: Recipe):
        assert recipe.anchor is not None
        self.settings, self.recipe = recipe.anchor, recipe
        self.weight, self.masked = self.settings.weight, self.settings.mask_anchor
        self.objective = recipe.model.objective
        self.rows = round(self.settings.fraction * recipe.train.batch_size)  # of a step
        self._extra = ExtraRows(self.rows, recipe.train.micro_batch_size)
        live = self.settings.loss == "kl" and not self.settings.cache and bool(self.weight)
        adapter = recipe.model.lora is not None and self.settings.teacher == "base"
        self.live_teacher = live and not adapter  # which is switched off
        self._text: AnchorText | None = None
        self._separation: Separation | None = None
        self._stage = 0
        # Where nothing is cached: a frozen copy. None where the teacher is the model without its
        # adapter, which is switched off.
        self._copy: Any = None

    def begin(self, start: Start) -> None:
        if self.weight and self.settings.teacher == "base":
            self._text = self._make_text(start, start.teacher("base"))

    def prepare(self, start: Start) -> None:
        self._stage, self._separation = start.stage, start.separation
        if not self.weight:
            return
        first = self.settings.teacher == "base" or start.stage == 1
        which = "base" if first else "previous"
        if self.settings.teacher == "previous":
            self._text = self._make_text(start, start.teacher(which))
        if self.live_teacher and (self.recipe.model.lora is None or not first):
            self._copy = frozen_teacher(start, which, "anchor.cache=64")

    def finish(self, engine: Any, stage: int) -> None:
        if self._copy is not None:
            engine.release(self._copy)
        self._copy = None

    def micro_batches(self) -> int:
        return self._extra.micro_batches if self.weight else 0

    def batches(self, step: int) -> list[AnchorBatch]:
        if not self.weight:
            return []
        assert self._text is not None
        rounds, places = np.divmod(
            np.arange((step - 1) * self.rows, step * self.rows), self._text.sequences
        )
        for r in np.unique(rounds).tolist():
            seed = (self.recipe.stage_seed(self._stage), STREAM, r)
            order = Permutation(self._text.sequences, seed)
            places[rounds == r] = order(places[rounds == r])
        return [self._batch(mine) for mine in self._extra.deal(places.tolist())]

    def predictions(self, batch: AnchorBatch) -> int:
        return int((batch.batch["labels"] != IGNORED).sum())

    def loss(self, engine: Any, head: PredictedPositions | None, batch: AnchorBatch) -> Tensor:
        waiting = {k: v.to(engine.device) for k, v in batch.batch.items()}
        inputs, tokens = arrange(waiting, self._separation, engine.module)
        wanted = targets_of(tokens["labels"], self.objective) >= 0
        if self.settings.loss == "cross_entropy":
            logits = predict(engine.forward, inputs, wanted, head).float()
            targets = targets_of(tokens["labels"], self.objective)[wanted]
            return F.cross_entropy(logits, targets, reduction="sum")
        if batch.cached is not None:
            logits = predict(engine.forward, inputs, wanted, head)
            return summed_kl_top_k(logits, *(t.to(logits.device) for t in batch.cached))
        theirs = self._live(engine, head, inputs, wanted)
        return summed_kl(predict(engine.forward, inputs, wanted, head), theirs)

    @property
    def _caches(self) -> bool:
        return self.settings.loss == "kl" and self.settings.cache > 0

    def _batch(self, places: list[int | None]) -> AnchorBatch:
        """None: a row without anything to predict, so that all ranks have as many."""
        assert self._text is not None
        real = [p for p in places if p is not None]
        rows = self._text.rows(real)
        for _ in range(len(places) - len(real)):
            ids, labels, segments = rows[0] if rows else self._text.rows([0])[0]
            rows.append((ids, np.full_like(labels, IGNORED), segments))
        cached = self._text.predictions(real) if self._caches else None
        return AnchorBatch(collate(rows), cached)

    def _live(
        self, engine: Any, head: PredictedPositions | None, inputs: dict[str, Any], wanted: Tensor
    ) -> Tensor:
        """What the frozen teacher predicts now."""
        if self._copy is not None:
            with torch.no_grad():
                return predict(self._copy, inputs, wanted, None)
        with engine.evaluating(), _without_adapter(engine.module):
            return predict(engine.forward, inputs, wanted, head)

    def _make_text(self, start: Start, teacher: Teacher) -> AnchorText:
        frozen = _Frozen(teacher, self.recipe)
        cached = partial(self._predict, frozen) if self._caches else None
        teacher.send()
        identity = teacher.identify()
        info = {
            "teacher": identity, "settings": asdict(self.settings),
            "objective": self.objective, "sequences": self._sequences(),
        }  # fmt: skip
        folder = start.shared / f"anchor-{self._key(start, identity)}"
        rows = partial(self._make_rows, start, frozen)
        text = make_text(folder, rows, cached, self.settings.cache, info)

        def tell() -> None:
            told = start.kept / f"anchor/stage-{start.stage:02d}.json"  # 0: for the whole run
            known = {"folder": str(folder), **read_manifest(folder)}
            keep_file(told, json.dumps(known, indent=2))

        on_rank0(tell)
        return text

    def _sequences(self) -> int:
        return max(self.rows, int(self.settings.tokens) // self.recipe.data.sequence_length)

    def _make_rows(
        self, start: Start, frozen: "_Frozen", share: tuple[int, int]
    ) -> Iterator[tuple[int, Row]]:
        """The numbered rows of a share, the same however the work is shared."""
        text, count = self.settings.text, self._sequences()
        if text in ("self", "random"):
            numbered = sampled_sequences(
                text, lambda: frozen.model, start.tokenizer, self.recipe, count, share
            )
        else:
            of_domain = start.domain(text, count)
            numbered = (
                (i, s) for i, s in enumerate(of_domain) if i // BLOCK % share[1] == share[0]
            )
        masking, row = self.recipe.data.masking, OBJECTIVES[self.objective].row
        for number, sequence in numbered:
            rng = np.random.default_rng((self.recipe.seed, STREAM, number))
            yield number, row(sequence, start.tokenizer, rng, masking, False)

    def _predict(self, frozen: "_Frozen", rows: list[Row]) -> Tensor:
        device = next(frozen.model.parameters()).device
        batch = {k: v.to(device) for k, v in collate(rows).items()}
        inputs, tokens = arrange(batch, frozen.separation, frozen.model)
        wanted = targets_of(tokens["labels"], self.objective) >= 0
        with torch.no_grad():
            return predict(frozen.model, inputs, wanted, frozen.head)

    def _key(self, start: Start, identity: dict[str, Any]) -> str:
        """Of the text's folder: whatever changes a token or a prediction. All ranks call it."""
        s, d = self.settings, self.recipe.data
        source = None
        if s.text in d.domains:
            source = on_rank0(partial(self._corpus, start)), d.packing
        vocabulary = start.tokenizer.backend_tokenizer.to_str().encode()
        content = {
            "format": FORMAT, "teacher": identity, "text": s.text, "source": source,
            "tokens": self._sequences(), "cache": s.cache if self._caches else 0,
            "seed": self.recipe.seed, "length": d.sequence_length, "masking": d.masking,
            "objective": self.objective,
            "cross_document": d.cross_document, "keep_apart": d.keep_apart,
            "tokenizer": hashlib.sha256(vocabulary).hexdigest(),
        }  # fmt: skip
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _corpus(self, start: Start) -> str:
        """The name of the domain's prepared corpus, which changes with all that is in it."""
        prepared = prepared_before(self.recipe, self.settings.text, start.tokenizer)
        assert prepared is not None  # the run has opened it
        return prepared.folder.name


class _Frozen:
    """A teacher that is loaded when it is first needed, and goes with the text that it made."""

    def __init__(self, teacher: Teacher, recipe: Recipe):
        self._teacher, self._recipe = teacher, recipe

    @cached_property
    def model(self) -> nn.Module:
        return self._teacher.load()

    @cached_property
    def head(self) -> PredictedPositions:
        return PredictedPositions(self.model)

    @cached_property
    def separation(self) -> Separation:
        return separation_of(self.model, self._recipe)


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    trained = [(p, p.requires_grad) for p in model.parameters()]
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        for p, so in trained:  # PEFT would train the frozen adapters of earlier stages too
            p.requires_grad_(so)
