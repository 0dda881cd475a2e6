"""The recipe: what to train, as nested dataclasses.

A recipe is a YAML file; `key=value` overrides from the command line are laid over it. All problems
are found before anything is loaded and reported together (`load_recipe` raises one `UserError`).
DeepSpeed's settings (ZeRO stage, offload, precision) live in a JSON file of their own: see
`engine/config.py`.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.data.reader import check_domain
from pipeline.errors import UserError

RECIPES = Path(__file__).resolve().parent.parent / "launch" / "recipes"


@dataclass
class Lora:
    """Train a low-rank adapter instead of the weights; the defaults are the paper's (A.1)."""

    r: int = 8
    alpha: int = 32  # the adapter's output is scaled by alpha / r
    dropout: float = 0.05
    targets: list[str] | None = None  # module name suffixes; default: every linear of the blocks
    quantize: Literal["none", "4bit", "8bit"] = "none"  # the frozen weights (QLoRA)


@dataclass
class Model:
    """The model to adapt: `path` (pretrained) or `config` (built from scratch), not both."""

    path: str | None = None  # hub id or folder
    config: dict[str, Any] | None = None  # {model_type: roberta, hidden_size: ..., ...}
    overrides: dict[str, Any] = field(default_factory=dict)  # config attributes, e.g. dropout
    revision: str | None = None
    initial_positions: Literal["random", "sinusoidal"] = "random"  # of a model built from `config`
    tokenizer: str | None = None  # hub id or folder; default: the model's own
    train_tokenizer: int | None = (
        None  # vocabulary of a byte-level BPE trained on the first corpora
    )
    objective: Literal["masked", "causal"] = "masked"
    lora: Lora | None = None  # {}: LoRA with the paper's settings
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


@dataclass
class Instruction:
    """Which fields of a row hold the parts of an instruction example."""

    prompt: str = "instruction"
    input: str | None = None  # context that is put behind the prompt where it is not empty
    response: str = "response"


@dataclass
class Domain:
    """One corpus: exactly one of `embedded`, `files`, `hub`."""

    embedded: str | None = None  # text that the Python installation carries
    files: list[str] = field(default_factory=list)  # .jsonl[.gz|.zst] .parquet .txt, or globs
    hub: str | None = None  # dataset id
    hub_config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    instruction: Instruction | None = None  # rows are prompts and responses; {}: default fields
    txt_documents: Literal["paragraph", "line"] = "paragraph"  # what a document is in a .txt file
    heldout_files: list[str] = field(default_factory=list)
    heldout_split: str | None = None
    heldout_fraction: float = 0.05  # of the documents, by hash, where nothing else is given
    max_documents: int | None = None
    sample: float = 1.0  # fraction of the documents, drawn by hash; the paper's Magicoder: 0.2
    sample_seed: int = 0


@dataclass
class Data:
    """How text becomes training sequences."""

    domains: dict[str, Domain] = field(default_factory=dict)
    sequence_length: int = 128  # tokens
    masking: float = 0.15  # fraction of the tokens to predict (masked LM)
    heldout_masking: float = 0.15  # fixed, so that runs with another `masking` stay comparable
    whole_word: bool = False
    template: Literal["alpaca", "chat"] = "alpaca"  # of instructions; chat: the tokenizer's own
    cross_document: bool = False  # let documents that share a sequence see each other
    shuffle_window: int = 1024  # documents
    bad_lines: int = 100  # broken rows to skip in a corpus before giving up
    heldout_sequences: int = 128  # per domain
    prefetch: int = 2  # steps that a thread prepares ahead; 0: none


@dataclass
class Stage:
    """Train on one domain (or a mixture), for exactly one of `steps`, `epochs`, `tokens`."""

    domain: str | list[str]
    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    lr: float | None = None  # default: the optimizer's
    evaluate_every: float | None = None  # in the stage's own unit: epochs, steps or tokens

    @property
    def domains(self) -> list[str]:
        return [self.domain] if isinstance(self.domain, str) else list(self.domain)

    @property
    def name(self) -> str:
        return "+".join(self.domains)


