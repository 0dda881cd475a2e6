"""What a step has come to: on the progress bar, in the log, for the metric writers."""

from typing import Any

from pipeline.progress import EventLog, StageProgress
from pipeline.recipe import Recipe
from pipeline.run.speed import PARTS, Speed


class StepReport:
    """Of the steps of one stage, on rank 0."""

    def __init__(
        self, engine: Any, recipe: Recipe, stage: int, steps: int, log: EventLog, behind: int
    ):
        """behind: steps that are done already."""
        self._engine, self._log = engine, log
        self._stage, self._name, self._steps = stage, recipe.stages[stage - 1].name, steps
        title = f"{recipe.name}: stage {stage}/{len(recipe.stages)} {self._name}"
        self._progress = StageProgress(title, steps, behind)
        self._speed = Speed(engine.module, recipe, engine.device)

    def step(
        self,
        step: int,
        seconds: dict[str, float],
        *,
        tokens: int,
        predicted: int,
        loss: float,
        lr: float,
        kept: float,
        applied: bool,
        domains: dict[str, Any] | None,
        methods: dict[str, float],
    ) -> None:
        """seconds: of the `Stopwatch`; tokens, predicted: over all ranks; kept: the fraction of
        rows; domains, methods: the losses of each."""
        norm = self._engine.gradient_norm
        fast = self._speed.numbers(tokens, predicted, seconds["all"])
        self._progress.update(step, tokens, loss, norm, kept, fast)
        self._log.write(
            "step",
            stage=self._stage,
            domain=self._name,
            step=step,
            steps=self._steps,
            loss=loss,
            grad_norm=norm,
            lr=lr,
            kept=kept,
            applied=applied,
            tokens=tokens,
            seconds=seconds["all"],
            **{f"{part}_seconds": seconds[part] for part in PARTS},
            **fast,
            **({"domains": domains} if domains is not None else {}),
            **({"methods": methods} if methods else {}),
        )
        if self._engine.monitor.enabled:  # TensorBoard, W&B, ...: as the DeepSpeed JSON says
            values = {"loss": loss, "gradient_norm": norm, "lr": lr, "kept_rows": kept}
            prefix = f"stage_{self._stage:02d}_{self._name}"
            self._engine.monitor.write_events(
                [(f"{prefix}/{k}", v, step) for k, v in values.items()]
            )

    def close(self) -> None:
        self._progress.close()
