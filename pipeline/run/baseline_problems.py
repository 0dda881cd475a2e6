"""What is wrong with the recipe's methods: das, kd, ewc, derpp."""

from pipeline.recipe import Recipe


def baseline_problems(r: Recipe) -> list[str]:
    """Every problem as 'key: what is wrong; the fix'."""
    found: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    for name in ("das", "derpp"):
        need(
            getattr(r, name) is None or r.data.prepare,
            f"{name}: reads a stage's text again from its prepared corpus, and data.prepare=false "
            "makes none; remove one of them",
        )
    for name in ("ewc", "derpp"):
        need(
            getattr(r, name) is None or len(r.stages) > 1,
            f"{name}: has no effect in a run of one stage: it protects earlier stages; remove it",
        )
    if r.das:
        need(r.das.sequences >= 1, "das.sequences: must be at least 1")
        need(0 < r.das.dropout < 1, f"das.dropout: {r.das.dropout} is outside (0, 1)")
        need(r.das.contrast >= 0, "das.contrast: must be at least 0 (0 leaves the contrast out)")
        need(
            r.model.lora is None,
            "das: protects the weights of heads and neurons, which LoRA does not train; remove one "
            "of them",
        )
    if r.kd:
        need(r.kd.weight > 0, "kd.weight: must be positive; kd=null leaves it out")
        need(r.kd.temperature > 0, "kd.temperature: must be positive")
    if r.ewc:
        need(r.ewc.weight > 0, "ewc.weight: must be positive; ewc=null leaves it out")
        need(
            r.train.precision != "fp16",
            "ewc: sums squared gradients, which fp16's loss scale would distort; set "
            "train.precision=bf16 or fp32",
        )
    if r.derpp:
        need(r.derpp.sequences >= 1, "derpp.sequences: must be at least 1")
        need(
            r.derpp.fraction * r.train.batch_size >= 1,
            f"derpp.fraction: {r.derpp.fraction} of train.batch_size={r.train.batch_size} is less "
            "than one sequence a step",
        )
        need(min(r.derpp.alpha, r.derpp.beta) >= 0, "derpp: alpha and beta must be at least 0")
        need(
            max(r.derpp.alpha, r.derpp.beta) > 0,
            "derpp: has no effect where alpha and beta are 0; remove it",
        )
    return found
