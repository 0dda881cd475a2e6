"""What is wrong with the methods of a recipe, and with the targets at which its stages end."""

from pipeline.errors import near
from pipeline.recipe import EIGHT_BIT_DRIFT, Anchor, Recipe


def anchor_problems(r: Recipe) -> list[str]:
    """What is wrong with the recipe's `anchor`."""
    a = r.anchor
    if a is None:
        return []
    found: list[str] = []
    if a.text not in ("self", "random"):
        replayed = [s.replay for s in r.stages if isinstance(s.replay, dict)]
        trained = {n for names in [*(s.domains for s in r.stages), *replayed] for n in names}
        if a.text not in r.data.domains:
            found.append(
                f"anchor.text: {a.text!r} is neither 'self' nor 'random' nor in data.domains"
                f"{near(a.text, [*r.data.domains, 'self', 'random'])}"
            )
        elif a.text in trained:
            found.append(
                f"anchor.text: a stage trains on {a.text!r}, and the anchor would hold the model "
                "to what it knew of it before; name another domain, or self"
            )
        if not r.data.prepare:
            found.append(
                "anchor.text: a domain is taken from its prepared corpus, and data.prepare=false "
                "makes none; set data.prepare=true or anchor.text=self"
            )
    if not a.fraction > 0 or (a.fraction * r.train.batch_size) < 1:
        found.append(
            f"anchor.fraction: {a.fraction} of train.batch_size={r.train.batch_size} is less than "
            f"one sequence a step; give at least {1 / r.train.batch_size:.3g}, or anchor=null"
        )
    if a.weight < 0:
        found.append("anchor.weight: must be at least 0")
    if a.cache < 0:
        found.append("anchor.cache: must be at least 0 (0 asks the teacher at every step)")
    for name in ("self", "random"):
        if name in r.data.domains:
            found.append(f"data.domains.{name}: the name means something else beside an anchor")
    if a.loss == "cross_entropy" and a.cache != Anchor.cache:
        found.append("anchor.cache: has no effect on the cross-entropy of the text; remove it")
    live = a.cache == 0 and a.loss == "kl"
    quantized = r.model.lora is not None and r.model.lora.quantize != "none"
    if live and quantized and a.teacher == "previous":
        found.append(
            "anchor.cache: 0 needs a frozen copy of what the stage before published, which cannot "
            "be quantized; leave it out, or set anchor.teacher=base"
        )
    if a.teacher == "previous" and (len(r.stages) == 1 or r.start_from == "base"):
        found.append(
            "anchor.teacher: has no effect where every stage starts from the base; remove it"
        )
    if not a.mask_anchor:
        k = r.mask
        if not k.enabled:
            found.append("anchor.mask_anchor: has no effect without a mask; remove it")
        elif k.backward != "row_sparse" or k.refresh == "stage":
            found.append(
                "anchor.mask_anchor: false needs mask.backward=row_sparse, where the new text's "
                "backward leaves the masked rows out by itself; other ways mask the sum of both"
            )
        elif k.update == "strict":
            found.append(
                "anchor.mask_anchor: false moves masked rows, which mask.update=strict holds; "
                "remove one of the two"
            )
    if a.tokens < r.data.sequence_length:
        found.append(f"anchor.tokens: {a.tokens} is less than a sequence")
    return found


