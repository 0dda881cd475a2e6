"""An attempt at a stage: it goes on from what the one before has saved, and saves in time."""

from pathlib import Path

from pipeline import signals
from pipeline.ranks import any_rank, end_if_asked
from pipeline.recipe import Resume
from pipeline.run.saver import Saver, newest
from pipeline.run.stage_state import StageState


class Attempt:
    """To train a stage: from where the one before has got to."""

    def __init__(self, folder: Path, settings: Resume | None, state: StageState, steps: int):
        """All ranks make it, when the stage is as it begins.

        Args:
            folder: of the stage's checkpoints. settings: None saves nothing.
            steps: of the stage.
        """
        self.state, self.behind = state, 0
        self._folder, self._settings, self._steps = folder, settings, steps
        self._saver: Saver | None = None
        if settings is not None:
            found = newest(folder)
            if found is not None:
                self.behind = state.load(found)
            self._saver = Saver(folder, settings, state, self.behind)

    def after_step(self, step: int) -> None:
        """Save where it is time to, and end where a rank was asked to. All ranks call it.

        Raises:
            Interrupted: on every rank, when what there is to save is on the disk.
            UserError: on every rank, where nothing can be saved and the recipe stops then.
        """
        saver = self._saver
        asked, late, failed = any_rank(
            signals.asked() is not None,
            saver is not None and saver.late,
            saver is not None and saver.failed,
        )
        last = step == self._steps  # the stage is published
        if failed:
            self.finish()
        if saver is not None and (asked or ((late or saver.due(step)) and not last)):
            saver.save(step)
        if asked:
            self.finish()
            end_if_asked()

    def leave(self, step: int) -> None:
        """What is there behind a step will be on the disk. All ranks call it."""
        if self._saver is not None and self._saver.newest != step:
            self._saver.save(step)
        self.finish()

    def go_back(self) -> int | None:
        """To weights, moments and methods of the newest checkpoint, whose step is returned; the
        place in the data stays. None where there is none. All ranks call it."""
        self.finish()
        found = newest(self._folder) if self._settings is not None else None
        return None if found is None else self.state.load(found, position=False)

    def finish(self) -> None:
        """Wait for what is being written. All ranks call it.

        Raises:
            UserError: on every rank, where it cannot be, and the recipe stops then.
        """
        if self._saver is not None:
            self._saver.finish()
