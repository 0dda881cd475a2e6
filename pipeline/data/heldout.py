"""Held-out text with its masks, made once per run: every evaluation sees the same tokens."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.checkpoint import publish
from pipeline.data.batches import frame_of
from pipeline.data.encode import Encoder, Frame, Tokens
from pipeline.data.instruct import Example
from pipeline.data.mixture import Corpus, Mixture, Part, Source
from pipeline.data.mlm import collate
from pipeline.data.objective import OBJECTIVES
from pipeline.data.packing import POOL, Packer, Shape
from pipeline.data.sequences import Sequence, read_rows
from pipeline.data.sources import task_examples
from pipeline.data.tasks import check_answers_fit, options_of
from pipeline.data.tokenizer import vocabulary_size
from pipeline.errors import UserError
from pipeline.recipe import Recipe

UNIGRAM_DOCUMENTS = 300
UNIGRAM_TOKENS = 10_000  # of a document


class HeldoutCorpus(Corpus, Protocol):
    """One whose documents have hashes."""

    def digests(self) -> np.ndarray:
        """uint64 [documents]."""


class Sides(Protocol):
    """A domain's documents to train on, and those held out."""

    @property
    def train(self) -> Corpus: ...

    @property
    def heldout(self) -> HeldoutCorpus: ...


class Reordered:
    """A corpus whose document i is the one at places[i] of another."""

    def __init__(self, corpus: Corpus, places: np.ndarray):
        self.documents, self.tokens, self.predicted = len(places), corpus.tokens, corpus.predicted
        self.whole = corpus.whole
        self._corpus, self._places = corpus, places

    def lengths(self, places: np.ndarray) -> np.ndarray:
        return self._corpus.lengths(self._places[places])

    def piece(self, place: int, start: int, stop: int) -> Tokens:
        return self._corpus.piece(int(self._places[place]), start, stop)


def prepare_heldout(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    corpora: Mapping[str, Sides],
    folder: Path,
) -> None:
    """Write `<domain>.safetensors` (input_ids, labels int32, segments int16: [sequences, length])
    for each evaluated domain, and the loss of a unigram model on the same tokens. It lies in the
    manifest: it depends on the training text too, the files on what is measured alone.

    The masks depend on the domain's name and the sequence, not on the seed of the run: runs with
    several seeds are measured on the same tokens.
    """
    objective = OBJECTIVES[recipe.model.objective]
    frame = frame_of(recipe, tokenizer)
    used: list[Tensor] = []

    def write(target: Path) -> None:
        for name in recipe.heldout_domains():
            sequences = heldout_sequences(recipe, name, corpora[name].heldout, frame)
            rows = [
                objective.row(
                    sequence,
                    tokenizer,
                    np.random.default_rng((zlib.crc32(name.encode()), i)),
                    recipe.data.heldout_masking,
                    False,
                )
                for i, sequence in enumerate(sequences)
            ]
            batch = collate(rows)
            labels = batch["labels"]
            used.extend((batch["input_ids"], labels))
            info["unigram_loss"][name] = _unigram_loss(
                recipe, corpora[name].train, vocabulary_size(tokenizer), labels.numpy()
            )
            save_file(
                {
                    "input_ids": batch["input_ids"].int(),
                    "labels": labels.int(),
                    "segments": batch["segments"].to(torch.int16),
                },
                target / f"{name}.safetensors",
            )

        for name in recipe.tasks():
            examples = task_examples(recipe.data.domains[name], recipe.data.bad_lines)["heldout"]
            text = "".join(json.dumps([e.prompt, e.response]) + "\n" for e in examples)
            (target / f"{name}.tasks.jsonl").write_text(text, encoding="utf-8")
        info["tokens"] = _tokens(tokenizer, used)

    info: dict[str, Any] = {
        "unigram_loss": {},
        "tasks": _options(recipe),
        "template": recipe.data.template,
        "domains": recipe.heldout_domains(),
        "objective": recipe.model.objective,
        "cross_document": recipe.data.cross_document,
        "keep_apart": recipe.data.keep_apart,
        "sources": {n: asdict(recipe.data.domains[n]) for n in recipe.heldout_domains()},
    }
    publish(folder, write, info)


