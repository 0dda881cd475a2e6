"""`start_from: nearest`: each stage starts from the model that already knows its text best.

The paper's DEMIX baseline (Gururangan et al. 2021, arXiv 2108.05036): an expert a domain, made from
the earlier expert that is nearest. With `model.lora` the experts are adapters over one base. The
nearest is the base or earlier stage with the lowest loss on the first sequences of the stage's
training text.
"""

import json

import torch

from pipeline.checkpoint import keep_file
from pipeline.methods.domain_text import domain_batches
from pipeline.methods.method import Start
from pipeline.model.attention import separation_of
from pipeline.model.load import summed_loss
from pipeline.ranks import on_rank0, rank, totals, world_size
from pipeline.run.methods import teacher_at

SEQUENCES = 256
STREAM = 17  # of the seeds that are drawn from the recipe's


def nearest_start(begun: Start, stage: int, checkpoints: list[str]) -> int:
    """The place in `checkpoints` of the one that a stage starts from. All ranks call it, each with
    room for a whole model; it is measured once and kept in the run folder.

    checkpoints: of stages 0, 1, ... before `stage`.
    """
    path = begun.kept / "nearest" / f"stage-{stage:02d}.json"
    if not on_rank0(path.is_file):
        losses = [mean_loss(begun, stage, c) for c in checkpoints]
        text = json.dumps({"losses": losses})
        on_rank0(lambda: keep_file(path, text))
    losses = on_rank0(lambda: json.loads(path.read_text(encoding="utf-8"))["losses"])
    return min(range(len(losses)), key=losses.__getitem__)


@torch.no_grad()
def mean_loss(begun: Start, stage: int, checkpoint: str) -> float:
    """Nats a predicted token of the stage's training text; the ranks share it."""
    recipe = begun.recipe
    net = teacher_at(recipe, checkpoint).load_on_all()
    separation, device = separation_of(net, recipe), next(net.parameters()).device
    total = count = 0.0
    for _, batch in domain_batches(
        begun, recipe.stages[stage - 1].domains, SEQUENCES, (recipe.seed, STREAM, stage),
        (rank(), world_size()),
    ):  # fmt: skip
        there = {k: v.to(device) for k, v in batch.items()}
        loss, predicted = summed_loss(net, there, separation, recipe.model.objective)
        total, count = total + loss.item(), count + predicted
    total, count = totals([total, count], device)
    return total / max(count, 1)
