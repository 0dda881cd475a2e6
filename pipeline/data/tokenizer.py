"""Tokenizers: load one from a folder or the hub, or train a small byte-level BPE."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's order, without its ids for pairs
# "a <mask>" takes the blank before it along, as the words of such a vocabulary do
MASK: dict[str, Any] = {"content": "<mask>", "lstrip": True, "special": True}
SMALLEST = 100  # entries; fewer means that the vocabulary file was not understood


def load_tokenizer(path_or_id: str, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a folder or a hub id; code from the hub is never run.

    A folder that holds only `vocab.json` and `merges.txt` is read as RoBERTa's byte-level BPE if
    the vocabulary has `<mask>`, else as GPT-2's. One that holds a SentencePiece BPE model
    (`tokenizer.model`, as Llama-2's) and no `tokenizer.json` is read as SentencePiece reads it.

    Raises:
        UserError: the folder or id cannot be read, or gives no (or next to no) vocabulary.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        names = {p.name for p in folder.iterdir()}
        known = names & {"tokenizer.json", "tokenizer_config.json"}
        if not known and {"vocab.json", "merges.txt"} <= names:
            return _checked(_from_bpe_files(folder), path_or_id)
        if "tokenizer.model" in names and "tokenizer.json" not in names:
            model = _sentencepiece_bpe(folder / "tokenizer.model")
            if model is not None:
                return _checked(_from_sentencepiece(folder, model), path_or_id)
    elif folder.exists() or path_or_id.startswith(("/", ".", "~")) or path_or_id.count("/") > 1:
        raise UserError(f"tokenizer {path_or_id}: no such folder (give a folder or a hub id)")

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else path_or_id,
            revision=revision,
            trust_remote_code=False,
        )
    except Exception as error:  # OSError, ValueError, KeyError, and those of the tokenizers library
        if folder.is_dir():
            fix = (
                "It needs tokenizer.json, tokenizer.model, or vocab.json and merges.txt, or "
                f"tokenizer_config.json and its files; it holds: {', '.join(sorted(names))}"
            )
        else:
            fix = "Check the id, the revision and the network, or give a folder."
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":. ")
        raise UserError(f"tokenizer {path_or_id}: cannot be loaded ({reason}). {fix}") from None
    return _checked(tokenizer, path_or_id)


def text_start(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The token with which the tokenizer itself begins a text: bos for Llama-2, none for GPT-2."""
    bos = tokenizer.bos_token_id
    return [bos] if bos in tokenizer("a")["input_ids"][:1] else []


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE with RoBERTa's special tokens (ids 0 to 4); deterministic.

    Any text can be encoded, so `<unk>` never occurs. Raises UserError without text.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL[:-1], AddedToken(**MASK)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    count = 0

    def counted() -> Iterable[str]:
        nonlocal count
        for text in texts:
            count += 1
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not count:
        raise UserError("no text to train a tokenizer on")
    return _roberta(backend)


def _checked(tokenizer: Any, name: str) -> "PreTrainedTokenizerFast":
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"tokenizer {name}: has no fast version; save one as tokenizer.json in the folder"
        )
    if len(tokenizer) < SMALLEST:
        raise UserError(
            f"tokenizer {name}: only {len(tokenizer)} entries, so its vocabulary file was not "
            "understood; check tokenizer_class in tokenizer_config.json"
        )
    return tokenizer


def _from_bpe_files(folder: Path) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"tokenizer {folder}: vocab.json or merges.txt: {error}") from None
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if backend.token_to_id("<mask>") is not None:
        return _roberta(backend)
    from tokenizers import decoders

    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>" if backend.token_to_id("<|endoftext|>") is not None else None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end
    )


def _from_sentencepiece(folder: Path, model: Any) -> "PreTrainedTokenizerFast":
    """A fast tokenizer that encodes as the SentencePiece library does, bos in front.

    transformers 5 orders the merges by the pieces' ids where SentencePiece goes by their scores, so
    that in Llama-2's vocabulary runs of blanks (the indentation of code) come out differently.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces, trainer = model.pieces, model.trainer_spec
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    merges = sorted(
        (-piece.score, ids[left], ids[right], left, right)
        for piece in pieces
        if piece.type == piece.NORMAL
        for left, right in ((piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece)))
        if left in ids and right in ids
    )
    unknown, bos, eos = (
        pieces[i].piece if i >= 0 else None
        for i in (trainer.unk_id, trainer.bos_id, trainer.eos_id)
    )
    bpe = models.BPE(
        ids, [m[3:] for m in merges], unk_token=unknown, byte_fallback=trainer.byte_fallback,
        fuse_unk=True,
    )  # fmt: skip
    backend = Tokenizer(bpe)
    blanks: list[Any] = [normalizers.Replace(" ", "▁")]
    strip: list[Any] = []
    if model.normalizer_spec.add_dummy_prefix:
        blanks = [normalizers.Prepend("▁"), *blanks]
        strip = [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence(blanks)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [AddedToken(t, special=True, normalized=False) for t in (unknown, bos, eos) if t]
    backend.add_special_tokens(special)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if bos and settings.get("add_bos_token", True):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, trainer.bos_id)]
        )
    chat = folder / "chat_template.jinja"
    template = chat.read_text(encoding="utf-8") if chat.is_file() else settings.get("chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        pad_token=settings.get("pad_token"),
        chat_template=template,
    )


def _sentencepiece_bpe(file: Path) -> Any | None:
    """The SentencePiece model of a file, None unless it is BPE without normalization (Llama's)."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise UserError(f"tokenizer {file}: not a SentencePiece model ({error})") from None
    normalizer, kind = model.normalizer_spec, model.trainer_spec.model_type
    plain = normalizer.name == "identity" and not normalizer.remove_extra_whitespaces
    return model if plain and kind == model.trainer_spec.BPE else None


def _roberta(backend: "Tokenizer") -> "PreTrainedTokenizerFast":
    """Wrap a byte-level BPE whose vocabulary has RoBERTa's special tokens."""
    from tokenizers import AddedToken, decoders, processors
    from transformers import PreTrainedTokenizerFast

    missing = [token for token in SPECIAL if backend.token_to_id(token) is None]
    if missing:
        raise UserError(f"tokenizer: the vocabulary has <mask> but not {', '.join(missing)}")
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token=AddedToken(**MASK),
    )
