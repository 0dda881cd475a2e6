"""Tokenizers: load one from a folder or the hub, or train a small byte-level BPE."""

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
    the vocabulary has `<mask>`, else as GPT-2's.

    Raises:
        UserError: the folder or id cannot be read, or gives no (or next to no) vocabulary.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        names = {p.name for p in folder.iterdir()}
        known = names & {"tokenizer.json", "tokenizer_config.json"}
        if not known and {"vocab.json", "merges.txt"} <= names:
            return _checked(_from_bpe_files(folder), path_or_id)
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
                "The folder needs tokenizer.json, or vocab.json and merges.txt, or "
                f"tokenizer_config.json beside the model file; it holds: {', '.join(sorted(names))}"
            )
        else:
            fix = "Check the id, the revision and the network, or give a folder."
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":. ")
        raise UserError(f"tokenizer {path_or_id}: cannot be loaded ({reason}). {fix}") from None
    return _checked(tokenizer, path_or_id)


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
