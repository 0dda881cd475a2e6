"""Documents to tokens, for one tokenizer and one kind of model. Imports nothing heavy."""

import hashlib
import os
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.conversations import TemplateRefused, conversation_pieces
from pipeline.data.fast_bpe import FastBpe
from pipeline.data.instruct import Conversation, Document, Example, example_texts
from pipeline.data.tokenizer import text_frame
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COMPARED = 500  # texts of a corpus on which a faster core has to agree before it is used alone
# The special tokens that each objective needs.
NEEDED = {
    "masked": ["mask_token", "pad_token", "cls_token", "sep_token"],
    "causal": ["eos_token"],
    "seq2seq": ["eos_token", "pad_token"],
}
ANCHORS = ("\n", ":", "x")  # what a response may stand behind; tokens seldom span one of them


@dataclass
class Tokens:
    """A tokenized document of n tokens.

    ids: int [n]. For causal models with all that the tokenizer adds (bos, eos); for masked models
        the bare text, as `<s> ... </s>` go around each piece of it.
    word_starts: bool [n], where a whole word begins; None for causal models.
    predicted: bool [n], which tokens are learnt; None: all.
    whole: must not be cut.
    """

    ids: np.ndarray
    word_starts: np.ndarray | None = None
    predicted: np.ndarray | None = None
    whole: bool = False
    refused: str = ""  # why the chat template refuses it; it has no tokens then


@dataclass(frozen=True)
class Frame:
    """The special tokens of a row: around every piece (masked models only), and the padding."""

    before: list[int]
    after: list[int]
    pad: int

    @property
    def ends(self) -> int:
        return len(self.before) + len(self.after)


