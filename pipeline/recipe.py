"""The recipe: what to train, as nested dataclasses.

`run/recipe_file.py` reads one from YAML; `run/problems.py` says what is wrong with one. DeepSpeed's
settings (ZeRO stage, offload, precision) live in a JSON file of their own: see `engine/config.py`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
from omegaconf import OmegaConf

from pipeline.end_task_settings import EndTask as EndTask  # found by the loop at the end
from pipeline.end_task_settings import EndTasks
from pipeline.method_settings import (
    Anchor,
    Das,
    DerPlusPlus,
    Distill,
    Ema,
    EntropyGate,
    Epi,
    Ewc,
    Half,
    HatAdapter,
    L2ToStart,
    Mocl,
    Mofo,
    OLora,
    PseudoReplay,
    PublishAverage,
    SourceColumns,
)
from pipeline.quantity import number
from pipeline.redact import redacted


@dataclass
class Lora:
    """Train a low-rank adapter instead of the weights; the defaults are the paper's (A.1)."""

    r: int = 8
    alpha: int = 32  # the adapter's output is scaled by alpha / r
    dropout: float = 0.05
    targets: list[str] | None = None  # module name suffixes; default: every linear of the blocks
    quantize: Literal["none", "4bit", "8bit"] = "none"  # the frozen weights (QLoRA)
    incremental: bool = False  # a new adapter a stage, beside the frozen earlier ones (IncLoRA)
    composed: bool = False  # each counts by how near a text is to its stage's key (MoCL)
    experts: int = 1  # parts of the ranks, between which a router decides by token (MoELoRA)


@dataclass
class Prompt:
    """Train a soft prompt in front of every text instead of the weights (docs/lora.md)."""

    tokens: int = 10  # vectors
    progressive: bool = False  # a new prompt a stage, before the frozen earlier ones


@dataclass
class Model:
    """The model to adapt: `path` (pretrained) or `config` (built from scratch), not both."""

    path: str | None = None  # hub id or folder
    config: dict[str, Any] | None = None  # {model_type: roberta, hidden_size: ..., ...}
    overrides: dict[str, Any] = field(default_factory=dict)  # config attributes, e.g. dropout
    revision: str | None = None
    initialize_missing: bool = False  # random weights for what `path` lacks; else it is refused
    initial_positions: Literal["random", "sinusoidal"] = "random"  # of a model built from `config`
    tokenizer: str | None = None  # hub id or folder; default: the model's own
    train_tokenizer: int | None = (
        None  # vocabulary of a byte-level BPE trained on the first corpora
    )
    objective: Literal["masked", "causal", "seq2seq"] = "masked"
    lora: Lora | None = None  # {}: LoRA with the paper's settings
    prompt: Prompt | None = None  # {}: a soft prompt
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"


@dataclass
class Instruction:
    """Which fields of a row hold the parts of an instruction example."""

    prompt: str = "instruction"
    input: str | None = None  # context that is put behind the prompt where it is not empty
    response: str = "response"


@dataclass
class Task:
    """A classification task as text to text: which option fits a text (docs/tasks.md)."""

    instruction: str  # what is asked; the options and the text follow it
    labels: list[str] | str  # the options, or a file that lists them (labels.json)
    text: str | list[str] = "sentence"  # the field of a row; of several, each a line "field: text"
    label: str = "label"  # the field of a label, or of its number in `labels` from 0
    leave_out: list[str | int] = field(default_factory=list)  # labels whose rows are left out
    list_options: bool = True  # in the prompt; else the model has to learn what it may answer
    max_words: int | None = None  # of a text; the rest is cut off
    keep: Literal["first", "last"] = "first"  # which of its words; the question may be at the end
    train_rows: int | None = None  # to train on, drawn by hash; the paper's: 1000
    test_rows: int | None = None  # of each label, drawn by hash; the paper's: 500


