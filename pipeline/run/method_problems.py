"""What is wrong with the methods of a recipe, and with the targets at which its stages end."""

from pipeline.recipe import Recipe


def companion_problems(r: Recipe) -> list[str]:
    """What is wrong with averages of weights and gates of the loss."""
    found: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    if (p := r.publish_average) is not None:
        need(
            0 < p.start < 1,
            f"publish_average.start: {p.start:g} is outside (0, 1): the share of the stage's start",
        )
        need(
            r.model.lora is None,
            "publish_average: an average of an adapter's factors is no average of the model; "
            "remove it, or train without model.lora",
        )
    if (e := r.ema) is not None:
        need(0 < e.decay < 1, f"ema.decay: {e.decay:g} is outside (0, 1)")
    if (g := r.entropy_gate) is not None:
        need(g.tokens >= 2, f"entropy_gate.tokens: {g.tokens} have no entropy; give 2 or more")
    if (t := r.kd) is not None:
        need(
            r.model.lora is None or r.model.lora.quantize == "none",
            "kd: its frozen copy of the model cannot be quantized; set model.lora.quantize=none "
            "or remove it",
        )
        need(
            t.teacher == "previous" or len(r.stages) > 1,
            "kd.teacher: has no effect in a run of one stage, whose start is the base; remove it",
        )
    return found


def stop_problems(r: Recipe) -> list[str]:
    """What is wrong with the targets at which stages end."""
    found = []
    held = r.heldout_domains()
    places = [(f"stages[{i}].stop", s.stop, [s]) for i, s in enumerate(r.stages)]
    ruled = [s for s in r.stages if s.stop is None and r.stop and r.stop.domain in s.domains]
    for where, stop, stages in [*places, ("stop", r.stop, ruled)]:
        if stop is None:
            continue
        if not stop.loss > 0:
            found.append(f"{where}.loss: {stop.loss:g} must be positive: nats per predicted token")
        if stop.steps < 1:
            found.append(f"{where}.steps: must be at least 1")
        several = where == "stop" or len(stages[0].domains) > 1
        domain = stop.domain or (None if several else stages[0].domains[0])
        if domain is None:
            found.append(f"{where}.domain: name the domain whose held-out loss is the target")
        elif domain not in held:
            found.append(
                f"{where}.domain: {domain!r} has no held-out loss; these have: {', '.join(held)}"
            )
        elif not stages:
            found.append(f"{where}: has no effect: no stage trains {domain}; remove it")
        for stage in stages:
            if stage.steps is not None and stage.steps <= stop.steps:
                found.append(
                    f"{where}.steps: {stop.steps} has no effect in a stage of {stage.steps} steps: "
                    "it ends before the first measurement; lower it"
                )
    return found