@dataclass
class Mask:
    """MIGU (paper, section 3.2): which rows of the gradient are kept (docs/mask.md)."""

    enabled: bool = True
    threshold: float = 0.7  # T: fraction of the rows that is masked
    components: list[str] | None = None  # default: every Q, K, V, O and FFN linear
    normalize: Literal["none", "token"] = "none"
    rule: Literal["exact", "quantile"] = "exact"
    split_fused: bool = False  # select in each part of a fused linear (q, k, v; gate, up) by itself
    criterion: Literal["output", "random", "weight", "gradient"] = "output"
    random_redraw: Literal["stage", "step"] = "stage"  # criterion: random
    # gradient: AdamW sees zeros (the authors' code); strict: masked rows do not move (Eq. 6)
    update: Literal["gradient", "strict"] = "gradient"
    from_stage: int = 1  # 2: the first stage is dense, as in the authors' code


@dataclass
class Optimizer:
    """AdamW; the schedule restarts with every stage."""

    # adamw8bit: bitsandbytes' AdamW with 8-bit moments (docs/engines.md)
    name: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # not on biases and norms
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0  # fraction of the stage's steps


@dataclass
class Train:
    batch_size: int = 32  # sequences per step, over all ranks and accumulated micro-batches
    micro_batch_size: int | None = None  # per rank; default: batch_size / ranks
    gradient_clipping: float = 1.0  # 0: off
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: see docs/engines.md
    publish_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class Engine:
    """What shards and steps the model (docs/engines.md). DeepSpeed's settings are in its JSON."""

    kind: Literal["deepspeed", "fsdp"] = "deepspeed"
    replicas: int = 1  # fsdp: copies of the model, each sharded over ranks / replicas (HSDP)
    reshard_after_forward: bool = True  # fsdp: false keeps the gathered weights until backward


@dataclass
class Benchmark:
    """One task of lm-eval, scored by log-likelihood (docs/benchmarks.md)."""

    task: str | None = None  # lm-eval's name; default: the key of the entry
    shots: int = 0
    limit: int | None = None  # the first documents only
    files: list[str] = field(default_factory=list)  # local documents instead of the hub's
    metric: str | None = None  # default: acc_norm where the task has it, else acc


@dataclass
class HumanEval:
    """Python programs from docstrings (Chen et al. 2021), run in a sandbox (docs/sandbox.md)."""

    limit: int | None = None  # the first problems only
    samples: int = 0  # per problem, beside the greedy completion; 10 or more give pass@10
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 512
    batch_size: int = 16  # sequences
    template: Literal["none", "alpaca", "chat"] = "none"  # none: the bare prompt is continued
    timeout: float = 10.0  # seconds per program
    # auto: the strongest that works here; `unsafe` runs generated code without any protection
    sandbox: Literal["auto", "bubblewrap", "landlock", "unsafe"] = "auto"


@dataclass
class Evaluation:
    domains: list[str] | None = None  # default: every domain
    batch_size: int = 32  # sequences
    overlap: bool = True  # kept rows shared between domains (the paper's Figure 5)
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    benchmark_files: str | None = None  # folder with <task>/*.jsonl[.gz], instead of the hub
    # skip: where the hub cannot be reached, say so on the page and go on
    unreachable: Literal["fail", "skip"] = "fail"
    humaneval: HumanEval | None = None  # {}: with the defaults
    precision: Literal["fp32", "bf16"] = "fp32"  # of the evaluated weights


