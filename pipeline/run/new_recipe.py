"""`migu recipes` and `migu new`: what recipes there are, and a first one for text of your own."""

import json
from pathlib import Path

import yaml

from pipeline.data.bad_lines import BadLines
from pipeline.data.formats.raw import suffix_of
from pipeline.data.reader import check_domain, read_file
from pipeline.errors import UserError
from pipeline.recipe import Domain, Model
from pipeline.run.problems import NAME
from pipeline.run.recipe_file import RECIPES, load_recipe

LONGEST = 512  # tokens of a sequence, where the model could take more: a first run is short


def described_recipes(folder: Path = RECIPES) -> dict[str, str]:
    """Name -> the first sentence of the comment that its file begins with."""
    return {path.stem: _first_sentence(path) for path in sorted(folder.glob("*.yaml"))}


def _first_sentence(path: Path) -> str:
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words += line.lstrip("#").split()
    text = " ".join(words)
    return text.split(". ")[0].split(": ")[0].rstrip(".") or "(its file begins with no comment)"


def write_recipe(
    name: str,
    model: str,
    data: list[str],
    keep: list[str] | tuple[str, ...] = (),
    objective: str | None = None,
    text_field: str = "text",
) -> Path:
    """Write `name`.yaml: train `model` on the corpora of `data`, one stage each, in their order.

    name: may end with .yaml already.
    data, keep: a file or glob (the domain is called like the file), or NAME=FILE[,FILE...]; those
    of `keep` are only measured. objective: masked, causal or seq2seq; None asks the model's
    configuration.

    Raises:
        UserError: NAME.yaml is there already, a file cannot be read, the model's configuration
            cannot be, or says nothing about the objective.
    """
    name = name.removesuffix(".yaml")
    path = Path(f"{name}.yaml")
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r}: a name is made of letters, digits, '.', '_' and '-'")
    if path.exists():
        raise UserError(f"{path} is there already; choose another name, or delete it")
    domains: dict[str, list[str]] = {}
    for entry in [*data, *keep]:
        domain, files = _domain(entry)
        if domain in domains:
            raise UserError(f"two corpora are called {domain!r}; name one, as in other={files[0]}")
        _check_files(domain, files, text_field)
        domains[domain] = files
    stages = list(domains)[: len(data)]
    found, length = _ask_model(model, objective)
    path.write_text(
        _text(name, model, domains, stages, found, length, text_field), encoding="utf-8"
    )
    try:
        load_recipe(path)
    except UserError:
        path.unlink()
        raise
    return path


def _domain(entry: str) -> tuple[str, list[str]]:
    """The name and the files that an argument says."""
    name, equals, files = entry.partition("=")
    if equals and not Path(entry).exists():
        if not (name and all(files.split(","))):
            raise UserError(f"{entry}: write NAME=FILE or NAME=FILE,FILE")
        return name, files.split(",")
    stem = Path(entry).name
    stem = stem[: len(stem) - len(suffix_of(stem))]
    if not NAME.fullmatch(stem):
        raise UserError(f"{entry}: give the domain a name, as in news={entry}")
    return stem, [entry]


def _check_files(name: str, files: list[str], text_field: str) -> None:
    """Raises UserError where the first document cannot be read."""
    domain = Domain(files=files, text_field=text_field)
    if problems := check_domain(name, domain):
        raise UserError("\n".join(problems))
    for pattern in files:
        first = Path(pattern) if Path(pattern).exists() else None
        if first and next(read_file(str(first), domain, BadLines()), None) is None:
            raise UserError(f"{first}: no documents")


def _ask_model(model: str, objective: str | None) -> tuple[str, int]:
    """The objective, and how many tokens a sequence of a first run takes."""
    from pipeline.model.load import empty_model, load_config
    from pipeline.model.positions import longest_input

    asked = Model(path=model)
    config = load_config(asked, field="--model")
    kinds = " ".join(getattr(config, "architectures", None) or [])
    if objective is None and getattr(config, "is_encoder_decoder", False):
        objective = "seq2seq"
    elif objective is None:
        says = {"ForMaskedLM": "masked", "ForCausalLM": "causal", "LMHeadModel": "causal"}
        objective = next((o for ending, o in says.items() if ending in kinds), None)
    if objective is None:
        raise UserError(
            f"{model}: its configuration ({kinds or 'no architectures'}) does not say how it is "
            "trained; give --objective masked, causal or seq2seq"
        )
    asked.objective = objective  # type: ignore[assignment]
    limit = longest_input(empty_model(asked, config)) or LONGEST
    return objective, min(LONGEST, limit)


def _text(
    name: str,
    model: str,
    domains: dict[str, list[str]],
    stages: list[str],
    objective: str,
    length: int,
    text_field: str,
) -> str:
    field = f", text_field: {_quoted(text_field)}" if text_field != "text" else ""
    lines = [
        f"# {name}: {' then '.join(stages)}, one stage each; every domain is measured after each",
        "# stage, so that the page shows what was learned and what was forgotten. Check it with",
        f"#   migu cpt --recipe {name}.yaml --dry-run",
        "# `migu recipes --keys` explains every key; any can be given on the command line instead,",
        "#   migu cpt --recipe " + f"{name}.yaml optimizer.lr=5e-5 stages[0].epochs=2",
        f"name: {name}",
        f"model: {{path: {_quoted(model)}, objective: {objective}}}  # lora: {{}}: an adapter",
        "data:",
        "  domains:",
    ]
    for domain, files in domains.items():
        listed = ", ".join(map(_quoted, files))
        half, only = "", ""
        if domain not in stages:
            half, only = ", heldout_fraction: 0.5", "  # only measured: what may be forgotten"
        lines += [f"    {_quoted(domain)}: {{files: [{listed}]{field}{half}}}{only}"]
    lines += [
        f"  sequence_length: {length}  # tokens",
        "stages:  # one of epochs, steps, tokens; replay: 0.01 repeats a share of earlier domains",
        *(f"  - {{domain: {_quoted(domain)}, epochs: 1}}" for domain in stages),
        "mask: {threshold: 0.7}  # MIGU: the share of rows that an update leaves alone",
        "# anchor: {}  # forgets least, and what it costs: docs/methods.md",
        "optimizer: {lr: 5.0e-5, schedule: linear, warmup: 0.1}",
        "train: {batch_size: 32}  # sequences; micro_batch_size: how many at a time on a device",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As YAML reads it back inside `{}` and `[]`."""
    plain = text.replace("/", "").replace(".", "").replace("_", "").replace("-", "").isalnum()
    return text if plain and yaml.safe_load(text) == text else json.dumps(text)
