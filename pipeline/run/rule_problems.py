"""What is wrong with the recipe's rules for a stage that goes wrong."""

from pipeline.recipe import BadSteps, Guard, Recipe


def rule_problems(r: Recipe) -> list[str]:
    """What is wrong with the rules of `bad_steps`, the guard and the comparison of replicas."""
    found = []
    b, g, every = r.bad_steps, r.guard, r.train.compare_replicas
    if every is not None and every < 1:
        found.append("train.compare_replicas: must be at least 1, in steps")
    if b.policy == "stop" and b.budget != BadSteps.budget:
        found.append("bad_steps.budget: has no effect with policy 'stop'; remove it")
    if b.policy == "rollback" and r.resume is None:
        found.append("bad_steps.policy: 'rollback' needs resume checkpoints; set resume, or 'skip'")
    if b.policy != "stop" and r.mask.enabled and r.mask.backward == "row_sparse":
        found.append(
            "bad_steps.policy: with mask.backward=row_sparse a magnitude that is not finite is "
            "known before there is a gradient to drop; set policy=stop, or mask.backward=dense"
        )
    if b.budget < 1:
        found.append("bad_steps.budget: must be at least 1")
    if b.spike is None and b.window != BadSteps.window:
        found.append("bad_steps.window: has no effect without bad_steps.spike; remove it")
    if b.spike is not None and not b.spike > 0:
        found.append("bad_steps.spike: must be positive, in standard deviations")
    if b.window < 2:
        found.append("bad_steps.window: must be at least 2 steps")
    if g is None:
        return found
    if (g.domain is None) == (g.benchmark is None):
        found.append("guard: give the `domain` or the `benchmark` that it watches, one of the two")
    elif g.domain is not None and g.domain not in r.heldout_domains():
        known = ", ".join(r.heldout_domains())
        found.append(f"guard.domain: {g.domain!r} is not one of the measured domains ({known})")
    elif g.benchmark is not None and g.benchmark not in r.evaluate.benchmarks:
        known = ", ".join(r.evaluate.benchmarks) or "none"
        found.append(f"guard.benchmark: {g.benchmark!r} is not in evaluate.benchmarks ({known})")
    for key, unit, of in (("max_rise", "nats of held-out text", "domain"),
                          ("max_fall", "points of the benchmark", "benchmark")):  # fmt: skip
        if not getattr(g, key) > 0:
            found.append(f"guard.{key}: must be positive, in {unit}")
        if getattr(g, of) is None and getattr(g, key) != getattr(Guard, key):
            found.append(f"guard.{key}: has no effect without guard.{of}; remove it")
    if g.steps < 1:
        found.append("guard.steps: must be at least 1")
    return found
