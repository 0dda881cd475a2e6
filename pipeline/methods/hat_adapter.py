"""HAT (Serra et al. 2018, arXiv 1801.01423) over the ranks of a LoRA adapter: each stage claims
some of them, which later stages may use but not move.

Every rank of every adapted linear has a gate sigmoid(s e), e learned by each stage anew, s rising
over the stage, so that the gates end open or closed. The stage's open gates are folded into what
it publishes: an ordinary adapter, whose other ranks are zero. The whole adapter goes on to the next
stage: in it the gradient of the ranks that were open before is blocked.

Deviations: gates are cut to 0 or 1 at the end (there s stays at its largest value), so that nothing
claimed moves at all; s rises once a stage, not an epoch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.checkpoint import keep_file
from pipeline.methods.method import Method, Start
from pipeline.methods.weights import change_masters, changed_masters, masters
from pipeline.progress import say
from pipeline.ranks import on_rank0, summed
from pipeline.recipe import Recipe
from pipeline.shard import Shard, overlap

LARGEST = 6.0  # of abs(e), and
EXPONENT = 50.0  # of abs(s e), as in the authors' code
A, B = ".lora_A.default.weight", ".lora_B.default.weight"
GATES, CLAIMED = ".gates", ".claimed"  # of a linear, in what is kept: fp32 [ranks], 1 or 0


class HatAdapter(Method):
    """The recipe's `hat_adapter`, with `model.lora`."""

    name = "hat_adapter"
    needs = ("task labels",)

    def __init__(self, recipe: Recipe):
        assert recipe.hat_adapter is not None
        assert recipe.model.lora is not None
        self.settings, self.seed, self.ranks = recipe.hat_adapter, recipe.seed, recipe.model.lora.r
        self._engine: Any = None
        self._layers: dict[str, int] = {}  # by the names of the adapted linears: rows of the below
        self._embedding = torch.empty(0)  # e; fp32 [layers, ranks], the same on every rank
        self._claimed = torch.empty(0)  # 1 where an earlier stage's gate was open, else 0
        self._steepness = 0.0  # s
        self._gating = False
        self._hooks: list[Any] = []
        self._folder: Any = None

    def prepare(self, start: Start) -> None:
        net, device = start.engine.module, start.engine.device
        names = [n.removesuffix(A) for n, _ in net.named_parameters() if n.endswith(A)]
        self._engine, self._layers = start.engine, {n: i for i, n in enumerate(names)}
        self._folder = start.kept / self.name
        shape = (len(names), self.ranks)
        generator = torch.Generator().manual_seed(self.seed * 1009 + start.stage)
        self._embedding = torch.randn(shape, generator=generator).to(device)
        self._claimed = torch.zeros(shape, device=device)
        self._steepness = 1 / self.settings.steepness
        if start.stage > 1:
            kept = on_rank0(lambda: load_file(self._file(start.stage - 1)))
            self._claimed = torch.stack([kept[n + CLAIMED] for n in names]).to(device)
            adapter = ((n, w) for n, w in kept.items() if not n.endswith((GATES, CLAIMED)))
            start.engine.load_weights(adapter)
        self._gating = True
        for name, layer in self._layers.items():
            module = net.get_submodule(f"{name}.lora_A.default")
            self._hooks.append(module.register_forward_hook(self._gate(layer)))

    @torch.no_grad()
    def edit(self, shards: Any, step: int, lr: float) -> None:
        """Train the gates by the whole gradient; then leave of it what is free to move."""
        self._train_gates(self._gate_gradients(shards))
        free = 1 - self._claimed
        for suffix, dimension in ((A, 0), (B, 1)):
            for shard in shards.gradient_shards([n + suffix for n in self._layers]):
                keep = free[self._layers[shard.name.removesuffix(suffix)]]
                shard.mask(keep.to(shard.tensor.device), dimension)

    def after_step(self, engine: Any, step: int, steps: int) -> None:
        least, most = 1 / self.settings.steepness, self.settings.steepness
        self._steepness = least + (most - least) * step / max(steps - 1, 1)  # of the next step

    @contextmanager
    def published(self, engine: Any) -> Iterator[None]:
        self._gating = False
        try:
            with changed_masters(engine, self._folding()):
                yield
        finally:
            self._gating = True

    def finish(self, engine: Any, stage: int) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._gating = [], False
        trained = {n for n, p in engine.module.named_parameters() if p.requires_grad}
        whole = {n: w.cpu().contiguous() for n, w in engine.full_weights(names=trained)}
        gates = self._open()
        claimed = torch.maximum(self._claimed, gates)
        for name, layer in self._layers.items():
            whole[name + GATES], whole[name + CLAIMED] = gates[layer].cpu(), claimed[layer].cpu()

        def write() -> None:
            keep_file(self._file(stage), save(whole))
            shares = f"{gates.mean():.0%} of the ranks open, {claimed.mean():.0%} claimed so far"
            say(f"  {self.name}: {shares}")

        on_rank0(write)
        change_masters(engine, self._folding())

    def state_dict(self) -> dict[str, Any]:
        return {"steepness": self._steepness, "embedding": self._embedding.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steepness = state["steepness"]
        self._embedding.copy_(torch.tensor(state["embedding"]))

    def _file(self, stage: int) -> Any:
        return self._folder / f"stage-{stage:02d}.safetensors"

    def _soft(self) -> Tensor:
        """The gates of this step, [layers, ranks], in (0, 1)."""
        return (self._steepness * self._embedding).clamp(-EXPONENT, EXPONENT).sigmoid()

    def _open(self) -> Tensor:
        """The gates as they are published: 1 or 0."""
        return (self._embedding > 0).float()

    def _gate(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor | None:
            return output * self._soft()[layer].to(output) if self._gating else None

        return hook

    def _gate_gradients(self, shards: Any) -> Tensor:
        """Of the loss, for every gate: [layers, ranks].

        A gate is a factor on a row of A: its gradient is that of the row times the row, summed,
        over the gate. What several ranks hold of a row counts once.
        """
        sums = torch.zeros(2, *self._embedding.shape, device=self._engine.device)
        weights = {s.name: s for s in masters(self._engine)}
        for gradient in shards.gradient_shards([n + A for n in self._layers]):
            weight = weights.get(gradient.name)
            if weight is None:
                continue
            layer, columns = self._layers[gradient.name.removesuffix(A)], gradient.shape[1]
            here, there = overlap(gradient, weight)
            held = weight.tensor[there].to(gradient.tensor.device)
            products = gradient.tensor[here].float() * held
            first = gradient.start + here.start
            rows = torch.arange(first, first + len(products), device=products.device) // columns
            sums[0, layer].index_add_(0, rows.to(sums.device), products.to(sums.device))
            counts = torch.full_like(products, 1 / columns).to(sums.device)
            sums[1, layer].index_add_(0, rows.to(sums.device), counts)
        products, copies = summed(sums, self._engine.device)
        found = products / copies / self._soft()
        return found.nan_to_num(0.0, 0.0, 0.0)  # of a step that will be dropped

    def _train_gates(self, gradient: Tensor) -> None:
        """A step, with the regulariser (the share of the free ranks that is open) and the authors'
        compensation, which puts the largest s and the slope at e for s and the slope at s e."""
        free = 1 - self._claimed
        gradient = gradient + self.settings.sparsity * free / free.sum().clamp_min(1)
        slope = self._embedding.sigmoid() * (-self._embedding).sigmoid()
        self._embedding -= self.settings.lr * gradient * self.settings.steepness * slope
        self._embedding.clamp_(-LARGEST, LARGEST)

    def _folding(self) -> Any:
        """The change of the weights by which the open gates go into A (`change_masters`)."""
        gates, places = self._open(), list(masters(self._engine))

        def fold(place: int, weight: Tensor) -> Tensor:
            layer = self._layers.get(places[place].name.removesuffix(A))
            if layer is None or not places[place].name.endswith(A):
                return weight
            piece = Shard("", weight.clone(), places[place].start, places[place].shape)
            piece.mask(gates[layer].to(weight.device), 0)
            return piece.tensor

        return fold
