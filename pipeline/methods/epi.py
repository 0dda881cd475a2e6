"""EPI (Wang et al. 2023): parameters of its own for each task, which a text finds by itself.

Every stage trains an adapter or prompt of its own over the base (`start_from: base`). Before it,
the frozen base's representations of its texts are taken, a mean for every answer and a covariance
that all share; what is published holds the adapters of all stages so far with them, and an answer
is given by the adapter of the nearest class (`model/task_adapters.py`).
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from pipeline.checkpoint import keep_file
from pipeline.methods.domain_text import asked_and_answer
from pipeline.methods.method import Method, Start
from pipeline.model.lora import ADAPTER, WEIGHTS
from pipeline.model.task_adapters import (
    adapter_folder,
    class_statistics,
    precision_of,
    representations,
    save_tasks,
)
from pipeline.ranks import on_rank0
from pipeline.recipe import Recipe


class Epi(Method):
    """The recipe's `epi`."""

    name = "epi"
    needs = ("task labels",)

    def __init__(self, recipe: Recipe):
        assert recipe.epi is not None
        self.sequences = recipe.epi.sequences
        self.recipe = recipe
        self._kept = Path()
        self._stage = 0

    def prepare(self, start: Start) -> None:
        self._stage, self._kept = start.stage, start.kept / self.name
        path = self._classes(start.stage)
        if not on_rank0(path.is_file):
            on_rank0(partial(self._measure, start, path))

    def add_files(self, folder: Path) -> None:
        """The adapter as it is written now, those of the stages before, and the classes of all."""
        for stage in range(1, self._stage + 1):
            source = folder if stage == self._stage else adapter_folder(self._kept, stage)
            targets = [adapter_folder(folder, stage)]
            if stage == self._stage:  # for the stages to come
                targets.append(adapter_folder(self._kept, stage))
            for target in targets:
                target.mkdir(parents=True, exist_ok=True)
                for name in (ADAPTER, WEIGHTS):
                    shutil.copyfile(source / name, target / name)
        found = [load_file(self._classes(s)) for s in range(1, self._stage + 1)]
        stages = [torch.full((len(f["means"]),), s) for s, f in enumerate(found, start=1)]
        scatter = torch.stack([f["scatter"] for f in found]).sum(0)
        points = sum(int(f["points"]) for f in found)
        means = torch.cat([f["means"] for f in found])
        domains = [s.domains for s in self.recipe.stages[: self._stage]]
        save_tasks(folder, means, torch.cat(stages), precision_of(scatter, points), domains)

    def _classes(self, stage: int) -> Path:
        return self._kept / f"stage-{stage:02d}.safetensors"

    def _measure(self, start: Start, path: Path) -> None:
        net: Any = start.teacher("base").load()
        prompts, classes = [], []
        for domain in self.recipe.stages[start.stage - 1].domains:
            for sequence in start.domain(domain, self.sequences):
                asked, answer = asked_and_answer(sequence)
                prompts.append(asked)
                classes.append((domain, tuple(answer.tolist())))
        means, scatter = class_statistics(representations(net, prompts), classes)
        points = torch.tensor(len(prompts))
        keep_file(path, save({"means": means, "scatter": scatter, "points": points}))