@dataclass
class Encoder:
    """Text to tokens. Special tokens that are written in a document are text."""

    tokenizer: "PreTrainedTokenizerFast"
    backend: Any  # tokenizers.Tokenizer
    objective: str  # of the model
    before: list[int]  # special tokens before a piece (masked) or document (causal)
    after: list[int]  # of an example for an encoder-decoder (seq2seq): of the prompt too
    pad: int
    template: str
    fast: FastBpe | None = None  # of texts for causal models; see `speed_up`
    compared: int = 0  # texts for which `fast` gave the same

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", objective: str, template: str) -> "Encoder":
        """Raises UserError for a tokenizer that lacks a special token that such models need."""
        from tokenizers import Tokenizer

        missing = [name for name in NEEDED[objective] if getattr(tokenizer, name) is None]
        if missing:
            raise UserError(
                f"the tokenizer has no {' and no '.join(missing)}, which a {objective} language "
                "model needs; choose another tokenizer, or another model.objective"
            )
        # a copy, as the settings would change what the caller's tokenizer does
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "</s>" in a document is text
        before, after = text_frame(tokenizer)
        if objective == "masked":  # where the tokenizer itself puts none
            before, after = before or [tokenizer.cls_token_id], after or [tokenizer.sep_token_id]
        else:  # most tokenizers end no text by themselves
            after = [tokenizer.eos_token_id]
        if objective == "seq2seq":
            before = []
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else after[0]
        return cls(tokenizer, backend, objective, before, after, pad, template)

    @property
    def frame(self) -> Frame:
        """The special tokens that packing adds: a causal model's documents bring their own, and
        what ends a text that is corrupted comes with its corruption."""
        ends = (self.before, self.after) if self.objective == "masked" else ([], [])
        return Frame(*ends, self.pad)

    @property
    def largest_id(self) -> int:
        return max([*self.backend.get_vocab().values(), *self.before, *self.after])

    def identity(self, whole: bool, chat: bool) -> dict[str, Any]:
        """What changes the tokens of texts, of whole examples, or of chats."""
        known = {
            "backend": hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16],
            "before": self.before,
            "after": self.after,
        }
        if whole:
            known["template"] = "chat" if chat else self.template
        if chat or (whole and self.template == "chat"):
            text = str(self.tokenizer.chat_template)
            known["chat_template"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return known

    def speed_up(self) -> None:
        """Encode texts with tiktoken where it gives the same ids; for corpora of many texts."""
        if self.objective != "masked":  # whole words are known to the tokenizers library only
            self.fast = FastBpe.of(self.backend)

    @property
    def core(self) -> str:
        """The name of what encodes texts."""
        return "tiktoken" if self.fast else "tokenizers"

    def encode(self, documents: Items[Document]) -> list[Tokens]:
        """In the order of the documents."""
        texts = [d for d in documents if isinstance(d, str)]
        examples = [d for d in documents if isinstance(d, Example)]
        encoded = {
            str: iter(self._encode_texts(texts) if texts else []),
            Example: iter(self._encode_examples(examples) if examples else []),
            Conversation: (
                self._encode_conversation(d) for d in documents if isinstance(d, Conversation)
            ),
        }
        return [next(encoded[type(d)]) for d in documents]

    @property
    def special_ids(self) -> set[int]:
        """Of tokens that are no text."""
        added = self.backend.get_added_tokens_decoder().items()
        return {*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)}

    def ends_of(self, answers: Items[Example]) -> list[int]:
        """The ids with which what is learnt of these may end: the text's own end, and in a chat the
        special token behind an answer, which need not be it."""
        found = set(self.after)
        for tokens in self.encode(answers) if self.template == "chat" else ():
            found |= set(tokens.ids[tokens.predicted].tolist()[self.end_of(tokens) :][:1])
        return sorted(found)

    def end_of(self, answer: Tokens) -> int:
        """How many of an answer's learnt tokens stand before what ends it: the last special ones,
        behind which there is nothing but blanks. (A template may begin an answer with others.)"""
        learnt, special = answer.ids[answer.predicted].tolist(), self.special_ids
        last = max((i for i, token in enumerate(learnt) if token in special), default=-1)
        if last < 0 or self.backend.decode(learnt[last + 1 :]).strip():
            return len(learnt)
        while last and learnt[last - 1] in special:
            last -= 1
        return last

    def prompts(self, examples: Items[Example]) -> list[np.ndarray]:
        """Of each example the ids that are read, int32 [n]: without what is to be written."""
        tokens = self.encode(examples)
        return [t.ids[~t.predicted] for t in tokens if t.predicted is not None]

    def _encode_texts(self, texts: list[str]) -> list[Tokens]:
        if self.objective == "masked":
            encoded = self.backend.encode_batch(texts, add_special_tokens=False)
            return [Tokens(np.array(e.ids, np.int32), _word_starts(e.word_ids)) for e in encoded]
        if self.objective == "seq2seq":
            return [Tokens(ids) for ids in self._text_ids(texts)]
        before, after = np.array(self.before, np.int32), np.array(self.after, np.int32)
        return [Tokens(np.concatenate([before, ids, after])) for ids in self._text_ids(texts)]

    def _text_ids(self, texts: list[str]) -> list[np.ndarray]:
        """int32, without special tokens."""
        fast = None
        if self.fast:
            parallel = os.environ.get("TOKENIZERS_PARALLELISM") == "true"
            threads = int(os.environ.get("RAYON_NUM_THREADS", 1)) if parallel else 1
            try:
                fast = self.fast.encode(texts, threads)
            except Exception:  # of its regular expressions, on odd texts
                fast = None
            if fast is not None and self.compared >= COMPARED:
                return fast
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(e.ids, np.int32) for e in encoded]
        if fast is not None:
            if all(map(np.array_equal, fast, ids)):
                self.compared += len(ids)
            else:
                self.fast = None
        return ids

    def _encode_examples(self, examples: list[Example]) -> list[Tokens]:
        pairs = [example_texts(self.template, self.tokenizer, e) for e in examples]
        if self.objective == "seq2seq":
            return self._encode_pairs(pairs)
        if self.template == "plain":  # what ends a prompt is no part of the first word behind it
            pairs = [(prompt.rstrip(), " " + answer) for prompt, answer in pairs]
        chat = self.template == "chat"  # its special tokens stand in the text
        self.backend.encode_special_tokens = not chat
        try:
            heads = [e.ids for e in self._encode([prompt for prompt, _ in pairs])]
            wholes = [e.ids for e in self._encode([prompt + answer for prompt, answer in pairs])]
            tails = [
                self._continuation(head, whole, answer)
                for head, whole, (_, answer) in zip(heads, wholes, pairs, strict=True)
            ]
        finally:
            self.backend.encode_special_tokens = True
        found = []
        for head, tail in zip(heads, tails, strict=True):
            prompt = head if chat else self.before + head
            ids = np.array(prompt + tail + ([] if chat else self.after), np.int32)
            found.append(Tokens(ids, None, np.arange(len(ids)) >= len(prompt), whole=True))
        return found

    def _encode_pairs(self, pairs: list[tuple[str, str]]) -> list[Tokens]:
        """Prompts and responses for two sides of a model, so that each is a text of its own."""
        sides = [
            [ids.tolist() + self.after for ids in self._text_ids([pair[i] for pair in pairs])]
            for i in (0, 1)
        ]
        return [
            Tokens(
                np.array(source + target, np.int32),
                predicted=np.arange(len(source) + len(target)) >= len(source),
                whole=True,
            )
            for source, target in zip(*sides, strict=True)
        ]

    def _encode_conversation(self, conversation: Conversation) -> Tokens:
        try:
            pieces = conversation_pieces(self.tokenizer, conversation)
        except TemplateRefused as refusal:
            return Tokens(np.zeros(0, np.int32), whole=True, refused=str(refusal))
        ids: list[int] = []
        learnt: list[bool] = []
        text = ""
        whole: list[int] = []
        self.backend.encode_special_tokens = False  # they stand in the template's text
        try:
            for piece, flag in pieces:
                text += piece
                before, whole = whole, self._encode([text])[0].ids
                # The model is given what the tokenizer makes of all that is said so far, which
                # need not read as the text (SentencePiece puts a blank behind special tokens).
                known = next((k for k in (ids, before) if whole[: len(k)] == k), None)
                if (flag and ids) or known is None:
                    new = self._continuation(ids, whole, piece)
                else:
                    new = whole[len(known) :]
                ids = ids + new
                learnt += [flag] * len(new)
        finally:
            self.backend.encode_special_tokens = True
        return Tokens(np.array(ids, np.int32), None, np.array(learnt, bool), whole=True)

    def _encode(self, texts: list[str]) -> list[Any]:
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)

    def _continuation(self, head: list[int], whole: list[int], text: str) -> list[int]:
        """The tokens that continue a prompt's tokens, as a model that is given those writes them.

        By itself, SentencePiece puts a blank before a text; with the prompt, a token may span both.
        So: what the whole adds to the prompt, or the text behind another one (ANCHORS), or alone;
        the first of them that reads as the text, else (a tokenizer that changes text) the first.
        """
        candidates = (
            ids[len(start) :]
            for start, ids in self._starts(head, whole, text)
            if ids[: len(start)] == start
        )
        first: list[int] | None = None
        before = self._decode(head)
        for tail in candidates:
            first = tail if first is None else first
            if self._decode(head + tail) == before + text:
                return tail
        assert first is not None  # the text alone is always one
        return first

    def _starts(
        self, head: list[int], whole: list[int], text: str
    ) -> Iterator[tuple[list[int], list[int]]]:
        yield head, whole
        for anchor in ANCHORS:
            start, both = self._encode([anchor, anchor + text])
            yield start.ids, both.ids
        yield [], self._encode([text])[0].ids

    def _decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


def _word_starts(word_ids: list[int | None]) -> np.ndarray:
    """A token outside of every word is a word of its own."""
    words = np.array([-1 if w is None else w for w in word_ids], np.int32)
    return np.concatenate([[True], (words[1:] != words[:-1]) | (words[1:] < 0)])[: len(words)]
