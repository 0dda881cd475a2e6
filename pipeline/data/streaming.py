"""The domains of a recipe as streams, read while they are trained on (`data.prepare: false`)."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from transformers import PreTrainedTokenizerFast

from pipeline.data.bad_lines import BadLines
from pipeline.data.batches import StageBatches, frame_of
from pipeline.data.encode import Encoder, Tokens
from pipeline.data.instruct import Document
from pipeline.data.packing import Shape
from pipeline.data.prepared import Side
from pipeline.data.reader import _digest, _row
from pipeline.data.sources import Unit, read_unit, sampled, side_of, units_of
from pipeline.data.stage import domains_of, shares_of
from pipeline.data.stream import BATCH, HeldDocuments, Shard, StreamedRows, StreamedSource
from pipeline.errors import UserError
from pipeline.ranks import on_rank0
from pipeline.recipe import Recipe

SAMPLE = 300  # training documents that are looked at before the stage


@dataclass(frozen=True)
class Streamed:
    """What is kept of a domain that is not: held-out documents, and a few to train on."""

    train: HeldDocuments
    heldout: HeldDocuments


def open_streams(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, bad: dict[str, BadLines]
) -> dict[str, Streamed]:
    """Read as much of the measured domains as is measured. bad: filled by domain.

    Raises:
        UserError: a domain without held-out documents.
    """
    encoder = Encoder.of(tokenizer, recipe.model.objective, recipe.data.template)
    wanted = recipe.data.heldout_sequences * recipe.data.sequence_length  # tokens
    found = {}
    for name in recipe.heldout_domains():
        kept: list[Tokens] = []
        documents = _documents(recipe, name, "heldout", bad)
        while sum(len(t.ids) for t in kept) < wanted and (batch := list(islice(documents, BATCH))):
            kept += encoder.encode(batch)
        few = encoder.encode(list(islice(_documents(recipe, name, "train", bad), SAMPLE)))
        whole = _whole(recipe, name)
        sides = [HeldDocuments(dict(enumerate(tokens)), whole) for tokens in (few, kept)]
        found[name] = Streamed(*sides)
    return found


def streamed_batches(
    recipe: Recipe,
    stage: int,
    tokenizer: PreTrainedTokenizerFast,
    rank: int,
    ranks: int,
    bad: dict[str, BadLines],
) -> StageBatches:
    """The batches of a stage that reads its domains as it goes. All ranks call it. bad: filled by
    domain.

    Raises:
        UserError: none of the first examples of a domain is short enough.
    """
    s, data = recipe.stages[stage - 1], recipe.data
    names = domains_of(recipe, stage)
    encoder = Encoder.of(tokenizer, recipe.model.objective, data.template)
    frame = frame_of(recipe, tokenizer)
    for name in names:
        if _whole(recipe, name):  # those that do not fit are passed over, for ever if need be
            on_rank0(partial(_require_fitting, recipe, name, encoder))
    sources = []
    for share in shares_of(recipe, stage):
        shards = [
            Shard(names.index(name), partial(_read, recipe, name, "train", unit, bad))
            for name in share.domains
            for unit in _units(recipe, name, "train")
        ]
        sources.append(
            StreamedSource("+".join(share.domains), shards, share.share, s.max_repetitions)
        )
    rows = StreamedRows(
        sources,
        [(name, _whole(recipe, name)) for name in names],
        encoder,
        frame,
        Shape(data.sequence_length, frame.ends, alone=not data.packing),
        recipe.train.batch_size,
        rank=rank,
        ranks=ranks,
        seed=recipe.stage_seed(stage),
        window=data.shuffle_window,
        together=data.open_shards,
    )
    settings = {
        "data.shuffle_window": data.shuffle_window,
        "data.open_shards": data.open_shards,
        "shards": [len(source.shards) for source in sources],
    }
    return StageBatches(recipe, stage, tokenizer, rows, settings, rank, ranks)


def _require_fitting(recipe: Recipe, name: str, encoder: Encoder) -> None:
    few = encoder.encode(list(islice(_documents(recipe, name, "train", {}), SAMPLE)))
    lengths = [len(t.ids) for t in few if not t.refused]
    length = recipe.data.sequence_length
    if few and not lengths:
        raise UserError(
            f"data.domains.{name}: the chat template refuses each of the first {len(few)} "
            f"conversations ({few[0].refused})"
        )
    if lengths and min(lengths) > length:
        raise UserError(
            f"data.sequence_length: none of the first {len(lengths)} examples of {name} fits into "
            f"{length} tokens; raise it (the longest of them has {max(lengths)})"
        )


def training_documents(recipe: Recipe, names: list[str]) -> Iterator[Document]:
    """The documents of some domains as they are read, one of each in turn.

    Raises:
        UserError: there is none.
    """
    found = False
    for document in _in_turn([_documents(recipe, name, "train", {}) for name in names]):
        found = True
        yield document
    if not found:
        units = [u for name in names for u in _units(recipe, name, "train")]
        where = ", ".join(u.place for u in units[:5])
        raise UserError(f"data.domains.{'+'.join(names)}: no document to train on in {where}")


def _whole(recipe: Recipe, name: str) -> bool:
    return recipe.data.domains[name].whole


def _units(recipe: Recipe, name: str, side: Side) -> list[Unit]:
    """The files of a domain, or parts of a data set, that have documents of a side, one by one;
    those of a task together, as which of its rows are taken depends on all of them."""
    domain = recipe.data.domains[name]
    units = [u for u in units_of(domain) if u.side in (None, side)]
    if domain.counted:
        return units
    return [one for u in units for one in ([replace(u, files=(f,)) for f in u.files] or [u])]


def _documents(
    recipe: Recipe, name: str, side: Side, bad: dict[str, BadLines]
) -> Iterator[Document]:
    """One of each file in turn, so that the first of them are of all files."""
    return _in_turn([_read(recipe, name, side, u, bad) for u in _units(recipe, name, side)])


def _in_turn(sources: list[Iterator[Document]]) -> Iterator[Document]:
    waiting = deque(sources)
    while waiting:
        documents = waiting.popleft()
        for document in islice(documents, 1):
            yield document
            waiting.append(documents)


def _read(
    recipe: Recipe, name: str, side: Side, unit: Unit, bad: dict[str, BadLines]
) -> Iterator[Document]:
    """The documents of a file that are of this side."""
    domain = recipe.data.domains[name]
    lines = bad.setdefault(name, BadLines(budget=recipe.data.bad_lines))
    for document in read_unit(unit, domain, lines):
        row = _row(document)
        here = side_of(unit, domain, _digest(row)) == side
        if here and (side == "heldout" or sampled(row, domain)):
            yield document
