"""The corpora of a recipe prepared without a run."""

from pipeline.data.prepare import describe, prepare, summary
from pipeline.errors import UserError
from pipeline.progress import say
from pipeline.recipe import Recipe
from pipeline.run.tokenizer import model_tokenizer


def prepare_recipe(recipe: Recipe, dry_run: bool) -> None:
    """Prepare every domain, or with `dry_run` say what that would take.

    Raises:
        UserError: the tokenizer is one that the run trains; a recipe that streams; what `prepare`
            refuses.
    """
    if not recipe.data.prepare:
        raise UserError("data.prepare: is false, so that there is nothing to prepare; remove it")
    if recipe.model.train_tokenizer is not None:
        raise UserError(
            "model.train_tokenizer: the run trains the tokenizer first, and prepares the corpora "
            "then; train with this recipe, or give `model.tokenizer`"
        )
    tokenizer = model_tokenizer(recipe.model)
    for name in recipe.data.domains:
        if dry_run:
            say(describe(recipe, name, tokenizer))
        else:
            prepared = prepare(recipe, name, tokenizer, thorough=True)
            say(f"{name}: ready, {summary(prepared)}, in {prepared.folder}")
