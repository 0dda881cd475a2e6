"""The methods of a run: which ones its recipe names, and what they are told of the run."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from pipeline.checkpoint import is_published, read_manifest, sha256
from pipeline.data.heldout import training_sequences
from pipeline.data.prepare import prepared_root
from pipeline.engine.config import has_bf16
from pipeline.methods.anchor import Anchor
from pipeline.methods.averages import Ema, StartAverage
from pipeline.methods.das import Das
from pipeline.methods.derpp import DerPlusPlus
from pipeline.methods.distill import Distill
from pipeline.methods.entropy_gate import EntropyGate
from pipeline.methods.epi import Epi
from pipeline.methods.ewc import Ewc
from pipeline.methods.half import Half
from pipeline.methods.hat_adapter import HatAdapter
from pipeline.methods.l2_to_start import L2ToStart
from pipeline.methods.method import Method, Start, Teacher
from pipeline.methods.mocl import Mocl
from pipeline.methods.mofo import Mofo
from pipeline.methods.olora import OLora
from pipeline.methods.pseudo_replay import PseudoReplay
from pipeline.methods.source_columns import SourceColumns
from pipeline.model.attention import Separation
from pipeline.model.load import load_for_evaluation
from pipeline.nodes import send_folder
from pipeline.ranks import on_rank0
from pipeline.recipe import Recipe
from pipeline.run.data import RunData

# In the order in which they act on a step; a name is the recipe's key.
METHODS = (
    EntropyGate,
    Mocl,
    Anchor,
    OLora,
    Distill,
    DerPlusPlus,
    PseudoReplay,
    Epi,
    Ewc,  # reads the gradient before the ones below change it
    L2ToStart,
    Half,
    SourceColumns,
    Das,
    HatAdapter,
    Mofo,
    Ema,  # averages what the ones above have made of an update
    StartAverage,
)
NEEDS = ("task labels", "old data", "old weights")  # `Method.needs`
# What is set elsewhere in the recipe than by a method's own key.
OTHERS = {
    "mask": (),
    "mask.criterion: fisher": ("task labels",),
    "mask.clusters": (),
    "model.lora": (),
    "model.lora.incremental": ("task labels",),
    "model.lora.experts": (),
    "model.prompt": (),
    "model.prompt.progressive": ("task labels",),
    "stages[].replay": ("old data",),
    "start_from: base": ("task labels",),
    "start_from: nearest": ("task labels", "old weights"),
}


def methods_of(recipe: Recipe) -> list[Method]:
    """In the order in which they act on a step."""
    return [m(recipe) for m in METHODS if getattr(recipe, m.name) is not None]


def check_methods(net: nn.Module, recipe: Recipe) -> None:
    """Raises UserError where a method does not work on such a model; net: without its weights."""
    for method in methods_of(recipe):
        method.check(net)


def needs_table() -> str:
    """The paper's Table 1 of what is here: what each method needs beside the new text; Markdown."""
    needs = {**OTHERS, **{m.name: m.needs for m in METHODS}}
    rows = [["method", *NEEDS], ["---"] * (1 + len(NEEDS))]
    for name, needed in sorted(needs.items(), key=lambda item: (len(item[1]), item[0])):
        rows.append([f"`{name}`", *("yes" if n in needed else "" for n in NEEDS)])
    return "".join(f"| {' | '.join(row)} |\n".replace("  ", " ") for row in rows)


def run_start(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, data: RunData, folder: Path, base: str
) -> Start:
    """folder: of the run. base: the checkpoint that stage 0 measures."""

    def domain(name: str, count: int) -> Iterable[Any]:
        assert data.prepared is not None  # `anchor_problems`
        return training_sequences(recipe, data.prepared[name].train, tokenizer, count)

    def teacher(which: str) -> Teacher:
        assert which == "base", "there is no stage before the run"
        return teacher_at(recipe, base)

    return Start(0, recipe, tokenizer, teacher, domain, folder / "kept", prepared_root(recipe))


def stage_start(
    begun: Start, stage: int, before: str, separation: Separation | None, engine: Any
) -> Start:
    """begun: of `run_start`. before: the checkpoint from which the stage starts."""

    def teacher(which: str) -> Teacher:
        return teacher_at(begun.recipe, before) if which == "previous" else begun.teacher(which)

    return replace(begun, stage=stage, teacher=teacher, separation=separation, engine=engine)


def teacher_at(recipe: Recipe, checkpoint: str) -> Teacher:
    """A published folder, or the pretrained model where it is, as a frozen model."""
    m, cuda = recipe.model, torch.cuda.is_available()
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    revision = m.revision if checkpoint == m.path else None

    def load(exact: bool = False) -> nn.Module:
        device = f"cuda:{torch.cuda.current_device()}" if cuda and not exact else "cpu"
        net = load_for_evaluation(
            checkpoint, m.objective, m.attention, revision, "auto" if exact else dtype, device,
            m.lora, m.overrides,
        )  # fmt: skip
        return net.requires_grad_(False)

    def identify() -> dict[str, Any]:
        quantize = m.lora.quantize if m.lora else "none"
        identity = on_rank0(partial(_identity, checkpoint, revision))
        changed = {"overrides": m.overrides} if m.overrides else {}
        return {**identity, "quantize": quantize, "dtype": str(dtype), **changed}

    return Teacher(load, identify, lambda: send_folder(Path(checkpoint)))


def _identity(checkpoint: str, revision: str | None) -> dict[str, Any]:
    """What a checkpoint holds: the hashes of its manifest, or of the files themselves."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return {"model": checkpoint, "revision": revision}
    if is_published(folder):
        files = read_manifest(folder)["files"]
    else:
        files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file()}
    text = json.dumps(files, sort_keys=True)
    return {"content": hashlib.sha256(text.encode()).hexdigest()}
