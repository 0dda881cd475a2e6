"""What the recipe says of end tasks (docs/end_tasks.md)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EndTask:
    """A text classification that copies of the checkpoints are fine-tuned on (docs/end_tasks.md).

    What is left out is as in the DAS benchmark, for its six tasks.
    """

    task: str | None = None  # restaurant, phone, acl_arc, ...; default: the key of the entry
    domain: str | None = None  # the domain that it is about; default: the one of the entry's name
    files: str | None = None  # folder with train, dev and test .jsonl[.gz]; dev may be missing
    hub: str | None = None  # dataset id, with splits of these names (or validation for dev)
    text_field: str | None = None  # default: sentence where rows have a term, else text
    term_field: str | None = None  # what the text is judged on; default: term, where rows have it
    label_field: str | None = None  # default: polarity where rows have a term, else label
    labels: list[str] | None = None  # default: those of the training rows
    absent_terms: Literal["fail", "keep"] | None = None  # terms that their sentence does not have
    metric: Literal["macro_f1", "micro_f1"] | None = None
    epochs: int | None = None
    lr: float | None = None  # default: that of `evaluate.end_tasks`


@dataclass
class EndTasks:
    """The second stage of the DAS benchmark: what a checkpoint knows, by fine-tuning copies of it.

    The defaults are those of the benchmark's code (ContinualLM).
    """

    tasks: dict[str, EndTask] = field(default_factory=dict)
    files: str | None = None  # folder with <task>/{train,dev,test}.jsonl[.gz]
    # own: each task after the stage of its domain, and all after the last; last: only the latter
    after: Literal["own", "last", "every"] = "own"
    seeds: list[int] = field(default_factory=lambda: [2021, 111, 222, 333, 444])
    # head: a new classifier on the first token (encoders) or the last one (decoders); likelihood:
    # the label is the continuation of the text, of a causal model
    score: Literal["head", "likelihood"] = "head"
    sequence_length: int = 164  # tokens
    batch_size: int = 16
    lr: float = 3e-5
    weight_decay: float = 0.01
    patience: int | None = None  # stop after as many epochs without a better score on dev
    new_pooler: bool = False  # a pooler that the checkpoint lacks starts from random numbers
    processes: int | None = None  # side by side; default: one a core (on a GPU: four at most)
