"""What a recipe that trains a soft prompt cannot have."""

from pipeline.recipe import Recipe

# They read, hold or copy weights that a prompt leaves frozen, or run the model without its prompt.
WITHOUT = ("anchor", "olora", "hft", "ssu", "das", "kd", "derpp", "hat_adapter")


def prompt_problems(r: Recipe) -> list[str]:
    """Every problem as 'key: what is wrong; the fix'."""
    p, m = r.model.prompt, r.model
    if p is None:
        return []
    found: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    need(p.tokens >= 1, f"model.prompt.tokens: {p.tokens} must be at least 1")
    need(m.lora is None, "model: give at most one of `lora` and `prompt`")
    need(
        not r.mask.enabled,
        "model.prompt: no linear is trained whose rows could be masked; set mask.enabled=false",
    )
    need(
        m.objective != "masked",
        "model.prompt: PEFT has none for masked models; set model.objective=causal or seq2seq",
    )
    need(
        not r.data.packing,
        "model.prompt: stands in front of every document, one a row; set data.packing=false",
    )
    need(
        not m.initialize_missing,
        "model.initialize_missing: a prompt would leave the random weights as they are; train them "
        "without `prompt` first",
    )
    for name in WITHOUT:
        need(
            getattr(r, name) is None,
            f"{name}: has nothing to work on beside model.prompt, which trains no weight of the "
            "model; remove one of them",
        )
    need(
        r.l2_to_start is None or r.l2_to_start.start == "stage",
        "l2_to_start.start: a prompt is not in the base; set start=stage",
    )
    e = r.evaluate
    for key in ("benchmarks", "humaneval", "end_tasks"):
        need(
            not getattr(e, key),
            f"evaluate.{key}: asks the model without its prompt; remove it, or train without "
            "model.prompt",
        )
    return found