def check_answers(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError where the answers of a run are too short for a label of its tasks."""
    encoder = Encoder.of(tokenizer, recipe.model.objective, recipe.data.template)
    for name, options in _options(recipe).items():
        check_answers_fit(name, options, encoder, recipe.evaluate.answers.max_new_tokens)


def _options(recipe: Recipe) -> dict[str, list[str]]:
    return {n: options_of(t) for n in recipe.tasks() if (t := recipe.data.domains[n].task)}


def load_heldout(folder: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """(manifest, tensors of each domain)."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if "unigram_loss" not in manifest:  # an older folder has it in its files
        manifest["unigram_loss"] = {n: _unigram_of_file(folder, n) for n in manifest["domains"]}
    return manifest, {n: load_file(folder / f"{n}.safetensors") for n in manifest["domains"]}


def _unigram_of_file(folder: Path, domain: str) -> float:
    with safe_open(folder / f"{domain}.safetensors", "np") as file:
        return float(file.metadata()["unigram_loss"])


def in_its_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the ids of the text are the same tokens to a tokenizer; of other ones a model's loss
    can be computed too, and means nothing. True where the folder is too old to tell."""
    manifest, domains = load_heldout(folder)
    ids = [domain[key] for domain in domains.values() for key in ("input_ids", "labels")]
    return manifest.get("tokens") in (None, _tokens(tokenizer, ids))


def _tokens(tokenizer: PreTrainedTokenizerFast, ids: Iterable[Tensor]) -> str:
    """A digest of the ids that occur and their tokens."""
    used = torch.cat([part.unique() for part in ids]).unique().tolist()
    tokens = [(i, tokenizer.convert_ids_to_tokens(i)) for i in used if i >= 0]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def load_tasks(folder: Path) -> dict[str, tuple[list[str], list[Example]]]:
    """Of each task of a held-out folder its options, and its rows to test on."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = {}
    for name, options in manifest.get("tasks", {}).items():
        lines = (folder / f"{name}.tasks.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        found[name] = options, [Example(prompt, "", response) for prompt, response in pairs]
    return found


def heldout_sequences(
    recipe: Recipe, name: str, corpus: HeldoutCorpus, frame: Frame
) -> list[Sequence]:
    """The first `data.heldout_sequences` sequences of a corpus, fewer if it ends before; the last
    one may be padded. The documents are taken in the order of their hashes, so that a corpus that
    grows keeps most of those that are measured.

    Raises:
        UserError: no held-out document, or only examples that are longer than a sequence.
    """
    part = Part("heldout", Reordered(corpus, np.argsort(corpus.digests(), kind="stable")))
    found = _first_sequences(recipe, part, None, frame, recipe.data.heldout_sequences)
    if not found:
        raise UserError(
            f"{name}: no held-out document, or only examples that are longer than a sequence "
            f"({recipe.data.sequence_length} tokens, data.sequence_length)"
        )
    return found


def training_sequences(
    recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, count: int
) -> list[Sequence]:
    """`count` sequences of a corpus's training text, shuffled; fewer if it ends before."""
    frame = frame_of(recipe, tokenizer)
    return _first_sequences(recipe, Part("train", corpus), (recipe.seed,), frame, count)


def _first_sequences(
    recipe: Recipe, part: Part, seed: tuple[int, ...] | None, frame: Frame, count: int
) -> list[Sequence]:
    """seed: of the order of the documents; None: as they stand."""
    length, corpus = recipe.data.sequence_length, part.corpus
    source = Source([part], [0], seed, limit=corpus.documents)
    shape = Shape(length, frame.ends, alone=not recipe.data.packing)
    packer = Packer(Mixture([source], length), 1, shape, POOL if corpus.whole else 0)
    rows = [row for (row,) in islice(packer, count)]
    return read_rows(rows, [part], length, frame) if rows else []


def _unigram_loss(recipe: Recipe, corpus: Corpus, vocabulary: int, labels: np.ndarray) -> float:
    """Cross-entropy (nats) of the labels under the add-one token frequencies of training text:
    what a model reaches that knows the domain's words but ignores the context."""
    counts = np.ones(vocabulary)
    source = Source([Part("train", corpus)], [0], (0,), limit=corpus.documents)
    for draw in range(min(UNIGRAM_DOCUMENTS, corpus.documents)):
        _, place, length = source.get(draw) or (0, 0, 0)
        piece = corpus.piece(place, 0, min(length, UNIGRAM_TOKENS))
        learnt = piece.ids if piece.predicted is None else piece.ids[piece.predicted]
        counts += np.bincount(learnt, minlength=vocabulary)
    targets = labels[labels >= 0]
    return float(-np.log(counts / counts.sum())[targets].mean())
