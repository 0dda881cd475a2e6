"""The adapters (or prompts) of several tasks over one frozen base, and which of them a text takes.

A folder `experts` in a checkpoint holds an adapter a stage, in PEFT's format, and
`tasks.safetensors`: means fp32 [classes, hidden] of the base's representations of the tasks' texts,
the stage (from 1) that each class is of, int64 [classes], and `precision` fp32 [hidden, hidden],
the inverse of the covariance within the classes. A text goes to the stage of the class that is
nearest to it by the Mahalanobis distance.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.model.generate import padded
from pipeline.model.lora import WEIGHTS, load_adapter
from pipeline.model.prompt import KEY, prompt_of

FOLDER, TASKS = "experts", "tasks.safetensors"
SHRINK = 0.01  # of the covariance toward a multiple of one: classes may be smaller than `hidden`
BATCH = 32  # texts of a forward


def adapter_folder(folder: Path, stage: int) -> Path:
    return folder / FOLDER / f"{stage:02d}"


@torch.no_grad()
def representations(net: Any, prompts: Sequence[np.ndarray]) -> Tensor:
    """The mean of a model's last hidden states (of an encoder-decoder: the encoder's) over the
    tokens of each text, fp32 [texts, hidden] on the CPU. prompts: int [n] each."""
    body = net.get_encoder() if net.config.is_encoder_decoder else net.base_model
    found = []
    for start in range(0, len(prompts), BATCH):
        ids, real = padded(prompts[start : start + BATCH], 0)
        hidden = body(input_ids=ids.to(net.device), attention_mask=real.to(net.device))[0].float()
        weights = real.to(hidden)[..., None]
        found.append(((hidden * weights).sum(1) / weights.sum(1)).cpu())
    return torch.cat(found) if found else torch.zeros(0, net.config.hidden_size)


def class_statistics(points: Tensor, classes: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(means [classes, hidden], scatter [hidden, hidden]: the sum of the squared distances from
    them), in float64. classes: of each point, hashable."""
    points = points.double()
    means, scatter = [], torch.zeros(points.shape[1], points.shape[1], dtype=torch.float64)
    for one in dict.fromkeys(classes):
        own = points[[c == one for c in classes]]
        means.append(own.mean(0))
        scatter += (own - means[-1]).t() @ (own - means[-1])
    return torch.stack(means), scatter


def precision_of(scatter: Tensor, points: int) -> Tensor:
    """The inverse of the covariance, a little shrunk. points: of which `scatter` is the sum."""
    covariance = scatter / points
    level = covariance.diagonal().mean().clamp_min(1e-12)
    one = torch.eye(len(covariance), dtype=covariance.dtype)
    return torch.linalg.inv((1 - SHRINK) * covariance + SHRINK * level * one)


def save_tasks(
    folder: Path, means: Tensor, stages: Tensor, precision: Tensor, domains: list[list[str]]
) -> None:
    """Write `tasks.safetensors` of a checkpoint. domains: of each stage."""
    tensors = {"means": means.float(), "stages": stages, "precision": precision.float()}
    whole = {k: t.contiguous() for k, t in tensors.items()}
    save_file(whole, folder / FOLDER / TASKS, metadata={"domains": json.dumps(domains)})


class TaskAdapters:
    """What a checkpoint holds of them, in a model that has loaded it."""

    def __init__(self, checkpoint: Path, net: Any):
        self.net = net
        found = load_file(checkpoint / FOLDER / TASKS)
        with safe_open(checkpoint / FOLDER / TASKS, "pt") as file:
            self.domains: list[list[str]] = json.loads(file.metadata()["domains"])
        self.means, self.stages = found["means"].double(), found["stages"]
        self.precision = found["precision"].double()
        self._prompts: dict[int, Tensor] = {}
        for stage in sorted(set(self.stages.tolist())):
            folder = adapter_folder(checkpoint, stage)
            if prompt_of(net) is not None:
                self._prompts[stage] = load_file(folder / WEIGHTS)[KEY].float().to(net.device)
            else:
                load_adapter(net, folder, f"stage_{stage}")
        net.eval().to(net.device)

    def use(self, stage: int | None) -> None:
        """Let the model be the base with a stage's adapter; None: alone."""
        prompt = prompt_of(self.net)
        if prompt is not None:
            prompt.on = stage is not None
            if stage is not None:
                prompt.new = nn.Parameter(self._prompts[stage], requires_grad=False)
        elif stage is None:
            self.net.disable_adapters()
        else:
            self.net.enable_adapters()
            self.net.set_adapter(f"stage_{stage}")

    def described(self, stage: int, task: str) -> dict[str, Any]:
        """Of a row of a task: which adapter has answered, and whether it is the task's own."""
        return {"expert": stage, "found": task in self.domains[stage - 1]}

    def choose(self, prompts: Sequence[np.ndarray]) -> list[int]:
        """The stage whose adapter each text takes."""
        self.use(None)
        points = representations(self.net, prompts).double()
        return [int(self.stages[i]) for i in nearest(points, self.means, self.precision)]


def nearest(points: Tensor, means: Tensor, precision: Tensor) -> list[int]:
    """Of each point [n, hidden] the mean [classes, hidden] with the least Mahalanobis distance."""
    root = torch.linalg.cholesky(precision)
    return torch.cdist(points @ root, means @ root).argmin(1).tolist()