@dataclass
class Recipe:
    name: str
    model: Model
    data: Data
    stages: list[Stage]
    mask: Mask = field(default_factory=Mask)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    engine: Engine = field(default_factory=Engine)
    evaluate: Evaluation = field(default_factory=Evaluation)
    seed: int = 0

    def stage_seed(self, stage: int) -> int:
        """For what is drawn once per stage, alike on every rank."""
        return self.seed * 1009 + stage

    def heldout_domains(self) -> list[str]:
        return self.evaluate.domains or list(self.data.domains)

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, lay `key=value` overrides over it, check everything.

    Relative paths inside a recipe are relative to the working directory; a model or tokenizer path
    that does not exist there is also looked for beside the recipe file.

    Raises:
        UserError: one message that lists every problem with its key, file and a suggestion.
    """
    path = _find_recipe(path)
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # every YAML error is the user's
        raise UserError(f"{path}: not a YAML file: {error}") from None
    problems: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            problems.append(f"{override!r}: an override is written key=value, e.g. seed=1")
            continue
        try:
            parsed = OmegaConf.from_dotlist([f"value={value}"])["value"]
            OmegaConf.update(config, key, parsed, merge=False, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            problems.append(f"{override!r}: {str(error).splitlines()[0]}")
    data = OmegaConf.to_container(config, resolve=True)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {_keys(Recipe)}")
    data.setdefault("name", path.stem)
    if isinstance(data.get("stages"), list):
        data["stages"] = [{"domain": s} if isinstance(s, str) else s for s in data["stages"]]
    given = {o.partition("=")[0] for o in overrides}
    try:
        recipe = _ADAPTER.validate_python(data)
    except ValidationError as error:
        problems += [_explain(e, path, given) for e in error.errors()]
        raise _all(path, problems) from None
    _beside(recipe.model, path.parent)
    problems += _contradictions(recipe)
    if problems:
        raise _all(path, problems)
    return recipe


def _find_recipe(path: str | Path) -> Path:
    for candidate in (Path(path), RECIPES / path, RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    raise UserError(
        f"{path}: no such recipe. Give a YAML file, or one of the recipes here: {', '.join(names)}"
    )


def _beside(model: Model, folder: Path) -> None:
    for key in ("path", "tokenizer"):
        value = getattr(model, key)
        if value and not Path(value).exists() and (folder / value).exists():
            setattr(model, key, str(folder / value))


def _contradictions(r: Recipe) -> list[str]:
    """Everything that types alone do not say, as 'key: what is wrong; the fix'."""
    found: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    m, d, k, o, t = r.model, r.data, r.mask, r.optimizer, r.train
    need((m.path is None) != (m.config is None), "model: give exactly one of `path` and `config`")
    need(
        not (m.path is None and m.tokenizer is None and m.train_tokenizer is None),
        "model.tokenizer: a model built from `config` needs `tokenizer` or `train_tokenizer`",
    )
    need(
        m.config is not None or m.initial_positions == "random",
        "model.initial_positions: has no effect on a pretrained model; remove it",
    )
    need(
        not (m.tokenizer and m.train_tokenizer),
        "model: give at most one of `tokenizer` and `train_tokenizer`",
    )
    need(
        not (m.path and m.train_tokenizer),
        "model.train_tokenizer: a pretrained model comes with its own vocabulary; remove it",
    )
    need(
        m.train_tokenizer is None or m.train_tokenizer >= 300,
        f"model.train_tokenizer: {m.train_tokenizer} is too small; byte-level BPE needs 300",
    )
    for key in ("path", "tokenizer"):
        value = getattr(m, key)
        if value and (value.startswith((".", "/")) or value.count("/") > 1):
            need(Path(value).exists(), f"model.{key}: no such folder: {value}")
    if m.lora is not None:
        need(m.lora.r >= 1, f"model.lora.r: {m.lora.r} must be at least 1")
        need(m.lora.alpha > 0, f"model.lora.alpha: {m.lora.alpha} must be positive")
        need(0 <= m.lora.dropout < 1, f"model.lora.dropout: {m.lora.dropout} is outside [0, 1)")
        need(
            m.lora.targets is None or len(m.lora.targets) > 0,
            "model.lora.targets: the list is empty; leave it out for every linear of the blocks",
        )
    need(bool(d.domains), "data.domains: name at least one corpus")
    for name, domain in d.domains.items():
        need(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
            f"data.domains.{name}: a name is made of letters, digits, '.', '_' and '-' (it names "
            "files)",
        )
        found += check_domain(name, domain)
    need(d.sequence_length >= 16, f"data.sequence_length: {d.sequence_length} is below 16 tokens")
    for key in ("masking", "heldout_masking"):
        need(0 < getattr(d, key) < 1, f"data.{key}: {getattr(d, key)} is outside (0, 1)")
    for key in ("heldout_sequences", "shuffle_window"):
        need(getattr(d, key) >= 1, f"data.{key}: must be at least 1")
    need(d.bad_lines >= 0, "data.bad_lines: must be at least 0")
    need(d.prefetch >= 0, "data.prefetch: must be at least 0")
    if m.attention == "flash_attention_2":
        need(
            d.cross_document or all(x.instruction for x in d.domains.values()),
            "data.cross_document: flash_attention_2 cannot keep documents that share a sequence "
            "apart; set it to true, or model.attention=sdpa",
        )
    instructions = [n for n, domain in d.domains.items() if domain.instruction]
    need(
        not instructions or m.objective == "causal",
        f"data.domains.{(instructions or [''])[0]}.instruction: responses are learnt by a causal "
        "model; set model.objective=causal",
    )
    need(
        bool(instructions) or d.template == "alpaca",
        "data.template: has no effect without a domain of instructions; remove it",
    )
    need(bool(r.stages), "stages: list at least one domain to train on")
    for i, stage in enumerate(r.stages):
        for name in stage.domains:
            need(
                name in d.domains,
                f"stages[{i}].domain: {name!r} is not in data.domains{_near(name, d.domains)}",
            )
        lengths = [x for x in (stage.steps, stage.epochs, stage.tokens) if x is not None]
        need(len(lengths) == 1, f"stages[{i}]: give exactly one of `steps`, `epochs`, `tokens`")
        need(all(x > 0 for x in lengths), f"stages[{i}]: `steps`, `epochs`, `tokens` are positive")
        need(stage.lr is None or stage.lr > 0, f"stages[{i}].lr: must be positive")
        every = stage.evaluate_every
        need(every is None or every > 0, f"stages[{i}].evaluate_every: must be positive")
        if every is not None and len(lengths) == 1:
            need(
                every < lengths[0],
                f"stages[{i}].evaluate_every: {every:g} has no effect in a stage of "
                f"{lengths[0]:g}: its end is always evaluated; lower it or remove it",
            )
    for name in r.evaluate.domains or []:
        need(
            name in d.domains,
            f"evaluate.domains: {name!r} is not in data.domains{_near(name, d.domains)}",
        )
    found += evaluation_problems(r.evaluate)
    for what in ("benchmarks", "humaneval"):
        need(
            not getattr(r.evaluate, what) or m.objective == "causal",
            f"evaluate.{what}: needs a causal model: a masked LM such as RoBERTa gives text no "
            "likelihood, and its scores would mean nothing. Remove it, or set "
            "model.objective=causal",
        )
    found += mask_problems(k)
    if k.enabled:
        need(
            1 <= k.from_stage <= max(1, len(r.stages)),
            f"mask.from_stage: {k.from_stage} is not one of the stages 1 to {len(r.stages)}",
        )
    need(o.lr > 0, f"optimizer.lr: {o.lr} must be positive")
    need(all(0 <= b < 1 for b in o.betas), f"optimizer.betas: {o.betas} are outside [0, 1)")
    need(
        0 <= o.warmup < 1, f"optimizer.warmup: {o.warmup} is outside [0, 1): a fraction of a stage"
    )
    need(o.weight_decay >= 0, "optimizer.weight_decay: must be at least 0")
    need(o.eps > 0, "optimizer.eps: must be positive")
    need(t.batch_size >= 1, "train.batch_size: must be at least 1")
    need(
        t.micro_batch_size is None or t.micro_batch_size >= 1,
        "train.micro_batch_size: must be at least 1",
    )
    need(t.gradient_clipping >= 0, "train.gradient_clipping: must be at least 0 (0 is off)")
    e = r.engine
    for key, default in (("replicas", 1), ("reshard_after_forward", True)):
        need(
            e.kind == "fsdp" or getattr(e, key) == default,
            f"engine.{key}: has no effect with DeepSpeed; remove it, or set engine.kind=fsdp",
        )
    need(e.replicas >= 1, "engine.replicas: must be at least 1")
    need(
        not (e.kind == "fsdp" and t.precision == "fp16"),
        "train.precision: fp16 needs loss scaling, which fsdp does not have here; use bf16",
    )
    need(
        not (e.kind == "fsdp" and o.name == "adamw8bit"),
        "optimizer.name: adamw8bit does not step FSDP's sharded tensors; use adamw, or "
        "engine.kind=deepspeed",
    )
    need(
        not (o.name == "adamw8bit" and k.enabled and k.update == "gradient"),
        "optimizer.name: adamw8bit rounds a moment of zero to one that is not, so masked rows "
        "would drift; set mask.update=strict",
    )
    need(
        m.objective == "causal" or not (m.config or {}).get("is_decoder"),
        "model.config.is_decoder: a masked LM is an encoder; set model.objective=causal",
    )
    return found


def evaluation_problems(e: Evaluation) -> list[str]:
    """What is wrong with the settings of the evaluation by themselves."""
    found: list[str] = []

    def need(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    h = e.humaneval
    need(e.batch_size >= 1, "evaluate.batch_size: must be at least 1")
    for name, benchmark in e.benchmarks.items():
        where = f"evaluate.benchmarks.{name}"
        need(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
            f"{where}: a name is made of letters, digits, '.', '_' and '-'",
        )
        need(benchmark.shots >= 0, f"{where}.shots: must be at least 0")
        need(
            benchmark.limit is None or benchmark.limit >= 1,
            f"{where}.limit: must be at least 1; leave it out for all documents",
        )
    need(
        e.benchmark_files is None or Path(e.benchmark_files).is_dir(),
        f"evaluate.benchmark_files: no such folder: {e.benchmark_files}",
    )
    if h:
        where = "evaluate.humaneval"
        need(h.limit is None or h.limit >= 1, f"{where}.limit: must be at least 1")
        need(h.samples >= 0, f"{where}.samples: must be at least 0")
        drawn = (h.temperature, h.top_p) != (HumanEval.temperature, HumanEval.top_p)
        need(
            h.samples > 0 or not drawn,
            f"{where}: `temperature` and `top_p` have no effect without `samples`",
        )
        need(h.temperature > 0, f"{where}.temperature: must be positive; greedy always runs too")
        need(0 < h.top_p <= 1, f"{where}.top_p: {h.top_p} is outside (0, 1]")
        for key in ("max_new_tokens", "batch_size"):
            need(getattr(h, key) >= 1, f"{where}.{key}: must be at least 1")
        need(h.timeout > 0, f"{where}.timeout: must be positive, in seconds")
    return found


def mask_problems(mask: Mask) -> list[str]:
    """What is wrong with a mask's settings by themselves."""
    found = []
    if not 0 <= mask.threshold < 1:
        found.append(
            f"mask.threshold: {mask.threshold} is outside [0, 1); the paper uses 0.7 (70% masked)"
        )
    if mask.enabled and mask.normalize != "none" and mask.criterion != "output":
        found.append(f"mask.normalize: has no effect with criterion {mask.criterion!r}; remove it")
    if mask.enabled and mask.random_redraw != "stage" and mask.criterion != "random":
        found.append(
            f"mask.random_redraw: has no effect with criterion {mask.criterion!r}; remove it"
        )
    if mask.components is not None and not mask.components:
        found.append("mask.components: the list is empty; name components, or leave it out for all")
    return found