@dataclass
class Domain:
    """One corpus: exactly one of `embedded`, `files`, `hub`."""

    embedded: str | None = None  # text that the Python installation carries
    files: list[str] = field(default_factory=list)  # .json[l] .txt [.gz|.zst] .parquet, or globs
    hub: str | None = None  # dataset id
    hub_config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    instruction: Instruction | None = None  # rows are prompts and responses; {}: default fields
    chat_field: str | None = None  # rows are conversations: the field of their messages
    task: Task | None = None  # rows are texts and their labels
    txt_documents: Literal["paragraph", "line"] = "paragraph"  # what a document is in a .txt file
    heldout_files: list[str] = field(default_factory=list)
    heldout_split: str | None = None
    heldout_fraction: float = 0.05  # of the documents, by hash, where nothing else is given
    max_documents: int | None = None
    sample: float = 1.0  # fraction of the documents, drawn by hash; the paper's Magicoder: 0.2
    sample_seed: int = 0
    deduplicate: bool = False  # leave out documents that are equal to an earlier one
    decontaminate: list[str] = field(default_factory=list)  # humaneval, or evaluation tasks

    @property
    def whole(self) -> bool:
        """Whether its documents are examples, which are not cut."""
        return bool(self.instruction or self.task) or self.chat_field is not None

    @property
    def counted(self) -> bool:
        """Whether which documents there are depends on how many there are."""
        return self.max_documents is not None or self.task is not None


@dataclass
class Data:
    """How text becomes training sequences."""

    domains: dict[str, Domain] = field(default_factory=dict)
    prepare: bool = True  # tokenize a corpus once and keep it; false: read it as a stream
    prepared: str | None = None  # folder of prepared corpora; default: see docs/data.md
    sequence_length: int = 128  # tokens
    masking: float = 0.15  # fraction of the tokens to predict (masked LM)
    heldout_masking: float = 0.15  # fixed, so that runs with another `masking` stay comparable
    whole_word: bool = False
    # of instructions; chat: the tokenizer's own; plain: the prompt as it is
    template: Literal["alpaca", "chat", "plain"] = "alpaca"
    packing: bool = True  # several documents share a sequence; false: one a sequence
    cross_document: bool = False  # let documents that share a sequence see each other
    # How a model is told where a document ends (docs/models.md). auto: the way that is shown to be
    # right on the loaded model; the others are taken without proof.
    keep_apart: Literal["auto", "positions", "masks", "rows"] = "auto"
    shuffle_window: int = 1024  # documents (of a stream)
    bad_lines: int = 100  # broken rows to skip in a corpus before giving up
    heldout_sequences: int = 128  # per domain
    open_shards: int = 8  # files that a stream reads in turns
    prefetch: int = 2  # steps that a thread prepares ahead; 0: none


def _refresh(value: Any) -> Any:
    if value == "stage" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("write a number of steps, from 1 on, or stage")


def _mix(value: Any) -> Any:
    """Refuses what is no mixture, and weights that are no share of anything."""
    if not isinstance(value, str | list | dict):
        raise ValueError("name a domain, a list of domains, or a mapping of domains to weights")
    if isinstance(value, dict):
        for name, weight in value.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                raise ValueError(
                    f"the weight of {name!r} is {'empty' if weight is None else weight}; give a "
                    "number above 0, or leave the domain out"
                )
    return value


def _replay(value: Any) -> Any:
    return _mix(value) if isinstance(value, dict) else value


Mix = Annotated[str | list[str] | dict[str, float], pydantic.BeforeValidator(_mix)]


@dataclass
class Stop:
    """End a stage as soon as it has learned so much: runs that are compared at equal learning."""

    loss: float  # of the domain's held-out text, nats per predicted token
    domain: str | None = None  # default: the stage's, where it has one
    steps: int = 20  # between two measurements of it


