"""The end of a run, as a few lines for the terminal."""

from pathlib import Path

from eval.matrix import learning_curve
from eval.report.load import load_run
from pipeline.progress import say


def print_summary(page: Path) -> None:
    """Held-out loss after every stage, what was learned and forgotten, where the page is."""
    run = load_run(page.parent.parent)
    matrix = run.matrix
    width = max(12, *(len(s) + 4 for s in matrix.stages))
    say("\nheld-out loss (nats per predicted token) after each stage")
    say(" " * width + "".join(f"{d[:11]:>12}" for d in matrix.domains))
    for stage, values in zip(matrix.stages, matrix.values, strict=True):
        cells = "".join("           -" if v is None else f"{v:12.3f}" for v in values)
        say(f"  {stage:<{width - 2}}{cells}")
    curve = learning_curve(matrix)
    if len(curve) > 1:
        learned, forgotten = curve[-1]
        say(f"learned {learned:.3f}, forgotten {forgotten:.3f} nats per token (mean over domains)")
    say(f"report: {page}")