def _explain(error: Any, path: Path, overridden: set[str]) -> str:
    """One pydantic error as 'key (file): what is wrong; suggestion'."""
    loc = [x for x in error["loc"] if not str(x).startswith(("function-", "str", "list["))]
    key = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in loc).lstrip(".")
    where = "on the command line" if key in overridden else f"in {path}"
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner = _dataclass_at(loc[:-1])
        known = [f.name for f in dataclasses.fields(owner)] if owner else []
        hint = _near(str(loc[-1]), known) or f"; known keys: {', '.join(known)}"
        return f"{key}: unknown key, {where}{hint}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: missing, {where}; add it"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower() + message[1:]}, got {error['input']!r}, {where}"


def _dataclass_at(loc: list[Any]) -> type | None:
    owner: Any = Recipe
    entry: Any = None
    for part in loc:
        if isinstance(part, int):
            continue
        if owner in (Data, Evaluation) and part in _NAMED:
            owner = dict
            entry = _NAMED[part]
        elif owner is dict:
            owner = entry
        else:
            hint = get_type_hints(owner).get(part)
            owner = _OPTIONAL.get(part, hint)
    return owner if isinstance(owner, type) and dataclasses.is_dataclass(owner) else None


# What the entries of a mapping are, and what a key holds whose type is not a plain dataclass.
_NAMED: dict[str, type] = {"domains": Domain, "benchmarks": Benchmark}
_OPTIONAL: dict[str, type] = {
    "stages": Stage, "lora": Lora, "instruction": Instruction, "humaneval": HumanEval,
}  # fmt: skip


def _near(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _keys(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _all(path: Path, problems: list[str]) -> UserError:
    noun = "problem" if len(problems) == 1 else "problems"
    return UserError("\n".join([f"{path}: {len(problems)} {noun}", *(f"  {p}" for p in problems)]))


for _cls in (
    Lora, Model, Instruction, Domain, Data, Stage, Mask, Optimizer, Train, Engine, Benchmark,
    HumanEval, Evaluation, Recipe,
):  # fmt: skip
    _cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[union-attr]
_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
