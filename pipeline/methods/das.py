"""DAS: protect what earlier text made important, softly, and learn what differs from it
(Ke et al. 2023, arXiv 2302.03241).

Before the first stage the importance for general knowledge is measured by a proxy that needs no
general text: the KL between two passes with different dropout. After each stage that of its domain
is measured by its loss. From then on the gradient of every unit is multiplied by one minus the
largest importance so far, where the engine keeps it. The contrast pulls two passes of a text
together and away from what the important units alone make of it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.checkpoint import keep_file
from pipeline.data.objective import targets_of
from pipeline.errors import UserError
from pipeline.methods.domain_text import domain_batches
from pipeline.methods.importance import (
    Gate,
    Importance,
    accumulated,
    gated,
    gates_of,
    measure_importance,
    soft_masks,
)
from pipeline.methods.method import Method, Start
from pipeline.model.attention import arrange, separation_of
from pipeline.model.load import PredictedPositions, predict
from pipeline.ranks import on_rank0, rank, world_size
from pipeline.recipe import Recipe
from pipeline.shard import Shard

TEMPERATURE = 0.05  # of the contrast, as in the authors' code
STREAM = 11  # of the seeds that are drawn from the recipe's


class Das(Method):
    """The recipe's `das`."""

    name = "das"
    needs = ("task labels",)

    def __init__(self, recipe: Recipe):
        assert recipe.das is not None
        self.settings, self.recipe = recipe.das, recipe
        self.objective = recipe.model.objective
        self._masks: dict[str, tuple[Tensor, int]] = {}
        self._importance: Importance = {}
        self._gates: list[Gate] = []
        self._engine: Any = None
        self._first: PredictedPositions | None = None

    def check(self, net: nn.Module) -> None:
        gates_of(net)
        _dropouts(net)

    def begin(self, start: Start) -> None:
        self._measure(start, 0, self.recipe.stages[0].domains, "base", general=True)

    def prepare(self, start: Start) -> None:
        if start.stage > 1:
            domains = self.recipe.stages[start.stage - 2].domains
            self._measure(start, start.stage - 1, domains, "previous", general=False)
        found = on_rank0(
            lambda: [load_file(self._file(start, stage)) for stage in range(start.stage)]
        )
        self._engine = start.engine
        self._use(accumulated(found))

    @torch.no_grad()
    def edit(self, shards: Any, step: int, lr: float) -> None:
        for shard in shards.gradient_shards(list(self._masks)):
            keep, dimension = self._masks[shard.name]
            _scale(shard, keep.to(shard.tensor.device), dimension)

    def weigh(self, losses: Tensor, logits: Tensor, targets: Tensor, inputs: dict) -> Tensor:
        if not self.settings.contrast:
            return losses
        ids = inputs["input_ids"]
        if self.objective == "masked":  # the text as it was
            ids = torch.where(targets >= 0, targets, ids)
        text = {**inputs, "input_ids": ids}
        first, second = self._represent(text), self._represent(text)
        with gated(self._gates, self._importance):
            general = self._represent(text)
        others = torch.cat([second, general])
        likeness = F.cosine_similarity(first[:, None], others[None], dim=-1) / TEMPERATURE
        contrast = F.cross_entropy(likeness, torch.arange(len(first), device=first.device))
        return losses + self.settings.contrast * contrast

    def finish(self, engine: Any, stage: int) -> None:
        if self._first is not None:
            self._first.close()
            self._first = None

    def _use(self, importance: Importance) -> None:
        net, device = self._engine.module, self._engine.device
        self._importance = {key: value.to(device) for key, value in importance.items()}
        self._masks = soft_masks(net, importance)
        if self.settings.contrast:
            self._gates, self._first = gates_of(net), PredictedPositions(net)

    def _represent(self, inputs: dict[str, Any]) -> Tensor:
        """[rows, hidden]: the mean of the last hidden states; the output head sees one token."""
        seen: list[Tensor] = []
        body = self._engine.module.base_model
        hook = body.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
        wanted = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        wanted[0, 0] = True
        assert self._first is not None
        self._first.select(wanted)
        try:
            self._engine.forward(**inputs)
        finally:
            self._first.select(None)
            hook.remove()
        return seen[0].float().mean(1)

    def _file(self, start: Start, stage: int) -> Any:
        return start.kept / f"das/stage-{stage:02d}.safetensors"

    def _measure(
        self, start: Start, stage: int, domains: list[str], which: str, general: bool
    ) -> None:
        """Write a stage's importance, where it is not there yet."""
        path = self._file(start, stage)
        if on_rank0(path.is_file):
            return
        net: Any = start.teacher(which).load_on_all()
        losses = _proxies if general else _losses
        importance = measure_importance(net, losses(self, net, start, domains))
        on_rank0(lambda: keep_file(path, save(importance)))


def _batches(
    das: Das, net: nn.Module, start: Start, domains: list[str]
) -> Iterator[tuple[int, dict[str, Any], dict[str, Tensor]]]:
    """This rank's share of the text: (number, arguments of the forward, what each token is)."""
    device, separation = next(net.parameters()).device, separation_of(net, das.recipe)
    seed, share = (das.recipe.seed, STREAM), (rank(), world_size())
    for number, batch in domain_batches(start, domains, das.settings.sequences, seed, share):
        yield (number, *arrange({k: v.to(device) for k, v in batch.items()}, separation, net))


def _proxies(
    das: Das, net: Any, start: Start, domains: list[str]
) -> Iterator[Callable[[], Tensor]]:
    """KL between the last hidden states, as distributions, of two passes with dropout."""
    for module in _dropouts(net):
        module.p = das.settings.dropout

    def proxy(number: int, inputs: dict[str, Any]) -> Tensor:
        net.train()
        with torch.random.fork_rng():
            torch.manual_seed(das.recipe.seed * 1_000_003 + number)  # whatever the ranks
            one, two = (net.base_model(**inputs)[0].float().log_softmax(-1) for _ in range(2))
        net.eval()
        return F.kl_div(two, one, reduction="sum", log_target=True)

    for number, inputs, _ in _batches(das, net, start, domains):
        yield partial(proxy, number, inputs)


def _dropouts(net: Any) -> list[nn.Dropout]:
    found = [m for m in net.modules() if isinstance(m, nn.Dropout)]
    if not found:
        raise UserError(
            f"das: {net.config.model_type} has no dropout, by which general knowledge is measured; "
            "take another model, or another method"
        )
    return found


def _losses(das: Das, net: Any, start: Start, domains: list[str]) -> Iterator[Callable[[], Tensor]]:
    """The cross-entropy of the domain's own text."""

    def loss(inputs: dict[str, Any], targets: Tensor) -> Tensor:
        logits = predict(net, inputs, targets >= 0, None)
        return F.cross_entropy(logits.float(), targets[targets >= 0], reduction="sum")

    for _, inputs, tokens in _batches(das, net, start, domains):
        yield partial(loss, inputs, targets_of(tokens["labels"], das.objective))


def _scale(shard: Shard, factor: Tensor, dimension: int) -> None:
    """Multiply a piece of a gradient by a number per row or column, in place."""
    if len(shard.shape) == 1:
        shard.tensor.mul_(factor[shard.start : shard.start + shard.tensor.numel()])
    else:
        shard.mask(factor, dimension)
