"""Tokenizers: load one from a folder or the hub, or train a small byte-level BPE."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data import sentencepiece_bpe
from pipeline.errors import UserError
from pipeline.hub_name import from_hub

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # RoBERTa's order, without its ids for pairs
# "a <mask>" takes the blank before it along, as the words of such a vocabulary do
MASK: dict[str, Any] = {"content": "<mask>", "lstrip": True, "special": True}
SMALLEST = 100  # entries; fewer means that the vocabulary file was not understood


def load_tokenizer(
    path_or_id: str, revision: str | None = None, field: str = "tokenizer"
) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a folder or a hub id; code from the hub is never run.

    A folder that holds only `vocab.json` and `merges.txt` is read as RoBERTa's byte-level BPE if
    the vocabulary has `<mask>`, else as GPT-2's. One that holds a SentencePiece model and no
    `tokenizer.json` is read as the SentencePiece library reads it, or refused; `spiece.model` alone
    is T5's, with its 100 sentinels.

    field: that names it, for messages of what is not there.

    Raises:
        UserError: the folder or id cannot be read, or gives no (or next to no) vocabulary.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        names = {p.name for p in folder.iterdir()}
        known = names & {"tokenizer.json", "tokenizer_config.json"}
        if not known and {"vocab.json", "merges.txt"} <= names:
            return _checked(_from_bpe_files(folder), path_or_id)
        pieces = None if "tokenizer.json" in names else sentencepiece_bpe.model_file(folder)
        if pieces is not None:
            model = sentencepiece_bpe.read_model(pieces)
            if sentencepiece_bpe.is_plain_bpe(model):
                converted = _checked(sentencepiece_bpe.tokenizer_of(folder, model), path_or_id)
                sentencepiece_bpe.require_equal(converted, pieces, sentencepiece_bpe.CONTROL)
                return converted
    elif folder.exists():
        raise UserError(f"{field}: {path_or_id} is a file; give a folder or a hub id")

    from transformers import AutoTokenizer, T5Tokenizer

    alone = folder.is_dir() and not known and pieces is not None and pieces.name == "spiece.model"
    loader: Any = T5Tokenizer if alone else AutoTokenizer
    try:
        tokenizer = from_hub(
            field,
            path_or_id,
            lambda: loader.from_pretrained(
                str(folder) if folder.is_dir() else path_or_id,
                revision=revision,
                trust_remote_code=False,
            ),
        )
    except UserError:
        raise
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
    if folder.is_dir() and pieces is not None:
        sentencepiece_bpe.require_equal(_checked(tokenizer, path_or_id), pieces)
    return _checked(tokenizer, path_or_id)


def text_frame(tokenizer: "PreTrainedTokenizerFast") -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself puts before and behind a text: bos and nothing for
    Llama-2, nothing for GPT-2, two for GLM, [CLS] and [SEP] for BERT."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise UserError(
        f"tokenizer {tokenizer.name_or_path}: a text has other tokens with its special ones "
        "than without them; its post_processor is not understood here"
    )


def text_start(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The tokens with which the tokenizer itself begins a text."""
    return text_frame(tokenizer)[0]


@lru_cache(maxsize=8)  # a walk over the vocabulary
def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The largest id and one: how many embeddings a model needs. Ids may be left out below it, so
    it is not the number of tokens."""
    return max(tokenizer.get_vocab().values()) + 1


@lru_cache(maxsize=8)  # a walk over the vocabulary
def never_drawn(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Ids that no text has: of special tokens, and those that no token has."""
    holes = set(range(vocabulary_size(tokenizer))) - set(tokenizer.get_vocab().values())
    return tuple(sorted(holes | set(tokenizer.all_special_ids)))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, sentinels: int = 0
) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE with RoBERTa's special tokens (ids 0 to 4); deterministic.

    sentinels: how many of T5's <extra_id_0>, ... it has too, which stand for spans of a text.

    Any text can be encoded, so `<unk>` never occurs. Raises UserError without text.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            *SPECIAL[:-1],
            AddedToken(**MASK),
            *(f"<extra_id_{i}>" for i in range(sentinels)),
        ],
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
