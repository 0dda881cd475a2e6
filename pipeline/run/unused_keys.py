"""Keys of a recipe that are set but could take no effect beside the others: each is an error."""

import dataclasses
from pathlib import Path

from pipeline.recipe import Answers, Data, Domain, Evaluation, Instruction, Mask, Optimizer, Recipe


def unused_keys(r: Recipe) -> list[str]:
    """Every such key as 'key: has no effect ...; the fix'. What equals its default is not set."""
    found: list[str] = []

    def unused(condition: object, key: str, why: str) -> None:
        if condition:
            found.append(f"{key}: has no effect {why}; remove it")

    m, d, e = r.model, r.data, r.evaluate
    hub = [x for x in (m.path, m.tokenizer) if x and not Path(x).exists() and ".gguf" not in x]
    unused(m.revision and not hub, "model.revision", "without a model or tokenizer of the hub")
    unused(
        m.objective == "seq2seq" and d.whole_word,
        "data.whole_word",
        "on an encoder-decoder, whose spans are cut between any tokens",
    )
    if m.objective == "causal":
        for key in ("whole_word", "masking", "heldout_masking"):
            unused(_is_set(Data, d, key), f"data.{key}", "on a causal model, which masks nothing")
    replayed = [s.replay for s in r.stages if isinstance(s.replay, dict)]
    used = {name for names in [*(s.domains for s in r.stages), *replayed] for name in names}
    used |= set(r.heldout_domains())
    used |= {method.text for method in (r.anchor, r.ssu) if method is not None}
    for name, domain in d.domains.items():
        where = f"data.domains.{name}"
        unused(name not in used, where, "where no stage trains on it and nothing measures it")
        found += _unused_in_domain(where, domain)
    unused(
        _is_set(Optimizer, r.optimizer, "lr") and r.stages and all(s.lr for s in r.stages),
        "optimizer.lr",
        "where every stage has its own",
    )
    unused(r.start_from != "previous" and len(r.stages) < 2, "start_from", "with one stage")
    if not r.mask.enabled:
        for field in dataclasses.fields(Mask):
            # The overlap of the kept rows is measured of dense runs too.
            measured = field.name == "threshold" and e.overlap
            if field.name != "enabled" and not measured:
                set_ = _is_set(Mask, r.mask, field.name)
                unused(set_, f"mask.{field.name}", "with mask.enabled=false")
    unused(
        e.answers != Answers() and not r.tasks(), "evaluate.answers", "where no domain is a task"
    )
    return found + _unused_in_evaluation(e, bool(r.tasks()))


def _unused_in_domain(where: str, d: Domain) -> list[str]:
    found = []
    files = [*d.files, *d.heldout_files]
    text = any(".txt" in Path(f).suffixes for f in files)
    for key, why in {
        "heldout_fraction": "beside heldout_files or heldout_split"
        if d.heldout_files or d.heldout_split
        else "",
        "split": "" if d.hub else "without `hub`",
        "txt_documents": "" if text else "without a .txt file",
        "text_field": "on an embedded corpus" if d.embedded else "",
    }.items():
        if why and _is_set(Domain, d, key):
            found.append(f"{where}.{key}: has no effect {why}; remove it")
    if d.embedded and d.instruction and d.instruction != Instruction():
        found.append(
            f"{where}.instruction: the fields have no effect on an embedded corpus; write {{}}"
        )
    return found


def _unused_in_evaluation(e: Evaluation, tasks: bool) -> list[str]:
    found = []
    for key in ("benchmark_files", "unreachable"):
        if _is_set(Evaluation, e, key) and not e.benchmarks:
            found.append(f"evaluate.{key}: has no effect without `benchmarks`; remove it")
    if _is_set(Evaluation, e, "precision") and not (e.benchmarks or e.humaneval or tasks):
        found.append(
            "evaluate.precision: has no effect without `benchmarks`, `humaneval` or tasks: the "
            "held-out loss is computed in the precision of training; remove it"
        )
    own = [bool(b.files) for b in e.benchmarks.values()]
    if e.benchmark_files and own and all(own):
        found.append(
            "evaluate.benchmark_files: has no effect where every benchmark has its own `files`; "
            "remove it"
        )
    return found


def _is_set(cls: type, settings: object, key: str) -> bool:
    """Whether a field differs from its default."""
    field = next(f for f in dataclasses.fields(cls) if f.name == key)
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return getattr(settings, key) != default
