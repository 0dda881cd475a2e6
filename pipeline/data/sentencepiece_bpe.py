"""A fast tokenizer that encodes as the SentencePiece library does, from a folder with its model.

transformers 5 orders the merges by the pieces' ids where SentencePiece goes by their scores, so
that in Llama-2's vocabulary runs of blanks (the indentation of code) come out differently; and it
cuts a text at user-defined symbols before SentencePiece's leading blank is put in front, so that
each part gets one. Here the model's own numbers are used, and whatever was loaded is held against
the library.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
# What tokenizers differ on: blanks, line ends, digits, scripts, composed letters, control symbols.
PROBES = (
    "The quick brown fox, at 12:30, paid $1,234.56 (or so).", "  two  blanks  ",
    "\tdef f(x):\n    return x ** 2\n\n", "naïve café, Ångström, ﬁ, é",
    "日本語のテキスト 한국어 العربية", "🙂👍🏽 and ①",
    "a\u00a0b\u200bc", "x", " ", "1234567890", "i'm they'll",
)  # fmt: skip


def model_file(folder: Path) -> Path | None:
    """The SentencePiece model of a folder, None where there is none."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def read_model(file: Path) -> Any:
    """The SentencePiece model of a file, as its protocol buffer.

    Raises:
        UserError: the file is no such model.
    """
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise UserError(f"tokenizer {file}: not a SentencePiece model ({error})") from None
    return model


def is_plain_bpe(model: Any) -> bool:
    """Whether `tokenizer_of` can convert the model: BPE without normalization, as Llama's."""
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    plain = normalizer.name == "identity" and not normalizer.remove_extra_whitespaces
    suffix = trainer.treat_whitespace_as_suffix
    return plain and not suffix and trainer.model_type == trainer.BPE


def tokenizer_of(folder: Path, model: Any) -> "PreTrainedTokenizerFast":
    """The tokenizer of a folder whose SentencePiece model `is_plain_bpe`, bos in front."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    pieces, trainer = model.pieces, model.trainer_spec
    settings = _json(folder / "tokenizer_config.json")
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    merges = sorted(
        (-piece.score, ids[left], ids[right], left, right)
        for piece in pieces
        if piece.type == piece.NORMAL
        for left, right in ((piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece)))
        if left in ids and right in ids
    )
    added = _added_tokens(folder, settings)
    vocabulary = {**ids, **{str(token): i for i, token in added.items()}}
    unknown, bos, eos = (
        pieces[i].piece if i >= 0 else None
        for i in (trainer.unk_id, trainer.bos_id, trainer.eos_id)
    )
    symbols = [p.piece for p in pieces if p.type == p.USER_DEFINED]
    bpe = models.BPE(
        vocabulary, [m[3:] for m in merges], unk_token=unknown, fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=bool(symbols),  # a user-defined symbol is whole although nothing merges to it
    )  # fmt: skip
    backend = Tokenizer(bpe)
    blanks: list[Any] = [normalizers.Replace(" ", "▁")]
    strip: list[Any] = []
    if model.normalizer_spec.add_dummy_prefix:
        blanks = [normalizers.Prepend("▁"), *blanks]
        strip = [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence(blanks)
    if symbols:  # the longest first, wherever they stand, also in a word
        either = "|".join(re.escape(s) for s in sorted(symbols, key=len, reverse=True))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(either), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    control = [AddedToken(t, special=True, normalized=False) for t in (unknown, bos, eos) if t]
    backend.add_special_tokens(control)
    for _, token in sorted(added.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    if bos and settings.get("add_bos_token", True):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, trainer.bos_id)]
        )
    chat = folder / "chat_template.jinja"
    template = settings.get("chat_template")
    named = {**_json(folder / "special_tokens_map.json"), **settings}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=_content(named.get("eos_token")) or eos,
        unk_token=unknown,
        pad_token=_content(named.get("pad_token")),
        chat_template=chat.read_text(encoding="utf-8") if chat.is_file() else template,
    )


CONTROL = "<s> </s> <unk> <pad>"  # text to SentencePiece; what transformers converts reads tokens


def require_equal(tokenizer: "PreTrainedTokenizerFast", file: Path, *more: str) -> None:
    """Hold a tokenizer against the SentencePiece library's own encoding of some texts (and `more`).

    Raises:
        UserError: they differ, where and how.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    original = SentencePieceProcessor(model_file=str(file))
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True  # as SentencePiece has it: text
    for text in [*_probes(read_model(file)), *more]:
        ids = backend.encode(text, add_special_tokens=False).ids
        ours = [backend.id_to_token(i) for i in ids]  # pieces: some models number theirs anew
        theirs = [original.id_to_piece(i) for i in original.encode(text)]
        if ours != theirs:
            raise UserError(
                f"tokenizer {file.parent}: the fast tokenizer encodes {text!r} as {ours}, "
                f"SentencePiece as {theirs}. The model would not see the tokens that it was "
                "trained on. Put the tokenizer.json of this model into the folder"
            )


def _probes(model: Any) -> list[str]:
    symbols = [p.piece.replace("▁", " ") for p in model.pieces if p.type == p.USER_DEFINED][:20]
    inside = [f"{s}one{s}two {s} three" for s in symbols]
    return [*PROBES, *inside]


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, Any]:
    """Tokens that were added to the SentencePiece model's: id -> tokenizers.AddedToken, from
    tokenizer_config.json or the older added_tokens.json."""
    from tokenizers import AddedToken

    known = _json(folder / "added_tokens.json")
    older = {number: AddedToken(text, normalized=False) for text, number in known.items()}
    newer = {}
    for number, token in settings.get("added_tokens_decoder", {}).items():
        keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
        given = {k: bool(token.get(k, False)) for k in keys}
        newer[int(number)] = AddedToken(token["content"], **given)
    return {**older, **newer}


def _content(token: Any) -> str | None:
    """Of a special token, which a configuration writes as a text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"tokenizer {file}: not JSON: {error}") from None
    return content if isinstance(content, dict) else {}