def method_problems(r: Recipe) -> list[str]:
    """What is wrong with the other methods of a recipe, and what does not go together."""
    found: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    lora = r.model.lora
    if r.olora is not None:
        need(
            lora is not None and lora.incremental,
            "olora: holds each stage's adapter orthogonal to the earlier ones; set "
            "model.lora.incremental=true",
        )
        need(r.olora.weight > 0, "olora.weight: must be positive")
    for name in ("hft", "ssu"):
        if getattr(r, name) is not None:
            need(
                lora is None,
                f"{name}: chooses among the model's own weights, which LoRA freezes; remove one",
            )
            need(
                r.optimizer.weight_decay == 0,
                f"{name}: optimizer.weight_decay would move the weights that are to stay; set it "
                "to 0",
            )
            need(
                r.optimizer.name == "adamw",
                f"{name}: optimizer.name={r.optimizer.name} {EIGHT_BIT_DRIFT.split(';')[0]}",
            )
    if r.mofo is not None:
        need(0 < r.mofo.share < 1, f"mofo.share: {r.mofo.share} is outside (0, 1)")
    if r.l2_to_start is not None:
        need(r.l2_to_start.weight > 0, "l2_to_start.weight: must be positive")
        need(
            lora is None or r.l2_to_start.start == "stage",
            "l2_to_start.start: an adapter has no weights in the base; set start=stage",
        )
    if r.ssu is not None:
        known = [*r.data.domains, "self"]
        need(
            r.ssu.text in known,
            f"ssu.text: {r.ssu.text!r} is neither 'self' nor in data.domains"
            f"{near(r.ssu.text, known)}",
        )
        need(
            r.ssu.text == "self" or r.data.prepare,
            "ssu.text: a domain is taken from its prepared corpus, and data.prepare=false makes "
            "none; set data.prepare=true or ssu.text=self",
        )
        need(0 < r.ssu.share < 1, f"ssu.share: {r.ssu.share} is outside (0, 1)")
        need(r.ssu.sequences >= 1, "ssu.sequences: must be at least 1")
    scaled = [n for n in ("olora", "l2_to_start") if getattr(r, n) is not None]
    need(
        not scaled or r.train.precision != "fp16",
        f"{(scaled or [''])[0]}: adds to the gradient, which fp16 has scaled by then; use bf16",
    )
    return found


def mocl_problems(r: Recipe) -> list[str]:
    """What is wrong with composed adapters and the recipe's `mocl`, and what does not go beside."""
    lora, m = r.model.lora, r.mocl
    if lora is None or not lora.composed:
        return [] if m is None else [
            "mocl: draws the keys of composed adapters; set model.lora={incremental: true, "
            "composed: true}"
        ]  # fmt: skip
    where = "model.lora.composed"
    wrong = {
        "a key belongs to a stage's own adapter; set model.lora.incremental=true": (
            not lora.incremental
        ),
        "nothing draws the keys toward their texts; set mocl={}": m is None,
        "a text finds its adapters where an encoder reads it; set model.objective=seq2seq, of a "
        "model that has one": r.model.objective != "seq2seq",
        "takes a text's adapters from its prompt, one a row; set data.packing=false": (
            r.data.packing
        ),
        f"model.lora.quantize={lora.quantize} has not been tried with it; set it to none": (
            lora.quantize != "none"
        ),
        "evaluate.end_tasks trains on plain adapters; remove one of the two": bool(
            r.evaluate.end_tasks
        ),
    }
    found = [f"{where}: {problem}" for problem, so in wrong.items() if so]
    if m is not None and not m.weight > 0:
        found.append("mocl.weight: must be positive")
    return found


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
            t.teacher == "previous" or (len(r.stages) > 1 and r.start_from != "base"),
            "kd.teacher: has no effect where every stage starts from the base; remove it",
        )
    return found


