"""The tokenizer of a run: the model's, another one, or one trained on the first stage's text."""

from functools import partial
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from pipeline.checkpoint import is_published, publish
from pipeline.data.instruct import document_text
from pipeline.data.streaming import training_documents
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.model.gguf import local_weights
from pipeline.nodes import send_folder
from pipeline.ranks import on_rank0
from pipeline.recipe import Model, Recipe

TOKENIZER_DOCUMENTS = 100_000
SENTINELS = 100  # as T5 has


def model_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The tokenizer that is given, or the one that the model comes with."""
    key = "tokenizer" if model.tokenizer else "path"
    name = getattr(model, key)
    assert name is not None  # a recipe without both is refused
    return load_tokenizer(local_weights(name), model.revision, f"model.{key}")


def run_tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer; trained on the first stage's text where it says so."""
    vocabulary = recipe.model.train_tokenizer
    if vocabulary is None:
        return model_tokenizer(recipe.model)
    target = folder / "tokenizer"

    def train() -> None:
        documents = training_documents(recipe, recipe.stages[0].domains)
        every = (document_text(d).replace("\0", "\n") for d in documents)
        texts = islice(every, TOKENIZER_DOCUMENTS)
        sentinels = SENTINELS if recipe.model.objective == "seq2seq" else 0
        trained = train_tokenizer(texts, vocabulary, sentinels)

        def write(folder: Path) -> None:
            trained.save_pretrained(folder)

        publish(target, write, {"vocabulary": len(trained)})

    if not on_rank0(partial(is_published, target)):
        on_rank0(train)
    send_folder(target)
    return load_tokenizer(str(target))
