"""What a method that keeps or adapts knowledge may do in a run; every part has an empty default."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.model.attention import Separation
from pipeline.recipe import Recipe
from pipeline.shard import Shard


@dataclass(frozen=True)
class Teacher:
    """A frozen model: the base, or what the stage before published.

    load: gives it in eval mode, whole, on this rank's device (of a GPU in half precision); with
    `exact=True` on the CPU, in the precision of its file.
    identify: gives what says that two teachers are the same one (of a folder, what its files hold,
    which are read for it). All ranks call it together.
    send: gives its files to nodes that do not have them, before their ranks load it. All ranks call
    it together.
    """

    load: Callable[..., nn.Module]
    identify: Callable[[], dict[str, Any]]
    send: Callable[[], None] = lambda: None

    def load_on_all(self, **how: Any) -> Any:
        """`load`, by all ranks together, of any node."""
        self.send()
        return self.load(**how)


@dataclass(frozen=True)
class Start:
    """What a method knows when the run, or a stage of it, begins; the same on all ranks.

    stage: 0 at the run's start, before there is an engine; then from 1.
    teacher: of "base" or "previous" (from stage 2 on).
    domain: domain and count -> that many packed sequences of its training text, or fewer.
    kept: where methods keep things in the run folder, each in a folder of its name.
    shared: a folder of all runs, for what several of them would make alike.
    separation: how the engine's model keeps the documents of a row apart (None at stage 0).
    """

    stage: int
    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    teacher: Callable[[str], Teacher]
    domain: Callable[[str, int], Iterable[Any]]
    kept: Path
    shared: Path
    separation: Separation | None = None
    engine: Any = None


def frozen_teacher(start: Start, which: str, instead: str) -> Any:
    """The forward of a teacher beside the model that is trained, sharded as the engine shards.

    instead: settings that need no such copy.

    Raises:
        UserError: it does not fit the GPU.
    """
    try:
        return start.engine.frozen(start.teacher(which).load_on_all())
    except torch.OutOfMemoryError:
        raise UserError(
            f"stage {start.stage}: the frozen teacher does not fit the GPU beside the model that "
            f"is trained; set {instead}, or shard the weights of both (--config zero3, or "
            "engine.kind=fsdp)"
        ) from None


class Method:
    """One method of a run, made from its part of the recipe.

    It may look at or change a step at four places, in this order: the losses of the new text
    (`weigh`), micro-batches of its own behind those of the new text (`batches`, `loss`), the
    reduced gradient's shards before the mask (`edit`), and the weights behind the optimizer's
    update (`after_step`). Magnitudes are recorded on the new text only; the mask is applied to the
    sum of all gradients.

    name: its key in the recipe, and in the log that of its loss.
    needs: what it takes beside the new text (Table 1): "task labels" (where a task ends and the
        next one begins), "old data", "old weights" (other than those that are trained on).
    weight: of its loss beside that of the new text.
    masked: whether the mask is applied to the gradient of its own micro-batches.
    kept_weights: fp32 numbers that it keeps for every trained weight, sharded as the optimizer's
        state; live_teacher: whether a frozen model is beside the trained one in some stage. Both
        for the estimate of memory.
    """

    name = ""
    kept_weights = 0
    live_teacher = False
    needs: tuple[str, ...] = ()
    weight = 1.0
    masked = True

    def check(self, net: nn.Module) -> None:
        """Before anything is loaded; net: the model without its weights.

        Raises:
            UserError: the method does not work on such a model.
        """

    def begin(self, start: Start) -> None:
        """Once, before the engine is built: while a whole model still fits. All ranks call it."""

    def prepare(self, start: Start) -> None:
        """Before a stage's first step, with the engine as the stage finds it. All ranks call it."""

    def micro_batches(self) -> int:
        """How many micro-batches it adds to every step of the stage; on every rank alike."""
        return 0

    def batches(self, step: int) -> Sequence[Any]:
        """This rank's micro-batches of step 1...: `micro_batches()` of them."""
        return ()

    def predictions(self, batch: Any) -> int:
        """How many predictions a micro-batch's loss is summed over."""
        raise NotImplementedError

    def loss(self, engine: Any, head: Any, batch: Any) -> Tensor:
        """The sum over a micro-batch's predictions, in nats. Where the engine shards weights, all
        ranks do the same forwards.

        head: `PredictedPositions` of the engine's model, or None.
        """
        raise NotImplementedError

    def weigh(self, losses: Tensor, logits: Tensor, targets: Tensor, inputs: dict) -> Tensor:
        """What is minimised in place of the new text's cross-entropies.

        Args:
            losses: nats, fp32 [predicted]; logits: [predicted, vocabulary]; targets [predicted].
            inputs: of the forward that gave the logits.
        """
        return losses

    def edit(self, shards: Any, step: int, lr: float) -> None:
        """Change the reduced gradient of a step in place (`shards.gradient_shards(names)`), before
        the mask and the clipping."""

    def after_step(self, engine: Any, step: int, steps: int) -> None:
        """Behind the optimizer's update of step 1...steps, where there was one: not behind a step
        that was left out. All ranks call it."""

    def published(self, engine: Any) -> AbstractContextManager[None]:
        """While it is entered, the engine holds what would be published of it now, in the middle of
        a stage; all ranks enter and leave it together."""
        return nullcontext()

    def finish(self, engine: Any, stage: int) -> None:
        """Behind a stage's last step, before it is published; all ranks call it."""

    def add_files(self, folder: Path) -> None:
        """On rank 0: into the folder of a checkpoint that is published, beside its weights."""

    def state_shards(self) -> Iterator[Shard]:
        """Live local tensors that belong to weights, for a checkpoint within a stage; a name is a
        weight's, with a prefix where there are several kinds."""
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        """What else a checkpoint within a stage keeps; small, JSON-able, the same on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After `prepare`, to go on behind the step that `state` is of."""


@contextmanager
def published(engine: Any, methods: Sequence[Method]) -> Iterator[None]:
    """While it is entered, the engine holds what would be published of it now."""
    with ExitStack() as stack:
        for method in methods:
            stack.enter_context(method.published(engine))
        yield