@dataclass
class Stage:
    """Train on one domain or several, for exactly one of `steps`, `epochs`, `tokens`.

    A list of domains is read as one corpus. A mapping gives each its share of the tokens:
    {legal: 0.7, general: 0.3}. Numbers of tokens may be written 300k, 50M or 2G.
    """

    domain: Mix
    steps: int | None = None
    epochs: float | None = None
    tokens: Annotated[int | None, pydantic.BeforeValidator(number)] = None
    lr: float | None = None  # default: the optimizer's
    # in the stage's own unit: epochs, steps or tokens
    evaluate_every: Annotated[float | None, pydantic.BeforeValidator(number)] = None
    stop: Stop | None = None  # before its length is reached; default: the recipe's
    max_repetitions: float | None = None  # how often a document may be read, on average
    # share of the tokens that repeats the domains of earlier stages, or shares of named domains
    replay: Annotated[float | dict[str, float] | None, pydantic.BeforeValidator(_replay)] = None

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
    # fisher: FGGM, with refresh: stage
    criterion: Literal["output", "random", "weight", "gradient", "fisher"] = "output"
    random_redraw: Literal["stage", "step"] = "stage"  # criterion: random
    # gradient: AdamW sees zeros (the authors' code); strict: masked rows do not move (Eq. 6)
    update: Literal["gradient", "strict"] = "gradient"
    clusters: int | None = None  # groups of a layer's rows that are kept or masked together
    # magnitude: those that are large in the same texts; random: a control
    cluster_by: Literal["weight", "magnitude", "random"] = "weight"
    from_stage: int = 1  # 2: the first stage is dense, as in the authors' code
    # For how many steps a selection serves; stage: for all, and the other rows are frozen
    refresh: Annotated[int | str, pydantic.BeforeValidator(_refresh)] = 1
    calibration: int = (
        64  # refresh: stage: the first sequences, in whole steps, that choose the rows
    )
    # row_sparse: masked rows of the weights' gradients are not computed; previous: likewise, with
    # the rows of the step before (docs/performance.md)
    backward: Literal["dense", "row_sparse", "previous"] = "dense"


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
class BadSteps:
    """What becomes of a step whose loss, magnitudes or gradient are no numbers, or whose loss is a
    spike (docs/faults.md)."""

    # skip: leave the step out. rollback: also go back to the newest resume checkpoint's weights
    policy: Literal["stop", "skip", "rollback"] = "stop"
    budget: int = 10  # steps of a stage that may be left out
    spike: float | None = None  # standard deviations over the mean of the losses before; null: off
    window: int = 100  # steps over which that mean is taken


@dataclass
class Guard:
    """Watch what a stage must not forget: the held-out loss of a domain, or a benchmark
    (docs/faults.md)."""

    domain: str | None = None
    max_rise: float = 0.05  # nats of its held-out text
    benchmark: str | None = None  # instead of a domain: one of evaluate.benchmarks
    max_fall: float = 2.0  # points (of 100) of the benchmark
    steps: int = 50  # between two checks
    # stop: end the stage with the weights of the last check that passed
    action: Literal["stop", "lower_lr", "warn"] = "stop"
    against: Literal["base", "stage"] = "base"  # as at stage 0, or as the stage began


@dataclass
class Train:
    batch_size: int = 32  # sequences per step, over all ranks and accumulated micro-batches
    micro_batch_size: int | None = None  # per rank; default: batch_size / ranks
    gradient_clipping: float = 1.0  # 0: off
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: see docs/engines.md
    publish_dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False  # the blocks, by torch.compile (docs/performance.md)
    chunked_loss: bool = False  # a large vocabulary's logits a part at a time
    # steps between two checks that ranks which hold the same weights hold the same bits
    compare_replicas: int | None = None


@dataclass
class Engine:
    """What shards and steps the model (docs/engines.md). DeepSpeed's settings are in its JSON."""

    kind: Literal["deepspeed", "fsdp"] = "deepspeed"
    replicas: int = 1  # fsdp: copies of the model, each sharded over ranks / replicas (HSDP)
    reshard_after_forward: bool = True  # fsdp: false keeps the gathered weights until backward


