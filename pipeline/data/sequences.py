"""Packed rows of tokens, as models take them."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.encode import Frame, Tokens
from pipeline.data.mixture import Part
from pipeline.data.packing import Row


@dataclass
class Sequence:
    """One packed sequence of `length` tokens.

    ids: int32 [length], padded with the pad token (or, where there is none, end of text).
    words: int32 [length], which whole word of the sequence a token belongs to, counted from 0;
        -1 on special tokens and padding, and everywhere for causal models.
    segments: int16 [length], which document of the pack a token belongs to; -1 on padding.
    predicted: bool [length], which tokens a causal model learns to predict: all of a text, the
        responses of an example, no padding.
    domains: int16 [length], which part of the stage a token is of; -1 on padding.
    pieces: the documents of the segments, in their order.
    """

    ids: np.ndarray
    words: np.ndarray
    segments: np.ndarray
    predicted: np.ndarray
    domains: np.ndarray
    pieces: Row = field(default_factory=list)


def read_rows(rows: Items[Row], parts: Items[Part], length: int, frame: Frame) -> list[Sequence]:
    """The tokens of planned rows; of a document only the piece is read.

    A word that is cut by the end of a piece counts as two.
    """
    pads = np.full(length, frame.pad, np.int32)
    before, after = np.array(frame.before, np.int32), np.array(frame.after, np.int32)
    no, yes = np.zeros(length, bool), np.ones(length, bool)
    # Of all rows, one after the other: tokens; a mark on each (where a word starts, or what is
    # predicted); and, for runs of `counts` tokens, their segment and domain.
    tokens: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    counts, segments, domains = [], [], []
    for row in rows:
        room = length
        for segment, (part, place, start, stop) in enumerate(row):
            piece = parts[part].corpus.piece(place, start, stop)
            if frame.ends:
                tokens += (before, piece.ids, after)
                marks += (no[: len(before)], _starts(piece), no[: len(after)])
            else:
                tokens.append(piece.ids)
                marks.append(yes[: stop - start] if piece.predicted is None else piece.predicted)
            used = stop - start + frame.ends
            counts.append(used)
            segments.append(segment)
            domains.append(part)
            room -= used
        tokens.append(pads[:room])
        marks.append(no[:room])
        counts.append(room)
        segments.append(-1)
        domains.append(-1)
    shape = len(rows), length
    masked = bool(frame.ends)
    ids = np.concatenate(tokens, dtype=np.int32).reshape(shape)
    mark = np.concatenate(marks).reshape(shape)
    segment_of = np.repeat(np.array(segments, np.int16), counts).reshape(shape)
    domain_of = np.repeat(np.array(domains, np.int16), counts).reshape(shape)
    words, learnt = np.full(shape, -1, np.int32), mark
    if masked:
        words = np.cumsum(mark, axis=1, dtype=np.int32) - 1
        words[_specials(rows, shape, frame)] = -1
        learnt = np.zeros(shape, bool)
    return [
        Sequence(ids[i], words[i], segment_of[i], learnt[i], domain_of[i], rows[i])
        for i in range(len(rows))
    ]


def _starts(piece: Tokens) -> np.ndarray:
    starts = np.ones(len(piece.ids), bool)
    if piece.word_starts is not None:
        starts[1:] = piece.word_starts[1:]
    return starts


def _specials(rows: Items[Row], shape: tuple[int, int], frame: Frame) -> np.ndarray:
    """bool of `shape`: everything but the bodies of the pieces."""
    special = np.ones(shape, bool)
    for line, row in zip(special, rows, strict=True):
        used = 0
        for _, _, start, stop in row:
            used += len(frame.before)
            line[used : used + stop - start] = False
            used += stop - start + len(frame.after)
    return special
