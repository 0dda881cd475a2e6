"""What is wrong with what a recipe does to be fast, or to need less memory."""

from pipeline.recipe import Recipe


def speed_problems(r: Recipe) -> list[str]:
    """What does not go with `train.compile` and with `train.chunked_loss`."""
    found = []
    if r.train.compile and r.mask.enabled and r.mask.backward != "dense":
        found.append(
            f"train.compile: the rows of mask.backward={r.mask.backward} are known after the "
            "backward is compiled; set one of the two to its default"
        )
    if r.train.compile and r.model.lora is not None:
        found.append("train.compile: not of an adapter's layers; remove it, or model.lora")
    if r.train.chunked_loss:
        if r.mask.enabled and "head" in (r.mask.components or []):
            found.append(
                "train.chunked_loss: mask.components has the head, whose outputs would be computed "
                "in parts and twice; remove one of the two"
            )
        for name in ("entropy_gate", "kd"):
            if getattr(r, name) is not None:
                found.append(f"train.chunked_loss: {name} needs the logits; remove one of the two")
    return found
