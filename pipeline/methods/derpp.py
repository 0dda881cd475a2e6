"""DER++: replay a few old sequences with what the model made of them (Buzzega et al. 2020,
arXiv 2004.07211).

After a stage some sequences of its domain are kept, with the model's last hidden states at their
predicted positions (for the logits, as in ContinualLM's code: a vocabulary of them is large). Each
step of a later stage minimises, beside the new text's loss, beta times the loss on kept sequences
plus alpha times the squared distance to the kept hidden states.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from pipeline.checkpoint import keep_file
from pipeline.data.mlm import IGNORED
from pipeline.data.objective import targets_of
from pipeline.methods.domain_text import domain_batches
from pipeline.methods.extra_rows import ExtraRows
from pipeline.methods.method import Method, Start
from pipeline.model.attention import Separation, arrange, separation_of
from pipeline.model.load import PredictedPositions, predict
from pipeline.ranks import on_rank0
from pipeline.recipe import Recipe

STREAM = 13  # of the seeds that are drawn from the recipe's


class DerPlusPlus(Method):
    """The recipe's `derpp`. The buffer is input_ids, labels, segments [sequences, length] and
    hidden fp32 [sequences, length, hidden], zero where nothing is predicted."""

    name = "derpp"
    needs = ("old data",)

    def __init__(self, recipe: Recipe):
        assert recipe.derpp is not None
        self.settings, self.recipe = recipe.derpp, recipe
        self.objective = recipe.model.objective
        self.rows = max(1, round(self.settings.fraction * recipe.train.batch_size))  # of a step
        self._extra = ExtraRows(self.rows, recipe.train.micro_batch_size)
        self._buffer: dict[str, Tensor] = {}
        self._separation: Separation | None = None
        self._stage = 0

    def prepare(self, start: Start) -> None:
        self._stage, self._separation = start.stage, start.separation
        if start.stage == 1:
            return
        path = start.kept / f"derpp/stage-{start.stage - 1:02d}.safetensors"
        if not on_rank0(path.is_file):
            on_rank0(partial(self._keep, start, path))
        found = on_rank0(
            lambda: [
                load_file(path.with_name(f"stage-{s:02d}.safetensors"))
                for s in range(1, start.stage)
            ]
        )
        self._buffer = {key: torch.cat([f[key] for f in found]) for key in found[0]}

    def micro_batches(self) -> int:
        return self._extra.micro_batches if self._stage > 1 else 0

    def batches(self, step: int) -> list[dict[str, Tensor]]:
        if self._stage == 1:
            return []
        rng = np.random.default_rng((self.recipe.stage_seed(self._stage), STREAM, step))
        kept = len(self._buffer["labels"])
        places = rng.choice(kept, self.rows, replace=self.rows > kept)
        return [self._batch(mine) for mine in self._extra.deal(places.tolist())]

    def predictions(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(
        self, engine: Any, head: PredictedPositions | None, batch: dict[str, Tensor]
    ) -> Tensor:
        waiting = {k: v.to(engine.device) for k, v in batch.items() if k != "hidden"}
        inputs, tokens = arrange(waiting, self._separation, engine.module)
        targets = targets_of(tokens["labels"], self.objective)
        seen: list[Tensor] = []
        body = engine.module.base_model
        hook = body.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
        try:
            logits = predict(engine.forward, inputs, targets >= 0, head)
        finally:
            hook.remove()
        right = F.cross_entropy(logits.float(), targets[targets >= 0], reduction="sum")
        # In the order of the labels, which `arrange` keeps.
        old = batch["hidden"][batch["labels"] != IGNORED].to(engine.device)
        now = seen[0][tokens["labels"] != IGNORED].float()
        distance = ((now - old) ** 2).mean(-1).sum()
        return self.settings.beta * right + self.settings.alpha * distance

    def _batch(self, places: list[int | None]) -> dict[str, Tensor]:
        """None: a row without anything to predict."""
        batch = {k: v[[p or 0 for p in places]] for k, v in self._buffer.items()}
        longest = int((batch["segments"] >= 0).sum(1).max())
        batch = {k: v[:, :longest] for k, v in batch.items()}
        batch["labels"][[p is None for p in places]] = IGNORED
        real = batch["segments"] >= 0  # as `collate` makes it: only where there is padding
        return batch if real.all() else {**batch, "real": real}

    def _keep(self, start: Start, path: Any) -> None:
        """Write what is kept of the stage before."""
        net: Any = start.teacher("previous").load()
        separation, device = separation_of(net, self.recipe), next(net.parameters()).device
        domains, seed = self.recipe.stages[start.stage - 2].domains, self.recipe.seed
        found: list[dict[str, Tensor]] = []
        for _, batch in domain_batches(
            start, domains, self.settings.sequences, (seed, STREAM, start.stage)
        ):
            inputs, tokens = arrange({k: v.to(device) for k, v in batch.items()}, separation, net)
            with torch.no_grad():
                hidden = net.base_model(**inputs)[0].float()
            kept = torch.zeros(*batch["labels"].shape, hidden.shape[-1])
            wanted = batch["labels"] != IGNORED
            kept[wanted] = hidden[tokens["labels"] != IGNORED].cpu()
            batch.pop("real", None)
            found.append({k: self._padded(k, v) for k, v in {**batch, "hidden": kept}.items()})
        keep_file(path, save({k: torch.cat([f[k] for f in found]) for k in found[0]}))

    def _padded(self, name: str, rows: Tensor) -> Tensor:
        """[rows, n, ...] to the length of a sequence: batches of short rows are shorter."""
        fill = {"labels": IGNORED, "segments": -1}.get(name, 0)
        more = self.recipe.data.sequence_length - rows.shape[1]
        return F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, more), value=fill)