@dataclass
class Resume:
    """What an interrupted stage goes on from (docs/reliability.md)."""

    steps: int | None = 200  # between two checkpoints
    minutes: float | None = 15  # the longest time between two
    keep: int = 2  # the newest ones, until the stage is published
    # steps; a checkpoint behind a multiple of it is kept beside the newest ones; null: none
    keep_every: int | None = None
    # stop: the run ends (exit code 2) where a checkpoint cannot be written; go_on: it is said
    on_error: Literal["go_on", "stop"] = "go_on"
    grace: float = 120  # seconds from the signal to end until the process does, whatever it does


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
class Answers:
    """How the answers of the domains that are tasks are generated, greedily (docs/tasks.md)."""

    max_new_tokens: int = 50
    constrained: bool = False  # to the task's labels
    batch_size: int = 32  # prompts
    limit: int | None = None  # rows of each task
    # seen: of the tasks that no later stage trains on first; without FWT
    asked: Literal["all", "seen"] = "all"


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
    end_tasks: EndTasks | None = None  # fine-tune copies of the checkpoints on tasks
    answers: Answers = field(default_factory=Answers)
    # of the weights that benchmarks and HumanEval run on; the held-out loss has the engine's
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass
class Recipe:
    name: str
    model: Model
    data: Data
    stages: list[Stage]
    mask: Mask = field(default_factory=Mask)
    anchor: Anchor | None = None  # {}: with the defaults; so are the ones below
    olora: OLora | None = None
    mocl: Mocl | None = None
    l2_to_start: L2ToStart | None = None
    hft: Half | None = None
    ssu: SourceColumns | None = None
    das: Das | None = None
    kd: Distill | None = None
    ewc: Ewc | None = None
    derpp: DerPlusPlus | None = None
    pseudo_replay: PseudoReplay | None = None
    epi: Epi | None = None
    entropy_gate: EntropyGate | None = None
    mofo: Mofo | None = None
    hat_adapter: HatAdapter | None = None
    ema: Ema | None = None
    publish_average: PublishAverage | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    engine: Engine = field(default_factory=Engine)
    evaluate: Evaluation = field(default_factory=Evaluation)
    # what each stage starts from; nearest: the base or earlier stage that knows its text best
    start_from: Literal["previous", "base", "nearest"] = "previous"
    resume: Resume | None = field(default_factory=Resume)  # null: a stage starts over
    stop: Stop | None = None  # of the stages that train its domain
    bad_steps: BadSteps = field(default_factory=BadSteps)
    guard: Guard | None = None
    seed: int = 0
    # where its numbers go as it trains, beside the log and the page (docs/runs.md)
    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=list)

    def stage_seed(self, stage: int) -> int:
        """For what is drawn once per stage, alike on every rank."""
        return self.seed * 1009 + stage

    def stop_of(self, stage: int) -> Stop | None:
        """When a stage (from 1) ends before its length is reached; its domain is filled in."""
        s = self.stages[stage - 1]
        if s.stop is not None:
            return dataclasses.replace(s.stop, domain=s.stop.domain or s.domains[0])
        return self.stop if self.stop is not None and self.stop.domain in s.domains else None

    def heldout_domains(self) -> list[str]:
        return self.evaluate.domains or list(self.data.domains)

    def end_tasks_after(self, stage: int) -> list[str]:
        """The end tasks that the checkpoint of a stage is fine-tuned on (0: before training)."""
        settings = self.evaluate.end_tasks
        if settings is None:
            return []
        if stage == len(self.stages) or settings.after == "every":
            return list(settings.tasks)
        if stage == 0 or settings.after == "last":
            return []
        return [n for n, t in settings.tasks.items() if self.stage_of(t.domain or n) == stage]

    def stage_of(self, domain: str) -> int:
        """The stage that first trains on a domain, 0 for none."""
        return next((i for i, s in enumerate(self.stages, start=1) if domain in s.domains), 0)

    def tasks(self) -> list[str]:
        """The domains whose answers are measured."""
        known = self.data.domains
        return [n for n in self.heldout_domains() if n in known and known[n].task]

    def tasks_after(self, stage: int) -> list[str]:
        """Those that the checkpoint of a stage answers (0: before training)."""
        every = self.evaluate.answers.asked == "all"
        return [n for n in self.tasks() if every or self.stage_of(n) <= stage]

    def to_yaml(self) -> str:
        """As a file, without passwords and tokens."""
        return OmegaConf.to_yaml(OmegaConf.create(redacted(dataclasses.asdict(self))))


