"""What a recipe of an encoder-decoder cannot have."""

from pipeline.recipe import Recipe


def seq2seq_problems(r: Recipe) -> list[str]:
    """Every problem as 'key: what is wrong; the fix'."""
    if r.model.objective != "seq2seq":
        return []
    found: list[str] = []
    d = r.data
    if d.cross_document or d.keep_apart != "auto":
        found.append(
            "data: cross_document and keep_apart have no effect on an encoder-decoder, which reads "
            "one document a row; remove them"
        )
    chats = [f"domains.{name}.chat_field" for name, x in d.domains.items() if x.chat_field]
    if chats or d.template == "chat":
        found.append(
            f"data.{(chats or ['template'])[0]}: an encoder-decoder has no chats here; give "
            "`instruction` and template=plain or alpaca"
        )
    for key in ("das", "derpp", "ssu"):
        if getattr(r, key) is not None:
            found.append(
                f"{key}: reads the hidden states or inputs of one stack of layers, and an "
                "encoder-decoder has two; take another method"
            )
    return found
