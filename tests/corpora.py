"""Corpora in memory, and documents packed without any file."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from pipeline.data.encode import Encoder, Tokens
from pipeline.data.instruct import Document
from pipeline.data.mixture import Mixture, Part, Source
from pipeline.data.packing import POOL, Packer, Shape
from pipeline.data.sequences import Sequence as Packed
from pipeline.data.sequences import read_rows
from pipeline.data.stream import HeldDocuments


class MemoryCorpus:
    """Documents of given lengths. Token i of all of them has the id `first` + i."""

    def __init__(self, lengths: Sequence[int], first: int = 100, whole: bool = False):
        self.all_lengths = np.asarray(lengths, np.int64)
        self.documents, self.tokens = len(lengths), int(self.all_lengths.sum())
        self.first, self.whole = first, whole
        self.predicted = self.tokens - int((self.all_lengths // 2).sum()) if whole else self.tokens

    def lengths(self, places: np.ndarray) -> np.ndarray:
        return self.all_lengths[places]

    def piece(self, place: int, start: int, stop: int) -> Tokens:
        numbers = np.arange(start, stop)
        ids = (numbers + self.first + self.all_lengths[:place].sum()).astype(np.int32)
        predicted = numbers >= self.all_lengths[place] // 2 if self.whole else None
        return Tokens(ids, numbers % 3 == 0, predicted)


def packed(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    objective: str,
    template: str = "alpaca",
    pack_examples: bool = True,
) -> list[Packed]:
    """The sequences of some documents, tokenized and packed in their order, one row a step."""
    if not pack_examples:
        return [s for d in documents for s in packed([d], tokenizer, length, objective, template)]
    encoder = Encoder.of(tokenizer, objective, template)
    frame = encoder.frame
    tokens = encoder.encode(documents)
    whole = any(t.whole for t in tokens)
    parts = [Part("documents", HeldDocuments(dict(enumerate(tokens)), whole))]
    source = Source(parts, [0], None, limit=len(documents))
    shape = Shape(length, frame.ends)
    packer = Packer(Mixture([source], length), 1, shape, POOL if whole else 0)
    return read_rows([row for (row,) in packer], parts, length, frame)


CL_BENCHMARK = [
    *("TC/dbpedia", "TC/yahoo", "TC/agnews", "SC/amazon", "SC/yelp", "SC/IMDB", "SC/SST-2"),
    *("NLI/MNLI", "NLI/CB", "NLI/RTE", "WiC/WiC", "COPA/COPA", "QQP/QQP", "BoolQA/BoolQA"),
    "MultiRC/MultiRC",
]


def write_cl_benchmark(root: Path, labels: Sequence[str] = ("yes", "no")) -> None:
    """Files of every task of CL-benchmark: four rows of each label to train on, two to test on."""
    for name in CL_BENCHMARK:
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "labels.json").write_text(json.dumps(list(labels)))
        for side, rows in (("train", 4), ("test", 2)):
            lines = [
                json.dumps({"label": label, "sentence": f"row {i}"})
                for i in range(rows)
                for label in labels
            ]
            (folder / f"{side}.json").write_text("\n".join(lines))