# Of optimizers with 8-bit moments under `update: gradient`: said of recipes and by `attach`.
EIGHT_BIT_DRIFT = (
    "rounds a moment of zero to one that is not, so masked rows would drift; set mask.update=strict"
)


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
    if mask.clusters is None and mask.cluster_by != "weight":
        found.append("mask.cluster_by: has no effect without mask.clusters; remove it")
    if mask.clusters is not None:
        if mask.clusters < 2:
            found.append("mask.clusters: needs at least 2; null ranks each row by itself")
        if mask.criterion == "random":
            found.append("mask.clusters: has no effect on random scores; set cluster_by=random")
        if mask.refresh == "stage":
            found.append("mask.clusters: the rows of a stage are ranked by themselves; remove it")
    if mask.enabled:
        found += _refresh_problems(mask)
    if mask.components is not None and not mask.components:
        found.append("mask.components: the list is empty; name components, or leave it out for all")
    return found


def _refresh_problems(mask: Mask) -> list[str]:
    """What is wrong with when rows are selected, and when the backward knows them."""
    found = []
    early = mask.refresh == "stage" or mask.backward == "row_sparse"
    if mask.criterion == "gradient" and early:
        found.append(
            f"mask.{'refresh' if mask.refresh == 'stage' else 'backward'}: the rows would be known "
            "before there is a gradient to choose them by; choose another mask.criterion"
        )
    if mask.criterion == "gradient" and mask.backward == "previous":
        found.append("mask.backward: previous leaves out the gradients that rank its next rows")
    if mask.criterion == "random" and mask.random_redraw == "stage" and mask.refresh not in (
        1, "stage",
    ):  # fmt: skip
        found.append("mask.refresh: has no effect on rows that are drawn once a stage; remove it")
    if mask.criterion in ("random", "weight") and mask.backward == "previous":
        found.append(
            f"mask.backward: rows by {mask.criterion} are known before the backward; set row_sparse"
        )
    if mask.criterion == "fisher" and mask.refresh != "stage":
        found.append(
            "mask.criterion: fisher ranks the rows by the stage's text before it is trained; set "
            "mask.refresh=stage"
        )
    if mask.refresh != "stage":
        if mask.calibration != Mask.calibration:
            found.append("mask.calibration: has no effect without mask.refresh=stage; remove it")
        return found
    for key in ("backward", "update"):
        if getattr(mask, key) != getattr(Mask, key):
            found.append(
                f"mask.{key}: has no effect with mask.refresh=stage, where masked rows are frozen "
                "and have no gradient; remove it"
            )
    if mask.criterion == "random" and mask.random_redraw == "step":
        found.append("mask.random_redraw: has no effect with mask.refresh=stage; remove it")
    if mask.criterion not in ("output", "fisher") and mask.calibration != Mask.calibration:
        found.append(
            f"mask.calibration: has no effect with criterion {mask.criterion!r}; remove it"
        )
    if mask.calibration < 1:
        found.append("mask.calibration: must be at least 1 sequence")
    return found


# Whoever validates one of them refuses unknown keys: `run/recipe_file.py`, `pipeline.attach`.
for _cls in [c for c in globals().values() if dataclasses.is_dataclass(c)]:
    _cls.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[union-attr]