def baseline_problems(r: Recipe) -> list[str]:
    """Every problem as 'key: what is wrong; the fix'."""
    found: list[str] = []
    lora = r.model.lora

    def need(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    for name in ("das", "derpp", "pseudo_replay", "epi"):
        need(
            getattr(r, name) is None or r.data.prepare,
            f"{name}: reads a stage's text again from its prepared corpus, and data.prepare=false "
            "makes none; remove one of them",
        )
    for name in ("ewc", "derpp", "pseudo_replay", "epi", "olora"):
        need(
            getattr(r, name) is None or len(r.stages) > 1,
            f"{name}: has no effect in a run of one stage: it protects earlier stages; remove it",
        )
    if r.epi:
        need(r.epi.sequences >= 2, "epi.sequences: must be at least 2")
        need(
            bool(lora or r.model.prompt) and r.start_from == "base",
            "epi: finds the adapter of each task; set start_from=base, and model.lora={} or "
            "model.prompt={}",
        )
        need(
            not r.data.packing,
            "epi: takes a text's task from its prompt, one a row; set data.packing=false",
        )
    protecting = ("das", "ewc", "derpp", "olora", "hat_adapter", "pseudo_replay")
    apart = {n: getattr(r, n) for n in protecting}
    apart["model.lora.incremental"] = lora and lora.incremental
    prompt = r.model.prompt
    apart["model.prompt.progressive"] = prompt and prompt.progressive
    for name, used in apart.items():
        need(
            not used or r.start_from == "previous",
            f"start_from: {r.start_from} makes a model of its own in each stage, and {name} is for "
            "one that goes through all stages; remove one of them",
        )
    if r.start_from == "nearest":
        need(
            r.data.prepare,
            "start_from: nearest reads the first of a stage's text from its prepared corpus, and "
            "data.prepare=false makes none; remove one of them",
        )
        need(
            r.train.publish_dtype == "float32",
            "start_from: nearest may start from any earlier stage, and fp32 weights are kept of "
            "the last one only; set train.publish_dtype=float32",
        )
    if r.das:
        need(r.das.sequences >= 1, "das.sequences: must be at least 1")
        need(0 < r.das.dropout < 1, f"das.dropout: {r.das.dropout} is outside (0, 1)")
        need(r.das.contrast >= 0, "das.contrast: must be at least 0 (0 leaves the contrast out)")
        need(
            not (r.das.contrast and r.model.gradient_checkpointing),
            "das.contrast: closes units in a forward of its own, which gradient checkpointing "
            "would compute again with them open; set model.gradient_checkpointing=false or "
            "das.contrast=0",
        )
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
        for name in ("model.lora.incremental", "model.prompt.progressive"):
            need(
                not apart[name],
                f"ewc: holds what earlier stages have trained, and {name} freezes that and trains "
                "something new in each; remove one of the two",
            )
    if p := r.pseudo_replay:
        need(p.sequences >= 2, "pseudo_replay.sequences: must be at least 2")
        need(p.fraction > 0, "pseudo_replay.fraction: must be positive")
        need(p.weight > 0, "pseudo_replay.weight: must be positive")
        need(
            not r.data.packing,
            "pseudo_replay: writes examples, of which a row has one; set data.packing=false",
        )
        need(
            r.data.template != "chat",
            "pseudo_replay: takes a prompt for what stands before an answer and the text's end for "
            "the answer's, and a chat's turns have more; set data.template=plain or alpaca",
        )
    for method in ("pseudo_replay", "epi"):
        for name in dict.fromkeys(n for s in r.stages for n in s.domains):
            domain = r.data.domains.get(name)
            asked = domain is None or bool(domain.task or domain.instruction)
            need(
                getattr(r, method) is None or asked,
                f"{method}: works on what is asked and answered, and data.domains.{name} has no "
                "`task` or `instruction`; leave the domain out, or the method",
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


def hat_problems(r: Recipe) -> list[str]:
    """What is wrong with the recipe's `hat_adapter`, and what does not go beside it."""
    h, lora, rates = r.hat_adapter, r.model.lora, r.optimizer
    if h is None:
        return []
    stops = r.stop is not None or any(s.stop is not None for s in r.stages)
    stopped = "its gates close over a stage, whose end has to be known; remove"
    moves = "moves ranks that earlier stages have claimed"
    wrong = {
        "gates the ranks of an adapter; set model.lora={}": lora is None,
        "gates one adapter, model.lora.incremental adds one a stage; remove one of the two": bool(
            lora and lora.incremental
        ),
        f"optimizer.weight_decay={rates.weight_decay:g} {moves}; set it to 0": (
            rates.weight_decay != 0
        ),
        f"optimizer.name={rates.name} {EIGHT_BIT_DRIFT.split(';')[0]}": rates.name != "adamw",
        "reads the gradient, which fp16 has scaled by then; use bf16": r.train.precision == "fp16",
        f"{stopped} `stop`": stops,
        f"{stopped} guard.action=stop": r.guard is not None and r.guard.action == "stop",
        "has no effect in a run of one stage but gates; remove it": len(r.stages) == 1,
        **{
            f"{n} {moves}; remove one of the two": getattr(r, n) is not None
            for n in ("ewc", "l2_to_start", "ema")
        },
    }
    found = [f"hat_adapter: {problem}" for problem, so in wrong.items() if so]
    if not h.lr > 0:
        found.append("hat_adapter.lr: must be positive")
    if h.sparsity < 0:
        found.append("hat_adapter.sparsity: must be at least 0")
    if not h.steepness > 1:
        found.append("hat_adapter.steepness: must be more than 1")
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
