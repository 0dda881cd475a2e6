"""A byte-level BPE through tiktoken, which is several times faster than the tokenizers library.

Used where the conversion is exact: a tokenizer of another build gives None, and so does one that
differs on a text of `PROBES`. Whoever uses it compares the first documents of a corpus too.
"""

import json
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

# of ByteLevel with use_regex, as GPT-2's
GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)  # fmt: skip
PROBES = [
    "Hello, world! It's  25 °C;\n\n\tdef f(x):\r\n        return x**2   # ok  \n",
    "Ünïcödé 漢字とかな 한국어 עברית 😀👩‍👩‍👧 ﬁ Å Å ½ ٣\u00a0\u200b\ufeff\x00\x7f",
    "I'LL don't WE'Ve 'tis  ''s a1b2_c3 12345678 ... --- === <s></s><mask><|endoftext|>",
    " " * 70 + "a" * 300 + "\n" * 20 + "éé" * 50 + "\t \t",
]


@dataclass(frozen=True)
class FastBpe:
    encoding: Any  # tiktoken.Encoding; its ids are the order of the merges
    ids: np.ndarray  # int32: the tokenizer's id of each of them

    @classmethod
    def of(cls, backend: Any) -> "FastBpe | None":
        """backend: a tokenizers.Tokenizer that takes special tokens in a text for text."""
        try:
            import tiktoken
        except ImportError:
            return None
        content = json.loads(backend.to_str())
        pattern, model = _pattern(content), content["model"]
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        added = any(not token["special"] for token in content["added_tokens"])
        if pattern is None or model["type"] != "BPE" or any(model.get(k) for k in odd) or added:
            return None
        vocabulary, letters = model["vocab"], _letters()
        if not set(letters) <= set(vocabulary):
            return None
        tokens = [*letters, *("".join(_parts(merge)) for merge in model["merges"])]
        if model.get("ignore_merges"):
            tokens += [t for t in vocabulary if set(t) <= set(letters)]
        tokens = list(dict.fromkeys(tokens))
        ranks = {bytes(letters[c] for c in token): i for i, token in enumerate(tokens)}
        encoding = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        fast = cls(encoding, np.array([vocabulary[t] for t in tokens], np.int32))
        expected = backend.encode_batch(PROBES, add_special_tokens=False)
        same = all(
            ids.tolist() == e.ids for ids, e in zip(fast.encode(PROBES), expected, strict=True)
        )
        return fast if same else None

    def encode(self, texts: Items[str], threads: int = 1) -> list[np.ndarray]:
        """int32 ids of each text, without special tokens."""
        if threads > 1:
            found = self.encoding.encode_ordinary_batch(list(texts), num_threads=threads)
        else:
            found = [self.encoding.encode_ordinary(text) for text in texts]
        return [self.ids[np.array(ids, np.int32)] for ids in found]


def _pattern(content: dict[str, Any]) -> str | None:
    """The regular expression that splits a text into words, None for tokenizers of other kinds."""
    if content["normalizer"] is not None or content["pre_tokenizer"] is None:
        return None
    steps = content["pre_tokenizer"].get("pretokenizers", [content["pre_tokenizer"]])
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(splits) > 1:
        return None
    if not splits:
        return GPT2 if last.get("use_regex", True) else None
    (split,) = splits
    plain = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    if not plain or last.get("use_regex", True):
        return None
    return split["pattern"].get("Regex")


def _parts(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


@lru_cache
def _letters() -> dict[str, int]:
    """The printable letter that stands for each byte in a byte-level vocabulary (as GPT-2's)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    shown = {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(others)}
    return dict(sorted(shown.items(), key=lambda item: item[1]))
