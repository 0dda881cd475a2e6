"""Held-out text with its masks, made once per run: every evaluation sees the same tokens."""

import json
import zlib
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.checkpoint import publish
from pipeline.data.batches import example, stage_documents
from pipeline.data.instruct import learnt_text
from pipeline.data.reader import BadLines, document_of, read_documents
from pipeline.data.stream import heldout_sequences
from pipeline.data.tokenizer import vocabulary_size
from pipeline.recipe import Recipe

UNIGRAM_DOCUMENTS = 300


def prepare_heldout(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `<domain>.safetensors` (input_ids, labels int32, segments int16: [sequences, length])
    for each evaluated domain, and the loss of a unigram model on the same tokens.

    The masks depend on the domain's name and the sequence, not on the seed of the run: runs with
    several seeds are measured on the same tokens.
    """
    masked = recipe.model.objective == "masked"

    def write(target: Path) -> None:
        for name in recipe.heldout_domains():
            domain = recipe.data.domains[name]
            bad = BadLines(budget=recipe.data.bad_lines)
            documents = map(document_of, read_documents(domain, "heldout", bad))
            sequences = heldout_sequences(
                documents,
                tokenizer,
                recipe.data.sequence_length,
                recipe.data.heldout_sequences,
                masked,
                recipe.data.template,
            )
            rows = [
                example(
                    sequence,
                    tokenizer,
                    masked,
                    np.random.default_rng((zlib.crc32(name.encode()), i)),
                    recipe.data.heldout_masking,
                    False,
                )
                for i, sequence in enumerate(sequences)
            ]
            ids, labels, segments = (np.stack(column) for column in zip(*rows, strict=True))
            unigram = _unigram_loss(recipe, name, tokenizer, labels)
            save_file(
                {
                    "input_ids": torch.from_numpy(ids).int(),
                    "labels": torch.from_numpy(labels).int(),
                    "segments": torch.from_numpy(segments).to(torch.int16),
                },
                target / f"{name}.safetensors",
                metadata={"unigram_loss": repr(unigram)},
            )

    info = {
        "domains": recipe.heldout_domains(),
        "objective": recipe.model.objective,
        "cross_document": recipe.data.cross_document,
        "keep_apart": recipe.data.keep_apart,
        "sources": {n: asdict(recipe.data.domains[n]) for n in recipe.heldout_domains()},
    }
    publish(folder, write, info)


def load_heldout(folder: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """(manifest, tensors of each domain)."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest, {n: load_file(folder / f"{n}.safetensors") for n in manifest["domains"]}


def _unigram_loss(
    recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerFast, labels: np.ndarray
) -> float:
    """Cross-entropy (nats) of the labels under the add-one token frequencies of training text:
    what a model reaches that knows the domain's words but ignores the context."""
    counts = np.ones(vocabulary_size(tokenizer))
    documents = islice(stage_documents(recipe, [name])(0), UNIGRAM_DOCUMENTS)
    texts = [learnt_text(d) for d in documents]
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []:
        np.add.at(counts, ids, 1)
    targets = labels[labels >= 0]
    return float(-np.log(counts / counts.sum())[targets].mean())
